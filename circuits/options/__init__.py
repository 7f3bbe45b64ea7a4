"""The options of every subcommand, one file each, apart from what it does (`circuits.commands`). A file defines

    add(commands) -> None        its parser and options

Nothing here imports torch, transformers, pandas or numpy: `circuits --help`, a typing mistake and a completion are
answered at once. Words come from `hooks.choices`, names of plug-ins from the file names of their folders.
"""

from circuits.options._all import build_parser

__all__ = [
    "build_parser",
]
