"""dot: for Graphviz, tokens at the bottom; read back with pydot.

A quoted DOT string knows no escape but that of the quote itself, and Graphviz reads further ones in a label. So text is
written with `\\\\`, `\\"`, `\\n` and `\\r` escaped, as in JSON.
"""

from pathlib import Path
from typing import Any

import pydot

from circuits.export._names import relabelled
from circuits.graph import Graph
from hooks.files import write_text

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\0": "\ufffd"})


def write(graph: Graph, path: Path) -> None:
    """Every node and edge attribute; text in quotes, numbers as they are. An empty label is left out: the id shows."""
    network = relabelled(graph.to_networkx(), lambda name: name.replace("\0", "\ufffd"))
    drawing = pydot.Dot("circuit", graph_type="digraph", strict=True, rankdir="BT")
    for key, value in network.graph.items():
        drawing.set(key, _value(value))
    for name, facts in network.nodes(data=True):
        shown = {key: value for key, value in facts.items() if key != "label" or value}
        drawing.add_node(pydot.Node(_value(name), **_values(shown)))
    for source, target, facts in network.edges(data=True):
        drawing.add_edge(pydot.Edge(_value(source), _value(target), **_values(facts)))
    write_text(path, drawing.to_string())


def _values(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in facts.items()}


def _value(value: Any) -> str:
    return f'"{value.translate(_ESCAPES)}"' if isinstance(value, str) else str(value)
