"""Faithfulness: cuts against a dense twin, exact ends, areas by hand, rankings, and what damaged input says."""

import builtins
import sys
import xml.etree.ElementTree as ET
from itertools import product

import pytest
import torch
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import Direction, Logit, Mass, Target, score_features, trace
from circuits.attribution import integrated_scores
from circuits.demo import Exam
from circuits.demo.curves import all_sites, beats_baselines, city_pairs, pick, ranked
from circuits.faithfulness import SHARES, Curve, Pair, completeness, faithfulness, make_cases, rank
from circuits.faithfulness.cases import check_ablation
from circuits.faithfulness.curves import area, log_area, plot_curves
from circuits.faithfulness.evaluate import check_error, circuits_by_size, cut, measure
from circuits.faithfulness.rankings import RANKINGS, chance
from circuits.graph import FEATURE
from hooks import Ablate, HookedModel, Site, UserError
from hooks.demo.world import TEST_TEMPLATE
from hooks.errors import AddressError, CheckpointError, OutputError, PromptError, TargetError
from hooks.sites import EMBEDDING
from hooks.types import Edit

ABLATIONS = ("zero", "mean", "resample", "counterfactual")
ERRORS = ("clean", "live", "patched", "zero")
WORDS = ("w1 w2 w3 w4 w5 w6", "w1 w8 w3 w4 w7 w6", ["w9 w8 w3 w4 w5 w6", "w5 w5 w3", "w7 w8 w3 w11 w5 w6"])
FACTS = (
    "fact: the capital of the state containing Dallas is",
    "fact: the capital of the state containing Tempe is",
    ["fact: the region of the state containing Sitka is", "the capital of Texas is", "fact: Dallas is in"],
)


@pytest.fixture(scope="module")
def exact() -> HookedModel:
    """fp64: what is left over is the rounding of transformers' norms, which work in fp32."""
    return random_hooked(dtype=torch.float64)


@pytest.fixture(scope="module")
def apart() -> HookedModel:
    """Reads the stream and writes the MLP's output: the read and the write site differ, and the stream passes by."""
    coders = [
        random_transcoder(n, 40, read=Site("resid_mid", n), write=Site("mlp_out", n), dtype=torch.float64)
        for n in (0, 1, 3)
    ]
    return HookedModel.from_model(random_qwen2(dtype=torch.float64), word_tokenizer(), coders)


@pytest.fixture(scope="module")
def words():
    """Prompt, counterfactual, other prompts; the same target for both worlds of words."""
    return (*WORDS, Target("w7 − w20", (9, 22), (1.0, -1.0), 5))


def case_of(model, texts, ablation="counterfactual", target=None, **options):
    prompt, other, more = texts[:3]
    return make_cases(model, [Pair(prompt, other, target)], ablation=ablation, prompts=more, **options)[0]


def random_circuits(case, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, case.size, generator=generator) < torch.linspace(0.1, 0.9, rows)[:, None]


# -- cuts --------------------------------------------------------------------------------------------------------------


def dense(model, recording, layer):
    return recording.layers[layer].acts.dense(model.store.d_features(layer))[0]


def replacements(model, case, ablation, others, layer):
    """The ablation values of one layer, [pos feature]."""
    if ablation == "mean":
        tokens = torch.cat([dense(model, recording, layer) for recording in others])
        return tokens.mean(0).expand(case.clean.batch.lengths[0], -1)
    if ablation == "zero":
        return torch.zeros_like(dense(model, case.clean, layer))
    return dense(model, case.towards if ablation == "resample" else case.counterfactual, layer)


def twin(model, case, circuit, ablation, error, others):
    """One circuit, one row, from the definition: new activations decoded densely, plus an error of its own making."""
    chosen = case.items[circuit].tolist()
    values = {layer: replacements(model, case, ablation, others, layer) for layer in case.ablated}
    seen = {}

    def read(layer):
        def apply(x, at):
            seen[layer] = model.store[layer].encode(x).dense(model.store.d_features(layer))[0]
            return x

        return apply

    def write(layer):
        def apply(x, at):
            transcoder, live = model.store[layer], seen[layer]
            new = values[layer].clone()
            for _, pos, feature in (item for item in chosen if item[0] == layer):
                new[pos, feature] = live[pos, feature]
            errors = {
                "clean": case.clean.layers[layer].error[0],
                "patched": case.counterfactual.layers[layer].error[0],
                "live": x[0] - (live @ transcoder.W_dec + transcoder.b_dec),
                "zero": torch.zeros_like(x[0]),
            }
            return (new @ transcoder.W_dec + transcoder.b_dec + errors[error])[None].to(x)

        return apply

    edits = []
    for layer in case.ablated:
        read_site, write_site = model.store.sites(layer)
        edits += [Edit(read_site, read(layer)), Edit(write_site, write(layer))]
    return float(case.target.value(model.host.forward(case.clean.batch, edits))[0])


