"""What the algebra takes for granted about a model is measured: architectures that share every name differ in more."""

import gc
import weakref

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from worlds import ARCHITECTURES, WORDS, random_transcoder, word_tokenizer

from circuits import Direction, Logit, Mass, prepare, score_features, trace
from circuits.attribution import RULES, autograd
from circuits.building import recorded, settle
from circuits.edges import stack as _stack
from circuits.edges import stack_of
from circuits.edges.stack import known_blocks, reproduces
from circuits.targets import resolve_targets
from hooks import HookedModel, Site, UserError
from hooks.errors import ModelError
from hooks.host import Host
from hooks.host.frozen_parts import held, record_held
from hooks.sites import EMBEDDING

PROMPT = " ".join(f"w{n}" for n in range(12))
LAYERS = 4
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
SAME = {  # name → further options; all are what the algebra says
    "Qwen2": {}, "Qwen3": {}, "Llama": {}, "SeedOss": {}, "Mistral": {"sliding_window": None},
}  # fmt: skip
OTHERS = {  # all modules have the same names; what is done with them differs
    "Granite": {"logits_scaling": 4.0},
    "SmolLM3": {},  # no rotation in every fourth layer
    "Helium": {},  # rotates neighbouring numbers, not halves
    "Ernie4_5": {},  # the same
    "HunYuanDenseV1": {},  # norms queries and keys, under other names
    "Mistral": {"sliding_window": 4},
    "Olmo": {},  # LayerNorms without weights
}


