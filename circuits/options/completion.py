"""Options of `circuits completion`."""

from typing import Any

from circuits.options._shared import command

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = (
    "completion bash > ~/.local/share/bash-completion/completions/circuits",
    "completion zsh > ~/.zfunc/_circuits",
    "completion fish > ~/.config/fish/completions/circuits.fish",
)


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "completion", "print what lets a shell complete lines", model=False, examples=EXAMPLES)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
