"""An intervention does exactly what its formula says, at exactly the tokens it names."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Add, Clamp, HookedModel, Scale, Site, UserError
from hooks.errors import AddressError, InterventionError
from hooks.generation import Steer
from hooks.interventions import check_when_inactive
from hooks.passes import check_modes, listed
from hooks.sites import SiteSpec
from hooks.types import Edit


def strongest(model: HookedModel, prompt: str, layer: int, pos: int) -> tuple[int, float]:
    """The strongest feature of a layer at a position (negative: from the end), and its activation."""
    acts = model.record(prompt).layers[layer].acts
    slot = int(acts.values[0, pos].argmax())
    return int(acts.indices[0, pos, slot]), float(acts.values[0, pos, slot])


def inactive(model: HookedModel, prompt: str, layer: int, pos: int) -> int:
    acts = model.record(prompt).layers[layer].acts
    taken = set(acts.indices[0, pos].tolist())
    return next(f for f in range(model.store.d_features(layer)) if f not in taken)


def by_hand(model: HookedModel, prompt: str, layer: int, shifts: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits with a vector added to the layer's site at given positions."""

    def shift(x, at):
        out = x.clone()
        for pos, vector in shifts.items():
            out[:, pos] += vector
        return out

    site = model.store.convention.write.at(layer)
    return model.host.forward(model.host.batch([prompt]), [Edit(site, shift)])[0]


