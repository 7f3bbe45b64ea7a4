"""Options of `circuits features`."""

from typing import Any

from circuits.options._shared import add_prompt, command, count, layers

EXAMPLES = (
    "features 'fact: the capital of the state containing Dallas is' --top 3",
    "features 'fact: the capital of Texas is' --layers 2,3 --json",
)


def add(commands: Any) -> None:
    """Its options."""
    features = command(commands, "features", "the strongest features of every token", examples=EXAMPLES)
    add_prompt(features)
    features.add_argument("--top", type=count, default=10, metavar="N", help="features per token (default 10)")
    features.add_argument("--layers", type=layers, metavar="0,1|all", help="only these layers")
