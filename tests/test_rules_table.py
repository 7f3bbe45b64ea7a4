"""The table of docs/rules.md: what it does is what it says, what it predicts is right where that is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import rules
from circuits import RULES, prepare, trace
from circuits.agreement import correlation, slope
from circuits.attribution import one_step_scores
from circuits.attribution.ose import one_step
from circuits.blocks import Rule, through_attention_everywhere, through_mlp
from circuits.building import settle
from circuits.edges.stack import known_blocks, record_stack
from circuits.graph import REMAINDER
from hooks import Ablate, Scale
from hooks.sites import Site
from hooks.types import Edit

ROOT = Path(__file__).parents[1]
PROMPT = "fact: the capital of the state containing Dallas is"
OTHER = "fact: the capital of the state containing Tulsa is"
EXACT = Rule("exact", "exact", "exact")


@pytest.fixture(scope="module")
def setting(demo):
    return settle(demo, PROMPT)


@pytest.fixture(scope="module")
def other(demo):
    return settle(demo, OTHER).recording


@pytest.fixture(scope="module")
def items(setting, other):
    return rules.interventions(setting, [other], rules.LAYERS, n=40)


def falls(setting, plan_or_edits) -> float:
    """How far the metric falls, by the public interventions or by edits of the stream."""
    model, (target,) = setting.model, setting.targets
    batch = setting.recording.batch
    edits = plan_or_edits if isinstance(plan_or_edits[0], Edit) else model.edits(batch, [plan_or_edits])
    return float(target.value(setting.recording.logits)[0] - target.value(model.host.forward(batch, edits))[0])


def address(setting, item) -> str:
    """The feature whose decoder row an item's vector is a multiple of."""
    removal, W_dec = item.removal, setting.model.store[item.layer].W_dec
    along = torch.cosine_similarity(W_dec, removal.vector[None]).abs()
    assert along.max() == pytest.approx(1, abs=1e-5)
    return f"L{item.layer}/{int(along.argmax())}@{removal.pos}"


