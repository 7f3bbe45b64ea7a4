"""TransformerLens both ways: our edits as hooks of a bridge, its users' functions as our edits; the model untouched."""

import copy
import warnings

import pytest
import torch
from test_interventions import KINDS, inactive, strongest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from worlds import left_behind, random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Add, Clamp, HookedModel, Scale, Site, UserError
from hooks.errors import AddressError
from hooks.host import CACHE, tap
from hooks.lens import lens_edits
from hooks.lens.bridge import LENS_CACHE
from hooks.types import SparseActs

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformer-lens's own imports

PLACES = ["@-1", "@0", "", "@1:3", "@-3:", "@:2", "@-4:-2", "@prompt", "@{0,2,-1}"]
ROWS = ["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10"]


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """fp32, eager attention against SDPA: sums in another order."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def with_sites(read: Site, write: Site, layers: range = range(3)) -> HookedModel:
    def at(site: Site, layer: int) -> Site:
        return Site(site.name, site.layer + layer)

    coders = [random_transcoder(n, 40, read=at(read, n), write=at(write, n)) for n in layers]
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


@pytest.fixture(scope="module")
def mid() -> HookedModel:
    return with_sites(Site("resid_mid", 0), Site("resid_mid", 0))


def bridged(model: HookedModel, prompt: str, plan: list, **options) -> torch.Tensor:
    tokens = model.host.batch([prompt]).ids
    return model.bridge.run_with_hooks(tokens, fwd_hooks=model.fwd_hooks(plan, **options))[0]


# -- our edits on the bridge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["@-1", "@0", ""])
def test_our_edits_as_bridge_hooks_equal_our_run(model, prompt, kind, position):
    feature, _ = strongest(model, prompt, 1, -1)
    plan = [
        KINDS[kind][0](f"L1/{feature}{position}"),
        KINDS[kind][0](f"L0/{inactive(model, prompt, 0, 0)}{position}"),
    ]
    close(bridged(model, prompt, plan), model.run(prompt, plan).logits)


@pytest.mark.parametrize("position", PLACES)
def test_every_kind_of_position_means_the_same_on_the_bridge(odd, position):
    plan = [Clamp(f"L1/7{position}", 6.0)]
    run = odd.run(ROWS[0], plan)
    close(bridged(odd, ROWS[0], plan), run.logits)
    assert not torch.allclose(run.logits, run.baseline, atol=1e-2)


@pytest.mark.parametrize("when_inactive", ["apply", "skip"])
def test_what_happens_to_inactive_features_is_the_same_on_the_bridge(model, prompt, when_inactive):
    idle = inactive(model, prompt, 1, -1)
    plan = [Add(f"L1/{idle}@-1", 4.0, when_inactive=when_inactive)]
    run = model.run(prompt, plan)
    close(bridged(model, prompt, plan), run.logits)
    assert torch.equal(run.logits, run.baseline) == (when_inactive == "skip")


@pytest.mark.parametrize("options", [{"mask": "live"}, {"swap": "all"}, {"swap": [0], "error": "zero"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_modes_mean_the_same_on_the_bridge(model, prompt, options, kind):
    feature, _ = strongest(model, prompt, 1, -1)
    plan = [KINDS[kind][0](f"L1/{feature}@-1")]
    close(bridged(model, prompt, plan, **options), model.run(prompt, plan, **options).logits)


def test_a_swap_alone_needs_no_intervention(model, prompt):
    swapped = model.run(prompt, swap="all", error="zero")
    close(bridged(model, prompt, [], swap="all", error="zero"), swapped.logits)
    assert not torch.allclose(swapped.logits, swapped.baseline, atol=1e-2)


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (Site("mlp_in", 0), Site("mlp_out", 0)),
        (Site("mlp_in", 0), Site("mlp_out", 1)),
        (Site("resid_pre", 0), Site("resid_post", 0)),
        (Site("resid_mid", 0), Site("mlp_out", 0)),
        (Site("resid_pre", 0), Site("attn_out", 0)),
        (Site("resid_mid", 0), Site("resid_mid", 0)),
        (Site("resid_pre", 0), Site("resid_mid", 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"swap": [0, 2], "error": "zero"}], ids=str)
def test_every_convention_passes_its_features_from_hook_to_hook(read, write, options):
    model = with_sites(read, write)
    plan = [Clamp("L1/5@-1", 2.0), Add("L0/6", 3.0), Scale("L2/7@1:", -2.0)]
    run = model.run(ROWS[0], plan, **options)
    close(bridged(model, ROWS[0], plan, **options), run.logits)
    assert not torch.allclose(run.logits, run.baseline, atol=1e-2)


def test_an_edit_of_resid_mid_reaches_the_stream_and_not_only_the_branch(mid):
    plan = [Clamp("L1/5", 4.0)]
    hooks = mid.fwd_hooks(plan)
    assert [name for name, _ in hooks] == [Site("resid_mid", 1).lens_name, Site("resid_post", 1).lens_name]
    tokens = mid.host.batch([ROWS[0]]).ids
    branch_only = mid.bridge.run_with_hooks(tokens, fwd_hooks=hooks[:1])[0]
    run = mid.run(ROWS[0], plan)
    assert not torch.allclose(branch_only, run.logits, atol=1e-2)
    assert not torch.allclose(branch_only, run.baseline, atol=1e-2)


def test_an_edit_of_resid_mid_leaves_other_hooks_of_the_block_alone(mid):
    """Somebody else's hook at mlp_out, attached behind ours, must not get lost when the stream is put together."""
    name = Site("mlp_out", 1).lens_name

    def halve(act, hook):
        return act / 2

    plan, tokens = [Clamp("L1/5", 4.0)], mid.host.batch([ROWS[0]]).ids
    ours = mid.run(ROWS[0], plan, lens_hooks=[(name, halve)])
    theirs = mid.bridge.run_with_hooks(tokens, fwd_hooks=[*mid.fwd_hooks(plan), (name, halve)])[0]
    close(theirs, ours.logits)


