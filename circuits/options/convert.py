"""Options of `circuits convert`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import command, layers, whole
from hooks.plugins import names

WRITERS = names("hooks.formats", "save")
EXAMPLES = ("convert demo new-set --to circuit_tracer",)


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "convert", "write a transcoder set in another format", model=False, examples=EXAMPLES)
    parser.add_argument("source", metavar="SRC", help="demo, demo-dense, a folder, or a hub id")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--to", default="native", metavar="F", help=f"one of {', '.join(WRITERS)} (default: native)")
    parser.add_argument("--read", metavar="SITE", help="the site the transcoders read, if the files do not say")
    parser.add_argument("--write", metavar="SITE", help="the site they reconstruct, likewise")
    parser.add_argument("--k", type=whole, metavar="N", help="features TopK keeps, if the files do not say")
    parser.add_argument("--encoder", metavar="E", help="trained (default), or card: as on the published card")
    parser.add_argument("--decoder", type=whole, metavar="N", help="which one, where a file has several (from 0)")
    parser.add_argument("--layers", type=layers, metavar="0,1|all", default="all", help="only these layers")
    parser.add_argument("--dtype", help="of the new weights (default: as they are)")
    parser.add_argument("--base-model", metavar="ID", help="the model they belong to, if the files do not say")
