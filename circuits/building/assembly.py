"""A recorded prompt and chosen features → a graph: cuts, edges by a rule, and the values of every node."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from circuits.attribution import RULES
from circuits.building.feature_scores import FeatureScores, embedding_of, score_features
from circuits.building.shares import site_shares
from circuits.edges import LocalRun, Rows, Stack, feature_values, make_cuts, stack_of, stream_sites
from circuits.graph import (
    BIAS,
    ERROR,
    FEATURE,
    NONE,
    REMAINDER,
    REST,
    TARGET,
    TOKEN,
    Graph,
    NodeIndex,
    graph_scores,
    node_influence,
    signed_totals,
    start_weights,
)
from circuits.targets import AnyTarget, TargetLike, resolve_targets, whole_prompt
from hooks.errors import TargetError
from hooks.host import Prompt, computes_in
from hooks.model import HookedModel
from hooks.passes import Recording, check_same_length, is_sink, record

KEPT_FOR_TOTALS = 0.999  # share of sum |e| that must be kept, since a missing edge counts T_j / a_j times in a total


@dataclass(frozen=True)
class Setting:
    """The inputs of a graph.

    Attributes:
        counterfactual: the recording of the other prompt of a pair.
        scores: scores of all features, by the metric's own gradient.
        stack: what every block computed, held for what comes after the scores; None where the algebra does not know.
    """

    model: HookedModel
    recording: Recording
    counterfactual: Recording | None
    targets: tuple[AnyTarget, ...]
    scores: FeatureScores
    rule: str
    stack: Stack | None = field(default=None, repr=False)


def settle(
    model: HookedModel,
    prompt: Prompt,
    targets: TargetLike | Sequence[TargetLike] | None = None,
    *,
    counterfactual: Prompt | None = None,
    rule: str = "exact",
) -> Setting:
    """Record the prompt (or the pair), resolve the targets, score all features.

    Raises:
        UserError: the two prompts differ in length, or no write site is below the target.
    """
    recording = recorded(model, whole_prompt(model.host, prompt, targets))
    other = None if counterfactual is None else recorded(model, whole_prompt(model.host, counterfactual, targets))
    if other is not None:
        check_same_length(recording, other)
    logits = None if other is None else other.logits[0]
    resolved = resolve_targets(model.host, recording.logits[0], targets, store=model.store, counterfactual=logits)
    return score_setting(model, recording, other, resolved, rule)


def recorded(model: HookedModel, ids: list[int]) -> Recording:
    """One prompt's recording."""
    return record(model.host, model.store, model.host.batch([ids]), streams=stream_sites(model.host))


def score_setting(
    model: HookedModel,
    recording: Recording,
    other: Recording | None,
    resolved: tuple[AnyTarget, ...],
    rule: str,
) -> Setting:
    """Score all features of a recording.

    Raises:
        UserError: no write site is below the target.
    """
    stack = stack_of(model.host, recording)
    scores = score_features(model, recording, resolved, counterfactual=other)
    if not scores.layers:
        raise TargetError(
            f"nothing that the transcoders write reaches {resolved[0].name}",
            expected="a target above at least one of their sites",
            found=f"transcoders that write {model.store.convention.write}, from layer {model.store.layers[0]}",
        )
    return Setting(model, recording, other, resolved, scores, rule, None if rule == "autograd" else stack)


def make_run(setting: Setting, selected: Mapping[int, list[tuple[int, int]]]) -> LocalRun:
    """Number the nodes, and make the cuts of the recorded prompt."""
    model, recording, other = setting.model, setting.recording, setting.counterfactual
    embedding = embedding_of(model, recording)
    if other is not None:
        embedding = embedding - embedding_of(model, other)
    index = NodeIndex.build(
        recording.batch.lengths[0],
        selected,
        [target.pos for target in setting.targets],
        remainders=other is not None or not RULES[setting.rule].CONSERVES,
    )
    cuts = make_cuts(model, recording, selected, other)
    return LocalRun(model, recording, cuts, setting.targets, index, embedding, paired=other is not None)