def build(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def hooked(model: nn.Module, width: int = 40) -> HookedModel:
    return HookedModel.from_model(model, word_tokenizer(), [random_transcoder(n, width) for n in range(LAYERS)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SAME)
def test_models_that_are_what_the_algebra_says(name, dtype):
    model = hooked(build(name, dtype, **SAME[name]))
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OTHERS)
def test_half_precision_does_not_hide_it(name, dtype):
    model = hooked(build(name, dtype, **OTHERS[name]))
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is None


@pytest.mark.parametrize("size", [1, 30, 300])
def test_rounding_of_large_key_biases_is_not_taken_for_it(size):
    """As in Qwen2.5, where they reach hundreds: half precision then moves scores, and with them the pattern."""
    network = build("Qwen2", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for block in network.model.layers:
        block.self_attn.k_proj.bias.data = size * torch.randn(20, generator=generator).bfloat16()
        block.self_attn.q_proj.bias.data = torch.randn(40, generator=generator).bfloat16()
    model = hooked(network)
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is not None


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_something_else(name):
    """exact goes on by autograd; a rule that has no other way refuses."""
    model = hooked(build(name, **OTHERS[name]))
    assert (known_blocks(model.host) is None) == (name in ("SmolLM3", "Olmo"))  # the others' modules tell nothing
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is None
    options = {"max_nodes": 20, "sample": 0}
    found, truth = (trace(model, PROMPT, rule=rule, **options) for rule in ("exact", "autograd"))
    np.testing.assert_allclose(found.weight, truth.weight, rtol=0, atol=1e-5 * np.abs(truth.weight).max())
    for rule in ("affine", "half", "relp", "ig"):
        with pytest.raises(UserError, match=f"rule {rule} needs"):
            trace(model, PROMPT, rule=rule, **options)
    with pytest.raises(UserError, match="what a block computes"):
        trace(model, PROMPT, select_by="total", **options)


def test_a_window_matters_only_to_prompts_that_are_longer():
    model = hooked(build("Mistral", sliding_window=12))
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is not None
    longer = model.host.tokenize(f"{PROMPT} w1")
    assert stack_of(model.host, recorded(model, longer)) is None
    assert model.host.window() == 12


def test_the_verdict_is_of_a_prompt_that_is_long_enough():
    """Rotations hardly show in the first tokens: a short prompt that is reproduced settles nothing."""
    model = hooked(build("Qwen2"))
    short = recorded(model, model.host.tokenize("w1 w2 w3"))
    assert stack_of(model.host, short) is not None
    assert model.host not in _stack._REPRODUCED
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is not None
    assert _stack._REPRODUCED[model.host] is True


PARTS = ("W_Q", "W_K", "W_V", "W_O", "W_G", "W_U", "W_D", "g1", "g2", "b_Q", "b_K", "b_V", "q_norm", "k_norm")


@pytest.mark.parametrize("part", PARTS)
def test_any_part_that_is_off_by_a_third_is_noticed(part):
    model = hooked(build("Qwen3" if "norm" in part else "Qwen2"))
    for name, parameter in model.host.model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    recording = recorded(model, model.host.tokenize(PROMPT))
    stack = stack_of(model.host, recording)
    assert stack is not None
    assert reproduces(model.host, recording, stack)
    blocks = list(known_blocks(model.host))
    blocks[2] = _stack.replace(blocks[2], **{part: getattr(blocks[2], part) * 1.3})
    assert not reproduces(model.host, recording, _stack.record_stack(model.host, recording, tuple(blocks)))


def test_a_short_prompt_that_fails_settles_nothing_either():
    model = hooked(build("Helium"))
    assert stack_of(model.host, recorded(model, model.host.tokenize("w1 w2 w3"))) is None
    assert model.host not in _stack._REPRODUCED


def test_a_recording_older_than_an_edit_of_the_weights_does_not_settle_it():
    model = hooked(build("Qwen2"))
    old = recorded(model, model.host.tokenize(PROMPT))
    model.host.layers[1].mlp.up_proj.weight.mul_(3)
    stack_of(model.host, old)
    assert _stack._REPRODUCED[model.host] is True
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is not None


def test_recordings_of_two_models_are_not_mixed_up():
    one, two = hooked(build("Qwen2")), hooked(build("Llama"))
    recording = recorded(one, one.host.tokenize(PROMPT))
    first, second = stack_of(one.host, recording), stack_of(two.host, recording)
    assert first is not second


def test_parts_that_are_held_are_differentiated_as_they_are():
    model = hooked(build("Qwen2"))
    ids = model.host.tokenize(PROMPT)
    recording, clean = recorded(model, ids), record_held(model.host, model.host.batch([ids]))
    target = resolve_targets(model.host, recording.logits[0], Logit("w3", "w4"))
    free = RULES["exact"].gradients(model, recording, target, (EMBEDDING,))[EMBEDDING]
    with held(model.host, clean):
        assert stack_of(model.host, recording) is None
        frozen = RULES["exact"].gradients(model, recording, target, (EMBEDDING,))[EMBEDDING]
        truth = RULES["autograd"].gradients(model, recording, target, (EMBEDDING,))[EMBEDDING]
    assert torch.equal(frozen, truth)
    assert (frozen - free).abs().max() > 0.01 * free.abs().max()
    assert not model.host.held


# -- what is shared --------------------------------------------------------------------------------------------------


def test_blocks_are_recorded_once_per_graph_and_dropped_with_it(monkeypatch):
    model, made = hooked(build("Qwen2")), []
    real = _stack.record_stack

    def counted(*args):
        found = real(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(_stack, "record_stack", counted)
    for options in ({}, {"select_by": "total"}, {"select_by": "ose"}, {"rule": "ig"}):
        made.clear()
        trace(model, PROMPT, max_nodes=30, sample=10, **options)
        assert len(made) == 1
        gc.collect()
        assert made[0]() is None
    made.clear()
    setting = settle(model, PROMPT)
    assert setting.stack is made[0]()
    run = prepare(model, PROMPT, max_nodes=30)
    assert len(made) == 2
    assert made[1]() is None  # nobody holds it
    assert run.stack is made[2]()


# -- scores ----------------------------------------------------------------------------------------------------------

TARGETS = {
    "answer": None,
    "mass": Mass(mass=0.5),
    "places": [Logit("w3", "w4", pos=2), Logit("w5", "w6", pos=7), Logit("w1", "w2", pos=7)],
    "direction": [Direction([0.1 * n for n in range(40)], Site("resid_mid", 2), pos=p) for p in (3, 9)],
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("targets", TARGETS)
def test_exact_gradients_are_autograds(kind, targets):
    model = hooked(build(kind.capitalize(), torch.float64))
    recording = recorded(model, model.host.tokenize(PROMPT))
    resolved = resolve_targets(model.host, recording.logits[0], TARGETS[targets], store=model.store)
    last = 2 if targets == "direction" else LAYERS
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = (EMBEDDING, *(Site(name, layer) for layer in range(last) for name in names))
    found, truth = (RULES[rule].gradients(model, recording, resolved, sites) for rule in ("exact", "autograd"))
    assert found.keys() == truth.keys()
    size = max(float(gradient.abs().max()) for gradient in truth.values())
    assert size > 0
    for site, gradient in truth.items():  # transformers norms in fp32, whatever the model's dtype
        torch.testing.assert_close(found[site], gradient, rtol=0, atol=1e-6 * size)


def test_what_stands_above_the_targets_has_no_gradient():
    model = hooked(build("Qwen2"))
    recording = recorded(model, model.host.tokenize(PROMPT))
    target = Direction([1.0] * 40, Site("resid_pre", 2))
    resolved = resolve_targets(model.host, recording.logits[0], target)
    sites = (Site("resid_pre", 1), Site("resid_pre", 3))
    found = RULES["exact"].gradients(model, recording, resolved, sites)
    assert found[sites[0]].abs().max() > 0
    assert (found[sites[1]] == 0).all()


def test_half_precision_scores_are_nearer_to_the_truth_than_autograds():
    """Products are accumulated and handed on in fp32; autograd rounds every gradient to bf16."""
    model = hooked(build("Qwen2", torch.bfloat16))
    wide = hooked(build("Qwen2", torch.bfloat16).double())
    ids = model.host.tokenize(PROMPT)
    recording, exact = (recorded(m, ids) for m in (model, wide))
    target = resolve_targets(model.host, recording.logits[0], Logit("w3", "w4"))
    truth = RULES["autograd"].gradients(wide, exact, target, (EMBEDDING,))[EMBEDDING]
    found = [
        module.gradients(model, recording, target, (EMBEDDING,))[EMBEDDING] for module in (RULES["exact"], autograd)
    ]
    misses = [float((gradient.double() - truth).norm() / truth.norm()) for gradient in found]
    assert misses[0] < 0.05
    assert misses[0] < misses[1]
    assert score_features(model, recording, target).frame["score"].abs().max() > 0


# -- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_logits_are_the_models_own(dtype):
    network = build("Granite", dtype, logits_scaling=4.0)
    model = hooked(network)
    ids = model.host.tokenize(PROMPT)
    theirs = network(torch.tensor([ids])).logits[0]
    ours = model.host.forward(model.host.batch([ids]))[0]
    torch.testing.assert_close(ours.to(dtype), theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-2 * float(theirs.max()))
    hidden = model.host.forward_hidden(model.host.batch([ids]))[0]
    torch.testing.assert_close(model.host.unembed_rows(hidden, [3, 5]), ours[:, [3, 5]])
    assert not model.host.plain_logits


def test_capped_logits_are_the_models_own():
    """Gemma 2 is no model of ours for other reasons; its cap is."""
    network = build("Qwen2")
    network.config.final_logit_softcapping = 2.0
    host = Host(network, word_tokenizer())
    hidden = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    plain = hidden @ network.lm_head.weight.T
    torch.testing.assert_close(host.unembed(hidden), 2 * (plain / 2).tanh())


@pytest.mark.parametrize("name", ["Qwen2Moe", "Qwen3Moe"])
def test_models_of_experts_load(name):
    """Their own code asks the decoder for more than a stream. Edges go by autograd."""
    model = hooked(build(name, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    assert stack_of(model.host, recorded(model, model.host.tokenize(PROMPT))) is None
    assert trace(model, PROMPT, max_nodes=10, sample=0).n_edges > 0


def test_logits_made_in_an_unknown_way_are_refused():
    class Odd(transformers.Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 1.5 * out.logits
            return out

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="in a way that is not known"):
        hooked(Odd(transformers.Qwen2Config(**SHAPE)))


@pytest.mark.parametrize("name", ["Cohere", "Phi", "Olmo2", "Gemma2"])
def test_other_kinds_of_blocks_are_refused_in_words(name):
    with pytest.raises(UserError, match=r"post_attention_layernorm|is not pre \+ attention"):
        hooked(build(name))