@pytest.mark.parametrize(("ablation", "error"), [*product(ABLATIONS, ERRORS)])
@pytest.mark.parametrize("name", ["exact", "apart"])
def test_cuts_are_the_definition_and_a_batch_is_its_rows(name, ablation, error, words, request):
    model = request.getfixturevalue(name)
    case = case_of(model, words, ablation, words[3])
    keep = random_circuits(case)
    values = measure(model, case, keep, error)
    assert len(set(values.tolist())) == len(keep)
    others = [model.record(prompt) for prompt in words[2]]
    for row in (0, 2, 4):
        slow = twin(model, case, keep[row], ablation, error, others)
        assert float(values[row]) == pytest.approx(slow, abs=1e-5)
        assert float(measure(model, case, keep[row : row + 1], error)[0]) == pytest.approx(slow, abs=1e-5)


@pytest.fixture(scope="module")
def texts(model, odd):
    """Prompt, counterfactual, other prompts, target; None is the default, answer against answer."""
    return (*WORDS, Target("w7 − w20", (9, 22), (1.0, -1.0), 5)) if model is odd else (*FACTS, None)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("error", ["clean", "live"])
def test_everything_kept_is_the_model_and_nothing_kept_is_nothing(model, texts, ablation, error):
    case = case_of(model, texts, ablation, texts[3])
    ends = torch.stack([torch.zeros(case.size, dtype=torch.bool), torch.ones(case.size, dtype=torch.bool)])
    nothing, everything = measure(model, case, ends, error).tolist()
    # rows of a batch round otherwise than the clean run alone: fp32 logits near 20
    assert everything == pytest.approx(case.metric, abs=1e-4)
    assert abs(nothing - everything) > 0.1
    curves = faithfulness(model, [case], rank(model, [case]), error=error, sizes=(1e-9, 1.0))
    without = completeness(model, [case], rank(model, [case]), error=error, sizes=(1e-9, 1.0))
    for curve, rest in zip(curves, without, strict=True):
        assert curve.values == pytest.approx((0.0, 1.0), abs=1e-4)
        assert rest.values == pytest.approx((1.0, 0.0), abs=1e-4)


def test_everything_kept_without_an_edit_is_the_plain_run_bit_for_bit(model, texts):
    """Under `live` and `clean` nothing is added where nothing changes."""
    case = case_of(model, texts, "zero", texts[3])
    keep = torch.ones(1, case.size, dtype=torch.bool)
    for error in ("live", "clean"):
        logits = model.host.forward(case.clean.batch, cut(model, case, keep, error))
        torch.testing.assert_close(logits, case.clean.logits, rtol=0, atol=0)


def test_an_empty_circuit_under_zero_ablation_is_ablating_every_feature(model, texts):
    layers = model.store.layers[:2]
    case = case_of(model, texts, "zero", texts[3], sites=layers)
    every = [Ablate(f"L{n}/{f}") for n in layers for f in range(model.store.d_features(n))]
    run = model.run(texts[0], every)
    empty = torch.zeros(1, case.size, dtype=torch.bool)
    assert float(measure(model, case, empty, "live")) == pytest.approx(float(case.target.value(run.logits)), abs=1e-3)


def test_one_circuit_under_zero_ablation_is_ablating_the_others(model, texts):
    layer = model.store.layers[1]
    case = case_of(model, texts, "zero", texts[3], sites=layer)
    keep = random_circuits(case, rows=1, seed=3)
    outside = [Ablate(f"L{n}/{f}@{p}") for n, p, f in case.items[~keep[0]].tolist()]
    run = model.run(texts[0], outside)
    assert float(measure(model, case, keep, "live")) == pytest.approx(float(case.target.value(run.logits)), abs=1e-3)


