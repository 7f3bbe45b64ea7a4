"""What can be explained: values as the model has them, scores as finite differences, edges that add up, pairs."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from test_conventions import ALL, TEXT, WHOLE, dense, hooked, local_run, run_of

from circuits import Answer, Direction, Feature, Graph, Logit, Mass, Target, trace, verify
from circuits.building import assemble, settle
from circuits.graph import FEATURE, REMAINDER, TARGET
from circuits.targets import metric_name, read_targets
from circuits.verification import measure_nodes, verify_in
from hooks import Ablate, HookedModel, Scale, Site
from hooks.errors import PromptError, TargetError
from hooks.host import tap
from hooks.types import Edit

STEP = 1e-3
VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(7))
LAST = 3  # position of the last token of TEXT
PROMPT = "fact: the capital of the state containing Shreveport is"


@pytest.fixture(scope="module")
def same() -> HookedModel:
    return hooked("resid_pre", "resid_pre", ALL)


def best_other(logits: torch.Tensor, token: int) -> int:
    masked = logits.clone()
    masked[token] = -torch.inf
    return int(masked.argmax())


KINDS = {
    "answer": (None, {0, 1, 2, 3}),
    "earlier": (Logit("w5", pos=1), {0, 1, 2, 3}),
    "mass": (Mass(0.5), {0, 1, 2, 3}),
    "two tokens": (Answer("w5 w6"), {0, 1, 2, 3}),
    "feature": (Feature("L2/7@2"), {0, 1}),
    "direction": (Direction(VECTOR, Site("resid_mid", 2), pos=2), {0, 1, 2}),
    "list": ([Logit("w5"), Logit("w6", "w7", pos=2)], {0, 1, 2, 3}),
    "features": ([Feature("L3/7"), Feature("L3/9@1")], {0, 1, 2}),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
MODELS = {"same": partial(hooked, "resid_pre", "resid_pre", ALL), "mlp": partial(hooked, "mlp_in", "mlp_out", ALL)}
IN_BOTH = pytest.mark.parametrize("name", MODELS)


@cache
def explained(name: str, kind: str):
    return settle(MODELS[name](), TEXT, KINDS[kind][0])


@cache
def affine(name: str, kind: str):
    setting = replace(explained(name, kind), rule="affine")
    return setting, assemble(setting, run_of(setting, 15), 10**6)


def read(model: HookedModel, targets, ids, edits=()) -> torch.Tensor:
    """The targets' values in one pass, from the logits or from what stands at their site."""
    seen: dict = {}
    site = targets[0].site
    batch = model.host.batch([ids])
    logits = model.host.forward(batch, [*edits, *([tap(site, seen)] if site else [])])
    return torch.stack([target.value(seen[site] if site else logits)[0] for target in targets])


# -- naming them ---------------------------------------------------------------------------------------------------


def test_a_logit_at_an_earlier_position_is_against_the_best_other_one_there(same):
    logits = same.run(TEXT).baseline
    (target,) = settle(same, TEXT, Logit("w5", pos=1)).targets
    token = same.host.token_id("w5")
    assert target.pos == 1
    assert target.tokens == (token, best_other(logits[1], token))
    assert float(target.value(logits)) == pytest.approx(float(logits[1, token] - logits[1, target.tokens[1]]))
    (named,) = settle(same, TEXT, Logit("w5", "w9", pos=-3)).targets
    assert (named.pos, named.tokens) == (1, (token, same.host.token_id("w9")))
    (own,) = settle(same, TEXT, Logit(pos=0)).targets
    assert list(own.tokens) == logits[0].topk(2).indices.tolist()


def test_what_comes_after_the_target_has_no_score(same):
    table = settle(same, TEXT, Logit("w5", pos=1)).scores.frame
    assert (table.query("pos > 1")["score"] == 0).all()
    assert (table.query("pos <= 1 and layer > 0")["score"] != 0).any()


