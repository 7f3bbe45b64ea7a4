"""A pre-norm block with rotary grouped-query attention and SwiGLU: its forward pass and its transposed products.

    n1 = g1 · x · s1                        s1 = 1 / rms(x)
    q, k, v = R(W_Q n1 + b_Q), R(W_K n1 + b_K), W_V n1 + b_V          (Qwen3: q and k normed per head before R)
    z_h[t] = sum_s A_h[t,s] v_s             A = softmax(q k / sqrt(d_head)), causal
    x_mid = x + W_O z
    n2 = g2 · x_mid · s2
    y = x_mid + W_D (silu(z_g) · z_u)       z_g, z_u = W_G n2, W_U n2

A gradient u with respect to y at *one* position t' is pulled back in two steps. The MLP and the second norm act only at
t' and give g_mid. Only values and keys connect t' with other positions, so the gradient there is represented by two
small vectors per position, v̄_t and k̄_t (n_kv · d_head numbers each), and by q̄ at t':

    p = W_Oᵀ g_mid        a_hs = p_h · v_s        s̄_hs = A_hs (a_hs − sum_r A_hr a_hr) / sqrt(d_head)
    v̄_s = sum_h A_hs p_h      k̄_s = R_sᵀ sum_h s̄_hs q_h      q̄_h = R_t'ᵀ sum_s s̄_hs k_s

The gradient at position t is then  [t = t'] g_mid + N1ᵀ (W_Vᵀ v̄_t + W_Kᵀ k̄_t + [t = t'] W_Qᵀ q̄),  where N1 is the first
norm's Jacobian. `Pulled` stores the small vectors; no tensor of size d_model is computed per source position.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from hooks.kernels import matmul_fp32

Gate = Literal["exact", "half", "frozen"]


@dataclass(frozen=True)
class Rule:
    """What is differentiated and what is held at its clean value.

    Attributes:
        norms: "exact" differentiates 1/rms (also of queries and keys, if they are normed); "frozen" holds it.
        attention: "exact" differentiates the softmax; "frozen" holds the pattern.
        gate: "exact" differentiates silu(z_g) · z_u; "frozen" holds silu(z_g), so all of it is attributed to z_u;
            "half" attributes half to each factor (with silu(z) = z · sigmoid(z), and the sigmoid held).
    """

    norms: Literal["exact", "frozen"]
    attention: Literal["exact", "frozen"]
    gate: Gate


@dataclass(frozen=True)
class BlockWeights:
    """Views of one block's weights; biases and head norms are None where the architecture has none."""

    g1: Float[Tensor, " d_model"]
    g2: Float[Tensor, " d_model"]
    eps: float
    W_Q: Float[Tensor, "query d_model"]
    W_K: Float[Tensor, "keyvalue d_model"]
    W_V: Float[Tensor, "keyvalue d_model"]
    W_O: Float[Tensor, "d_model query"]
    b_Q: Float[Tensor, " query"] | None
    b_K: Float[Tensor, " keyvalue"] | None
    b_V: Float[Tensor, " keyvalue"] | None
    q_norm: Float[Tensor, " d_head"] | None
    k_norm: Float[Tensor, " d_head"] | None
    W_G: Float[Tensor, "d_ff d_model"]
    W_U: Float[Tensor, "d_ff d_model"]
    W_D: Float[Tensor, "d_model d_ff"]
    d_head: int

    @property
    def n_kv(self) -> int:
        """Key/value heads."""
        return len(self.W_K) // self.d_head

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return len(self.W_Q) // len(self.W_K)


@dataclass(frozen=True)
class Normed:
    """A head vector before and after its norm and rotation (Qwen3); without a head norm only the result is stored."""

    unit: Float[Tensor, "pos head d_head"] | None  # raw / rms
    scale: Float[Tensor, "pos head 1"] | None  # 1 / rms
    out: Float[Tensor, "pos head d_head"]  # rotated

    def upto(self, length: int) -> "Normed":
        """Only the first positions."""
        unit, scale = (None if part is None else part[:length] for part in (self.unit, self.scale))
        return Normed(unit, scale, self.out[:length])


