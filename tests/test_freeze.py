"""Held parts: the pass becomes the affine map that the block algebra transposes, and the model comes back as it was."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_blocks import frozen_forward, full_gradient
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from worlds import ARCHITECTURES, WORDS, word_tokenizer

from circuits.blocks import Rule, pull_back, read_block, record_block
from hooks import UserError
from hooks.generation import generate
from hooks.generation.decoding import Sampling
from hooks.host import Host, tap
from hooks.host.frozen_parts import PARTS, Held, held, record_held
from hooks.sites import Site
from hooks.types import Edit

LAYERS, WIDTH = 3, 24
TEXT = "w1 w2 w3 w4 w5 w6 w7"
SUBSETS = [parts for size in range(4) for parts in itertools.combinations(PARTS, size)]


def make_host(kind: str, dtype=torch.float64, attention: str = "sdpa", exact: bool = False, **options) -> Host:
    """A random model with grouped queries, biases and gains that are not trivial.

    exact: norms in the precision of the model. transformers rounds to fp32 inside, which hides laws below 1e-7.
    """
    make_config, make_model = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=36, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention, **options,
    )  # fmt: skip
    model = make_model(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if exact and hasattr(module, "variance_epsilon"):
            module.forward = partial(exact_norm, module)
    return Host(model, word_tokenizer())


def exact_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.fixture(params=ARCHITECTURES)
def kind(request) -> str:
    return request.param


def shift(site: Site, by: torch.Tensor) -> Edit:
    return Edit(site, lambda x, at: x + by)


def pre(layer: int) -> Site:
    return Site("resid_post", layer - 1) if layer == LAYERS else Site("resid_pre", layer)


def streams(host: Host, batch, edits=()) -> dict[Site | str, torch.Tensor]:
    """The logits, and every residual from block 0's middle on."""
    seen: dict = {}
    sites = [Site("resid_mid", layer) for layer in range(LAYERS)] + [pre(layer) for layer in range(1, LAYERS + 1)]
    logits = host.forward(batch, [*edits, *(tap(site, seen) for site in sites)])
    return seen | {"logits": logits}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_recording_pass_is_the_plain_one_bit_for_bit(kind, dtype, attention):
    host = make_host(kind, dtype, attention)
    batch, outputs = host.batch([TEXT]), []
    handle = host.decoder.register_forward_hook(lambda _, args, output: outputs.append(output.last_hidden_state))
    host.forward(batch)
    clean = record_held(host, batch)
    handle.remove()
    assert torch.equal(*outputs)
    heads = 2 * LAYERS if kind == "qwen3" else 0
    assert (len(clean.patterns), len(clean.inverse_rms), len(clean.gates)) == (LAYERS, 2 * LAYERS + 1 + heads, LAYERS)
    assert {p.dtype for p in (*clean.patterns.values(), *clean.gates.values())} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {s.dtype for s in clean.inverse_rms.values()} == {wide}


@pytest.mark.parametrize("window", [None, 3])
def test_patterns_are_those_of_transformers(kind, window):
    """Under SDPA the pattern is computed beside it; transformers' eager attention returns its own, here as the truth.
    It takes the softmax in fp32, hence the tolerance."""
    if window and kind == "llama":
        pytest.skip("llama has no sliding window")
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    host, other = (make_host(kind, attention=name, exact=True, **options) for name in ("sdpa", "eager"))
    batch = host.batch([TEXT] if window else [TEXT, "w9 w8 w7"])
    mask = None if window else batch.mask.long()
    truth = other.model(batch.ids, attention_mask=mask, output_attentions=True).attentions
    clean = record_held(host, batch, {"attention"})
    for row, length in enumerate(batch.lengths):
        for layer in range(LAYERS):
            ours = clean.patterns[f"layers.{layer}.self_attn"][row, :, :length]
            torch.testing.assert_close(ours, truth[layer][row, :, :length], rtol=0, atol=1e-6)
    assert (clean.patterns["layers.0.self_attn"][0, :, 6, : 4 if window else 0] == 0).all()


