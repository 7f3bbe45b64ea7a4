"""Encoders of every kind against dense formulas written here; skip connections in everything that replaces a site."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import CONSERVING, same_edges
from torch import Tensor
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from circuits.attribution import RULES
from circuits.edges.metric_ends import encoder_bias, encoder_gradient, encoder_value
from hooks import Ablate, Clamp, HookedModel, Site, UserError
from hooks.transcoder import Transcoder

D, FEATURES = 40, 96
TEXT = "w1 w2 w3 w4 w5"
KINDS = ["layernorm", "rms", "shift", "plain", "jumprelu", "groupmax", "relu", "skip", "skip behind rms"]


def coder_of(kind: str, layer: int = 1, dtype=torch.float64, **options) -> Transcoder:
    coder = random_transcoder(layer, D, FEATURES, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    bare = {"norm_weight": None, "norm_bias": None}
    changes = {
        "layernorm": {},
        "rms": {"norm_centred": False, "norm_bias": None},
        "shift": {**bare, "shift": normal(D)},
        "plain": bare,
        "jumprelu": {"k": None, "threshold": normal(FEATURES).abs()},
        "groupmax": {"k": None, "groups": 12},
        "relu": {"k": None},
        "skip": {**bare, "W_skip": normal(D, D) / 10},
        "skip behind rms": {"norm_centred": False, "norm_bias": None, "W_skip": normal(D, D) / 10},
    }
    return replace(coder, **changes[kind])


def dense(kind: str, t: Transcoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstruction, by the formulas of the formats' own programs."""
    seen = x
    if kind in ("layernorm", "jumprelu", "groupmax", "relu"):
        centred = x - x.mean(-1, keepdim=True)
        seen = centred / (centred.square().mean(-1, keepdim=True) + t.norm_eps).sqrt() * t.norm_weight + t.norm_bias
    elif "rms" in kind:
        seen = x / (x.square().mean(-1, keepdim=True) + t.norm_eps).sqrt() * t.norm_weight
    elif kind == "shift":
        seen = x - t.shift
    pre = seen @ t.W_enc.T + t.b_enc
    if kind == "jumprelu":
        acts = pre.relu() * (pre > t.threshold)
    elif kind == "groupmax":
        best = pre.unflatten(-1, (12, -1))
        acts = (best * F.one_hot(best.argmax(-1), best.shape[-1])).flatten(-2).relu()
    elif kind == "relu":
        acts = pre.relu()
    else:
        top = pre.topk(t.k, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    out = acts @ t.W_dec + t.b_dec
    return acts, out + seen @ t.W_skip.T if t.W_skip is not None else out


def stream(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstructions(kind):
    t, x = coder_of(kind), stream(2, 5)
    acts = t.encode(x)
    expected, rebuilt = dense(kind, t, x)
    torch.testing.assert_close(acts.dense(FEATURES), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(t.reconstruct(acts, x), rebuilt, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(t.error(acts, x, x), x - rebuilt, atol=1e-12, rtol=1e-12)


@given(
    seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), tokens=st.integers(1, 3), scale=st.sampled_from([0, 1])
)
@settings(max_examples=60)
def test_single_activations_are_those_of_the_selection(seed, kind, tokens, scale):
    """Also where nothing is encoded, because no named feature can be active."""
    t, x = coder_of(kind, dtype=torch.float32), scale * stream(tokens, seed=seed).float()
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(tokens, (tokens,), generator=generator)
    feature = torch.randint(FEATURES, (tokens,), generator=generator)
    expected = t.encode(x).dense(FEATURES)[token, feature]
    assert torch.equal(t.activations_at(x, token, feature), expected)


def test_what_cannot_be_active_is_not_encoded(monkeypatch):
    t, x = coder_of("layernorm", dtype=torch.float32), stream(1).float()
    pre = t.preactivations(x)[0]
    monkeypatch.setattr("hooks.transcoder.linear_fp32", lambda *given: pytest.fail("encoded"))
    assert t.activations_at(x, torch.tensor([0]), pre.argmin()[None]).tolist() == [0]
    with pytest.raises(pytest.fail.Exception):
        t.activations_at(x, torch.tensor([0]), pre.argmax()[None])


def test_a_stream_that_is_no_number_is_seen_all_the_same():
    t, x = coder_of("layernorm", dtype=torch.float32), stream(1).float()
    x[0, 3] = float("nan")
    with pytest.raises(UserError, match="not a number"):
        t.activations_at(x, torch.tensor([0]), torch.tensor([5]))


@pytest.mark.parametrize("kind", ["rms", "shift", "plain", "layernorm"])
def test_the_encoder_row_seen_by_attribution(kind):
    """Value plus bias is the pre-activation; the exact rule's gradient is autograd's."""
    t, x = coder_of(kind), stream(6).requires_grad_()
    feature = torch.arange(6)
    pre = t.preactivations(x)[torch.arange(6), feature]
    rows = t.W_enc[feature]
    torch.testing.assert_close(encoder_value(t, rows, x) + encoder_bias(t, feature), pre, atol=1e-12, rtol=1e-12)
    (slow,) = torch.autograd.grad(pre.sum(), x)
    torch.testing.assert_close(encoder_gradient(t, rows, x.detach(), RULES["exact"].RULE), slow, atol=1e-12, rtol=1e-12)


def hooked(kind: str, *, mlp: bool = False) -> HookedModel:
    sites = [(Site("mlp_in", n), Site("mlp_out", n)) if mlp else (Site("resid_pre", n),) * 2 for n in range(4)]
    coders = [coder_of(kind, n, torch.float32, read=read, write=write) for n, (read, write) in enumerate(sites)]
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_a_site_puts_the_dense_reconstruction_there(kind):
    """`zero`: exactly the formula's output; `frozen` with nothing changed: what was there."""
    model = hooked(kind, mlp=True)
    record = model.record(TEXT).layers[1]
    _, rebuilt = dense(kind, model.store[1], record.read.float())
    torch.testing.assert_close(record.reconstruction, rebuilt, atol=1e-4, rtol=1e-4)  # fp32, two orders of summation
    clean, frozen, zero = (model.run(TEXT, swap=[1], error=mode).logits for mode in ("live", "frozen", "zero"))
    torch.testing.assert_close(frozen, clean, atol=1e-4, rtol=1e-4)
    assert (zero - clean).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["jumprelu", "groupmax", "shift", "rms", "skip"])
def test_generation_with_and_without_cache_agrees(kind):
    model = hooked(kind, mlp=True)
    options = {"interventions": [Clamp("L1/3", 4.0), Ablate("L2/5")], "max_new_tokens": 5, "swap": [1], "error": "zero"}
    assert model.generate(TEXT, **options).ids == model.generate(TEXT, use_cache=False, **options).ids


@pytest.mark.parametrize("kind", ["jumprelu", "groupmax", "shift", "rms"])
def test_graphs_are_right(kind):
    """The factored exact rule is autograd, and a conserving rule conserves."""
    model = hooked(kind)
    same_edges(model, TEXT, max_nodes=40)
    graph = trace(model, TEXT, rule=CONSERVING[0], sample=0, max_nodes=40)
    assert graph.meta["conservation"]["max_rel_error"] <= 1e-5


def test_a_skip_connection_is_refused_by_trace():
    with pytest.raises(UserError, match="skip connection"):
        trace(hooked("skip", mlp=True), TEXT)