@pytest.mark.parametrize("position", ["@-1", "@0", "", "@-2:"])
@pytest.mark.parametrize("options", [{}, {"swap": "all", "error": "zero"}], ids=str)
def test_rows_padded_on_either_side_are_as_if_alone(odd, mid, position, options):
    for model in (odd, mid):
        plan = [Clamp(f"L1/7{position}", 6.0)]
        alone = [model.run(row, plan, **options).logits for row in ROWS]
        left = model.bridge.run_with_hooks(ROWS, fwd_hooks=model.fwd_hooks(plan, **options), padding_side="left")
        batch = model.host.batch(ROWS)
        right = model.bridge.run_with_hooks(
            batch.ids, fwd_hooks=model.fwd_hooks(plan, **options), attention_mask=batch.mask.long()
        )
        for row, logits in enumerate(alone):
            close(left[row, -len(logits) :], logits)
            close(right[row, : len(logits)], logits)


def test_padding_that_no_mask_shows_is_refused(odd):
    hooks = odd.fwd_hooks([Clamp("L1/7@-1", 6.0)])
    with pytest.raises(UserError, match="no attention mask says whether it is padding"):
        odd.bridge.run_with_hooks(ROWS, fwd_hooks=hooks)  # a list of texts is padded on the right, without a mask
    gaps = torch.tensor([[1, 0, 1]])
    with pytest.raises(UserError, match="gaps"):
        odd.bridge.run_with_hooks(torch.tensor([[3, 4, 5]]), fwd_hooks=hooks, attention_mask=gaps)
    causal = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e9)
    with pytest.raises(UserError, match="does not say where the padding is"):
        odd.bridge.run_with_hooks(torch.tensor([[3, 4, 5]]), fwd_hooks=hooks, attention_mask=causal)
    same_start = torch.tensor([[0, 4, 5], [0, 6, 7]])  # the padding token as a beginning of text: no doubt about it
    edited = odd.bridge.run_with_hooks(same_start, fwd_hooks=hooks)
    close(edited[1], odd.run([0, 6, 7], [Clamp("L1/7@-1", 6.0)]).logits)


