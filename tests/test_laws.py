"""Laws that any correct engine obeys, whatever the weights: conservation at every cut, Euler's zeros, causality, what
inactive features and remainders may not do, and the block algebra against itself.
"""

from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from test_blocks import LENGTH, block  # noqa: F401  a fixture: random fp64 blocks of every architecture
from test_conventions import ALL, TEXT, dense, hooked, run_of, settled

from circuits import Direction, Feature, Logit
from circuits.attribution import RULES
from circuits.blocks import (
    Rule,
    pull_back,
    read_block,
    record_block,
    spread,
    through_attention,
    through_attention_everywhere,
)
from circuits.building import assemble, make_run, settle
from circuits.edges.metric_ends import encoder_bias
from circuits.graph import BIAS, FEATURE, NONE, REMAINDER, TARGET, node_influence
from circuits.targets import metric
from hooks import Site
from hooks.kernels import linear_fp32, matmul_fp32
from hooks.kernels import products as kernels

SAME, MLP = ("resid_pre", "resid_pre", ALL), ("mlp_in", "mlp_out", ALL)
FACTORED = {name: rule.RULE for name, rule in RULES.items() if hasattr(rule, "RULE") and name != "ig"}
LEFT_OVER = [name for name, rule in RULES.items() if not rule.CONSERVES]
VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(3))
TARGETS = {
    "logit": Logit("w5"),
    "earlier": Logit("w6", pos=1),
    "list": [Logit("w5"), Logit("w6", pos=1)],
    "direction": Direction(VECTOR, Site("resid_mid", 2), pos=2),
    "feature": Feature("L3/7"),
}
EVERY_RULE = [Rule(*choice) for choice in product(*([("exact", "frozen")] * 2), ("exact", "half", "frozen"))]


# -- P2: at every depth of the stream --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["affine", "half"])
@pytest.mark.parametrize("name", TARGETS)
def test_at_every_cut_the_stream_along_the_gradient_is_the_metric_less_the_value_biases_above(name, rule):
    """metric = sum_t x_L[t] · g_L[t] + sum over blocks l ≥ L of sum_t g_mid,l[t] · W_O b_V + the encoder's constant.

    A held pattern's rows sum to 1, so the value bias of a block adds the same W_O b_V to every token's x_mid.
    """
    model = hooked(*SAME)
    setting = settle(model, TEXT, TARGETS[name])
    end = setting.targets[0].site or Site("resid_post", 3)
    depths = [Site(kind, layer) for layer in range(4) for kind in ("resid_pre", "resid_mid")]
    depths = [site for site in [*depths, Site("resid_post", 3)] if site.depth <= end.depth]
    found = RULES[rule].gradients(model, setting.recording, setting.targets, tuple(depths))
    final, seen = model.host.capture(setting.recording.batch, [*depths, end])
    value = float(metric(setting.targets, seen[end] if setting.targets[0].site else model.host.unembed(final)))
    above = sum(_constant(target) for target in setting.targets)
    for site in reversed(depths):
        if site.name == "resid_pre" and Site("resid_mid", site.layer) in found:
            above += float(found[Site("resid_mid", site.layer)].sum(0) @ _value_bias(model, site.layer))
        assert float((seen[site][0] * found[site]).sum()) + above == pytest.approx(value, rel=1e-10), site
    assert abs(above) > 1e-3 * abs(value)  # there are biases to speak of


def _constant(target) -> float:
    if not isinstance(target, Feature):
        return 0.0
    return target.weight * float(encoder_bias(target.transcoder, torch.tensor([target.address.feature])))


def _value_bias(model, layer: int) -> torch.Tensor:
    w = read_block(model.host.model, layer)
    heads = w.b_V.view(w.n_kv, 1, w.d_head).expand(-1, w.group, -1).reshape(-1)
    return w.W_O @ heads


