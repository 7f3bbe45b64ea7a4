"""`circuits swap`: reconstruction quality, and what replacing does to the predictions."""

import argparse
from dataclasses import asdict
from typing import Any

import pandas as pd

from circuits.commands._options import add_prompt, command, layers, load
from circuits.commands._output import Result, show, table
from hooks.swap import ERROR_MODES


def add(commands: Any) -> None:
    """Its options."""
    swap = command(commands, "swap", run, "replace sites by their reconstructions and measure")
    add_prompt(swap)
    swap.add_argument("--layers", type=layers, default="all", metavar="0,1|all", help="which (default all)")
    swap.add_argument("--error", choices=ERROR_MODES, default="zero", help="what becomes of the error (default zero)")


def run(args: argparse.Namespace) -> Result:
    """Reconstruction quality, and what replacing does to the predictions."""
    model = load(args, args.layers)
    swapped = model.swap(args.prompt, args.layers, args.error)
    quality = [asdict(site) for site in swapped.layers]
    effect = swapped.effect
    show(
        args,
        table(pd.DataFrame(quality))
        + f"\nswapped, error {args.error}: KL {effect.kl:.4f} nats, top-1 agreement {effect.top1_agreement:.1%}",
    )
    return {"layers": quality, "kl": effect.kl, "top1_agreement": effect.top1_agreement}
