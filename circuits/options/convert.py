"""Options of `circuits convert`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_dtype, add_layers, add_reading, command
from hooks.plugins import names

WRITERS = names("hooks.formats", "save")
EXAMPLES = ("convert demo new-set --to circuit_tracer",)


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "convert", "write a transcoder set in another format", model=False, examples=EXAMPLES)
    parser.add_argument("source", metavar="SRC", help="demo, demo-dense, a folder, or a hub id")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--to", default="native", metavar="F", help=f"one of {', '.join(WRITERS)} (default: native)")
    add_reading(parser)
    add_layers(parser)
    add_dtype(parser, "the new weights (default: as they are)")
    parser.add_argument("--base-model", metavar="ID", help="the model they belong to, if the files do not say")
