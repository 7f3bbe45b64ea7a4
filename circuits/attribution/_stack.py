"""The blocks of a model as recorded on one prompt, and gradients walking down through them.

A *point* is a depth at which the residual stream stands: (L, 0) before block L, (L, 2) between its attention and its
MLP, as in `Site.depth`. What a module writes joins the stream at the point behind it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import (
    BlockRecord,
    BlockWeights,
    Pulled,
    Rule,
    read_block,
    record_block,
    spread,
    through_attention,
    through_attention_everywhere,
    through_mlp,
)
from hooks.host import Host
from hooks.recording import Recording
from hooks.sites import Site

Point = tuple[int, int]
MIDDLE = 2  # the point between attention and MLP

READABLE = ("resid_pre", "resid_mid", "resid_post", "mlp_in")
WRITABLE = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")


@dataclass(frozen=True)
class Block:
    """One block: its weights and what it computed."""

    weights: BlockWeights
    record: BlockRecord


@dataclass(frozen=True)
class Stack:
    """All blocks of a model on one prompt.

    Attributes:
        blocks: block L at place L.
        end: the stream behind the last one.
    """

    blocks: tuple[Block, ...]
    end: Float[Tensor, "pos d_model"]

    def stream(self, point: Point) -> Float[Tensor, "pos d_model"]:
        """The residual stream at a point."""
        layer, within = point
        if layer == len(self.blocks):
            return self.end
        record = self.blocks[layer].record
        return record.x_mid if within else record.x

    def upto(self, length: int) -> "Stack":
        """The first positions alone."""
        if length >= len(self.end):
            return self
        blocks = tuple(Block(block.weights, block.record.upto(length)) for block in self.blocks)
        return Stack(blocks, self.end[:length])


def joins_at(site: Site) -> Point:
    """The point at which what is written to a site is part of the stream."""
    if site.name == "mlp_out":
        return (site.layer + 1, 0)
    return (site.layer, MIDDLE) if site.name == "attn_out" else site.depth


def read_from(site: Site) -> Point:
    """The point whose stream a site shows; `mlp_in` shows it normed."""
    return (site.layer, MIDDLE) if site.name == "mlp_in" else site.depth


def known_blocks(host: Host) -> tuple[BlockWeights, ...] | None:
    """The weights of every block, or None where the algebra does not know the architecture."""
    found = [read_block(host.model, layer) for layer in range(host.n_layers)]
    blocks = tuple(weights for weights in found if weights is not None)
    return blocks if len(blocks) == len(found) else None


def stream_sites(host: Host) -> list[Site]:
    """The stream in front of every block, and behind the last."""
    return [Site("resid_pre", layer) for layer in range(host.n_layers)] + [Site("resid_post", host.n_layers - 1)]


def record_stack(host: Host, recording: Recording, blocks: tuple[BlockWeights, ...]) -> Stack:
    """What every block computed on a recorded prompt, from the streams between them.

    Memory: per block and position 3 d_model + 2 d_ff + 2 d_query + 4 d_keyvalue numbers, and the attention pattern.
    """
    sites, seen = stream_sites(host), recording.streams
    if not set(sites) <= set(seen):
        _, seen = host.capture(recording.batch, sites)
    streams = [seen[site][0] for site in sites]
    dtype = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    cos, sin = rotary(host, streams[0].to(dtype))
    pairs = zip(blocks, streams[:-1], strict=True)
    recorded = (Block(w, record_block(w, x.to(w.g1.device, dtype), cos.to(x), sin.to(x))) for w, x in pairs)
    return Stack(tuple(recorded), streams[-1].to(dtype))


def rotary(host: Host, x: Float[Tensor, "pos d_model"]) -> tuple[Float[Tensor, "pos d_head"], ...]:
    """cos and sin of every position, as the model computes them."""
    places = rearrange(torch.arange(len(x), device=x.device), "pos -> 1 pos")
    return tuple(part[0].to(x.dtype) for part in host.decoder.rotary_emb(x[None], places))


@dataclass(frozen=True)
class Front:
    """Gradients of some targets as they stand at one point of a stack, in the cheapest form there is.

    Attributes:
        pos: each target's position.
        length: positions the stack has.
        here: the gradient at the target's own position, while nothing has crossed positions.
        pulled: behind the first attention, the factored form; `block` is the one it passed.
        full: behind more than that, at every position.
        constant: what value biases contribute so far, where the pattern is held.
    """

    point: Point
    pos: Int[Tensor, " target"]
    length: int
    rule: Rule
    constant: Float[Tensor, " target"]
    here: Float[Tensor, "target d_model"] | None = None
    pulled: Pulled | None = None
    block: Block | None = None
    full: Float[Tensor, "target pos d_model"] | None = None

    @cached_property
    def everywhere(self) -> Float[Tensor, "target pos d_model"]:
        """The gradient at every position, whatever form it stands in."""
        if self.full is not None:
            return self.full
        if self.pulled is not None and self.block is not None:
            return spread(self.block.weights, self.block.record, self.pulled, self.rule)
        assert self.here is not None
        out = self.here.new_zeros(len(self.here), self.length, self.here.shape[1])
        out[torch.arange(len(out), device=out.device), self.pos] = self.here
        return out


def walk(
    stack: Stack,
    point: Point,
    gradients: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    rule: Rule,
    held: Collection[Site] = (),
) -> Iterator[Front]:
    """Gradients at every point from where they start, each at its own position, down to the embedding.

    Args:
        stack: no longer than the last target needs (`Stack.upto`).
        held: outputs of modules (`mlp_out`, `attn_out`) that are replaced, so that no gradient passes the module.
    """
    front = Front(point, pos, len(stack.end), rule, gradients.new_zeros(len(gradients)), here=gradients)
    yield front
    while front.point != (0, 0):
        front = step(stack, front, held)
        yield front


def step(stack: Stack, front: Front, held: Collection[Site]) -> Front:
    """From one point to the next below: past an MLP, or past an attention."""
    layer, within = front.point
    if within:
        return _past_attention(stack.blocks[layer], front, Site("attn_out", layer) in held)
    return _past_mlp(stack.blocks[layer - 1], front, Site("mlp_out", layer - 1) in held)


def _past_mlp(block: Block, front: Front, held: bool) -> Front:
    point, w, record, rule = (front.point[0] - 1, MIDDLE), block.weights, block.record, front.rule
    if front.here is not None:
        here = front.here if held else through_mlp(w, record, front.here, front.pos, rule)
        return replace(front, point=point, here=here)
    full = front.everywhere if held else through_mlp(w, record, front.everywhere, slice(None), rule)
    return replace(front, point=point, pulled=None, block=None, full=full)


def _past_attention(block: Block, front: Front, held: bool) -> Front:
    point, w, record, rule = (front.point[0], 0), block.weights, block.record, front.rule
    if held:
        return replace(front, point=point)
    if front.here is not None:
        pulled = through_attention(w, record, front.here, front.pos, rule)
        constant = front.constant + value_bias(w, pulled.v_bar_sum, rule)
        return replace(front, point=point, here=None, pulled=pulled, block=block, constant=constant)
    full, v_bar = through_attention_everywhere(w, record, front.everywhere, rule)
    return replace(
        front,
        point=point,
        full=full,
        constant=front.constant + value_bias(w, reduce(v_bar, "target pos keyvalue -> target keyvalue", "sum"), rule),
    )


def value_bias(w: BlockWeights, v_bar: Float[Tensor, "target keyvalue"], rule: Rule) -> Float[Tensor, " target"]:
    """What the value bias contributes when the pattern is held: it reaches every target as a constant.

    Under a live pattern the rule does not conserve, and constants are not attributed.
    """
    if w.b_V is None or rule.attention == "exact":
        return v_bar.new_zeros(len(v_bar))
    return v_bar @ w.b_V.to(v_bar.dtype)
