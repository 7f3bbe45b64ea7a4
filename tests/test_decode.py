"""The fast decoder gives the tokens of `generate`, and its step is a fixed list of operations on fixed memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Add, Clamp, HookedModel, Sampling, Scale, Site, UserError
from hooks.errors import AddressError, InterventionError, ModelError, PromptError
from hooks.generation.fast import FastDecoder
from hooks.generation.fast_step import EntryBuffers
from hooks.passes import make_plan

N = 6
HOT = Sampling(temperature=1.0, seed=3)  # the demo would end at once if greedy


@pytest.fixture(scope="module")
def start(model, prompt):
    return "after two comes three after" if prompt.startswith("fact") else prompt


def strong(model: HookedModel, prompt: str, layer: int) -> int:
    """A feature that is active at the last token."""
    acts = model.record(prompt).layers[layer].acts
    return int(acts.indices[0, -1, acts.values[0, -1].argmax()])


def agree(fast: FastDecoder, model: HookedModel, prompt: Any, plan: list[Any], **options: Any) -> None:
    expected = model.generate(prompt, plan, max_new_tokens=N, sampling=HOT, **options)
    fast.set(plan)
    fast.prefill(prompt)
    found = fast.generate(N, sampling=HOT)
    assert found.ids == expected.ids
    assert (found.prompt, found.text, found.reason) == (expected.prompt, expected.text, expected.reason)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def fast(model):
    """One decoder for all experiments of this file: nothing but its buffers changes between them."""
    return FastDecoder(model, max_length=40, capacity=6)


@pytest.mark.parametrize("positions", ["0", "-1", "all", "new", "prompt", "1:", "1:3", "-2:", "late", "{0,2,-1}"])
def test_tokens_and_logits_are_those_of_generate(model, fast, start, positions):
    late = str(model.host.batch([start]).lengths[0] + 1)
    positions = late if positions == "late" else positions
    plan = [
        Clamp(f"L1/7@{positions}", 3.0),
        Scale(f"L0/{strong(model, start, 0)}@{positions}", 2.0),
        Add(f"L3/{strong(model, start, 3)}", -1.0, when_inactive="skip"),
    ]
    agree(fast, model, start, plan)


def test_without_interventions_it_is_the_plain_model(model, fast, start):
    agree(fast, model, start, [])


def test_greedy_and_ablation(model, fast, start):
    plan = [Ablate(f"L1/{strong(model, start, 1)}")]
    expected = model.generate(start, plan, max_new_tokens=N)
    fast.set(plan)
    fast.prefill(start)
    assert fast.generate(N).ids == expected.ids


def test_replaced_sites(model, start):
    fast = FastDecoder(model, replace="all", max_length=40)
    agree(fast, model, start, [Clamp("L1/7@new", 3.0), Clamp("L0/5@-1", 1.0)], swap="all", error="zero")
    agree(fast, model, start, [], swap="all", error="zero")


def test_observed_features_are_those_of_a_recording(model, start):
    """Of the last prompt token behind `prefill`, and of each token as it is read."""
    fast = FastDecoder(model, layers=(), observe="all", max_length=40)
    fast.prefill(start)
    seen = []
    for token in (None, 3, 4):
        if token is not None:
            fast.step(token)
        seen.append({layer: acts.dense(model.store.d_features(layer)) for layer, acts in fast.observed.items()})
    recording = model.record([list(fast.ids)])
    assert set(seen[0]) == set(model.store.layers)
    for back, kept in enumerate(reversed(seen)):
        for layer, dense in kept.items():
            expected = recording.layers[layer].acts.dense(model.store.d_features(layer))[0, -1 - back]
            torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)


def test_observed_features_come_before_the_edit_of_their_layer(odd):
    fast = FastDecoder(odd, layers=[1], observe=[1, 3], max_length=40)
    plain, steered = [], []
    for kept, plan in ((plain, []), (steered, [Clamp("L1/7@new", 9.0)])):
        fast.set(plan)
        fast.prefill("w1 w2")
        fast.step(5)
        kept += [fast.observed[layer].dense(96) for layer in (1, 3)]
    assert torch.equal(plain[0], steered[0])
    assert not torch.allclose(plain[1], steered[1])


CONVENTIONS = [("resid_pre", "resid_post"), ("mlp_in", "mlp_out"), ("resid_mid", "resid_mid"), ("resid_mid", "mlp_out")]


@pytest.mark.parametrize("sites", CONVENTIONS)
@pytest.mark.parametrize("k", [11, None])
def test_every_convention(sites, k):
    model = random_qwen2()
    coders = [
        random_transcoder(layer, 40, k=k, read=Site(sites[0], layer), write=Site(sites[1], layer))
        for layer in (0, 1, 3)
    ]
    hooked = HookedModel.from_model(model, word_tokenizer(), coders)
    plan = [Clamp("L1/7@-1:", 3.0), Add("L1/8@new", 1.0), Scale("L3/2", 2.0)]
    agree(FastDecoder(hooked, max_length=20), hooked, "w1 w2 w3", plan)
    swapped = FastDecoder(hooked, layers=[1, 3], replace=[0, 3], observe="all", max_length=20)
    agree(swapped, hooked, "w1 w2 w3", plan, swap=[0, 3], error="zero")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_double_precision_and_eager_attention(attention):
    hooked = random_hooked(dtype=torch.float64)
    hooked.host.model.set_attn_implementation(attention)
    agree(FastDecoder(hooked, max_length=20), hooked, "w1 w2 w3", [Clamp("L1/7", 3.0)])


def test_interventions_change_between_steps_without_anything_being_attached_anew(odd):
    """Plain and steered steps by turns: edits act at the tokens that are read while they are set, and nowhere else."""
    fast = FastDecoder(odd, layers=[1, 3], max_length=40)
    edits, buffers = list(fast._edits), [t.data_ptr() for t in vars(fast._tables[1]).values()]
    fast.prefill("w1 w2 w3 w4")
    found = []
    for token, plan in ((5, []), (6, [Clamp("L1/7", 9.0)]), (7, [Clamp("L3/2", 5.0)]), (8, [])):
        fast.set(plan)
        found.append(fast.step(token))
    ids = [*odd.host.tokenize("w1 w2 w3 w4"), 5, 6, 7, 8]
    run = odd.run(ids, [Clamp("L1/7@5", 9.0), Clamp("L3/2@6", 5.0)])
    torch.testing.assert_close(torch.stack(found), run.logits[4:], rtol=1e-4, atol=1e-4)
    assert fast._edits == edits
    assert [t.data_ptr() for t in vars(fast._tables[1]).values()] == buffers


def test_nothing_stays_attached_between_steps(odd):
    def attached() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in odd.host.model.modules())

    before = attached()
    fast = FastDecoder(odd, observe="all", max_length=40)
    fast.prefill("w1 w2")
    fast.step()
    assert attached() == before


def test_generating_in_two_parts_is_generating_at_once(odd):
    fast = FastDecoder(odd, max_length=40)
    fast.set([Clamp("L1/7@new", 3.0)])
    fast.prefill("w1 w2 w3")
    whole = fast.generate(8)
    fast.prefill("w1 w2 w3")
    parts = fast.generate(3), fast.generate(5)
    assert parts[0].ids + parts[1].ids == whole.ids
    assert parts[1].prompt == whole.prompt + parts[0].ids
    assert fast.ids == whole.prompt + whole.ids
    torch.testing.assert_close(torch.cat([p.logits for p in parts]), whole.logits)
    followed = fast.step()  # reads the token that was chosen last
    torch.testing.assert_close(
        followed, odd.run(list(fast.ids), [Clamp("L1/7@3:", 3.0)]).logits[-1], rtol=1e-4, atol=1e-4
    )


def test_stop_strings_and_the_end_token(demo):
    fast = FastDecoder(demo, max_length=40)
    prompt = "fact: the capital of the state containing Dallas is"
    fast.prefill(prompt)
    whole = fast.generate(20)
    assert whole.reason == "end"
    assert whole.text.startswith(" Austin")
    fast.prefill(prompt)
    cut = fast.generate(20, stop="Austin")
    assert cut.reason == "stop"
    assert "Austin" not in cut.text


# -- what a CUDA graph needs -------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """The operations of one step. Replayed as they are, on the same memory, as a CUDA graph is: no Python runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Any] = {}  # outputs, kept so that no other tensor takes their id

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step looks at a number"
        assert func is not torch.ops.aten.nonzero.default, "a shape depends on data"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        for leaf in tree_flatten(out)[0]:
            self.made[id(leaf)] = leaf
        return out

    def replay(self) -> None:
        now: dict[int, Any] = {}
        for func, args, kwargs, out in self.calls:
            leaves, spec = tree_flatten((args, kwargs))
            new_args, new_kwargs = tree_unflatten([now.get(id(leaf), leaf) for leaf in leaves], spec)
            again = func(*new_args, **new_kwargs)
            pairs = zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True)
            now |= {id(old): new for old, new in pairs if isinstance(old, torch.Tensor)}


