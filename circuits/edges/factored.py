"""Edges without an autograd graph: gradients are carried down through the recorded blocks, and at every feeding cut the
edges from its nodes are computed.

If the feeding cut is one block below and replaces the whole stream, no gradient is computed at a source's position
(`one_block`). This is so for all neighbouring cuts of a set that reads and writes the same site.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import BLOCKS, Rule
from circuits.edges.metric_ends import constants, ends, target_ends
from circuits.edges.one_block import Projected, one_block_edges, project
from circuits.edges.run import Cut, LocalRun, Rows, contract, contract_here
from circuits.edges.stack import (
    MIDDLE,
    READABLE,
    WRITABLE,
    Front,
    Point,
    Stack,
    carry_down,
    carry_on,
    joins_at,
    read_from,
    stack_of,
    summed,
)
from circuits.edges.tokens import token_rows
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

MOST_AT_ONCE, ENTRIES_AT_ONCE = 1024, 1 << 25  # targets, and entries of a block of edges
STREAM_ENTRIES = 1 << 26  # entries of gradients at every position that are in memory at once


def all_edges(run: LocalRun, rule: Rule) -> Iterator[Rows] | None:
    """Every edge of the graph under a rule; None where the algebra does not support the model or a site."""
    sites = [site for cut in run.cuts for site in (cut.read, cut.write)]
    reads = [run.targets[0].site] if run.targets else []
    known = all(site.name in READABLE for site in [*sites[::2], *(site for site in reads if site)])
    if not known or not all(site.name in WRITABLE for site in sites[1::2]) or run.stack is None:
        return None
    return _all_edges(run, run.stack, rule)


def _all_edges(run: LocalRun, stack: Stack, rule: Rule) -> Iterator[Rows]:
    for number in run.groups:
        if run.reads_embedding(number):
            yield token_rows(run, number)
        else:
            yield from group_edges(run, stack, number, rule)
    run.buffer.clear()


def known_edges(run: LocalRun, rule: Rule, name: str) -> Iterator[Rows]:
    """`all_edges` for a rule that cannot compute edges otherwise.

    Raises:
        UserError: the algebra does not support the model's blocks, or the set's sites.
    """
    edges = all_edges(run, rule)
    if edges is None:
        _refuse(run.model, name)
    return edges


def _refuse(model: HookedModel, name: str) -> NoReturn:
    raise UserError(
        f"rule {name} needs to know what a block computes",
        expected=f"a model of {', '.join(BLOCKS)} with plain weights, and transcoders between the stream and the MLP",
        found=f"{type(model.host.model).__name__}, transcoders that read {model.store.convention.read} and "
        f"write {model.store.convention.write}",
        repair="use --rule autograd",
    )


def group_edges(run: LocalRun, stack: Stack, number: int, rule: Rule) -> Iterator[Rows]:
    """All edges into one target group, some targets at a time."""
    rows, sources = run.target_rows(number), run.source_rows(number)
    if not len(rows):
        return
    between = blocks_between(run, stack, number, rule)
    d_model = stack.end.shape[1]
    most = max(1, min(MOST_AT_ONCE, ENTRIES_AT_ONCE // max(1, len(sources))))
    if between.projected is None:
        most = max(1, min(most, STREAM_ENTRIES // (len(stack.end) * d_model)))
    for start in range(0, len(rows), most):
        part = slice(start, start + most)
        point, gradients, pos, values = ends(run, stack, number, part, rule)
        if bool((pos.diff() < 0).any()):
            order = pos.argsort(stable=True)
            weights = between.edges(point, gradients[order], pos[order])
            weights = weights[order.argsort().to(weights.device)]
        else:
            weights = between.edges(point, gradients, pos)
        constant = constants(run, number, part).to(weights)
        weights[:, -1] += constant
        yield Rows(rows[part], sources, weights, values.to(weights) + constant)


@dataclass(frozen=True)
class Between:
    """The blocks between a target group and the cuts that feed it.

    Attributes:
        feeders: the cuts, highest first; None, always last, means the tokens.
        held: module outputs that cuts replace; no gradient passes through them.
        projected: the sources' images; only if one cut feeds the group, one block lies between them, and both are on
            one device.
    """

    run: LocalRun
    stack: Stack
    rule: Rule
    feeders: tuple[Cut | None, ...]
    held: frozenset[Site]
    projected: "Projected | None"

    def edges(
        self, point: Point, gradients: Float[Tensor, "target d_model"], pos: Int[Tensor, " target"]
    ) -> Float[Tensor, "target source"]:
        """Edges from all sources that feed the group, columns as in `LocalRun.source_rows`. `pos` must ascend.

        They are computed on the devices of the feeders' transcoders, and joined on the device of the last one.
        """
        waiting = list(self.feeders)
        stack = self.stack.upto(int(pos.max()) + 1)
        parts = []
        for front in carry_down(stack, point, gradients, pos, self.rule, self.held):
            while waiting and front.point == _place(waiting[0]):
                parts.append(self._edges_from(waiting.pop(0), front))
            if not waiting:
                break
        if not self.run.paired:
            parts[-1][:, -1] += front.constant.to(parts[-1].device)
        return torch.cat([part.to(parts[-1].device) for part in parts], dim=1) if len(parts) > 1 else parts[0]

    def _edges_from(self, cut: Cut | None, front: Front) -> Float[Tensor, "target source"]:
        if front.here is not None:
            return contract_here(cut, front.here, front.pos, self.run.embedding)
        if cut is not None and self.projected is not None and front.pulled is not None and front.block is not None:
            return one_block_edges(cut, front.block, self.projected, front.pulled, self.rule, self.run.buffer)
        return contract(cut, front.everywhere, self.run.embedding)


def blocks_between(run: LocalRun, stack: Stack, number: int, rule: Rule) -> Between:
    """Find the cuts that feed a group, and project their nodes if one block lies between."""
    feeders = tuple(None if feeder is None else run.cuts[feeder] for feeder in run.feeders(number))
    writes = (cut.write for cut in run.cuts)
    held = frozenset(site for site in writes if not site.whole_stream)
    site, cut = run.reads(number), feeders[0]
    top = (len(stack.blocks), 0) if site is None else read_from(site)
    projected = None
    if cut is not None and len(feeders) == 1:
        layer, within = joins_at(cut.write)
        near = within == 0 and top in ((layer + 1, 0), (layer, MIDDLE))
        if near and stack.blocks[layer].record.x.device == cut.pos.device:
            projected = project(run.model.store, cut, stack.blocks[layer], rule)
    return Between(run, stack, rule, feeders, held, projected)


def _place(cut: Cut | None) -> Point:
    return (0, 0) if cut is None else joins_at(cut.write)


# -- gradients of the metric in the plain model --------------------------------------------------------------------


def known_gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    rule: Rule,
    name: str,
) -> dict[Site, Float[Tensor, "pos d_model"]]:
    """Gradients of the metric at some sites under a rule, without cuts: they are carried down the whole model once.

    Raises:
        UserError: the algebra does not support the model's blocks.
    """
    found = all_gradients(model, recording, targets, sites, rule)
    if found is None:
        _refuse(model, name)
    return found


def all_gradients(
    model: HookedModel, recording: Recording, targets: tuple[AnyTarget, ...], sites: tuple[Site, ...], rule: Rule
) -> dict[Site, Float[Tensor, "pos d_model"]] | None:
    """The same; None where the algebra does not support the model or a site."""
    stack = stack_of(model.host, recording)
    end = targets[0].site
    if stack is None or not (end is None or end.name in READABLE) or not all(site.name in WRITABLE for site in sites):
        return None
    point, gradients, pos, _ = target_ends(model.host, stack, targets, rule)
    gradients = gradients * gradients.new_tensor([[target.weight] for target in targets])
    waiting, found = set(sites), dict[Site, Tensor]()
    for front in carry_on(stack, summed(stack, point, gradients, pos, rule)):
        here = {site for site in waiting if joins_at(site) == front.point}
        found |= dict.fromkeys(here, front.everywhere[0]) if here else {}
        waiting -= here
        if not waiting:
            break
    return found | {site: torch.zeros_like(stack.stream(joins_at(site))) for site in waiting}  # above the targets