KINDS = {
    "ablate": (lambda address: Ablate(address), lambda a: 0.0),
    "clamp": (lambda address: Clamp(address, 2.5), lambda a: 2.5),
    "scale": (lambda address: Scale(address, -1.5), lambda a: -1.5 * a),
    "add": (lambda address: Add(address, 0.75), lambda a: a + 0.75),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("pos", [0, 2, -1])
def test_delta_form_adds_the_change_times_the_decoder_row(model, prompt, kind, layer, pos):
    make, new = KINDS[kind]
    feature, a = strongest(model, prompt, layer, pos)
    vector = (new(a) - a) * model.store[layer].W_dec[feature]
    run = model.run(prompt, [make(f"L{layer}/{feature}@{pos}")])
    absolute = pos % run.batch.lengths[0]
    torch.testing.assert_close(run.logits, by_hand(model, prompt, layer, {absolute: vector}), rtol=1e-4, atol=1e-4)
    assert torch.equal(run.logits[:absolute], run.baseline[:absolute])
    assert not torch.allclose(run.logits[absolute:], run.baseline[absolute:])


def test_ablating_an_inactive_feature_changes_no_bit(model, prompt):
    feature = inactive(model, prompt, 1, -1)
    run = model.run(prompt, [Ablate(f"L1/{feature}@-1")])
    assert torch.equal(run.logits, run.baseline)


@pytest.mark.parametrize("when_inactive", ["apply", "skip"])
def test_what_happens_to_an_inactive_feature_is_a_choice(model, prompt, when_inactive):
    feature = inactive(model, prompt, 1, -1)
    last = model.host.batch([prompt]).lengths[0] - 1
    for intervention in (
        Clamp(f"L1/{feature}@-1", 2.0, when_inactive=when_inactive),
        Add(f"L1/{feature}@-1", 2.0, when_inactive=when_inactive),
    ):
        run = model.run(prompt, [intervention])
        vector = 2.0 * model.store[1].W_dec[feature] * (when_inactive == "apply")
        torch.testing.assert_close(run.logits, by_hand(model, prompt, 1, {last: vector}), rtol=1e-4, atol=1e-4)


def test_a_later_layer_edits_the_stream_as_it_arrives(model, prompt):
    """The second ablation removes the activation that is there *after* the first, not the clean one."""
    first, _ = strongest(model, prompt, 0, -1)
    once = model.host.batch([prompt])
    edits = model.edits(once, [[Ablate(f"L0/{first}@-1")]])
    site = Site("resid_pre", 1)
    seen = {}
    model.host.forward(once, [*edits, Edit(site, lambda x, at: seen.setdefault("x", x))])
    acts = model.store[1].encode(seen["x"])
    slot = int(acts.values[0, -1].argmax())
    second, a = int(acts.indices[0, -1, slot]), acts.values[0, -1, slot]
    both = model.run(prompt, [Ablate(f"L0/{first}@-1"), Ablate(f"L1/{second}@-1")])

    def shift(x, at):
        return x.index_put((torch.tensor([0]), torch.tensor([-1])), -a * model.store[1].W_dec[second], accumulate=True)

    expected = model.host.forward(once, [*edits, Edit(site, shift)])[0]
    torch.testing.assert_close(both.logits, expected, rtol=1e-4, atol=1e-4)


def test_live_mask_promotes_the_next_feature_in_line(model, prompt):
    layer, transcoder = 1, model.store[1]
    feature, _ = strongest(model, prompt, layer, -1)
    x = model.record(prompt).layers[layer].read[0, -1]
    pre = transcoder.preactivations(x)
    barred = pre.clone()
    barred[feature] = -math.inf
    acts = barred.topk(transcoder.k)
    after = acts.values.relu() @ transcoder.W_dec[acts.indices]
    before_acts = pre.topk(transcoder.k)
    before = before_acts.values.relu() @ transcoder.W_dec[before_acts.indices]
    run = model.run(prompt, [Ablate(f"L{layer}/{feature}@-1")], mask="live")
    last = run.batch.lengths[0] - 1
    torch.testing.assert_close(run.logits, by_hand(model, prompt, layer, {last: after - before}), rtol=1e-4, atol=1e-4)
    frozen = model.run(prompt, [Ablate(f"L{layer}/{feature}@-1")])
    assert not torch.allclose(run.logits[-1], frozen.logits[-1])


def test_swapped_form_equals_delta_form_when_the_error_is_kept(model, prompt):
    feature, _ = strongest(model, prompt, 1, -1)
    plan = [Ablate(f"L1/{feature}@-1")]
    delta = model.run(prompt, plan)
    torch.testing.assert_close(model.run(prompt, plan, swap=[1]).logits, delta.logits, rtol=1e-5, atol=1e-5)
    frozen = model.run(prompt, plan, swap=[1], error="frozen")
    torch.testing.assert_close(frozen.logits, delta.logits, rtol=1e-4, atol=1e-4)


def test_frozen_error_resurrects_part_of_what_was_ablated_upstream(model, prompt):
    """live and frozen are different questions: downstream errors are recomputed, or those of the clean run."""
    feature, _ = strongest(model, prompt, 0, -1)
    plan = [Ablate(f"L0/{feature}@-1")]
    live = model.run(prompt, plan, swap="all", error="live")
    frozen = model.run(prompt, plan, swap="all", error="frozen")
    assert not torch.allclose(live.logits[-1], frozen.logits[-1], atol=1e-4)


def test_zero_error_is_the_reconstruction_itself(model, prompt):
    run = model.run(prompt, swap=[1], error="zero")
    record = model.record(prompt).layers[1]
    expected = by_hand(model, prompt, 1, {p: -record.error[0, p] for p in range(run.batch.lengths[0])})
    torch.testing.assert_close(run.logits, expected, rtol=1e-3, atol=1e-3)


def test_frozen_error_without_edits_gives_the_clean_run(model, prompt):
    run = model.run(prompt, swap="all", error="frozen")
    torch.testing.assert_close(run.logits, run.baseline, rtol=1e-3, atol=1e-3)


def test_circuit_tracer_tuples_are_clamps(model, prompt):
    tuple_run = model.run(prompt, [(1, -1, 5, 2.0), (1, slice(0, 2), 6, 1.0)])
    clamp_run = model.run(prompt, [Clamp("L1/5@-1", 2.0), Clamp("L1/6@0:2", 1.0)])
    assert torch.equal(tuple_run.logits, clamp_run.logits)


ADDRESS_PARTS = st.tuples(
    st.sampled_from([0, 1, 3]), st.integers(0, 60), st.sampled_from(["0", "2", "-1", "1:3", "all"])
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(ADDRESS_PARTS, max_size=3, unique_by=lambda p: p[:2]), min_size=1, max_size=5))
def test_a_batch_of_different_interventions_gives_what_each_gives_alone(odd, rows):
    prompts = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9", "w3 w3 w3 w3"]
    texts = [prompts[i % 3] for i in range(len(rows))]
    plans = [[Clamp(f"L{layer}/{f}@{pos}", 1.0 + f / 9) for layer, f, pos in row] for row in rows]
    together = odd.run_many(texts, plans)
    for row, (text, plan) in enumerate(zip(texts, plans, strict=True)):
        torch.testing.assert_close(together[row], odd.run(text, plan).logits[-1], rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=st.lists(st.floats(-3, 3), min_size=2, max_size=2), pos=st.sampled_from(["0", "-1", "all"]))