# -- what is done ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "does"),
    [("ablate 1", Ablate), ("feature x2", lambda at: Scale(at, 2.0)), ("feature x5", lambda at: Scale(at, 5.0))],
)
def test_single_features_are_changed_as_the_public_interventions_do(setting, items, kind, does):
    some = items[kind][::9]
    effect, noise = rules.measured(setting, some)
    expected = [falls(setting, [does(address(setting, item))]) for item in some]
    np.testing.assert_allclose(effect, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.05
    assert noise < 1e-4


def test_all_features_of_a_place_are_ablated_together(setting, items):
    some = items["ablate all"][::5]
    expected = []
    for item in some:
        record = setting.recording.layers[item.layer]
        features = record.acts.indices[0, item.removal.pos][record.acts.values[0, item.removal.pos] > 0].tolist()
        expected.append(falls(setting, [Ablate(f"L{item.layer}/{f}@{item.removal.pos}") for f in features]))
    np.testing.assert_allclose(rules.measured(setting, some)[0], expected, atol=1e-4)


def test_a_group_is_six_features_of_one_place_and_every_place_has_its_share(setting, items):
    places = {(item.layer, item.removal.pos) for item in items["ablate all"]}
    groups = items["ablate 6"]
    assert len(groups) == rules.GROUPS_PER_PLACE * len(places) >= 60
    for item in groups[::7]:
        record = setting.recording.layers[item.layer]
        values, indices = (part[0, item.removal.pos] for part in (record.acts.values, record.acts.indices))
        written = values[:, None] * setting.model.store[item.layer].W_dec[indices]
        found = torch.linalg.lstsq(written.T, item.removal.vector[:, None]).solution[:, 0]
        assert sorted(found.round(decimals=3).abs().tolist()) == [0.0] * (len(found) - 6) + [1.0] * 6


def test_a_resampled_position_is_another_prompts_and_never_the_same(setting, other, items):
    assert min(float(item.removal.vector.norm()) for item in items["resample"]) > 0.1
    first = next(pos for pos in range(10) if setting.recording.batch.ids[0, pos] != other.batch.ids[0, pos])
    assert {item.removal.pos for item in items["resample"]} == set(range(first, 10))
    some = items["resample"][::3]
    expected = [falls(setting, [put(item, other)]) for item in some]
    np.testing.assert_allclose(rules.measured(setting, some)[0], expected, atol=1e-4)


def put(item, other) -> Edit:
    def apply(x, at):
        out = x.clone()
        out[0, item.removal.pos] = other.layers[item.layer].read[0, item.removal.pos]
        return out

    return Edit(Site("resid_pre", item.layer), apply)


def test_without_its_error_a_place_is_the_reconstruction(setting, items):
    for item in items["ablate error"][::6]:
        record, pos = setting.recording.layers[item.layer], item.removal.pos
        torch.testing.assert_close(record.target[0, pos] - item.removal.vector, record.reconstruction[0, pos])


# -- what the rules say ------------------------------------------------------------------------------------------------


def test_the_exact_rule_predicts_a_thousandth_more_of_a_feature(setting, items):
    """First order is all there is at this size; what is left is fp32. A rule that holds norms gets another number."""
    some = [rules._times(item, -1e-3) for item in items["ablate 1"]]
    effect, _ = rules.measured(setting, some)
    say = rules.predictors(setting, rules.LAYERS)
    for name in ("exact", "ose"):
        found = rules.predicted(say[name], some)
        assert correlation(found, effect) > 0.999
        assert slope(found, effect) == pytest.approx(1, abs=0.02)
    assert correlation(rules.predicted(say["relp"], some), effect) < 0.95


def test_predictions_come_back_in_the_order_of_the_items(setting, items):
    some = items["ablate 1"]
    say = rules.predictors(setting, rules.LAYERS)
    for predict in (say["exact"], say["ose"]):
        found = rules.predicted(predict, some)
        alone = [rules.predicted(predict, [item])[0] for item in some[::6]]
        np.testing.assert_allclose(found[::6], alone, atol=1e-5)


def test_exact_predictions_are_the_scores(setting):
    """`ablate 1` of all features, in the order of the score table."""
    items = rules.interventions(setting, [], rules.LAYERS, n=10**6)["ablate 1"]
    table = setting.scores.frame
    scores = table[table["layer"].isin(rules.LAYERS)]["score"]
    found = rules.predicted(rules.predictors(setting, rules.LAYERS)["exact"], items)
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["exact", "relp", "affine"])
def test_a_step_over_no_block_is_the_rules_gradient(setting, items, rule):
    where = (setting.model, setting.recording, setting.targets)
    gradients = RULES[rule].gradients
    (gradient,) = gradients(*where, (Site("resid_pre", 2),)).values()
    vectors, pos = torch.randn(5, gradient.shape[1]), torch.tensor([0, 3, 9, 9, 5])
    found = one_step(*where, 2, blocks=0, gradients=gradients).effects(pos, vectors)
    torch.testing.assert_close(found, (gradient[pos] * vectors).sum(-1).double(), atol=1e-5, rtol=1e-4)


def test_a_small_step_pulls_the_other_rules_gradient_back_through_one_block_exactly(setting):
    """ε v through block 2 and on with relp = ε v · (exact Jacobian of block 2)ᵀ g_relp."""
    model, where = setting.model, (setting.model, setting.recording, setting.targets)
    block = record_stack(model.host, setting.recording, known_blocks(model.host)).blocks[2]
    (behind,) = RULES["relp"].gradients(*where, (Site("resid_pre", 3),)).values()
    middle = through_mlp(block.weights, block.record, behind[None], slice(None), EXACT)
    before, _ = through_attention_everywhere(block.weights, block.record, middle, EXACT)
    torch.manual_seed(0)
    vectors, pos = torch.randn(40, behind.shape[1]), torch.arange(40) % 10
    expected = (before[0, pos] * vectors).sum(-1)
    found = one_step(*where, 2, gradients=RULES["relp"].gradients).effects(pos, 1e-3 * vectors) / 1e-3
    assert correlation(found.numpy(), expected.numpy()) > 0.9999
    assert slope(found.numpy(), expected.numpy()) == pytest.approx(1, abs=0.01)


def test_one_step_scores_are_effects_of_what_features_write(setting):
    scored = setting.scores.layers[2]
    where = (setting.model, setting.recording, setting.targets, 2)
    found = one_step_scores(*where, (scored.pos, scored.feature, scored.activation))
    written = scored.activation[:, None] * setting.model.store[2].W_dec[scored.feature]
    assert len(found) > 64  # more than one chunk
    torch.testing.assert_close(found[60:70], one_step(*where).effects(scored.pos[60:70], written[60:70]))


