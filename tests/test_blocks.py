"""The block algebra: the same numbers as transformers, and transposed products equal to autograd's, to fp64."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu
from transformers import Qwen2Config, Qwen2ForCausalLM
from worlds import ARCHITECTURES

from circuits.blocks import BLOCKS, Rule, pull_back, read_block, record_block
from circuits.blocks._algebra import norm_transposed

EXACT = Rule("exact", "exact", "exact")
LENGTH, LAYER = 7, 1


@pytest.fixture(scope="module", params=ARCHITECTURES)
def block(request):
    """A random fp64 block with grouped queries, biases and gains that are not trivial; its weights and an input."""
    make_config, make_model = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=11, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, initializer_range=0.2,
    )  # fmt: skip
    model = make_model(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert [name for name, module in BLOCKS.items() if module.matches(model)] == [request.param]
    x = torch.randn(LENGTH, 24, dtype=torch.float64) * 2
    cos, sin = model.model.rotary_emb(x[None], torch.arange(LENGTH)[None])
    return model, read_block(model, LAYER), x, cos[0].double(), sin[0].double()


def full_gradient(w, record, pulled, rule) -> torch.Tensor:
    """The factored form multiplied out: [target pos d_model]."""
    on_n1 = pulled.v_bar() @ w.W_V
    if pulled.k_bar() is not None:
        on_n1 = on_n1 + pulled.k_bar() @ w.W_K
        rows = torch.arange(len(pulled.pos))
        on_n1 = on_n1.index_put((rows, pulled.pos), pulled.q_bar @ w.W_Q, accumulate=True)
    out = norm_transposed(on_n1, w.g1, record.x, record.s1, rule)
    rows = torch.arange(len(pulled.pos))
    return out.index_put((rows, pulled.pos), pulled.direct, accumulate=True)


def test_the_block_computes_what_transformers_computes(block):
    """transformers casts norms and rotations to fp32 inside, hence the tolerance."""
    model, w, x, cos, sin = block
    theirs = model.model.layers[LAYER](x[None], position_embeddings=(cos[None], sin[None]))[0]
    torch.testing.assert_close(record_block(w, x, cos, sin).y, theirs, rtol=1e-5, atol=1e-5)


def targets(seed: int = 1):
    torch.manual_seed(seed)
    return torch.randn(5, 24, dtype=torch.float64), torch.tensor([0, 2, 6, 6, 3])


def test_the_exact_rule_is_autograd(block):
    _, w, x, cos, sin = block
    u, pos = targets()
    record = record_block(w, x, cos, sin)
    ours = full_gradient(w, record, pull_back(w, record, u, pos, EXACT), EXACT)
    leaf = x.clone().requires_grad_()
    y = record_block(w, leaf, cos, sin).y
    for row in range(len(u)):
        (theirs,) = torch.autograd.grad(u[row] @ y[pos[row]], leaf, retain_graph=True)
        torch.testing.assert_close(ours[row], theirs, rtol=1e-9, atol=1e-11)


def test_the_exact_rule_is_the_central_difference(block):
    _, w, x, cos, sin = block
    u, pos = targets()
    record = record_block(w, x, cos, sin)
    ours = full_gradient(w, record, pull_back(w, record, u, pos, EXACT), EXACT)
    step = 1e-5
    for seed in range(3):
        torch.manual_seed(seed)
        way = torch.randn_like(x)
        up, down = (record_block(w, x + sign * step * way, cos, sin).y for sign in (1, -1))
        measured = ((up - down)[pos] * u).sum(-1) / (2 * step)
        torch.testing.assert_close((ours * way).sum((1, 2)), measured, rtol=1e-6, atol=1e-8)


def live_pattern(w, record, n1, cos, sin, rule) -> torch.Tensor:
    """softmax(q k / sqrt(d_head)) from normed input, written out: [n_kv group query_pos pos]."""

    def head(weight, bias, gamma, held):
        raw = (n1 @ weight.T + (0 if bias is None else bias)).view(len(n1), -1, w.d_head)
        if gamma is not None:
            live = torch.rsqrt(raw.square().mean(-1, keepdim=True) + w.eps)
            raw = gamma * raw * (held if rule.norms == "frozen" else live)
        turned = torch.cat([-raw[..., w.d_head // 2 :], raw[..., : w.d_head // 2]], dim=-1)
        return raw * cos[:, None] + turned * sin[:, None]

    q = head(w.W_Q, w.b_Q, w.q_norm, record.q.scale).view(len(n1), w.n_kv, w.group, w.d_head)
    scores = torch.einsum("tkgh,skh->kgts", q, head(w.W_K, w.b_K, w.k_norm, record.k.scale)) / w.d_head**0.5
    causal = torch.ones(len(n1), len(n1), dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def frozen_forward(w, record, x, cos, sin, rule) -> torch.Tensor:
    """The block with everything the rule freezes held at its recorded value: an affine or bilinear map of x."""
    s1 = record.s1 if rule.norms == "frozen" else torch.rsqrt(x.square().mean(-1, keepdim=True) + w.eps)
    n1 = w.g1 * x * s1
    v = (n1 @ w.W_V.T + (0 if w.b_V is None else w.b_V)).view(len(x), w.n_kv, w.d_head)
    pattern = record.pattern if rule.attention == "frozen" else live_pattern(w, record, n1, cos, sin, rule)
    z = torch.einsum("kgts,skh->tkgh", pattern, v).reshape(len(x), -1)
    x_mid = x + z @ w.W_O.T
    s2 = record.s2 if rule.norms == "frozen" else torch.rsqrt(x_mid.square().mean(-1, keepdim=True) + w.eps)
    n2 = w.g2 * x_mid * s2
    z_g, z_u = n2 @ w.W_G.T, n2 @ w.W_U.T
    if rule.gate == "frozen":
        hidden = silu(record.z_g) * z_u
    elif rule.gate == "half":
        product = z_g * torch.sigmoid(record.z_g) * z_u
        hidden = product / 2 + (product / 2).detach()
    else:
        hidden = silu(z_g) * z_u
    return x_mid + hidden @ w.W_D.T


@pytest.mark.parametrize("gate", ["exact", "half", "frozen"])
@pytest.mark.parametrize("attention", ["exact", "frozen"])
@pytest.mark.parametrize("norms", ["exact", "frozen"])
def test_every_rule_is_autograd_of_the_block_with_its_parts_held(block, norms, attention, gate):
    _, w, x, cos, sin = block
    rule = Rule(norms, attention, gate)
    u, pos = targets()
    record = record_block(w, x, cos, sin)
    ours = full_gradient(w, record, pull_back(w, record, u, pos, rule), rule)
    leaf = x.clone().requires_grad_()
    y = frozen_forward(w, record, leaf, cos, sin, rule)
    for row in range(len(u)):
        (theirs,) = torch.autograd.grad(u[row] @ y[pos[row]], leaf, retain_graph=True)
        torch.testing.assert_close(ours[row], theirs, rtol=1e-9, atol=1e-11)


def test_nothing_flows_from_later_positions(block):
    _, w, x, cos, sin = block
    u, pos = targets()
    record = record_block(w, x, cos, sin)
    ours = full_gradient(w, record, pull_back(w, record, u, pos, EXACT), EXACT)
    for row, t in enumerate(pos.tolist()):
        assert (ours[row, t + 1 :] == 0).all()


def test_the_gradient_behind_the_first_norm_is_orthogonal_to_the_stream(block):
    """Euler: scaling x leaves n1 alone (up to eps), so the part of the gradient behind the norm is zero along x."""
    _, w, x, cos, sin = block
    w = replace(w, eps=0.0)
    u, pos = targets()
    record = record_block(w, x, cos, sin)
    pulled = pull_back(w, record, u, pos, EXACT)
    behind = full_gradient(w, record, replace(pulled, direct=torch.zeros_like(pulled.direct)), EXACT)
    along = (behind * x).sum(-1).abs()
    assert along.max() < 1e-12 * behind.abs().max()


def test_other_architectures_are_not_mistaken_for_these():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, hidden_act="gelu")
    )  # fmt: skip
    assert read_block(model, 0) is None
    with pytest.raises(ValueError, match=r"no model\.layers"):
        read_block(GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2)), 0)