@dataclass(frozen=True)
class BlockRecord:
    """The values of a block on one prompt.

    Attributes:
        keys, values: W_K n1 and W_V n1, before biases, head norms and rotation.
    """

    x: Float[Tensor, "pos d_model"]
    s1: Float[Tensor, "pos 1"]
    q: Normed
    k: Normed
    v: Float[Tensor, "pos n_kv d_head"]
    keys: Float[Tensor, "pos keyvalue"]
    values: Float[Tensor, "pos keyvalue"]
    pattern: Float[Tensor, "n_kv group query_pos pos"]
    x_mid: Float[Tensor, "pos d_model"]
    s2: Float[Tensor, "pos 1"]
    z_g: Float[Tensor, "pos d_ff"]
    z_u: Float[Tensor, "pos d_ff"]
    W_D: Float[Tensor, "d_model d_ff"]
    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]

    @property
    def y(self) -> Float[Tensor, "pos d_model"]:
        """The block's output; it is computed at each use, since transposed products do not need it."""
        return self.x_mid + _linear(silu(self.z_g) * self.z_u, self.W_D)

    def upto(self, length: int) -> "BlockRecord":
        """Only the first positions (views): later positions do not affect them."""
        if length >= len(self.x):
            return self
        by_position = ("x", "s1", "v", "keys", "values", "x_mid", "s2", "z_g", "z_u", "cos", "sin")
        cut = {name: getattr(self, name)[:length] for name in by_position}
        pattern = self.pattern[..., :length, :length]
        return replace(self, q=self.q.upto(length), k=self.k.upto(length), pattern=pattern, **cut)


ALL = slice(None)
_OVER_GROUP = "j kv group s, j kv group h -> j s kv h"


@dataclass(frozen=True)
class Pulled:
    """Gradients of some targets, pulled back to a block's input in factored form.

    Attributes:
        pos: each target's position t'.
        direct: g_mid at t', the part along the skip connection.
        q_bar: gradient on the queries before bias and rotation, at t' (None where the pattern is frozen).
        heads: p, the gradient on each head's output at t'.
        pattern: A, each target's row.
        scores: s̄, the gradient on that row's scores (None where the pattern is frozen).
    """

    w: BlockWeights
    record: BlockRecord
    rule: Rule
    pos: Int[Tensor, " target"]
    direct: Float[Tensor, "target d_model"]
    q_bar: Float[Tensor, "target query"] | None
    heads: Float[Tensor, "target n_kv group d_head"]
    pattern: Float[Tensor, "target n_kv group pos"]
    scores: Float[Tensor, "target n_kv group pos"] | None

    @property
    def length(self) -> int:
        """Number of source positions."""
        return self.pattern.shape[-1]

    def v_bar(self, targets: slice = ALL, at: slice = ALL) -> Float[Tensor, "target pos keyvalue"]:
        """v̄ of some targets at some source positions; zero after t'."""
        found = einsum(self.pattern[targets, ..., at], self.heads[targets], _OVER_GROUP)
        return rearrange(found, "j s kv h -> j s (kv h)")

    def k_bar(self, targets: slice = ALL, at: slice = ALL) -> Float[Tensor, "target pos keyvalue"] | None:
        """k̄ likewise; None where the pattern is frozen."""
        if self.scores is None:
            return None
        found = einsum(self.scores[targets, ..., at], self.queries[targets], _OVER_GROUP)
        return rearrange(on_key(self.w, self.record, found, at, self.rule), "j s kv h -> j s (kv h)")

    @property
    def v_bar_sum(self) -> Float[Tensor, "target keyvalue"]:
        """v̄ summed over all source positions."""
        weight = reduce(self.pattern, "j kv group s -> j kv group", "sum")
        found = einsum(weight, self.heads, "j kv group, j kv group h -> j kv h")
        return rearrange(found, "j kv h -> j (kv h)")

    @cached_property
    def queries(self) -> Float[Tensor, "target n_kv group d_head"]:
        """The rotated queries at each target's position."""
        return rearrange(self.record.q.out, "t (kv group) h -> t kv group h", group=self.w.group)[self.pos]


