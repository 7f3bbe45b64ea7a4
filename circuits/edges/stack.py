"""The blocks of a model as recorded on one prompt, and gradients walking down through them.

A *point* is a depth at which the residual stream stands: (L, 0) before block L, (L, 2) between its attention and its
MLP, as in `Site.depth`. What a module writes joins the stream at the point behind it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

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
from hooks.kernels import linear_fp32
from hooks.passes import Recording
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
    """The weights of every block, or None where the algebra does not know the architecture, or not all are loaded."""
    layers: list[Any] = list(host.layers)
    found = [read_block(host.model, layer) for layer in range(len(layers))]
    blocks = tuple(weights for weights in found if weights is not None)
    loaded = not any(part.is_meta for part in host.model.parameters())
    rotates = all(getattr(layer.self_attn, "use_rope", True) for layer in layers[: len(blocks)])
    return blocks if len(blocks) == len(found) and loaded and rotates else None


def stack_of(host: Host, recording: Recording) -> Stack | None:
    """What every block computed on a recorded prompt, worked out once for as long as somebody holds it.

    None where the algebra does not know the model: by its modules, by how far its attention reaches, or because it
    does not arrive at what the model itself computed. Architectures that share all names differ in more (Granite
    scales what a block adds, SmolLM3 leaves rotations out), so that is measured on a host's first prompts.
    """
    key = f"stack of {id(host)}"
    found: Stack | None = recording.shared.get(key)
    if _REPRODUCED.get(host) is False or host.held:  # what is held is not what the algebra would work out
        return None
    if found is not None:
        return found
    blocks, window, length = known_blocks(host), host.window(), recording.batch.lengths[0]
    if blocks is None or (window is not None and length > window):
        return None
    found = record_stack(host, recording, blocks)
    if host not in _REPRODUCED:
        right = reproduces(host, recording, found) or _reproduces_now(host, recording, blocks)
        if length >= TELLING:
            _REPRODUCED[host] = right
        if not right:
            return None
    recording.shared[key] = found
    return found


_REPRODUCED: WeakKeyDictionary[Host, bool] = WeakKeyDictionary()
TELLING = 8  # tokens; a shorter prompt settles nothing


def _reproduces_now(host: Host, recording: Recording, blocks: tuple[BlockWeights, ...]) -> bool:
    """The same on a new pass: a recording may be older than an edit of the weights."""
    final, seen = host.capture(recording.batch, stream_sites(host))
    now = Recording(recording.batch, {}, final, host, seen)
    return reproduces(host, now, record_stack(host, now, blocks))


def reproduces(host: Host, recording: Recording, stack: Stack) -> bool:
    """Whether the recorded blocks, norm and unembedding arrive at the streams and logits of the model itself.

    What a block adds may be off by rounding, at most positions: 1 % of its size in fp32 and fp64, a fifth of it in
    half precision; and twice what rounding the stream takes.
    """
    precision = torch.finfo(recording.final.dtype).eps
    streams = [*(block.record.x for block in stack.blocks), stack.end]
    for block, x, after in zip(stack.blocks, streams[:-1], streams[1:], strict=True):
        made, after = block.record.y, after.to(x.device)
        if not _near(made - after, (after - x).norm(dim=-1), after.norm(dim=-1), precision):
            return False
    head, norm = host.model.get_output_embeddings(), host.decoder.norm  # type: ignore[operator]
    if not hasattr(norm, "variance_epsilon") or not host.plain_logits:
        return False
    x = stack.end[-1:]
    normed = norm.weight.to(x) * x * torch.rsqrt(reduce(x.square(), "1 d -> 1 1", "mean") + norm.variance_epsilon)
    logits = host.unembed(recording.final[0, recording.batch.lengths[0] - 1])[None].to(x)
    made = linear_fp32(normed.to(head.weight.device), head.weight, None).to(x)
    return _near(made - logits, logits.norm(dim=-1), logits.norm(dim=-1), precision)


def _near(
    miss: Float[Tensor, "pos d"], step: Float[Tensor, " pos"], size: Float[Tensor, " pos"], precision: float
) -> bool:
    room = max(0.01, 25 * precision) * step + max(1e-5, 2 * precision) * size
    return bool((miss.norm(dim=-1) <= room).double().mean() >= 0.5)


def stream_sites(host: Host) -> list[Site]:
    """The stream in front of every block, and behind the last."""
    return [Site("resid_pre", layer) for layer in range(host.n_layers)] + [Site("resid_post", host.n_layers - 1)]


def record_stack(host: Host, recording: Recording, blocks: tuple[BlockWeights, ...]) -> Stack:
    """What every block computed on a recorded prompt, from the streams between them; each block's on its own device.

    Memory: per block and position 3 d_model + 2 d_ff + 2 d_query + 4 d_keyvalue numbers, and the attention pattern.
    """
    sites, seen = stream_sites(host), recording.streams
    if not set(sites) <= set(seen):
        _, seen = host.capture(recording.batch, sites)
    streams = [seen[site][0] for site in sites]
    dtype = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    cos, sin = rotary(host, streams[0].to(dtype))
    recorded = []
    for w, x in zip(blocks, streams[:-1], strict=True):
        parts = (part.to(w.g1.device, dtype) for part in (x, cos, sin))
        recorded.append(Block(w, record_block(w, *parts)))
    norm: Any = host.decoder.norm
    return Stack(tuple(recorded), streams[-1].to(norm.weight.device, dtype))


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

    def on(self, device: torch.device) -> "Front":
        """The same on another device; what is factored there is multiplied out before it leaves."""
        if device == self.constant.device:
            return self
        here = None if self.here is None else self.here.to(device)
        full = None if here is not None else self.everywhere.to(device)
        pos, constant = self.pos.to(device), self.constant.to(device)
        return replace(self, pos=pos, constant=constant, here=here, pulled=None, block=None, full=full)


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
    yield from walk_on(stack, front, held)


def walk_on(stack: Stack, front: Front, held: Collection[Site] = ()) -> Iterator[Front]:
    """The same from any front on, itself the first."""
    yield front
    while front.point != (0, 0):
        front = step(stack, front, held)
        yield front


def summed(
    stack: Stack, point: Point, gradients: Float[Tensor, "target d_model"], pos: Int[Tensor, " target"], rule: Rule
) -> Front:
    """The front of one target: the sum of these, at its position if they share one, else at every position."""
    constant = gradients.new_zeros(1)
    if bool((pos == pos[0]).all()):
        return Front(point, pos[:1], len(stack.end), rule, constant, here=gradients.sum(0, keepdim=True))
    full = gradients.new_zeros(1, *stack.end.shape)
    full[0].index_add_(0, pos, gradients)
    return Front(point, pos[:1], len(stack.end), rule, constant, full=full)


def step(stack: Stack, front: Front, held: Collection[Site]) -> Front:
    """From one point to the next below: past an MLP, or past an attention."""
    layer, within = front.point
    block = stack.blocks[layer if within else layer - 1]
    front = front.on(block.record.x.device)
    if within:
        return _past_attention(block, front, Site("attn_out", layer) in held)
    return _past_mlp(block, front, Site("mlp_out", layer - 1) in held)


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
