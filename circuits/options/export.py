"""Options of `circuits export`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_force, add_out, command
from hooks.plugins import names

EXPORTERS = names("circuits.export", "write")
EXAMPLES = ("export graph.safetensors --format json --out graph.json",)


def add(commands: Any) -> None:
    """Its options."""
    exporter = command(commands, "export", "write a saved graph in another format", model=False, examples=EXAMPLES)
    exporter.add_argument("file", type=Path, metavar="FILE", help="a graph written by trace")
    exporter.add_argument("--format", required=True, metavar="F", help=f"one of {', '.join(EXPORTERS)}")
    add_out(exporter, "the graph in the other format", required=True)
    add_force(exporter)
