"""Options that several subcommands share."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from hooks.choices import ERROR_MODES, MASK_MODES, PRECISIONS, SKIPS


def command(
    commands: Any, name: str, help: str, *, examples: Sequence[str], model: bool = True
) -> argparse.ArgumentParser:
    """A subcommand with its `--json`, lines to copy and, unless told otherwise, the options that load a model."""
    about = help[0].upper() + help[1:] + "."
    parser = commands.add_parser(name, help=help, description=about, examples=[f"circuits {line}" for line in examples])
    parser.set_defaults(command=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    if model:
        group = parser.add_argument_group("model")
        group.add_argument("--model", default="demo", help="demo (embedded, default), a folder, or a hub id")
        group.add_argument("--transcoders", metavar="SET", help="demo, demo-dense, a folder, or a hub id")
        group.add_argument("--read", metavar="SITE", help="the site the transcoders read, if the files do not say")
        group.add_argument("--write", metavar="SITE", help="the site they reconstruct, likewise")
        group.add_argument("--k", type=whole, metavar="N", help="features TopK keeps, if the files do not say")
        group.add_argument("--encoder", metavar="E", help="trained (default), or card: as on the published set's card")
        group.add_argument("--decoder", type=whole, metavar="N", help="which one, where a file has several (from 0)")
        group.add_argument(
            "--budget-gb", type=float, metavar="GB", help="keep at most this much of the transcoders loaded"
        )
        group.add_argument("--device", help="cpu, cuda, cuda:1, …")
        group.add_argument("--device-map", metavar="MAP", help="let accelerate place the model, for example auto")
        group.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")
        group.add_argument(
            "--context", type=count, metavar="N", help="tokens the model may be given (default: what its config says)"
        )
        group.add_argument(
            "--precision",
            choices=PRECISIONS,
            help="how effects on a half-precision model are measured: exact (fp32 over its weights; default) or native",
        )
    return parser


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """The prompt."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text, as one argument")


def add_target(parser: argparse._ActionsContainer, *, top: bool = True) -> None:
    """The token to measure."""
    parser.add_argument("--target", help="the token to measure (default: the model's own answer)")
    parser.add_argument("--against", metavar="TOKEN", help="the other token of the metric (default: the best other)")
    if top:
        parser.add_argument("--top", type=count, default=5, metavar="N", help="most likely tokens to show (default 5)")


def add_force(parser: argparse._ActionsContainer) -> None:
    """What to do about files that are there."""
    parser.add_argument("--force", action="store_true", help="overwrite files that hold something else than results")


def add_places(parser: argparse._ActionsContainer) -> None:
    """At which tokens sites are replaced."""
    parser.add_argument(
        "--positions", metavar="WHERE", help="tokens where sites are replaced: 1: or 2:5 or {0,3} or -1 (default: all)"
    )
    flags = {"special": "the tokenizer's special tokens", "sinks": "attention sinks"}
    for kind in SKIPS:
        parser.add_argument(
            f"--skip-{kind}", dest="skip", action="append_const", const=kind, help=f"but not at {flags[kind]}"
        )
    parser.set_defaults(skip=[])


def add_changing(parser: argparse.ArgumentParser) -> None:
    """How interventions are carried out."""
    parser.add_argument("--swap", type=layers, metavar="0,1|all", help="replace these layers' sites (default: none)")
    parser.add_argument("--error", choices=ERROR_MODES, default="live", help="the error at replaced sites")
    add_places(parser)
    parser.add_argument(
        "--mask",
        choices=MASK_MODES,
        default="frozen",
        help="live: TopK selects again after an ablation",
    )


def add_many(parser: argparse._ActionsContainer, flag: str, metavar: str, help: str, *, required: bool = False) -> None:
    """An option that takes several values and may be repeated."""
    parser.add_argument(
        flag,
        nargs="+",
        action="extend",
        default=None if required else [],
        metavar=metavar,
        help=help,
        required=required,
    )


def count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdigit() or whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return whole(text)


def whole(text: str) -> int:
    """A whole number that fits into 64 bits."""
    if not re.fullmatch(r"[-+]?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:  # Python reads no number of thousands of digits
        raise argparse.ArgumentTypeError(f"{text[:20]}… has {len(text)} digits; 64 bits hold 19")
    return int(text)


def nodes(text: str) -> int | None:
    """A number of nodes, or all."""
    try:
        return None if text == "all" else whole(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `all` nor a number") from None


def layers(text: str) -> str | list[int]:
    """Layer numbers, or all."""
    try:
        return "all" if text == "all" else [whole(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `all` nor numbers such as 0,1,5") from None