@pytest.mark.parametrize(("mass", "most"), [(0.05, 10), (0.3, 10), (0.6, 10), (0.6, 3), (1.0, 5), (0.9999, 100)])
def test_a_mass_is_the_most_likely_tokens_up_to_the_one_that_crosses_it(same, mass, most):
    logits = same.run(TEXT).baseline[2]
    probs, order = logits.softmax(-1).sort(descending=True)
    n = 1
    while float(probs[:n].sum()) < mass and n < most:
        n += 1
    targets = settle(same, TEXT, Mass(mass, most, pos=2)).targets
    assert [target.tokens for target in targets] == [(int(token),) for token in order[:n]]
    assert [target.weight for target in targets] == pytest.approx(probs[:n].tolist())
    for target in targets:  # demeaned, as circuit-tracer's
        expected = logits[target.tokens[0]] - logits.mean()
        assert float(target.value(same.run(TEXT).baseline)) == pytest.approx(float(expected))


@pytest.mark.parametrize("target", [Mass(0.0), Mass(1.1), Mass(0.5, 0)])
def test_a_mass_that_holds_nothing_is_refused(same, target):
    with pytest.raises(TargetError, match="holds nothing"):
        settle(same, TEXT, target)


@pytest.mark.parametrize("answer", ["Baton Rouge", " Baton Rouge", "ids"])
def test_an_answer_of_two_tokens_goes_on_in_the_prompt(demo, answer):
    """The model is run on the prompt and the first token; the second is explained where it is predicted."""
    first, second = demo.host.token_id("Baton"), demo.host.token_id("Rouge")
    setting = settle(demo, PROMPT, Answer((first, second) if answer == "ids" else answer))
    prompt = demo.host.tokenize(PROMPT)
    ids = [*prompt, first]
    assert setting.recording.batch.ids.tolist() == [ids]
    logits = demo.run(ids).baseline
    assert [target.pos for target in setting.targets] == [len(prompt) - 1, len(prompt)]
    for target, token in zip(setting.targets, (first, second), strict=True):
        other = best_other(logits[target.pos], token)
        assert target.tokens == (token, other)
        assert target.weight == 1
        value = float(logits[target.pos, token] - logits[target.pos, other])
        assert float(target.value(logits)) == pytest.approx(value, abs=1e-5)
    assert " + " in metric_name(setting.targets)


def test_an_answer_of_one_token_is_that_token(demo):
    answer, named = (settle(demo, PROMPT, one).targets for one in (Answer("Austin"), "Austin"))
    assert answer == named


def test_in_a_pair_both_prompts_go_on_with_the_answer(demo):
    """So that both are asked for its second token behind its first."""
    other = "fact: the capital of the state containing Dallas is"
    setting = settle(demo, PROMPT, Answer("Baton Rouge"), counterfactual=other)
    ids = [*demo.host.tokenize(other), demo.host.token_id("Baton")]
    assert setting.counterfactual.batch.ids.tolist() == [ids]
    assert len(setting.targets) == 2


def test_answers_that_cannot_be_are_refused(demo):
    for targets, text in (
        (Answer(""), "not in the vocabulary"), (Answer("Quxford"), "not in the vocabulary"),
        (Answer(()), "not in the vocabulary"), ([Answer("Austin"), "Dallas"], "the only target"),
    ):  # fmt: skip
        with pytest.raises(TargetError, match=text):
            settle(demo, PROMPT, targets)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ([Logit("w5"), Direction(VECTOR, Site("resid_pre", 3))], "read at different places"),
        ([Direction(VECTOR, Site("resid_pre", n)) for n in (2, 3)], "read at different places"),
        ([Feature("L3/7"), Feature("L2/7")], "read at different places"),
        ([Feature("L3/7"), Feature("L3/7@3")], "given twice"),
        (Feature("L3/99"), "feature 99 does not exist in layer 3"),
        (Feature("L3/7@1:3"), "at several positions"),
        (Feature("L3/7@4"), "position 4 does not occur"),
        (Logit("w5", pos=-5), "position -5 does not occur"),
        (Feature("L0/7"), "nothing that the transcoders write reaches"),
        (Direction(VECTOR, Site("resid_pre", 0)), "nothing that the transcoders write reaches"),
    ],
)  # fmt: skip
def test_targets_that_make_no_sense_are_refused(same, targets, text):
    with pytest.raises(TargetError, match=text):
        trace(same, TEXT, targets, sample=0)