def assemble(setting: Setting, run: LocalRun, max_in_edges: int, *, progress: bool = False) -> Graph:
    """Compute all edges by the rule. The strongest into each node are kept, and figures about all of them."""
    nodes = _node_values(setting, run)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    mass, left, worst = np.zeros(len(run.index)), 0.0, 0.0
    total = sum(len(run.target_rows(number)) for number in run.groups)
    leftover = not RULES[setting.rule].CONSERVES or run.paired
    with tqdm(total=total, desc="edges", unit="node", disable=not progress, leave=False) as bar:
        for rows in RULES[setting.rule].edge_rows(run):
            whole = _amounts(setting, run, rows) if run.paired else rows.values
            gap = whole - rows.weights.sum(1)
            size = rows.weights.abs().sum(1).double().cpu()
            scale = torch.maximum(whole.abs().double().cpu(), size).clamp_min(1e-30)
            left += float(gap.abs().double().sum())
            worst = max(worst, float((gap.abs().double().cpu() / scale).max()) if len(gap) else 0.0)
            mass[rows.targets.numpy()] = size.numpy()
            kept.append(_strongest(rows, max_in_edges))
            if leftover:
                kept.append(_remainder(run.index, rows, gap))
            bar.update(len(gap))
    source, target, weight = (torch.cat(column).cpu().numpy() for column in zip(*kept, strict=True))
    order = np.argsort(target * len(run.index) + source)  # by target, then source; a pair has one edge
    source, target, weight = source[order], target[order], weight[order].astype(np.float64)
    meta = _facts(setting, run) | {"sites": site_shares(run, nodes.score, setting.counterfactual)}
    start = start_weights(run.index, meta["targets"])
    influence, _ = node_influence(run.index, source, target, weight, mass, start)
    if leftover:
        meta["remainder_share"] = left / (left + mass.sum()) if left else 0.0
    else:
        meta["conservation"] = {"rule": setting.rule, "max_rel_error": worst}
    counted = run.index.kind[source] != REMAINDER
    meta["kept_weight"] = float(np.abs(weight).sum(where=counted) / mass.sum()) if mass.any() else 1.0
    effect = weight * nodes.per_unit[target]
    columns = (nodes.activation, nodes.score, influence, source, target, weight, effect)
    graph = Graph(run.index, *columns, meta, baseline=nodes.baseline if run.paired else None)
    graph = graph.with_meta(scores=_finite(asdict(graph_scores(graph, mass=mass))))
    if meta["kept_weight"] < KEPT_FOR_TOTALS:
        return graph
    return replace(graph, total=signed_totals(graph))


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """NaN (where no edge reaches the targets) as None: JSON has no NaN."""
    return {name: value if np.isfinite(value) else None for name, value in scores.items()}


