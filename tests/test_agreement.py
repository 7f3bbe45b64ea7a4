"""Figures of agreement by hand, by their laws, and where they have no value; the picture of them."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from circuits.agreement import Agreement, agree, correlation, rank_correlation, slope, top_precision
from circuits.drawing.colours import AS_PREDICTED, OTHER_SIGN, QUIET
from circuits.drawing.scatter import Panel, _draw, scatter_plot
from hooks.errors import OutputError

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False, width=32)
GRID = st.integers(-300, 300).map(lambda number: number / 64)  # with ties, and no two values closer than rounding


@st.composite
def columns(draw, elements=NUMBERS, least: int = 1, most: int = 40):
    n = draw(st.integers(least, most))
    return tuple(draw(arrays(np.float64, n, elements=elements)) for _ in range(2))


def same(found: Agreement, expected: Agreement) -> bool:
    """Equal figures, up to the rounding of sums in another order."""
    both = [(a, b) for a, b in zip(found.summary().values(), expected.summary().values(), strict=True)]
    return all((a is b is None) or a == pytest.approx(b, rel=1e-9, abs=1e-6) for a, b in both)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_pearson_by_hand():
    """Deviations (−1, 0, 1) and (−2, −1, 3): 5 / sqrt(2 · 14)."""
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]) == pytest.approx(5 / math.sqrt(28))


def test_spearman_by_hand_with_ties_at_their_mean_rank():
    """Ranks (1, 2.5, 2.5, 4) and (1, 3, 2, 4): deviations multiply to 4.5, squares to 4.5 and 5."""
    assert rank_correlation([0.0, 7.0, 7.0, 9.0], [-5.0, 1.0, 0.0, 2.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 100.0]) == pytest.approx(1.0)


def test_the_slope_is_through_the_origin():
    """Σ p m / Σ p² = (2 + 8) / (1 + 4); with a constant it would be 2 − ... = 2 · 4 − 2 over 1: another number."""
    assert slope([1.0, 2.0], [2.0, 4.0]) == pytest.approx(2.0)
    assert slope([1.0, 2.0], [2.0, 1.0]) == pytest.approx((1 * 2 + 2 * 1) / 5)
    assert slope([1.0, 2.0], [11.0, 12.0]) == pytest.approx(35 / 5)


def test_signs_count_above_the_noise_only():
    predicted, measured = [1.0, -1.0, 1.0, 0.0, -3.0], [0.5, -0.5, -0.5, 0.5, 0.1]
    assert agree(predicted, measured).sign == pytest.approx(2 / 5)  # a prediction of 0 has no sign and is a miss
    quiet = agree(predicted, measured, noise_floor=0.1)  # an effect of the noise's own size is noise
    assert (quiet.sign, quiet.n_above_noise) == (pytest.approx(2 / 4), 4)
    assert agree(predicted, measured, noise_floor=1.0).sign is None


def test_top_precision_by_hand():
    predicted, measured = [9.0, -8.0, 7.0, 1.0, 0.5], [-1.0, 6.0, 0.0, 5.0, -4.0]
    assert top_precision(predicted, measured, 1) == 0.0  # item 0 against item 1
    assert top_precision(predicted, measured, 2) == 0.5  # {0, 1} against {1, 3}: strength has no sign
    assert top_precision(predicted, measured, 3) == pytest.approx(1 / 3)  # {0, 1, 2} against {1, 3, 4}
    assert top_precision(predicted, measured, 5) is None
    assert top_precision(predicted, measured, 0) is None


def test_ties_share_the_last_places():
    """Three items tie for one place: each gets a third of it, and one of them is really first."""
    assert top_precision([5.0, 5.0, 5.0, 0.0], [9.0, 1.0, 2.0, 3.0], 1) == pytest.approx(1 / 3)
    assert top_precision([0.0] * 10, list(map(float, range(10))), 3) == pytest.approx(0.3)  # nothing predicted: chance


def test_the_strongest_tenth_is_rounded_up():
    predicted = np.arange(21.0)
    measured = np.where(predicted == 18, 100.0, predicted)  # the three strongest: 18, 20, 19
    assert agree(predicted, measured).top_tenth == 1.0
    measured = np.where(predicted == 3, 100.0, predicted)
    assert agree(predicted, measured).top_tenth == pytest.approx(2 / 3)
    assert agree(predicted, measured).top_20 == 1.0  # the one left out is 0 on both sides
    assert agree(predicted[:20], measured[:20]).top_20 is None


def test_perfect_and_inverted_predictions():
    x = np.linspace(-2, 3, 50)
    good, bad = agree(x, 0.5 * x), agree(x, -2 * x)
    assert [good.n, good.pearson, good.spearman, good.sign, good.slope] == pytest.approx([50, 1, 1, 1, 0.5])
    assert [bad.pearson, bad.spearman, bad.sign, bad.slope] == pytest.approx([-1, -1, 0, -2])
    assert (good.top_tenth, good.top_20, bad.top_tenth) == (1.0, 1.0, 1.0)


# -- where there is no answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[], [3.0], [0.1, 0.1, 0.1]], ids=["empty", "one", "equal"])
def test_figures_that_are_not_defined_are_none_and_never_nan(values):
    """The mean of three 0.1 is not 0.1, so a variance is computed where there is none."""
    found = agree(values, [0.0] * len(values))
    assert (found.pearson, found.spearman, found.sign, found.top_20) == (None,) * 4
    assert found.n == len(values)
    assert found.slope == (0.0 if values else None)
    assert math.isnan(correlation(values, values))
    assert agree([0.0, 0.0], [1.0, 2.0]).slope is None


def test_what_is_not_a_number_is_left_out_and_counted():
    nan, inf = math.nan, math.inf
    found = agree([1.0, nan, 2.0, 3.0, inf], [2.0, 1.0, nan, 6.0, 1.0])
    assert (found.n, found.n_left_out, found.slope) == (2, 3, pytest.approx(2.0))
    assert correlation([1.0, nan, 2.0, 3.0], [2.0, 7.0, 4.0, 6.0]) == pytest.approx(1.0)
    empty = agree([nan] * 3, [1.0] * 3)
    assert empty == Agreement(0, 3, 0, None, None, None, None, None, None)


def test_very_large_and_very_small_numbers_have_figures_too():
    x = np.array([1.0, 2.0, -3.0])
    for size in (1e-300, 1e300):
        found = agree(x * size, 2 * x * size)
        assert [found.pearson, found.spearman, found.slope] == pytest.approx([1, 1, 2])


def test_the_summary_is_json():
    summary = agree([1.0, math.nan], [1.0, 2.0]).summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["n_left_out"] == 1
    assert summary["pearson"] is None


def test_tables_are_compared_row_by_row():
    table = pd.DataFrame({"score": [1.0, 2.0, 4.0], "effect": [1.0, 2.0, 5.0]}, index=[7, 3, 9])
    assert agree(table["score"], table["effect"]) == agree([1.0, 2.0, 4.0], [1.0, 2.0, 5.0])
    with pytest.raises(AssertionError, match="3 predictions for 2"):
        agree([1.0, 2.0, 3.0], [1.0, 2.0])


# -- laws ------------------------------------------------------------------------------------------------------------


@given(columns(least=3))
def test_correlations_are_those_of_numpy_and_pandas(pair):
    x, y = pair
    assume(np.ptp(x) > 1e-3 * np.abs(x).max() and np.ptp(y) > 1e-3 * np.abs(y).max())
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    ranks = [pd.Series(column).rank(method="average") for column in pair]
    assert rank_correlation(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@given(columns(GRID))
def test_spearman_does_not_change_under_monotone_maps(pair):
    x, y = pair
    assert agree(np.cbrt(x), np.exp(y) + np.sign(y)).spearman == agree(x, y).spearman  # order and ties are kept


@given(columns(), st.floats(0, 1e6))
def test_every_figure_is_in_its_range(pair, noise):
    found = agree(*pair, noise)
    for value in (found.sign, found.top_tenth, found.top_20):
        assert value is None or 0 <= value <= 1 + 1e-12
    for value in (found.pearson, found.spearman):
        assert value is None or -1 <= value <= 1
    assert found.n_above_noise <= found.n == len(pair[0])
    assert (found.sign is None) == (found.n_above_noise == 0)


@given(columns(), st.sampled_from([0.25, 3.0, -2.0]))
def test_a_scaled_measurement_scales_the_slope_and_nothing_else(pair, factor):
    x, y = pair
    plain, scaled = agree(x, y), agree(x, factor * y)
    turn = math.copysign(1, factor)
    if plain.slope is not None:
        assert scaled.slope == pytest.approx(factor * plain.slope)
        assert slope(factor * x, y) == pytest.approx(plain.slope / factor)
    for name in ("pearson", "spearman"):
        before, after = getattr(plain, name), getattr(scaled, name)
        assert before == after is None or after == pytest.approx(turn * before, abs=1e-6)
    assert (scaled.top_tenth, scaled.top_20) == pytest.approx((plain.top_tenth, plain.top_20))


@given(columns(), st.randoms(use_true_random=False))
def test_the_order_of_the_items_has_no_meaning(pair, random):
    order = list(range(len(pair[0])))
    random.shuffle(order)
    assert same(agree(*(column[order] for column in pair)), agree(*pair))


@given(st.lists(st.integers(-2, 2).map(float), min_size=5, max_size=5), st.permutations([1.0, -2.0, 3.0, 4.0, -5.0]))
def test_tied_items_get_what_drawing_among_them_gives_on_average(x, y):
    """The average over every order in which ties could be broken."""
    for n in (1, 2, 4):
        strongest = set(sorted(range(5), key=lambda i: -abs(y[i]))[:n])
        orders = list(itertools.permutations(range(5)))
        drawn = [sorted(range(5), key=lambda i: (-abs(x[i]), order[i]))[:n] for order in orders]
        shares = [len(strongest & set(first)) / n for first in drawn]
        assert top_precision(x, y, n) == pytest.approx(np.mean(shares))


# -- the picture -----------------------------------------------------------------------------------------------------


def panels() -> list[Panel]:
    rng = np.random.default_rng(0)
    size = rng.normal(size=50) * 10.0 ** rng.uniform(-3, 1, 50)
    return [
        Panel("features: ablation", size, size * rng.uniform(0.5, 1.5, 50), noise_floor=1e-3),
        Panel("features: ×2", size, -size),
        Panel("edges", pd.Series(size), list(size**3), unit="pre-activation"),
        Panel("a fourth", size, size),
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_panels_give_the_same_bytes(tmp_path: Path, suffix: str):
    first, second = tmp_path / f"a.{suffix}", tmp_path / "new" / f"b.{suffix}"
    for path in (first, second):
        scatter_plot(panels(), path)
    assert first.read_bytes() == second.read_bytes()
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert first.read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [first.name]


def test_the_picture_says_the_figures_of_every_panel(tmp_path: Path):
    scatter_plot(panels(), tmp_path / "a.svg")
    text = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text(encoding="utf-8")))
    for panel in panels():
        found = panel.agreement
        assert panel.name in text
        assert f"50 items   Pearson {found.pearson:.2f}".replace("-", "−") in text
        assert f"slope {found.slope:.2f}   signs {100 * found.sign:.0f} %".replace("-", "−") in text
    assert "measured (pre-activation)" in text


def test_each_item_is_drawn_once_at_its_place_in_its_colour():
    nan = math.nan
    predicted, measured = [1.0, -1.0, 0.3, nan, 0.2], [2.0, 1.0, 0.05, 1.0, -0.1]
    axes = Figure().add_subplot()
    _draw(axes, Panel("p", predicted, measured, noise_floor=0.1))
    drawn = {
        to_hex(points.get_facecolor()[0]): [tuple(at) for at in points.get_offsets().tolist()]
        for points in axes.collections
    }
    assert drawn == {AS_PREDICTED: [(1.0, 2.0)], OTHER_SIGN: [(-1.0, 1.0)], QUIET: [(0.3, 0.05), (0.2, -0.1)]}
    assert axes.get_xlim() == axes.get_ylim() == (-3.2, 3.2)
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((-0.1, 0.1))


@pytest.mark.parametrize("largest", [1e-30, 1.0, 1e30])
def test_wide_ranges_get_decades_and_narrow_ones_do_not(largest: float):
    wide, narrow = (Figure().add_subplot() for _ in range(2))
    _draw(wide, Panel("p", [largest, -largest / 1000], [largest / 1000, largest]))
    _draw(narrow, Panel("p", [largest, -largest / 2], [largest / 3, largest]))
    assert (wide.get_xscale(), wide.get_yscale(), narrow.get_xscale()) == ("symlog", "symlog", "linear")
    assert wide.get_xlim() == wide.get_ylim()
    assert wide.get_xlim()[1] > largest


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [math.nan, math.inf]])
def test_panels_without_anything_to_see_are_drawn(tmp_path: Path, values: list[float]):
    scatter_plot(
        [Panel("nothing", values, values), Panel("noise", values, values, noise_floor=1.0)], tmp_path / "a.png"
    )
    scatter_plot([], tmp_path / "none.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "none.png").stat().st_size


def test_other_formats_are_refused_and_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OutputError, match=r"unknown picture format '\.pdf'"):
        scatter_plot(panels(), tmp_path / "a.pdf")
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scatter_plot(panels(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