def test_a_direction_of_another_width_is_refused(same):
    with pytest.raises(TargetError, match="39 numbers"):
        settle(same, TEXT, Direction(VECTOR[:39], Site("resid_pre", 3)))


# -- what is explained is what the model has -----------------------------------------------------------------------


@EVERY_KIND
@IN_BOTH
def test_the_value_is_what_the_model_has_there(name, kind):
    setting, graph = affine(name, kind)
    model, ids = setting.model, graph.meta["ids"]
    values = graph.activation[graph.index.rows(TARGET)]
    np.testing.assert_allclose(values, read(model, read_targets(graph.meta["targets"], model.store), ids), rtol=1e-9)
    sites = {"feature": model.store[2].read, "direction": Site("resid_mid", 2)}
    if kind in sites:
        _, seen = model.host.capture(model.host.batch([ids]), [sites[kind]])
        x = seen[sites[kind]][0, 2]
        by_hand = {"feature": model.store[2].preactivations(x)[7], "direction": x @ VECTOR.double()}
        assert values[0] == pytest.approx(float(by_hand[kind]), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "target", "layers"),
    [
        ("mlp", Feature("L2/7"), {0, 1}),
        ("mlp", Direction(VECTOR, Site("resid_mid", 2)), {0, 1}),
        ("mlp", Direction(VECTOR, Site("resid_post", 2)), {0, 1, 2}),
    ],
)
def test_only_what_lies_below_the_target_is_scored(name, target, layers):
    assert set(settle(MODELS[name](), TEXT, target).scores.layers) == layers


@EVERY_KIND
def test_a_graph_has_the_layers_below_its_target(kind):
    _, graph = affine("same", kind)
    assert set(graph.meta["layers"]) == KINDS[kind][1]
    assert set(graph.index.layer[graph.index.kind == FEATURE]) == KINDS[kind][1]


def test_a_feature_of_a_next_layer_set_is_fed_by_the_layer_that_writes_where_it_reads():
    graph = trace(hooked("resid_pre", "resid_post", ALL), TEXT, Feature("L2/7@2"), **WHOLE)
    assert graph.meta["layers"] == [0, 1]
    into = graph.source[graph.target == graph.index.rows(TARGET)[0]]
    assert set(graph.index.layer[into]) == {1, -1}  # and the remainder
    assert set(graph.index.pos[into][graph.index.kind[into] == FEATURE]) == {2}


