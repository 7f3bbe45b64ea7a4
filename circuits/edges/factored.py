"""Edges without an autograd graph: gradients walk down the recorded blocks, and every feeding cut is met on the way.

Where the next feeder is the whole stream one block below, which is every pair of neighbouring cuts of the same-site
convention, no gradient is ever formed at a source's position (`_middle`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import BLOCKS, Rule
from circuits.edges.metric_ends import constants, ends, target_ends
from circuits.edges.one_block import Projected, meet, project
from circuits.edges.run import Cut, LocalRun, Rows, contract, contract_here
from circuits.edges.stack import (
    MIDDLE,
    READABLE,
    WRITABLE,
    Front,
    Point,
    Stack,
    joins_at,
    read_from,
    stack_of,
    summed,
    walk,
    walk_on,
)
from circuits.edges.tokens import token_rows
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

MOST_AT_ONCE, ENTRIES_AT_ONCE = 1024, 1 << 25  # targets, and entries of a block of edges
STREAM_ENTRIES = 1 << 26  # of gradients held at every position at once


def all_edges(run: LocalRun, rule: Rule) -> Iterator[Rows] | None:
    """Every edge of the graph under a rule; None where the algebra does not know the model or a site."""
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
    run.room.clear()


def known_edges(run: LocalRun, rule: Rule, name: str) -> Iterator[Rows]:
    """`all_edges` for a rule that has no other way.

    Raises:
        UserError: the algebra does not know the model's blocks, or the set's site.
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
    way = way_to(run, stack, number, rule)
    d_model = stack.end.shape[1]
    most = max(1, min(MOST_AT_ONCE, ENTRIES_AT_ONCE // max(1, len(sources))))
    if way.projected is None:
        most = max(1, min(most, STREAM_ENTRIES // (len(stack.end) * d_model)))
    for start in range(0, len(rows), most):
        part = slice(start, start + most)
        point, gradients, pos, values = ends(run, stack, number, part, rule)
        if bool((pos.diff() < 0).any()):
            order = pos.argsort(stable=True)
            weights = way.edges(point, gradients[order], pos[order])
            weights = weights[order.argsort().to(weights.device)]
        else:
            weights = way.edges(point, gradients, pos)
        constant = constants(run, number, part).to(weights)
        weights[:, -1] += constant
        yield Rows(rows[part], sources, weights, values.to(weights) + constant)


@dataclass(frozen=True)
class Way:
    """What lies between a target group and the cuts that feed it.

    Attributes:
        feeders: newest first; None, last, stands for the tokens.
        held: module outputs that cuts replace, which no gradient passes.
        projected: the sources' images, where one block lies between the group and the one cut that feeds it, on the
            device of that cut's transcoder.
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
        """Edges from everything that feeds the group, columns as in `LocalRun.source_rows`; positions ascending.

        Formed where the feeders' transcoders are, and put together where the last one's is.
        """
        waiting = list(self.feeders)
        stack = self.stack.upto(int(pos.max()) + 1)
        parts = []
        for front in walk(stack, point, gradients, pos, self.rule, self.held):
            while waiting and front.point == _place(waiting[0]):
                parts.append(self._meet(waiting.pop(0), front))
            if not waiting:
                break
        if not self.run.paired:
            parts[-1][:, -1] += front.constant.to(parts[-1].device)
        return torch.cat([part.to(parts[-1].device) for part in parts], dim=1) if len(parts) > 1 else parts[0]

    def _meet(self, cut: Cut | None, front: Front) -> Float[Tensor, "target source"]:
        if front.here is not None:
            return contract_here(cut, front.here, front.pos, self.run.embedding)
        if cut is not None and self.projected is not None and front.pulled is not None and front.block is not None:
            return meet(cut, front.block, self.projected, front.pulled, self.rule, self.run.room)
        return contract(cut, front.everywhere, self.run.embedding)


def way_to(run: LocalRun, stack: Stack, number: int, rule: Rule) -> Way:
    """Work out what feeds a group, and project its sources where they are met in the middle."""
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
    return Way(run, stack, rule, feeders, held, projected)


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
    """Gradients of the metric at some sites under a rule, with no cut between: one walk down the whole model.

    Raises:
        UserError: the algebra does not know the model's blocks.
    """
    found = all_gradients(model, recording, targets, sites, rule)
    if found is None:
        _refuse(model, name)
    return found


def all_gradients(
    model: HookedModel, recording: Recording, targets: tuple[AnyTarget, ...], sites: tuple[Site, ...], rule: Rule
) -> dict[Site, Float[Tensor, "pos d_model"]] | None:
    """The same, and None where the algebra does not know the model or a site."""
    stack = stack_of(model.host, recording)
    end = targets[0].site
    if stack is None or not (end is None or end.name in READABLE) or not all(site.name in WRITABLE for site in sites):
        return None
    point, gradients, pos, _ = target_ends(model.host, stack, targets, rule)
    gradients = gradients * gradients.new_tensor([[target.weight] for target in targets])
    waiting, found = set(sites), dict[Site, Tensor]()
    for front in walk_on(stack, summed(stack, point, gradients, pos, rule)):
        here = {site for site in waiting if joins_at(site) == front.point}
        found |= dict.fromkeys(here, front.everywhere[0]) if here else {}
        waiting -= here
        if not waiting:
            break
    return found | {site: torch.zeros_like(stack.stream(joins_at(site))) for site in waiting}  # above the targets