def test_positions_are_checked_against_what_the_bridge_is_given(odd):
    with pytest.raises(AddressError, match="no feature"):
        odd.fwd_hooks([Ablate("L1/9999")])  # at once
    with pytest.raises(AddressError, match="generates none"):
        odd.fwd_hooks([Ablate("L1/7@new")])
    hooks = odd.fwd_hooks([Ablate("L1/7@5")])
    with pytest.raises(AddressError, match="position 5 does not occur"):
        odd.bridge.run_with_hooks(odd.host.batch([ROWS[0]]).ids, fwd_hooks=hooks)
    six = "w1 w2 w3 w4 w5 w6"  # the same hooks go on to serve a longer prompt
    tokens = odd.host.batch([six]).ids
    close(odd.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0], odd.run(six, [Ablate("L1/7@5")]).logits)


def test_frozen_errors_are_refused(odd):
    with pytest.raises(UserError, match="no frozen error"):
        odd.fwd_hooks([], swap="all", error="frozen")
    with pytest.raises(UserError, match="no site is replaced"):
        odd.fwd_hooks([Ablate("L1/7")], error="zero")


def test_without_a_batch_axis(odd):
    plan, tokens = [Clamp("L1/7@-1", 6.0)], odd.host.batch([ROWS[0]]).ids
    out = odd.bridge.run_with_hooks(tokens, fwd_hooks=odd.fwd_hooks(plan), remove_batch_dim=True)
    close(out.reshape(-1, 64), odd.run(ROWS[0], plan).logits)


def test_hooks_attached_twice_or_to_another_bridge_are_refused(odd, mid):
    tokens = odd.host.batch([ROWS[0]]).ids
    hooks = odd.fwd_hooks([Clamp("L1/7", 6.0)])
    with pytest.raises(UserError, match="do not fit the pass"):
        odd.bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *hooks])
    odd.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    with pytest.raises(UserError, match="do not fit the pass"):
        mid.bridge.run_with_hooks(tokens, fwd_hooks=hooks)


def test_run_with_cache_sees_the_edited_residual(model, prompt):
    feature, _ = strongest(model, prompt, 1, -1)
    tokens = model.host.batch([prompt]).ids
    name = Site("resid_post", 1).lens_name
    clean = model.bridge.run_with_cache(tokens, names_filter=[name])[1][name]
    with model.bridge.hooks(fwd_hooks=model.fwd_hooks([Ablate(f"L1/{feature}@-1")])):
        edited = model.bridge.run_with_cache(tokens, names_filter=[name])[1][name]
    assert torch.allclose(clean[0, :-1], edited[0, :-1], atol=1e-5)
    assert not torch.allclose(clean[0, -1], edited[0, -1], atol=1e-3)


# -- while the bridge generates ----------------------------------------------------------------------------------------

NEW = 6
LOUD = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("position", ["@-1", "@0", "", "@new", "@3:8", "@-2:", "@7"])
def test_bridge_generation_equals_ours_at_every_position(odd, position, cached):
    plan = [Clamp(f"L1/7{position}", 8.0), Ablate("L0/3@-1")]
    ours = odd.generate(ROWS[0], plan, max_new_tokens=NEW)
    tokens = odd.host.batch([ROWS[0]]).ids
    with odd.bridge.hooks(fwd_hooks=odd.fwd_hooks(plan, max_new_tokens=NEW)):
        for _ in range(2):  # a second generation starts anew
            out = odd.bridge.generate(tokens, use_past_kv_cache=cached, **LOUD)
            assert out[0, 5 : 5 + len(ours.ids)].tolist() == list(ours.ids)


def test_steering_moves_what_the_test_above_compares(odd):
    texts = {odd.generate(ROWS[0], [Clamp(f"L1/7{p}", 8.0)], max_new_tokens=NEW).ids for p in ("@-1", "", "@new")}
    assert len(texts) == 3


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("position", ["@-1", "@new", "@1:"])
def test_bridge_generation_of_padded_rows_equals_ours(odd, position, cached):
    plan = [Clamp(f"L1/7{position}", 8.0)]
    with odd.bridge.hooks(fwd_hooks=odd.fwd_hooks(plan, max_new_tokens=NEW)):
        out = odd.bridge.generate(ROWS, return_type="tokens", use_past_kv_cache=cached, **LOUD)
    for row, new in zip(ROWS, out[:, -NEW:].tolist(), strict=True):
        ours = odd.generate(row, plan, max_new_tokens=NEW).ids
        assert new[: len(ours)] == list(ours)


