"""What a target passes through, by site: features, errors, biases.

At each write site the stream is the sum of features (those that are nodes and the rest), error and bias, so the score
of the site is the sum of theirs. If most of it belongs to errors, a graph of features cannot explain the target,
however well its scores agree with measurements.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.edges import LocalRun
from circuits.graph import BIAS, ERROR, FEATURE, REST
from hooks.passes import Recording


def site_shares(
    run: LocalRun, score: Float[np.ndarray, " node"], counterfactual: Recording | None
) -> list[dict[str, Any]]:
    """One entry per write site, in order.

    Returns:
        `layer`; `features`, `errors`, `biases`: their scores, in units of the target; `share`: of each in their sum,
        None where the sum is 0. In a pair of prompts also `difference_explained`: 1 − Σ|Δerror|² / Σ|Δx|², over all
        positions, of what the site holds in the two prompts; None where it is the same in both.
    """
    out = []
    for cut in run.cuts:
        parts = {
            "features": _sum(run, score, cut.layer, FEATURE) + _sum(run, score, cut.layer, REST),
            "errors": _sum(run, score, cut.layer, ERROR),
            "biases": _sum(run, score, cut.layer, BIAS),
        }
        whole = sum(parts.values())
        size = sum(map(abs, parts.values()))
        known = abs(whole) > 1e-9 * size
        entry: dict[str, Any] = {"layer": cut.layer, **parts}
        entry["share"] = {name: part / whole if known else None for name, part in parts.items()}
        if counterfactual is not None:
            entry["difference_explained"] = _difference_explained(run, cut.layer, counterfactual)
        out.append(entry)
    return out


def _sum(run: LocalRun, score: Float[np.ndarray, " node"], layer: int, kind: int) -> float:
    return float(score[run.index.rows(kind, layer)].sum())


def _difference_explained(run: LocalRun, layer: int, counterfactual: Recording) -> float | None:
    here, there = run.recording.layers[layer], counterfactual.layers[layer]
    moved = (here.target[0].double() - there.target[0].double()).square().sum()
    missed = (here.error[0].double() - there.error[0].double()).square().sum()
    return float(1 - missed / moved) if float(moved) > 0 else None
