"""Which features become nodes: every order against a slow twin, the shares of the layers, and the edge budget."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_conventions import ALL, TEXT, WHOLE, hooked, run_of, settled

from circuits import Feature, Mass, trace
from circuits.attribution import one_step_scores
from circuits.building import ORDERS, assemble, coverage, select, settle
from circuits.building.choose_nodes import KEYS
from circuits.graph import FEATURE
from hooks import HookedModel, Site, UserError
from hooks.host import tap
from hooks.types import Edit

SAME, NEXT, MLP = ("resid_pre", "resid_pre", ALL), ("resid_pre", "resid_post", ALL), ("mlp_in", "mlp_out", ALL)
GAPS = ("resid_pre", "resid_pre", (0, 2))
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)


def strengths(sites, order: str, **changes) -> pd.Series:
    """What an order ranks all active features by: `select` asked for all but one."""
    setting = replace(settled(sites), **changes)
    table = ORDERS[order](setting, setting.scores.frame, len(setting.scores.frame) - 1)
    return table.set_index(KEYS)["order"].sort_index()


def chosen(sites, max_nodes: int, order: str) -> pd.DataFrame:
    return select(settled(sites), max_nodes, order)


# -- how many, and from where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_nodes", [1, 7, 40])
@pytest.mark.parametrize("sites", [GAPS, MLP], ids=str)
@EVERY_ORDER
def test_as_many_as_asked_for_half_of_them_shared_over_the_layers(sites, order, max_nodes):
    rows = chosen(sites, max_nodes, order)
    layers = len(sites[2])
    assert len(rows) == max_nodes
    assert not rows.duplicated(KEYS).any()
    assert (rows.groupby("layer").size().reindex(sites[2], fill_value=0) >= max_nodes // 2 // layers).all()


@EVERY_ORDER
def test_the_strongest_of_each_layer_and_then_the_strongest_of_all(order):
    """Worked out anew from the strengths: a share of each layer's best, the other places to the best of the rest."""
    rows, ranked = chosen(SAME, 24, order), strengths(SAME, order).rename("order").reset_index()
    ranked = ranked.sort_values(["order", *KEYS], ascending=[False, True, True, True])
    first = ranked.groupby("layer").head(3)  # 24 / 2 / 4 layers
    rest = ranked.drop(first.index).head(12)
    assert set(map(tuple, rows[KEYS].to_numpy())) == set(map(tuple, pd.concat([first, rest])[KEYS].to_numpy()))


