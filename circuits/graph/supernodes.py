"""Supernodes: features of successive layers that mean the same are shown as one node.

If the whole stream is replaced at every cut, a path has one feature per cut, and in most of its steps the direction
hardly changes. Two features of one token at successive cuts are merged if they write nearly the same direction, and
most of the upper one's activation comes from the lower one.
"""

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float, Int
from torch.nn.functional import cosine_similarity

from circuits.graph.graph import Graph
from circuits.graph.identity import ModelWithSet, check_same
from circuits.graph.nodes import FEATURE
from hooks.errors import UserError


def merge_chains(graph: Graph, model: ModelWithSet, *, similarity: float = 0.9, share: float = 0.5) -> Graph:
    """Find the supernodes of a graph: `meta["supernodes"]` maps a label to the names of its features, lowest layer
    first.

    An edge i → j merges two features if they are at one token and at successive layers with transcoders,
    cos(d_i, d_j) > similarity, and e_ij / a_j > share (in a pair of prompts a_j is the difference between the
    prompts). A supernode can branch.

    Args:
        similarity: smallest cosine of the decoder rows.
        share: smallest part of the upper feature's activation that comes from the lower one.

    Raises:
        UserError: the graph belongs to another model, or a threshold is out of range.
    """
    _check_range(similarity, share)
    check_same(model, graph)
    edges = np.flatnonzero(_carries(graph, model.store.layers, share))
    edges = edges[_cosines(graph, model, edges) > similarity]
    groups = _components(graph, edges)
    names = {_label(graph, rows): [graph.names[row] for row in rows] for rows in groups}
    return graph.with_meta(supernodes=names)


def supernode_graph(graph: Graph) -> nx.DiGraph:
    """`graph.to_networkx()` with every supernode as one node. Its edges are summed, and edges inside it are dropped.

    A supernode has `kind` "supernode", the names of its `members`, its first and last layer in `layers`, and the
    largest influence and the strongest score of a member. Scores are not added up, since the members mean the same. An
    edge's `effect` is in logits; a `weight` into a supernode is a sum in the units of several features. A path can
    leave a supernode and return to it through another feature, so the result can have cycles: `graph["acyclic"]` is
    True if it has none.
    """
    network, labels = graph.to_networkx(), graph.meta.get("supernodes", {})
    members = {label: [name for name in names if name in network] for label, names in labels.items()}
    home = {name: label for label, names in members.items() for name in names}
    merged = nx.DiGraph(**network.graph)
    for name, facts in network.nodes(data=True):
        if name not in home:
            merged.add_node(name, **facts)
        elif home[name] not in merged:
            merged.add_node(home[name], **_summary(network, members[home[name]]))
    for source, target, facts in network.edges(data=True):
        ends = home.get(source, source), home.get(target, target)
        if ends[0] == ends[1]:
            continue
        old = merged.get_edge_data(*ends, {"weight": 0.0, "effect": 0.0})
        merged.add_edge(*ends, **{key: old[key] + facts[key] for key in old})
    merged.graph["acyclic"] = nx.is_directed_acyclic_graph(merged)
    return merged


def _carries(graph: Graph, layers: tuple[int, ...], share: float) -> Bool[np.ndarray, " edge"]:
    """Edges between features of one token at successive layers whose weight is more than `share` of the target."""
    index, source, target = graph.index, graph.source, graph.target
    features = (index.kind[source] == FEATURE) & (index.kind[target] == FEATURE)
    neighbours = np.searchsorted(layers, index.layer[target]) - np.searchsorted(layers, index.layer[source]) == 1
    value = graph.difference[target]
    part = np.divide(graph.weight, value, out=np.zeros(graph.n_edges), where=value != 0)
    return features & neighbours & (index.pos[source] == index.pos[target]) & (part > share)


def _cosines(graph: Graph, model: ModelWithSet, edges: Int[np.ndarray, " kept"]) -> Float[np.ndarray, " kept"]:
    """Cosine of the decoder rows at both ends of each edge, two neighbouring layers at a time."""
    index, source, target = graph.index, graph.source[edges], graph.target[edges]
    cosines = np.zeros(len(edges))
    for layer in np.unique(index.layer[target]).tolist():
        here = np.flatnonzero(index.layer[target] == layer)
        lower, upper = (
            model.store[int(index.layer[rows[0]])].W_dec[index.feature[rows]].double()
            for rows in (source[here], target[here])
        )
        cosines[here] = cosine_similarity(lower, upper.to(lower.device), dim=-1).cpu().numpy()
    return cosines


def _components(graph: Graph, edges: Int[np.ndarray, " kept"]) -> list[list[int]]:
    """The connected components, as lists of rows. Each list ascends, and the lists are in the order of their first
    row."""
    parent = list(range(graph.n_nodes))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for source, target in zip(graph.source[edges].tolist(), graph.target[edges].tolist(), strict=True):
        low, high = sorted((root(source), root(target)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for row in np.unique(np.concatenate([graph.source[edges], graph.target[edges]])).tolist():
        groups.setdefault(root(row), []).append(row)
    return [groups[first] for first in sorted(groups)]


def _label(graph: Graph, rows: list[int]) -> str:
    """First and last member. A feature is in one supernode only, so no two labels are equal."""
    return f"{graph.names[rows[0]]} … {graph.names[rows[-1]]}"


def _summary(network: nx.DiGraph, members: list[str]) -> dict[str, object]:
    facts = [network.nodes[name] for name in members]
    layers = sorted(fact["layer"] for fact in facts)
    return {
        "kind": "supernode",
        "members": members,
        "layers": (layers[0], layers[-1]),
        "position": facts[0]["position"],
        "token": facts[0]["token"],
        "label": ", ".join(dict.fromkeys(fact["label"] for fact in facts if fact["label"])),
        "score": max((fact["score"] for fact in facts), key=abs),
        "influence": max(fact["influence"] for fact in facts),
    }


def _check_range(similarity: float, share: float) -> None:
    for name, value, top in (("similarity", similarity, 1.0), ("share", share, float("inf"))):
        if not 0 <= value < top:
            raise UserError(f"{name} = {value} is out of range", expected=f"at least 0, below {top:g}")
