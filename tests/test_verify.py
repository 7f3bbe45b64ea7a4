"""The check is itself checked: it measures what it says, on a sample that is spread, with its noise known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_interventions import strongest
from worlds import random_hooked

from circuits import trace, verify
from circuits.agreement import rank_correlation
from circuits.building import settle
from circuits.graph import FEATURE
from circuits.verification import measure_edges, measure_nodes
from circuits.verification.verifying import stratified
from hooks import Ablate, Scale, UserError
from hooks.types import Edit


@pytest.fixture(scope="module")
def graph(model, prompt):
    return trace(model, prompt, sample=0, node_threshold=1.0, edge_threshold=1.0)


def test_a_measured_node_effect_is_one_real_ablation(model, prompt, graph):
    setting = settle(model, prompt)
    (target,) = setting.targets
    nodes, noise = measure_nodes(setting, n=40, seed=1)
    for row in nodes.iloc[::9].itertuples():
        run = model.run(prompt, [Ablate(f"L{row.layer}/{row.feature}@{row.pos}")])
        effect = float(target.value(run.baseline) - target.value(run.logits))
        assert row.effect == pytest.approx(effect, abs=1e-4)
        twice = model.run(prompt, [Scale(f"L{row.layer}/{row.feature}@{row.pos}", 2.0)])
        assert row.doubled == pytest.approx(float(target.value(twice.logits - twice.baseline)), abs=1e-4)
    assert 0 <= noise < 1e-3


def test_a_measured_edge_effect_is_one_real_ablation_up_to_the_next_cut(model, prompt, graph):
    batch = model.host.batch([prompt])
    edges, noise = measure_edges(settle(model, prompt), graph, n=60, seed=1)
    assert 0 <= noise < 1e-3
    checked = 0
    for edge in edges.itertuples():
        source, into = graph.names[edge.source], graph.names[edge.target]
        if not into.startswith("L"):
            continue
        layer, pos = int(graph.index.layer[edge.target]), int(graph.index.pos[edge.target])
        site, feature = model.store.convention.read.at(layer), int(graph.index.feature[edge.target])
        seen = []
        for plan in ([], [Ablate(source)]):
            stream = {}
            from_edits = model.edits(batch, [plan])
            model.host.forward(batch, [*from_edits, _tap(site, stream)])
            seen.append(float(model.store[layer].preactivations(stream["x"][0, pos])[feature]))
        assert edge.effect == pytest.approx(seen[0] - seen[1], abs=1e-3)
        checked += 1
        if checked == 6:
            return
    assert checked


def _tap(site, out):
    return Edit(site, lambda x, at: out.setdefault("x", x))


def test_the_same_seed_measures_the_same_sample(model, graph):
    first, second = (verify(model, graph, n=30, seed=4) for _ in range(2))
    assert first.summary() == second.summary()
    assert (first.n, first.n_edges) == (30, 30)
    other = verify(model, graph, n=30, seed=5)
    assert set(map(tuple, other.nodes[["layer", "pos", "feature"]].to_numpy())) != set(
        map(tuple, first.nodes[["layer", "pos", "feature"]].to_numpy())
    )


def test_all_are_measured_when_the_sample_is_larger_than_the_prompt(model, graph):
    check = verify(model, graph, n=10**6)
    assert check.n == graph.meta["selection"]["active_features"]


def test_a_sample_is_spread_over_strength_layer_and_position():
    rng = np.random.default_rng(0)
    rows = [(layer, pos) for layer in range(6) for pos in range(10) for _ in range(12)]
    table = pd.DataFrame(rows, columns=["layer", "pos"]).assign(score=rng.normal(size=len(rows)))
    sample = stratified(table, table["score"].abs(), 200, seed=0)
    assert len(sample) == 200
    assert not sample.index.has_duplicates
    deciles = pd.qcut(table["score"].abs(), 10, labels=False)[sample.index]
    assert deciles.value_counts().between(18, 22).all()
    assert sample["layer"].value_counts().between(25, 42).all()
    assert sample["pos"].nunique() == 10


def test_a_graph_of_another_model_is_refused(demo, demo_dense):
    graph = trace(demo, "fact: the capital of the state containing Dallas is", sample=0)
    with pytest.raises(UserError, match="another model"):
        verify(demo_dense, graph)


def test_a_graph_with_wrong_scores_is_found_out(model, prompt, graph):
    """The check reads the graph's own scores: permuted among its features, they no longer predict anything."""
    order = np.arange(graph.n_nodes)
    features = graph.index.rows(FEATURE)
    order[features] = np.random.default_rng(0).permutation(features)
    wrong = replace(graph, score=graph.score[order])
    assert abs(verify(model, wrong, n=200).node_spearman) < 0.35
    assert verify(model, graph, n=200).node_spearman > 0.5


def test_a_graph_of_a_changed_model_is_refused(odd):
    graph = trace(odd, "w1 w2 w3", sample=0)
    changed = random_hooked()
    verify(changed, graph, n=5)  # the same numbers elsewhere in memory
    for layer in changed.host.layers:
        layer.mlp.down_proj.weight.data.zero_()
    del changed.__dict__["fingerprint"]
    with pytest.raises(UserError, match="another model"):
        verify(changed, graph)


def test_the_check_can_fail(model, prompt, graph):
    """Shuffled scores must not correlate: the figure means something."""
    check = verify(model, graph, n=200)
    shuffled = check.nodes["score"].sample(frac=1, random_state=0).reset_index(drop=True)
    assert abs(rank_correlation(shuffled, check.nodes["effect"])) < 0.35
    assert check.node_spearman > 0.5
    assert check.edge_spearman > 0.5
    assert strongest(model, prompt, 1, -1)[1] > 0
