"""The command line: parses, runs one subcommand, prints its result under `--json`.

Exit status 0: done; 2: the input was wrong, said without a traceback; 1: a fault of ours.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from circuits.options import ablate, check, convert, demo, export, features, steer, swap, sweep, trace
from hooks.errors import PictureError, UserError

COMMANDS = (demo, check, features, swap, ablate, sweep, steer, trace, export, convert)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="circuits: %(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        result = run(args)
    except UserError as error:
        if args.json and isinstance(error, PictureError):
            print(json.dumps(error.result, ensure_ascii=False, allow_nan=False))
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import what the chosen command needs, which takes seconds, and do it; returns what `--json` prints."""
    return importlib.import_module(f"circuits.commands.{args.command}").run(args)


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="circuits", description="Ablate, steer and trace transcoder features of Qwen2.5 models."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
