"""`circuits sweep`: the effect of many interventions, one by one, each exact."""

import argparse
from typing import Any

import pandas as pd

from circuits.commands._options import (
    computes_in,
    intervention,
    load,
)
from circuits.commands._output import Result, finish, say, show, table
from circuits.commands._places import check_places
from circuits.drawing import check_suffix
from circuits.plots import sweep_plot
from hooks.choices import TABLES
from hooks.effects import Change, Sweep, active_features, changed, doses, pairs
from hooks.errors import OutputError, UserError
from hooks.generation import grid
from hooks.model import HookedModel
from hooks.types import Positions

SHOWN = 20  # effects, unless told otherwise


def run(args: argparse.Namespace) -> Result:
    """Plan, sweep, write."""
    _check_files(args)
    _check_contradictions(args)
    values = None if args.dose is None else _grid(args.values)
    model = load(args)
    groups = _groups(args, model, values)
    say(f"{len(groups)} runs")
    found = model.sweep(
        args.prompt,
        groups,
        target=args.target,
        against=args.against,
        pos=args.at,
        metrics=args.metrics,
        tokens_at_once=args.tokens_at_once,
        progress=not args.json,
    )
    if args.out:
        found.save(args.out)
    show(args, _text(args, model, found))
    result = _result(args, model, found) | computes_in(args, model)
    return finish(result, args.plot, lambda path: sweep_plot(found, path))


def _check_files(args: argparse.Namespace) -> None:
    if args.out and args.out.suffix.lower() not in TABLES:
        raise OutputError(f"unknown table format {args.out.suffix!r}", expected=" or ".join(TABLES))
    if args.plot:
        check_suffix(args.plot)
    check_places(args.force, [(args.out, "table"), (args.plot, "picture")])


def _check_contradictions(args: argparse.Namespace) -> None:
    every = args.layers != "all" or args.positions is not None
    if args.dose and (args.group or every or args.pairs or args.reference or args.change != "zero"):
        raise UserError("--dose says all that is changed", expected="--dose ADDR --values A,B,… and nothing beside")
    if (args.dose is None) != (args.values is None):
        raise UserError("--dose and --values belong together", expected="--dose ADDR --values A,B,…")
    if args.group and every:
        raise UserError("--group and --layers or --positions each say what is changed", expected="one of them")
    if args.pairs and not args.group:
        raise UserError("--pairs needs --group", repair="name the features to pair; all active ones would be millions")


def _groups(args: argparse.Namespace, model: HookedModel, values: list[float] | None) -> list[Any]:
    if values is not None:
        return doses(args.dose, values)
    reference = model.record(args.reference) if args.reference else None
    change = Change(args.change, args.value, reference)
    layers = None if args.layers == "all" else args.layers
    recording = model.record([args.prompt], layers)
    if not args.group:
        return changed(
            active_features(recording, layers, _positions(args.positions, recording.batch.lengths[0])),
            change,
            recording,
        )
    named = [[intervention(f"ablate:{text}").address for text in group.split("+")] for group in args.group]
    groups = [[item for [item] in changed(addresses, change, recording)] for addresses in named]
    return [*groups, *pairs(groups)] if args.pairs else groups


def _positions(named: str | list[int] | None, length: int) -> list[int] | None:
    if not isinstance(named, str):
        return named
    spans = Positions.parse(named).spans(length)
    return [pos for start, stop in spans for pos in range(start, length if stop is None else stop)]


def _grid(text: str) -> list[float]:
    strengths = grid(text)
    if strengths[0].kind != "absolute":
        raise UserError(f"--values {text} are no activations", expected="numbers such as 0,2.5,5 or 0:10:11")
    return [strength.amount for strength in strengths]


def _result(args: argparse.Namespace, model: HookedModel, found: Sweep) -> Result:
    table = found.table if args.top is None else found.ranked().head(args.top)
    rows = [
        {name: None if pd.isna(value) else value for name, value in row.items()} for row in table.to_dict("records")
    ]
    question = found.question
    return {
        "rows": rows,
        "noise_floor": found.noise_floor,
        "baseline": dict(found.baseline),
        "target": {"token": model.host.string(question.target), "id": question.target},
        "against": {"token": model.host.string(question.against), "id": question.against},
        "passes": found.passes,
        "way": found.way,
    }


def _text(args: argparse.Namespace, model: HookedModel, found: Sweep) -> str:
    question, base = found.question, found.baseline
    own, other = model.host.string(question.target), model.host.string(question.against)
    shown = found.table if args.dose and args.top is None else found.ranked().head(args.top or SHOWN)
    unresolved = int((~found.table["resolved"]).sum())
    lines = [
        f"logit({own!r}) − logit({other!r}) behind {found.tokens[question.pos]!r}: {base['metric']:.3f}, "
        f"probability {base['prob']:.3f}, rank {base['rank']:.0f}",
        table(shown.drop(columns=["layer", "pos", "feature"]).assign(role=shown["role"].fillna("–"))),
        f"{len(found.table)} effects in {found.passes} batches; noise floor {found.noise_floor:.1e} logits, "
        f"{unresolved} below it",
    ]
    return "\n".join(lines)
