"""Predicted against measured: what a graph claims about a node or an edge, and what really happens without it.

Nodes: the score of a feature against m(clean) − m(feature ablated), in the plain model with everything live. Edges:
the weight e_ij against the change of the target's pre-activation when the source is ablated and the piece of the model
between the two cuts runs for real. Both samples are spread over strength, layer and position, not taken from the top
only (that would flatter). Un-ablated rows in every batch give the noise floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsInt

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import Graph
from circuits.nodes import FEATURE, TARGET
from circuits.scores import score_features
from circuits.targets import Target
from hooks.errors import UserError
from hooks.host import Batch
from hooks.interventions.ablate import Ablate
from hooks.model import HookedModel
from hooks.sites import Site
from hooks.types import Edit, FeatureAddress, Pass, Positions

ROWS = 128  # ablations per pass
IDLE_ROWS = 4  # un-ablated rows in each pass


@dataclass(frozen=True)
class Verification:
    """Agreement of predictions with measurements on one prompt.

    Attributes:
        metric: the target whose value is measured.
        node_pearson, node_spearman: score against measured effect on the metric.
        logit_spearman: the same features' measured effect on the answer's *plain* logit against their score on it.
        edge_pearson, edge_spearman: edge weight against measured change of the target's pre-activation.
        n, n_edges: sample sizes.
        noise_floor: largest change of the metric between rows that nobody edited.
    """

    metric: str
    node_pearson: float
    node_spearman: float
    logit_spearman: float
    edge_pearson: float
    edge_spearman: float
    n: int
    n_edges: int
    noise_floor: float
    nodes: pd.DataFrame
    edges: pd.DataFrame

    def summary(self) -> dict[str, Any]:
        """The figures without the samples, JSON-able."""
        return {k: _finite(v) for k, v in vars(self).items() if k not in ("nodes", "edges")}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def verify(model: HookedModel, graph: Graph, *, n: int = 200, seed: int = 0) -> Verification:
    """Measure a sample of nodes and edges of a graph by really ablating features.

    Args:
        n: how many features, and how many edges, to measure (all of them if there are fewer).

    Raises:
        UserError: the graph belongs to another model or transcoder set.
    """
    _check_same(model, graph)
    batch = model.host.batch([graph.meta["ids"]])
    target = Target.of(graph.meta["targets"][0])
    nodes, noise = measure_nodes(model, batch, target, n=n, seed=seed, graph=graph)
    edges = measure_edges(model, batch, target, graph, n=n, seed=seed)
    return Verification(
        metric=target.name,
        node_pearson=correlation(nodes["score"], nodes["effect"]),
        node_spearman=rank_correlation(nodes["score"], nodes["effect"]),
        logit_spearman=rank_correlation(nodes["logit_score"], nodes["logit_effect"]),
        edge_pearson=correlation(edges["weight"], edges["effect"]),
        edge_spearman=rank_correlation(edges["weight"], edges["effect"]),
        n=len(nodes),
        n_edges=len(edges),
        noise_floor=noise,
        nodes=nodes,
        edges=edges,
    )


def measure_nodes(
    model: HookedModel, batch: Batch, target: Target, *, n: int, seed: int, graph: Graph | None = None
) -> tuple[pd.DataFrame, float]:
    """A table of features with their scores and measured effects, and the noise floor.

    The sample is of all active features. Where the graph has one as a node, the graph's own score is what is checked.
    """
    recording = model.record([batch.ids[0].tolist()])
    scored = score_features(model, recording, target).frame
    plain = Target("logit", target.tokens[:1], (1.0,), target.pos)
    keys = ["layer", "pos", "feature"]
    logit = score_features(model, recording, plain).frame.rename(columns={"score": "logit_score"})
    table = scored.merge(logit[[*keys, "logit_score"]], on=keys)
    if graph is not None:
        table["score"] = _claimed(graph, table)
    sample = stratified(table, table["score"].abs(), n, seed)
    addresses = [_address(row.layer, row.pos, row.feature) for row in sample.itertuples()]
    changed, idle = _ablated(model, batch, addresses, [target, plain], {})
    clean = [float(t.value(recording.logits)[0].double()) for t in (target, plain)]
    sample = sample.assign(effect=clean[0] - changed[0].numpy(), logit_effect=clean[1] - changed[1].numpy())
    return sample.reset_index(drop=True), float((idle[0] - clean[0]).abs().max())


def _claimed(graph: Graph, table: pd.DataFrame) -> pd.Series:
    """The graph's score of each feature that is one of its nodes; the recomputed one of the others."""
    rows = graph.index.rows(FEATURE)
    columns = {"layer": graph.index.layer, "pos": graph.index.pos, "feature": graph.index.feature}
    claims = pd.DataFrame({name: column[rows] for name, column in columns.items()}).assign(claim=graph.score[rows])
    joined = table.merge(claims, on=["layer", "pos", "feature"], how="left")
    return joined["claim"].fillna(joined["score"])


