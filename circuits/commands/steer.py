"""`circuits steer`: generate plain and steered, side by side, at one strength or over a grid of them."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.commands._options import (
    intervention,
    load,
)
from circuits.commands._output import Result, finish, say_inactive, show, table
from circuits.commands._places import check_places
from circuits.drawing import check_suffix
from circuits.plots import dose_plot
from hooks.errors import UserError
from hooks.generation import (
    Comparison,
    DoseResponse,
    GenerateOptions,
    Resolved,
    Sampling,
    Scored,
    Steer,
    compare,
    dose_response,
    grid,
    preliminary,
    prepare,
)
from hooks.host import Prompt
from hooks.model import HookedModel
from hooks.readout import Effect


def run(args: argparse.Namespace) -> Result:
    """Generate plain and steered; print both texts, and the probability of every token under both models."""
    plan = _plan(args)
    sampling = Sampling(
        args.temperature, args.top_p, args.seed, args.top_k, args.min_p, repetition_penalty=args.repetition_penalty
    )
    options = GenerateOptions(
        swap=args.swap,
        error=args.error,
        mask=args.mask,
        positions=args.positions,
        skip=tuple(args.skip),
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=tuple(args.stop),
        engine=args.engine,
    )
    _check_sweep(args)
    texts = _texts(args.texts)
    model = load(args)
    ids = model.host.chat(args.prompt) if args.chat else None
    prompt: Prompt = args.prompt if ids is None else ids
    prepare(model, prompt, [preliminary(plan)], options)  # what is wrong is said before anything else
    said = {
        "inactive": say_inactive(model.inactive(prompt, preliminary(plan))),
        "sampling": asdict(sampling) | {"max_new_tokens": args.max_new_tokens, "stop": list(args.stop)},
        "prompt_tokens": list(model.host.batch([prompt]).strings[0]),
        "chat": args.chat,
        "swap": args.swap,
        "error": args.error,
        "mask": args.mask,
    }
    if args.strengths is not None:
        return _sweep(args, model, prompt, plan, options, texts) | said
    (resolved,) = prepare(model, prompt, [plan], options, texts)
    whole = args.prompt if ids is None else model.host.text(ids)  # special tokens shown
    show(args, "\n".join(map(_line, resolved)))
    show(args, f"steered:  {whole}", end="")
    found = compare(model, prompt, resolved, options, watch=lambda piece: show(args, piece, end=""))
    show(args, f"\nbaseline: {whole}{found.baseline.text}\n\n{_side_by_side(found)}\n\n{_fluency(found)}")
    return {
        "baseline": _json(found.baseline),
        "steered": _json(found.steered),
        "cost": found.cost,
        "first_difference": found.first_difference,
        "interventions": [_described(item) for item in resolved],
        **said,
    }


def _plan(args: argparse.Namespace) -> list[Any]:
    items: list[Any] = [Steer.parse(text) for text in args.set]
    for text in args.do:
        name, _, rest = text.partition(":")
        items.append(Steer.parse(rest, name) if name in ("clamp", "add") else intervention(text))
    if not items:
        raise UserError("nothing to steer with", expected="--set ADDR=VALUE or --do NAME:ADDR=VALUE")
    if not args.when_inactive:
        return items
    chosen = {"when_inactive": args.when_inactive}
    return [replace(item, **chosen) if "when_inactive" in vars(item) else item for item in items]


def _check_sweep(args: argparse.Namespace) -> None:
    """Refuse wrong options of a sweep before a model is loaded."""
    if args.strengths is not None:
        grid(args.strengths)
    for name in ("plot", "target", "against"):
        if args.strengths is None and getattr(args, name) is not None:
            raise UserError(f"--{name} belongs to a sweep, and --strengths is not given", repair="--strengths 0,2,4,8")
    if args.plot:
        check_suffix(args.plot)
    check_places(args.force, [(args.plot, "picture")], reads=[args.texts])


def _texts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the texts {path}", found=str(error), where="--texts") from None
    if not lines:
        raise UserError(f"there are no texts in {path}", expected="one text a line", where="--texts")
    return lines


def _sweep(
    args: argparse.Namespace,
    model: HookedModel,
    prompt: Prompt,
    plan: Sequence[object],
    options: GenerateOptions,
    texts: Sequence[str],
) -> Result:
    found = dose_response(
        model, prompt, plan, args.strengths, target=args.target, against=args.against, options=options, texts=texts
    )
    show(args, _sweep_text(found))
    last = found.doses[-1]
    result = {
        "baseline": _json(found.baseline),
        "steered": _json(last.scored),
        "target": found.target,
        "against": found.against,
        "metric": found.metric,
        "unit": found.unit,
        "doses": [
            {
                "strength": str(dose.strength),
                "values": dict(dose.values),
                "effect": _effect(dose.effect) | asdict(dose.effect.edited) | {"metric": dose.effect.metric_after},
                **_json(dose.scored),
            }
            for dose in found.doses
        ],
        "interventions": [_described(item) for item in last.interventions],
        "plot": None if args.plot is None else str(args.plot),
    }
    return finish(result, args.plot, lambda path: dose_plot(found, path))


def _effect(effect: Effect) -> dict[str, float]:
    """`delta_metric` is the earlier name of `delta`."""
    return {"delta": effect.delta, "delta_logit": effect.delta_logit, "delta_metric": effect.delta}


def _sweep_text(found: DoseResponse) -> str:
    lines = list(dict.fromkeys(_line(item, short=True) for dose in found.doses[:1] for item in dose.interventions))
    shown = found.frame().drop(columns=["amount", "logit", "delta_logit"])
    lines += [
        f"logit({found.target!r}) − logit({found.against!r}) at the first new token, strength in {found.unit}",
        f"not steered: {found.metric:.4g}; {found.baseline.text!r}, perplexity {found.baseline.perplexity:.4g}",
        table(shown.assign(text=shown["text"].map(repr))),
    ]
    return "\n".join(lines)


def _line(item: Resolved, short: bool = False) -> str:
    """One intervention, with the measured number of its strength and its source."""
    name = type(item.intervention).__name__.lower()
    factor, shift = item.intervention.affine
    if item.value is None:
        return f"{name} {item.intervention.address}: a → {factor:g} · a {shift:+g}"
    origin = f" ({item.source if short else f'{item.strength}: {item.source}'})" if item.source else ""
    return f"{name} {item.intervention.address}{'' if short else f' = {item.value:.4g}'}{origin}"


def _described(item: Resolved) -> dict[str, Any]:
    factor, shift = item.intervention.affine
    return {
        "name": type(item.intervention).__name__.lower(),
        "address": str(item.intervention.address),
        "strength": None if item.strength is None else str(item.strength),
        "value": item.value,
        "source": item.source,
        "when_inactive": item.intervention.when_inactive,
        "factor": factor,
        "shift": shift,
    }


def _json(scored: Scored) -> dict[str, Any]:
    return {
        "text": scored.text,
        "ids": list(scored.ids),
        "tokens": list(scored.tokens),
        "logprobs": {"plain": scored.plain.tolist(), "steered": scored.steered.tolist()},
        "mean_logprob": {"plain": scored.mean_plain, "steered": scored.mean_steered},
        "perplexity": scored.perplexity if math.isfinite(scored.perplexity) else None,
    }


def _side_by_side(found: Comparison) -> str:
    """Both texts token by token, each with its probability under the plain and under the steered model."""
    halves = []
    for name, scored in (("baseline", found.baseline), ("steered", found.steered)):
        probs = [[f"{p:.3g}" for p in column.exp().tolist()] for column in (scored.plain, scored.steered)]
        tokens = [repr(token) for token in scored.tokens]
        halves.append(pd.DataFrame(dict(zip((f"{name} text", "p plain", "p steered"), (tokens, *probs), strict=True))))
    return pd.concat(halves, axis=1).fillna("").to_string(index=False)


def _fluency(found: Comparison) -> str:
    steered, baseline = found.steered, found.baseline
    return (
        f"read by the plain model: steered text {steered.mean_plain:.3f} nats per token (perplexity "
        f"{steered.perplexity:.4g}), baseline {baseline.mean_plain:.3f} ({baseline.perplexity:.4g}); "
        f"cost in fluency {found.cost:.3f} nats per token"
    )
