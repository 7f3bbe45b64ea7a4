"""Scores of a whole graph: circuit-tracer's two scores, signed total effects, and scores of subgraphs.

Scores are unsigned shares (`circuits.graph.influence`). Totals are signed, and add up if the rule conserves. Before a
subgraph is scored, the features that it leaves out are folded into the rest nodes. If they were only dropped, they
would not count as unexplained, and a graph would look better with fewer features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.graph.graph import Graph
from circuits.graph.influence import levels, node_influence, shares, start_weights, sweep
from circuits.graph.nodes import FEATURE, KINDS, NONE, REMAINDER, REST, TARGET, TOKEN, NodeIndex
from hooks.errors import UserError

UNEXPLAINED = ("error", "rest")


@dataclass(frozen=True)
class GraphScores:
    """Shares between 0 and 1; NaN where no edge reaches the targets.

    Attributes:
        replacement: the tokens' share of the influence of tokens and unexplained nodes together: how much of the answer
            the graph traces back to the prompt.
        completeness: the explained share of the edges into a node, averaged over all nodes, weighted by influence.
    """

    replacement: float
    completeness: float


def graph_scores(
    graph: Graph,
    *,
    unexplained: Sequence[str] = UNEXPLAINED,
    without: Sequence[str] = (),
    mass: Float[np.ndarray, " node"] | None = None,
) -> GraphScores:
    """circuit-tracer's replacement and completeness scores (`compute_graph_scores`), of a graph before it is pruned.

        replacement  = I_tokens / (I_tokens + I_unexplained)
        completeness = sum_t I_t (1 − sum_{s unexplained} Â[t, s]) / sum_t I_t          I at a target: its weight

    circuit-tracer's graphs have only tokens, features, errors and targets; for such a graph the numbers are the same.
    Here a rest counts as an error. A bias is known, but not explained by the prompt: in `replacement` it counts neither
    way, in `completeness` it counts as explained. Edges of remainder nodes are not counted.

    Args:
        unexplained: the kinds of nodes that count like errors.
        without: kinds whose edges are dropped before anything is normalised. `unexplained=("error",),
            without=("rest", "bias")` gives circuit-tracer's scores for the same features.
        mass: sum |e| into each node over all edges, if `max_in_edges` left some out. Those count as if they came from
            an error node. None: no edge was left out.

    Raises:
        UserError: there is no such kind of node.
    """
    index, source, target = graph.index, graph.source, graph.target
    is_lost = _is_one_of(index, unexplained)
    drop = (_is_one_of(index, without) & (index.kind != REMAINDER))[source]  # `mass` does not include remainders
    if mass is not None:
        mass = mass - _into(index, target[drop], np.abs(graph.weight[drop]))
    share = shares(index, source, target, np.where(drop, 0.0, graph.weight), mass)
    influence, _ = sweep(index, source, target, share, start_weights(index, _targets(graph)))
    missing = np.zeros(len(index))
    if mass is not None:
        missing = np.where(mass > 0, np.maximum(1 - _into(index, target, share), 0.0), 0.0)
    elsewhere = missing @ influence  # the influence of an error node with all missing edges
    explained = 1 - missing - _into(index, target, share * is_lost[source])
    tokens, errors = influence[index.kind == TOKEN].sum(), influence[is_lost].sum() + elsewhere
    completeness = _ratio(explained @ influence + elsewhere, influence.sum() + elsewhere)
    return GraphScores(_ratio(tokens, tokens + errors), completeness)


def signed_totals(graph: Graph) -> Float[np.ndarray, " node"]:
    """Total effect of every node on the targets, signed, in logits: over all paths, in one pass over the edges.

        T_i = sum_{targets t} w_t e_it + sum_{features j} (e_ij / a_j) T_j

    A path counts the product of its edges, divided by the activation at every feature it passes (an active feature's
    activation is its pre-activation; in a pair of prompts: the difference of the two). A target's total is its weight
    times its value. If the edges into every node sum to its value, remainders included, the totals of the nodes without
    inputs sum to the targets' totals. Each edge into a feature j that was left out or pruned changes that sum by its
    weight times T_j / a_j.
    """
    index, value = graph.index, graph.difference
    start = start_weights(index, _targets(graph))
    total = np.where(index.kind == TARGET, start * value, 0.0)
    passes = (index.kind == FEATURE) & (value != 0)
    for edges in levels(index, graph.target):
        per_unit = np.divide(total, value, out=start.copy(), where=passes)
        total += _into(index, graph.source[edges], graph.weight[edges] * per_unit[graph.target[edges]])
    return total


def subgraph_scores(
    graph: Graph, keep: Int[np.ndarray, " row"], *, unexplained: Sequence[str] = UNEXPLAINED
) -> GraphScores:
    """The scores of some features of a graph: the others are folded into the rest nodes, which count as unexplained.

    Args:
        keep: rows of the features that stay.

    Raises:
        UserError: there is no such kind of node.
    """
    return graph_scores(fold(graph, keep), unexplained=unexplained)


def fold(graph: Graph, keep: Int[np.ndarray, " row"]) -> Graph:
    """The same graph with fewer features: the others become part of the rest node at their layer and position.

    Their edges into kept nodes are added to the rest's edges, with sign; edges into them are dropped. So the sum of the
    edges into every kept node is unchanged. Scores are added in the same way, and influence is computed from the new
    edges. The norm of an enlarged rest is not known without the decoder, so its activation is NaN. Totals are dropped;
    `signed_totals` computes those of the folded graph.

    Args:
        keep: rows of the features that are kept. Nodes of other kinds are always kept.
    """
    goes = graph.index.kind == FEATURE
    goes[keep] = False
    graph = _with_rests(graph, np.flatnonzero(goes))
    index, size = graph.index, graph.n_nodes
    goes = np.pad(goes, (0, size - len(goes)))
    home = np.arange(size)
    home[goes] = _rest_at(index, np.flatnonzero(goes))
    edges = np.flatnonzero(~goes[graph.target])
    key = graph.target[edges] * size + home[graph.source[edges]]
    pairs, place = np.unique(key, return_inverse=True)
    norm_known = ~np.isin(np.arange(size), home[goes])
    merged = replace(
        graph,
        activation=np.where(norm_known, graph.activation, np.nan),
        baseline=None if graph.baseline is None else np.where(norm_known, graph.baseline, np.nan),
        score=_into(index, home, graph.score),
        source=pairs % size,
        target=pairs // size,
        weight=_sums(place, graph.weight[edges], len(pairs)),
        effect=_sums(place, graph.effect[edges], len(pairs)),
    )
    folded = merged.subgraph(_in_order(index, np.flatnonzero(~goes)), np.arange(len(pairs)))
    start = start_weights(folded.index, _targets(graph))
    influence, _ = node_influence(folded.index, folded.source, folded.target, folded.weight, start=start)
    return replace(folded, influence=influence).with_meta(folded=int(goes.sum()))


def _with_rests(graph: Graph, rows: Int[np.ndarray, " row"]) -> Graph:
    """The graph with additional rest nodes, at the end and without edges, where one of these rows has none."""
    index = graph.index
    rests = index.rows(REST)
    there = set(zip(index.layer[rests].tolist(), index.pos[rests].tolist(), strict=True))
    wanted = set(zip(index.layer[rows].tolist(), index.pos[rows].tolist(), strict=True))
    new = np.array([(REST, *place, NONE) for place in sorted(wanted - there)], dtype=np.int64).reshape(-1, 4)
    columns = (index.kind, index.layer, index.pos, index.feature)
    grown = NodeIndex(*(np.concatenate([old, more]) for old, more in zip(columns, new.T, strict=True)))

    def grow(column: Float[np.ndarray, " node"]) -> Float[np.ndarray, " row"]:
        return np.pad(column, (0, len(new)))

    return replace(
        graph,
        index=grown,
        activation=grow(graph.activation),
        baseline=None if graph.baseline is None else grow(graph.baseline),
        score=grow(graph.score),
        influence=grow(graph.influence),
        total=None,
    )


def _rest_at(index: NodeIndex, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """The rest node at the layer and position of each row."""
    rests = index.rows(REST)
    at = dict(
        zip(zip(index.layer[rests].tolist(), index.pos[rests].tolist(), strict=True), rests.tolist(), strict=True)
    )
    places = zip(index.layer[rows].tolist(), index.pos[rows].tolist(), strict=True)
    return np.array([at[place] for place in places], dtype=np.int64)


def _in_order(index: NodeIndex, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """Rows sorted by layer, kind and position as in `NodeIndex.build`; equal ones, such as remainders, keep their
    order."""
    last = (index.kind == TARGET) + 2 * (index.kind == REMAINDER)
    return rows[np.lexsort((index.pos[rows], index.kind[rows], index.layer[rows], last[rows]))]  # stable


def _is_one_of(index: NodeIndex, kinds: Sequence[str]) -> Bool[np.ndarray, " node"]:
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise UserError(f"unknown kind of node {unknown[0]!r}", expected=", ".join(KINDS))
    return np.isin(index.kind, [KINDS.index(kind) for kind in kinds])


def _targets(graph: Graph) -> Sequence[dict]:
    return graph.meta.get("targets", [])


def _into(
    index: NodeIndex, rows: Int[np.ndarray, " item"], values: Float[np.ndarray, " item"]
) -> Float[np.ndarray, " node"]:
    """The sum of the values of each node."""
    return _sums(rows, values, len(index))


def _sums(places: Int[np.ndarray, " item"], values: Float[np.ndarray, " item"], size: int) -> Float[np.ndarray, " row"]:
    return np.bincount(places, weights=values, minlength=size).astype(np.float64)  # without items it gives integers


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
