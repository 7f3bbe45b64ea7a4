"""Options of `circuits check`."""

from pathlib import Path
from typing import Any

from circuits.options import _plan, _quality
from circuits.options._shared import add_force, add_layers, add_plot, command, count
from hooks.choices import CHECK_TOKENS

EXAMPLES = (
    "check",
    "check --transcoders demo-dense --quality --layers 0,1",
    "check --plan --model Qwen/Qwen2.5-32B --set-layers 63 --features 12288 --k 1474",
)


def add(commands: Any) -> None:
    """Its options."""
    about = "measure which sites a set of transcoders reads and writes on a model"
    check = command(commands, "check", about, examples=EXAMPLES)
    group = check.add_argument_group("measurement")
    group.add_argument("--text", type=Path, metavar="FILE", help="a text file, .jsonl or .parquet (default: built in)")
    how_much = f"how much of it (default {CHECK_TOKENS})"
    group.add_argument("--tokens", type=count, default=CHECK_TOKENS, metavar="N", help=how_much)
    add_layers(group)
    group.add_argument(
        "--save", action="store_true", help="write the findings beside the set, where loading finds them"
    )
    add_plot(group, "all candidates, or with --quality the figures by layer")
    add_force(check)
    _quality.add(check)
    _plan.add(check)
