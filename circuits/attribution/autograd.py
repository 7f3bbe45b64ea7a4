"""autograd: the exact rule by automatic differentiation of whole passes. The slow oracle; runs any architecture.

    e_ij = a_i d_i · (∂x_{next cut} / ∂x_cut)ᵀ · ∂pre_j/∂x_{next cut}

One forward pass over B copies of the prompt in which the stream is detached at every cut, so that what arrives at a cut
depends on the cut before it alone. Copy b serves one target at *every* cut at once; a single backward then gives all
their gradients. Nothing is frozen, and nothing is known of what a block looks like inside.

Token → feature edges at an embedding cut are as in every rule, see `_tokens`.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import Cut, LocalRun, Rows, contract
from circuits.attribution._tokens import token_rows
from circuits.scores import EMBEDDING
from hooks.kernels import working_dtype
from hooks.types import Edit, Pass

CONSERVES = False
COPIES = 64  # of the prompt per pass; memory grows with it, time hardly


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges between neighbouring cuts, in blocks of up to `COPIES` targets per cut."""
    if run.starts_at_embedding:
        yield token_rows(run)
    numbers = list(range(1 if run.starts_at_embedding else 0, len(run.cuts) + 1))
    most = max((len(run.target_rows(n)) for n in numbers), default=0)
    for first in range(0, most, COPIES):
        yield from _block(run, numbers, slice(first, first + COPIES))


def _block(run: LocalRun, numbers: list[int], part: slice) -> Iterator[Rows]:
    copies = min(COPIES, max(len(run.target_rows(n)[part]) for n in numbers))
    arriving, leaves, logits = _forward(run, copies)
    values: dict[int, Tensor] = {}
    for number in numbers:
        if number == len(run.cuts):
            chosen = run.targets[part]
            values[number] = (
                torch.stack([t.value(logits[row]) for row, t in enumerate(chosen)]) if chosen else logits.new_zeros(0)
            )
        else:
            values[number] = _preactivations(run.cuts[number], part, arriving[number])
    totals = [value.double().sum() for value in values.values()]
    total = torch.stack([part.to(totals[0].device) for part in totals]).sum()
    order = [number for number in numbers if len(values[number])]
    gradients = torch.autograd.grad(total, [leaves[number] for number in order])
    for number, gradient in zip(order, gradients, strict=True):
        value = values[number].detach()
        weights = contract(run.cut_before(number), gradient[: len(value)], run.embedding)
        bias = _encoder_bias(run, number, part)
        yield Rows(run.target_rows(number)[part], run.source_rows(number), weights, value - bias)


def _forward(run: LocalRun, copies: int) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """One pass with the stream detached at every cut: what arrives at each, and the leaf that goes on."""
    arriving: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}

    def detach(number: int) -> Edit:
        def apply(x: Tensor, at: Pass) -> Tensor:
            arriving[number] = x
            leaves[number + 1] = x.detach().requires_grad_()
            return leaves[number + 1]

        return Edit(run.cuts[number].transcoder.write, apply)

    def start(x: Tensor, at: Pass) -> Tensor:
        leaves[0] = x.detach().requires_grad_()
        return leaves[0]

    edits = [Edit(EMBEDDING, start), *(detach(number) for number in range(len(run.cuts)))]
    logits = run.model.host.forward_with_gradients(run.recording.batch.rows([0] * copies), edits)
    return arriving, leaves, logits


def _preactivations(cut: Cut, part: slice, x: Float[Tensor, "copy pos d_model"]) -> Float[Tensor, " target"]:
    """pre_j of target j, read from copy j at its own position."""
    pos, feature = cut.pos[part], cut.feature[part]
    stream = cut.transcoder.normed(x[torch.arange(len(pos)), pos])
    rows = cut.transcoder.W_enc[feature].to(stream.dtype)
    return (stream * rows).sum(-1) + cut.transcoder.b_enc[feature].to(stream.dtype)


def _encoder_bias(run: LocalRun, number: int, part: slice) -> Float[Tensor, " target"] | float:
    """w_j · ln_b + b_j: the part of a pre-activation that no source can claim."""
    if number == len(run.cuts):
        return 0.0
    transcoder, feature = run.cuts[number].transcoder, run.cuts[number].feature[part]
    dtype = working_dtype(transcoder.W_enc)
    bias = transcoder.b_enc[feature].to(dtype)
    if transcoder.norm_bias is not None:
        bias = bias + transcoder.W_enc[feature].to(dtype) @ transcoder.norm_bias.to(dtype)
    return bias