@EVERY_ORDER
def test_every_order_is_deterministic(order):
    first, second = (chosen(MLP, 20, order) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_ties_go_by_layer_position_and_feature():
    """Behind the target no feature has any score: all of their places are ties."""
    setting = settled(SAME)
    scores = setting.scores
    flat = {layer: replace(one, score=torch.ones_like(one.score)) for layer, one in scores.layers.items()}
    setting = replace(setting, scores=replace(scores, layers=flat))
    rows = select(setting, 8, "score")  # one of each layer, then the first four
    keys = sorted(map(tuple, setting.scores.frame[KEYS].to_numpy().tolist()))
    expected = {next(key for key in keys if key[0] == layer) for layer in ALL}
    expected |= set([key for key in keys if key not in expected][:4])
    assert set(map(tuple, rows[KEYS].to_numpy().tolist())) == expected


@EVERY_ORDER
def test_none_is_everything(order):
    table = settled(SAME).scores.frame
    for max_nodes in (None, len(table), 10**6):
        assert len(chosen(SAME, max_nodes, order)) == len(table)


def test_coverage_is_the_share_of_the_summed_score():
    setting = settled(SAME)
    rows = select(setting, 30, "score")
    facts = coverage(setting, rows, "score")
    total = setting.scores.frame["score"].abs().sum()
    assert facts["covered_score"] == pytest.approx(rows["score"].abs().sum() / total)
    assert (facts["selected"], facts["active_features"]) == (30, len(setting.scores.frame))
    assert coverage(setting, setting.scores.frame, "score")["covered_score"] == pytest.approx(1.0)


# -- the orders against their slow twins -----------------------------------------------------------------------------


def test_score_is_the_score():
    table = settled(MLP).scores.frame.set_index(KEYS)["score"].abs().sort_index()
    pd.testing.assert_series_equal(strengths(MLP, "score"), table, check_names=False)


@pytest.mark.parametrize("sites", [SAME, NEXT, MLP], ids=str)
def test_ose_is_the_next_block_run_for_real(sites):
    """Each feature taken out by a hook, the stream behind the next block read by another, by its gradient there."""
    setting, found = settled(sites), strengths(sites, "ose")
    assert len(found) == len(setting.scores.frame)
    for place, strength in found.iloc[::9].items():
        assert strength == pytest.approx(abs(really_run(setting, *place)), rel=1e-9, abs=1e-12)


def really_run(setting, layer: int, pos: int, feature: int, blocks: int = 1) -> float:
    model, batch = setting.model, setting.recording.batch
    coder = model.store[layer]
    depth = {"resid_pre": layer, "resid_post": layer + 1, "mlp_out": layer + 1}[coder.write.name]
    behind = Site("resid_post", min(depth + blocks, model.host.n_layers) - 1)
    written = setting.recording.layers[layer].acts.dense(32)[0, pos, feature] * coder.W_dec[feature]

    def without(x, at):
        out = x.clone()
        out[:, pos] -= written
        return out

    streams = []
    for edits in ([], [Edit(coder.write, without)]):
        seen: dict = {}
        model.host.forward(batch, [*edits, tap(behind, seen)])
        streams.append(seen[behind][0])
    return float((gradient_at(setting, behind) * (streams[0] - streams[1])).sum())


def gradient_at(setting, site: Site) -> torch.Tensor:
    leaf: dict = {}

    def start(x, at):
        leaf["x"] = x.detach().requires_grad_()
        return leaf["x"]

    logits = setting.model.host.forward_with_gradients(setting.recording.batch, [Edit(site, start)])
    value = sum(target.weight * target.value(logits)[0] for target in setting.targets)
    return torch.autograd.grad(value, leaf["x"])[0][0]


@pytest.mark.parametrize("blocks", [2, 9])
def test_ose_may_run_further_and_at_the_end_is_the_ablation_itself_but_for_the_unembedding(blocks):
    setting = settled(SAME)
    scored = setting.scores.layers[1]
    nodes = (scored.pos[::7], scored.feature[::7], scored.activation[::7])
    found = one_step_scores(setting.model, setting.recording, setting.targets, 1, nodes, blocks=blocks)
    for strength, pos, feature in zip(found.tolist(), nodes[0].tolist(), nodes[1].tolist(), strict=True):
        assert strength == pytest.approx(really_run(setting, 1, pos, feature, blocks), rel=1e-9, abs=1e-12)


def test_ose_stops_at_a_target_within_the_model():
    """All blocks up to where the target reads: then it is the change of what stands there, along the gradient."""
    model = hooked(*SAME)
    graph = trace(model, TEXT, Feature("L3/7"), select_by="ose", max_nodes=10, **WHOLE)
    assert (graph.index.kind == FEATURE).sum() == 10
    assert max(graph.meta["layers"]) == 2


def test_ose_needs_whole_blocks():
    with pytest.raises(UserError, match="ose runs whole blocks"):
        trace(hooked("resid_mid", "resid_mid", ALL), TEXT, select_by="ose", max_nodes=5, **WHOLE)


def test_ose_looks_at_the_candidates_of_the_highest_score():
    """Four per place: a feature beyond them is not run, so the choice is among them."""
    setting = settled(SAME)
    best = setting.scores.frame.head(4)
    one = chosen(SAME, 1, "ose")
    assert tuple(one[KEYS].iloc[0]) in set(map(tuple, best[KEYS].to_numpy()))
    ranked = strengths(SAME, "ose").loc[list(map(tuple, best[KEYS].to_numpy()))]
    assert tuple(one[KEYS].iloc[0]) == ranked.idxmax()


@pytest.mark.parametrize("rule", ["exact", "affine", "autograd"])
@pytest.mark.parametrize("sites", [SAME, MLP], ids=str)
def test_influence_is_that_in_the_complete_graph(sites, rule):
    found = strengths(sites, "influence", rule=rule)
    graph = trace(hooked(*sites), TEXT, rule=rule, max_nodes=None, max_in_edges=10**6, **WHOLE)
    nodes = graph.nodes_frame().query("kind == 'feature'").set_index(["layer", "pos", "feature"])["influence"]
    np.testing.assert_allclose(nodes.reindex(found.index, fill_value=0.0), found, rtol=1e-9, atol=1e-12)
    assert (found > 0).sum() > 0.3 * len(found)


def test_influence_starts_at_the_targets_with_their_weights():
    model, explained = hooked(*SAME), Mass(0.5)
    setting = settle(model, TEXT, explained)
    assert len({target.weight for target in setting.targets}) > 1
    table = ORDERS["influence"](setting, setting.scores.frame, 10).set_index(KEYS)["order"]
    graph = trace(model, TEXT, explained, max_nodes=None, max_in_edges=10**6, **WHOLE)
    nodes = graph.nodes_frame().query("kind == 'feature'").set_index(["layer", "pos", "feature"])["influence"]
    np.testing.assert_allclose(nodes.reindex(table.index, fill_value=0.0), table, rtol=1e-9, atol=1e-12)


def test_influence_does_not_depend_on_how_many_targets_a_rule_serves_at_once(monkeypatch):
    """autograd serves some targets of every group in one pass, so lower groups begin before higher ones are done."""
    expected = strengths(SAME, "influence", rule="autograd")
    monkeypatch.setattr("circuits.attribution.autograd.COPIES", 5)
    np.testing.assert_allclose(strengths(SAME, "influence", rule="autograd"), expected, rtol=1e-9, atol=1e-12)


def test_an_order_is_a_set_of_strengths_of_its_own():
    """They differ on this prompt; a graph says which one chose it."""
    picks = {order: frozenset(map(tuple, chosen(SAME, 12, order)[KEYS].to_numpy().tolist())) for order in ORDERS}
    assert len(set(picks.values())) == len(ORDERS)
    graph = trace(hooked(*SAME), TEXT, select_by="total", max_nodes=12, **WHOLE)
    assert graph.meta["selection"]["order"] == "total"
    rows = graph.index.rows(FEATURE)
    columns = (graph.index.layer, graph.index.pos, graph.index.feature)
    assert {tuple(int(c[row]) for c in columns) for row in rows} == picks["total"]


def test_an_unknown_order_is_refused():
    with pytest.raises(UserError, match="unknown order of selection 'magic'"):
        trace(hooked(*SAME), TEXT, select_by="magic")


# -- the budget for edges --------------------------------------------------------------------------------------------


def test_a_small_budget_keeps_fewer_edges_and_says_so(caplog):
    model = hooked(*SAME)
    rows = len(settled(SAME).scores.frame) + 1  # every feature, and the target
    with caplog.at_level(logging.WARNING, logger="circuits"):
        graph = trace(model, TEXT, max_nodes=None, budget_bytes=24 * rows * 5 + 23, **WHOLE)
    assert graph.meta["max_in_edges"] == 5
    assert f"keeping 5 edges into each of {rows} nodes" in caplog.text
    explained = trace(model, TEXT, max_nodes=None, max_in_edges=5, **WHOLE)
    assert graph.edges_frame().equals(explained.edges_frame())


def test_no_budget_is_too_small_for_one_edge_per_node(caplog):
    graph = trace(hooked(*SAME), TEXT, max_nodes=None, budget_bytes=0, **WHOLE)
    assert graph.meta["max_in_edges"] == 1
    assert "do not fit into 0 bytes" in caplog.text


def test_where_all_fits_nothing_is_said(caplog):
    graph = trace(hooked(*SAME), TEXT, max_nodes=20, max_in_edges=50, **WHOLE)
    assert graph.meta["max_in_edges"] == 50
    assert not caplog.records


def test_the_complete_graph_of_the_embedded_model(demo: HookedModel):
    """Every order chooses on a trained model, too."""
    prompt = "fact: the capital of the state containing Dallas is"
    for order in ORDERS:
        graph = trace(demo, prompt, select_by=order, max_nodes=50, **WHOLE)
        assert (graph.index.kind == FEATURE).sum() > 0
        assert graph.meta["selection"] == graph.meta["selection"] | {"selected": 50, "order": order}


def test_remainders_are_neither_kept_nor_cut_by_the_budget():
    """One per node beside the strongest edges, so that what is shown still adds up."""
    setting = settled(SAME)
    run = run_of(setting)
    full, few = (assemble(setting, run, most) for most in (10**6, 3))
    kinds = [graph.index.kind[graph.source] for graph in (full, few)]
    remainder = full.index.kind.max()
    shown = [graph.weight[kind == remainder] for graph, kind in zip((full, few), kinds, strict=True)]
    np.testing.assert_array_equal(*shown)
    assert np.bincount(few.target[kinds[1] != remainder]).max() == 3
