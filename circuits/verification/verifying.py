"""Predicted against measured: a graph's numbers for nodes and edges, compared with interventions.

Nodes: the score of a feature is compared with m(clean) − m(feature ablated), and with m(feature doubled) − m(clean), in
the plain model with everything live. Edges: the weight e_ij is compared with the change of the target's value when the
source's vector is removed, the model between the two runs, and every other cut is held at its clean value. Samples are
spread over strength, layer and position: the strongest ones alone would agree too well. Unedited rows give the noise
floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.agreement import Agreement, agree, rank_correlation
from circuits.building import Setting, recorded, score_features, score_setting
from circuits.drawing import plot_sample
from circuits.edges import Removal, feature_values, run_held
from circuits.graph import FEATURE, TARGET, Graph, check_same
from circuits.targets import Target, metric_name, read_targets
from hooks.host import measured
from hooks.model import HookedModel
from hooks.sites import Site
from hooks.whole import whole

KEYS = ["layer", "pos", "feature"]
IDLE_EVERY = 16  # one of so many rows is not edited


@dataclass(frozen=True)
class Verification:
    """Agreement of predictions with measurements on one prompt.

    Attributes:
        metric: the measured metric: the sum of the targets, each times its weight.
        ablation, doubling: scores against the measured effects of ablating and of doubling features.
        edge: edge weights against the measured change of the target's value.
        logit_spearman: correlation of the same features' measured effect on the answer's *plain* logit with their score
            for it; None if the target is not a difference of logits.
        noise_floor: largest change of the metric between unedited rows.
        nodes, edges: the samples.
    """

    metric: str
    ablation: Agreement
    doubling: Agreement
    edge: Agreement
    logit_spearman: float | None
    noise_floor: float
    edge_noise_floor: float
    nodes: pd.DataFrame
    edges: pd.DataFrame

    @property
    def node_pearson(self) -> float | None:
        """Of scores and ablations."""
        return self.ablation.pearson

    @property
    def node_spearman(self) -> float | None:
        """Of scores and ablations."""
        return self.ablation.spearman

    @property
    def edge_pearson(self) -> float | None:
        """Of weights and one-step ablations."""
        return self.edge.pearson

    @property
    def edge_spearman(self) -> float | None:
        """Of weights and one-step ablations."""
        return self.edge.spearman

    @property
    def n(self) -> int:
        """Features measured."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Edges measured."""
        return len(self.edges)

    def summary(self) -> dict[str, Any]:
        """The figures without the samples, JSON-able."""
        short = ("metric", "node_pearson", "node_spearman", "logit_spearman", "edge_pearson", "edge_spearman")
        flat = {name: getattr(self, name) for name in (*short, "n", "n_edges", "noise_floor", "edge_noise_floor")}
        return flat | {name: getattr(self, name).summary() for name in ("ablation", "doubling", "edge")}

    def sample(self) -> dict[str, Any]:
        """The measured items, JSON-able. `plot_sample` draws them."""
        nodes = {name: self.nodes[name].tolist() for name in ("score", "effect", "doubled")}
        edges = {name: self.edges[name].tolist() for name in ("weight", "effect")}
        floors = {"noise_floor": self.noise_floor, "edge_noise_floor": self.edge_noise_floor}
        return {"nodes": nodes, "edges": edges, **floors}

    def plot(self, path: str | Path) -> None:
        """Scatter plots of predicted against measured, PNG or SVG by the file's suffix.

        Raises:
            UserError: the file cannot be written, or its suffix is another.
        """
        plot_sample(self.sample(), Path(path))


@measured
def verify(model: HookedModel, graph: Graph, *, n: int = 200, seed: int = 0) -> Verification:
    """Measure a sample of nodes and edges of a graph by removing features from the model's streams.

    Args:
        n: how many features, and how many edges, to measure (all of them if there are fewer).

    Raises:
        UserError: the graph belongs to another model or transcoder set.
    """
    n, seed = whole(n, "n", least=0), whole(seed, "seed", least=0)
    check_same(model, graph)
    facts = graph.meta
    other = None if "counterfactual" not in facts else recorded(model, facts["counterfactual"]["ids"])
    targets = read_targets(facts["targets"], model.store)
    setting = score_setting(model, recorded(model, facts["ids"]), other, targets, facts["rule"])
    return verify_in(setting, graph, n=n, seed=seed)