def test_an_empty_circuit_with_everything_patched_is_the_other_prompt(model, texts):
    """The whole stream of the counterfactual stands at the cut, so the model goes on as on the counterfactual."""
    case = case_of(model, texts, "counterfactual", texts[3], sites=1)
    empty = torch.zeros(1, case.size, dtype=torch.bool)
    other = float(case.target.value(case.counterfactual.logits)[0])
    assert float(measure(model, case, empty, "patched")) == pytest.approx(other, abs=1e-4)
    assert case.metric != pytest.approx(other, abs=0.05)


def test_more_circuits_than_rows_of_a_pass(exact, words, monkeypatch):
    case = case_of(exact, words, target=words[3])
    keep = random_circuits(case, rows=7)
    whole = measure(exact, case, keep)
    monkeypatch.setattr(sys.modules["circuits.faithfulness.evaluate"], "ROWS", 3)
    torch.testing.assert_close(measure(exact, case, keep), whole, rtol=0, atol=1e-6)


# -- cases -------------------------------------------------------------------------------------------------------------


def test_the_default_metric_is_answer_against_answer(demo):
    case, alone = (make_cases(demo, [Pair(FACTS[0], other)], ablation="zero")[0] for other in (FACTS[1], None))
    austin, phoenix = demo.host.token_id("Austin"), demo.host.token_id("Phoenix")
    assert case.target.tokens == (austin, phoenix)
    assert case.target.name == "' Austin' − ' Phoenix'"
    named = make_cases(demo, [Pair(*FACTS[:2], Logit("Austin", "Denver"))], sites=1)[0].target
    assert named.tokens == (austin, demo.host.token_id("Denver"))
    row = demo.run(FACTS[0]).logits[-1]
    assert case.metric == pytest.approx(float(row[austin] - row[phoenix]), abs=1e-4)
    others = row.clone()
    others[austin] = -torch.inf
    assert alone.target.tokens == (austin, int(others.argmax()))


def test_the_universe_is_what_is_active_in_either_prompt(demo):
    case = case_of(demo, FACTS, sites=[1, 3])
    expected = set()
    for prompt, layer in product(FACTS[:2], (1, 3)):
        acts = demo.record(prompt).layers[layer].acts
        pos, slot = (acts.values[0] > 0).nonzero(as_tuple=True)
        expected |= {(layer, int(p), int(acts.indices[0, p, s])) for p, s in zip(pos, slot, strict=True)}
    assert {tuple(item) for item in case.items.tolist()} == expected
    assert case.size == len(expected)
    assert case.items.tolist() == sorted(case.items.tolist())
    zero, mean = (case_of(demo, FACTS, ablation, sites=[1, 3]) for ablation in ("zero", "mean"))
    assert zero.size == len(expected)
    assert mean.size > len(expected)


def test_resampling_draws_another_prompt_of_the_same_length(exact, words):
    drawn = [case_of(exact, words, "resample", words[3], seed=seed) for seed in range(8)]
    ids = {tuple(case.towards.batch.ids[0].tolist()) for case in drawn}
    assert ids == {tuple(exact.host.tokenize(words[2][n])) for n in (0, 2)}
    same = case_of(exact, words, "resample", words[3], seed=3)
    assert torch.equal(same.towards.batch.ids, drawn[3].towards.batch.ids)


def test_the_circuit_of_a_graph_can_be_cut_out(demo):
    graph = trace(demo, FACTS[0], sample=0, node_threshold=0.5)
    case = case_of(demo, FACTS)
    rows = graph.index.rows(FEATURE)
    features = [tuple(int(c[n]) for c in (graph.index.layer, graph.index.pos, graph.index.feature)) for n in rows]
    mask = case.circuit(features)
    assert {tuple(item) for item in case.items[mask].tolist()} == set(features)
    with pytest.raises(AddressError, match="L1/639@99 is not active"):
        case.circuit([(1, 99, 639)])


# -- rankings ----------------------------------------------------------------------------------------------------------


