"""`circuits check --plan`: how much memory model, transcoders, cache and tracing will take, and what fits. No weights
are loaded."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd

from circuits.commands._output import Result, show
from hooks.choices import DEVICES, ITEM
from hooks.demo import TRANSCODERS, WEIGHTS
from hooks.errors import CheckpointError, ModelError, UserError
from hooks.formats import recognise
from hooks.memory import (
    Ask,
    ModelShape,
    Plan,
    SetShape,
    gb,
    host_tables,
    known_model,
    model_shape,
    plan,
    tasks,
)
from hooks.sites import SiteSpec

_MOST_GB = 1e6


def run(args: argparse.Namespace) -> Result:
    """Sizes, estimates, tables."""
    model = _model(args)
    coders = _coders(args, model)
    if coders.d_model != model.d_model:
        raise CheckpointError(
            "the transcoders do not fit the model",
            expected=f"width {model.d_model}, the model's hidden size",
            found=f"width {coders.d_model}",
        )
    for name, value, most in (("nodes", args.nodes, None), ("k", args.k, coders.d_features)):
        if value is not None and (value < 1 or (most and value > most)):
            expected = "a number from 1 up" if most is None else f"1 to {most}, the features there are"
            raise UserError(f"--{name} {value} is out of range", expected=expected, where=f"--{name}")
    dtype = args.dtype or model.dtype
    if dtype not in ITEM:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(ITEM), where="--dtype")
    on: Any = "cpu" if args.device == "cpu" else "cuda"
    ask = Ask(model, coders, args.prompt_tokens[0], dtype, args.batch, args.new_tokens, args.nodes, on=on)
    plans = [plan(replace(ask, tokens=tokens)) for tokens in args.prompt_tokens]
    devices = {name: device_bytes(name) for name in args.devices}
    show(args, _text(ask, plans, devices))
    return {
        "model": _sizes(ask),
        "transcoders": {"layers": coders.layers, "features": coders.d_features, "k": coders.k}
        | {"dtype": coders.dtype, "bytes": coders.nbytes, "layer_bytes": coders.layer_bytes},
        "nodes": args.nodes,
        "batch": args.batch,
        "plans": [_facts(one, devices) for one in plans],
    }


def device_bytes(text: str) -> int:
    """Bytes of a device named by its GB or by name.

    Raises:
        UserError: neither.
    """
    size = DEVICES.get(text.lower(), text)
    try:
        found = float(size)
    except ValueError:
        found = 0.0
    if not 0 < found < _MOST_GB:
        raise UserError(
            f"unknown device {text!r}", expected=f"GB such as 80, or {', '.join(DEVICES)}", where="--devices"
        )
    return int(found * 1e9)


# -- sizes -----------------------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> ModelShape:
    """Sizes from a folder, from the hub's cache, or the built-in sizes of the Qwen2.5 models."""
    if args.model == "demo":
        return model_shape(WEIGHTS / "config.json")
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        return model_shape(folder / "config.json")
    cached = _cached(args.model, "config.json")
    found = model_shape(cached) if cached else known_model(args.model)
    if found is None:
        raise ModelError(
            f"there is no config of {args.model} at hand",
            expected="a folder with config.json, a model in the hub's cache, or Qwen/Qwen2.5-0.5B to 72B",
            repair=f"fetch its config.json alone: hf download {args.model} config.json",
        )
    return found


def _cached(name: str, file: str) -> Path | None:
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file)
    except huggingface_hub.errors.HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _coders(args: argparse.Namespace, model: ModelShape) -> SetShape:
    """From numbers, else from a folder's headers."""
    sites = _sites(args)
    if args.set_layers or args.features:
        if not (args.set_layers and args.features):
            raise UserError("--set-layers and --features belong together", expected="both, or neither")
        k = args.k or max(1, int(0.12 * args.features))
        found = SetShape.of_numbers(args.set_layers, model.d_model, args.features, k, args.set_dtype or "bfloat16")
        return found.between(*sites)
    name = args.transcoders or ("demo" if args.model == "demo" else None)
    folder = TRANSCODERS.get(name or "") or Path(name or "").expanduser()
    if name is None or not folder.is_dir():
        raise CheckpointError(
            "there are no headers of the transcoders at hand",
            expected="--transcoders FOLDER, or their sizes",
            found=name or "",
            repair="--set-layers 63 --features 12288 --k 1474 --set-dtype bfloat16 (the published set of Qwen2.5-32B)",
        )
    found = SetShape.of_checkpoint(recognise(folder), args.set_dtype)
    found = replace(found, k=args.k or found.k)
    return found.between(*sites) if args.read or args.write else found