def measure_edges(model: HookedModel, batch: Batch, target: Target, graph: Graph, *, n: int, seed: int) -> pd.DataFrame:
    """A table of edges between features (and to the target) with their weights and measured effects."""
    index = graph.index
    into = (index.kind[graph.target] == FEATURE) | (graph.target == index.rows(TARGET)[0])
    rows = np.flatnonzero((index.kind[graph.source] == FEATURE) & into)
    table = pd.DataFrame(
        {
            "source": graph.source[rows],
            "target": graph.target[rows],
            "weight": graph.weight[rows],
            "layer": index.layer[graph.source[rows]],
            "pos": index.pos[graph.source[rows]],
        }
    )
    sample = stratified(table, table["weight"].abs(), n, seed)
    sources = sorted(set(sample["source"]))
    addresses = [_address(index.layer[row], index.pos[row], index.feature[row]) for row in sources]
    place = {row: number for number, row in enumerate(sources)}
    wanted: dict[Site, list[tuple[int, int, int]]] = {}  # site → (edge, ablation, position) whose stream is needed
    for number, edge in enumerate(sample.itertuples()):
        if index.kind[edge.target] == FEATURE:
            site = model.store.sites(int(index.layer[edge.target]))[0]
            wanted.setdefault(site, []).append((number, place[edge.source], int(index.pos[edge.target])))
    streams: dict[int, Tensor] = {}
    metric, _ = _ablated(model, batch, addresses, [target], wanted, streams)
    logits, clean = model.host.capture(batch, list(wanted))
    value = float(target.value(logits)[0].double())
    effects = []
    for number, edge in enumerate(sample.itertuples()):
        if number not in streams:
            effects.append(value - float(metric[0][place[edge.source]]))
            continue
        layer, pos, feature = (int(c[edge.target]) for c in (index.layer, index.pos, index.feature))
        before = clean[model.store.sites(layer)[0]][0, pos]
        change = (_preactivation(model, layer, feature, x) for x in (before, streams[number]))
        effects.append(next(change) - next(change))
    return sample.assign(effect=effects).reset_index(drop=True)


def _preactivation(model: HookedModel, layer: int, feature: int, x: Float[Tensor, " d_model"]) -> float:
    transcoder = model.store[layer]
    row = transcoder.W_enc[feature].to(torch.float64)
    return float(transcoder.normed(x).double() @ row + transcoder.b_enc[feature].double())


def _ablated(
    model: HookedModel,
    batch: Batch,
    addresses: list[FeatureAddress],
    targets: list[Target],
    wanted: Mapping[Site, list[tuple[int, int, int]]],
    streams: dict[int, Tensor] | None = None,
) -> tuple[list[Float[Tensor, " row"]], list[Float[Tensor, " idle"]]]:
    """One row per ablation: each target's value, and the same for untouched rows.

    `streams` is filled with the stream at the wanted (site, ablation, position), by edge number; nothing else of the
    pass is kept. A site shows what *arrives*: the ablated feature's own cut is edited after it is read, and between an
    edited cut and the next runs only the piece of the model between the two.
    """
    values: list[list[Tensor]] = [[] for _ in targets]
    idle: list[list[Tensor]] = [[] for _ in targets]
    for start in range(0, max(1, len(addresses)), ROWS):
        part = addresses[start : start + ROWS]
        rows = batch.rows([0] * (len(part) + IDLE_ROWS))
        plans = [[Ablate(address)] for address in part] + [[]] * IDLE_ROWS
        looks = [_look(site, needs, start, len(part), streams) for site, needs in wanted.items()]
        where = torch.full((len(rows.lengths),), targets[0].pos)
        logits = model.host.forward_at(rows, where, [*looks, *model.edits(rows, plans)])
        for number, target in enumerate(targets):
            measured = target.of_row(logits).double().cpu()
            values[number].append(measured[: len(part)])
            idle[number].append(measured[len(part) :])
    return [torch.cat(v) for v in values], [torch.cat(v) for v in idle]


def _look(
    site: Site, needs: list[tuple[int, int, int]], start: int, count: int, streams: dict[int, Tensor] | None
) -> Edit:
    """A tap that keeps single vectors."""

    def look(x: Tensor, at: Pass) -> Tensor:
        for number, ablation, pos in needs:
            if streams is not None and start <= ablation < start + count:
                streams[number] = x[ablation - start, pos].clone()
        return x

    return Edit(site, look)


def stratified(table: pd.DataFrame, size: pd.Series, n: int, seed: int) -> pd.DataFrame:
    """`n` rows spread evenly over deciles of `size`, then layers, then positions.

    Systematic sampling: sort by the strata, shuffle inside them, take every (N/n)-th row from a random start.
    """
    if len(table) <= n:
        return table
    rng = np.random.default_rng(seed)
    decile = (size.rank(method="first") * 10 / (len(table) + 1)).astype(int)
    order = table.assign(_decile=decile, _shuffle=rng.random(len(table)))
    order = order.sort_values(["_decile", "layer", "pos", "_shuffle"])
    picks = np.floor((np.arange(n) + rng.random()) * len(table) / n).astype(int)
    return order.iloc[picks].drop(columns=["_decile", "_shuffle"])


def correlation(predicted: pd.Series, measured: pd.Series) -> float:
    """Pearson's correlation; NaN where one side does not vary."""
    return float(predicted.astype(float).corr(measured.astype(float)))


def rank_correlation(predicted: pd.Series, measured: pd.Series) -> float:
    """Spearman's correlation, ties at their mean rank."""
    return correlation(predicted.rank(), measured.rank())


def _address(layer: SupportsInt, pos: SupportsInt, feature: SupportsInt) -> FeatureAddress:
    return FeatureAddress(int(layer), int(feature), Positions("index", int(pos)))


def _check_same(model: HookedModel, graph: Graph) -> None:
    if graph.meta.get("fingerprint") != model.fingerprint:
        raise UserError(
            "the graph belongs to another model or set of transcoders",
            expected=f"{graph.meta.get('model')} with {graph.meta.get('transcoders')}",
            found=f"{model.name} with {model.store.name}",
        )
