"""The recorded blocks of a model on one prompt, and gradients that are carried down through them.

A *point* is a depth of the residual stream: (L, 0) before block L, (L, 2) between its attention and its MLP, as in
`Site.depth`. A module's output is added to the stream at the point after the module.
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
    """One block: its weights and its recorded values."""

    weights: BlockWeights
    record: BlockRecord


@dataclass(frozen=True)
class Stack:
    """All blocks of a model on one prompt.

    Attributes:
        blocks: block L has index L.
        end: the stream after the last block.
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
        """Only the first positions."""
        if length >= len(self.end):
            return self
        blocks = tuple(Block(block.weights, block.record.upto(length)) for block in self.blocks)
        return Stack(blocks, self.end[:length])


def joins_at(site: Site) -> Point:
    """The point at which a write to this site has been added to the stream."""
    if site.name == "mlp_out":
        return (site.layer + 1, 0)
    return (site.layer, MIDDLE) if site.name == "attn_out" else site.depth


def read_from(site: Site) -> Point:
    """The point whose stream a site has; at `mlp_in` it is normed."""
    return (site.layer, MIDDLE) if site.name == "mlp_in" else site.depth


def known_blocks(host: Host) -> tuple[BlockWeights, ...] | None:
    """The weights of every block; None where the algebra does not support the architecture, or not all are loaded."""
    layers: list[Any] = list(host.layers)
    found = [read_block(host.model, layer) for layer in range(len(layers))]
    blocks = tuple(weights for weights in found if weights is not None)
    loaded = not any(part.is_meta for part in host.model.parameters())
    rotates = all(getattr(layer.self_attn, "use_rope", True) for layer in layers[: len(blocks)])
    return blocks if len(blocks) == len(found) and loaded and rotates else None


def stack_of(host: Host, recording: Recording) -> Stack | None:
    """The values of every block on a recorded prompt. They are computed once and kept as long as the result is in use.

    None where the algebra does not support the model: because of its modules, because of a sliding window, or because
    the algebra does not reproduce the model's own streams. Architectures with the same module names can compute
    different things (Granite scales the output of a block, SmolLM3 leaves out rotations), so this is measured on a
    host's first prompts.
    """
    key = f"stack of {id(host)}"
    found: Stack | None = recording.shared.get(key)
    if _REPRODUCED.get(host) is False or host.held:  # the algebra would not compute the held values
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
TELLING = 8  # tokens; a shorter prompt does not decide it


def _reproduces_now(host: Host, recording: Recording, blocks: tuple[BlockWeights, ...]) -> bool:
    """`reproduces` on a new pass, because the weights may have been edited after the recording."""
    final, seen = host.capture(recording.batch, stream_sites(host))
    now = Recording(recording.batch, {}, final, host, seen)
    return reproduces(host, now, record_stack(host, now, blocks))


def reproduces(host: Host, recording: Recording, stack: Stack) -> bool:
    """Whether the recorded blocks, the norm and the unembedding reproduce the model's own streams and logits.

    At most positions, the output of a block may differ by rounding: by 1 % of its size in fp32 and fp64, by a fifth in
    half precision, plus twice the rounding error of the stream.
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
    """The sites of the stream before every block, and after the last."""
    return [Site("resid_pre", layer) for layer in range(host.n_layers)] + [Site("resid_post", host.n_layers - 1)]


def record_stack(host: Host, recording: Recording, blocks: tuple[BlockWeights, ...]) -> Stack:
    """The values of every block on a recorded prompt, computed from the streams between blocks; each block's on its own
    device.

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
    """Gradients of some targets at one point of a stack, in the cheapest form that can represent them.

    Attributes:
        pos: each target's position.
        length: number of positions of the stack.
        here: the gradient at the target's own position, as long as no attention was passed.
        pulled: after one attention, the factored form; `block` is the block of that attention.
        full: after that, the gradient at every position.
        constant: the contribution of value biases so far, if the rule holds the pattern.
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
        """The gradient at every position, whatever its form."""
        if self.full is not None:
            return self.full
        if self.pulled is not None and self.block is not None:
            return spread(self.block.weights, self.block.record, self.pulled, self.rule)
        assert self.here is not None
        out = self.here.new_zeros(len(self.here), self.length, self.here.shape[1])
        out[torch.arange(len(out), device=out.device), self.pos] = self.here
        return out

    def on(self, device: torch.device) -> "Front":
        """The same on another device; a factored form is multiplied out before it is moved."""
        if device == self.constant.device:
            return self
        here = None if self.here is None else self.here.to(device)
        full = None if here is not None else self.everywhere.to(device)
        pos, constant = self.pos.to(device), self.constant.to(device)
        return replace(self, pos=pos, constant=constant, here=here, pulled=None, block=None, full=full)


def carry_down(
    stack: Stack,
    point: Point,
    gradients: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    rule: Rule,
    held: Collection[Site] = (),
) -> Iterator[Front]:
    """Gradients at every point from `point` down to the embedding. At `point` each target has a gradient only at its
    own position.

    Args:
        stack: with as many positions as the last target needs (`Stack.upto`).
        held: outputs of modules (`mlp_out`, `attn_out`) that are replaced, so that no gradient passes through the
            module.
    """
    front = Front(point, pos, len(stack.end), rule, gradients.new_zeros(len(gradients)), here=gradients)
    yield from carry_on(stack, front, held)


def carry_on(stack: Stack, front: Front, held: Collection[Site] = ()) -> Iterator[Front]:
    """The same from any front on; that front is the first."""
    yield front
    while front.point != (0, 0):
        front = step(stack, front, held)
        yield front


def summed(
    stack: Stack, point: Point, gradients: Float[Tensor, "target d_model"], pos: Int[Tensor, " target"], rule: Rule
) -> Front:
    """The front of a single target: the sum of these gradients; at one position if all share it, else at every
    position."""
    constant = gradients.new_zeros(1)
    if bool((pos == pos[0]).all()):
        return Front(point, pos[:1], len(stack.end), rule, constant, here=gradients.sum(0, keepdim=True))
    full = gradients.new_zeros(1, *stack.end.shape)
    full[0].index_add_(0, pos, gradients)
    return Front(point, pos[:1], len(stack.end), rule, constant, full=full)


def step(stack: Stack, front: Front, held: Collection[Site]) -> Front:
    """From one point to the next one below: through an MLP, or through an attention."""
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
    """The contribution of the value bias if the pattern is held: a constant for every target.

    Under a live pattern the rule does not conserve, and constants are not attributed.
    """
    if w.b_V is None or rule.attention == "exact":
        return v_bar.new_zeros(len(v_bar))
    return v_bar @ w.b_V.to(v_bar.dtype)
