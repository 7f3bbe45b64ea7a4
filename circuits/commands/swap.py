"""`circuits swap`: reconstruction quality, and the effect of replacing sites on the predictions."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from circuits.commands._options import load
from circuits.commands._output import Result, show, table


def run(args: argparse.Namespace) -> Result:
    """Reconstruction quality, and the effect of replacing sites on the predictions."""
    model = load(args, args.layers)
    swapped = model.swap(args.prompt, args.layers, args.error, positions=args.positions, skip=args.skip)
    quality = [asdict(site) for site in swapped.layers]
    effect = swapped.effect
    show(
        args,
        table(pd.DataFrame(quality))
        + f"\nswapped at {_named(swapped.positions, swapped.run.batch.lengths[0])}, error {args.error}: KL "
        f"{effect.kl:.4f} nats, top-1 agreement {effect.top1_agreement:.1%}, over {len(swapped.measured)} tokens",
    )
    return {
        "layers": quality,
        "kl": effect.kl,
        "top1_agreement": effect.top1_agreement,
        "positions": list(swapped.positions),
        "measured": list(swapped.measured),
    }


def _named(positions: Sequence[int], length: int) -> str:
    """Positions in words: those that are in the list, or those that are not, whichever is shorter."""
    left_out = [pos for pos in range(length) if pos not in positions]
    if not left_out:
        return f"all {length} tokens"
    few, word = (left_out, "all positions but") if len(left_out) < len(positions) else (positions, "positions")
    return f"{word} {', '.join(map(str, few))}"
