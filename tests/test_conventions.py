"""Every pair of read and write sites: which nodes feed which, the factored rules against autograd, edges as measured.

Most models here run wholly in fp64 (transformers computes norms in fp32 inside, which `double_norms` undoes), so that
two ways to the same number agree to 1e-9 and a term of relative size 1e-6 that is missing is seen.
"""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from circuits.attribution import RULES
from circuits.building import assemble, by_layer, make_run, select, settle
from circuits.graph import BIAS, ERROR, FEATURE, REST, TARGET, TOKEN
from circuits.verification import measure_edges
from hooks import HookedModel, UserError
from hooks.sites import EMBEDDING, SiteSpec
from hooks.types import Edit

TEXT = "w1 w2 w3 w4"
WIDTH, K = 32, 6  # features of a layer, and how many are active: small, since most tests run on seventeen sets
WHOLE = {"node_threshold": 1.0, "edge_threshold": 1.0, "sample": 0}
CONSERVING = [name for name, rule in RULES.items() if rule.CONSERVES]

# what feeds the features of each layer (None: the tokens), and the targets last; written down, not worked out
ALL = (0, 1, 2, 3)
EVERY = {0: {None}, 1: {0, None}, 2: {0, 1, None}, 3: {0, 1, 2, None}, "t": {0, 1, 2, 3, None}}
NEWEST = {0: {None}, 1: {0}, 2: {1}, 3: {2}, "t": {3}}
FEEDERS = {
    ("mlp_in", "mlp_out", ALL): EVERY,
    ("mlp_in", "mlp_out", (1, 3)): {1: {None}, 3: {1, None}, "t": {1, 3, None}},
    ("resid_mid", "mlp_out", ALL): EVERY,
    ("resid_mid", "mlp_out", (0, 2)): {0: {None}, 2: {0, None}, "t": {0, 2, None}},
    ("resid_pre", "mlp_out", ALL): EVERY,
    ("resid_pre", "mlp_out", (1, 2)): {1: {None}, 2: {1, None}, "t": {1, 2, None}},
    ("mlp_in", "mlp_out+1", (0, 1, 2)): {0: {None}, 1: {None}, 2: {0, None}, "t": {0, 1, 2, None}},
    ("mlp_in", "mlp_out+1", (0, 2)): {0: {None}, 2: {0, None}, "t": {0, 2, None}},
    ("resid_pre", "resid_post", ALL): NEWEST,
    ("resid_pre", "resid_post", (0, 2)): {0: {None}, 2: {0}, "t": {2}},
    ("resid_pre", "resid_post", (1, 2)): {1: {None}, 2: {1}, "t": {2}},
    ("resid_mid", "resid_mid", ALL): NEWEST,
    ("resid_mid", "resid_mid", (1, 3)): {1: {None}, 3: {1}, "t": {3}},
    ("resid_pre", "resid_mid", ALL): NEWEST,
    ("resid_pre", "resid_mid", (0, 2)): {0: {None}, 2: {0}, "t": {2}},
    ("resid_pre", "attn_out", ALL): EVERY,
    ("resid_pre", "attn_out", (1, 3)): {1: {None}, 3: {1, None}, "t": {1, 3, None}},
}


def over(sets):
    return pytest.mark.parametrize("sites", sets, ids=lambda key: f"{key[0]}-{key[1]}-{''.join(map(str, key[2]))}")


EVERY_SET, FULL_SETS = over(list(FEEDERS)), over([key for key in FEEDERS if key[2] in (ALL, (0, 1, 2))])


def double_norms(model: torch.nn.Module) -> torch.nn.Module:
    """The same RMSNorms computed in the precision of what comes in."""

    def forward(norm, x):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = partial(forward, module)
    return model


@cache
def hooked(read: str, write: str, layers: tuple[int, ...], dtype=torch.float64, *, small: bool = False) -> HookedModel:
    """A random model with random transcoders; `small`: decoder rows, and so what features write, 1e-3 of that."""
    coders = []
    for layer in layers:
        sites = {"read": SiteSpec.parse(read).at(layer), "write": SiteSpec.parse(write).at(layer)}
        coder = random_transcoder(layer, 40, WIDTH, K, dtype=dtype, **sites)
        coders.append(replace(coder, W_dec=coder.W_dec / 1000) if small else coder)
    model = random_qwen2(dtype=dtype)
    return HookedModel.from_model(double_norms(model) if dtype == torch.float64 else model, word_tokenizer(), coders)


def local_run(model: HookedModel, text: str = TEXT, max_nodes: int | None = None, **options):
    """A setting and its run, by default with every active feature a node."""
    setting = settle(model, text, **options)
    return setting, run_of(setting, max_nodes)


def run_of(setting, max_nodes: int | None = None):
    return make_run(setting, by_layer(setting, select(setting, max_nodes, "score")))