def test_padding_that_may_attend_to_nothing_does_not_spoil_the_rest():
    """Behind a short prompt a sliding window holds padding only. SDPA gives zeros there (transformers' eager attention
    in fp64 gives NaN, for the real tokens of that row too)."""
    host = make_host("qwen2", exact=True, use_sliding_window=True, sliding_window=3, max_window_layers=0)
    batch = host.batch([TEXT, "w9 w8 w7"])
    plain, clean = host.forward(batch), record_held(host, batch)
    assert (clean.patterns["layers.0.self_attn"][1, :, 6] == 0).all()
    with held(host, clean):
        torch.testing.assert_close(host.forward(batch), plain, rtol=1e-10, atol=1e-10)


def test_eager_patterns_are_taken_as_they_are(kind):
    host = make_host(kind, torch.float32, "eager")
    batch = host.batch([TEXT])
    truth = host.model(batch.ids, output_attentions=True).attentions
    clean = record_held(host, batch, {"attention"})
    for layer in range(LAYERS):
        assert torch.equal(clean.patterns[f"layers.{layer}.self_attn"], truth[layer])


def test_norms_and_gates_are_what_the_definition_says(kind):
    host = make_host(kind, exact=True)
    batch = host.batch([TEXT])
    clean, seen = record_held(host, batch, {"norms", "gates"}), streams(host, batch)
    mid, last = seen[Site("resid_mid", 1)], seen[pre(LAYERS)]
    for name, x in (("layers.1.post_attention_layernorm", mid), ("norm", last)):
        torch.testing.assert_close(clean.inverse_rms[name], (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5)
    block = host.layers[1]
    z_g = exact_norm(block.post_attention_layernorm, mid) @ block.mlp.gate_proj.weight.T
    torch.testing.assert_close(clean.gates["layers.1.mlp.act_fn"], z_g / (1 + (-z_g).exp()))
    assert not clean.patterns


# -- nothing edited --------------------------------------------------------------------------------------------------


TOLERANCE = {  # of logits up to 4
    torch.float64: 5e-6,  # transformers' norms round the stream to fp32; held ones do not
    torch.float32: 2e-5,  # SDPA and the explicit product sum in another order
    torch.bfloat16: 0.1,  # the pattern is rounded to bf16 before it meets the values; SDPA keeps it in fp32
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_edited_nothing_changes(kind, dtype, attention):
    host = make_host(kind, dtype, attention)
    batch = host.batch([TEXT])
    plain = host.forward(batch)
    with held(host, record_held(host, batch)):
        torch.testing.assert_close(host.forward(batch), plain, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(), ("norms",), ("gates",), ("norms", "gates")])
def test_without_attention_nothing_edited_is_bit_for_bit_the_plain_run(kind, dtype, parts):
    """The held norm rounds where transformers' norm rounds, and a held gate is the very tensor."""
    host = make_host(kind, dtype)
    batch = host.batch([TEXT])
    plain = host.forward(batch)
    with held(host, record_held(host, batch, parts)):
        assert torch.equal(host.forward(batch), plain)


def test_prompts_of_one_token_and_padded_batches(kind):
    host = make_host(kind, torch.float32)
    batch = host.batch(["w5", TEXT, "w9 w8 w7"])
    plain, single = host.forward(batch), host.batch(["w5"])
    with held(host, record_held(host, batch)):
        both = host.forward(batch)
    for row, length in enumerate(batch.lengths):
        torch.testing.assert_close(both[row, :length], plain[row, :length], rtol=0, atol=2e-5)
    with held(host, record_held(host, single)):
        torch.testing.assert_close(host.forward(single), plain[:1, :1], rtol=0, atol=2e-5)


def test_clean_values_serve_every_row(kind):
    """Rows of other lengths of matrices are summed in another order, hence 1e-12 and not equality."""
    host = make_host(kind)
    batch = host.batch([TEXT])
    delta = noise(3, 5, 7, WIDTH)
    with held(host, record_held(host, batch)):
        together = host.forward(batch.rows([0] * 5), [shift(pre(1), delta)])
        alone = [host.forward(batch, [shift(pre(1), delta[row])]) for row in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


# -- what is held, and nothing else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
def test_with_all_parts_held_later_residuals_are_affine_in_every_edit(kind, layer):
    host = make_host(kind)
    batch = host.batch([TEXT])
    first, second = shift(pre(layer), noise(1, 7, WIDTH)), shift(Site("resid_mid", layer), noise(2, 7, WIDTH))
    with held(host, record_held(host, batch)):
        base, one, two, other, both = (
            streams(host, batch, edits) for edits in ([], [first], [first, first], [second], [first, second])
        )
    for site in base:
        if isinstance(site, Site) and site.depth <= (layer, 2):
            continue
        step = one[site] - base[site]
        scale = float(step.abs().max())
        assert scale > 0.1
        torch.testing.assert_close(two[site] - one[site], step, rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(both[site] - base[site], step + other[site] - base[site], rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("parts", SUBSETS[:-1], ids="+".join)
def test_the_affine_law_can_fail(kind, parts):
    host = make_host(kind)
    batch = host.batch([TEXT])
    edit = shift(pre(0), noise(1, 7, WIDTH))
    with held(host, record_held(host, batch, parts)):
        base, one, two = (host.forward(batch, edits) for edits in ([], [edit], [edit, edit]))
    assert ((two - one) - (one - base)).abs().max() > 1e-2 * (one - base).abs().max()


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_each_part_is_held_alone_and_the_others_stay_live(kind, parts):
    """Against the block written out with its parts held or live (tests/test_blocks.py), for a large edit."""
    host = make_host(kind, exact=True)
    batch, layer = host.batch([TEXT]), 1
    _, seen = host.capture(batch, [pre(layer)])
    x = seen[pre(layer)][0]
    w, (cos, sin) = rotation(host, layer, x)
    record = record_block(w, x, cos, sin)
    delta = 2 * noise(1, 7, WIDTH)
    out: dict = {}
    with held(host, record_held(host, batch, parts)):
        host.forward(batch, [shift(pre(layer), delta), tap(pre(layer + 1), out)])
    modes = ["frozen" if part in parts else "exact" for part in ("norms", "attention", "gates")]
    if kind == "qwen3" and modes[:2] == ["frozen", "exact"]:  # the written-out block keeps head norms live
        record, modes[1] = replace(record, pattern=pattern_with_head_norms_held(w, record, x + delta)), "frozen"
    truth = frozen_forward(w, record, x + delta, cos, sin, Rule(*modes))
    torch.testing.assert_close(out[pre(layer + 1)][0], truth, rtol=1e-10, atol=1e-10)


def pattern_with_head_norms_held(w, record, x) -> torch.Tensor:
    n1 = w.g1 * x * record.s1

    def head(weight, gamma, scale):
        raw = gamma * (n1 @ weight.T).unflatten(-1, (-1, w.d_head)) * scale
        first, second = raw.chunk(2, dim=-1)
        return raw * record.cos[:, None] + torch.cat([-second, first], dim=-1) * record.sin[:, None]

    q, k = head(w.W_Q, w.q_norm, record.q.scale), head(w.W_K, w.k_norm, record.k.scale)
    scores = torch.einsum("tkgh,skh->kgts", q.unflatten(1, (w.n_kv, w.group)), k) / w.d_head**0.5
    return (scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)).softmax(-1)


def rotation(host: Host, layer: int, x: torch.Tensor):
    cos, sin = host.decoder.rotary_emb(x[None], torch.arange(len(x))[None])
    return read_block(host.model, layer), (cos[0], sin[0])


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_change_one_block_later_is_the_transpose_of_the_affine_rule(kind, layer):
    """<u, J δ> = <Jᵀ u, δ>: J measured in the held model, Jᵀ from the block algebra. Both are fp64 throughout: the
    plain norms are exact here, and the rotation's cosines, which transformers computes in fp32, are the same."""
    host, rule = make_host(kind, exact=True), Rule("frozen", "frozen", "frozen")
    batch = host.batch([TEXT])
    _, seen = host.capture(batch, [pre(layer)])
    x = seen[pre(layer)][0]
    w, (cos, sin) = rotation(host, layer, x)
    record = record_block(w, x, cos, sin)
    u, pos = noise(4, 5, WIDTH), torch.tensor([0, 2, 6, 6, 3])
    transposed = full_gradient(w, record, pull_back(w, record, u, pos, rule), rule)
    with held(host, record_held(host, batch)):
        base = streams(host, batch)[pre(layer + 1)][0]
        for seed in range(4):
            delta = noise(10 + seed, 7, WIDTH)
            change = streams(host, batch, [shift(pre(layer), delta)])[pre(layer + 1)][0] - base
            torch.testing.assert_close(
                (u * change[pos]).sum(-1), (transposed * delta).sum((1, 2)), rtol=1e-9, atol=1e-9
            )


def test_the_final_norm_is_held_too(kind):
    host = make_host(kind, exact=True)
    batch = host.batch([TEXT])
    last, clean, delta = pre(LAYERS), record_held(host, batch, {"norms"}), noise(1, 7, WIDTH)
    _, seen = host.capture(batch, [last])
    with held(host, clean):
        logits = host.forward(batch, [shift(last, delta)])
    scale = torch.rsqrt(seen[last].square().mean(-1, keepdim=True) + 1e-5)
    normed = host.decoder.norm.weight * (seen[last] + delta) * scale
    torch.testing.assert_close(logits, normed @ host.model.lm_head.weight.T, rtol=1e-10, atol=1e-10)


def test_frozen_gradients_do_not_depend_on_the_tokens_and_predict_exactly(kind):
    host = make_host(kind)
    batch, others = host.batch([TEXT]), host.batch(["w20 w19 w18 w17 w16 w15 w14"])
    delta = noise(1, 7, WIDTH)
    with held(host, record_held(host, batch)):
        gradient, other = (gradient_of(host, rows) for rows in (batch, others))
        change = host.forward(batch, [shift(pre(0), delta)]) - host.forward(batch)
    torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(change[0, -1, 7], (gradient * delta).sum(), rtol=1e-9, atol=1e-9)
    assert (gradient_of(host, batch) - gradient_of(host, others)).abs().max() > 1e-2 * gradient.abs().max()


def gradient_of(host: Host, batch) -> torch.Tensor:
    leaf = torch.zeros(7, WIDTH, dtype=torch.float64, requires_grad=True)
    logits = host.forward_with_gradients(batch, [shift(pre(0), leaf)])
    return torch.autograd.grad(logits[0, -1, 7], leaf)[0]


def test_parts_recorded_apart_can_be_held_one_in_the_other(kind):
    host = make_host(kind)
    batch = host.batch([TEXT])
    edit = shift(pre(0), noise(1, 7, WIDTH))
    with held(host, record_held(host, batch)):
        together = host.forward(batch, [edit])
    apart = [record_held(host, batch, {part}) for part in PARTS]
    with held(host, apart[0]), held(host, apart[1]), held(host, apart[2]):
        nested = host.forward(batch, [edit])
    assert torch.equal(nested, together)


# -- the model comes back --------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module by identity, hooks included, and the config."""
    own = {
        f"{name}.{key}": id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.endswith("_hooks")
    }
    hooks = {
        f"{name}.{key}": list(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks") and value
    }
    return own | hooks | {f"config.{key}": repr(value) for key, value in vars(model.config).items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exact", [False, True], ids=["own forward", "forward of the instance"])
def test_the_model_is_as_before_whatever_happens(kind, attention, exact):
    host = make_host(kind, torch.float32, attention, exact)
    batch = host.batch([TEXT])
    plain, before = host.forward(batch), state_of(host.model)

    def fail(x, at):
        raise RuntimeError("inside")

    clean = record_held(host, batch)
    assert state_of(host.model) == before
    with held(host, clean):
        assert state_of(host.model) != before
        host.forward(batch.rows([0, 0]), [shift(pre(1), torch.ones(WIDTH))])
    assert state_of(host.model) == before
    with pytest.raises(RuntimeError, match="inside"), held(host, clean):
        host.forward(batch, [Edit(pre(1), fail)])
    assert state_of(host.model) == before
    lacking = Held(batch, clean.patterns, clean.inverse_rms | {"layers.9.nothing": clean.inverse_rms["norm"]}, {})
    with pytest.raises(AttributeError), held(host, lacking):
        pass
    assert state_of(host.model) == before
    assert torch.equal(host.forward(batch), plain)
    assert host.model.config._attn_implementation == attention


def test_a_failed_recording_leaves_nothing(kind):
    host = make_host(kind, torch.float32)
    before = state_of(host.model)
    with pytest.raises(IndexError):
        record_held(host, replace_ids(host.batch([TEXT]), 10**6))
    assert state_of(host.model) == before


def replace_ids(batch, token: int):
    return type(batch)(torch.full_like(batch.ids, token), batch.lengths, batch.strings)


def test_another_model_with_the_same_config_stays_live(kind):
    """The name in the config is switched; a model that shares the config must not notice."""
    host, other = make_host(kind), make_host(kind)
    for module in other.model.modules():
        if hasattr(module, "config"):
            module.config = host.model.config
    batch = host.batch([TEXT])
    edit = shift(pre(0), noise(1, 7, WIDTH))
    plain = other.forward(batch, [edit])
    with held(host, record_held(host, batch)):
        assert torch.equal(other.forward(batch, [edit]), plain)
        assert not torch.allclose(host.forward(batch, [edit]), plain)


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_is_held_the_same_way(kind):
    """accelerate keeps weights on the meta device between uses and puts a forward of its own in front."""
    accelerate = pytest.importorskip("accelerate")
    host, moved = make_host(kind), make_host(kind)
    accelerate.cpu_offload(moved.model, execution_device=torch.device("cpu"))
    batch = host.batch([TEXT])
    edit = shift(pre(0), noise(1, 7, WIDTH))
    logits = []
    for one in (host, moved):
        with held(one, record_held(one, batch)):
            logits.append(one.forward(batch, [edit]))
    assert torch.equal(*logits)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_parts_are_refused():
    host = make_host("qwen2", torch.float32)
    with pytest.raises(UserError, match=r"unknown part 'mlp'(.|\n)*attention or norms or gates"):
        record_held(host, host.batch([TEXT]), {"mlp"})


def small(**options):
    return {
        "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    } | options  # fmt: skip


def test_other_architectures_are_refused_part_by_part():
    mistral = Host(MistralForCausalLM(MistralConfig(**small())), word_tokenizer())
    for part in PARTS:
        with pytest.raises(UserError, match=rf"the {part} of MistralForCausalLM cannot be held(.|\n)*is a Mistral"):
            record_held(mistral, mistral.batch([TEXT]), {part})
    host = make_host("qwen2", torch.float32)
    del host.layers[1].mlp.act_fn
    host.layers[1].mlp.act_fn = torch.nn.functional.silu  # a function cannot be watched
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.act_fn is missing, or shared"):
        record_held(host, host.batch([TEXT]), {"gates"})
    shared = make_host("qwen2", torch.float32)
    shared.layers[1].mlp.act_fn = shared.layers[0].mlp.act_fn  # what one layer is held at, the other would be too
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.act_fn is missing, or shared"):
        record_held(shared, shared.batch([TEXT]), {"gates"})


def test_any_gate_activation_can_be_held():
    config = Qwen2Config(**small(hidden_act="gelu", num_hidden_layers=LAYERS, hidden_size=WIDTH))
    host = Host(Qwen2ForCausalLM(config).double(), word_tokenizer())
    batch, edit = host.batch([TEXT]), shift(pre(0), noise(1, 7, WIDTH))
    with held(host, record_held(host, batch)):
        base, one, two = (host.forward(batch, edits) for edits in ([], [edit], [edit, edit]))
    torch.testing.assert_close(two - one, one - base, rtol=0, atol=1e-10)


def test_attention_that_is_of_another_kind_or_held_already_is_refused():
    host = make_host("qwen2", torch.float32)
    batch = host.batch([TEXT])
    clean = record_held(host, batch)
    with held(host, clean), pytest.raises(UserError, match="'held_sdpa' cannot be held"), held(host, clean):
        pass
    host.model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="sdpa or eager"):
        record_held(host, batch)


@pytest.mark.parametrize("part", PARTS)
def test_a_pass_of_another_shape_is_refused(part):
    host = make_host("qwen2", torch.float32)
    batch = host.batch([TEXT])
    with held(host, record_held(host, batch, {part})):
        with pytest.raises(UserError, match="1 × 7 tokens are held, and the pass has 2 × 3"):
            host.forward(host.batch(["w1 w2 w3"] * 2))
        with pytest.raises(UserError, match="the pass has 1 × 1"):
            generate(host, batch, [], max_new_tokens=2, sampling=Sampling())
    with (
        held(host, record_held(host, batch.rows([0, 0]), {part})),
        pytest.raises(UserError, match="2 × 7 tokens are held, and the pass has 3 × 7"),
    ):
        host.forward(batch.rows([0] * 3))
