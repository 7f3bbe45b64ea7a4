"""How faithful small circuits of the embedded model are: `faithfulness.py [--json] [--pictures FOLDER] [--pairs N]`.

For both sets of transcoders: one site cut with the error of the clean run kept, and all sites cut under every error
mode. Exit status 1 if a bound is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuits.demo import Exam
from circuits.demo.curves import (
    COUNTS,
    FEW,
    PAIRS,
    all_sites,
    beats_baselines,
    city_pairs,
    moved,
    one_site,
    other_ablation,
    pick,
)
from circuits.faithfulness import Ablation, Case, Curve
from circuits.faithfulness.curves import LEVEL, plot_curves
from hooks import HookedModel

AT_FEW, NEEDED = COUNTS.index(FEW), f"needed_for_{LEVEL}"
SETS = ("demo", "demo-dense")
OTHERS: tuple[Ablation, ...] = ("zero", "mean")


def measure(name: str, n_pairs: int, pictures: Path | None) -> dict[str, Any]:
    """All figures of one set, and its pictures if a folder is given."""
    exam = Exam.of(HookedModel.load("demo", name))
    pairs = city_pairs(exam, n_pairs)
    figures: dict[str, Any] = {"pairs": len(pairs), "one_site": {}, "all_sites": {}}
    figures["other_ablations"] = {kind: {} for kind in OTHERS}
    panels: dict[str, Sequence[Curve]] = {}
    for layer in exam.model.store.layers:
        curves, cases = one_site(exam, pairs, layer)
        figures["one_site"][f"L{layer}"] = facts(cases, curves["counts"]) | {"rankings": _one_site(curves)}
        for kind in OTHERS:
            found, cases = other_ablation(exam, pairs, layer, kind)
            figures["other_ablations"][kind][f"L{layer}"] = facts(cases, found) | {"rankings": _counts(found)}
        panels[f"site {layer}"] = [curve for curve in curves["shares"] if curve.order == "signed"]
    by_error, cases = all_sites(exam, pairs)
    for error, found in by_error.items():
        rows = facts(cases, found) | {"rankings": _areas(found), "beats": beats_baselines(found)}
        figures["all_sites"][error] = rows
    if pictures:
        title = f"{name}, {len(pairs)} pairs of cities"
        plot_curves(
            panels, pictures / f"faithfulness_one_site_{name}.png", f"{title}: one site cut, clean error, highest first"
        )
        plot_curves(_by_error(by_error), pictures / f"faithfulness_all_sites_{name}.png", f"{title}: all sites cut")
    return figures


def facts(cases: Sequence[Case], curves: Sequence[Curve]) -> dict[str, Any]:
    """Figures that are the same for every ranking: the number of features, and the effect of all of them."""
    return {
        "moved": sum(map(moved, cases)) / len(cases),
        "features": sum(case.size for case in cases) / len(cases),
        "worth": float(curves[0].denominator.mean()),
        "metric": sum(case.metric for case in cases) / len(cases),
    }


def _counts(curves: Sequence[Curve]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for curve in curves:
        values = {"f": dict(zip(map(str, COUNTS), curve.values, strict=True)), NEEDED: curve.needed()}
        out.setdefault(curve.ranking, {})[curve.order] = values
    return out


def _one_site(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    out, areas = _counts(curves["counts"]), _areas(curves["shares"])
    for counts in curves["counts"]:
        without, each = pick(curves["without"], counts.ranking, counts.order), counts.each[:, AT_FEW]
        out[counts.ranking][counts.order] = areas[counts.ranking][counts.order] | {
            **out[counts.ranking][counts.order],
            "f_without": dict(zip(map(str, COUNTS), without.values, strict=True)),
            f"share_of_pairs_with_{LEVEL}_at_{FEW}": float((each >= LEVEL).double().mean()),
            f"worst_pair_at_{FEW}": float(each.min()),
        }
    return out


def _areas(curves: Sequence[Curve]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for curve in curves:
        areas = {name: getattr(curve, name) for name in ("cpr", "cmd", "log_cpr", "log_cmd")}
        needed = {NEEDED: curve.needed(), "f_by_share": list(curve.values)}
        out.setdefault(curve.ranking, {})[curve.order] = areas | needed
    return out


def _by_error(curves: Mapping[Any, Sequence[Curve]]) -> dict[str, Sequence[Curve]]:
    """Three error modes across, one row per order; dropping the error altogether is in the table only."""
    words = {"signed": "highest first", "absolute": "largest first"}
    return {
        f"error {error}, {words[order]}": [curve for curve in curves[error] if curve.order == order]
        for order in words
        for error in ("clean", "live", "patched")
    }


def bounds(figures: Mapping[str, Any]) -> dict[str, bool]:
    """Each promise, kept or not."""
    out = {}
    for site, found in figures["demo"]["one_site"].items():
        out[f"demo {site}: f >= {LEVEL} with {FEW}"] = found["rankings"]["ig"]["signed"]["f"][str(FEW)] >= LEVEL
    for name in SETS:
        for error, found in figures[name]["all_sites"].items():
            out[f"{name}, all sites, error {error}: above the baselines"] = all(found["beats"].values())
    return out


def show(figures: Mapping[str, Any]) -> None:
    """The tables of docs/faithfulness.md."""
    for name in SETS:
        _show_sites(f"{name}, one site, counterfactual", figures[name]["one_site"])
        for kind in OTHERS:
            _show_sites(f"{name}, one site, {kind}", figures[name]["other_ablations"][kind])
        print(f"\n{name}, all sites: CPR (log), CMD (log), features for {LEVEL}, f of all features")
        for error, found in figures[name]["all_sites"].items():
            print(f"  error {error}: m(M) - m(0) = {found['worth']:.1f}, {found['features']:.0f} features")
            for ranking, by_order in found["rankings"].items():
                signed, absolute = by_order["signed"], by_order["absolute"]
                areas = (signed["cpr"], signed["log_cpr"], absolute["cmd"], absolute["log_cmd"])
                cells = "{:.3f} ({:.3f})   {:.3f} ({:.3f})".format(*areas)
                needed = f"{signed[NEEDED]} {absolute[NEEDED]}"
                print(f"    {ranking:18s} {cells}   {needed}   {signed['f_by_share'][-1]:.3f}")
    for promise, kept in figures["bounds"].items():
        print("kept  " if kept else "MISSED", promise)


def _show_sites(title: str, sites: Mapping[str, Any]) -> None:
    print(f"\n{title}: f with {FEW} features, signed (absolute); features for {LEVEL}")
    for fact in ("worth", "features", "moved"):
        print(f"  {fact:18s}", "  ".join(f"{found[fact]:20.1f}" for found in sites.values()))
    for ranking in next(iter(sites.values()))["rankings"]:
        cells = []
        for found in sites.values():
            orders = found["rankings"][ranking]
            signed, absolute = (orders[order]["f"][str(FEW)] for order in ("signed", "absolute"))
            cells.append(f"{signed:6.3f} ({absolute:6.3f}) {orders['signed'][NEEDED] or '-':>5}")
        print(f"  {ranking:18s}", "  ".join(cells))


def main() -> int:
    """Measure and print; exit status 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pictures", type=Path, help="folder for the curves as PNG files")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    figures: dict[str, Any] = {name: measure(name, args.pairs, args.pictures) for name in SETS}
    figures["bounds"] = bounds(figures)
    figures["seconds"] = time.perf_counter() - started
    if args.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0 if all(figures["bounds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