def dense(run, rule: str) -> torch.Tensor:
    """All edges of a rule as a matrix [node, node], target by source."""
    out = torch.zeros(len(run.index), len(run.index), dtype=torch.float64)
    for rows in RULES[rule].edge_rows(run):
        out[rows.targets[:, None], rows.sources] = rows.weights.double()
    return out


@cache
def settled(sites):
    return settle(hooked(*sites), TEXT)


@cache
def exact_edges(sites):
    """The complete graph of a set: setting, run, and the exact rule's edges."""
    run = run_of(settled(sites))
    return settled(sites), run, dense(run, "exact")


@EVERY_SET
def test_the_factored_exact_rule_is_autograd_edge_by_edge(sites):
    _, run, fast = exact_edges(sites)
    assert (fast != 0).sum() > 100
    torch.testing.assert_close(fast, dense(run, "autograd"), rtol=1e-9, atol=1e-11)


@EVERY_SET
def test_conserving_rules_conserve_for_any_selection(sites):
    """Edges into a node are computed one by one; their sum and its value agree to rounding."""
    for rule in CONSERVING:
        for max_nodes in (None, 20, 1):
            ruled = replace(settled(sites), rule=rule)
            graph = assemble(ruled, run_of(ruled, max_nodes), 10**6)
            assert graph.meta["conservation"]["max_rel_error"] <= 1e-11
            (row,) = graph.index.rows(TARGET)
            assert graph.weight[graph.target == row].sum() == pytest.approx(graph.activation[row], rel=1e-11)


@over([("mlp_in", "mlp_out", ALL), ("resid_pre", "resid_post", (0, 2)), ("resid_mid", "resid_mid", ALL)])
def test_in_single_precision_they_conserve_to_its_rounding(sites):
    """1e-5 is fp32 rounding through four blocks and sums over some hundred edges."""
    model = hooked(*sites, dtype=torch.float32)
    for rule in CONSERVING:
        assert trace(model, TEXT, rule=rule, max_nodes=20, **WHOLE).meta["conservation"]["max_rel_error"] <= 1e-5


@EVERY_SET
def test_edges_come_from_the_feeders_and_from_all_of_them(sites):
    _, run, weights = exact_edges(sites)
    index = run.index
    for into, expected in FEEDERS[sites].items():
        rows = index.rows(TARGET) if into == "t" else index.rows(FEATURE, into)
        sources = np.flatnonzero((weights[rows] != 0).any(0).numpy())
        assert {None if layer == -1 else layer for layer in index.layer[sources].tolist()} == expected
    below = index.kind[np.flatnonzero((weights != 0).any(0).numpy())]
    assert set(below) <= {TOKEN, FEATURE, REST, ERROR, BIAS}


@EVERY_SET
def test_edges_are_central_differences_of_the_model_with_every_other_cut_held(sites):
    """The meaning of an edge: ±ε of what the source writes, read where the target reads, by explicit edits."""
    step = 1e-4
    setting, run, weights = exact_edges(sites)
    index = run.index
    for source in np.flatnonzero((index.kind == FEATURE) | (index.kind == TOKEN))[3::31].tolist():
        layer, pos, feature = (int(column[source]) for column in (index.layer, index.pos, index.feature))
        site, vector = EMBEDDING, run.embedding[pos]
        if layer != -1:
            coder = setting.model.store[layer]
            site = coder.write
            vector = setting.recording.layers[layer].acts.dense(WIDTH)[0, pos, feature] * coder.W_dec[feature]
        up, down = (_with_cuts_held(setting, run, site, pos, sign * step * vector) for sign in (1, -1))
        measured = (up - down) / (2 * step)
        known = np.isin(index.kind, (FEATURE, TARGET))
        if layer == -1:  # where a group reads the embedding itself the norm is held, by definition
            known &= ~np.isin(index.layer, [cut.layer for cut in run.cuts if cut.transcoder.read == EMBEDDING])
        torch.testing.assert_close(weights[known, source], measured[known], rtol=1e-5, atol=1e-7)


def _with_cuts_held(setting, run, moved, pos, vector) -> torch.Tensor:
    """Per node the value of features and targets after one pass, NaN for the others."""
    seen: dict = {}
    edits = [Edit(cut.transcoder.read, lambda x, at, layer=cut.layer: seen.setdefault(layer, x)) for cut in run.cuts]
    held = {cut.transcoder.write: setting.recording.layers[cut.layer].target for cut in run.cuts}
    if moved not in held:
        held = {moved: run.embedding[None], **held}
    for site, clean in held.items():
        new = clean.clone()
        if site == moved:
            new[0, pos] += vector
        edits.append(Edit(site, lambda x, at, new=new: new))
    logits = setting.model.host.forward(setting.recording.batch, edits)
    out = torch.full((len(run.index),), torch.nan, dtype=torch.float64)
    out[run.index.rows(TARGET)] = torch.stack([target.value(logits)[0] for target in setting.targets])
    for cut in run.cuts:
        pre = cut.transcoder.preactivations(seen[cut.layer][0])
        out[run.index.rows(FEATURE, cut.layer)] = pre[cut.pos, cut.feature]
    return out


