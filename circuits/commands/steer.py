"""`circuits steer`: generate plain and steered, side by side."""

import argparse
from typing import Any

from circuits.commands._options import add_changing, add_many, add_prompt, command, intervention, load
from circuits.commands._output import Result, show
from hooks.errors import UserError
from hooks.interventions import INTERVENTIONS


def add(commands: Any) -> None:
    """Its options."""
    steer = command(commands, "steer", run, "generate with features held at chosen values")
    add_prompt(steer)
    add_many(steer, "--set", "ADDR=VALUE", "hold a feature at a value, for example L3/118=8.0 or L3/118@new=8.0")
    add_many(steer, "--do", "NAME:ADDR[=VALUE]", f"any intervention: {', '.join(INTERVENTIONS)}; scale:L3/118=2.0")
    steer.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="default 16")
    add_changing(steer)


def run(args: argparse.Namespace) -> Result:
    """Generate plain and steered, side by side."""
    plan = [intervention(f"clamp:{text}") for text in args.set] + [intervention(text) for text in args.do]
    if not plan:
        raise UserError("nothing to steer with", expected="--set ADDR=VALUE or --do NAME:ADDR=VALUE")
    model = load(args)
    steered = model.generate(
        args.prompt,
        plan,
        max_new_tokens=args.max_new_tokens,
        swap=args.swap,
        error=args.error,
        mask=args.mask,
    )
    baseline = model.generate(args.prompt, max_new_tokens=args.max_new_tokens)
    show(args, f"baseline: {args.prompt}{baseline.text}\nsteered:  {args.prompt}{steered.text}")
    return {
        "baseline": {"text": baseline.text, "ids": list(baseline.ids)},
        "steered": {"text": steered.text, "ids": list(steered.ids)},
    }
