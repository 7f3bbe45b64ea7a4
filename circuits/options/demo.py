"""Options of `circuits demo`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_force, command
from hooks.demo import TRANSCODERS

EXAMPLES = (
    "demo",
    "demo --transcoders demo-dense --out story",
)


def add(commands: Any) -> None:
    """Its options."""
    demo = command(commands, "demo", "the whole story on the embedded model", model=False, examples=EXAMPLES)
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the report and the circuit")
    demo.add_argument("--transcoders", choices=sorted(TRANSCODERS), default="demo", help="embedded set")
    add_force(demo)
