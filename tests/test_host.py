"""Hooks: where they attach, that they change nothing unless told to, and that they never stay."""

import logging

import pytest
import torch
from torch import nn
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from hooks import Ablate, HookedModel, Site, UserError
from hooks.errors import ModelError, PromptError, TargetError
from hooks.host import Host, tap
from hooks.sites import SITE_NAMES
from hooks.types import Edit


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_recorded_residual_is_the_input_of_its_block(model, prompt):
    batch = model.host.batch([prompt])
    hidden = model.host.model(batch.ids, output_hidden_states=True).hidden_states
    before = hooks_of(model.host.model)  # transformers keeps its own capture hooks after first use
    recording = model.record(prompt)
    for layer, record in recording.layers.items():
        assert torch.equal(record.read, hidden[layer])
    assert hooks_of(model.host.model) == before


def test_sites_relate_as_the_block_computes_them(model, prompt):
    batch = model.host.batch([prompt])
    layer = model.host.n_layers - 1
    _, seen = model.host.capture(batch, [Site(name, layer) for name in SITE_NAMES])
    pre, mid, post, attn, mlp_in, mlp = (
        seen[Site(name, layer)] for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")
    )
    assert torch.equal(pre + attn, mid)
    assert torch.equal(mid + mlp, post)
    assert torch.equal(model.host.layers[layer].post_attention_layernorm(mid), mlp_in)


def test_each_site_is_hit_once_per_pass(model, prompt):
    calls = {}

    def count(site):
        def apply(x, at):
            calls[site] = calls.get(site, 0) + 1
            return x

        return Edit(site, apply)

    sites = [Site(name, layer) for layer in range(model.host.n_layers) for name in SITE_NAMES]
    model.host.forward(model.host.batch([prompt]), [count(site) for site in sites])
    assert calls == dict.fromkeys(sites, 1)


def test_an_edit_at_every_site_reaches_the_logits(model, prompt):
    """Silent no-ops (tuple-guarded hooks, row 0 of a plain tensor) would pass unnoticed otherwise."""
    batch = model.host.batch([prompt, prompt])
    clean = model.host.forward(batch)
    for name in SITE_NAMES:
        edited = model.host.forward(batch, [Edit(Site(name, 1), lambda x, at: x * 1.5)])
        changed = (edited - clean).abs().amax(-1)
        assert (changed[:, -1] > 1e-2).all(), name
        assert edited.shape == clean.shape


def test_no_edits_register_no_hook_and_empty_edits_change_no_bit(model, prompt):
    host, batch = model.host, model.host.batch([prompt])
    before = hooks_of(host.model)
    with host.attached([]):
        assert hooks_of(host.model) == before
    clean = host.forward(batch)
    taps = [tap(Site("resid_pre", layer), {}) for layer in range(host.n_layers)]
    assert torch.equal(host.forward(batch, taps), clean)
    assert torch.equal(model.run(prompt, swap="all", error="live").logits, clean[0])


def test_editing_resid_mid_replaces_the_stream_not_only_the_branch_into_the_mlp(model, prompt):
    """The norm's input is a branch: a pre-hook there alone would leave the skip connection untouched."""
    batch, layer = model.host.batch([prompt]), 1
    names = ("resid_mid", "mlp_out", "resid_post")
    _, clean = model.host.capture(batch, [Site(name, layer) for name in names])
    shift = torch.linspace(-1, 1, model.host.d_model)
    seen = {}
    edits = [tap(Site("resid_post", layer), seen), Edit(Site("resid_mid", layer), lambda x, at: x + shift)]
    model.host.forward(batch, edits)
    mid = clean[Site("resid_mid", layer)] + shift
    block = model.host.layers[layer]
    expected = mid + block.mlp(block.post_attention_layernorm(mid))
    torch.testing.assert_close(seen[Site("resid_post", layer)], expected)


def test_hooks_are_gone_after_an_exception(model, prompt):
    before = hooks_of(model.host.model)

    def fail(x, at):
        raise RuntimeError("inside a hook")

    with pytest.raises(RuntimeError, match="inside a hook"):
        model.host.forward(model.host.batch([prompt]), [Edit(Site("resid_pre", 1), fail), tap(Site("mlp_out", 0), {})])
    assert hooks_of(model.host.model) == before


def test_hooks_are_gone_when_attaching_fails_halfway(model, prompt):
    before = hooks_of(model.host.model)
    edits = [tap(Site("resid_pre", 0), {}), tap(Site("resid_pre", 99), {})]
    with pytest.raises(UserError, match="layer 99"):
        model.host.forward(model.host.batch([prompt]), edits)
    assert hooks_of(model.host.model) == before


def test_a_padded_batch_gives_what_each_prompt_gives_alone(model, prompt):
    words = prompt.split()
    prompts = [" ".join(words[:n]) for n in (2, len(words), 4)]
    together = model.record(prompts)
    for row, text in enumerate(prompts):
        alone = model.record(text)
        length = alone.batch.lengths[0]
        assert together.batch.lengths[row] == length
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], rtol=1e-4, atol=2e-5)
        for layer, record in alone.layers.items():
            both = together.layers[layer]
            torch.testing.assert_close(both.read[row, :length], record.read[0], rtol=1e-4, atol=2e-5)
            margin = (record.acts.values[0] > 1e-3).all()
            if margin:
                assert torch.equal(both.acts.indices[row, :length], record.acts.indices[0])


