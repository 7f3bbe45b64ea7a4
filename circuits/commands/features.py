"""`circuits features`: the strongest features per token."""

import argparse
from typing import Any

from circuits.commands._options import add_prompt, command, count, layers, load
from circuits.commands._output import Result, show, table


def add(commands: Any) -> None:
    """Its options."""
    features = command(commands, "features", run, "the strongest features of every token")
    add_prompt(features)
    features.add_argument("--top", type=count, default=10, metavar="N", help="features per token (default 10)")
    features.add_argument("--layers", type=layers, metavar="0,1|all", help="only these layers")


def run(args: argparse.Namespace) -> Result:
    """The strongest features per token."""
    model = load(args, args.layers)
    tokens = list(model.host.batch([args.prompt]).strings[0])
    frame = model.features(args.prompt, args.top, None if args.layers == "all" else args.layers)
    show(args, table(frame))
    return {"tokens": tokens, "features": frame.drop(columns="token").to_dict("records")}
