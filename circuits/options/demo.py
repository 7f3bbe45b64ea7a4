"""Options of `circuits demo`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_force, add_out, command
from hooks.demo import TRANSCODERS

EXAMPLES = (
    "demo",
    "demo --transcoders demo-dense --out story",
)


def add(commands: Any) -> None:
    """Its options."""
    demo = command(commands, "demo", "the whole story on the embedded model", model=False, examples=EXAMPLES)
    add_out(demo, "a folder, for the report and the circuit (default demo-out)", default=Path("demo-out"))
    demo.add_argument(
        "--transcoders", choices=sorted(TRANSCODERS), default="demo", metavar="SET", help="demo or demo-dense"
    )
    add_force(demo)
