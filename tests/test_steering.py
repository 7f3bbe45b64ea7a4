"""Steering as an experiment: strengths become the numbers they say, and what is reported is what was generated."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from test_interventions import inactive, strongest
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits.cli import main
from circuits.demo import Exam
from circuits.demo.feature_swap import best_site, select, swap_plan
from circuits.demo.questions import STATE_NAMES
from circuits.plots import dose_plot
from hooks import Ablate, Add, Clamp, HookedModel, Sampling, Scale, Site, UserError
from hooks.demo import PROMPT
from hooks.errors import AddressError, InterventionError, OutputError, PromptError, TargetError
from hooks.generation import Comparison, Scored, Steer, Strength, comparison, grid
from hooks.generation.comparison import perplexity
from hooks.generation.strength import check_how, resolve
from hooks.host import Host
from hooks.types import Pass


@pytest.fixture(scope="module")
def start(model, prompt):
    """A prompt the model goes on from for several tokens."""
    return "after two comes three after" if prompt.startswith("fact") else prompt


@contextmanager
def no_pass(model: HookedModel):
    """Nothing may run."""

    def stop(*_):
        raise AssertionError("the model ran")

    handle = model.host.decoder.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def value_of(model, prompt, item, texts=()) -> float:
    ((resolved,),) = resolve(model, prompt, [[item]], texts)
    assert resolved.intervention == item.at(resolved.value)
    return resolved.value


# -- strengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", Strength(8.0)),
        ("-3", Strength(-3.0)),
        ("1e-3", Strength(0.001)),
        (".5", Strength(0.5)),
        ("x2", Strength(2.0, "typical")),
        ("x-1.5", Strength(-1.5, "typical")),
        ("0.1r", Strength(0.1, "residual")),
        ("-0.25r", Strength(-0.25, "residual")),
    ],
)
def test_a_strength_is_read(text, expected):
    assert Strength.parse(text) == expected == Strength.parse(str(expected))


def test_a_strength_says_all_its_digits():
    assert Strength.parse(str(Strength(1 / 3, "residual"))).amount == 1 / 3


@pytest.mark.parametrize("text", ["", " 8", "strong", "2x", "X2", "x", "r", "x2r", "1_000", "0.1 r", "10%", "x2,3"])
def test_a_strength_that_cannot_be_read_is_refused(text):
    with pytest.raises(InterventionError, match="is not a number"):
        Strength.parse(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "xnan", "infr", "1e999"])
def test_a_strength_that_is_not_finite_is_refused(text):
    with pytest.raises(InterventionError, match="not a finite number"):
        Strength.parse(text)
    with pytest.raises(InterventionError, match="not a finite number"):
        Steer("L0/1", math.nan)


def test_an_address_with_a_strength_is_read():
    assert Steer.parse("L3/118@new=x2") == Steer("L3/118@new", Strength(2.0, "typical"))
    assert Steer.parse("L3/118@2:5=-1", "add") == Steer((3, slice(2, 5), 118), -1.0, "add")
    assert Steer.parse("L3/118").strength is None
    with pytest.raises(InterventionError, match="cannot steer by"):
        check_how("scale", "L3/118")


def test_an_absolute_strength_needs_no_pass_and_other_interventions_stay(model, prompt):
    others = [Scale("L0/2", 2.0), Ablate("L0/4@0")]
    with no_pass(model):
        (plan,) = resolve(model, prompt, [[Steer("L0/1", 3.0), Steer("L1/1", 2.0, "add"), *others]])
    assert [item.intervention for item in plan] == [Clamp("L0/1", 3.0), Add("L1/1", 2.0), *others]
    assert [item.value for item in plan] == [3.0, 2.0, None, None]


def test_typical_is_the_mean_of_the_positive_activations(model, prompt):
    layer = 1
    feature, _ = strongest(model, prompt, layer, -1)
    acts = model.record(prompt).layers[layer].acts.dense(model.store.d_features(layer))[0, :, feature]
    expected = float(acts[acts > 0].double().mean())
    item = Steer(f"L{layer}/{feature}@new", "x2")
    assert value_of(model, prompt, item) == pytest.approx(2 * expected, rel=1e-6)
    ((resolved,),) = resolve(model, prompt, [[item]])
    assert f"{int((acts > 0).sum())} of the {len(acts)} tokens of the prompt" in resolved.source


def test_typical_over_texts_counts_every_real_token_once(model, prompt):
    """Texts of different length are padded; padding repeats a token and must not count."""
    words = prompt.split()
    texts = [" ".join(words[:3]), prompt, " ".join(words[:2])]
    layer, found = 1, []
    feature, _ = strongest(model, texts[0], layer, -1)  # padding would repeat exactly this token
    for text in [prompt, *texts]:
        acts = model.record(text).layers[layer].acts.dense(model.store.d_features(layer))[0, :, feature]
        found.append(acts[acts > 0].double())
    expected = float(torch.cat(found).mean())
    assert value_of(model, prompt, Steer(f"L{layer}/{feature}", "x1"), texts) == pytest.approx(expected, rel=1e-5)


def test_a_feature_that_is_never_active_has_no_typical_activation(demo):
    dead = next(
        f for f in range(demo.store.d_features(4))
        if not bool((demo.record(PROMPT).layers[4].acts.dense(demo.store.d_features(4))[0, :, f] > 0).any())
    )  # fmt: skip
    with pytest.raises(InterventionError, match="never active") as caught:
        resolve(demo, PROMPT, [[Steer(f"L4/{dead}", "x2")]])
    assert "0 of the 10 tokens of the prompt" in str(caught.value)
    texts = Exam.of(demo).selection_questions().prompts[::20]
    assert value_of(demo, PROMPT, Steer("L4/579@-1", "x1"), texts) > 0  # a Californian feature: elsewhere it is active
    with pytest.raises(InterventionError, match="never active"):
        resolve(demo, PROMPT, [[Steer("L4/579@-1", "x1")]])


@pytest.mark.parametrize("place", ["3", "1:4", "{0,2,4}", "all", "new"])
def test_a_share_of_the_residual_norm_by_hand(model, prompt, place):
    layer, feature = 1, 7
    stream = model.record(prompt).layers[layer].target[0].double().norm(dim=-1)
    here = {"3": [3], "1:4": [1, 2, 3], "{0,2,4}": [0, 2, 4]}.get(place, list(range(len(stream))))
    assert float(stream.max()) < 10 * float(stream.median())  # no sink among them
    expected = 0.1 * float(stream[here].mean()) / float(model.store[layer].W_dec[feature].double().norm())
    assert value_of(model, prompt, Steer(f"L{layer}/{feature}@{place}", "0.1r")) == pytest.approx(expected, rel=1e-6)


def test_adding_a_share_moves_the_stream_by_that_share(model, prompt):
    """|delta| = 0.25 |x|, measured on the stream; a clamp of an inactive feature does the same."""
    layer, pos = 1, 2
    feature, site = inactive(model, prompt, layer, pos), model.store.sites(layer)[1]
    batch = model.host.batch([prompt])
    x = model.host.capture(batch, [site])[1][site]
    for how in ("add", "clamp"):
        ((resolved,),) = resolve(model, prompt, [[Steer(f"L{layer}/{feature}@{pos}", "0.25r", how)]])
        (edit,) = model.edits(batch, [[resolved.intervention]])
        change = (edit.apply(x, Pass(0, list(batch.lengths))) - x)[0].norm(dim=-1) / x[0].norm(dim=-1)
        assert float(change[pos]) == pytest.approx(0.25, rel=1e-4)
        assert float(change.sum()) == float(change[pos])  # no other token moved


def test_attention_sinks_do_not_count_in_the_residual_norm(sink):
    """`w1` has 100 times the usual norm. Where it is the only token meant, it counts."""
    prompt, row = "w3 w1 w4 w5 w6", sink.store[0].W_dec[5].double().norm()
    stream = sink.record(prompt).layers[0].target[0].double().norm(dim=-1)
    plain = stream[[0, 2, 3, 4]]
    assert stream[1] > 10 * stream.median() > plain.max()
    assert value_of(sink, prompt, Steer("L0/5", "1r")) == pytest.approx(float(plain.mean() / row), rel=1e-6)
    assert value_of(sink, prompt, Steer("L0/5@1", "1r")) == pytest.approx(float(stream[1] / row), rel=1e-6)


def test_a_set_that_writes_mlp_out_is_measured_on_the_stream_it_is_added_to():
    coder = random_transcoder(1, 40, read=Site("mlp_in", 1), write=Site("mlp_out", 1))
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), [coder])
    behind = Site("resid_post", 1)
    stream = model.host.capture(model.host.batch(["w1 w2 w3"]), [behind])[1][behind][0].double().norm(dim=-1)
    expected = float(stream.mean() / coder.W_dec[3].double().norm())
    assert value_of(model, "w1 w2 w3", Steer("L1/3", "1r")) == pytest.approx(expected, rel=1e-6)


def test_a_decoder_row_of_zeros_reaches_no_share():
    coder = random_transcoder(0, 40)
    coder.W_dec[3] = 0
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), [coder])
    with pytest.raises(InterventionError, match="writes nothing"):
        resolve(model, "w1 w2", [[Steer("L0/3", "0.1r")]])


# -- side by side --------------------------------------------------------------------------------------------------

HOT = {"max_new_tokens": 6, "sampling": Sampling(temperature=1.0, seed=3)}


@pytest.mark.parametrize("positions", ["all", "new", "-1", "-2:", "{0,2}", "prompt"])
@pytest.mark.parametrize("swap", [{}, {"swap": "all", "error": "zero"}])
def test_probabilities_equal_those_seen_while_generating(model, start, positions, swap):
    plan = [Clamp(f"L1/7@{positions}", 3.0)]
    found = model.steer(start, plan, **HOT, **swap)
    plain, steered = model.generate(start, **HOT), model.generate(start, plan, **HOT, **swap)
    assert (found.baseline.ids, found.baseline.text) == (plain.ids, plain.text)
    assert (found.steered.ids, found.steered.text) == (steered.ids, steered.text)
    torch.testing.assert_close(found.baseline.plain, plain.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.steered.steered, steered.logprobs, rtol=1e-4, atol=1e-4)


def test_each_text_is_read_by_the_other_model(model, start):
    """By hand: the whole text as a prompt, positions given absolutely."""
    plan = [Add("L1/7@new", 4.0), Clamp("L2/3@1" if 2 in model.store.layers else "L3/3@1", 2.0)]
    found = model.steer(start, plan, **HOT)
    length = len(found.prompt)
    absolute = [Add(f"L1/7@{length}:", 4.0), plan[1]]

    def read(scored, items):
        ids = [*model.host.tokenize(start), *scored.ids]
        logits = model.run(ids, items).logits.double().log_softmax(-1)
        return torch.stack([logits[i - 1, ids[i]] for i in range(length, len(ids))])

    torch.testing.assert_close(found.steered.plain, read(found.steered, []), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.baseline.steered, read(found.baseline, absolute), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.steered.steered, read(found.steered, absolute), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.steered.plain, found.steered.steered, atol=1e-3)


def test_nothing_is_attached_afterwards_and_an_empty_plan_costs_nothing(model, start):
    before = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.host.model.modules())
    found = model.steer(start, [], max_new_tokens=3)
    assert found.baseline.ids == found.steered.ids
    assert found.first_difference is None
    assert torch.equal(found.steered.plain, found.steered.steered)
    assert found.cost == 0
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.host.model.modules()) == before


def test_a_stop_string_cuts_the_text_and_every_generated_token_is_read(demo):
    found = demo.steer("after two comes three after", [Clamp("L1/7@0", 0.0)], max_new_tokens=6, stop=" ")
    assert " " not in found.baseline.text
    assert len(found.baseline.plain) == len(found.baseline.ids) == len(found.baseline.tokens)


def scored(ids, plain, steered=None) -> Scored:
    plain = torch.tensor(plain, dtype=torch.float64)
    return Scored("text", tuple(ids), tuple(map(str, ids)), plain, plain if steered is None else torch.tensor(steered))


def test_figures_by_hand():
    baseline, steered = scored([1, 2, 3], [-0.5, -0.25, 0.0]), scored([1, 5], [-1.0, -3.0], [-0.1, -0.3])
    found = Comparison(("a", "b"), (), baseline, steered)
    assert found.cost == pytest.approx(-0.25 + 2.0)
    assert steered.perplexity == pytest.approx(math.exp(2.0))
    assert steered.mean_steered == pytest.approx(-0.2)
    assert found.first_difference == 1
    assert Comparison((), (), baseline, scored([1, 2], [0.0, 0.0])).first_difference == 2
    assert perplexity(-1e6) == math.inf
    table = found.frame()
    assert table.columns.tolist() == ["text", "pos", "token", "id", "plain", "steered"]
    assert table["pos"].tolist() == [2, 3, 4, 2, 3]
    assert table.query("text == 'steered'")["plain"].tolist() == [-1.0, -3.0]


@pytest.mark.parametrize(
    ("plan", "setting", "said"),
    [
        ([Steer("L0/1", 1.0), Steer("L0/1@2", "x2")], {}, "two interventions act on the same"),
        ([Steer("L0/1", "x2"), Ablate("L0/1@0")], {}, "two interventions act on the same"),
        ([Steer("L2/1", "x2")], {}, "layer 2 has no transcoder"),
        ([Steer("L0/99999", "0.1r")], {}, "no feature 99999"),
        ([Steer("L0/1@99", "0.1r")], {}, "does not occur"),
        ([Steer("L0/1")], {}, "has no strength"),
        ([Steer("L0/1", "x2")], {"stop": ("a", "")}, "cannot stop at ''"),
        ([Steer("L0/1", "x2")], {"max_new_tokens": 0}, "cannot generate 0 tokens"),
        ([Steer("L0/1", "x2")], {"max_new_tokens": 999}, "do not fit"),
        ([Steer("L0/1", "x2")], {"swap": "all", "error": "frozen"}, "frozen error"),
        ([Steer("L0/1", "x2")], {"error": "zero"}, "no site is replaced"),
        (["L0/1"], {}, "is not an intervention"),
    ],
)
def test_whatever_is_wrong_is_said_before_the_model_runs(odd, plan, setting, said):
    with no_pass(odd), pytest.raises(UserError, match=said):
        odd.steer("w1 w2 w3", plan, **setting)


# -- sweeps --------------------------------------------------------------------------------------------------------


def test_grids():
    assert grid("0,2, -4") == (Strength(0.0), Strength(2.0), Strength(-4.0))
    assert grid("0:8:5") == tuple(map(Strength, (0.0, 2.0, 4.0, 6.0, 8.0)))
    assert grid("x0:x1:3") == tuple(Strength(amount, "typical") for amount in (0.0, 0.5, 1.0))
    assert grid([1.0, "2", Strength(3.0)]) == tuple(map(Strength, (1.0, 2.0, 3.0)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the grid of strengths is empty"),
        ([], "the grid of strengths is empty"),
        ("0,x2", "the grid mixes activation and × typical"),
        ("0:x2:3", "the grid mixes"),
        ("0:8", "cannot read the grid"),
        ("0:8:1", "cannot read the grid"),
        ("0:8:2.5", "cannot read the grid"),
        ("0,,2", "is not a number"),
        ("0:nan:4", "not a finite number"),
    ],
)
def test_a_grid_that_cannot_be_used_is_refused_before_the_model_runs(odd, text, said):
    with no_pass(odd), pytest.raises(UserError, match=said):
        odd.dose("w1 w2", [Steer("L0/1")], text)


def test_a_sweep_is_one_experiment_per_strength(model, start):
    """Rows of one batch = every strength by itself; what has a strength of its own keeps it."""
    fixed = Steer("L0/2", 1.5, "add")
    found = model.dose(start, [Steer("L1/7"), fixed], "4,0,-2", max_new_tokens=4)
    assert [dose.strength.amount for dose in found.doses] == [4.0, 0.0, -2.0]
    for dose in found.doses:
        alone = model.steer(start, [Clamp("L1/7", dose.strength.amount), Add("L0/2", 1.5)], max_new_tokens=4)
        assert dose.values == {"L1/7": dose.strength.amount}
        assert (dose.scored.ids, dose.scored.text) == (alone.steered.ids, alone.steered.text)
        torch.testing.assert_close(dose.scored.plain, alone.steered.plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dose.scored.steered, alone.steered.steered, rtol=1e-4, atol=1e-4)
        effect = model.run(start, [Clamp("L1/7", dose.strength.amount), Add("L0/2", 1.5)]).effect()
        assert dose.effect.delta == pytest.approx(effect.delta, abs=1e-3)
        assert (dose.effect.target, dose.effect.against) == (effect.target, effect.against)
    assert found.baseline.ids == model.generate(start, max_new_tokens=4).ids


def test_a_dose_in_relative_units_is_a_multiple_of_the_typical_activation(demo):
    feature, _ = strongest(demo, PROMPT, 4, -1)
    typical = value_of(demo, PROMPT, Steer(f"L4/{feature}", "x1"))
    found = demo.dose(PROMPT, [Steer(f"L4/{feature}@-1")], "x0,x1,x2", target="Austin", max_new_tokens=2)
    assert [dose.values[f"L4/{feature}@-1"] for dose in found.doses] == pytest.approx([0.0, typical, 2 * typical])
    assert found.unit == "× typical activation"
    ablated = demo.run(PROMPT, [Ablate(f"L4/{feature}@-1")]).effect("Austin")
    assert found.doses[0].effect.delta_logit == pytest.approx(ablated.delta_logit, abs=1e-4)
    table = found.frame()
    assert table["strength"].tolist() == ["x0", "x1", "x2"]
    assert table["delta_logit"].tolist() == [dose.effect.delta_logit for dose in found.doses]
    assert table[f"L4/{feature}@-1"].iloc[2] == pytest.approx(2 * typical)


def test_a_sweep_needs_something_to_vary_and_two_tokens(odd):
    with no_pass(odd), pytest.raises(InterventionError, match="nothing takes the strengths"):
        odd.dose("w1 w2", [Steer("L0/1", 2.0)], "0,1")
    with no_pass(odd), pytest.raises(TargetError, match="same token"):
        odd.dose("w1 w2", [Steer("L0/1")], "0,1", target="w5", against="w5")
    answer = odd.run("w1 w2").top_before(1)[0].id
    with pytest.raises(TargetError, match="same token"):
        odd.dose("w1 w2", [Steer("L0/1")], "0,1", against=answer)


@pytest.mark.slow
def test_steering_a_state_feature_changes_the_capital(demo):
    """Of the features that carry California, chosen on other questions, one held high is enough; with Texas' own
    features out of the way, the usual activations are."""
    exam = Exam.of(demo)
    chosen = best_site(select(exam))
    own, wanted = STATE_NAMES.index("Texas"), STATE_NAMES.index("California")
    pos = int(exam.test_questions().positions[chosen.place][own])
    plan = swap_plan(chosen, own, wanted, pos)
    moved = demo.steer(PROMPT, plan, max_new_tokens=2)
    assert moved.baseline.text.startswith(" Austin")
    assert moved.steered.text.startswith(" Sacramento")
    assert moved.cost > 1  # the plain model finds that a strange thing to say here
    first = next(item.address for item in plan if isinstance(item, Clamp))
    sweep = demo.dose(PROMPT, [Steer(first)], "0:12:7", target="Austin", against="Sacramento", max_new_tokens=2)
    said = [dose.scored.text.split("<")[0] for dose in sweep.doses]
    assert said[0] == " Austin"
    assert said[-1] == " Sacramento"
    metric = [dose.effect.metric_after for dose in sweep.doses]
    assert metric == sorted(metric, reverse=True)


# -- the picture ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(demo):
    return demo.dose(PROMPT, [Steer("L4/579@-1")], "0,6,12", target="Austin", against="Sacramento", max_new_tokens=2)


def test_a_sweep_is_drawn_the_same_every_time(sweep, tmp_path):
    for name in ("a.png", "b.png", "a.svg", "b.svg"):
        dose_plot(sweep, tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    for said in ("Austin against Sacramento", "strength (activation)", ">Sacramento<", "mean log-probability"):
        assert said in text
    with pytest.raises(OutputError, match="picture format"):
        dose_plot(sweep, tmp_path / "a.gif")


# -- chat ----------------------------------------------------------------------------------------------------------


def with_template(template: str | None) -> Host:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return Host(random_qwen2(), tokenizer)


TURNS = (
    "{% for m in messages %}w60 {{ m['role'][0] == 'u' and 'w10' or 'w11' }} {{ m['content'] }} w61 {% endfor %}"
    "{% if add_generation_prompt %}w60 w11{% endif %}"
)


def test_a_chat_is_what_the_template_makes_of_it_up_to_the_answer():
    host = with_template(TURNS)
    assert host.text(host.chat("w1 w2")) == "w60 w10 w1 w2 w61 w60 w11"
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    assert host.text(host.chat(talk)) == "w60 w10 w1 w61 w60 w11 w2 w61 w60 w10 w3 w61 w60 w11"


def test_a_chat_that_cannot_be_had_is_refused():
    with pytest.raises(PromptError, match="no chat template"):
        with_template(None).chat("w1")
    with pytest.raises(PromptError, match="empty"):
        with_template(TURNS).chat("  ")
    with pytest.raises(PromptError, match="empty"):
        with_template(TURNS).chat([])
    refusing = with_template("{{ raise_exception('only users may speak') }}")
    with pytest.raises(PromptError, match=r"refuses the messages\n.*only users may speak"):
        refusing.chat("w1")


# -- the command line ----------------------------------------------------------------------------------------------

STEER = ("steer", PROMPT, "--max-new-tokens", "3")
STATE = "L4/579@-1"  # carries California: test_steering_a_state_feature_changes_the_capital


def run(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_the_command_says_what_the_library_says(capsys, demo):
    feature, _ = strongest(demo, PROMPT, 3, -1)
    result = run(capsys, *STEER, "--set", f"{STATE}=8", f"L3/{feature}@-1=x2", "--do", "add:L1/3@new=0.1r")
    plan = [Steer(STATE, 8.0), Steer(f"L3/{feature}@-1", "x2"), Steer("L1/3@new", "0.1r", "add")]
    found = demo.steer(PROMPT, plan, max_new_tokens=3)
    for name in ("baseline", "steered"):
        scored, said = getattr(found, name), result[name]
        assert (said["text"], said["ids"]) == (scored.text, list(scored.ids))
        assert said["logprobs"]["plain"] == pytest.approx(scored.plain.tolist(), abs=1e-6)
        assert said["logprobs"]["steered"] == pytest.approx(scored.steered.tolist(), abs=1e-6)
        assert said["perplexity"] == pytest.approx(scored.perplexity)
    assert result["cost"] == pytest.approx(found.cost)
    assert [item["strength"] for item in result["interventions"]] == ["8", "x2", "0.1r"]
    assert [item["value"] for item in result["interventions"]] == pytest.approx([r.value for r in found.interventions])
    assert result["interventions"][1]["source"].startswith("typical activation")


def test_people_see_both_texts_with_their_probabilities(capsys):
    assert main([*STEER, "--set", f"{STATE}=8", "L2/566@-1=x1"]) == 0
    out = capsys.readouterr().out
    assert f"steered:  {PROMPT} Sacramento<|endoftext|>\n" in out
    assert f"baseline: {PROMPT} Austin<|endoftext|>\n" in out
    assert "clamp L4/579@-1 = 8\n" in out
    assert "(x1: typical activation" in out
    assert "perplexity" in out
    (row,) = (line for line in out.splitlines() if line.strip().startswith("' Austin'"))
    assert row.split()[-1] != row.split()[-2]


def test_the_steered_text_is_shown_while_it_comes(capsys, monkeypatch):
    """Pieces are printed, and flushed, before the next token is computed."""
    seen = []
    step = comparison.streamed

    def stream(*args):
        for token in step(*args):
            yield token
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(comparison, "streamed", stream)
    assert main([*STEER, "--set", f"{STATE}=8"]) == 0
    assert seen[0].endswith("Dallas is Sacramento")
    assert seen[1] == "<|endoftext|>"


def test_when_inactive_can_be_chosen(capsys, demo):
    """The feature is inactive on this prompt: skipped, the clamp does nothing."""
    assert run(capsys, *STEER, "--set", f"{STATE}=8")["steered"]["text"].startswith(" Sacramento")
    skipped = run(capsys, *STEER, "--set", f"{STATE}=8", "--when-inactive", "skip")
    assert skipped["steered"]["text"].startswith(" Austin")
    assert skipped["interventions"][0]["when_inactive"] == "skip"


def test_sampling_and_stop_strings(capsys, demo):
    flags = ["--temperature", "1.5", "--top-p", "0.95", "--seed", "4", "--stop", "o"]
    result = run(capsys, *STEER, "--set", f"{STATE}=5", *flags)
    options = {"max_new_tokens": 3, "sampling": Sampling(1.5, 0.95, 4), "stop": ("o",)}
    assert result["baseline"]["ids"] == list(demo.generate(PROMPT, **options).ids)
    assert result["steered"]["ids"] == list(demo.generate(PROMPT, [Clamp(STATE, 5.0)], **options).ids)
    assert "o" not in result["steered"]["text"] + result["baseline"]["text"]
    assert result["sampling"]["seed"] == 4


def test_a_sweep_on_the_command_line(capsys, tmp_path, demo):
    path = tmp_path / "new" / "dose.svg"
    flags = ["--set", STATE, "--strengths", "0,8", "--target", "Austin", "--against", "Sacramento", "--plot", str(path)]
    result = run(capsys, *STEER, *flags)
    found = demo.dose(PROMPT, [Steer(STATE)], "0,8", target="Austin", against="Sacramento", max_new_tokens=3)
    assert [dose["text"] for dose in result["doses"]] == [dose.scored.text for dose in found.doses]
    assert [d["effect"]["metric"] for d in result["doses"]] == [d.effect.metric_after for d in found.doses]
    assert result["steered"] == {key: result["doses"][1][key] for key in result["steered"]}
    assert path.stat().st_size > 0
    assert main([*STEER, *flags[:4]]) == 0
    assert "Sacramento<|endoftext|>'" in capsys.readouterr().out


def test_texts_from_a_file_give_typical_activations(capsys, tmp_path, demo):
    texts = Exam.of(demo).selection_questions().prompts[::20]
    path = tmp_path / "texts"
    path.write_text("\n\n".join(texts))
    result = run(capsys, *STEER, "--set", f"{STATE}=x2", "--texts", str(path))
    expected = value_of(demo, PROMPT, Steer(STATE, "x2"), texts)
    assert result["interventions"][0]["value"] == pytest.approx(expected)
    assert f"and {len(texts)} texts" in result["interventions"][0]["source"]


def test_chat_on_the_command_line(capsys, monkeypatch, demo):
    tokenizer = demo.host.tokenizer
    load = HookedModel.load

    def with_chat(*args, **options):
        model = load(*args, **options)
        model.host.tokenizer.chat_template = "{{ messages[0]['content'] }}<|endoftext|>"
        return model

    monkeypatch.setattr("circuits.commands._options.HookedModel.load", with_chat)
    result = run(capsys, *STEER, "--set", "L1/3=1", "--chat")
    assert result["prompt_tokens"] == [*demo.host.batch([PROMPT]).strings[0], "<|endoftext|>"]
    assert main([*STEER, "--set", "L1/3=1", "--chat"]) == 0
    assert "Dallas is<|endoftext|>" in capsys.readouterr().out
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "L0/1=2x"], ["'2x' is not a number", "0.1r", "L0/1=2x"]),
        (["--set", "L0/1=xnan"], ["not a finite number", "L0/1=xnan"]),
        (["--do", "scale:L0/1=x2"], ["'x2' is not a number"]),
        (["--set", "L0/1=x2", "L0/1@new=1"], ["two interventions act on the same"]),
        (["--set", "L99/1=x2"], ["layer 99 has no transcoder"]),
        (["--set", "L0/1=1", "--stop", ""], ["cannot stop at ''"]),
        (["--set", "L0/1", "--strengths", ""], ["the grid of strengths is empty"]),
        (["--set", "L0/1=1", "--strengths", "1,2"], ["nothing takes the strengths", "without =VALUE"]),
        (["--set", "L0/1"], ["clamp L0/1 has no strength", "ADDRESS=VALUE"]),
        (["--set", "L0/1=1", "--plot", "a.png"], ["--plot belongs to a sweep"]),
        (["--set", "L0/1=1", "--target", "Austin"], ["--target belongs to a sweep"]),
        (["--set", "L0/1", "--strengths", "1", "--plot", "a.gif"], ["unknown picture format"]),
        (["--set", "L0/1=1", "--chat"], ["no chat template"]),
        (["--set", "L0/1=1", "--temperature", "-1"], ["temperature -1.0"]),
        (["--set", "L0/1=1", "--when-inactive", "maybe"], ["maybe"]),
        (["--set", "L0/1=1", "--texts", "nowhere"], ["cannot read the texts nowhere"]),
        (["--set", "L0/1=1", "--texts", "empty"], ["no texts in empty"]),
    ],
)
def test_a_wrong_command_is_refused(capsys, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    try:
        status = main([*STEER, *flags, "--json"])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    for text in said:
        assert text in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_address_that_does_not_exist_is_an_address_error(demo):
    with no_pass(demo), pytest.raises(AddressError):
        resolve(demo, PROMPT, [[Steer("L0/99999", "x2")]])