def _sites(args: argparse.Namespace) -> tuple[SiteSpec, SiteSpec]:
    read = SiteSpec.parse(args.read or "resid_pre")
    return read, SiteSpec.parse(args.write) if args.write else read


# -- output ----------------------------------------------------------------------------------------------------------


def _sizes(ask: Ask) -> dict[str, Any]:
    m, item = ask.model, ask.item
    sizes = {"parameters": m.parameters, "dtype": ask.dtype, "bytes": m.nbytes(item, m.bits)}
    if m.bits is None:
        sizes |= {"bytes_8bit": m.nbytes(item, 8), "bytes_4bit": m.nbytes(item, 4)}
    return sizes


def _facts(one: Plan, devices: dict[str, int]) -> dict[str, Any]:
    ask = one.ask
    works = {
        task: {"peak": found.peak, "kept": found.kept, "steps": found.peaks, "host_tables": host_tables(ask, task)}
        for task, found in one.works.items()
    }
    fits = {name: {m: list(found) for m, found in one.fitting(size).items()} for name, size in devices.items()}
    cards = {name: {task: one.cards(task, size) for task in tasks()} for name, size in devices.items()}
    per_mode = {
        mode.name: {task: one.nbytes(mode, task) for task in mode.tasks} for mode in one.modes if not mode.spread
    }
    return {"tokens": ask.tokens, "tasks": works, "modes": per_mode, "fits": fits, "cards": cards}


def _text(ask: Ask, plans: list[Plan], devices: dict[str, int]) -> str:
    m, s, item = ask.model, ask.coders, ask.item
    stored = f"{m.bits}-bit" if m.bits else ask.dtype
    lines = [f"model          {m.parameters:,} numbers, {gb(m.nbytes(item, m.bits))} in {stored}"]
    if m.bits is None:
        lines[0] += f"; 8-bit {gb(m.nbytes(item, 8))}, 4-bit {gb(m.nbytes(item, 4))}"
    lines.append(
        f"transcoders    {s.layers} × {gb(s.layer_bytes)} = {gb(s.nbytes)} in {s.dtype} "
        f"({s.d_features} features, {s.k} kept per token)"
    )
    for one in plans:
        lines += ["", f"beside the weights, at {one.ask.tokens} tokens", _work_table(one).to_string(index=False)]
        lines += ["", "what fits a device of so many GB", _fit_table(one, devices).to_string(index=False)]
    lines += ["", *(line for name, size in devices.items() for line in _advice(plans, name, size))]
    return "\n".join(lines)


def _work_table(one: Plan) -> pd.DataFrame:
    ask = one.ask
    rows = []
    for task, found in one.works.items():
        largest = max(found.peaks, key=lambda name: found.peaks[name])
        stays = {name: size for step in found.steps for name, size in step.adds.items()}
        main = ", ".join(f"{name} {gb(size)}" for name, size in sorted(stays.items(), key=lambda p: -p[1])[:2])
        rows.append((task, gb(found.peak), largest, main, gb(host_tables(ask, task))))
    return pd.DataFrame(rows, columns=["task", "peak", "reached in", "what stays", "tables in host memory"])


def _fit_table(one: Plan, devices: dict[str, int]) -> pd.DataFrame:
    rows = []
    for mode in one.modes:
        row = {"mode": mode.name}
        for name, size in devices.items():
            if mode.spread:
                needed = [one.cards(task, size) for task in ("features", "trace")]
                row[name] = " / ".join(str(n or "no") for n in needed) + " cards"
                continue
            found = one.fitting(size)[mode.name]
            row[name] = "all" if len(found) == len(tasks()) else ", ".join(found) or "-"
        rows.append(row)
    return pd.DataFrame(rows)


def _advice(plans: list[Plan], name: str, size: int) -> list[str]:
    """For one device, the fastest mode for `features` and the fastest for `trace`, at the longest prompt."""
    one = max(plans, key=lambda found: found.ask.tokens)
    out = []
    for task in ("features", "trace"):
        mode = one.first(task, size)
        cards = one.cards(task, size)
        spread = f"{cards} such devices with --device-map auto" if cards else "no way that we know"
        way = spread if mode is None else f"{mode.name}{f' ({mode.how})' if mode.how else ''}"
        out.append(f"{name} GB, {task} at {one.ask.tokens} tokens: {way}")
    return out