def test_another_prompt_that_is_longer_is_not_taken_for_a_continuation(odd):
    plan = [Clamp("L1/7@-1", 8.0)]
    hooks = odd.fwd_hooks(plan, max_new_tokens=NEW)
    for text in ("w1 w2 w3", "w9 w8 w7 w6 w5"):
        logits = odd.bridge.run_with_hooks(odd.host.batch([text]).ids, fwd_hooks=hooks)[0]
        close(logits, odd.run(text, plan).logits)


def test_the_generation_of_transformers_equals_ours_too(odd):
    plan, tokens = [Clamp("L1/7@-2:", 8.0)], odd.host.batch([ROWS[0]]).ids
    ours = odd.generate(ROWS[0], plan, max_new_tokens=NEW).ids
    with odd.bridge.hooks(fwd_hooks=odd.fwd_hooks(plan, max_new_tokens=NEW)):
        out = odd.bridge.hf_generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert out[0, 5 : 5 + len(ours)].tolist() == list(ours)


def test_a_generation_that_was_not_announced_is_refused(odd):
    tokens = odd.host.batch([ROWS[0]]).ids
    for room in (0, 2):
        hooks = odd.fwd_hooks([Clamp("L1/7", 8.0)], max_new_tokens=room)
        with odd.bridge.hooks(fwd_hooks=hooks), pytest.raises(UserError, match=f"at most {room} new tokens"):
            odd.bridge.generate(tokens, **LOUD)


WINDOWS = {"sliding_window": 3}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2, windows": (Qwen2Config, Qwen2ForCausalLM, WINDOWS | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral, windows": (MistralConfig, MistralForCausalLM, WINDOWS),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0}),  # one projection for queries, keys and values
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"pad_token_id": 0}),
}


