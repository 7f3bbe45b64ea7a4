"""Options of `circuits check --quality`."""

import argparse

from circuits.options._shared import add_out
from hooks.choices import REPORTS


def add(parser: argparse.ArgumentParser) -> None:
    """Its options, beside --text, --tokens, --layers and --plot of `circuits check`."""
    group = parser.add_argument_group("quality of the set")
    group.add_argument("--quality", action="store_true", help="measure what it reconstructs and what swapping costs")
    add_out(group, f"the whole report, {', '.join(REPORTS)}")