def record_block(
    w: BlockWeights, x: Float[Tensor, "pos d_model"], cos: Float[Tensor, "pos d_head"], sin: Float[Tensor, "pos d_head"]
) -> BlockRecord:
    """Run the block on one prompt and keep the values that its transposed products need. It computes in the dtype of
    x."""
    s1 = _inverse_rms(x, w.eps)
    n1 = w.g1.to(x.dtype) * x * s1
    queries, keys, values = (_linear(n1, weight) for weight in (w.W_Q, w.W_K, w.W_V))
    q = _head(queries, w.b_Q, w.q_norm, w, cos, sin)
    k = _head(keys, w.b_K, w.k_norm, w, cos, sin)
    v = _split(_biased(values, w.b_V), w.d_head)
    grouped = rearrange(q.out, "t (kv group) h -> t kv group h", group=w.group)
    scores = einsum(grouped, k.out, "t kv group h, s kv h -> kv group t s") / math.sqrt(w.d_head)
    later = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
    z = einsum(pattern, v, "kv group t s, s kv h -> t kv group h")
    x_mid = x + _linear(rearrange(z, "t kv group h -> t (kv group h)"), w.W_O)
    s2 = _inverse_rms(x_mid, w.eps)
    n2 = w.g2.to(x.dtype) * x_mid * s2
    z_g, z_u = _linear(n2, w.W_G), _linear(n2, w.W_U)
    return BlockRecord(x, s1, q, k, v, keys, values, pattern, x_mid, s2, z_g, z_u, w.W_D, cos, sin)


def pull_back(
    w: BlockWeights,
    record: BlockRecord,
    cotangents: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    rule: Rule,
) -> Pulled:
    """Gradients on the block's output, each at one position → their factored form at the input.

    FLOP per target: 6 d_model d_ff for the MLP, 2 d_model (d_query) for W_O, and products with the n_kv · d_head
    bottleneck. None of it grows with the number of sources, and only the last grows with the number of positions.
    """
    return through_attention(w, record, through_mlp(w, record, cotangents, pos, rule), pos, rule)


def through_mlp(
    w: BlockWeights,
    r: BlockRecord,
    u: Float[Tensor, "*#row d_model"],
    at: Int[Tensor, " target"] | slice,
    rule: Rule,
) -> Float[Tensor, "*#row d_model"]:
    """Gradient on the block's output → gradient at x_mid, position by position, skip connection included.

    Args:
        at: the position of each row, or the positions of the last but one axis.
    """
    to_u, to_g = _gate_slopes(r, rule)
    h = _transposed(u, w.W_D)
    if to_g is None:
        on_n2 = _transposed(_scaled(h, to_u, at, out=h), w.W_U)
    else:
        on_n2 = _transposed(_scaled(h, to_u, at, out=torch.empty_like(h)), w.W_U)
        on_n2 += _transposed(_scaled(h, to_g, at, out=h), w.W_G)
    return u + norm_transposed(on_n2, w.g2, r.x_mid[at], r.s2[at], rule)


def _gate_slopes(r: BlockRecord, rule: Rule) -> tuple[Float[Tensor, "pos d_ff"], Float[Tensor, "pos d_ff"] | None]:
    """The derivatives of silu(z_g) · z_u by z_u and by z_g under a rule, at every position; None: 0."""
    if rule.gate == "frozen":
        return silu(r.z_g), None
    if rule.gate == "half":
        return silu(r.z_g) / 2, r.z_u * torch.sigmoid(r.z_g) / 2
    return silu(r.z_g), torch.ops.aten.silu_backward(r.z_u, r.z_g)


def _scaled(h: Tensor, slopes: Float[Tensor, "pos d_ff"], at: Int[Tensor, " target"] | slice, *, out: Tensor) -> Tensor:
    """out = h * slopes[at]; `out` may be h. On the CPU no copy of the slopes is made, since their rows are the widest
    ones per target."""
    if isinstance(at, slice) or h.device.type != "cpu":
        return torch.mul(h, slopes[at], out=out)
    start = 0
    places, counts = at.unique_consecutive(return_counts=True)
    for t, count in zip(places.tolist(), counts.tolist(), strict=True):
        here = slice(start, start + count)
        torch.mul(h[here], slopes[t], out=out[here])
        start += count
    return out