def test_rankings_are_what_they_say(model, texts):
    case = case_of(model, texts, target=texts[3])
    found = {name: rule(model, case) for name, rule in RANKINGS.items()}
    plain = score_features(model, case.clean, case.target)
    one_step = integrated_scores(model, case.clean, case.target, case.counterfactual, steps=1)
    whole = integrated_scores(model, case.clean, case.target, case.counterfactual)
    for layer, record in case.clean.layers.items():
        size = model.store.d_features(layer)
        acts = record.acts.dense(size)[0]
        others = case.counterfactual.layers[layer].acts.dense(size)[0]
        torch.testing.assert_close(found["activation"][layer], acts)
        torch.testing.assert_close(found["difference"][layer], (acts - others).abs())
        close, scored = {"rtol": 1e-3, "atol": 1e-4}, plain.layers[layer]
        torch.testing.assert_close(found["grad x act"][layer][scored.pos, scored.feature], scored.score, **close)
        torch.testing.assert_close(found["grad x difference"][layer], one_step.features[layer], **close)
        torch.testing.assert_close(found["ig"][layer], whole.features[layer], **close)


def test_chance_is_seeded_and_does_not_depend_on_the_place_in_the_list(exact, words):
    prompt, other, more, target = words
    first, second = Pair(prompt, other, target), Pair(more[0], more[2], target)
    there, back = (make_cases(exact, pairs) for pairs in ([first, second], [second, first]))
    drawn, again = rank(exact, there, {"r": chance(1)})["r"], rank(exact, back, {"r": chance(1)})["r"]
    assert torch.equal(drawn[0][1], again[1][1])
    assert not torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][1], chance(2)(exact, there[0])[1])


def test_circuits_are_the_first_of_a_ranking(exact, words):
    case = case_of(exact, words, target=words[3])
    scores = torch.zeros(case.size)
    scores[[4, 9, 2]] = torch.tensor([3.0, -5.0, 1.0])
    ranking, start = {}, 0
    for layer, mask in case.universe.items():
        ranking[layer] = torch.full(mask.shape, 99.0)  # outside the universe nothing counts
        ranking[layer][mask] = scores[start : (start := start + int(mask.sum()))]

    def chosen(order):
        return [row.nonzero()[:, 0].tolist() for row in circuits_by_size(case, ranking, order, [0, 1, 3, 5])]

    assert chosen("signed") == [[], [4], [0, 2, 4], [0, 1, 2, 3, 4]]
    assert chosen("absolute") == [[], [9], [2, 4, 9], [0, 1, 2, 4, 9]]
    last = circuits_by_size(case, ranking, "signed", [case.size - 1])[0]
    assert (~last).nonzero()[:, 0].tolist() == [9]


# -- curves ------------------------------------------------------------------------------------------------------------


def curve(numerator, denominator, shares=(0.001, 0.01, 0.1, 1.0), counts=(1.0, 10.0, 100.0, 1000.0)):
    return Curve("r", "signed", shares, counts, torch.tensor(numerator), torch.tensor(denominator))


def test_areas_by_hand():
    found = curve([[0.0, 1.0, 2.0, 2.4]], [2.0])
    assert found.values == pytest.approx((0, 0.5, 1, 1.2))
    assert found.cpr == pytest.approx(0.009 * 0.25 + 0.09 * 0.75 + 0.9 * 1.1)
    assert found.cmd == pytest.approx(0.009 * 0.75 + 0.09 * 0.25 + 0.9 * 0.1)
    assert found.log_cpr == pytest.approx((0.25 + 0.75 + 1.1) / 3)
    assert found.log_cmd == pytest.approx((0.75 + 0.25 + 0.1) / 3)
    assert (found.needed(), found.needed(0.3), found.needed(1.5)) == (100, 10, None)
    assert area((0.0, 2.0, 3.0), (1.0, 1.0, 3.0)) == 4
    assert log_area((1.0, 10.0), (0.0, 1.0)) == pytest.approx(0.5)
    assert all(value != value for value in (area((1.0,), (1.0,)), log_area((1.0,), (1.0,))))


def test_several_prompts_are_a_ratio_of_means():
    found = curve([[1.0, 1.0, 1.0, 1.0], [0.0, 4.0, 4.0, 4.0]], [1.0, 4.0])
    assert found.values == pytest.approx((0.2, 1, 1, 1))
    torch.testing.assert_close(found.each, torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 1]]))