def verify_in(setting: Setting, graph: Graph, *, n: int, seed: int) -> Verification:
    """The same for a prompt that is already recorded and scored."""
    nodes, noise = measure_nodes(setting, n=n, seed=seed, graph=graph)
    edges, edge_noise = measure_edges(setting, graph, n=n, seed=seed)
    logit = rank_correlation(nodes["logit_score"], nodes["logit_effect"]) if "logit_score" in nodes else np.nan
    return Verification(
        metric=metric_name(setting.targets),
        ablation=agree(nodes["score"], nodes["effect"], noise),
        doubling=agree(nodes["score"], nodes["doubled"], noise),
        edge=agree(edges["weight"], edges["effect"], edge_noise),
        logit_spearman=float(logit) if np.isfinite(logit) else None,
        noise_floor=noise,
        edge_noise_floor=edge_noise,
        nodes=nodes,
        edges=edges,
    )


def measure_nodes(setting: Setting, *, n: int, seed: int, graph: Graph | None = None) -> tuple[pd.DataFrame, float]:
    """A table of features with their scores and measured effects, and the noise floor.

    The sample is drawn from all active features. If a feature is a node of the graph, the graph's own score is checked.
    In a pair of prompts a feature is not set to zero but to its activation in the counterfactual.
    """
    table, targets = setting.scores.frame, list(setting.targets)
    plain = _plain_logit(setting)
    if plain is not None:
        scored = score_features(setting.model, setting.recording, plain, counterfactual=setting.counterfactual)
        table = table.merge(scored.frame[[*KEYS, "score"]].rename(columns={"score": "logit_score"}), on=KEYS)
        targets.append(plain)
    if graph is not None:
        table = table.assign(score=_claimed(graph, table))
    sample = stratified(table, table["score"].abs(), n, seed).reset_index(drop=True)
    written = [_written(setting, *row) for row in sample[[*KEYS, "activation", "baseline"]].itertuples(index=False)]
    rows: list[dict[Site, Removal]] = [{site: one} for site, one in written]
    rows += [{site: Removal(one.pos, -one.vector)} for site, one in written]
    values, idle = _run(setting, rows, targets)
    weights = torch.tensor([target.weight for target in setting.targets], dtype=torch.float64)
    metric, idle_metric = (part[:, : len(weights)] @ weights for part in (values, idle))
    ablated, doubled = metric[: len(sample)], metric[len(sample) :]
    clean = idle_metric[0]
    sample = sample.assign(effect=(clean - ablated).numpy(), doubled=(doubled - clean).numpy())
    if plain is not None:
        sample = sample.assign(logit_effect=(idle[0, -1] - values[: len(sample), -1]).numpy())
    return sample, float((idle_metric - clean).abs().max())


def _plain_logit(setting: Setting) -> Target | None:
    (first, *more) = setting.targets
    if more or not isinstance(first, Target) or first.coefficients[0] != 1.0:
        return None
    return Target("logit", first.tokens[:1], (1.0,), first.pos)


def _written(
    setting: Setting, layer: Any, pos: Any, feature: Any, activation: float, baseline: float
) -> tuple[Site, Removal]:
    """The vector that one feature writes, minus that of the counterfactual."""
    transcoder = setting.model.store[int(layer)]
    row = transcoder.W_dec[int(feature)]
    vector = row.to(torch.promote_types(row.dtype, torch.float32)) * (float(activation) - float(baseline))
    return transcoder.write, Removal(int(pos), vector)


def _run(
    setting: Setting, rows: Sequence[dict[Site, Removal]], targets: Sequence[Any]
) -> tuple[Float[Tensor, "row target"], Float[Tensor, "idle target"]]:
    """Run the plain model with each row's removal. Returns the targets' values, and those of unedited rows."""
    mixed, real, idle = with_idle(rows)
    values = run_held(setting.model, setting.recording, (), mixed, {}, targets)
    return values[real], values[idle]


def with_idle(rows: Sequence[dict[Site, Removal]]) -> tuple[list[dict[Site, Removal]], list[int], list[int]]:
    """The rows with unedited (idle) ones added between them; the first row is idle. Also returns the indices of the
    given rows and of the idle ones."""
    mixed: list[dict[Site, Removal]] = []
    real = []
    for number, row in enumerate(rows):
        if number % (IDLE_EVERY - 1) == 0:
            mixed.append({})
        real.append(len(mixed))
        mixed.append(row)
    mixed = mixed or [{}]
    return mixed, real, [place for place, row in enumerate(mixed) if not row]


