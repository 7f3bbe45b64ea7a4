"""Options of `circuits ablate`."""

from typing import Any

from circuits.options._shared import add_changing, add_many, add_prompt, add_target, command


def add(commands: Any) -> None:
    """Its options."""
    ablate = command(commands, "ablate", "zero features and measure the change of a target's logit")
    add_prompt(ablate)
    add_many(ablate, "--feature", "ADDR", "L{layer}/{feature}[@{position}], for example L3/118@-1", required=True)
    add_target(ablate)
    add_changing(ablate)