@pytest.mark.parametrize("replace", [(), (1, 3)])
def test_a_recorded_step_replayed_decodes_other_prompts_under_other_interventions(odd, replace, monkeypatch):
    """The step is recorded once, with empty tables, and from then on only replayed."""
    fast = FastDecoder(odd, layers=[0, 1], observe=[0, 3], replace=replace, max_length=24)
    with Tape() as tape, torch.no_grad(), odd.host.attached(fast._edits):
        fast._advance()
    assert len(tape.calls) > 100
    monkeypatch.setattr(fast, "_run", torch.no_grad()(tape.replay))
    swap = {"swap": replace, "error": "zero"} if replace else {}
    agree(fast, odd, "w1 w2 w3", [Clamp("L0/7@new", 3.0), Scale("L1/9", -2.0)], **swap)
    agree(fast, odd, "w9 w8 w7 w6 w5", [Add("L1/7@6:8", 4.0), Ablate("L1/3")], **swap)
    acts = fast.observed[3].dense(96)
    fast.set([])
    fast.step()
    assert not torch.equal(fast.observed[3].dense(96), acts)


def test_a_table_holds_what_a_plan_says(odd):
    plan = make_plan(odd.store, [[Clamp("L1/7@2:4", 3.0), Scale("L1/9", 2.0)]], [5], new_tokens=9)
    table = EntryBuffers.empty(4, torch.device("cpu"))
    table.write(plan.tables[1])
    old = torch.tensor([1.0, 5.0, 9.0, 9.0])
    for pos, change in ((1, [0, 5, 0, 0]), (2, [2, 5, 0, 0]), (3, [2, 5, 0, 0]), (4, [0, 5, 0, 0])):
        assert table.change(old, torch.tensor([pos])).tolist() == change
    table.write(None)
    assert table.change(old, torch.tensor([2])).tolist() == [0, 0, 0, 0]