def test_adding_to_two_features_of_one_token_adds_both_rows(odd, amounts, pos):
    text = "w1 w2 w3"
    run = odd.run(text, [Add(f"L1/3@{pos}", amounts[0]), Add(f"L1/4@{pos}", amounts[1])])
    vector = amounts[0] * odd.store[1].W_dec[3] + amounts[1] * odd.store[1].W_dec[4]
    places = {"0": [0], "-1": [2], "all": [0, 1, 2]}[pos]
    expected = by_hand(odd, text, 1, dict.fromkeys(places, vector))
    torch.testing.assert_close(run.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("read", "write"), [("resid_pre", "resid_post"), ("mlp_in", "mlp_out"), ("resid_mid", "mlp_out"),
     ("resid_mid", "resid_mid"), ("resid_post", "resid_post"), ("mlp_in", "mlp_out+1")]
)  # fmt: skip
def test_every_convention_edits_at_its_write_site(read, write):
    model = random_qwen2()
    coders = [
        random_transcoder(layer, 40, read=Site(read, layer), write=SiteSpec.parse(write).at(layer))
        for layer in (0, 1, 2)
    ]
    hooked = HookedModel.from_model(model, word_tokenizer(), coders)
    prompt = "w1 w2 w3 w4"
    feature, a = strongest(hooked, prompt, 1, -1)
    run = hooked.run(prompt, [Ablate(f"L1/{feature}@-1")])
    expected = by_hand(hooked, prompt, 1, {3: -a * hooked.store[1].W_dec[feature]})
    torch.testing.assert_close(run.logits, expected, rtol=1e-4, atol=1e-4)
    zero = hooked.run(prompt, swap=[1], error="zero")
    record = hooked.record(prompt).layers[1]
    expected = by_hand(hooked, prompt, 1, {p: -record.error[0, p] for p in range(4)})
    torch.testing.assert_close(zero.logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("plan", "error", "text"),
    [
        ([Ablate("L9/0")], AddressError, "layer 9 has no transcoder"),
        ([Ablate("L1/99999")], AddressError, "there is no feature 99999"),
        ([Ablate("L1/0@77")], AddressError, "does not occur"),
        ([Ablate("L1/0@2:99")], AddressError, "does not occur"),
        ([Ablate("L1/0@new")], AddressError, "generates none"),
        ([Ablate("L1/0"), Clamp("L1/0@-1", 1.0)], InterventionError, "act on the same feature"),
        ([Clamp("L1/0@0:2", 1.0), Clamp("L1/0@1", 1.0)], InterventionError, "act on the same feature"),
        (["L1/0"], InterventionError, "is not an intervention"),
    ],
)
def test_bad_plans_are_refused_before_the_model_runs(model, prompt, plan, error, text):
    with pytest.raises(error, match=text):
        model.run(prompt, plan)


