"""The parts of an edge: along the skip connection, the MLP, and each attention head's values, keys and queries.

    e_ij = y·u  +  y·(g_mid − u)  +  sum_h [ W_V n · v̄_h  +  W_K n · k̄_h  +  W_Q n · q̄_h ]_h       n = N1 y

where y is the vector that the source writes, and n the first norm's response to it. The source is at position s and the
target at t'; the first two parts and the queries are 0 unless s = t'. v̄_h, k̄_h and q̄_h are those of `blocks`, before
the sum over the heads of a group. A change of x_mid reaches the target both along the skip connection and through the
MLP; the heads' parts contain both.
"""

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import BlockRecord, BlockWeights, Rule, on_key, on_query, through_mlp
from circuits.edges.stack import MIDDLE, Block, Point
from hooks.kernels import matmul_fp32


@dataclass(frozen=True)
class Parts:
    """The parts of some edges; all of an edge's parts sum to it."""

    direct: Float[Tensor, " edge"]
    mlp: Float[Tensor, " edge"]
    ov: Float[Tensor, "edge head"]
    key: Float[Tensor, "edge head"]
    query: Float[Tensor, "edge head"]


def parts_of(
    block: Block,
    point: Point,
    gradients: Float[Tensor, "edge d_model"],
    pos: Int[Tensor, " edge"],
    written: Float[Tensor, "edge d_model"],
    at: Int[Tensor, " edge"],
    rule: Rule,
) -> Parts:
    """Split edges through one block into their parts.

    Args:
        point: the point of the targets' gradients: after the block, or between its attention and its MLP.
        gradients, pos: gradient and position of each edge's target.
        written, at: the vector that each edge's source writes before the block, and its position.
    """
    w, r = block.weights, block.record
    g_mid = gradients if point[1] == MIDDLE else through_mlp(w, r, gradients, pos, rule)
    here = (pos == at).to(gradients.dtype)
    direct = here * (written * gradients).sum(-1)
    mlp = here * (written * (g_mid - gradients)).sum(-1)
    normed = _norm_response(w, r, written, at, rule)
    p = rearrange(matmul_fp32(g_mid, w.W_O), "e (kv group h) -> e kv group h", kv=w.n_kv, group=w.group)
    weight = rearrange(r.pattern[:, :, pos], "kv group e s -> e kv group s")
    here_weight = weight[torch.arange(len(at), device=at.device), :, :, at]
    value = rearrange(matmul_fp32(normed, w.W_V.T), "e (kv h) -> e kv h", kv=w.n_kv)
    ov = here_weight * einsum(p, value, "e kv group h, e kv h -> e kv group")
    flat_ov = rearrange(ov, "e kv group -> e (kv group)")
    if rule.attention == "frozen":
        none = torch.zeros_like(flat_ov)
        return Parts(direct, mlp, flat_ov, none, none)
    a = einsum(p, r.v, "e kv group h, s kv h -> e kv group s")
    mean = reduce(weight * a, "e kv group s -> e kv group 1", "sum")
    s_bar = weight * (a - mean) / math.sqrt(w.d_head)
    own = s_bar[torch.arange(len(at), device=at.device), :, :, at]
    q = rearrange(r.q.out, "t (kv group) h -> t kv group h", group=w.group)[pos]
    k_bar = on_key(w, r, rearrange(own[..., None] * q, "e kv group h -> e (kv group) h"), at, rule)
    to_q = rearrange(einsum(s_bar, r.k.out, "e kv group s, s kv h -> e kv group h"), "e kv g h -> e (kv g) h")
    q_bar = on_query(w, r, to_q, pos, rule)
    key = rearrange(matmul_fp32(normed, w.W_K.T), "e (kv h) -> e kv h", kv=w.n_kv)
    key = repeat(key, "e kv h -> e (kv group) h", group=w.group)
    query = rearrange(matmul_fp32(normed, w.W_Q.T), "e (head h) -> e head h", h=w.d_head)
    return Parts(direct, mlp, flat_ov, (key * k_bar).sum(-1), here[:, None] * (query * q_bar).sum(-1))


def _norm_response(
    w: BlockWeights, r: BlockRecord, y: Float[Tensor, "edge d_model"], at: Int[Tensor, " edge"], rule: Rule
) -> Float[Tensor, "edge d_model"]:
    """The change of the first norm's output for y at a position: s γ (y − x̂ (x̂·y)/d); with the scale held, s γ y."""
    scale = r.s1[at]
    if rule.norms == "exact":
        unit = r.x[at] * scale
        y = y - unit * reduce(unit * y, "edge d -> edge 1", "mean")
    return scale * w.g1.to(y.dtype) * y