@pytest.mark.parametrize("rule", ["affine", "half"])
def test_at_every_cut_the_scores_of_all_nodes_are_the_stream_along_the_gradient(rule):
    """Features, error and decoder bias of a layer make up what stands there, so their scores do, too."""
    setting = settled(SAME)
    sites = {layer: setting.model.store[layer].write for layer in ALL}
    found = RULES[rule].gradients(setting.model, setting.recording, setting.targets, tuple(sites.values()))
    for layer, site in sites.items():
        record, coder, g = setting.recording.layers[layer], setting.model.store[layer], found[site]
        features = (record.acts.dense(len(coder.W_dec))[0] * (g @ coder.W_dec.T)).sum()
        total = features + (record.error[0] * g).sum() + (g @ coder.b_dec).sum()
        assert float(total) == pytest.approx(float((record.target[0] * g).sum()), rel=1e-10)


# -- P4: Euler's zeros -----------------------------------------------------------------------------------------------


def test_behind_the_final_norm_the_exact_gradient_is_orthogonal_to_the_stream_up_to_eps():
    """Scaling x leaves x / sqrt(mean x² + ε) alone but for ε: x·g = m ε / (mean x² + ε), and m where it is held."""
    setting = settled(SAME)
    model, (target,), end = setting.model, setting.targets, Site("resid_post", 3)
    final, seen = model.host.capture(setting.recording.batch, [end])
    x, value = seen[end][0, target.pos], float(target.value(model.host.unembed(final)))
    share = 1e-5 / (float(x.square().mean()) + 1e-5)
    for rule, expected in (("exact", share), ("affine", 1.0), ("relp", 1.0)):
        (g,) = RULES[rule].gradients(model, setting.recording, setting.targets, (end,)).values()
        assert (g[: target.pos] == 0).all()
        assert float(x @ g[target.pos]) == pytest.approx(expected * value, rel=1e-7)
    assert share < 1e-4


@pytest.mark.parametrize("sites", [SAME, MLP], ids=str)
def test_behind_an_encoders_norm_too(sites):
    """LayerNorm: u · (x − mean x) is the value without constants times ε / (var + ε); u · 1 is 0 under any rule."""
    model = hooked(*sites)
    setting = settle(model, TEXT, Feature("L3/7"))
    (target,), coder = setting.targets, model.store[3]
    _, seen = model.host.capture(setting.recording.batch, [coder.read])
    x = seen[coder.read][0, 3]
    value = float(target.of_row(x[None])) - _constant(target)
    centred = x - x.mean()
    share = 1e-5 / (float(centred.square().mean()) + 1e-5)
    if coder.read.name == "mlp_in":
        g = RULES["exact"].gradients(model, setting.recording, setting.targets, (coder.read,))[coder.read][3]
    else:
        found = {
            rule: RULES[rule].gradients(model, setting.recording, setting.targets, (coder.read,))[coder.read][3]
            for rule in ("exact", "affine")
        }
        g = found["exact"]
        assert float(centred @ found["affine"]) == pytest.approx(value, rel=1e-10)
        assert float(found["affine"].sum()) == pytest.approx(0, abs=1e-12)
    assert float(centred @ g) == pytest.approx(share * value, rel=1e-6)
    assert float(g.sum()) == pytest.approx(0, abs=1e-12)


def test_behind_both_norms_of_a_set_that_reads_the_mlps_input():
    """From the stream, RMSNorm stands in front: x_mid · g ≈ 0 under exact, and the value under affine."""
    model = hooked(*MLP)
    setting = settle(model, TEXT, Feature("L2/7"))
    middle = Site("resid_mid", 2)
    _, seen = model.host.capture(setting.recording.batch, [middle])
    x = seen[middle][0, 3]
    value = float(metric(setting.targets, setting.recording.layers[2].read)) - _constant(setting.targets[0])
    for rule, expected in (("exact", 0.0), ("affine", value)):
        g = RULES[rule].gradients(model, setting.recording, setting.targets, (middle,))[middle][3]
        assert float(x @ g) == pytest.approx(expected, abs=1e-3 * abs(value), rel=1e-10)


