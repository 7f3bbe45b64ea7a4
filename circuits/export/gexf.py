"""gexf: XML for Gephi; read back with `nx.read_gexf`."""

import re
from pathlib import Path

import networkx as nx

from circuits.export._xml import clean_network
from circuits.graph import Graph
from hooks.files import replacing


def write(graph: Graph, path: Path) -> None:
    """Every node and edge attribute, typed; a node without a label is labelled with its id.

    Characters that XML cannot hold become U+FFFD.
    """
    network = clean_network(graph)
    for name, facts in network.nodes(data=True):
        facts["label"] = facts["label"] or name  # what Gephi shows
    with replacing(path) as temporary:
        nx.write_gexf(network, temporary)
        text = temporary.read_text("utf-8")  # the same graph gives the same bytes on any day
        temporary.write_text(re.sub(' lastmodifieddate="[^"]*"', "", text, count=1), "utf-8")