@pytest.mark.parametrize("rule", ["exact", "affine"])
def test_edges_of_every_rule_come_from_one_layout(demo, setting, rule):
    run = prepare(demo, PROMPT)
    weights = rules.edge_weights(run, rule)
    graph = trace(demo, PROMPT, rule=rule, sample=0, node_threshold=1.0, edge_threshold=1.0)
    index, own = graph.index, run.index
    drawn = index.kind[graph.source] != REMAINDER
    place = {own.name(row): row for row in range(len(own))}
    source, target = ([place[index.name(int(row))] for row in column[drawn]] for column in (graph.source, graph.target))
    np.testing.assert_allclose(weights[target, source], graph.weight[drawn], rtol=1e-4, atol=1e-6)
    assert drawn.sum() > 1000


# -- the figures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return rules.measure("demo", n=30, prompts=2)


def test_every_cell_of_the_table_is_there(tiny):
    found = tiny["mean"]
    kinds = ("ablate 1", "feature x2", "feature x5", "ablate 6", "ablate all", "ablate error", "resample")
    assert set(found) == {*kinds, "edges", "items", "shape", "noise_floor", "accepted"}
    assert set(found["shape"]) == set(kinds)
    for kind in (*kinds, "edges"):
        steps = set() if kind == "edges" else set(rules.STEPS)
        assert set(found[kind]) == {"exact", "ig", "norms held", "relp", "half", "affine"} | steps
        for cell in found[kind].values():
            assert set(cell) == {"pearson", "spearman", "amount"}
            assert -1 <= min(cell["pearson"], cell["spearman"]) <= max(cell["pearson"], cell["spearman"]) <= 1
            assert cell["amount"] > 0
    assert found["items"]["ablate 1"] == found["items"]["edges"] == 30
    assert len(tiny["each"]) == len(tiny["prompts"]) == 2
    json.dumps(tiny, allow_nan=False)


def test_a_mean_is_over_the_prompts(tiny):
    for path in (("ablate 1", "exact", "pearson"), ("resample", "ose + relp", "spearman"), ("items", "ablate all")):
        each = tiny["each"]
        found = tiny["mean"]
        for key in path:
            each, found = [part[key] for part in each], found[key]
        assert found == pytest.approx(sum(each) / 2)


def test_vectors_of_larger_interventions_are_larger(tiny):
    size, cosine = ({kind: lies[name] for kind, lies in tiny["mean"]["shape"].items()} for name in ("size", "cosine"))
    assert size["ablate error"] < size["ablate 1"] < size["ablate 6"] < size["ablate all"] < size["resample"]
    assert size["feature x5"] == pytest.approx(4 * size["feature x2"])
    assert cosine["feature x5"] == pytest.approx(-cosine["ablate 1"])
    assert cosine["ablate all"] > 0.9  # the reconstruction is most of the stream


def test_the_script_prints_one_object_and_says_whether_bounds_are_kept(tiny, capsys):
    options = ["--sets", "demo", "--items", "30", "--prompts", "2", "--layers", "1", "2", "3", "4"]
    status = rules.main([*options, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(out.splitlines()) == 1
    assert "prompt 2 of 2" in err
    assert found["sets"]["demo"]["mean"] == tiny["mean"]
    assert status == (0 if all(found["bounds"].values()) else 1)


def test_the_page_has_the_tables_columns_and_rows(tiny):
    head, *_ = rules.markdown(tiny["mean"]).splitlines()
    lines = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line == head]
    assert len(starts) == len(rules.SETS)
    for start in starts:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 : start + 10]]
        assert [row[0] for row in rows] == list(tiny["mean"]["items"])
        assert all(len(row) == len(rules.COLUMNS) + 4 for row in rows)


def test_figures_cells_and_bounds_by_hand():
    """Deviations (−1, 0, 1) and (−2, −1, 3): 5 / sqrt(2 · 14); means 2 and 3."""
    (cell,) = rules.figures({"exact": np.array([1.0, 2.0, 3.0])}, np.array([1.0, 2.0, 6.0])).values()
    assert cell == pytest.approx({"pearson": 5 / 28**0.5, "spearman": 1.0, "amount": 6 / 9})
    assert rules._cell({"pearson": 0.794, "spearman": -0.041}) == ".79/−.04"
    assert rules._cell({"pearson": 1.0, "spearman": 0.0}) == "1.00/.00"
    assert rules._cell(None) == "—"
    found = {"mean": {"accepted": {"exact": 0.89, "ose": 0.92}, "edges": {"exact": {"spearman": 0.97}}}}
    assert list(rules.bounds({"demo": found}).values()) == [True, False, True]
    assert list(rules.bounds({"demo-dense": found}).values()) == [False, False, True]
