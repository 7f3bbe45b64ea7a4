"""Every figure the embedded default promises, for one or more builds: `demo_quality.py [FOLDER …] [--json]`.

A folder is what `python -m hooks.demo.build --out FOLDER` writes; without one, the shipped weights are measured.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from circuits.demo import Exam
from circuits.demo.discovery import agreement, discovery_ranks
from circuits.demo.feature_swap import ablate_states, best_site, every_site, select, swap_states
from circuits.demo.quality import mean_swap_scan, reconstruction_quality, two_hop_accuracy
from hooks import HookedModel
from hooks.demo import WEIGHTS


def measure(folder: Path) -> dict[str, Any]:
    """All figures of one build."""
    figures: dict[str, Any] = {"folder": str(folder)}
    for name in ("demo", "demo-dense"):
        exam = Exam.of(HookedModel.load(folder, folder / "transcoders" / name), folder)
        if name == "demo":
            scan = mean_swap_scan(exam)
            best = max((site for site in scan if site[0] > 0), key=lambda site: scan[site])
            figures |= {"seed": exam.seed, "two_hop": asdict(two_hop_accuracy(exam))}
            figures["mean_swap"] = {
                "best_site": f"layer {best[0]}, {best[1]}",
                "best": scan[best],
                "site_0": max(share for (layer, _), share in scan.items() if layer == 0),
                "scan": {f"L{layer} {place}": share for (layer, place), share in scan.items()},
            }
        figures[name] = _measure_set(exam, best)
    return figures


def _measure_set(exam: Exam, scan_site: tuple[int, str]) -> dict[str, Any]:
    selections = select(exam)
    chosen = best_site(selections)
    layers = exam.model.store.layers
    return {
        "fvu": [site.fvu for site in reconstruction_quality(exam)],
        "fvu_of_copying_alone": [site.fvu for site in reconstruction_quality(exam, kind="induction")],
        "accuracy_all_but_first": asdict(two_hop_accuracy(exam, swap=layers[1:], error="zero")),
        "accuracy_all": asdict(two_hop_accuracy(exam, swap=layers, error="zero")),
        "site": f"layer {chosen.layer}, {chosen.place}",
        "swap": asdict(swap_states(exam, [chosen])),
        "ablation": asdict(ablate_states(exam, [chosen])),
        "ablation_of_another_state": asdict(ablate_states(exam, [chosen], shift=7)),
        "swap_two_at_each_site": asdict(swap_states(exam, every_site(selections), 2)),
        "ablation_two_at_each_site": asdict(ablate_states(exam, every_site(selections), 2)),
        "ablation_two_at_each_site_of_another_state": asdict(ablate_states(exam, every_site(selections), 2, shift=7)),
        "discovery": asdict(discovery_ranks(exam, selections, scan_site)),
        "agreement": asdict(agreement(exam)),
    }


def bounds(figures: dict[str, Any]) -> dict[str, bool]:
    """Each promise, kept or not."""
    demo, dense = figures["demo"], figures["demo-dense"]
    swaps = (demo["swap"], demo["swap_two_at_each_site"])
    cities = {"trained": 350, "held_out": 50}
    swapped = sum(demo["accuracy_all_but_first"][name] * n for name, n in cities.items()) / sum(cities.values())
    return {
        "two hops, trained cities >= 0.99": figures["two_hop"]["trained"] >= 0.99,
        "two hops, held-out cities >= 0.95": figures["two_hop"]["held_out"] >= 0.95,
        "mean swap somewhere >= 0.9": figures["mean_swap"]["best"] >= 0.9,
        "mean swap at site 0 <= 0.15": figures["mean_swap"]["site_0"] <= 0.15,
        "feature swap >= 0.9, 4 at one site or 2 at each": max(swap["success"] for swap in swaps) >= 0.9,
        "controls <= 0.02, both ways": max(max(swap["third_state"], swap["random"]) for swap in swaps) <= 0.02,
        "ablation lowers the answer by >= 5 more": demo["ablation"]["others"] - demo["ablation"]["answer"] >= 5,
        "FVU <= 0.06 everywhere": max(demo["fvu"]) <= 0.06,
        "all sites but the first swapped >= 0.85": swapped >= 0.85,
        "discovery: median rank in the top 5 %": demo["discovery"]["by_score"] <= 0.05,
        "Spearman of scores, demo >= 0.88": demo["agreement"]["metric"] >= 0.88,
        "Spearman of scores, demo-dense >= 0.90": dense["agreement"]["metric"] >= 0.90,
    }


def main() -> int:
    """Measure and print; exit status 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[WEIGHTS])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for folder in args.folders:
        started = time.perf_counter()
        figures = measure(folder)
        figures |= {"bounds": bounds(figures), "seconds": time.perf_counter() - started}
        results.append(figures)
        if not args.json:
            print(json.dumps(figures, indent=1))
    if args.json:
        print(json.dumps({"builds": results}))
    return 0 if all(all(figures["bounds"].values()) for figures in results) else 1


if __name__ == "__main__":
    sys.exit(main())
