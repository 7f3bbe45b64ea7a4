"""Options that several subcommands share."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.options._parser import NumberList, Parser
from hooks.choices import ERROR_MODES, MASK_MODES, PRECISIONS, SKIPS
from hooks.errors import UserError
from hooks.whole import whole_text

_MOST_NUMBERS = 10_000  # in a range of layers or positions
_LISTED = "2,3, 2 3, 0-3 or all"


def command(commands: Any, name: str, help: str, *, examples: Sequence[str], model: bool = True) -> Parser:
    """A subcommand with `--json`, its examples and, with `model`, the options that load a model."""
    about = help[0].upper() + help[1:] + "."
    parser: Parser = commands.add_parser(
        name, help=help, description=about, examples=[f"circuits {line}" for line in examples]
    )
    parser.set_defaults(command=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    if model:
        group = parser.add_argument_group("model")
        group.add_argument("--model", default="demo", help="demo (embedded, default), a folder, or a hub id")
        group.add_argument("--transcoders", metavar="SET", help="demo or demo-dense; a folder, or a hub id")
        add_reading(group)
        group.add_argument(
            "--budget-gb", type=float, metavar="GB", help="keep at most this much of the transcoders loaded"
        )
        group.add_argument("--device", help="cpu, cuda, cuda:1, …")
        group.add_argument("--device-map", metavar="MAP", help="let accelerate place the model, for example auto")
        add_dtype(group, "the model's (default: the checkpoint's)")
        group.add_argument(
            "--context", type=count, metavar="N", help="tokens the model may be given (default: what its config says)"
        )
        group.add_argument(
            "--precision",
            choices=PRECISIONS,
            help="how effects on a half-precision model are measured: exact (fp32 over its weights; default) or native",
        )
    return parser


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Options for facts that the files of a set may lack."""
    parser.add_argument("--read", metavar="SITE", help="the site the transcoders read (if the files do not say)")
    parser.add_argument("--write", metavar="SITE", help="the site they reconstruct (likewise)")
    parser.add_argument("--k", type=whole, metavar="N", help="features TopK keeps (if the files do not say)")
    parser.add_argument("--encoder", metavar="E", help="trained (default), or card: as on the published set's card")
    parser.add_argument("--decoder", type=whole, metavar="N", help="which one, where a file has several (from 0)")


def add_dtype(parser: argparse._ActionsContainer, what: str) -> None:
    """A precision."""
    parser.add_argument("--dtype", metavar="TYPE", help=f"float32, bfloat16, …: {what}")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """The prompt."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text, as one argument")


def add_target(parser: argparse._ActionsContainer) -> None:
    """The token to measure."""
    parser.add_argument("--target", metavar="TOKEN", help="the token to measure (default: the model's own answer)")
    parser.add_argument("--against", metavar="TOKEN", help="the other token of the metric (default: the best other)")


def add_top(parser: argparse._ActionsContainer, default: int | None, what: str) -> None:
    """How many of the strongest."""
    parser.add_argument(
        "--top", type=count, default=default, metavar="N", help=f"show so many, with --json too: {what}"
    )


def add_layers(parser: argparse._ActionsContainer) -> None:
    """Which layers."""
    parser.add_argument(
        "--layers",
        action=NumberList,
        type=layers,
        default="all",
        metavar="2,3",
        help=f"these layers: {_LISTED} (default all)",
    )


def add_positions(parser: argparse._ActionsContainer) -> None:
    """The tokens that are changed."""
    parser.add_argument(
        "--positions",
        action=NumberList,
        type=positions,
        metavar="WHERE",
        help="at these tokens: 0 is the first, -1 the last; 0,-1, 0 -1, 0-3, 1:, 2:5 or all (default all)",
    )


def add_at(parser: argparse._ActionsContainer) -> None:
    """The token whose successor is measured or explained."""
    parser.add_argument(
        "--at", type=whole, default=-1, metavar="T", help="the token whose successor is measured (default -1, the last)"
    )


def add_out(parser: argparse._ActionsContainer, what: str, *, required: bool = False, default: Any = None) -> None:
    """The path of the results."""
    parser.add_argument(
        "--out", type=Path, required=required, default=default, metavar="PATH", help=f"where to write: {what}"
    )


def add_plot(parser: argparse._ActionsContainer, what: str) -> None:
    """The path of a picture."""
    parser.add_argument("--plot", type=Path, metavar="PATH", help=f"a picture, png or svg: {what}")


def add_seed(parser: argparse._ActionsContainer, what: str) -> None:
    """The random seed."""
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help=f"where chance starts: {what} (default 0)")


def add_force(parser: argparse._ActionsContainer) -> None:
    """Whether existing files are overwritten."""
    parser.add_argument("--force", action="store_true", help="overwrite files that hold something else than results")


def add_places(parser: argparse._ActionsContainer) -> None:
    """The tokens at which sites are not replaced."""
    add_positions(parser)
    flags = {"special": "the tokenizer's special tokens", "sinks": "attention sinks"}
    for kind in SKIPS:
        parser.add_argument(
            f"--skip-{kind}", dest="skip", action="append_const", const=kind, help=f"but not at {flags[kind]}"
        )
    parser.set_defaults(skip=[])


def add_changing(parser: argparse.ArgumentParser) -> None:
    """How interventions are carried out."""
    parser.add_argument(
        "--swap",
        action=NumberList,
        type=layers,
        metavar="2,3",
        help=f"replace these layers' sites: {_LISTED} (default none)",
    )
    add_error(parser, "live")
    add_places(parser)
    parser.add_argument(
        "--mask",
        choices=MASK_MODES,
        default="frozen",
        help="live: TopK selects again after an ablation",
    )


def add_error(parser: argparse._ActionsContainer, default: str) -> None:
    """What happens to reconstruction errors."""
    parser.add_argument(
        "--error", choices=ERROR_MODES, default=default, help=f"the error at replaced sites (default {default})"
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
    try:
        return whole_text(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def nodes(text: str) -> int | None:
    """A number of nodes, or all."""
    try:
        return None if text == "all" else whole(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `all` nor a number") from None


def layers(text: str) -> str | list[int]:
    """Layer numbers, ranges of them with both ends, or all."""
    return _numbers(text, "`all` nor numbers such as 0,1,5 or 0-3")


def positions(text: str) -> str | list[int]:
    """Positions of tokens, written as for `layers`; negative ones count from the end. Or positions as in an address."""
    return _numbers(text, "`all` nor positions such as 0,-1 or 0-3") if re.fullmatch(r"[-+0-9,]+", text) else text


def _numbers(text: str, expected: str) -> str | list[int]:
    try:
        return "all" if text == "all" else [number for part in text.split(",") for number in _span(part)]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {expected}") from None


def _span(text: str) -> Sequence[int]:
    ends = re.fullmatch(r"([0-9]+)-([0-9]+)", text)
    if not ends:
        return [whole(text)]
    first, last = whole(ends[1]), whole(ends[2])
    if not first <= last < first + _MOST_NUMBERS:
        raise argparse.ArgumentTypeError(text)
    return range(first, last + 1)