# -- P5, P8: what has no edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "rule"),
    [*((SAME, rule) for rule in RULES), *((MLP, rule) for rule in RULES if rule != "ig")],  # ig needs one feeding cut
)
def test_nothing_comes_from_later_positions(sites, rule):
    run = run_of(replace(settled(sites), rule=rule), 40)
    weights, pos = dense(run, rule), torch.from_numpy(run.index.pos)
    later = (pos[:, None] != NONE) & (pos > pos[:, None])
    assert (weights[later] == 0).all()
    assert (weights != 0).sum() > 100


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_active_feeds_nothing(rule):
    """Asked for as a node, a feature that TopK did not keep has edges into it and none out of it."""
    setting = replace(settled(SAME), rule=rule)
    selected = {layer: [] for layer in ALL}
    silent = {}
    for layer in ALL:
        active = set(setting.recording.layers[layer].acts.indices[0, 2].tolist())
        silent[layer] = next(feature for feature in range(32) if feature not in active)
        selected[layer] = [(2, silent[layer]), (2, min(active))]
    run = make_run(setting, selected)
    weights, index = dense(run, rule), run.index
    for row in index.rows(FEATURE):
        out = weights[:, row].abs().sum()
        assert (out == 0) == (silent[int(index.layer[row])] == int(index.feature[row]))
    inner = [row for row in index.rows(FEATURE) if index.layer[row] > 0]
    assert (weights[inner].abs().sum(1) > 0).all()


@pytest.mark.parametrize("rule", FACTORED)
def test_the_edges_of_a_pair_are_those_of_the_prompt_by_the_share_that_differs(rule):
    """The same derivative times (a − a') in place of a; biases have no part."""
    setting = replace(settled(SAME), rule=rule)
    other = settle(setting.model, TEXT, Logit("w5", "w6"), counterfactual="w1 w30 w3 w4", rule=rule)
    setting = replace(setting, targets=other.targets)
    nodes = {
        layer: [(int(p), int(f)) for p, f in zip(scored.pos, scored.feature, strict=True)]
        for layer, scored in other.scores.layers.items()
    }
    alone, pair = make_run(setting, nodes), make_run(other, nodes)
    weights, moved = dense(alone, rule), dense(pair, rule)
    assert (moved[:, pair.index.kind == BIAS] == 0).all()
    checked = 0
    for cut, paired in zip(alone.cuts, pair.cuts, strict=True):
        from_alone, from_pair = (run.index.rows(FEATURE, cut.layer) for run in (alone, pair))
        into_alone, into_pair = (
            np.flatnonzero((run.index.kind == FEATURE) | (run.index.kind == TARGET)) for run in (alone, pair)
        )
        active = (cut.activation > 0).numpy()
        share = (paired.activation / cut.activation)[active]
        expected = weights[into_alone][:, from_alone[active]] * share
        torch.testing.assert_close(moved[into_pair][:, from_pair[active]], expected, rtol=1e-9, atol=1e-12)
        checked += int((expected != 0).sum())
    assert checked > 100


# -- remainders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LEFT_OVER)
def test_with_the_remainder_the_edges_into_any_node_are_its_value(rule):
    setting = replace(settled(SAME), rule=rule)
    graph = assemble(setting, run_of(setting, 30), 10**6)
    index, left = graph.index, 0.0
    for row in np.flatnonzero((index.kind == FEATURE) | (index.kind == TARGET)):
        value = graph.activation[row]  # of an active feature the pre-activation itself
        assert graph.weight[graph.target == row].sum() == pytest.approx(value, rel=1e-9)
        left += np.abs(graph.weight[(graph.target == row) & (index.kind[graph.source] == REMAINDER)]).sum()
    mass = np.abs(graph.weight).sum() - left
    assert graph.meta["remainder_share"] == pytest.approx(left / (left + mass), rel=1e-9)


