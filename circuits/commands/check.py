"""`circuits check`: measure the sites of a set of transcoders on a model, how good it is, and how much memory it
takes."""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from circuits.commands import _plan, _quality
from circuits.commands._options import settle
from circuits.commands._output import Result, finish, say, show, table
from circuits.commands._places import check_places
from circuits.drawing import check_drawing
from circuits.plots import check_plot
from hooks.check import Calibration, Texts, calibrate
from hooks.checkpoints import FILE, Findings, save_findings
from hooks.demo import TRANSCODERS
from hooks.errors import CheckpointError, OutputError, UserError
from hooks.files import check_writable
from hooks.formats import Checkpoint, recognise
from hooks.memory import explained
from hooks.model import load_host
from hooks.names import transcoder_folder
from hooks.sites import SiteSpec

LAYERS = {
    "layer": "layer",
    "fvu": "fvu",
    "fvu_without_sinks": "no sinks",
    "fvu_normed": "normed",
    "avoidable": "avoidable",
    "loss": "loss",
    "stored_loss": "stored",
    "l0": "l0",
    "winner": "best at this layer",
    "ok": "ok",
}


def run(args: argparse.Namespace) -> Result:
    """Measure, print, write."""
    if args.plan and args.quality:
        raise UserError("--plan and --quality are two questions", expected="one of them")
    _check_options(args)
    if args.plan:
        return _plan.run(args)
    if args.plot:
        check_drawing(args.plot)
    check_places(args.force, [(args.out, "quality"), (args.plot, "picture")], reads=[args.text])
    if args.quality:
        return _quality.run(args)
    root, checkpoint = _set(args)
    texts = Texts.built_in(args.model == "demo") if args.text is None else Texts.of_file(args.text)
    sites = {
        name: SiteSpec.parse(text) if text else None for name, text in (("read", args.read), ("write", args.write))
    }
    settle(args.model)
    with explained("loading the model", args.device or "cpu"):
        placed = {"device": args.device, "device_map": args.device_map, "context": args.context}
        host = load_host(args.model, dtype=args.dtype, **placed)
    chosen = None if args.layers == "all" else args.layers
    n_layers = len(checkpoint.layers if chosen is None else chosen)
    say(f"up to {args.tokens:,} tokens of {texts.name}, {n_layers} layers; the bar's estimate is of the time left")
    found = calibrate(
        host,
        checkpoint,
        texts,
        tokens=args.tokens,
        layers=chosen,
        encoder=args.encoder,
        decoder=args.decoder,
        k=args.k,
        model=args.model,
        progress=not args.json,
        **sites,
    )
    where = save_findings(root, found.findings) if args.save else None
    show(args, _text(found, checkpoint) + (f"\nwritten to {where}" if where else ""))
    return finish(_result(found, checkpoint, where), args.plot, lambda path: check_plot(found, path))


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect or a wrong one."""
    question = "--plan" if args.plan else "--quality" if args.quality else "a check"
    idle = {"--plan": ("save", "out", "plot"), "--quality": ("save",), "a check": ("out",)}[question]
    for name in idle:
        if getattr(args, name):
            raise UserError(f"--{name} has no meaning for {question}", repair=f"leave --{name} away")
    forced = [name for name in ("read", "write", "encoder", "decoder") if getattr(args, name) is not None]
    forced += [] if args.layers == "all" else ["layers"]
    if args.save and forced:
        raise UserError(
            f"--{forced[0]} and --save contradict each other",
            expected="findings about the whole set, with every candidate compared",
            repair=f"leave --{forced[0]} away, or --save",
        )


def _set(args: argparse.Namespace) -> tuple[Path, Checkpoint]:
    name = args.transcoders or ("demo" if args.model == "demo" else None)
    if name is None:
        raise CheckpointError(
            f"no transcoders given for {args.model}",
            expected="a folder or hub id, for example KokosDev/qwen25-32b-clt",
            repair="--transcoders PATH_OR_ID",
        )
    if args.save and name in TRANSCODERS:
        raise OutputError(f"the embedded set {name} stays as it is", repair="leave --save away")
    found = transcoder_folder(name, None if args.layers == "all" else args.layers)
    checkpoint = recognise(found.root)
    if args.save:
        check_writable(found.root / FILE)
    return found.root, checkpoint if checkpoint.revision else replace(checkpoint, revision=found.revision)


# -- output ----------------------------------------------------------------------------------------------------------


def sentence(findings: Findings) -> str:
    """The verdict as a sentence."""
    best, rest = findings.best, findings.ranking[1:]
    fvu = f"FVU {best.fvu:.3g}"
    if findings.verdict == "none is good":
        return f"none is good: the best candidate, {best}, leaves {fvu}"
    named = f"reads {best.read}, writes {best.write}, {best.encoder} encoder ({fvu}"
    if findings.verdict == "too close":
        near = [str(other) for other in rest if other.separation is not None]
        return f"too close: {named}), but {' and '.join(near)} fit as well; give --read, --write and --encoder yourself"
    ahead = "" if findings.margin is None else f", the next candidate {findings.margin:+.3g}"
    told = [other.separation for other in rest if other.separation is not None]
    apart = f"; told from {len(told)} close ones by {min(told):.0f} standard errors" if told else ""
    return f"clear: {named}{ahead}{apart})"


def _text(found: Calibration, checkpoint: Checkpoint) -> str:
    findings, chosen = found.findings, found.findings.selection
    frame = pd.DataFrame([layer.model_dump() for layer in findings.layers])[list(LAYERS)].rename(columns=LAYERS)
    ranking = pd.DataFrame(
        {
            "candidate": [str(candidate) for candidate in findings.ranking],
            "no sinks": [candidate.fvu for candidate in findings.ranking],
            "avoidable": [candidate.avoidable for candidate in findings.ranking],
            "standard errors behind": [candidate.separation for candidate in findings.ranking],
        }
    )
    known = f"{chosen.activation or 'undetermined'}{f', k = {chosen.k}' if chosen.k else ''} ({chosen.source})"
    lines = [
        f"{findings.tokens:,} tokens of {findings.text}, {findings.sinks} of them attention sinks",
        f"{findings.best} at every layer:",
        table(frame.dropna(axis=1, how="all")),
        "\ncandidates, median over layers:",
        table(ranking.dropna(axis=1, how="all")),
        f"\nselection: {known}; {chosen.reason}. Measured with {chosen.measured_with}",
        "FVU by k: " + ", ".join(f"{'ReLU' if p.k is None else p.k} {p.fvu:.3g}" for p in chosen.curve),
        f"the files say: {_stored(checkpoint)}",
        *(f"decoder {d.best.decoder}: {d.verdict}: {d.best} (FVU {d.best.fvu:.3g})" for d in findings.decoders),
        *(f"note: {note}" for note in findings.notes),
        sentence(findings),
    ]
    return "\n".join(line for line in lines if line != "FVU by k: ")


def _stored(checkpoint: Checkpoint) -> str:
    facts = checkpoint.facts()
    return ", ".join(
        f"{name} {facts[name][0] or 'nothing'} ({facts[name][1]})" for name in ("read", "write", "input_norm")
    )


def _result(found: Calibration, checkpoint: Checkpoint, where: Path | None) -> Result:
    findings = found.findings
    best = findings.best
    whole = findings.model_dump(mode="json")
    return {
        **whole,
        "convention": {
            "read": best.read,
            "write": best.write,
            "encoder": best.encoder,
            "margin": findings.margin,
            "verdict": findings.verdict,
            "source": "calibrated" if findings.usable else "unknown",
        },
        "stored": {name: {"value": value, "source": source} for name, (value, source) in checkpoint.facts().items()},
        "sentence": sentence(findings),
        "saved": None if where is None else str(where),
    }
