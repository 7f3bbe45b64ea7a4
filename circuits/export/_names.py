"""Ids of nodes for formats that do not allow every character."""

from collections.abc import Callable

import networkx as nx

from circuits.shown import unique


def relabelled(network: nx.DiGraph, change: Callable[[str], str]) -> nx.DiGraph:
    """The graph with every id changed; ids that become equal get numbers."""
    names = list(network)
    return nx.relabel_nodes(network, dict(zip(names, unique([change(name) for name in names]), strict=True)))
