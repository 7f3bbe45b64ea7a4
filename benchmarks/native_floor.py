"""The error of an effect measured in native half precision, and whether it is below the noise floor of `sweep`.

For each model and prompt: effects of features stratified by size, in the model's own rounding and in exact arithmetic
over the same weights. The difference is the rounding error of the native effect. Reported are the share of errors below
each row's floor, the floor relative to the root mean square of the errors, and how far exact effects are from those of
a copy of the weights in fp32 and fp64. `--plot` draws native against exact effects.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from _measure import emit, machine, say
from _worlds import Shape, random_model, random_prompt
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hooks import Ablate, HookedModel

SHAPES = (
    Shape(layers=6, d_model=64, d_ff=192, heads=1, kv_heads=1, features=256, k=30, head_dim=64, vocab=512),
    Shape(layers=12, d_model=512, d_ff=1536, heads=8, kv_heads=2, features=2048, k=245, head_dim=64, vocab=32_000),
)
WIDE = ("float32", "float64")
CITIES = ("Dallas", "Miami")
DEMO_PROMPT = "fact: the capital of the state containing {} is"


def cases(dtypes: list[str], model: str | None, transcoders: str | None, prompts: list[str]) -> Iterator[Any]:
    """Name, dtype, model, prompt."""
    for dtype in dtypes:
        if model is not None:
            real = HookedModel.load(model, transcoders, dtype=dtype)
            yield from ((f"{model}: {prompt}", dtype, real, prompt) for prompt in prompts)
            continue
        demo = HookedModel.load("demo", dtype=dtype)
        yield from ((f"demo, {city}", dtype, demo, DEMO_PROMPT.format(city)) for city in CITIES)
        for shape in SHAPES:
            built = random_model(shape, dtype=getattr(torch, dtype))
            yield f"random, {shape.layers} blocks of {shape.d_model}", dtype, built, random_prompt(shape, 10)


def stratified(table: pd.DataFrame, count: int) -> list[Ablate]:
    """Features evenly spaced in the order of their effects."""
    ordered = table.loc[table["delta"].abs().sort_values(ascending=False, kind="stable").index, "name"]
    chosen = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [Ablate(name) for name in ordered.iloc[chosen]]


def measure(model: HookedModel, prompt: Any, count: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """Figures of one case, and the effects they are computed from."""
    model.precision = "exact"
    everything = model.sweep(prompt)
    groups = stratified(everything.table, count)
    question = {"target": everything.question.target, "against": everything.question.against}
    exact = model.sweep(prompt, groups, **question).table
    model.precision = "native"
    native = model.sweep(prompt, groups, **question).table
    copies = {f"exact_against_{kind}": against(model, prompt, groups, question, exact["delta"], kind) for kind in WIDE}
    table = pd.DataFrame({"layer": exact["layer"], "exact": exact["delta"], "native": native["delta"]})
    table["floor"], table["error"] = native["floor"], (native["delta"] - exact["delta"]).abs()
    by_layer = table.groupby("layer").agg(lambda column: math.sqrt((column**2).mean()))
    rms = {name: math.sqrt((table[name] ** 2).mean()) for name in ("exact", "error", "floor")}
    return {
        "groups": len(table),
        **copies,
        "rms_effect": rms["exact"],
        "rms_error": rms["error"],
        "spearman": float(spearmanr(table["exact"], table["native"]).statistic),
        "resolved": float(native["resolved"].mean()),
        "covered": float((table["error"] <= table["floor"]).mean()),
        "floor_per_error": rms["floor"] / rms["error"],
        "floor_per_error_worst_layer": float((by_layer["floor"] / by_layer["error"]).max()),
    }, table


def against(
    model: HookedModel, prompt: Any, groups: list[Ablate], question: dict[str, int], exact: pd.Series, kind: str
) -> dict[str, float]:
    """Exact effects against those of a copy of the weights in a wide precision."""
    wide = copy.deepcopy(model.host.model).to(getattr(torch, kind))  # type: ignore[arg-type]
    sets = [model.store[layer] for layer in model.store.layers]
    truth = HookedModel.from_model(wide, model.host.tokenizer, sets).sweep(prompt, groups, **question).table["delta"]
    rms = math.sqrt((truth**2).mean())
    return {
        "pearson": float(np.corrcoef(truth, exact)[0, 1]),
        "largest_error_per_rms_effect": float((truth - exact).abs().max()) / rms,
    }


def draw(found: dict[str, pd.DataFrame], path: str) -> None:
    """Native against exact effects; a bar is the floor."""
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, table) in zip(panels, found.items(), strict=False):
        linear = max(1e-6, float(table["floor"].median()))
        axes.errorbar(
            table["exact"], table["native"], yerr=table["floor"], fmt="none", ecolor="#c8c8c8", elinewidth=0.6
        )
        axes.scatter(table["exact"], table["native"], s=6, color="#0072b2", zorder=3)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.7, linestyle="--")
        decades = [10.0**power for power in range(math.ceil(math.log10(2 * linear)), 3)]
        for scale, ticks in ((axes.set_xscale, axes.set_xticks), (axes.set_yscale, axes.set_yticks)):
            limits = axes.get_xlim() if ticks == axes.set_xticks else axes.get_ylim()
            scale("symlog", linthresh=linear)
            shown = [d for d in decades if d <= max(map(abs, limits))]
            ticks([-d for d in reversed(shown)] + [0, *shown])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("exact effect, logits", fontsize=8)
        axes.set_ylabel("native effect ± floor", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--groups", type=int, default=300, help="features per case")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--model", help="another model than the built-in cases; with --transcoders and --prompts")
    parser.add_argument("--transcoders")
    parser.add_argument("--prompts", nargs="+", default=[])
    parser.add_argument("--plot", help="a picture of native against exact effects")
    args = parser.parse_args()
    found, tables = [], {}
    for name, dtype, model, prompt in cases(args.dtypes, args.model, args.transcoders, args.prompts):
        figures, table = measure(model, prompt, args.groups)
        say(f"{name}, {dtype}: {figures['covered']:.3f} covered, floor {figures['floor_per_error']:.2f} × the error")
        found.append({"case": name, "dtype": dtype, **figures})
        tables[f"{name}, {dtype}"] = table
    if args.plot:
        draw(tables, args.plot)
    emit({"machine": machine(), "cases": found}, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
