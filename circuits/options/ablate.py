"""Options of `circuits ablate`."""

from typing import Any

from circuits.options._shared import add_changing, add_many, add_prompt, add_target, add_top, command

EXAMPLES = (
    "ablate 'fact: the capital of the state containing Dallas is' --feature L3/383@-1",
    "ablate 'fact: the capital of Texas is' --feature L3/383 --target Austin --against Sacramento",
)


def add(commands: Any) -> None:
    """Its options."""
    ablate = command(commands, "ablate", "zero features and measure the change of a target's logit", examples=EXAMPLES)
    add_prompt(ablate)
    add_many(ablate, "--feature", "ADDR", "L{layer}/{feature}[@{position}], for example L3/383@-1", required=True)
    add_target(ablate)
    add_top(ablate, 5, "the most likely tokens (default 5)")
    add_changing(ablate)