def _claimed(graph: Graph, table: pd.DataFrame) -> pd.Series:
    """The graph's score of each feature that is a node; for the others, the score computed again."""
    rows = graph.index.rows(FEATURE)
    claims = pd.DataFrame({name: getattr(graph.index, name)[rows] for name in KEYS}).assign(claim=graph.score[rows])
    joined = table.merge(claims, on=KEYS, how="left")
    return joined["claim"].fillna(joined["score"])


def measure_edges(setting: Setting, graph: Graph, *, n: int, seed: int) -> tuple[pd.DataFrame, float]:
    """A table of edges from features with their weights and measured effects, and their noise floor."""
    index = graph.index
    into = (index.kind[graph.target] == FEATURE) | (index.kind[graph.target] == TARGET)
    rows = np.flatnonzero((index.kind[graph.source] == FEATURE) & into)
    columns = {name: getattr(graph, name)[rows] for name in ("source", "target", "weight")}
    places = {name: getattr(index, name)[graph.source[rows]] for name in ("layer", "pos")}
    table = pd.DataFrame(columns | places)
    sample = stratified(table, table["weight"].abs(), n, seed).reset_index(drop=True)
    sources = sorted(set(sample["source"].tolist()))
    taken = [_written_by(setting, graph, row) for row in sources]
    mixed, real, idle = with_idle([{site: one} for site, one in taken])
    seen = _Seen(setting, graph, sample, len(mixed))
    layers = list(setting.scores.layers)
    values = run_held(setting.model, setting.recording, layers, mixed, seen.looks(), setting.targets)
    seen.put_targets(values)
    at = [real[sources.index(source)] for source in sample["source"]]
    edges = torch.arange(len(sample))
    effect = seen.values[idle[0], edges] - seen.values[at, edges]
    noise = (seen.values[idle] - seen.values[idle[0]]).abs().max() if len(sample) else torch.zeros(())
    return sample.assign(effect=effect.numpy()), float(noise)


def _written_by(setting: Setting, graph: Graph, row: int) -> tuple[Site, Removal]:
    index = graph.index
    place = (index.layer[row], index.pos[row], index.feature[row])
    return _written(setting, *place, float(graph.difference[row]), 0.0)


@dataclass(frozen=True)
class _Seen:
    """The value of every sampled edge's target in every row."""

    setting: Setting
    graph: Graph
    sample: pd.DataFrame
    n_rows: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", torch.zeros(self.n_rows, len(self.sample), dtype=torch.float64))

    values: Float[Tensor, "row edge"] = None  # type: ignore[assignment]

    def looks(self) -> dict[Site, Any]:
        """One function per site that a sampled target reads."""
        index, target = self.graph.index, self.sample["target"].to_numpy()
        sites: dict[Site, list[Int[np.ndarray, " edge"]]] = {}
        for layer in np.unique(index.layer[target[index.kind[target] == FEATURE]]).tolist():
            edges = np.flatnonzero((index.kind[target] == FEATURE) & (index.layer[target] == layer))
            sites.setdefault(self.setting.model.store.sites(layer)[0], []).append(edges)
        return {site: self._look(groups) for site, groups in sites.items()}

    def _look(self, groups: list[Int[np.ndarray, " edge"]]) -> Any:
        index, target = self.graph.index, self.sample["target"].to_numpy()

        def look(x: Tensor, start: int) -> None:
            for edges in groups:
                rows = target[edges]
                pos, feature = (torch.from_numpy(c[rows]).to(x.device) for c in (index.pos, index.feature))
                found = feature_values(self.setting.model, int(index.layer[rows[0]]), pos, feature, x)
                self.values[start : start + len(x), torch.from_numpy(edges)] = found

        return look

    def put_targets(self, values: Float[Tensor, "row target"]) -> None:
        """Store the values of the graph's targets, measured at the end of the pass."""
        index, target = self.graph.index, self.sample["target"].to_numpy()
        edges = np.flatnonzero(index.kind[target] == TARGET)
        if len(edges):
            self.values[:, torch.from_numpy(edges)] = values[:, torch.from_numpy(index.feature[target[edges]])]


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