def test_parameters_take_no_gradient_and_running_keeps_no_graph(model, prompt):
    assert not any(p.requires_grad for p in model.host.model.parameters())
    run = model.run(prompt)
    assert run.logits.grad_fn is None
    assert all(record.read.grad_fn is None for record in model.record(prompt).layers.values())


def test_tokens_and_targets(demo):
    assert demo.host.string(demo.host.token_id("Austin")) == " Austin"
    assert demo.host.token_id(" Austin") == demo.host.token_id("Austin")
    with pytest.raises(TargetError, match=r"' San' \| ' Antonio'"):
        demo.host.token_id("San Antonio")
    with pytest.raises(TargetError):
        demo.host.token_id("zyzzyva")
    with pytest.raises(TargetError, match="outside"):
        demo.host.token_id(10**9)


@pytest.mark.parametrize("prompt", ["", "   ", []])
def test_empty_prompts_are_refused(demo, prompt):
    with pytest.raises(PromptError, match="empty"):
        demo.run(prompt)


def test_long_prompts_and_strange_ids_are_refused(odd):
    with pytest.raises(PromptError, match="at most 128"):
        odd.run([1] * 129)
    with pytest.raises(PromptError, match="outside the vocabulary"):
        odd.run([1, 64])


def test_words_outside_the_vocabulary_are_said(demo, caplog):
    with caplog.at_level(logging.WARNING, "hooks"):
        demo.run("fact: the capital of Atlantis is")
    assert "not in the vocabulary" in caplog.text


def test_fp16_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, "hooks"):
        Host(random_qwen2().half(), word_tokenizer())
    assert "fp16" in caplog.text


def test_the_self_test_refuses_a_block_wired_otherwise():
    class Odd(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) * 1.0

    model = random_qwen2()
    layer = model.model.layers[3]
    layer.mlp = Odd(layer.mlp)  # still mid + mlp = post: accepted
    HookedModel.from_model(model, word_tokenizer(), [random_transcoder(0, 40)])
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01
    with pytest.raises(ModelError, match="block 3"):
        HookedModel.from_model(model, word_tokenizer(), [random_transcoder(0, 40)])


def test_a_bf16_model_stays_bf16_and_its_logits_are_not_rounded_to_it():
    """A bf16 logit near 20 has steps of 0.125: ablation effects would be invisible."""
    model = random_hooked(dtype=torch.bfloat16)
    table = model.features("w1 w2 w3", top=1)
    address = f"L{table.layer[0]}/{table.feature[0]}@{table.pos[0]}"
    run = model.run("w1 w2 w3", [Ablate(address)])
    assert model.host.model.dtype == torch.bfloat16
    assert run.logits.dtype == torch.float32
    assert (run.logits != run.logits.bfloat16()).float().mean() > 0.9
    assert (run.baseline - model.host.model(run.batch.ids).logits[0]).abs().max() < 0.05
    assert not torch.equal(run.logits, run.baseline)


def test_a_stream_that_is_not_a_number_names_layer_and_repair(odd):
    bad = Edit(Site("resid_pre", 0), lambda x, at: x * torch.nan)
    batch = odd.host.batch(["w1 w2"])
    edits = [bad, *odd.edits(batch, [[Ablate("L0/1")]])]
    with pytest.raises(ModelError, match="resid_pre 0 is not a number"):
        odd.host.forward(batch, edits)


def test_token_ids_may_come_as_tensors(odd):
    ids = odd.host.batch(["w1 w2 w3"]).ids
    expected = odd.run("w1 w2 w3")
    for prompt in (ids[0].tolist(), ids[0], ids):
        assert torch.equal(odd.run(prompt).baseline, expected.baseline)
        assert torch.equal(odd.record(prompt).logits[0], expected.baseline)
    answer = expected.baseline[-1].argmax()
    assert expected.effect(answer) == expected.effect(int(answer)) == expected.effect()


def test_a_target_against_itself_measures_nothing_and_is_refused(odd):
    with pytest.raises(TargetError, match="same token"):
        odd.run("w1 w2").effect(5, 5)


def test_single_positions_give_the_same_logits(odd):
    batch = odd.host.batch(["w1 w2 w3", "w4 w5"])
    whole = odd.host.forward(batch)
    # not bit for bit: a processor's library may sum a product of two rows in another order than one of six
    torch.testing.assert_close(odd.host.forward_at(batch, batch.last), whole[torch.arange(2), batch.last])


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_gets_no_graph():
    accelerate = pytest.importorskip("accelerate")
    moved = random_hooked(missing=None)
    accelerate.cpu_offload(moved.host.model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match="needs the weights of every block"):
        trace(moved, "w1 w2 w3")


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_gives_the_same_results():
    """accelerate keeps such weights on the meta device between uses."""
    accelerate = pytest.importorskip("accelerate")
    plain = random_hooked()
    moved = random_qwen2()
    accelerate.cpu_offload(moved, execution_device=torch.device("cpu"))
    model = HookedModel.from_model(moved, word_tokenizer(), list(plain.store))
    feature = int(plain.record("w1 w2 w3").layers[1].acts.indices[0, -1, 0])
    plan = [Ablate(f"L1/{feature}@-1")]
    torch.testing.assert_close(model.run("w1 w2 w3", plan).logits, plain.run("w1 w2 w3", plan).logits)
    assert (
        model.generate("w1 w2 w3", plan, max_new_tokens=3).ids == plain.generate("w1 w2 w3", plan, max_new_tokens=3).ids
    )
