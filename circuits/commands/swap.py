"""`circuits swap`: reconstruction quality, and what replacing does to the predictions."""

import argparse
from dataclasses import asdict

import pandas as pd

from circuits.commands._options import load
from circuits.commands._output import Result, show, table


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
