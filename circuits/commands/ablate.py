"""`circuits ablate`: zero features; logits before and after."""

import argparse
from dataclasses import asdict

from circuits.commands._options import computes_in, load
from circuits.commands._output import Result, ranked, say_inactive, show, standing_line
from hooks.interventions import INTERVENTIONS


def run(args: argparse.Namespace) -> Result:
    """Zero features; logits before and after."""
    plan = [INTERVENTIONS["ablate"].from_text(address, None) for address in args.feature]
    model = load(args)
    changing = {"swap": args.swap, "error": args.error, "mask": args.mask}
    run = model.run(args.prompt, plan, positions=args.positions, skip=args.skip, **changing)
    inactive = say_inactive(run.inactive)
    effect = run.effect(args.target, args.against)
    before, after = run.top_before(args.top), run.top_after(args.top)
    token, other = model.host.string(effect.target), model.host.string(effect.against)
    lines = [
        f"target {token!r} (id {effect.target}), against {other!r} (id {effect.against})",
        f"              {'logit':>9} {'prob':>8} {'rank':>6} {'logit − other':>14}",
        standing_line("baseline", effect.baseline, effect.metric_before),
        standing_line("ablated", effect.edited, effect.metric_after),
        f"change        {effect.delta_logit:+9.3f} {effect.delta_prob:+8.4f} {'':>6} {effect.delta:+14.3f}",
        "before: " + ranked(before),
        "after:  " + ranked(after),
    ]
    show(args, "\n".join(lines))
    delta = {"logit": effect.delta_logit, "prob": effect.delta_prob, "metric": effect.delta}
    return {
        "target": {"token": token, "id": effect.target},
        "against": {"token": other, "id": effect.against},
        "baseline": asdict(effect.baseline),
        "ablated": asdict(effect.edited),
        "delta": delta,
        "top_before": [asdict(item) for item in before],
        "top_after": [asdict(item) for item in after],
        "inactive": inactive,
        **changing,
        **computes_in(args, model),
    }
