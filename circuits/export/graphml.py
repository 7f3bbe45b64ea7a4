"""graphml: XML for Gephi, yEd, Cytoscape and networkx."""

from pathlib import Path

import networkx as nx

from circuits.export._xml import clean_network
from circuits.graph import Graph
from hooks.files import replacing


def write(graph: Graph, path: Path) -> None:
    """Every node and edge attribute, typed; characters that XML cannot hold become U+FFFD."""
    with replacing(path) as temporary:
        nx.write_graphml(clean_network(graph), temporary, named_key_ids=True)
