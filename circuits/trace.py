"""The driver: record, score, select, edges, verify, prune. One prompt in, one graph out."""

import logging
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from circuits.attribution import RULES, LocalRun, Rows, make_cuts
from circuits.graph import Graph
from circuits.influence import node_influence
from circuits.nodes import BIAS, ERROR, FEATURE, REST, TARGET, TOKEN, NodeIndex
from circuits.prune import check_thresholds, prune
from circuits.scores import EMBEDDING, FeatureScores, score_features
from circuits.targets import TargetLike, resolve_targets
from circuits.verify import verify
from hooks.errors import UserError
from hooks.host import Prompt
from hooks.model import HookedModel
from hooks.recording import record

log = logging.getLogger("circuits")


def trace(
    model: HookedModel,
    prompt: Prompt,
    targets: TargetLike | Sequence[TargetLike] | None = None,
    *,
    max_nodes: int | None = 10_000,
    max_in_edges: int = 256,
    rule: str = "exact",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    sample: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Graph:
    """Explain a target by a graph of features, and measure how far the graph is right.

    Args:
        targets: what is explained: None (the model's own answer against the best other token), a token,
            `(answer, against)`, a `Target`, or a list; scores are in units of the first.
        max_nodes: how many features become nodes (half of them shared out over the layers, then by |score|); the
            others act through the rest nodes. None: every active feature, the complete graph.
        max_in_edges: how many of the strongest edges into a node are kept; the normalisation of influence, the
            conservation and the remainder are over all of them.
        rule: an attribution rule, a file in `circuits/attribution/`.
        node_threshold, edge_threshold: see `circuits.prune`; 1.0 keeps everything.
        sample: how many nodes and edges are verified by real ablations; 0 skips the verification.
        seed: of that sample.
        progress: show a bar on stderr.

    Raises:
        UserError: the rule is unknown, a number is out of range, or the transcoders are not of the same-site
            convention.

    Example:
        >>> from hooks import HookedModel
        >>> graph = trace(HookedModel.load("demo"), "fact: the capital of the state containing Dallas is")
        >>> graph.meta["targets"][0]["name"].startswith("' Austin'")
        True
    """
    check_options(rule, max_nodes, max_in_edges, node_threshold, edge_threshold, sample, seed)
    _check_convention(model)
    batch = model.host.batch([prompt])
    recording = record(model.host, model.store, batch)
    chosen = resolve_targets(model.host, recording.logits[0], targets)
    scores = score_features(model, recording, chosen[0])
    features = _select(scores, max_nodes)
    selected = _by_layer(scores, features)
    cuts = make_cuts(model, recording, selected)
    index = NodeIndex.build(batch.lengths[0], selected, [target.pos for target in chosen])
    _, seen = model.host.capture(batch, [EMBEDDING])
    run = LocalRun(model, recording, cuts, chosen, index, seen[EMBEDDING][0])
    graph = _with_edges(run, scores, rule, max_in_edges, progress)
    graph = graph.with_meta(selection=_coverage(scores, features))
    if sample:
        graph = graph.with_meta(verification=verify(model, graph, n=sample, seed=seed).summary())
    return prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)


def check_options(
    rule: str,
    max_nodes: int | None,
    max_in_edges: int,
    node_threshold: float,
    edge_threshold: float,
    sample: int,
    seed: int,
) -> None:
    """Refuse what cannot be traced, before a model is even loaded.

    Raises:
        UserError: the rule is unknown, or a number is out of range.
    """
    if rule not in RULES:
        raise UserError(f"unknown attribution rule {rule!r}", expected=", ".join(RULES), where="--rule")
    for name, value in (("max_nodes", max_nodes), ("max_in_edges", max_in_edges)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} leaves nothing to draw", expected="at least 1")
    check_thresholds(node_threshold, edge_threshold)
    for name, value in (("sample", sample), ("seed", seed)):
        if value < 0:
            raise UserError(f"{name} = {value} is out of range", expected="at least 0")


def _check_convention(model: HookedModel) -> None:
    convention = model.store.convention
    if not (convention.same_site and convention.write.at(0).whole_stream):
        raise UserError(
            f"graphs need transcoders that reconstruct the residual stream where they read it; "
            f"these read {convention.read} and write {convention.write}",
            expected="one residual site for both, such as --read resid_pre --write resid_pre",
            repair="features, swap, ablate and steer work for this set as it is",
        )


def _select(scores: FeatureScores, max_nodes: int | None) -> pd.DataFrame:
    """The features that become nodes: half the places go to each layer's strongest, the rest to the strongest overall.

    Without the share per layer a graph can have no way through: paths cross every cut, and only selected features
    carry them on. Ties fall to the lower (layer, position, feature).
    """
    table = scores.frame
    if max_nodes is None or max_nodes >= len(table):
        return table
    share = max_nodes // (2 * len(scores.values))
    first = table.groupby("layer").head(share).index
    others = table.index.difference(first, sort=True)[: max_nodes - len(first)]
    return table.loc[first.union(others)]


def _by_layer(scores: FeatureScores, chosen: pd.DataFrame) -> dict[int, list[tuple[int, int]]]:
    selected: dict[int, list[tuple[int, int]]] = {layer: [] for layer in scores.values}
    for layer, pos, feature in chosen[["layer", "pos", "feature"]].itertuples(index=False):
        selected[int(layer)].append((int(pos), int(feature)))
    return selected