def endless(family: str) -> HookedModel:
    """A random model that never ends a text, so that every generation has its full length."""
    config, network, special = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = network(config(**sizes, **heads, **special, max_position_embeddings=128, initializer_range=0.15)).eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return HookedModel.from_model(made, word_tokenizer(), [random_transcoder(0, 40)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_generates_what_transformers_do_and_without_a_warning(family):
    """With the cache, whatever transformers calls it, and without; also where prompts are longer than a window."""
    model = endless(family)
    ids = torch.tensor([[3, 9, 4, 22, 17, 5, 8]])
    theirs = model.host.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    bridge = model.bridge
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cached in (True, False):
            assert torch.equal(bridge.generate(ids, use_past_kv_cache=cached, **LOUD), theirs)
        assert torch.equal(bridge.hf_generate(ids, max_new_tokens=NEW, do_sample=False), theirs)
        first, cache = bridge(ids[:, :4], return_type="logits_and_cache", use_past_kv_cache=True)
        after = bridge(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(ids))
    close(torch.cat([first, after], 1), bridge(ids))


REPAIRED = (
    "TransformerLens is repaired: remove _name_the_cache and LENS_CACHE from hooks/lens/bridge.py, this test, and "
    "'A bridge of your own' from docs/transformerlens.md"
)


def test_a_bridge_that_is_not_ours_still_loses_the_cache(odd):
    """TransformerLens 4.3 on transformers 5.24: no hook of ours is involved."""
    from transformer_lens.model_bridge import TransformerBridge

    tokens, plain = odd.host.batch([ROWS[0]]).ids, odd.host.model
    theirs = odd.bridge.generate(tokens, use_past_kv_cache=False, **LOUD)
    bare = TransformerBridge.boot_transformers("", hf_model=copy.deepcopy(plain), tokenizer=word_tokenizer())
    assert torch.equal(bare.generate(tokens, use_past_kv_cache=False, **LOUD), theirs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cached = bare.generate(tokens, use_past_kv_cache=True, **LOUD)
    wrong = not torch.equal(cached, theirs)
    warned = any("past_key_values" in str(each.message) for each in said)
    assert (wrong, warned) == (CACHE != LENS_CACHE,) * 2, REPAIRED


# -- the twin ----------------------------------------------------------------------------------------------------------


def test_the_twin_shares_every_tensor_and_the_plain_model_stays_plain(odd):
    plain = odd.host.model
    before = {name: type(module) for name, module in plain.named_modules()}
    logits = odd.run(ROWS[0]).baseline
    twin = odd.bridge.original_model
    own = {t.data_ptr() for t in (*plain.parameters(), *plain.buffers())}
    tensors = [*twin.named_parameters(), *twin.named_buffers()]
    made = {name: tensor for name, tensor in tensors if tensor.data_ptr() not in own}
    assert len(tensors) > 40
    assert list(made) == ["lm_head._original_component.bias"]  # b_U, which Qwen2 has not
    assert made["lm_head._original_component.bias"].abs().sum() == 0
    assert {t.data_ptr() for t in odd.bridge.parameters()} - own <= {t.data_ptr() for t in made.values()}
    assert {name: type(module) for name, module in plain.named_modules()} == before
    assert not left_behind(plain)
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(odd.run(ROWS[0]).baseline, logits)


def test_compatibility_mode_works_as_long_as_it_leaves_the_weights_alone():
    model = with_sites(Site("mlp_in", 0), Site("mlp_out", 0))
    plan = [Clamp("L1/5", 2.0)]
    run = model.run(ROWS[0], plan)
    model.bridge.enable_compatibility_mode(no_processing=True)
    close(bridged(model, ROWS[0], plan), run.logits)
    model.bridge.enable_compatibility_mode()  # norms are folded: what stood at mlp_in stands there no more
    with pytest.raises(UserError, match="do not fit the pass"):
        bridged(model, ROWS[0], plan)
    assert torch.equal(model.run(ROWS[0], plan).logits, run.logits)


# -- TransformerLens functions on our model ----------------------------------------------------------------------------

SERVED = ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]


def flip_and_shift(act, hook):
    return -act + 0.5


@pytest.mark.parametrize("name", SERVED)
def test_a_lens_hook_does_to_our_run_what_it_does_to_the_bridge(odd, name):
    hooks = [(Site(name, layer).lens_name, flip_and_shift) for layer in (1, 3)]
    theirs = odd.bridge.run_with_hooks(odd.host.batch([ROWS[0]]).ids, fwd_hooks=hooks)[0]
    run = odd.run(ROWS[0], lens_hooks=hooks)
    close(run.logits, theirs)
    assert not torch.allclose(run.logits, run.baseline, atol=1e-2)


@pytest.mark.parametrize("alias", ["hook_in", "attn.hook_out", "mlp.hook_out", "hook_out"])
def test_aliases_are_what_they_are_on_the_bridge(odd, alias):
    hooks = [(f"blocks.1.{alias}", flip_and_shift)]
    theirs = odd.bridge.run_with_hooks(odd.host.batch([ROWS[0]]).ids, fwd_hooks=hooks)[0]
    close(odd.run(ROWS[0], lens_hooks=hooks).logits, theirs)


def test_at_resid_mid_our_run_edits_the_stream_and_the_bridge_a_branch(odd):
    """resid_post = edited stream + MLP of it here; the bridge adds the MLP's output to the unedited stream."""
    seen: dict[str, torch.Tensor] = {}

    def keep(act, hook):
        seen[hook.name] = act.clone()

    def shift(act, hook):
        return act + 1.0

    mid, out, post = (Site(name, 1).lens_name for name in ("resid_mid", "mlp_out", "resid_post"))
    odd.run(ROWS[0], lens_hooks=[(mid, shift), (mid, keep), (out, keep), (post, keep)])
    torch.testing.assert_close(seen[post], seen[mid] + seen[out])
    ours, stream = seen[post], seen[mid] - 1.0
    with odd.bridge.hooks(fwd_hooks=[(mid, shift)]):
        cache = odd.bridge.run_with_cache(odd.host.batch([ROWS[0]]).ids)[1]
    close(cache[post], stream + cache[out])
    close(cache[post], ours - 1.0)


def test_in_place_edits_count_and_reach_nobody_else(odd):
    """`act *= 0` with nothing returned is common; the same memory may be what somebody else keeps."""

    def in_place(act, hook):
        act[:, -1] *= 0

    def returned(act, hook):
        out = act.clone()
        out[:, -1] = 0
        return out

    site = Site("resid_post", 1)
    runs = [odd.run(ROWS[0], lens_hooks=[(site.lens_name, fn)]).logits for fn in (in_place, returned)]
    assert torch.equal(*runs)
    batch, seen, clean = odd.host.batch([ROWS[0]]), {}, {}
    odd.host.forward(batch, [tap(site, clean)])
    odd.host.forward(batch, [tap(site, seen), *lens_edits([(site.lens_name, in_place)], 4)])
    assert torch.equal(seen[site], clean[site])


def test_a_hook_that_only_looks_changes_no_bit(odd):
    run = odd.run(ROWS[0], lens_hooks=[(lambda name: True, lambda act, hook: None)])
    assert torch.equal(run.logits, run.baseline)


def test_hooks_of_one_site_run_in_order_behind_the_interventions(odd):
    site = odd.store.convention.write.at(1)
    seen = []

    def double(act, hook):
        seen.append(act.clone())
        return 2 * act

    def keep(act, hook):
        seen.append(act.clone())

    plan = [Clamp("L1/7", 6.0)]
    odd.run(ROWS[0], plan, lens_hooks=[(site.lens_name, double), (site.lens_name, keep)])
    edited = {}
    batch = odd.host.batch([ROWS[0]])
    odd.host.forward(batch, [*odd.edits(batch, [plan]), tap(site, edited)])
    assert torch.equal(seen[0], edited[site])
    assert torch.equal(seen[1], 2 * edited[site])


def test_what_a_function_knows_of_its_place(odd):
    calls = []

    def count(act, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        calls.append((hook.name, hook.layer(), hook.first, act.shape[1], hook.lengths, hook.pads, hook.ctx["calls"]))

    odd.generate(ROWS[0], max_new_tokens=3, lens_hooks=[("blocks.2.hook_out", count)])
    assert calls[0] == ("blocks.2.hook_out", 2, 0, 5, [5], (0,), 1)
    assert [call[2:4] for call in calls] == [(0, 5), (5, 1), (6, 1)]
    assert [call[-1] for call in calls] == [1, 2, 3]
    calls.clear()
    odd.run(ROWS[0], lens_hooks=[("blocks.2.hook_out", count)])
    assert calls[0][-1] == 1  # contexts end with the call


def test_functions_at_one_site_share_its_context_under_either_name(odd):
    found = []

    def leave(act, hook):
        hook.ctx["left"] = hook.name

    def find(act, hook):
        found.append(hook.ctx.get("left"))

    names = ("blocks.2.hook_out", "blocks.2.hook_resid_post", "blocks.1.hook_out")
    odd.run(ROWS[0], lens_hooks=[(names[0], leave), (names[1], find), (names[2], find)])
    assert found == [None, "blocks.2.hook_out"]  # block 1 comes first, and has a context of its own


def test_a_filter_of_names_reaches_each_site_once(odd):
    names = []
    odd.run(ROWS[0], lens_hooks=[(lambda name: name.endswith("resid_post"), lambda act, hook: names.append(hook.name))])
    assert names == [f"blocks.{layer}.hook_resid_post" for layer in range(4)]


def test_lens_hooks_over_many_prompts(odd):
    hooks = [(Site("mlp_out", 2).lens_name, flip_and_shift)]
    many = odd.run_many(ROWS, lens_hooks=hooks)
    for row, logits in zip(ROWS, many, strict=True):
        close(logits, odd.run(row, lens_hooks=hooks).logits[-1])


@pytest.mark.parametrize("cached", [True, False])
def test_lens_hooks_while_we_generate_equal_those_on_the_bridge(odd, cached):
    hooks = [(Site("resid_post", 1).lens_name, lambda act, hook: act + 1.0)]
    ours = odd.generate(ROWS[0], max_new_tokens=NEW, lens_hooks=hooks, use_cache=cached).ids
    with odd.bridge.hooks(fwd_hooks=hooks):
        theirs = odd.bridge.generate(odd.host.batch([ROWS[0]]).ids, **LOUD)
    assert theirs[0, 5 : 5 + len(ours)].tolist() == list(ours)
    assert ours != odd.generate(ROWS[0], max_new_tokens=NEW).ids


@pytest.mark.parametrize(
    "name",
    ["blocks.1.attn.hook_pattern", "blocks.4.hook_out", "blocks.1.ln2.hook_in", "hook_embed", lambda name: False],
)
def test_names_that_are_not_served_are_refused(odd, name):
    with pytest.raises(UserError, match="no hook") as error:
        odd.run(ROWS[0], lens_hooks=[(name, flip_and_shift)])
    assert "hook_resid_post" in error.value.expected
    assert "0 to 3" in error.value.expected


@pytest.mark.parametrize("wrong", [lambda act, hook: act[:, :1], lambda act, hook: 3.0, lambda act, hook: (act,)])
def test_what_is_no_activation_is_refused(odd, wrong):
    with pytest.raises(UserError, match="returned something else than an activation"):
        odd.run(ROWS[0], lens_hooks=[("blocks.1.hook_out", wrong)])


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_feature_cache_holds_what_was_recorded(odd):
    cache = odd.feature_cache(ROWS)
    recording = odd.record(ROWS)
    assert torch.equal(cache.logits, recording.logits)
    for layer, seen in recording.layers.items():
        acts = cache[f"blocks.{layer}.hook_transcoder_acts"]
        assert isinstance(acts, SparseActs)
        assert torch.equal(acts.values, seen.acts.values)
        assert torch.equal(acts.indices, seen.acts.indices)
        assert torch.equal(cache["transcoder_out", layer], seen.reconstruction)
        assert torch.equal(cache["transcoder_error", layer], seen.target - seen.reconstruction)
        assert torch.equal(cache["resid_pre", layer], seen.read)
    for layer in range(4):
        assert torch.equal(cache["resid_post", layer], cache[f"blocks.{layer}.hook_resid_post"])
    for layer in range(3):  # memory: one tensor, two names
        assert cache["resid_post", layer].data_ptr() == cache["resid_pre", layer + 1].data_ptr()


def test_a_feature_cache_is_a_mapping(odd):
    cache = odd.feature_cache(ROWS[0], layers=[1, 3], sites=["resid_mid"])
    names = list(cache)
    assert len(cache) == len(names) == len(set(names)) == 2 * 3 + 4 + 2  # resid_pre 1 and 3 are read
    assert all(name in cache and cache[name] is not None for name in names)
    assert ("transcoder_acts", 1) in cache
    assert ("transcoder_acts", 0) not in cache
    with pytest.raises(KeyError, match="it has blocks"):
        cache["blocks.1.attn.hook_pattern"]
    assert cache.layers("transcoder_out") == (1, 3)
    assert cache.layers("resid_mid") == (0, 1, 2, 3)


def test_stacking_puts_layers_in_front(odd):
    cache = odd.feature_cache(ROWS)
    out, acts = cache.stack("transcoder_out"), cache.stack("transcoder_acts")
    assert out.shape == (3, 3, 5, 40)  # layer 2 has no transcoder
    for row, layer in enumerate((0, 1, 3)):
        assert torch.equal(out[row], cache["transcoder_out", layer])
        assert torch.equal(acts.values[row], cache["transcoder_acts", layer].values)
    with pytest.raises(UserError, match="this cache has no"):
        cache.stack("mlp_out")
    uneven = [random_transcoder(n, 40, k=5 + n) for n in (0, 1)]
    other = HookedModel.from_model(random_qwen2(), word_tokenizer(), uneven)
    with pytest.raises(UserError, match="different numbers of features"):
        other.feature_cache(ROWS[0]).stack("transcoder_acts")


def test_the_frame_lists_every_active_feature_of_real_tokens(odd):
    cache = odd.feature_cache(ROWS)
    frame = cache.to_frame()
    real = cache.batch.mask
    assert len(frame) == sum(int((cache["transcoder_acts", n].values > 0)[real].sum()) for n in (0, 1, 3))
    line = frame.iloc[len(frame) // 2]
    alone = odd.record(ROWS[line.row]).layers[line.layer].acts.dense(96)[0, line.pos, line.feature]
    assert float(alone) == pytest.approx(line.activation, rel=1e-4)
    assert line.token == cache.batch.strings[line.row][line.pos]
    assert (frame.pos[frame.row == 1] < 2).all()
