"""Options of `circuits swap`."""

from typing import Any

from circuits.options._shared import add_error, add_layers, add_places, add_prompt, command

EXAMPLES = ("swap 'fact: the capital of Texas is' --layers all --error zero",)


def add(commands: Any) -> None:
    """Its options."""
    swap = command(commands, "swap", "replace sites by their reconstructions and measure", examples=EXAMPLES)
    add_prompt(swap)
    add_layers(swap)
    add_error(swap, "zero")
    add_places(swap)
