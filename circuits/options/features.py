"""Options of `circuits features`."""

from typing import Any

from circuits.options._shared import add_layers, add_prompt, add_top, command

EXAMPLES = (
    "features 'fact: the capital of the state containing Dallas is' --top 3",
    "features 'fact: the capital of Texas is' --layers 2,3 --json",
)


def add(commands: Any) -> None:
    """Its options."""
    features = command(commands, "features", "the strongest features of every token", examples=EXAMPLES)
    add_prompt(features)
    add_top(features, 10, "the strongest features per token (default 10)")
    add_layers(features)
