"""`circuits completion`: a script that lets a shell complete commands, options, their words, and files."""

import argparse
import sys
from pathlib import Path
from typing import Any

import shtab

from circuits.options import build_parser

FOLDERS = ("model", "transcoders", "source", "target")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The script for one shell; it is static, so that completing starts no Python."""
    parser = build_parser()
    for command in parser.commands.values():
        for action in command._actions:
            if action.type is Path or (action.dest in FOLDERS and not action.choices):
                # an attribute that shtab looks for
                action.complete = shtab.DIRECTORY if action.dest in FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(parser, args.shell)
    if not args.json:
        sys.stdout.write(script + "\n")  # `_output` would import pandas and torch first
    return {"shell": args.shell, "script": script}