@EVERY_KIND
@IN_BOTH
def test_a_score_is_the_central_difference_of_the_metric_by_the_feature(name, kind):
    setting = explained(name, kind)
    model, batch, table = setting.model, setting.recording.batch, setting.scores.frame
    weights = torch.tensor([target.weight for target in setting.targets], dtype=torch.float64)
    assert set(table["layer"]) <= KINDS[kind][1]
    for row in table.query("score != 0").iloc[:: max(1, len(table) // 4)].itertuples():
        address, ids = f"L{row.layer}/{row.feature}@{row.pos}", batch.ids[0].tolist()
        up, down = (
            read(model, setting.targets, ids, model.edits(batch, [[Scale(address, 1 + step)]])) @ weights
            for step in (STEP, -STEP)
        )
        assert float(up - down) / (2 * STEP) == pytest.approx(row.score, rel=1e-4, abs=1e-7)


@EVERY_KIND
@IN_BOTH
def test_the_edges_into_every_kind_of_target_add_up(name, kind):
    _, graph = affine(name, kind)
    assert graph.meta["conservation"]["max_rel_error"] <= 1e-11
    for row in graph.index.rows(TARGET):
        assert graph.weight[graph.target == row].sum() == pytest.approx(graph.activation[row], rel=1e-10)


@EVERY_KIND
@IN_BOTH
def test_the_factored_edges_of_every_kind_of_target_are_autograds(name, kind):
    run = run_of(explained(name, kind), 15)
    torch.testing.assert_close(dense(run, "exact"), dense(run, "autograd"), rtol=1e-9, atol=1e-11)


@EVERY_KIND
def test_a_graph_of_every_kind_of_target_survives_its_file(tmp_path, kind):
    setting, graph = affine("same", kind)
    graph.save(tmp_path / "a.graph")
    loaded = Graph.load(tmp_path / "a.graph")
    assert loaded.names == graph.names
    assert read_targets(loaded.meta["targets"], setting.model.store) == setting.targets
    again, direct = verify(setting.model, loaded, n=6), verify_in(setting, graph, n=6, seed=0)
    assert again.summary() == direct.summary()
    assert again.nodes["score"].tolist() == direct.nodes["score"].tolist()


def test_features_and_directions_of_one_site_share_a_graph(same):
    """Each with its own constants: a direction has none, a feature's is its encoder's bias."""
    targets = [Feature("L3/7"), Direction(VECTOR, Site("resid_pre", 3), pos=1), Feature("L3/9@2")]
    for order in (targets, targets[::-1]):
        setting, run = local_run(same, targets=order)
        torch.testing.assert_close(dense(run, "exact"), dense(run, "autograd"), rtol=1e-9, atol=1e-11)
        graph = assemble(replace(setting, rule="affine"), run, 10**6)
        for row in graph.index.rows(TARGET):
            assert graph.weight[graph.target == row].sum() == pytest.approx(graph.activation[row], rel=1e-10)


# -- several targets -----------------------------------------------------------------------------------------------


def test_a_list_is_explained_in_equal_shares(same):
    """Scores, influence and effects of [A, B] are the means of those of A and of B."""
    parts = [Logit("w5"), Logit("w6", "w7", pos=2)]
    both, *apart = (trace(same, TEXT, target, max_nodes=None, **WHOLE) for target in (parts, *parts))
    assert [target["weight"] for target in both.meta["targets"]] == [0.5, 0.5]
    tables = [graph.nodes_frame().set_index("name") for graph in (both, *apart)]
    inner = tables[0].query("kind != 'target' and kind != 'remainder'").index
    for column in ("score", "influence"):
        columns = [table[column].reindex(inner, fill_value=0) for table in tables]
        np.testing.assert_allclose(columns[0], (columns[1] + columns[2]) / 2, rtol=1e-9, atol=1e-12)
    for row in both.index.rows(TARGET):
        into = both.target == row
        np.testing.assert_allclose(both.effect[into], both.weight[into] / 2)
        assert both.influence[row] == pytest.approx(0.5)


def test_a_mass_weighs_its_tokens_by_their_probability(same):
    graph = trace(same, TEXT, Mass(0.5), max_nodes=20, **WHOLE)
    rows = graph.index.rows(TARGET)
    assert len(rows) > 1
    weights = [target["weight"] for target in graph.meta["targets"]]
    assert graph.influence[rows].tolist() == pytest.approx(weights)
    assert graph.score[rows].tolist() == pytest.approx((np.array(weights) * graph.activation[rows]).tolist())


def test_a_measured_effect_of_several_targets_is_their_weighted_sum(same):
    setting = settle(same, TEXT, [Logit("w5"), Logit("w6", "w7", pos=2)])
    table, _ = measure_nodes(setting, n=8, seed=0)
    clean = read(same, setting.targets, TEXT)
    for row in table.itertuples():
        run = same.run(TEXT, [Ablate(f"L{row.layer}/{row.feature}@{row.pos}")])
        after = torch.stack([target.value(run.logits) for target in setting.targets])
        assert row.effect == pytest.approx(float((clean - after).mean()), abs=1e-9)


def test_shares_multiply(same):
    inside = settle(same, TEXT, [Mass(0.5), Logit("w5", pos=1)]).targets
    alone = settle(same, TEXT, Mass(0.5)).targets
    assert [target.weight for target in inside] == pytest.approx([t.weight / 2 for t in alone] + [0.5])


@pytest.mark.parametrize(
    "targets",
    [[Mass(0.9, 60), Mass(0.9, 60, pos=1)], [Direction(VECTOR, Site("resid_mid", 2), n) for n in (1, 2)]],
    ids=["mass", "direction"],
)
def test_the_same_at_another_position_is_another_target(same, targets):
    """Even where a token is likely at both: a name, which is a node's id, says where."""
    names = [target.name for target in settle(same, TEXT, targets).targets]
    assert len(names) > 1
    assert len(set(names)) == len(names)


# -- pairs of prompts ----------------------------------------------------------------------------------------------

OTHER = "w1 w30 w3 w4"  # another word at position 1


@pytest.fixture(scope="module")
def pair(same):
    return settle(same, TEXT, counterfactual=OTHER)


@pytest.fixture(scope="module")
def paired(same) -> Graph:
    return trace(same, TEXT, counterfactual=OTHER, max_nodes=None, max_in_edges=10**6, **WHOLE)


def test_in_a_pair_nodes_are_all_that_is_active_in_either(same, pair, paired):
    clean, other = (same.record(text) for text in (TEXT, OTHER))
    expected = {
        (layer, *place): (float(before[tuple(place)]), float(after[tuple(place)]))
        for layer in ALL
        for after, before in [[r.layers[layer].acts.dense(32)[0] for r in (clean, other)]]
        for place in ((after > 0) | (before > 0)).nonzero().tolist()
    }
    table = pair.scores.frame.set_index(["layer", "pos", "feature"])
    assert set(table.index) == set(expected)
    for place, (before, after) in expected.items():
        assert table.loc[place, "activation"] == pytest.approx(after)
        assert table.loc[place, "baseline"] == pytest.approx(before)
    assert any(after == 0 for _, after in expected.values())
    frame = paired.nodes_frame().query("kind == 'feature'")
    for row in frame.itertuples():
        before, after = expected[row.layer, row.pos, row.feature]
        assert (row.baseline, row.activation) == (pytest.approx(before), pytest.approx(after))
    only_other = frame.query("activation == 0 and baseline > 0")
    assert len(only_other) > 0


def test_features_that_do_not_differ_have_no_part_in_a_pair(pair):
    """Position 0 is the same in both prompts, and so is layer 0 behind position 1."""
    table = pair.scores.frame
    assert (table.query("pos == 0 or (layer == 0 and pos > 1)")["score"] == 0).all()
    assert (table.query("layer > 0 and pos > 1")["score"] != 0).any()


def test_in_a_pair_a_score_is_the_derivative_towards_the_counterfactual(same, pair):
    table = pair.scores.frame
    checked = {"both": 0, "only there": 0}
    for row in table.query("score != 0").iloc[::6].itertuples():
        write = same.store[row.layer].write
        toward = (row.baseline - row.activation) * same.store[row.layer].W_dec[row.feature]

        def moved(x, at, pos=row.pos, vector=toward, step=0.0):
            out = x.clone()
            out[:, pos] += step * vector
            return out

        up, down = (
            read(same, pair.targets, TEXT, [Edit(write, lambda x, at, s=s: moved(x, at, step=s))])
            for s in (STEP, -STEP)
        )
        assert float(up - down) / (2 * STEP) == pytest.approx(-row.score, rel=1e-4, abs=1e-7)
        checked["only there" if row.activation == 0 else "both"] += 1
    assert min(checked.values()) > 0


def test_in_a_pair_the_factored_edges_are_autograds(same):
    _, run = local_run(same, counterfactual=OTHER)
    fast = dense(run, "exact")
    torch.testing.assert_close(fast, dense(run, "autograd"), rtol=1e-9, atol=1e-11)
    assert (fast != 0).sum() > 200


@pytest.mark.parametrize("rule", ["exact", "affine"])
@IN_BOTH
def test_in_a_pair_all_edges_and_the_remainder_add_up_to_the_difference(name, rule):
    model = MODELS[name]()
    graph = trace(model, TEXT, counterfactual=OTHER, rule=rule, max_nodes=25, max_in_edges=10**6, **WHOLE)
    index = graph.index
    clean, other = (model.record(text) for text in (TEXT, OTHER))
    for row in np.unique(graph.target):
        total = graph.weight[graph.target == row].sum()
        if index.kind[row] == TARGET:
            expected = graph.activation[row] - graph.baseline[row]
            (target,) = read_targets(graph.meta["targets"], model.store)
            values = [float(read(model, [target], text)[0]) for text in (TEXT, OTHER)]
            assert [graph.activation[row], graph.baseline[row]] == pytest.approx(values)
        else:
            layer = int(index.layer[row])
            pre = [model.store[layer].preactivations(r.layers[layer].read[0]) for r in (clean, other)]
            expected = float((pre[0] - pre[1])[int(index.pos[row]), int(index.feature[row])])
        assert total == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert (index.kind == REMAINDER).any()


def test_a_pair_of_one_prompt_with_itself_has_nothing_to_explain(same):
    setting = settle(same, TEXT, counterfactual=TEXT)
    assert (setting.scores.frame["score"] == 0).all()
    assert (setting.scores.tokens == 0).all()


def test_the_default_target_of_a_pair_is_answer_against_answer(same, pair):
    ours, theirs = (int(same.run(text).baseline[-1].argmax()) for text in (TEXT, OTHER))
    assert ours != theirs
    assert pair.targets[0].tokens == (ours, theirs)
    (named,) = settle(same, TEXT, "w5", counterfactual=OTHER).targets
    assert named.tokens == (same.host.token_id("w5"), theirs)
    (both,) = settle(same, TEXT, Logit("w5", "w6"), counterfactual=OTHER).targets
    assert both.tokens[1] == same.host.token_id("w6")


def test_where_both_prompts_have_one_answer_it_is_against_the_best_other(same):
    (target,) = settle(same, TEXT, counterfactual=TEXT).targets
    logits = same.run(TEXT).baseline[-1]
    assert list(target.tokens) == logits.topk(2).indices.tolist()


def test_prompts_of_different_lengths_are_no_pair(same):
    with pytest.raises(PromptError, match="same number of tokens"):
        settle(same, TEXT, counterfactual="w1 w2 w3")


def test_in_a_pair_a_measured_effect_is_that_of_the_counterfactuals_value(same, pair):
    table, noise = measure_nodes(pair, n=12, seed=0)
    assert noise < 1e-12
    clean = float(read(same, pair.targets, TEXT))
    for row in table.itertuples():
        vector = (row.baseline - row.activation) * same.store[row.layer].W_dec[row.feature]

        def swapped(x, at, pos=row.pos, vector=vector):
            out = x.clone()
            out[:, pos] += vector
            return out

        after = float(read(same, pair.targets, TEXT, [Edit(same.store[row.layer].write, swapped)]))
        assert row.effect == pytest.approx(clean - after, abs=1e-9)


def test_a_graph_of_a_pair_survives_its_file(same, tmp_path):
    graph = trace(same, TEXT, counterfactual=OTHER, max_nodes=20, sample=10)
    graph.save(tmp_path / "a.graph")
    loaded = Graph.load(tmp_path / "a.graph")
    np.testing.assert_array_equal(loaded.baseline, graph.baseline)
    assert verify(same, loaded, n=10).summary() == verify(same, graph, n=10).summary()
    assert loaded.meta["counterfactual"]["ids"] == same.host.tokenize(OTHER)
    alone = trace(same, TEXT, max_nodes=20, sample=0)
    assert alone.baseline is None
    assert "baseline" in graph.nodes_frame()
    assert "baseline" not in alone.nodes_frame()


def test_targets_are_plain_values():
    assert Target("m", (1,), (1.0,), 2) == Target.of(Target("m", (1,), (1.0,), 2).facts())
