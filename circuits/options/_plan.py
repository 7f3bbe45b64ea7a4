"""Options of `circuits check --plan`."""

import argparse

from circuits.options._shared import count, nodes
from hooks.choices import DEVICES, ITEM

CARDS = ("24", "40", "80", "141")


def add(parser: argparse.ArgumentParser) -> None:
    """Its options; a parser that loads models has --model, --transcoders, --dtype, --k, --read and --write already."""
    group = parser.add_argument_group("memory plan (nothing is loaded)")
    group.add_argument("--plan", action="store_true", help="say what will be needed, and what fits which device")
    group.add_argument(
        "--prompt-tokens", type=count, nargs="+", default=[32, 512], metavar="T", help="tokens of the prompt"
    )
    group.add_argument("--nodes", type=nodes, default=10_000, metavar="N", help="features of a graph (default 10000)")
    group.add_argument("--batch", type=count, default=1, metavar="B", help="prompts at once (default 1)")
    group.add_argument("--new-tokens", type=count, default=256, metavar="N", help="tokens generated (default 256)")
    group.add_argument(
        "--devices", nargs="+", default=CARDS, metavar="GB", help=f"in GB, or {', '.join(DEVICES)} (default 24 to 141)"
    )
    group.add_argument("--set-layers", type=count, metavar="N", help="transcoders, where their files are not here")
    group.add_argument("--features", type=count, metavar="F", help="features of each")
    group.add_argument("--set-dtype", choices=ITEM, help="their precision (default: as stored, or bfloat16)")
