"""Keep the nodes and edges through which most of the influence flows.

As in circuit-tracer: first the nodes with the largest influence are kept, up to a share of the sum; then the edges with
the largest influence, which is computed again on the kept nodes. Then nodes without an edge into them or out of them
are dropped, until nothing changes. Tokens and targets are always kept. Remainder nodes are not counted; they are kept,
with their edges, as long as a target of these edges is kept.
"""

import numpy as np
from jaxtyping import Bool, Int

from circuits.graph.graph import Graph
from circuits.graph.influence import mass_threshold, node_influence, start_weights
from circuits.graph.nodes import FEATURE, REMAINDER, TARGET, TOKEN, NodeIndex
from hooks.errors import UserError


def check_thresholds(node_threshold: float, edge_threshold: float) -> None:
    """Refuse shares that keep nothing or more than everything.

    Raises:
        UserError: a threshold is not above 0 and at most 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise UserError(f"{name} = {value} is out of range", expected="above 0, at most 1")


def prune(graph: Graph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Graph:
    """A smaller graph. Scores, influence and effects of the kept nodes and edges are unchanged.

    Args:
        node_threshold: share of the summed node influence to keep; 1 keeps every node that has any.
        edge_threshold: share of the summed edge influence to keep.

    Raises:
        UserError: a threshold is not above 0 and at most 1.
    """
    check_thresholds(node_threshold, edge_threshold)
    index, kind = graph.index, graph.index.kind
    fixed = (kind == TOKEN) | (kind == TARGET)
    counted = np.where(fixed | (kind == REMAINDER), 0.0, graph.influence)
    keep = fixed | ((counted > 0) & (counted >= mass_threshold(counted, node_threshold)))
    edges = np.flatnonzero(keep[graph.source] & keep[graph.target])
    start = start_weights(index, graph.meta.get("targets", []))
    _, flow = node_influence(index, graph.source[edges], graph.target[edges], graph.weight[edges], start=start)
    edges = edges[(flow > 0) & (flow >= mass_threshold(flow, edge_threshold))]
    keep, edges = _drop_loose_ends(index, keep, edges, graph)
    keep, edges = _with_remainders(keep, edges, graph)
    pruned = graph.subgraph(np.flatnonzero(keep), edges)
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    return pruned.with_meta(pruning={**thresholds, "nodes_before": graph.n_nodes, "edges_before": graph.n_edges})


def _drop_loose_ends(
    index: NodeIndex, keep: Bool[np.ndarray, " node"], edges: Int[np.ndarray, " edge"], graph: Graph
) -> tuple[Bool[np.ndarray, " node"], Int[np.ndarray, " kept"]]:
    fixed = (index.kind == TOKEN) | (index.kind == TARGET)
    while True:
        leads_on = np.bincount(graph.source[edges], minlength=len(index)) > 0
        is_fed = np.bincount(graph.target[edges], minlength=len(index)) > 0
        needs_feed = index.kind == FEATURE
        alive = keep & (fixed | (leads_on & (is_fed | ~needs_feed)))
        if (alive == keep).all():
            return keep, edges
        keep = alive
        edges = edges[keep[graph.source[edges]] & keep[graph.target[edges]]]


def _with_remainders(
    keep: Bool[np.ndarray, " node"], edges: Int[np.ndarray, " edge"], graph: Graph
) -> tuple[Bool[np.ndarray, " node"], Int[np.ndarray, " kept"]]:
    left_over = np.flatnonzero((graph.index.kind[graph.source] == REMAINDER) & keep[graph.target])
    keep = keep.copy()
    keep[graph.source[left_over]] = True
    return keep, np.union1d(edges, left_over)