@pytest.mark.parametrize("rule", LEFT_OVER)
def test_remainders_stand_below_everything_and_count_in_nothing(rule):
    setting = replace(settled(SAME), rule=rule)
    graph = assemble(setting, run_of(setting, 30), 10**6)
    index = graph.index
    rows = index.rows(REMAINDER)
    assert (graph.influence[rows] == 0).all()
    assert (graph.score[rows] == 0).all()
    assert not np.isin(graph.target, rows).any()
    assert sorted(index.feature[rows]) == [NONE, *ALL]
    real = index.kind[graph.source] != REMAINDER
    without, _ = node_influence(index, graph.source[real], graph.target[real], graph.weight[real])
    np.testing.assert_allclose(graph.influence, without, rtol=1e-9, atol=1e-15)
    assert graph.meta["kept_weight"] == pytest.approx(1.0)
    few = assemble(setting, run_of(setting, 30), 4)
    np.testing.assert_allclose(few.influence[index.rows(TARGET)], 1.0)
    kept = np.abs(few.weight[few.index.kind[few.source] != REMAINDER]).sum()
    assert few.meta["kept_weight"] == pytest.approx(kept / np.abs(graph.weight[real]).sum(), rel=1e-9)


def test_conserving_rules_have_no_remainder_but_in_pairs():
    setting = replace(settled(SAME), rule="affine")
    graph = assemble(setting, run_of(setting, 30), 10**6)
    assert not (graph.index.kind == REMAINDER).any()
    pair = settle(setting.model, TEXT, counterfactual="w1 w30 w3 w4", rule="affine")
    graph = assemble(pair, run_of(pair, 30), 10**6)
    assert (graph.index.kind == REMAINDER).any()
    assert "conservation" not in graph.meta


# -- rules, one and all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_groups_come_from_the_targets_down(rule, monkeypatch):
    """Whoever reads edges as they come may rely on it: what feeds a node comes after all that the node feeds."""
    monkeypatch.setattr("circuits.attribution.autograd.COPIES", 5)
    monkeypatch.setattr("circuits.edges.factored.MOST_AT_ONCE", 5)
    run = run_of(replace(settled(SAME), rule=rule), 40)
    blocks = [rows.targets for rows in RULES[rule].edge_rows(run)]
    kinds = [
        10 if run.index.kind[int(targets[0])] == TARGET else int(run.index.layer[int(targets[0])]) for targets in blocks
    ]
    assert kinds == sorted(kinds, reverse=True)
    assert sorted(torch.cat(blocks).tolist()) == sorted(
        np.flatnonzero((run.index.kind == FEATURE) | (run.index.kind == TARGET))
    )


@pytest.mark.parametrize("rule", FACTORED)
def test_edges_do_not_depend_on_how_many_targets_are_pulled_back_at_once(rule, monkeypatch):
    run = run_of(replace(settled(SAME), rule=rule), 40)
    expected = dense(run, rule)
    monkeypatch.setattr("circuits.edges.factored.MOST_AT_ONCE", 3)
    torch.testing.assert_close(dense(run, rule), expected, rtol=1e-11, atol=1e-13)