def _coverage(scores: FeatureScores, chosen: pd.DataFrame) -> dict[str, int | float]:
    """How much of sum |score| over all active features the chosen ones hold."""
    size = scores.frame["score"].abs()
    covered = float(chosen["score"].abs().sum() / size.sum()) if size.sum() else 1.0
    return {"active_features": len(size), "selected": len(chosen), "covered_score": covered}


def _with_edges(run: LocalRun, scores: FeatureScores, rule: str, max_in_edges: int, progress: bool) -> Graph:
    """All edges by the rule, joined with what is known of the nodes."""
    activation, score, per_unit = _node_values(run, scores)
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    mass, left, worst = np.zeros(len(run.index)), 0.0, 0.0
    total = sum(len(run.target_rows(number)) for number in range(len(run.cuts) + 1))
    with tqdm(total=total, desc="edges", unit="node", disable=not progress, leave=False) as bar:
        for rows in RULES[rule].edge_rows(run):
            gap, size = (
                (rows.values - rows.weights.sum(1)).abs().double().cpu(),
                rows.weights.abs().sum(1).double().cpu(),
            )
            scale = torch.maximum(rows.values.abs().double().cpu(), size).clamp_min(1e-30)
            left, worst = left + float(gap.sum()), max(worst, float((gap / scale).max()) if len(gap) else 0.0)
            mass[rows.targets.numpy()] = size.numpy()
            kept.append(_strongest(rows, max_in_edges))
            bar.update(len(gap))
    source, target, weight = (torch.cat(column).cpu().numpy() for column in zip(*kept, strict=True))
    order = np.lexsort((source, target))
    source, target, weight = source[order], target[order], weight[order].astype(np.float64)
    influence, _ = node_influence(run.index, source, target, weight, mass)
    meta = _facts(run, rule)
    if RULES[rule].CONSERVES:
        meta["conservation"] = {"rule": rule, "max_rel_error": worst}
    else:
        meta["remainder_share"] = left / (left + mass.sum()) if left else 0.0
    meta["kept_weight"] = float(np.abs(weight).sum() / mass.sum()) if mass.any() else 1.0
    effect = weight * per_unit[target]
    return Graph(run.index, activation, score, influence, source, target, weight, effect, meta)


def _strongest(rows: Rows, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source, target, weight) of the strongest edges into each target of a block; zeros are no edges."""
    columns = torch.arange(rows.weights.shape[1], device=rows.weights.device).expand_as(rows.weights)
    if rows.weights.shape[1] > most:
        columns = rows.weights.abs().topk(most, dim=1, sorted=False).indices
    weights = rows.weights.gather(1, columns)
    at, slot = weights.nonzero(as_tuple=True)
    return rows.sources[columns[at, slot].cpu()], rows.targets[at.cpu()], weights[at, slot].cpu()


def _node_values(
    run: LocalRun, scores: FeatureScores
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Per node: activation (or norm), score, and the metric's derivative by one unit of the node."""
    index = run.index
    activation, score, per_unit = (np.zeros(len(index)) for _ in range(3))

    def put(kind: int, layer: int | None, size: torch.Tensor, effect: torch.Tensor) -> Int[np.ndarray, " row"]:
        rows = index.rows(kind, layer)
        activation[rows], score[rows] = size.double().cpu().numpy(), effect.double().cpu().numpy()
        return rows

    put(TOKEN, None, run.embedding.norm(dim=-1), scores.tokens)
    for cut in run.cuts:
        gradient = scores.gradients[cut.layer].to(cut.error.dtype)
        slope = (gradient[cut.pos] * cut.transcoder.W_dec[cut.feature].to(gradient.dtype)).sum(-1)
        rows = put(FEATURE, cut.layer, cut.activation, cut.activation * slope)
        per_unit[rows] = slope.double().cpu().numpy()
        for kind, vector in ((REST, cut.rest), (ERROR, cut.error)):
            put(kind, cut.layer, vector.norm(dim=-1), (vector * gradient).sum(-1))
        bias = cut.transcoder.b_dec.to(gradient.dtype)
        put(BIAS, cut.layer, bias.norm()[None], (gradient @ bias).sum()[None])
    values = torch.stack([target.value(run.recording.logits)[0] for target in run.targets])
    rows = put(TARGET, None, values, values)
    per_unit[rows] = 1.0
    return activation, score, per_unit


def _facts(run: LocalRun, rule: str) -> dict[str, object]:
    host, batch, store = run.model.host, run.recording.batch, run.model.store
    return {
        "prompt": host.text(batch.ids[0].tolist()),
        "ids": batch.ids[0].tolist(),
        "tokens": list(batch.strings[0]),
        "targets": [asdict(target) for target in run.targets],
        "rule": rule,
        "model": run.model.name,
        "transcoders": store.name,
        "fingerprint": run.model.fingerprint,
        "convention": {
            "read": str(store.convention.read),
            "write": str(store.convention.write),
            "source": store.convention.source,
        },
        "layers": list(store.layers),
        "n_layers": host.n_layers,
    }
