"""ose: one step exact. An edge is the measured change at the target when the source is removed.

    e_ij = pre_j(x) − pre_j(x − a_i d_i)

The model between the two nodes is run, and every other cut is held at its clean value. So the edge is the measurement
itself, curvature included. The rule does not conserve. It costs one pass of the model per source (all cuts of a
whole-stream set share the pass), so it is for small graphs, and for scores of candidates:

    s_i = g_{L+k} · (x_{L+k} − x'_{L+k})

runs the next k blocks after the feature, and then uses the plain model's gradient (k = 1), or another rule's gradient
where that predicts better (docs/rules.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution import exact
from circuits.edges import Cut, LocalRun, Removal, Rows, feature_values, joins_at, run_held, token_rows
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import EMBEDDING, Site

CONSERVES = False
BLOCKS = 1

Gradients = Callable[..., dict[Site, Tensor]]  # of a rule, see `circuits.attribution`


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph. Memory: every edge into a group at once."""
    apart = [number for number in run.groups if run.reads_embedding(number)]
    groups = [number for number in run.groups if number not in apart]
    inner = [number for number in groups if number < len(run.cuts)]
    feeders = list(dict.fromkeys(feeder for number in groups for feeder in run.feeders(number)))
    sources = {feeder: _sources(run, feeder) for feeder in feeders}
    packs = _packs(run, {feeder: len(found) for feeder, found in sources.items()})
    rows = [{_site(run, f): sources[f][i] for f, i in pack.items()} for pack in packs]
    dtype = run.embedding.dtype
    weights = {
        n: {f: torch.zeros(len(run.target_rows(n)), len(sources[f]), dtype=dtype) for f in run.feeders(n)}
        for n in groups
    }
    clean = {number: _clean(run, number) for number in inner}
    looks = {}
    for site in {run.reads(number) for number in inner}:
        here = [number for number in inner if run.reads(number) == site]

        def look(x: Tensor, start: int, here: list[int] = here) -> None:
            for number in here:
                cut = run.cuts[number]
                after = feature_values(run.model, cut.layer, cut.pos, cut.feature, x)
                _fill(weights[number], packs[start : start + len(x)], clean[number] - after)

        assert site is not None
        looks[site] = look
    layers = [cut.layer for cut in run.cuts]
    after = run_held(run.model, run.recording, layers, rows, looks, run.targets)
    last = len(run.cuts)
    values = run_held(run.model, run.recording, layers, [{}], {}, run.targets)[0]
    _fill(weights[last], packs, values - after)
    clean[last] = values
    for number in groups:
        joined = torch.cat([weights[number][feeder] for feeder in run.feeders(number)], dim=1)
        joined[_unreachable(run, number, sources)] = 0
        yield Rows(run.target_rows(number), run.source_rows(number), joined, clean[number].to(joined.dtype))
    yield from (token_rows(run, number) for number in apart)


def _unreachable(
    run: LocalRun, number: int, sources: Mapping[int | None, list[Removal]]
) -> Bool[Tensor, "target source"]:
    """Edges from later positions, and from sources that write zero. A measurement there would be only rounding."""
    pos = torch.from_numpy(run.index.pos)
    later = pos[run.source_rows(number)] > pos[run.target_rows(number)][:, None]
    silent = [not bool(one.vector.any()) for feeder in run.feeders(number) for one in sources[feeder]]
    return later | torch.tensor(silent)


def _packs(run: LocalRun, sizes: Mapping[int | None, int]) -> list[dict[int | None, int]]:
    """Which sources share a row: one of each cut, if no group is fed by two cuts; else each source has its own row."""
    if all(cut.write.whole_stream for cut in run.cuts):
        longest = max(sizes.values(), default=0)
        return [{feeder: n for feeder, size in sizes.items() if n < size} for n in range(longest)]
    return [{feeder: n} for feeder, size in sizes.items() for n in range(size)]


def _fill(
    weights: Mapping[int | None, Tensor], packs: list[dict[int | None, int]], change: Float[Tensor, "row target"]
) -> None:
    for feeder, into in weights.items():
        hits = [(row, pack[feeder]) for row, pack in enumerate(packs) if feeder in pack]
        if hits:
            at, column = (list(part) for part in zip(*hits, strict=True))
            into[:, column] = change[at].T.to(into.dtype)


def _site(run: LocalRun, feeder: int | None) -> Site:
    return EMBEDDING if feeder is None else run.cuts[feeder].write