def test_tokens_at_the_embedding_have_the_same_edges_under_every_rule():
    found = []
    for rule in RULES:
        run = run_of(replace(settled(SAME), rule=rule), 40)
        rows = run.index.rows(FEATURE, 0)
        found.append(dense(run, rule)[rows][:, run.index.layer == NONE][:, : len(run.embedding) + 1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


# -- the algebra of a block against itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: "-".join(vars(rule).values()))
def test_one_gradient_everywhere_is_the_sum_of_its_positions(block, rule):  # noqa: F811
    """A dense gradient with one nonzero position is the factored form multiplied out, and gradients add."""
    _, w, x, cos, sin = block
    record = record_block(w, x, cos, sin)
    gradients = torch.randn(LENGTH, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pos = torch.arange(LENGTH)
    rows = torch.diag_embed(torch.ones(LENGTH, dtype=torch.float64))[..., None] * gradients[:, None]
    rows = rows.reshape(LENGTH, LENGTH, 24)
    pulled = through_attention(w, record, gradients, pos, rule)
    apart = spread(w, record, pulled, rule)
    found, v_bar = through_attention_everywhere(w, record, rows, rule)
    torch.testing.assert_close(found, apart, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(v_bar, pulled.v_bar(), rtol=1e-11, atol=1e-13)
    together, _ = through_attention_everywhere(w, record, gradients[None], rule)
    torch.testing.assert_close(together[0], apart.sum(0), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: "-".join(vars(rule).values()))
def test_a_shortened_record_gives_earlier_targets_the_same(block, rule):  # noqa: F811
    """Nothing later reaches them: gradients of targets before n come from the first n positions alone."""
    _, w, x, cos, sin = block
    record, n = record_block(w, x, cos, sin), 4
    u = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    pos = torch.tensor([0, 2, 3])
    short = record.upto(n)
    whole, part = (spread(w, r, pull_back(w, r, u, pos, rule), rule) for r in (record, short))
    assert (whole[:, n:] == 0).all()
    torch.testing.assert_close(part, whole[:, :n], rtol=1e-12, atol=1e-14)


def test_a_shortened_record_is_the_record_of_the_shortened_prompt(block):  # noqa: F811
    """Every field; and asked for no fewer positions than there are it is the record itself."""
    _, w, x, cos, sin = block
    record = record_block(w, x, cos, sin)
    short, anew = record.upto(4), record_block(w, x[:4], cos[:4], sin[:4])
    for field in fields(record):
        mine, theirs = getattr(short, field.name), getattr(anew, field.name)
        if field.name in ("q", "k"):
            assert (mine.unit is None) == (theirs.unit is None)
            mine, theirs = mine.out, theirs.out
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert record.upto(LENGTH) is record


# -- products with half-precision weights ----------------------------------------------------------------------------


def _operands(inner: int = 300, outer: int = 70):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, inner, generator=generator) * torch.logspace(-3, 3, inner)
    return x, torch.randn(inner, outer, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_matrix_meets_x_as_it_is(dtype):
    """To fp32 accuracy, far below what rounding x once would cost."""
    x, matrix = _operands()
    matrix = matrix.to(dtype)
    found = matmul_fp32(x, matrix)
    assert found.dtype == torch.float32
    size = x.double().abs() @ matrix.double().abs()
    error = (found.double() - x.double() @ matrix.double()).abs()
    assert (error <= 300 * 2.0**-24 * size).all()
    once = (x.to(dtype).double() @ matrix.double() - x.double() @ matrix.double()).abs()
    assert error.max() < once.max() / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_go_through_a_half_precision_weight_without_a_copy_of_it(dtype):
    x, matrix = _operands()
    weight = matrix.T.contiguous().to(dtype)
    given = x.clone().requires_grad_()
    out = linear_fp32(given, weight, None)
    saved = out.grad_fn.next_functions[0][0].saved_tensors
    assert [part.dtype for part in saved] == [dtype]
    towards = torch.randn_like(out)
    out.backward(towards)
    torch.testing.assert_close(given.grad.double(), towards.double() @ weight.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", [1, 300 * 8, 1 << 30])
@pytest.mark.parametrize("how", ["as it is", "transposed", "every other column"])
def test_the_matrix_is_cast_in_tiles_however_it_lies(monkeypatch, how, numbers):
    monkeypatch.setattr(kernels, "CAST_TILE", numbers)
    x, matrix = _operands()
    matrix = matrix.bfloat16()
    given = {"as it is": matrix, "transposed": matrix.T.contiguous().T, "every other column": matrix[:, ::2]}[how]
    found = matmul_fp32(x, given)
    size = x.double().abs() @ given.double().abs()
    assert ((found.double() - x.double() @ given.double()).abs() <= 300 * 2.0**-24 * size).all()
    assert matmul_fp32(x[:0], given).shape == (0, 3, given.shape[1])


def test_double_precision_is_never_rounded():
    x, matrix = _operands()
    for weights in (matrix, matrix.bfloat16(), matrix.double()):
        expected = x.double() @ weights.double()
        assert matmul_fp32(x.double(), weights).dtype == torch.float64
        torch.testing.assert_close(matmul_fp32(x.double(), weights), expected, rtol=1e-13, atol=1e-13)
    wide = matmul_fp32(x, matrix.double())
    torch.testing.assert_close(wide, x @ matrix, rtol=1e-6, atol=1e-3)
