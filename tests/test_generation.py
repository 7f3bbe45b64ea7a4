"""Steered generation: the cache changes nothing, and every position means what it says."""

import pytest
import torch
from test_interventions import strongest

from hooks import Ablate, Clamp, Sampling, Scale, Site, UserError
from hooks.errors import AddressError, PromptError
from hooks.generation import generate
from hooks.types import Edit

PLANS = ["0", "-1", "all", "new", "1:", "1:3", "-2:"]


@pytest.fixture(scope="module")
def start(model, prompt):
    """A prompt the model goes on from for several tokens."""
    return "after two comes three after" if prompt.startswith("fact") else prompt


def late(start: str, model) -> str:
    """An absolute position among the generated tokens."""
    return str(model.host.batch([start]).lengths[0] + 1)


@pytest.mark.parametrize("positions", [*PLANS, "late"])
def test_with_cache_equals_without(model, start, positions):
    positions = late(start, model) if positions == "late" else positions
    plan = [Clamp(f"L1/7@{positions}", 3.0), Scale(f"L0/{strongest(model, start, 0, 0)[0]}@{positions}", 2.0)]
    sampling = Sampling(temperature=1.0, seed=3)
    cached = model.generate(start, plan, max_new_tokens=6, sampling=sampling)
    plain = model.generate(start, plan, max_new_tokens=6, sampling=sampling, use_cache=False)
    assert cached.ids == plain.ids
    torch.testing.assert_close(cached.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "-1", "0", "1:3"])
def test_generation_with_swapped_sites_is_cache_exact_too(model, start, positions):
    plan = [Clamp(f"L1/7@{positions}", 3.0)]
    runs = [
        model.generate(start, plan, max_new_tokens=4, swap="all", error="zero", use_cache=cache)
        for cache in (True, False)
    ]
    assert runs[0].ids == runs[1].ids
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=1e-4, atol=2e-4)


def test_the_first_token_comes_from_the_edited_prompt(model, start):
    """`-1` is the prompt's last token: an off-by-one would edit nothing, or a new token."""
    plan = [Clamp("L1/7@-1", 4.0)]
    run = model.run(start, plan)
    generated = model.generate(start, plan, max_new_tokens=1)
    torch.testing.assert_close(generated.logits[0], run.logits[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run.logits[-1], run.baseline[-1])


def test_the_first_prompt_token_is_zero_and_only_that(model, start):
    feature, _ = strongest(model, start, 1, 0)
    run = model.run(start, [Ablate(f"L1/{feature}@0")])
    same = model.run(start, [Ablate(f"L1/{feature}@0:1")])
    assert torch.equal(run.logits, same.logits)
    assert not torch.allclose(run.logits[0], run.baseline[0])


def test_new_leaves_the_prompt_bit_equal(model, start):
    """The first new token is chosen from untouched logits; from the second on the edit is in."""
    plain = model.generate(start, max_new_tokens=3)
    steered = model.generate(start, [Clamp("L1/7@new", 25.0)], max_new_tokens=3)
    assert torch.equal(steered.logits[0], plain.logits[0])
    assert steered.ids[0] == plain.ids[0]
    if len(plain.ids) > 1:
        assert not torch.allclose(steered.logits[1], plain.logits[1])


def test_the_prompt_sees_nothing_of_an_edit_on_new(model, start):
    """Every stream of every prompt position, behind every block, bit for bit; the edit does reach the new tokens."""

    def streams(plan):
        seen = []
        batch = model.host.batch([start])
        last = Site("resid_post", model.host.n_layers - 1)
        edits = model._edits(batch, [plan], None, "live", "frozen", new_tokens=4)
        look = Edit(last, lambda x, at: seen.append(x) or x)
        generate(model.host, batch, [*edits, look], max_new_tokens=4, sampling=Sampling(1.0, 1.0, 2))
        return seen

    plain, steered = streams([]), streams([Clamp("L1/7@new", 25.0)])
    assert torch.equal(plain[0], steered[0])
    if len(plain) > 1:
        assert not torch.allclose(plain[1], steered[1])


def test_a_new_token_edit_equals_the_same_edit_in_a_longer_prompt(model, start):
    """Token n+1 edited while decoding = position n+1 edited when the text is given as a prompt."""
    generated = model.generate(start, [Clamp("L1/7@new", 4.0)], max_new_tokens=3, sampling=Sampling(1.0, 1.0, 5))
    ids = list(generated.prompt + generated.ids)
    first = len(generated.prompt)
    if len(generated.ids) == 3:
        run = model.run(ids[:-1], [Clamp(f"L1/7@{first}:", 4.0)])
        torch.testing.assert_close(generated.logits, run.logits[first - 1 :], rtol=1e-4, atol=1e-4)


def test_greedy_is_the_argmax_and_sampling_repeats_with_its_seed(model, start):
    greedy = model.generate(start, max_new_tokens=4)
    assert list(greedy.ids) == greedy.logits.argmax(-1).tolist()
    hot = Sampling(temperature=2.0, top_p=0.9, seed=1)
    assert (
        model.generate(start, max_new_tokens=6, sampling=hot).ids
        == model.generate(start, max_new_tokens=6, sampling=hot).ids
    )
    narrow = Sampling(temperature=2.0, top_p=1e-9, seed=1)
    assert model.generate(start, max_new_tokens=4, sampling=narrow).ids == greedy.ids


def test_generation_ends_with_the_end_token(demo):
    generated = demo.generate("fact: the capital of the state containing Dallas is", max_new_tokens=20)
    assert generated.text.startswith(" Austin")
    assert generated.ids[-1] in demo.host.end_tokens
    assert len(generated.ids) < 20


def test_no_hook_stays_after_generating(model, start):
    before = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.host.model.modules())
    model.generate(start, [Clamp("L1/7", 1.0)], max_new_tokens=2)
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.host.model.modules())
    assert after == before


def test_what_cannot_be_generated_is_refused(model, start, odd):
    with pytest.raises(UserError, match="frozen error"):
        model.generate(start, swap="all", error="frozen")
    with pytest.raises(UserError, match="at least 1"):
        model.generate(start, max_new_tokens=0)
    with pytest.raises(AddressError, match="does not occur"):
        model.generate(start, [Clamp("L1/7@900", 1.0)], max_new_tokens=2)
    with pytest.raises(PromptError, match="do not fit"):
        odd.generate("w1 w2", max_new_tokens=127)
    with pytest.raises(UserError, match="top_p"):
        Sampling(top_p=0.0)
