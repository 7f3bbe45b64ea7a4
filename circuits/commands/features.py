"""`circuits features`: the strongest features per token."""

import argparse

from circuits.commands._options import load
from circuits.commands._output import Result, show, table


def run(args: argparse.Namespace) -> Result:
    """The strongest features per token."""
    model = load(args, args.layers)
    tokens = list(model.host.batch([args.prompt]).strings[0])
    frame = model.features(args.prompt, args.top, None if isinstance(args.layers, str) else args.layers)
    show(args, table(frame))
    plain = frame.drop(columns="token").astype(object)  # JSON has no NaN
    return {"tokens": tokens, "features": plain.where(frame.notna(), None).to_dict("records")}