def through_attention(
    w: BlockWeights, r: BlockRecord, g_mid: Float[Tensor, "target d_model"], pos: Int[Tensor, " target"], rule: Rule
) -> Pulled:
    """Gradients at x_mid, each at one position → their factored form at the block's input."""
    p = rearrange(_transposed(g_mid, w.W_O), "j (kv group h) -> j kv group h", kv=w.n_kv, group=w.group)
    pattern = rearrange(r.pattern[:, :, pos], "kv group j s -> j kv group s")
    if rule.attention == "frozen":
        return Pulled(w, r, rule, pos, g_mid, None, p, pattern, None)
    scores = _through_softmax(w, r, p, pattern)
    to_q = einsum(scores, r.k.out, "j kv group s, s kv h -> j kv group h")
    q_bar = on_query(w, r, rearrange(to_q, "j kv group h -> j (kv group) h"), pos, rule)
    return Pulled(w, r, rule, pos, g_mid, rearrange(q_bar, "j head h -> j (head h)"), p, pattern, scores)


def spread(w: BlockWeights, r: BlockRecord, pulled: Pulled, rule: Rule) -> Float[Tensor, "target pos d_model"]:
    """The gradient at every position of the block's input, from the factored form."""
    on_n1 = _transposed(pulled.v_bar(), w.W_V)
    k_bar = pulled.k_bar()
    if k_bar is not None and pulled.q_bar is not None:
        on_n1 = on_n1 + _transposed(k_bar, w.W_K)
        rows = torch.arange(len(on_n1), device=on_n1.device)
        on_n1 = on_n1.index_put((rows, pulled.pos), _transposed(pulled.q_bar, w.W_Q), accumulate=True)
    out = norm_transposed(on_n1, w.g1, r.x, r.s1, rule)
    rows = torch.arange(len(out), device=out.device)
    return out.index_put((rows, pulled.pos), pulled.direct, accumulate=True)


def through_attention_everywhere(
    w: BlockWeights, r: BlockRecord, g_mid: Float[Tensor, "target pos d_model"], rule: Rule
) -> tuple[Float[Tensor, "target pos d_model"], Float[Tensor, "target pos keyvalue"]]:
    """Gradients at all positions of x_mid → gradients at all positions of the block's input, and on the values, v̄."""
    p = rearrange(_transposed(g_mid, w.W_O), "j t (kv group h) -> j t kv group h", kv=w.n_kv, group=w.group)
    v_bar = rearrange(einsum(r.pattern, p, "kv group t s, j t kv group h -> j s kv h"), "j s kv h -> j s (kv h)")
    on_n1 = _transposed(v_bar, w.W_V)
    if rule.attention == "exact":
        q_bar, k_bar = _through_softmax_everywhere(w, r, p, rule)
        on_n1 = on_n1 + _transposed(q_bar, w.W_Q) + _transposed(k_bar, w.W_K)
    return g_mid + norm_transposed(on_n1, w.g1, r.x, r.s1, rule), v_bar


def _through_softmax_everywhere(
    w: BlockWeights, r: BlockRecord, p: Float[Tensor, "target pos n_kv group d_head"], rule: Rule
) -> tuple[Float[Tensor, "target pos query"], Float[Tensor, "target pos keyvalue"]]:
    """As `_through_softmax`, for all query positions at once."""
    a = einsum(p, r.v, "j t kv group h, s kv h -> j kv group t s")
    centred = a - reduce(r.pattern * a, "j kv group t s -> j kv group t 1", "sum")
    s_bar = r.pattern * centred / math.sqrt(w.d_head)
    q = rearrange(r.q.out, "t (kv group) h -> t kv group h", group=w.group)
    to_q = rearrange(einsum(s_bar, r.k.out, "j kv group t s, s kv h -> j t kv group h"), "j t kv g h -> j t (kv g) h")
    to_k = einsum(s_bar, q, "j kv group t s, t kv group h -> j s kv h")
    q_bar, k_bar = on_query(w, r, to_q, slice(None), rule), on_key(w, r, to_k, slice(None), rule)
    return rearrange(q_bar, "j t head h -> j t (head h)"), rearrange(k_bar, "j s kv h -> j s (kv h)")