# -- refused -----------------------------------------------------------------------------------------------------


def test_what_the_decoder_cannot_do_is_refused_and_changes_nothing(odd):
    fast = FastDecoder(odd, layers=[1, 3], capacity=2, max_length=12)
    with pytest.raises(UserError, match="no prompt"):
        fast.step()
    with pytest.raises(UserError, match="no prompt"):
        fast.generate(2)
    fast.set([Clamp("L1/7@new", 3.0)])
    fast.prefill("w1 w2 w3")
    before = [t.clone() for t in vars(fast._tables[1]).values()]
    with pytest.raises(InterventionError, match="cannot be steered here"):
        fast.set([Clamp("L0/7", 3.0)])
    with pytest.raises(InterventionError, match="room for 2"):
        fast.set([Clamp(f"L1/{i}", 3.0) for i in range(3)])
    with pytest.raises(AddressError):
        fast.set([Clamp("L1/7@40", 3.0)])
    assert all(torch.equal(a, b) for a, b in zip(before, vars(fast._tables[1]).values(), strict=True))
    with pytest.raises(UserError, match="at least 1"):
        fast.generate(0)
    with pytest.raises(PromptError, match="do not fit"):
        fast.generate(10)
    with pytest.raises(PromptError, match="vocabulary"):
        fast.step(64)
    assert len(fast.generate(9).ids) == 9
    fast.step()
    with pytest.raises(PromptError, match="do not fit"):
        fast.step()
    with pytest.raises(PromptError, match="do not fit"):
        fast.prefill([2] * 13)


def test_decoders_that_cannot_be_made_are_refused(odd):
    with pytest.raises(UserError, match="no transcoder"):
        FastDecoder(odd, layers=[2])
    with pytest.raises(UserError, match="capacity 0"):
        FastDecoder(odd, capacity=0, max_length=20)
    with pytest.raises(PromptError, match="cannot hold 999"):
        FastDecoder(odd, max_length=999)


def test_sliding_windows_are_refused():
    model = random_qwen2()
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    hooked = HookedModel.from_model(random_qwen2(), word_tokenizer(), [random_transcoder(0, 40)])
    hooked.host.model.config.layer_types = model.config.layer_types
    with pytest.raises(ModelError, match="whole context"):
        FastDecoder(hooked, max_length=20)


def test_a_stream_that_is_no_number_ends_the_decoding(odd):
    fast = FastDecoder(odd, max_length=20)
    fast.set([Clamp("L1/7@new", 3e38), Add("L1/8@new", 3e38), Add("L1/9@new", 3e38), Add("L1/10@new", 3e38)])
    fast.prefill("w1 w2")
    with pytest.raises(ModelError, match="not a number"):
        fast.step(5)
    with pytest.raises(UserError, match="no prompt"):
        fast.step(5)
    fast.set([])
    fast.prefill("w1 w2")
    assert fast.step(5).isfinite().all()
