"""Options of `circuits swap`."""

from typing import Any

from circuits.options._shared import add_places, add_prompt, command, layers
from hooks.choices import ERROR_MODES

EXAMPLES = ("swap 'fact: the capital of Texas is' --layers all --error zero",)


def add(commands: Any) -> None:
    """Its options."""
    swap = command(commands, "swap", "replace sites by their reconstructions and measure", examples=EXAMPLES)
    add_prompt(swap)
    swap.add_argument("--layers", type=layers, default="all", metavar="0,1|all", help="which (default all)")
    swap.add_argument("--error", choices=ERROR_MODES, default="zero", help="what becomes of the error (default zero)")
    add_places(swap)
