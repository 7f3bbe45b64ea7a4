"""Faithfulness and completeness: is a circuit enough for the metric, and is it needed?"""

from circuits.faithfulness.cases import Ablation, Case, Pair, Ranking, make_cases
from circuits.faithfulness.curves import Curve, plot_curves
from circuits.faithfulness.evaluate import SHARES, CutError, completeness, faithfulness, measure
from circuits.faithfulness.rankings import RANKINGS, rank

__all__ = [
    "RANKINGS",
    "SHARES",
    "Ablation",
    "Case",
    "Curve",
    "CutError",
    "Pair",
    "Ranking",
    "completeness",
    "faithfulness",
    "make_cases",
    "measure",
    "plot_curves",
    "rank",
]
