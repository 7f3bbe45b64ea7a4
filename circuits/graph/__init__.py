"""The graph, and all computations that need only the graph."""

from circuits.graph.graph import Graph, check_graph
from circuits.graph.identity import check_same
from circuits.graph.influence import node_influence, start_weights
from circuits.graph.nodes import BIAS, ERROR, FEATURE, NONE, REMAINDER, REST, TARGET, TOKEN, NodeIndex
from circuits.graph.pruning import check_thresholds, prune
from circuits.graph.scores import GraphScores, fold, graph_scores, signed_totals, subgraph_scores
from circuits.graph.share_texts import carried, least_site, warning
from circuits.graph.sound import plain
from circuits.graph.supernodes import merge_chains, supernode_graph

__all__ = [
    "BIAS",
    "ERROR",
    "FEATURE",
    "NONE",
    "REMAINDER",
    "REST",
    "TARGET",
    "TOKEN",
    "Graph",
    "GraphScores",
    "NodeIndex",
    "carried",
    "check_graph",
    "check_same",
    "check_thresholds",
    "fold",
    "graph_scores",
    "least_site",
    "merge_chains",
    "node_influence",
    "plain",
    "prune",
    "signed_totals",
    "start_weights",
    "subgraph_scores",
    "supernode_graph",
    "warning",
]
