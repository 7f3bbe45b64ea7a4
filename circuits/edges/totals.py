"""Total effects by one backward pass through the replaced layers: gradients pass only through features, and errors are
held.

    g_read += sum_j (d_j · g_write) ∂pre_j/∂x        over the active features j of a cut

The total effect of a node is the sum over all paths through features of the product of edges, divided by a_j at every
feature j of the path. This pass sums all of them at once, without a matrix over nodes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import Rule
from circuits.edges.metric_ends import before_norm, encoder_gradient, read, target_ends
from circuits.edges.stack import (
    READABLE,
    WRITABLE,
    Front,
    Point,
    Stack,
    joins_at,
    read_from,
    stack_of,
    step,
    summed,
)
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.transcoder import Transcoder
from hooks.types import SparseActs


def chain_gradients(
    model: HookedModel, recording: Recording, targets: tuple[AnyTarget, ...], layers: list[int], rule: Rule
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """The metric's total derivative with respect to each layer's write site, with every later cut replaced.

    Raises:
        UserError: the algebra does not support the model's blocks, or a site.
    """
    stack, convention = stack_of(model.host, recording), model.store.convention
    if stack is None or convention.read.name not in READABLE or convention.write.name not in WRITABLE:
        raise UserError(
            "total effects need to know what a block computes",
            expected="a Qwen2, Qwen3 or Llama model with plain weights, and transcoders at known sites",
            found=f"{type(model.host.model).__name__}, transcoders that read {convention.read} and "
            f"write {convention.write}",
            repair="select by score, --select score",
        )
    point, rows, pos, _ = target_ends(model.host, stack, targets, rule)
    rows = rows * rows.new_tensor([[target.weight] for target in targets])
    gradient = summed(stack, point, rows, pos, rule).everywhere
    return _descend(model, recording, stack, point, gradient, layers, rule)


def _descend(
    model: HookedModel,
    recording: Recording,
    stack: Stack,
    point: Point,
    gradient: Float[Tensor, "1 pos d_model"],
    layers: list[int],
    rule: Rule,
) -> dict[int, Tensor]:
    writes = {joins_at(model.store.sites(layer)[1]): layer for layer in layers}
    held = frozenset(model.store.sites(layer)[1] for layer in layers) if _adds(model) else frozenset()
    carried: dict[Point, Tensor] = {}
    found: dict[int, Tensor] = {}
    while True:
        gradient = _with(gradient, carried.pop(point, None))  # from later layers that read here, before the cut
        if point in writes:
            layer = writes[point]
            found[layer] = gradient[0]
            transcoder = model.store[layer]
            at = read_from(transcoder.read)
            back = _through_features(stack, transcoder, recording.layers[layer].acts, gradient[0], rule)
            carried[at] = _with(back, carried.get(at))
            if transcoder.write.whole_stream:
                gradient = torch.zeros_like(gradient)
        gradient = _with(gradient, carried.pop(point, None))  # from a layer that reads and writes the same site
        if point == (0, 0) or len(found) == len(writes):
            return found
        pos = torch.zeros(1, dtype=torch.int64, device=gradient.device)
        front = step(stack, Front(point, pos, len(stack.end), rule, gradient.new_zeros(1), full=gradient), held)
        point, gradient = front.point, front.everywhere


def _with(gradient: Tensor, more: Tensor | None) -> Tensor:
    return gradient if more is None else gradient + more.to(gradient.device)


def _adds(model: HookedModel) -> bool:
    return not model.store.convention.write.at(0).whole_stream


def _through_features(
    stack: Stack, transcoder: Transcoder, acts: SparseActs, gradient: Float[Tensor, "pos d_model"], rule: Rule
) -> Float[Tensor, "pos d_model"]:
    """The gradient through decoder, mask and encoder, transposed, one position at a time."""
    gradient, dtype = gradient.to(transcoder.device), gradient.dtype
    out = torch.zeros_like(gradient)
    everywhere = torch.arange(len(gradient), device=gradient.device)
    x = read(stack, transcoder.read, everywhere).to(gradient.device)
    for t in range(len(gradient)):
        active = acts.indices[0, t][acts.values[0, t] > 0]
        along = transcoder.W_dec[active].to(dtype) @ gradient[t]
        out[t] = along @ transcoder.W_enc[active].to(dtype)
    out = encoder_gradient(transcoder, out, x, rule)
    return before_norm(stack, transcoder.read, out, everywhere, rule)
