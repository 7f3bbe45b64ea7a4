"""Figures of how well predictions agree with measurements.

Pure functions of two columns, compared item by item in their order. An item with a NaN or an infinity on either side is
left out and counted. A figure is None where it is not defined: a column does not vary, no item is above the noise, or
there are too few items.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

Values: TypeAlias = pd.Series | Sequence[float] | Float[np.ndarray, " item"]
FEW = 20  # items of the shorter list in top-n precision


@dataclass(frozen=True)
class Agreement:
    """How far predictions agree with measurements. None: not defined on these items.

    Attributes:
        n: items compared.
        n_left_out: items with a NaN or an infinity.
        n_above_noise: items whose measured effect is larger than the noise floor.
        pearson: linear correlation. It depends on sizes, and a few large items can dominate it.
        spearman: the correlation of ranks, ties at their mean rank. It depends on the order only.
        sign: share of the items above the noise whose predicted sign is the measured one. A prediction of 0 is wrong.
        slope: least-squares slope of measured on predicted, through the origin. Below 1, effects are smaller than
            predicted.
        top_tenth, top_20: `top_precision` of the strongest tenth, and of the strongest 20.
    """

    n: int
    n_left_out: int
    n_above_noise: int
    pearson: float | None
    spearman: float | None
    sign: float | None
    slope: float | None
    top_tenth: float | None
    top_20: float | None

    def summary(self) -> dict[str, Any]:
        """The figures by name, JSON-able."""
        return asdict(self)


def agree(predicted: Values, measured: Values, noise_floor: float = 0.0) -> Agreement:
    """Compare two columns.

    Args:
        noise_floor: largest effect measured where nothing was changed; effects up to this size have no sign.
    """
    assert noise_floor >= 0, f"a noise floor of {noise_floor}"
    x, y, left_out = _pairs(predicted, measured)
    above: Bool[np.ndarray, " item"] = np.abs(y) > noise_floor
    return Agreement(
        n=len(x),
        n_left_out=left_out,
        n_above_noise=int(above.sum()),
        pearson=_defined(correlation(x, y)),
        spearman=_defined(rank_correlation(x, y)),
        sign=float((np.sign(x) == np.sign(y))[above].mean()) if above.any() else None,
        slope=_defined(slope(x, y)),
        top_tenth=top_precision(x, y, -(-len(x) // 10)),
        top_20=top_precision(x, y, FEW),
    )


def correlation(predicted: Values, measured: Values) -> float:
    """Pearson's correlation; NaN where one side does not vary."""
    x, y, _ = _pairs(predicted, measured)
    if (
        len(x) < 2 or x.min() == x.max() or y.min() == y.max()
    ):  # else rounding of the mean would give a variance above 0
        return float("nan")
    x, y = _standing(x), _standing(y)
    return float(np.clip((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()), -1.0, 1.0))


def rank_correlation(predicted: Values, measured: Values) -> float:
    """Spearman's correlation, ties at their mean rank; NaN where one side does not vary."""
    x, y, _ = _pairs(predicted, measured)
    return correlation(pd.Series(x).rank().to_numpy(), pd.Series(y).rank().to_numpy())


def slope(predicted: Values, measured: Values) -> float:
    """Least-squares slope b of measured = b · predicted, no constant: Σ p m / Σ p². NaN if all predictions are 0."""
    x, y, _ = _pairs(predicted, measured)
    largest = np.abs(x).max(initial=0.0)
    if largest == 0:
        return float("nan")
    unit = x / largest  # so that its squares neither overflow nor underflow
    with np.errstate(over="ignore", invalid="ignore"):
        return float((unit * y).sum() / (unit * unit).sum() / largest)


def top_precision(predicted: Values, measured: Values, n: int) -> float | None:
    """Share of the n strongest predicted items that are among the n strongest measured ones; None for n items or fewer.

    Strong means a large absolute value. Items that tie for the last places get equal shares of them. So the result is
    the mean over random choices among them, and does not depend on the order of the items. Chance level is n / items.
    """
    x, y, _ = _pairs(predicted, measured)
    if not 0 < n < len(x):
        return None
    return float((_places(np.abs(x), n) * _places(np.abs(y), n)).sum() / n)


def _places(size: Float[np.ndarray, " item"], n: int) -> Float[np.ndarray, " item"]:
    """Each item's share of a place among the n largest: 1 above the smallest value among them, a fraction at it."""
    last = np.sort(size)[-n]
    above, at = size > last, size == last
    return above + at * ((n - above.sum()) / at.sum())


def _pairs(predicted: Values, measured: Values) -> tuple[np.ndarray, np.ndarray, int]:
    x, y = (np.asarray(column, dtype=np.float64) for column in (predicted, measured))
    assert x.shape == y.shape, f"{len(x)} predictions for {len(y)} measurements"
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite], int((~finite).sum())


def _standing(x: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """Deviations from the mean, scaled so that the largest is 1 and squares neither overflow nor underflow. NaN if they
    are only rounding."""
    x = x / np.abs(x).max()
    x = x - x.mean()
    with np.errstate(invalid="ignore"):
        return x / np.abs(x).max()


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None
