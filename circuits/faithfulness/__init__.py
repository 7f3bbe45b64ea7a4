"""Faithfulness and completeness: is a circuit enough for the metric, and is it needed?"""

from circuits.faithfulness.cases import Ablation, Case, Pair, Ranking, make_cases
from circuits.faithfulness.curves import Curve
from circuits.faithfulness.evaluate import SHARES, CutError, completeness, faithfulness
from circuits.faithfulness.rankings import rank

__all__ = [
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
    "rank",
]