def test_a_layer_without_a_transcoder_cannot_be_edited(odd):
    with pytest.raises(AddressError, match="layer 2 has no transcoder"):
        odd.run("w1 w2", [Ablate("L2/0")])
    with pytest.raises(UserError, match="layer 2 has no transcoder"):
        odd.run("w1 w2", swap=[2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_strengths_are_finite(value):
    for make in (Clamp, Scale, Add):
        with pytest.raises(InterventionError, match="finite"):
            make("L1/0", value)


def test_when_inactive_is_named_too():
    with pytest.raises(InterventionError, match="unknown when_inactive"):
        check_when_inactive("Skip", "Add L1/0")


def test_modes_are_named_not_guessed(model, prompt):
    with pytest.raises(UserError, match="no site is replaced"):
        model.run(prompt, error="zero")
    with pytest.raises(UserError, match="unknown error mode"):
        check_modes("keep", "frozen", swapping=True)
    with pytest.raises(UserError, match="unknown mask mode"):
        check_modes("live", "soft", swapping=True)
    with pytest.raises(UserError, match="unknown layers"):
        model.run(prompt, swap="some")


ONE = (1, -1, 7, 3.0)
FORMS = {
    "object": Clamp("L1/7@-1", 3.0),
    "tuple": ONE,
    "list": list(ONE),
    "array": np.array(ONE),
    "tensor": torch.tensor(ONE),
    "array of rows": np.array([ONE]),
    "list of rows": [list(ONE)],
    "list of tensors": [torch.tensor(ONE)],
    "text value": [Clamp("L1/7@-1", "3")],
}
CALLS = {
    "run": lambda m, text, plan: m.run(text, plan).logits[-1],
    "run_many": lambda m, text, plan: m.run_many([text, text], plan)[1],
    "generate": lambda m, text, plan: m.generate(text, plan, max_new_tokens=1).logits[0],
    "generate two": lambda m, text, plan: m.generate([text, text], plan, max_new_tokens=1)[1].logits[0],
    "session": lambda m, text, plan: m.session(text, plan, new_tokens=1).generate(1).logits[0],
    "set": lambda m, text, plan: _set(m.session(text, new_tokens=1), plan).generate(1).logits[0],
    "edits": lambda m, text, plan: m.host.forward(m.host.batch([text]), m.edits(m.host.batch([text]), plan))[0, -1],
    "steer": lambda m, text, plan: m.steer(text, plan, max_new_tokens=1).steered.steered,
    "dose": lambda m, text, plan: m.dose(text, [*listed(plan), Steer("L3/1")], [0.0], max_new_tokens=1).metric,
    "effects": lambda m, text, plan: m.effects(text, plan, "w3", "w4").total,
    "path_effect": lambda m, text, plan: m.path_effect(text, plan, "L3/2@-1").delta_preactivation,
    "sweep": lambda m, text, plan: m.sweep(text, plan).table["delta"].tolist(),
    "sweep of lists": lambda m, text, plan: m.sweep(text, [listed(plan)]).table["delta"].tolist(),
}


def _set(session, plan):
    session.set(plan)
    return session


@pytest.mark.parametrize("call", CALLS)
def test_a_single_intervention_of_any_form_is_a_list_of_one(odd, call):
    expected = torch.as_tensor(CALLS[call](odd, "w1 w2 w3", [Clamp("L1/7@-1", 3.0)]))
    for name, form in FORMS.items():
        assert torch.equal(torch.as_tensor(CALLS[call](odd, "w1 w2 w3", form)), expected), name


def test_a_row_of_the_prompt_s_own_lists_may_be_of_rows_too(odd):
    plans = [[list(ONE)], torch.tensor([(0, 0, 5, 1.0), (0, 1, 5, 2.0)])]
    together = odd.run_many(["w1 w2 w3", "w4 w5"], plans)
    for row, (text, plan) in enumerate(zip(["w1 w2 w3", "w4 w5"], plans, strict=True)):
        torch.testing.assert_close(together[row], odd.run(text, plan).logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "plan", ["L1/7", 7, Site("resid_pre", 1), [(1, 2, 3)], [[1, 2, 3, 4, 5]], {"L1/7": 3.0}, [None]]
)
def test_what_is_no_intervention_is_refused_with_the_repair(odd, plan):
    with pytest.raises(InterventionError, match=r'is not an intervention\n  expected: Ablate\("L3/383"\)'):
        odd.run("w1 w2 w3", plan)


@pytest.mark.parametrize("value", ["", "x2", "eight", None, True, [1.0, 2.0], torch.ones(2), 1j, "8 9"])
def test_a_strength_is_a_number_or_text_that_is_one(value):
    for make in (Clamp, Scale, Add):
        with pytest.raises(InterventionError, match="is not a number"):
            make("L1/0", value)
    assert Clamp("L1/0", np.float32(8)) == Clamp("L1/0", torch.tensor(8)) == Clamp("L1/0", " 8.0 ")