def test_pairs_together_are_the_pairs_alone(demo):
    pairs = [Pair(FACTS[0], FACTS[1]), Pair(FACTS[1], FACTS[0])]
    rules = {name: RANKINGS[name] for name in ("ig", "random")}

    def curves(some, **sizes):
        cases = make_cases(demo, some, sites=(1,))
        return faithfulness(demo, cases, rank(demo, cases, rules), error="patched", **sizes)

    both, alone = curves(pairs), [curves([pair]) for pair in pairs]
    for number, found in enumerate(both):
        assert found.shares == SHARES
        for row, single in enumerate(each[number] for each in alone):
            assert (found.ranking, found.order) == (single.ranking, single.order)
            torch.testing.assert_close(found.numerator[row], single.numerator[0], rtol=0, atol=1e-4)
        sizes = [case.size for case in make_cases(demo, pairs, sites=(1,))]
        assert found.counts == pytest.approx([sum(int(s * n) for n in sizes) / 2 for s in SHARES])
    numbers = curves(pairs, sizes=(1, 8, 10**6))[0]
    assert numbers.counts == pytest.approx((1, 8, sum(sizes) / 2))
    assert numbers.shares == pytest.approx((sum(1 / n for n in sizes) / 2, sum(8 / n for n in sizes) / 2, 1))


def test_completeness_is_faithfulness_of_the_rest(exact, words):
    case = case_of(exact, words, target=words[3])
    rankings = rank(exact, [case], {"r": chance(4)})
    (found,) = completeness(exact, [case], rankings, sizes=(20, 60), orders=("signed",))
    keep = ~circuits_by_size(case, rankings["r"][0], "signed", [20, 60])
    empty, *rest = measure(exact, case, torch.cat([torch.zeros(1, case.size, dtype=torch.bool), keep])).tolist()
    assert found.values == pytest.approx([(value - empty) / (case.metric - empty) for value in rest], abs=1e-6)


