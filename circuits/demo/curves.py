"""Faithfulness on the embedded model: which features of a city's prompt decide its capital, against another city's.

Pairs: the test wording with two held-out cities of different states and the same number of tokens; a seeded sample of
all such pairs. An ablated feature takes the other city's value. Each pair has its own ranking; the line
`ig of other pairs` shows the result with a ranking from other pairs. First one site is cut, with the error of the
clean run; then all sites, under every error mode.
"""

import random
from collections.abc import Mapping, Sequence

import torch

from circuits.demo.questions import Exam
from circuits.faithfulness import (
    SHARES,
    Ablation,
    Case,
    Curve,
    CutError,
    Pair,
    Ranking,
    completeness,
    faithfulness,
    make_cases,
    rank,
)

PAIRS = 100
FEW = 16  # features that should be enough at one site
COUNTS = (1, 2, 4, 6, 8, 12, FEW, 24, 32, 64)
ERRORS: tuple[CutError, ...] = ("clean", "live", "patched", "zero")
OURS, BASELINES = ("ig", "grad x difference", "grad x act"), ("difference", "activation", "random")
FROM_OTHERS = "ig of other pairs"


def city_pairs(exam: Exam, n: int = PAIRS, *, seed: int = 0) -> tuple[Pair, ...]:
    """A seeded sample of the ordered pairs of held-out cities whose prompts have as many tokens."""
    prompts = exam.test_questions().prompts
    lengths = [len(exam.model.host.tokenize(prompt)) for prompt in prompts]
    states = range(len(prompts))
    fit = [Pair(prompts[i], prompts[j]) for i in states for j in states if i != j and lengths[i] == lengths[j]]
    return tuple(random.Random(seed).sample(fit, n))


def ranked(exam: Exam, cases: Sequence[Case]) -> dict[str, tuple[Ranking, ...]]:
    """The rankings, the baselines, and the mean of `ig` over the pairs that share neither city."""
    rankings = rank(exam.model, cases)
    return rankings | {FROM_OTHERS: tuple(_from_others(number, cases, rankings["ig"]) for number in range(len(cases)))}


def _from_others(number: int, cases: Sequence[Case], rankings: Sequence[Ranking]) -> Ranking:
    """Mean over the pairs with the same number of tokens and no prompt in common; zeros if there is none."""
    own, lengths = _prompts(cases[number]), cases[number].clean.batch.lengths
    others = [
        ranking
        for ranking, case in zip(rankings, cases, strict=True)
        if case.clean.batch.lengths == lengths and not own & _prompts(case)
    ]
    return {
        layer: torch.stack([other[layer] for other in others]).mean(0) if others else torch.zeros_like(scores)
        for layer, scores in rankings[number].items()
    }


def _prompts(case: Case) -> set[tuple[int, ...]]:
    recordings = [case.clean, case.counterfactual]
    return {tuple(recording.batch.ids[0].tolist()) for recording in recordings if recording is not None}


def one_site(exam: Exam, pairs: Sequence[Pair], layer: int) -> tuple[dict[str, tuple[Curve, ...]], tuple[Case, ...]]:
    """One cut, clean error: faithfulness over `COUNTS` and over MIB's shares, completeness over `COUNTS`."""
    cases = make_cases(exam.model, pairs, sites=layer)
    rankings = ranked(exam, cases)
    curves = {
        "counts": faithfulness(exam.model, cases, rankings, sizes=COUNTS),
        "shares": faithfulness(exam.model, cases, rankings, sizes=SHARES),
        "without": completeness(exam.model, cases, rankings, sizes=COUNTS),
    }
    return curves, cases


def other_ablation(
    exam: Exam, pairs: Sequence[Pair], layer: int, ablation: Ablation
) -> tuple[tuple[Curve, ...], tuple[Case, ...]]:
    """The same cut with features zeroed, or set to their means over the selection questions; `COUNTS` features kept."""
    prompts = exam.selection_questions().prompts
    cases = make_cases(exam.model, pairs, sites=layer, ablation=ablation, prompts=prompts)
    return faithfulness(exam.model, cases, rank(exam.model, cases), sizes=COUNTS), cases


def all_sites(exam: Exam, pairs: Sequence[Pair]) -> tuple[dict[CutError, tuple[Curve, ...]], tuple[Case, ...]]:
    """Every cut at once, over MIB's shares, under every error mode."""
    cases = make_cases(exam.model, pairs)
    rankings = ranked(exam, cases)
    return {error: faithfulness(exam.model, cases, rankings, error=error) for error in ERRORS}, cases


def moved(case: Case) -> int:
    """How many features ablation changes at all. At one site no circuit needs more of them."""
    return sum(int((case.acts(layer) != ablated).sum()) for layer, ablated in case.ablated.items())


def pick(curves: Sequence[Curve], ranking: str, order: str) -> Curve:
    """One curve by name."""
    (found,) = (curve for curve in curves if (curve.ranking, curve.order) == (ranking, order))
    return found


def beats_baselines(curves: Sequence[Curve]) -> Mapping[str, bool]:
    """Whether the best of our rankings is better than each baseline on the logarithmic axis, in CPR and in CMD."""
    out = {}
    for baseline in BASELINES:
        cpr, cmd = pick(curves, baseline, "signed").log_cpr, pick(curves, baseline, "absolute").log_cmd
        out[f"CPR above {baseline}"] = max(pick(curves, name, "signed").log_cpr for name in OURS) > cpr
        out[f"CMD below {baseline}"] = min(pick(curves, name, "absolute").log_cmd for name in OURS) < cmd
    return out
