"""The options of every subcommand, one file each; `circuits.commands` has the commands themselves. A file defines

    add(commands) -> None        its parser and options

Nothing here imports torch, transformers, pandas or numpy, so help, completion and errors about options are shown at
once. Words come from `hooks.choices`, names of plug-ins from the file names of their folders.
"""

from circuits.options._all import build_parser

__all__ = [
    "build_parser",
]