@FULL_SETS
def test_measured_edges_are_the_exact_ones_where_features_write_little(sites):
    """Decoder rows at 1e-3: what is left is the curvature, of the order of the change."""
    assert bend(hooked(*sites, small=True)) < 5e-3


def test_measured_edges_of_features_that_write_much_do_bend():
    """So the check above is not one of a thing with itself."""
    assert bend(hooked("mlp_in", "mlp_out", ALL)) > 0.05


def bend(model: HookedModel) -> float:
    """Mean |measured − predicted| over mean |predicted| of a sample of edges."""
    setting, run = local_run(model)
    edges, noise = measure_edges(setting, assemble(setting, run, 10**6), n=30, seed=0)
    assert len(edges) == 30
    assert noise < 1e-12
    return float((edges["weight"] - edges["effect"]).abs().mean() / edges["weight"].abs().mean())


def linearised_encoder(coder, x: torch.Tensor, feature: int) -> torch.Tensor:
    """∂pre/∂x written out: 1/σ (I − 11ᵀ/d − x̂x̂ᵀ/d) (γ w), σ the standard deviation with eps inside."""
    d = len(x)
    centred = x - x.mean()
    sigma = (centred.square().mean() + coder.norm_eps).sqrt()
    unit, g = centred / sigma, coder.norm_weight * coder.W_enc[feature]
    return (g - g.sum() / d - unit * (unit @ g) / d) / sigma


def test_where_features_write_what_the_next_layer_reads_an_edge_is_one_dot_product():
    """Next-layer sets: a_i d_i · u_j at equal positions, with no block between, and nothing at others."""
    setting, run, weights = exact_edges(("resid_pre", "resid_post", ALL))
    model, index, checked = setting.model, run.index, 0
    for layer in (1, 2, 3):
        x = setting.recording.layers[layer].read[0]
        acts = setting.recording.layers[layer - 1].acts.dense(WIDTH)[0]
        for target in index.rows(FEATURE, layer).tolist():
            t, j = int(index.pos[target]), int(index.feature[target])
            u = linearised_encoder(model.store[layer], x[t], j)
            sources = index.rows(FEATURE, layer - 1)
            there = index.pos[sources] == t
            assert (weights[target, sources[~there]] == 0).all()
            i = index.feature[sources[there]]
            expected = acts[t, i] * (model.store[layer - 1].W_dec[i] @ u)
            torch.testing.assert_close(weights[target, sources[there]], expected, rtol=1e-10, atol=1e-13)
            checked += int(there.sum())
    assert checked > 400


def test_with_a_layer_missing_next_layer_features_cross_positions():
    """Then a block lies between, and its attention."""
    _, run, weights = exact_edges(("resid_pre", "resid_post", (0, 2)))
    later, earlier = run.index.rows(FEATURE, 2), run.index.rows(FEATURE, 0)
    apart = run.index.pos[later][:, None] > run.index.pos[earlier]
    assert (weights[later][:, earlier][apart] != 0).all()


def test_biases_of_additive_sets_reach_later_positions_and_layers():
    """The decoder bias stands at every token: its edge is the derivative with respect to all of them at once."""
    setting, run, weights = exact_edges(("mlp_in", "mlp_out", ALL))
    index, step = run.index, 1e-5
    (bias,) = index.rows(BIAS, 0)
    moved = setting.model.store[0].write
    vector = setting.model.store[0].b_dec
    up, down = (_with_cuts_held(setting, run, moved, slice(None), sign * step * vector) for sign in (1, -1))
    measured = (up - down) / (2 * step)
    later = index.rows(FEATURE, 3)
    torch.testing.assert_close(weights[later, bias], measured[later], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("read", "write"), [("resid_pre", "mlp_in"), ("mlp_in", "mlp_in"), ("attn_out", "mlp_in")])
def test_sites_without_a_graph_are_refused(read, write):
    model = hooked(read, write, (0, 1))
    with pytest.raises(UserError, match=f"there is no graph for transcoders that read {read} and write {write}"):
        trace(model, TEXT)


@pytest.mark.parametrize("site", ["mlp_out", "attn_out"])
def test_sites_that_only_autograd_can_read(site):
    """Same-site dictionaries on a module's output: exact falls back to autograd, conserving rules say they cannot."""
    model = hooked(site, site, (0, 1, 3))
    _, run = local_run(model)
    weights = dense(run, "exact")
    assert torch.equal(weights, dense(run, "autograd"))
    assert (weights != 0).sum() > 100
    with pytest.raises(UserError, match="what a block computes"):
        trace(model, TEXT, rule="affine")
    assert bend(hooked(site, site, (0, 1, 3), small=True)) < 5e-3