def _strongest(rows: Rows, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source, target, weight) of the strongest edges into each target of a block; a weight of 0 is no edge."""
    columns = torch.arange(rows.weights.shape[1], device=rows.weights.device).expand_as(rows.weights)
    weights = rows.weights
    if rows.weights.shape[1] > most:
        columns = rows.weights.abs().topk(most, dim=1, sorted=False).indices
        weights = rows.weights.gather(1, columns)
    at, slot = weights.nonzero(as_tuple=True)
    return rows.sources[columns[at, slot].cpu()], rows.targets[at.cpu()], weights[at, slot].cpu()


def _remainder(
    index: NodeIndex, rows: Rows, gap: Float[Tensor, " target"]
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"], Float[Tensor, " edge"]]:
    """Edges from the group's remainder node: the target's value minus the sum of all other edges."""
    first = int(rows.targets[0])
    layer = NONE if index.kind[first] == TARGET else index.layer[first]
    (node,) = np.flatnonzero((index.kind == REMAINDER) & (index.feature == layer))
    return torch.full_like(rows.targets, int(node)), rows.targets, gap.to(rows.weights.dtype).cpu()


def _amounts(setting: Setting, run: LocalRun, rows: Rows) -> Float[Tensor, " target"]:
    """In a pair, the number to which the edges into each target should add up: its difference between the prompts."""
    other = setting.counterfactual
    assert other is not None
    targets = rows.targets.numpy()
    if run.index.kind[targets[0]] == TARGET:
        numbers = run.index.feature[targets]
        before, after = (_target_values(setting, recording) for recording in (other, setting.recording))
        return (after - before)[torch.from_numpy(numbers).to(after.device)].to(rows.values)
    layer = int(run.index.layer[targets[0]])
    pos, feature = (torch.from_numpy(column[targets]) for column in (run.index.pos, run.index.feature))
    device = setting.model.store[layer].device
    places = (layer, pos.to(device), feature.to(device))
    before, after = (
        feature_values(setting.model, *places, part.layers[layer].read)[0] for part in (other, setting.recording)
    )
    return (after - before).to(rows.values)


def _target_values(setting: Setting, recording: Recording) -> Float[Tensor, " target"]:
    site = setting.targets[0].site
    if site is None:
        out = recording.logits
    else:
        _, seen = setting.model.host.capture(recording.batch, [site])
        out = seen[site]
    values = [target.value(out)[0] for target in setting.targets]
    return torch.stack([value.to(values[0].device) for value in values])


@dataclass(frozen=True)
class NodeValues:
    """Per node: its activation (or norm) in the prompt and in the counterfactual, its score, and the metric's
    derivative per unit."""

    activation: Float[np.ndarray, " node"]
    baseline: Float[np.ndarray, " node"]
    score: Float[np.ndarray, " node"]
    per_unit: Float[np.ndarray, " node"]


def _node_values(setting: Setting, run: LocalRun) -> NodeValues:
    index, scores = run.index, setting.scores
    found = NodeValues(*(np.zeros(len(index)) for _ in range(4)))

    def put(kind: int, layer: int | None, size: Tensor, effect: Tensor) -> Int[np.ndarray, " row"]:
        rows = index.rows(kind, layer)
        found.activation[rows], found.score[rows] = size.double().cpu().numpy(), effect.double().cpu().numpy()
        return rows

    put(TOKEN, None, run.embedding.norm(dim=-1), scores.tokens)
    for cut in run.cuts:
        gradient = scores.gradients[cut.layer].to(cut.error)
        slope = _slopes(cut.transcoder.W_dec, cut.pos, cut.feature, gradient)
        rows = put(FEATURE, cut.layer, cut.activation, cut.activation * slope.to(cut.activation))
        found.per_unit[rows] = slope.double().cpu().numpy()
        if setting.counterfactual is not None:
            other = make_cuts(setting.model, setting.counterfactual, {cut.layer: _pairs(index, rows)})[0]
            found.baseline[rows] = other.activation.double().cpu().numpy()
            found.activation[rows] += found.baseline[rows]
        for kind, vector in ((REST, cut.rest), (ERROR, cut.error)):
            put(kind, cut.layer, vector.norm(dim=-1), (vector * gradient).sum(-1))
        put(BIAS, cut.layer, cut.bias.norm()[None], (gradient @ cut.bias.to(gradient)).sum()[None])
    weights = torch.tensor([target.weight for target in run.targets], dtype=torch.float64)
    values = _target_values(setting, setting.recording)
    rows = put(TARGET, None, values, values.double().cpu() * weights)
    found.per_unit[rows] = weights.numpy()
    if setting.counterfactual is not None:
        found.baseline[rows] = _target_values(setting, setting.counterfactual).double().cpu().numpy()
    return found


def _pairs(index: NodeIndex, rows: Int[np.ndarray, " row"]) -> list[tuple[int, int]]:
    return [(int(pos), int(feature)) for pos, feature in zip(index.pos[rows], index.feature[rows], strict=True)]


def _slopes(
    W_dec: Float[Tensor, "feature d_model"],
    pos: Int[Tensor, " node"],
    feature: Int[Tensor, " node"],
    gradient: Float[Tensor, "pos d_model"],
) -> Float[Tensor, " node"]:
    """d_i · g at each node's position; the rows of a few nodes are gathered at a time."""
    parts = zip(pos.split(4096), feature.split(4096), strict=True)
    found = [(gradient[t] * W_dec[f].to(gradient)).sum(-1) for t, f in parts]
    return torch.cat([gradient.new_zeros(0), *found])


def sinks(recording: Recording) -> list[int]:
    """Attention sinks: positions whose stream has, at any layer, `SINK` times the median norm. Usually the first
    token."""
    found: set[int] = set()
    for seen in recording.layers.values():
        found |= set(is_sink(seen.read[0].float().norm(dim=-1)).nonzero()[:, 0].tolist())
    return sorted(found)


def _facts(setting: Setting, run: LocalRun) -> dict[str, Any]:
    host, batch, store = run.model.host, run.recording.batch, run.model.store
    facts: dict[str, Any] = {
        "prompt": host.text(batch.ids[0].tolist()),
        "ids": batch.ids[0].tolist(),
        "precision": computes_in(host),
        "tokens": list(batch.strings[0]),
        "targets": [target.facts() for target in run.targets],
        "rule": setting.rule,
        "model": run.model.name,
        "transcoders": store.name,
        "fingerprint": run.model.fingerprint,
        "convention": {
            "read": str(store.convention.read),
            "write": str(store.convention.write),
            "source": store.convention.source,
        },
        "layers": [cut.layer for cut in run.cuts],
        "n_layers": host.n_layers,
        "sinks": sinks(run.recording),
    }
    if setting.counterfactual is not None:
        other = setting.counterfactual.batch
        facts["counterfactual"] = {"prompt": host.text(other.ids[0].tolist()), "ids": other.ids[0].tolist()}
    return facts
