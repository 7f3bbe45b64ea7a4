"""Options of `circuits check --quality`."""

import argparse
from pathlib import Path

from hooks.choices import REPORTS


def add(parser: argparse.ArgumentParser) -> None:
    """Its options, beside --text, --tokens, --layers and --plot of `circuits check`."""
    group = parser.add_argument_group("quality of the set")
    group.add_argument("--quality", action="store_true", help="measure what it reconstructs and what swapping costs")
    group.add_argument("--out", type=Path, metavar="FILE", help=f"the whole report: {', '.join(REPORTS)}")
