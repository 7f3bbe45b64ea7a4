"""A graph as XML 1.0 can hold it: control bytes (a byte token can be one) become U+FFFD, ids stay apart."""

import networkx as nx

from circuits.export._names import relabelled
from circuits.graph import Graph
from circuits.shown import clean


def clean_network(graph: Graph) -> nx.DiGraph:
    """The graph with every id and text attribute cleaned."""
    network = relabelled(graph.to_networkx(), clean)
    for _, facts in network.nodes(data=True):
        facts |= {key: clean(value) for key, value in facts.items() if isinstance(value, str)}
    network.graph |= {key: clean(value) for key, value in network.graph.items() if isinstance(value, str)}
    return network
