"""Edges through one block, as dot products in its value and key spaces.

The target's gradient u_j is pulled back through the block in factored form (`blocks`). Every source vector y at
position t is projected once onto the same small spaces. An edge is a sum of their dot products:

    e_ij = a_i { s1_t (v̄_jt · W_V γy + k̄_jt · W_K γy) + [t = t'] y · (g_mid + s1 γ W_Qᵀ q̄) − s1_t (y·x̂_t)/d · dot_jt }

where γ is the first norm's gain, x̂ the normed stream, and dot_jt the same expression with x̂_t in place of y. The last
term is missing if the rule holds norms; the terms with k̄ and q̄ are missing if it holds attention. Between positions
only n_kv · d_head numbers pass, so an edge costs a dot product of that size, and the cost of pulling back a target
does not depend on the number of sources. The images W_V γ d_i and W_K γ d_i do not depend on the prompt; if half of a
dictionary is used, all of its images are kept (`store.derived`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import BlockRecord, Pulled, Rule
from circuits.edges.buffer import Buffer
from circuits.edges.features import Sources, features_of
from circuits.edges.run import Cut
from circuits.edges.stack import Block
from hooks.checkpoints import TranscoderStore
from hooks.kernels import matmul_fp32


@dataclass(frozen=True)
class Fields:
    """Vectors that every position has: rest, error and bias; and their images.

    Attributes:
        images: in the spaces of `Projected.images`; the last image is that of the normed stream x̂ if norms respond.
        along: y · x̂ / d_model of each vector: its component along the normed stream.
    """

    vectors: Float[Tensor, "field pos d_model"]
    images: tuple[Float[Tensor, "_field pos keyvalue"], ...]
    along: Float[Tensor, "field pos"]


@dataclass(frozen=True)
class Projected:
    """The images of a cut's nodes in a block's value and key spaces.

    Attributes:
        images: W_V γ d_i of some features, and W_K γ d_i unless the rule holds the pattern.
        which: of each node, its row in `images`.
    """

    images: tuple[Float[Tensor, "feature keyvalue"], ...]
    which: Int[Tensor, " node"]
    fields: Fields


def project(store: TranscoderStore, cut: Cut, block: Block, rule: Rule) -> Projected:
    """The images of a cut's nodes. They do not depend on the targets."""
    w, record = block.weights, block.record
    gain, W_dec = w.g1.to(record.x.dtype), cut.transcoder.W_dec
    weights = {"values": w.W_V} if rule.attention == "frozen" else {"values": w.W_V, "keys": w.W_K}
    which, images = cut.feature, []
    whole = 2 * int(torch.bincount(cut.feature, minlength=1).count_nonzero()) > len(W_dec)
    if not whole:
        feature, which = cut.feature.unique(return_inverse=True)
    for name, weight in weights.items():

        def image(rows: Tensor, weight: Tensor = weight) -> Tensor:
            return matmul_fp32(rows.to(gain.dtype) * gain, weight.T)

        if whole:  # it is worth computing the images of the whole dictionary
            images.append(store.derived(cut.layer, name, (weight, w.g1), partial(_table, image, W_dec, weight.dtype)))
        else:
            images.append(image(W_dec[feature]))
    return Projected(tuple(images), which, _fields(cut, record, gain, list(weights.values()), rule))


def _fields(
    cut: Cut, record: BlockRecord, gain: Float[Tensor, " d_model"], weights: list[Tensor], rule: Rule
) -> Fields:
    x = record.x
    rows = torch.cat([cut.rest.to(x), cut.error.to(x), rearrange(cut.bias.to(x), "d -> 1 d")])
    rest, error = torch.arange(len(rows) - 1, device=x.device).split(len(x))
    at = torch.stack([rest, error, torch.full_like(rest, len(rows) - 1)])  # every position has the same bias
    vectors, images = rows[at], [matmul_fp32(rows * gain, weight.T)[at] for weight in weights]
    if rule.norms == "exact":
        stream = zip(images, (record.values, record.keys), strict=False)
        images = [torch.cat([image, rearrange(own, "pos c -> 1 pos c")]) for image, own in stream]
    along = einsum(vectors, x * record.s1, "field pos d, pos d -> field pos") / x.shape[1]
    return Fields(vectors, tuple(images), along)


def _table(
    image: Callable[[Tensor], Tensor], W_dec: Float[Tensor, "feature d_model"], dtype: torch.dtype
) -> Float[Tensor, "feature keyvalue"]:
    """The images of a whole dictionary in the precision of the model's weights, some rows at a time."""
    rows = max(1, (1 << 24) // W_dec.shape[1])
    return torch.cat([image(part).to(dtype) for part in W_dec.split(rows)])


def one_block_edges(
    cut: Cut, block: Block, projected: Projected, pulled: Pulled, rule: Rule, buffer: Buffer
) -> Float[Tensor, "target source"]:
    """Edges through one block; columns: features, rest, error, bias."""
    count, whole, length = len(cut.pos), len(cut.rest), pulled.length
    fields, scale = projected.fields, block.record.s1[:length, 0]
    images = tuple(image[:, :length] for image in fields.images)
    unit = block.record.x[:length] * block.record.s1[:length]
    same, along = _at_own_position(block, unit, pulled)
    sources = Sources(cut, projected.images, projected.which, images, pulled, same, along, unit, scale)
    out = buffer.empty((len(same), count + 2 * whole + 1), same)
    out[:, max((nodes.stop for nodes in sources.nodes.values()), default=0) :] = 0
    seen = features_of(sources).put(out)
    if sources.norms:  # the first norm's response to a change along the stream
        seen = seen[:-1] - seen[-1] * rearrange(fields.along[:, :length], "field pos -> field 1 pos")
    seen = seen * scale
    rows = torch.arange(len(same), device=same.device)
    seen[:, rows, pulled.pos] += einsum(same, fields.vectors[:, pulled.pos], "j d, field j d -> field j")
    out[:, count : count + length], out[:, count + whole : count + whole + length] = seen[0], seen[1]
    out[:, -1] = seen[2].sum(1)
    return out


def _at_own_position(
    block: Block, unit: Float[Tensor, "reached d_model"], pulled: Pulled
) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
    """The gradient at each target's own position, without the paths through values and keys; and the component of the
    queries' part along the normed stream."""
    if pulled.q_bar is None:
        return pulled.direct, pulled.direct.new_zeros(len(pulled.direct))
    on_query = matmul_fp32(pulled.q_bar, block.weights.W_Q) * block.weights.g1.to(pulled.direct.dtype)
    along = (on_query * unit[pulled.pos]).sum(-1)
    return pulled.direct + block.record.s1[pulled.pos] * on_query, along
