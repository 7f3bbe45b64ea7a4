"""autograd: the exact rule by automatic differentiation of whole passes. Slow, but it works for any architecture, and
tests compare the other implementation with it.

    e_ij = a_i d_i · (∂x_read / ∂x_write)ᵀ · ∂pre_j/∂x_read

There is one forward pass over B copies of the prompt. The written tensor is detached at every cut, so the stream at a
target depends only on the cuts that feed it. Copy b is used for one target. If cuts replace the whole stream, copy b is
used for one target of *every* group, since no detached tensor feeds two groups; then a single backward pass gives all
their gradients. Nothing is held, and no knowledge of the inside of a block is needed.

Token → feature edges of a group that reads the embedding are as in every rule, see `circuits.edges.tokens`.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edges import LocalRun, Rows, constants, contract, token_rows
from circuits.targets import AnyTarget, metric
from hooks.host import tap
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import EMBEDDING, Site
from hooks.types import Edit, Pass

CONSERVES = False
COPIES = 64  # copies of the prompt per pass; more of them take more memory, but hardly more time


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph, group by group from the targets down; a pass serves up to `COPIES` targets of each.

    Memory: all edges of the groups that share a pass.
    """
    tokens = [number for number in run.groups if run.reads_embedding(number)]
    numbers = [number for number in run.groups if number not in tokens]
    apart = all(cut.write.whole_stream for cut in run.cuts)
    for together in [numbers] if apart else [[number] for number in numbers]:
        most = max((len(run.target_rows(n)) for n in together), default=0)
        found: dict[int, list[Rows]] = {number: [] for number in together}
        for first in range(0, most, COPIES):
            for number, rows in _block(run, together, slice(first, first + COPIES)):
                found[number].append(rows)
        for group in found.values():
            yield from group
    for number in tokens:
        yield token_rows(run, number)


@torch.inference_mode(False)
@torch.enable_grad()
def _block(run: LocalRun, numbers: list[int], part: slice) -> list[tuple[int, Rows]]:
    order = [number for number in numbers if len(run.target_rows(number)[part])]
    copies = max(len(run.target_rows(n)[part]) for n in order)
    arriving, leaves = _forward(run, copies)
    values = {number: _values(run, number, part, arriving[run.reads(number)]) for number in order}
    totals = [value.double().sum() for value in values.values()]
    total = torch.stack([value.to(totals[0].device) for value in totals]).sum()
    feeders = list(dict.fromkeys(feeder for number in order for feeder in run.feeders(number)))
    found = torch.autograd.grad(total, [leaves[feeder] for feeder in feeders], allow_unused=True)
    gradients = {
        feeder: torch.zeros_like(leaves[feeder]) if gradient is None else gradient
        for feeder, gradient in zip(feeders, found, strict=True)
    }
    out = []
    for number in order:
        value = values[number].detach()
        parts = [
            contract(None if feeder is None else run.cuts[feeder], gradients[feeder][: len(value)], run.embedding)
            for feeder in run.feeders(number)
        ]
        weights = torch.cat([part.to(parts[-1].device) for part in parts], dim=1)
        weights[:, -1] += constants(run, number, part).to(weights)
        rows = Rows(run.target_rows(number)[part], run.source_rows(number), weights, value.to(weights.device))
        out.append((number, rows))
    return out


def _forward(run: LocalRun, copies: int) -> tuple[dict[Site | None, Tensor], dict[int | None, Tensor]]:
    """One pass with every cut detached: the tensors at the sites that groups read, and the detached leaf of each
    cut."""
    arriving: dict[Site, Tensor] = {}
    out: dict[Site | None, Tensor]
    leaves: dict[int | None, Tensor] = {}

    def leaf(number: int | None) -> Edit:
        def apply(x: Tensor, at: Pass) -> Tensor:
            leaves[number] = x.detach().requires_grad_()
            return leaves[number]

        return Edit(EMBEDDING if number is None else run.cuts[number].write, apply)

    reads = {site for number in run.groups if (site := run.reads(number))} - {EMBEDDING}
    looks = [tap(site, arriving) for site in sorted(reads, key=str)]
    cuts = [leaf(number) for number in range(len(run.cuts))]
    batch = run.recording.batch.rows([0] * copies)
    out = {None: run.model.host.forward_with_gradients(batch, [leaf(None), *looks, *cuts])}
    for site, stream in arriving.items():
        out[site] = stream
    return out, leaves


def _values(run: LocalRun, number: int, part: slice, out: Float[Tensor, "copy pos width"]) -> Float[Tensor, " target"]:
    """Target j's value, from copy j."""
    if number == len(run.cuts):
        return torch.stack([target.value(out[row]) for row, target in enumerate(run.targets[part])])
    cut = run.cuts[number]
    pos, feature = cut.pos[part], cut.feature[part]
    stream = cut.transcoder.normed(out[torch.arange(len(pos)), pos.to(out.device)].to(pos.device))
    rows = cut.transcoder.W_enc[feature].to(stream.dtype)
    return (stream * rows).sum(-1) + cut.transcoder.b_enc[feature].to(stream.dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Float[Tensor, "pos d_model"]]:
    """The metric's gradient at some sites: one forward and one backward pass of the plain model, with nothing held.

    In a pair of prompts it is the derivative at the clean prompt, too.

    Memory: the autograd graph of one pass over the prompt.
    """
    seen: dict[Site, Tensor] = {}
    end = targets[0].site

    def start(x: Tensor, at: Pass) -> Tensor:
        return x.detach().requires_grad_()

    order = tuple(dict.fromkeys(sites))
    watched = dict.fromkeys([*order, *([end] if end else [])])
    edits = [Edit(EMBEDDING, start), *(tap(site, seen) for site in watched)]
    logits = model.host.forward_with_gradients(recording.batch, edits)
    value = metric(targets, logits if end is None else seen[end])[0]
    found = torch.autograd.grad(value, [seen[site] for site in order], allow_unused=True)
    return {
        site: torch.zeros_like(seen[site][0]) if gradient is None else gradient[0]
        for site, gradient in zip(order, found, strict=True)
    }
