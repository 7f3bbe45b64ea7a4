"""Steered generation: the cache changes nothing, and every position means what it says."""

import itertools
import math

import pytest
import torch
from test_interventions import strongest
from transformers import DynamicCache
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Add, Clamp, HookedModel, Sampling, Scale, Site, UserError
from hooks.errors import AddressError, CheckpointError, InterventionError, ModelError, PromptError
from hooks.generation import generate
from hooks.host.host import Attached
from hooks.types import Edit

PLANS = ["0", "-1", "all", "prompt", "new", "1:", "1:3", ":2", "-2:", "{0,2,-1}"]


@pytest.fixture(scope="module")
def start(model, prompt):
    """A prompt the model goes on from for several tokens."""
    return "fact: the capital of" if prompt.startswith("fact") else prompt


def late(start: str, model) -> str:
    """An absolute position among the generated tokens."""
    return str(model.host.batch([start]).lengths[0] + 1)


@pytest.mark.parametrize("positions", [*PLANS, "late", "{0,late}"])
def test_with_cache_equals_without(model, start, positions):
    positions = positions.replace("late", late(start, model))
    plan = [Clamp(f"L1/7@{positions}", 3.0), Scale(f"L0/{strongest(model, start, 0, 0)[0]}@{positions}", 2.0)]
    sampling = Sampling(temperature=1.0, seed=3)
    cached = model.generate(start, plan, max_new_tokens=6, sampling=sampling)
    plain = model.generate(start, plan, max_new_tokens=6, sampling=sampling, use_cache=False)
    assert cached.ids == plain.ids
    torch.testing.assert_close(cached.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", PLANS)
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
        edits = model.edits(batch, [plan], new_tokens=4)
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


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five(model, odd):
    """Prompts of five lengths; the longest is neither first nor last."""
    if model is odd:
        return ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13 w14 w15 w16 w17 w18 w19", "w20 w21"]
    return [
        "fact: the capital",
        "fact: the capital of the state containing Dallas",
        "fact:",
        "fact: the capital of the state containing Oakland is Sacramento. fact: the capital of the state",
        "the capital of the",
    ]


def rows_of(five):
    """Five plans, one per row: first and last prompt token, a mask, new tokens, everything."""
    places = ["0", "-1", "{0,3}", "new", "all"]
    return [[Clamp(f"L1/{7 + i}@{at if at != '{0,3}' else '0'}", 3.0), Add(f"L0/3@{at}", 1.0)]
            for i, at in zip(range(len(five)), places, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("sampling", "swap", "use_cache"),
    [
        (Sampling(), None, True),
        (Sampling(1.5, 0.9, 4), "all", True),
        (Sampling(1.5, 0.9, 4), None, False),
    ],
    ids=["greedy", "hot and swapped", "hot without a cache"],
)
def test_a_batch_is_each_row_alone(model, five, sampling, swap, use_cache):
    plans = rows_of(five)
    options = {"max_new_tokens": 7, "sampling": sampling, "swap": swap, "error": "zero" if swap else "live"}
    together = model.generate(five, plans, observe="all", use_cache=use_cache, **options)
    assert isinstance(together, list)
    for row, prompt, plan in zip(together, five, plans, strict=True):
        alone = model.generate(prompt, plan, observe="all", **options)
        assert (row.ids, row.text, row.prompt, row.reason) == (alone.ids, alone.text, alone.prompt, alone.reason)
        torch.testing.assert_close(row.logits, alone.logits, rtol=1e-4, atol=2e-4)
        for layer, acts in row.features.items():
            size = model.store.d_features(layer)
            torch.testing.assert_close(acts.dense(size), alone.features[layer].dense(size), rtol=1e-3, atol=1e-3)


def test_rows_end_one_by_one(demo):
    """The row of the capital ends early; the other is not cut, and the first is not continued."""
    prompts = ["fact: the capital of the state containing Dallas is", "fact: the capital of"]
    short, long = demo.generate(prompts, max_new_tokens=12)
    assert short.reason == "end"
    assert short.ids[-1] in demo.host.end_tokens
    assert len(short.ids) < len(long.ids)
    assert len(short.logits) == len(short.ids)


@pytest.mark.parametrize("place", ["0", "-1"])
def test_padding_shifts_no_position(model, five, place):
    """In the most padded row: an off-by-one hits padding (no effect), or its neighbour (another effect)."""
    plan = [Clamp(f"L1/7@{place}", 25.0)]
    plans = [plan if row == 0 else [] for row in range(5)]
    steered = model.generate(five, plans, max_new_tokens=1)
    plain = model.generate(five, max_new_tokens=1)
    expected = model.run(five[0], plan).logits[-1]
    torch.testing.assert_close(steered[0].logits[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[0].logits[0], expected, atol=1e-2)
    for row in range(1, 5):
        assert torch.equal(steered[row].logits, plain[row].logits)


def test_a_row_draws_the_same_whoever_stands_beside_it(model, five):
    hot = Sampling(temperature=1.5, seed=11)
    ids = {prompt: model.generate(prompt, max_new_tokens=6, sampling=hot).ids for prompt in five}
    for order in ([3, 0], [0, 1, 2, 3, 4], [4, 3, 0], [0, 0]):
        rows = model.generate([five[i] for i in order], max_new_tokens=6, sampling=hot)
        assert [row.ids for row in rows] == [ids[five[i]] for i in order]


def test_rows_may_differ_in_their_seeds(odd):
    samplings = [Sampling(2.0, seed=seed) for seed in range(4)]
    rows = odd.generate(["w1 w2"] * 4, max_new_tokens=6, sampling=samplings)
    assert [row.ids for row in rows] == [odd.generate("w1 w2", max_new_tokens=6, sampling=s).ids for s in samplings]
    assert len({row.ids for row in rows}) > 1


def test_one_list_of_interventions_is_for_every_row(odd):
    plan = [Clamp("L1/7@-1", 3.0), (0, "new", 3, 1.0)]
    prompts = ["w1 w2 w3", "w4"]
    for once, each in zip(
        odd.generate(prompts, plan, max_new_tokens=3),
        odd.generate(prompts, [plan, plan], max_new_tokens=3),
        strict=True,
    ):
        assert torch.equal(once.logits, each.logits)
    assert len(odd.generate(["w1 w2"], plan, max_new_tokens=1)) == 1


# -- ends ----------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_text_in_front_of_it(model, start):
    whole = model.generate(start, max_new_tokens=8, sampling=Sampling(1.0, 1.0, 7))
    assert len(whole.text) > 4
    stop = whole.text[3:5]
    cut = model.generate(start, max_new_tokens=8, sampling=Sampling(1.0, 1.0, 7), stop=("never", stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert stop in model.host.text(cut.ids)
    assert stop not in model.host.text(cut.ids[:-1])  # it ended as soon as the text contained it
    assert model.generate(start, max_new_tokens=8, sampling=Sampling(1.0, 1.0, 7), stop=stop).text == cut.text


def test_reasons_are_told_apart(demo):
    prompt = "fact: the capital of the state containing Dallas is"
    assert demo.generate(prompt, max_new_tokens=1).reason == "length"
    assert demo.generate(prompt, max_new_tokens=9).reason == "end"
    assert demo.generate(prompt, max_new_tokens=9, stop="Austin").reason == "stop"
    assert demo.generate(prompt, max_new_tokens=9, stop="Austin").text == " "


# -- streams -------------------------------------------------------------------------------------------------------


def hooks_on(model):
    """Hooks of ours; transformers leaves its own behind where someone once asked for hidden states."""
    tables = [table for m in model.host.model.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    return sum(hook.__module__.startswith("hooks.") for table in tables for hook in table.values())


@pytest.mark.parametrize("stop", [(), ("w", "e")])
def test_a_stream_is_what_generate_gives(model, start, stop):
    plan, hot = [Clamp("L1/7@new", 4.0)], Sampling(1.2, 0.95, 3)
    whole = model.generate(start, plan, max_new_tokens=8, sampling=hot, stop=stop)
    tokens = list(model.stream(start, plan, max_new_tokens=8, sampling=hot, stop=stop))
    assert tuple(token.id for token in tokens) == whole.ids
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.pos for token in tokens] == [len(whole.prompt) + i for i in range(len(tokens))]
    assert [token.reason for token in tokens] == [None] * (len(tokens) - 1) + [whole.reason]
    torch.testing.assert_close([token.logprob for token in tokens], whole.logprobs.tolist())
    if not stop:
        assert whole.text == model.host.text(whole.ids)


def test_a_half_read_stream_leaves_the_model_plain(model, start):
    """Not only a closed one: nothing is attached between two tokens, and gradients are not switched off."""
    plain = model.run(start).logits
    for read in (0, 1, 2):
        tokens = model.stream(start, [Clamp("L1/7", 4.0)], max_new_tokens=5, sampling=Sampling(1.0, 1.0, 2))
        list(itertools.islice(tokens, read))
        assert hooks_on(model) == 0
        assert torch.is_grad_enabled()
        assert torch.equal(model.run(start).logits, plain)
        tokens.close()
        assert hooks_on(model) == 0


def test_two_streams_can_be_read_in_turns(odd):
    plans = [[Clamp("L1/7", 4.0)], [Clamp("L0/3@new", 9.0)]]
    turns = zip(*(odd.stream("w1 w2 w3", plan, max_new_tokens=5) for plan in plans), strict=False)
    for number, ids in enumerate(zip(*([token.id for token in pair] for pair in turns), strict=True)):
        whole = odd.generate("w1 w2 w3", plans[number], max_new_tokens=5)
        assert whole.ids[: len(ids)] == ids


# -- sessions ------------------------------------------------------------------------------------------------------

FIRST = [Clamp("L1/7", 3.0), Add("L0/3@-1:", 1.0)]
CHANGES = {  # for a prompt of n tokens: new interventions, and the first position where they differ from FIRST
    "nothing": lambda n: (FIRST, math.inf),
    "other words": lambda n: ([Clamp("L1/7@:2", 3.0), Clamp("L1/7@2:", 3.0), FIRST[1]], math.inf),
    "other order": lambda n: (FIRST[::-1], math.inf),
    "none left": lambda n: ([], 0),
    "from the third new token": lambda n: ([*FIRST, Clamp(f"L3/5@{n + 2}:", 4.0)], n + 2),
    "single tokens": lambda n: ([*FIRST, Clamp(f"L3/5@{{1,{n + 2}}}", 4.0)], 1),
    "new tokens": lambda n: ([Clamp("L1/7@prompt", 3.0), FIRST[1]], n),
    "strength at the end": lambda n: ([FIRST[0], Add("L0/3@-1:", 2.0)], n - 1),
    "where inactive": lambda n: ([Clamp("L1/7", 3.0, when_inactive="skip"), FIRST[1]], 0),
}


@pytest.mark.parametrize("swap", [None, "all"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_the_way_equals_a_fresh_start_on_the_text_so_far(model, start, change, swap):
    options = {"swap": swap, "error": "zero" if swap else "live"}
    n = model.host.batch([start]).lengths[0]
    second, first_place = CHANGES[change](n)
    session = model.session(start, FIRST, sampling=Sampling(1.0, 1.0, 8), **options)
    opening = session.generate(4)
    text = session.ids
    assert text == opening.prompt + opening.ids
    expected = min(first_place, len(text) - 1)  # the newest token has not been read yet
    assert session.set(second) == len(text) - expected
    assert session.cached == expected
    going_on = session.generate(3)
    assert going_on.prompt == text

    # a fresh pass over everything, without cache, edits of the second list at the same absolute positions
    whole = [*text, *going_on.ids]
    batch = model.host.batch([start])
    edits = model.edits(batch, [second], swap=swap, error=options["error"], new_tokens=len(whole) - n)
    with model.host.attached(edits) as attached, torch.no_grad():
        fresh = [attached.step(torch.tensor([whole[: len(text) + i]]), None, [n])[0] for i in range(len(going_on.ids))]
    torch.testing.assert_close(going_on.logits, torch.stack(fresh), rtol=1e-4, atol=2e-4)


def test_a_session_in_pieces_is_one_generation(model, start):
    plan, hot = [Clamp("L1/7@new", 4.0)], Sampling(1.3, 1.0, 6)
    whole = model.generate(start, plan, max_new_tokens=6, sampling=hot)
    session = model.session(start, plan, sampling=hot)
    first = session.generate(2)
    streamed = list(itertools.islice(session.stream(9), 1))  # the reader stops after one
    rest = session.generate(3)
    assert (*first.ids, *(token.id for token in streamed), *rest.ids)[: len(whole.ids)] == whole.ids
    assert session.text == model.host.text(session.ids)


def test_only_what_differs_is_read_again(odd):
    lengths = []
    session = odd.session("w1 w2 w3 w4", [])
    session._decoding.edits = [Edit(Site("resid_pre", 0), lambda x, at: lengths.append((at.first, x.shape[1])) or x)]
    session.generate(3)
    assert lengths == [(0, 4), (4, 1), (5, 1)]
    look = list(session._decoding.edits)
    session.set([Clamp("L1/7@5:", 3.0)])
    session._decoding.edits += look
    session.generate(2)
    assert lengths[3:] == [(5, 2), (7, 1)]


def test_a_refused_change_leaves_the_session_as_it_was(odd):
    session, twin = odd.session("w1 w2 w3", FIRST), odd.session("w1 w2 w3", FIRST)
    for each in (session, twin):
        each.generate(2)
    for wrong in (["L1/7"], [Clamp("L9/0", 1.0)], [Clamp("L1/7@900", 1.0)], [*FIRST, Clamp("L1/7@0", 1.0)]):
        with pytest.raises(UserError):
            session.set(wrong)
    assert session.interventions == tuple(FIRST)
    assert torch.equal(session.generate(2).logits, twin.generate(2).logits)


def test_an_interrupted_pass_is_made_up_for(odd):
    """Some layers have cached the token, others have not: the cache is made anew."""
    session = odd.session("w1 w2 w3", FIRST)
    session.generate(2)
    edits = session._decoding.edits

    def interrupt(x, at):
        raise KeyboardInterrupt

    session._decoding.edits = [*edits, Edit(Site("resid_pre", 2), interrupt)]
    with pytest.raises(KeyboardInterrupt):
        session.generate(1)
    session._decoding.edits = edits
    assert hooks_on(odd) == 0
    torch.testing.assert_close(
        session.generate(2).logits, odd.generate("w1 w2 w3", FIRST, max_new_tokens=4).logits[2:], rtol=1e-4, atol=1e-4
    )


def test_a_sliding_window_forgets_and_is_read_again():
    """Keys that left the window are gone, so going back means reading everything again."""
    config = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = random_qwen2()
    model = type(model)(type(model.config)(**{**model.config.to_dict(), **config, "layer_types": None})).eval()
    assert set(model.config.layer_types) == {"sliding_attention"}
    hooked = HookedModel.from_model(model, word_tokenizer(), [random_transcoder(n, 40) for n in range(4)])
    session = hooked.session("w1 w2 w3 w4 w5 w6", FIRST)
    before = session.ids + session.generate(3).ids
    assert session.set([FIRST[0]]) == len(before)
    going_on = session.generate(2)
    plain = hooked.generate(list(before), [FIRST[0]], max_new_tokens=2, use_cache=False)
    torch.testing.assert_close(going_on.logits, plain.logits, rtol=1e-4, atol=1e-4)


# -- watching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_watched_features_are_those_of_a_recording(model, start, use_cache):
    seen = model.generate(start, max_new_tokens=5, observe="all", use_cache=use_cache, sampling=Sampling(1.0, 1.0, 3))
    plain = model.generate(start, max_new_tokens=5, sampling=Sampling(1.0, 1.0, 3))
    assert torch.equal(seen.logits, plain.logits) or not use_cache
    recording = model.record([list(seen.prompt + seen.ids)])
    assert tuple(seen.features) == model.store.layers
    for layer, acts in seen.features.items():
        size = model.store.d_features(layer)
        expected = recording.layers[layer].acts
        assert acts.values.shape == (len(seen.prompt + seen.ids), expected.values.shape[-1])
        torch.testing.assert_close(acts.dense(size), expected.dense(size)[0], rtol=1e-3, atol=1e-3)


def test_watched_features_are_seen_before_their_own_edit_and_after_earlier_ones(model, start):
    feature, value = strongest(model, start, 1, -1)
    last = model.host.batch([start]).lengths[0] - 1
    seen = model.generate(start, [Clamp(f"L1/{feature}@-1", 50.0)], max_new_tokens=1, observe=[1, 3])
    plain = model.generate(start, max_new_tokens=1, observe=[1, 3])
    size = model.store.d_features(1)
    torch.testing.assert_close(seen.features[1].dense(size)[last, feature].item(), value, rtol=1e-4, atol=1e-4)
    size = model.store.d_features(3)
    before, after = plain.features[3].dense(size), seen.features[3].dense(size)
    assert torch.equal(before[:last], after[:last])
    assert not torch.allclose(before[last], after[last])


def test_watching_everything_while_everything_is_replaced(model, start):
    options = {"swap": "all", "error": "zero", "max_new_tokens": 4, "sampling": Sampling(1.0, 1.0, 1)}
    seen = model.generate(start, [Clamp("L1/7@new", 2.0)], observe="all", **options)
    blind = model.generate(start, [Clamp("L1/7@new", 2.0)], **options)
    assert torch.equal(seen.logits, blind.logits)
    slow = model.generate(start, [Clamp("L1/7@new", 2.0)], observe="all", use_cache=False, **options)
    for layer, acts in seen.features.items():
        size = model.store.d_features(layer)
        torch.testing.assert_close(acts.dense(size), slow.features[layer].dense(size), rtol=1e-3, atol=2e-3)


def test_plain_relu_sets_are_watched_too():
    """Each pass keeps as many features as its densest token, so the passes differ in width."""
    model = random_qwen2()
    hooked = HookedModel.from_model(model, word_tokenizer(), [random_transcoder(n, 40, k=None) for n in (0, 1)])
    seen = hooked.generate("w1 w2 w3", max_new_tokens=4, observe="all")
    expected = hooked.record([list(seen.prompt + seen.ids)])
    for layer in (0, 1):
        torch.testing.assert_close(
            seen.features[layer].dense(96), expected.layers[layer].acts.dense(96)[0], rtol=1e-4, atol=1e-4
        )


def test_layers_to_watch_are_named_by_number_or_by_what_they_read(odd):
    assert tuple(odd.generate("w1", max_new_tokens=1, observe=[3, 0]).features) == (0, 3)
    assert tuple(odd.generate("w1", max_new_tokens=1, observe=[Site("resid_pre", 1)]).features) == (1,)
    with pytest.raises(UserError, match="no transcoder reads"):
        odd.generate("w1", max_new_tokens=1, observe=[Site("resid_pre", 2)])
    with pytest.raises(CheckpointError, match="layer 2 has no transcoder"):
        odd.generate("w1", max_new_tokens=1, observe=[2])
    with pytest.raises(UserError, match="unknown layers"):
        odd.generate("w1", max_new_tokens=1, observe="some")


# -- the plain model -----------------------------------------------------------------------------------------------


def test_nothing_is_hooked_where_nothing_is_asked_for(model, start, monkeypatch):
    """The plain model, its own attention and its own cache; steering one layer hooks that layer alone."""
    counts, caches = [], []
    step = Attached.step

    def looking(self, ids, cache, *rest):
        counts.append(hooks_on(model))
        caches.append(type(cache))
        return step(self, ids, cache, *rest)

    monkeypatch.setattr(Attached, "step", looking)
    model.generate(start, max_new_tokens=3, sampling=Sampling(1.0, 1.0, 2))
    list(model.stream([*range(3, 6)], max_new_tokens=2))
    assert counts
    assert set(counts) == {0}
    assert set(caches) == {DynamicCache}
    assert model.host.model.config._attn_implementation == "sdpa"
    counts.clear()
    model.generate(start, [Clamp("L1/7", 1.0)], max_new_tokens=2)
    assert set(counts) == {len(set(model.store.sites(1)))}


def test_no_hook_stays_after_generating(model, start):
    model.generate(start, [Clamp("L1/7", 1.0)], max_new_tokens=2)
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"swap": "all", "error": "frozen"}, UserError, "frozen error"),
        ({"max_new_tokens": 0}, UserError, "at least 1"),
        ({"max_new_tokens": 1 << 31}, PromptError, "do not fit"),
        ({"interventions": [Clamp("L1/7@900", 1.0)]}, AddressError, "does not occur"),
        ({"interventions": [Clamp("L1/7@{0,900}", 1.0)]}, AddressError, "does not occur"),
        ({"interventions": [Clamp("L1/7@{-90}", 1.0)]}, AddressError, "does not occur"),
        (
            {"interventions": [Clamp("L1/7@{0,1}", 1.0), Ablate("L1/7@1:")]},
            InterventionError,
            "act on the same feature",
        ),
        (
            {"interventions": [Clamp("L1/7@prompt", 1.0), Ablate("L1/7@-1:")]},
            InterventionError,
            "act on the same feature",
        ),
        ({"interventions": [(1, -1, 7, math.nan)]}, InterventionError, "not a finite number"),
        ({"interventions": [(1, -1, 7, math.inf)]}, InterventionError, "not a finite number"),
        ({"stop": ""}, UserError, "cannot stop at ''"),
        ({"stop": ["a", ""]}, UserError, "cannot stop at ''"),
    ],
)
@pytest.mark.parametrize("way", ["generate", "batch", "stream"])
def test_what_cannot_be_generated_is_refused_before_the_model_runs(
    model, start, monkeypatch, way, options, error, text
):
    monkeypatch.setattr(Attached, "step", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=text):
        model.stream(start, **options) if way == "stream" else model.generate(
            [start, start] if way == "batch" else start, **options
        )


def test_lists_that_do_not_fit_the_batch_are_refused(odd):
    with pytest.raises(InterventionError, match="3 lists of interventions for 2 prompts"):
        odd.generate(["w1", "w2"], [[], [], []])
    with pytest.raises(InterventionError, match="1 lists of interventions for 1 prompts"):
        odd.generate(["w1"], [[], Clamp("L1/7", 1.0)])
    with pytest.raises(UserError, match="2 samplings for 1 prompts"):
        odd.generate("w1", sampling=[Sampling(), Sampling()])
    with pytest.raises(PromptError, match="no prompts given"):
        odd.generate([])


def test_the_context_is_filled_to_the_last_token_and_no_further(odd):
    full = odd.generate([[3] * 126, [4, 5]], max_new_tokens=2, observe=[0])
    assert len(full[0].prompt + full[0].ids) <= 128
    with pytest.raises(PromptError, match="126 prompt tokens and 3 new ones do not fit"):
        odd.generate([[4, 5], [3] * 126], max_new_tokens=3)
    session = odd.session([3] * 126)
    session.generate(1)
    with pytest.raises(PromptError, match="127 prompt tokens and 2 new ones do not fit"):
        session.generate(2)


def test_logits_that_are_not_numbers_are_refused(odd):
    """Not sampled from: fp16 with eager attention, or an absurd strength, leads here."""
    batch = odd.host.batch(["w1 w2"])
    for bad in (math.nan, math.inf):
        for sampling in (Sampling(), Sampling(1.0)):
            spoil = Edit(Site("resid_post", 3), lambda x, at, bad=bad: x if at.first == 0 else x * bad)
            with pytest.raises(ModelError, match="behind 1 new tokens are not finite"):
                generate(odd.host, batch, [spoil], max_new_tokens=3, sampling=sampling)
    assert hooks_on(odd) == 0
    with pytest.raises(ModelError, match=r"not finite|not a number"):
        random_hooked().generate("w1 w2", [Add("L3/5", 1e300)], max_new_tokens=2)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}]
)
def test_sampling_out_of_range_is_refused(values):
    with pytest.raises(UserError, match="cannot sample with temperature"):
        Sampling(**values)


def test_a_seed_has_64_bits():
    Sampling(seed=-1).pick(torch.zeros(3), torch.Generator().manual_seed(-1))
    with pytest.raises(UserError, match="cannot sample with seed"):
        Sampling(seed=1 << 63)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.5, {2}), (0.51, {2, 0}), (0.8, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, allowed):
    probs = torch.tensor([0.3, 0.05, 0.5, 0.15])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    scores = sampling.warpers()(torch.zeros(1, 1, dtype=torch.int64), probs.log()[None])[0]
    drawn = [sampling.pick(scores, generator) for _ in range(400)]
    assert set(drawn) == allowed
    share = probs[2] / sum(probs[i] for i in allowed)
    assert abs(drawn.count(2) / 400 - share) < 4 * (0.25 / 400) ** 0.5  # four standard errors