def _sources(run: LocalRun, feeder: int | None) -> list[Removal]:
    """The vector that each source of a cut writes, in the order of `LocalRun.source_rows`."""
    if feeder is None:
        still = Removal(None, torch.zeros_like(run.embedding[0]))
        return [*(Removal(t, x) for t, x in enumerate(run.embedding)), still]
    cut = run.cuts[feeder]
    fields = [Removal(t, x) for field in (cut.rest, cut.error) for t, x in enumerate(field)]
    return [*_written(cut), *fields, Removal(None, cut.bias)]


def _written(cut: Cut) -> list[Removal]:
    vectors = cut.transcoder.W_dec[cut.feature].to(cut.rest.dtype) * cut.activation[:, None].to(cut.rest.dtype)
    return [Removal(int(t), vector) for t, vector in zip(cut.pos, vectors, strict=True)]


def _clean(run: LocalRun, number: int) -> Float[Tensor, " target"]:
    cut = run.cuts[number]
    return feature_values(run.model, cut.layer, cut.pos, cut.feature, run.recording.layers[cut.layer].read)[0]


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The plain model's gradient; the rule's own scores come from `rescore`."""
    return exact.gradients(model, recording, targets, sites, counterfactual)


ROWS = 64  # copies of the stream that are run through a block at once


@dataclass(frozen=True)
class OneStep:
    """The stream before some blocks that are to be run, and the metric's gradient after them.

    Attributes:
        start, stop: the blocks `start` to `stop` − 1; none if they are equal.
        clean, after: the recorded prompt's stream before and after these blocks.
        gradient: the metric's gradient with respect to the stream after them.
    """

    model: HookedModel
    start: int
    stop: int
    clean: Float[Tensor, "pos d_model"]
    after: Float[Tensor, "pos d_model"]
    gradient: Float[Tensor, "pos d_model"]

    def effects(self, pos: Int[Tensor, " row"], vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """g_stop · (x_stop − x'_stop); per row, one vector is removed at one position.

        Memory: two copies of the prompt's stream per row, and one block's own memory for them.
        """
        rows = self.clean.expand(len(pos), *self.clean.shape).clone()
        rows[torch.arange(len(rows), device=rows.device), pos.to(rows.device)] -= vectors.to(rows)
        moved = self.after - self.model.host.through_blocks(rows, self.start, self.stop)
        return (moved.to(self.gradient) * self.gradient).sum((1, 2)).double().cpu()


def one_step(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    layer: int,
    *,
    blocks: int = BLOCKS,
    gradients: Gradients = exact.gradients,
) -> OneStep:
    """The blocks after one layer's write site.

    Args:
        blocks: how many blocks are run. No more are run than there are before the targets; with 0 only the gradient is
            used.
        gradients: the function `gradients` of the rule that is used after them; the exact rule by default.

    Raises:
        UserError: the transcoders write inside a block.
    """
    write = model.store.sites(layer)[1]
    start, within = joins_at(write)
    if within:
        raise UserError(
            "ose runs whole blocks", expected="transcoders that write at a block's end or start", found=str(write)
        )
    end = targets[0].site
    top = model.host.n_layers if end is None else end.depth[0]
    stop = min(start + blocks, top)
    stream, point = _in_front_of(start), _in_front_of(stop)
    gradient = gradients(model, recording, targets, (point,))[point]
    _, seen = model.host.capture(recording.batch, [stream, point])
    return OneStep(model, start, stop, seen[stream][0], seen[point][0], gradient)


def _in_front_of(layer: int) -> Site:
    return Site("resid_post", layer - 1) if layer else EMBEDDING


def one_step_scores(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    layer: int,
    nodes: tuple[Int[Tensor, " node"], Int[Tensor, " node"], Float[Tensor, " node"]],
    *,
    blocks: int = BLOCKS,
    gradients: Gradients = exact.gradients,
) -> Float[Tensor, " node"]:
    """Scores of features of one layer, with the next blocks run.

    Args:
        nodes: positions, features, and how much of each is taken out.
        blocks, gradients: as of `one_step`.

    Raises:
        UserError: the transcoders write inside a block.
    """
    step = one_step(model, recording, targets, layer, blocks=blocks, gradients=gradients)
    W_dec, found = model.store[layer].W_dec, [torch.zeros(0, dtype=torch.float64)]
    for pos, feature, amount in zip(*(column.split(ROWS) for column in nodes), strict=True):
        written = amount[:, None].to(step.clean) * W_dec[feature].to(step.clean)
        found.append(step.effects(pos, written))
    return torch.cat(found)


def rescore(
    model: HookedModel, recording: Recording, targets: Sequence[AnyTarget], layer: int, nodes: tuple[Tensor, ...]
) -> Float[Tensor, " node"]:
    """What `score_features` asks a rule whose scores are no gradient."""
    pos, feature, amount = nodes
    return one_step_scores(model, recording, tuple(targets), layer, (pos, feature, amount))