def test_the_picture_shows_every_line_and_its_area(tmp_path):
    signed = curve([[0.0, 1.0, 2.0, 2.4]], [2.0])
    absolute = Curve("other", "absolute", signed.shares, signed.counts, signed.numerator, signed.denominator)
    plot_curves({"left": [signed], "right": [absolute]}, tmp_path / "curves.svg", "a title")
    text = "".join(ET.parse(tmp_path / "curves.svg").getroot().itertext())
    for part in ("left", "right", "a title", "r: CPR 1.06 (0.70)", "other: CMD 0.12 (0.37)", "faithfulness f"):
        assert part in text
    plot_curves({"left": [signed]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(OutputError, match=r"unknown picture format '\.txt'"):
        plot_curves({"left": [signed]}, tmp_path / "curves.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "curves.svg"]


def test_without_matplotlib_the_repair_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OutputError, match="need matplotlib"):
        plot_curves({"left": [curve([[0.0, 1.0, 2.0, 2.4]], [2.0])]}, tmp_path / "curves.png")


# -- the embedded model ------------------------------------------------------------------------------------------------


def test_city_pairs_are_held_out_cities_of_two_states_and_as_many_tokens(demo):
    exam = Exam.of(demo)
    pairs, again, other = (city_pairs(exam, 40, seed=seed) for seed in (0, 0, 1))
    assert pairs == again != other
    assert len(set(pairs)) == 40
    held_out = {TEST_TEMPLATE.format(c=city) for city in exam.held_out}
    for pair in pairs:
        assert {pair.prompt, pair.counterfactual} <= held_out
        assert pair.prompt != pair.counterfactual  # one held-out city per state
        assert len(demo.host.tokenize(pair.prompt)) == len(demo.host.tokenize(pair.counterfactual))


def test_the_ranking_of_other_pairs_has_seen_neither_city(demo):
    first, second, third = (TEST_TEMPLATE.format(c=city) for city in ("Dallas", "Tempe", "Tuscaloosa"))
    fourth = TEST_TEMPLATE.format(c="Sitka")
    cases = make_cases(demo, [Pair(first, second), Pair(second, third), Pair(third, fourth)], sites=3)
    rankings = ranked(Exam.of(demo), cases)
    torch.testing.assert_close(rankings["ig of other pairs"][0][3], rankings["ig"][2][3])
    assert (rankings["ig of other pairs"][1][3] == 0).all()


@pytest.mark.parametrize("layer", range(5))
def test_sixteen_features_carry_a_city_at_every_site(demo, layer):
    cases = make_cases(demo, city_pairs(Exam.of(demo), 20), sites=layer)
    rules = {name: RANKINGS[name] for name in ("ig", "activation", "random")}
    found = faithfulness(demo, cases, rank(demo, cases, rules), sizes=(16,), orders=("signed",))
    values = {curve.ranking: curve.values[0] for curve in found}
    assert values["ig"] >= 0.8
    assert max(values["activation"], values["random"]) < 0.6


@pytest.mark.parametrize("which", ["demo", "demo_dense"])
def test_with_all_sites_cut_our_rankings_are_above_the_baselines(which, request):
    exam = Exam.of(request.getfixturevalue(which))
    curves, _ = all_sites(exam, city_pairs(exam, 4))
    assert set(curves) == {"clean", "live", "patched", "zero"}
    for found in curves.values():
        assert all(beats_baselines(found).values())
    assert pick(curves["patched"], "ig", "absolute").values[-1] < 0.7, "without the clean errors, half is gone"


# -- damaged input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "match", "pairs", "options"),
    [
        (PromptError, "no prompts given", [], {}),
        (PromptError, "must have the same number of tokens", [Pair("w1 w2 w3 w4 w5 w6", "w5 w5 w3")], {}),
        (UserError, "ablation 'mean' needs prompts", [Pair(*WORDS[:2])], {"ablation": "mean"}),
        (UserError, "ablation 'resample' needs prompts", [Pair(*WORDS[:2])], {"ablation": "resample"}),
        (UserError, "needs a counterfactual in every pair", [Pair(WORDS[0])], {}),
        (UserError, "no layer to cut", [Pair(*WORDS[:2])], {"sites": []}),
        (UserError, "unknown layers 'some'", [Pair(*WORDS[:2])], {"sites": "some"}),
        (CheckpointError, "layer 2 has no transcoder", [Pair(*WORDS[:2])], {"sites": [1, 2]}),
        (TargetError, "measured on one difference of logits", [Pair(*WORDS[:2], Mass(1.0))], {}),
        (TargetError, "measured on one difference of logits", [Pair(*WORDS[:2], Direction([1.0] * 40, EMBEDDING))], {}),
        (PromptError, "no prompt to resample from", [Pair(*WORDS[:2])],
         {"ablation": "resample", "prompts": ["w1 w2", WORDS[0]]}),
    ],
)  # fmt: skip
def test_cases_that_cannot_be_made(odd, kind, match, pairs, options):
    with pytest.raises(kind, match=match):
        make_cases(odd, pairs, **options)


def test_measurements_that_cannot_be_made(exact, words):
    prompt, other, _, target = words
    (case,) = make_cases(exact, [Pair(prompt, other, target)])
    (alone,) = make_cases(exact, [Pair(prompt, None, target)], ablation="zero")
    keep = torch.ones(1, case.size, dtype=torch.bool)
    with pytest.raises(UserError, match="unknown error mode 'dead'"):
        check_error("dead", case)
    with pytest.raises(UserError, match="unknown ablation 'median'"):
        check_ablation("median", [Pair(prompt, other)], ())
    with pytest.raises(UserError, match="error 'patched' needs a counterfactual"):
        measure(exact, alone, keep[:, : alone.size], "patched")
    rankings = rank(exact, [case], {"random": chance()})
    for sizes in ((), (0,), (0.0, 1.0), (0.5, 1.5), (1, 0.5), (3, 2), (4, 4)):
        with pytest.raises(UserError, match="cannot use the circuit sizes"):
            faithfulness(exact, [case], rankings, sizes=sizes)
    (early,) = make_cases(exact, [Pair(prompt, other, target)], sites=0)
    for wrong in ([], rank(exact, [early], {"random": chance()})["random"]):
        with pytest.raises(UserError, match="'mine' does not belong to these cases"):
            faithfulness(exact, [case], {"mine": wrong})
    (same,) = make_cases(exact, [Pair(prompt, prompt, target)])
    with pytest.raises(UserError, match="leaves the metric as it is"):
        faithfulness(exact, [same], rank(exact, [same], {"random": chance()}))