def _through_softmax(
    w: BlockWeights,
    r: BlockRecord,
    p: Float[Tensor, "target n_kv group d_head"],
    pattern: Float[Tensor, "target n_kv group pos"],
) -> Float[Tensor, "target n_kv group pos"]:
    """s̄, gradients on the scores of each target's row."""
    a = einsum(p, r.v, "j kv group h, s kv h -> j kv group s")
    return pattern * (a - reduce(pattern * a, "j kv group s -> j kv group 1", "sum")) / math.sqrt(w.d_head)


def on_query(
    w: BlockWeights, r: BlockRecord, g: Float[Tensor, "*row head d_head"], at: Int[Tensor, " row"] | slice, rule: Rule
) -> Float[Tensor, "*row head d_head"]:
    """Gradient on rotated queries at some positions → gradient before rotation, head norm and bias."""
    g = _unrotate(g, r.cos[at, None], r.sin[at, None])
    if w.q_norm is None or r.q.unit is None or r.q.scale is None:
        return g
    return _head_norm_transposed(g, w.q_norm, r.q.unit[at], r.q.scale[at], rule)


def on_key(
    w: BlockWeights, r: BlockRecord, g: Float[Tensor, "*row head d_head"], at: Int[Tensor, " row"] | slice, rule: Rule
) -> Float[Tensor, "*row head d_head"]:
    """The same for keys. `head` is key heads; or query heads, each with its own part of its key head's gradient."""
    g = _unrotate(g, r.cos[at, None], r.sin[at, None])
    if w.k_norm is None or r.k.unit is None or r.k.scale is None:
        return g
    group = g.shape[-2] // w.n_kv
    unit, scale = (repeat(part[at], "t kv h -> t (kv group) h", group=group) for part in (r.k.unit, r.k.scale))
    return _head_norm_transposed(g, w.k_norm, unit, scale, rule)


def norm_transposed(
    g: Float[Tensor, "*#row d_model"],
    gamma: Float[Tensor, " d_model"],
    x: Float[Tensor, "*#row d_model"],
    scale: Float[Tensor, "*#row 1"],
    rule: Rule,
) -> Float[Tensor, "*#row d_model"]:
    """RMSNorm's transposed Jacobian: s (γg − x̂ (x̂·γg) / d), x̂ = x s; with the scale held: s γ g."""
    scaled = gamma.to(g.dtype) * g
    if rule.norms == "frozen":
        return scale * scaled
    unit = x * scale
    return scale * (scaled - unit * reduce(unit * scaled, "... d -> ... 1", "mean"))


def _head_norm_transposed(
    g: Tensor, gamma: Float[Tensor, " d_head"], unit: Tensor, scale: Tensor, rule: Rule
) -> Tensor:
    scaled = gamma.to(g.dtype) * g
    if rule.norms == "frozen":
        return scale * scaled
    return scale * (scaled - unit * reduce(unit * scaled, "... h -> ... 1", "mean"))


def _inverse_rms(x: Float[Tensor, "*row d"], eps: float) -> Float[Tensor, "*row 1"]:
    return torch.rsqrt(reduce(x.square(), "... d -> ... 1", "mean") + eps)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return matmul_fp32(x, weight.T)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _transposed(g: Tensor, weight: Tensor) -> Tensor:
    """Gradient on a linear layer's output → gradient on its input."""
    return matmul_fp32(g, weight)


def _split(x: Float[Tensor, "pos all"], d_head: int) -> Float[Tensor, "pos head d_head"]:
    return rearrange(x, "t (head h) -> t head h", h=d_head)


def _head(raw: Tensor, bias: Tensor | None, gamma: Tensor | None, w: BlockWeights, cos: Tensor, sin: Tensor) -> Normed:
    raw = _split(_biased(raw, bias), w.d_head)
    if gamma is None:
        return Normed(None, None, _rotate(raw, cos[:, None], sin[:, None]))
    scale = _inverse_rms(raw, w.eps)
    unit = raw * scale
    return Normed(unit, scale, _rotate(gamma.to(raw.dtype) * unit, cos[:, None], sin[:, None]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _unrotate(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation's transpose. It makes no further copies, since gradients on keys are the largest rotated tensors."""
    half = g.shape[-1] // 2
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)  # contiguous, even if g is not
    torch.mul(g, cos, out=out)
    out[..., :half].addcmul_(g[..., half:], sin[..., half:])
    out[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
    return out
