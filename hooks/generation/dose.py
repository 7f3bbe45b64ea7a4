"""A sweep over strengths: what is said at each, what it does to a target's logit, and what it costs in fluency."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import pandas as pd
import torch

from hooks.errors import InterventionError, TargetError, UserError
from hooks.generation.comparison import (
    ROWS_PER_PASS,
    Scored,
    Steerable,
    edits_of,
    log_probabilities,
    numbers,
    prepare,
    scored,
)
from hooks.generation.decoding import Generated
from hooks.generation.engines import continued
from hooks.generation.options import GenerateOptions
from hooks.generation.strength import UNITS, Resolved, Steer, Strength
from hooks.host import Exclusive, Prompt, computing
from hooks.passes import Interventions, listed
from hooks.readout import Effect, effect
from hooks.renamed import Table


@dataclass(frozen=True)
class Dose:
    """One strength of a sweep.

    Attributes:
        strength: as it stands in the grid.
        interventions: with numbers.
        values: what the strength came to, as an activation, at each address that took it.
        effect: on the target, for the first new token.
        scored: the continuation.
    """

    strength: Strength
    interventions: tuple[Resolved, ...]
    values: Mapping[str, float]
    effect: Effect
    scored: Scored


@dataclass(frozen=True)
class DoseResponse:
    """A sweep over strengths.

    Attributes:
        target, against: the metric is logit(target) − logit(against), for the first new token.
        baseline: the plain continuation; both of its readings are the plain model's.
        metric: of the plain model.
    """

    prompt: tuple[str, ...]
    target: str
    against: str
    baseline: Scored
    metric: float
    doses: tuple[Dose, ...]

    @property
    def unit(self) -> str:
        """What the strengths count."""
        return UNITS[self.doses[0].strength.kind]

    def frame(self) -> pd.DataFrame:
        """One row per dose: strength, the number it came to at each address that took it, effect, fluency, text."""
        return Table([_row(dose) for dose in self.doses])


def _row(dose: Dose) -> dict[str, object]:
    return {
        "strength": str(dose.strength),
        "amount": dose.strength.amount,
        **dose.values,
        "logit": dose.effect.edited.logit,
        "prob": dose.effect.edited.prob,
        "rank": dose.effect.edited.rank,
        "metric": dose.effect.metric_after,
        "delta": dose.effect.delta,
        "delta_logit": dose.effect.delta_logit,
        "mean_plain": dose.scored.mean_plain,
        "perplexity": dose.scored.perplexity,
        "text": dose.scored.text,
    }


def dose_response(
    model: Steerable,
    prompt: Prompt,
    interventions: Interventions,
    strengths: str | Sequence[float | str | Strength],
    *,
    target: str | SupportsIndex | None = None,
    against: str | SupportsIndex | None = None,
    options: GenerateOptions = GenerateOptions(),  # noqa: B008 (frozen)
    texts: Sequence[Prompt] = (),
) -> DoseResponse:
    """The same experiment at every strength of a grid.

    Args:
        interventions: each `Steer` without a strength takes the grid's; everything else stays as it is.
        strengths: see `grid`.
        target, against: tokens of the metric; by default the plain model's answer against its second best.

    Raises:
        InterventionError: nothing takes the strengths.
        UserError: as `compare_steering`, `grid` and `Run.effect`.
    """
    doses, interventions = grid(strengths), listed(interventions)
    takes = [isinstance(item, Steer) and item.strength is None for item in interventions]
    if not any(takes):
        raise InterventionError(
            "nothing takes the strengths of the grid",
            expected="at least one ADDRESS without =VALUE",
            repair="leave the value away where the grid is to be put in",
        )
    token, other = (None if word is None else model.host.token_id(word) for word in (target, against))
    if token is not None and token == other:
        raise TargetError("target and against are the same token", found=repr(model.host.string(token)))
    plans = [[item.given(dose) if isinstance(item, Steer) else item for item in interventions] for dose in doses]
    resolved = prepare(model, prompt, plans, options, texts)
    steered = _generate_rows(model, model.host.tokenize(prompt), [numbers(items) for items in resolved], options)
    (baseline,) = continued(model, [prompt], (), options.plain)
    answer = _answer(baseline, token, other)
    effects = _effects(model, baseline.prompt, [numbers(items) for items in resolved], answer, other, options)
    said = [baseline, *steered]
    plain = log_probabilities(model, baseline.prompt, [one.ids for one in said], None, options)
    read = [scored(model.host, one.text, one.ids, row, one.logprobs) for one, row in zip(said, plain, strict=True)]
    values = [_values(items, takes) for items in resolved]
    return DoseResponse(
        prompt=model.host.strings(baseline.prompt),
        target=model.host.string(effects[0].target),
        against=model.host.string(effects[0].against),
        baseline=read[0],
        metric=effects[0].metric_before,
        doses=tuple(Dose(*row) for row in zip(doses, resolved, values, effects, read[1:], strict=True)),
    )


def _effects(
    model: Steerable,
    prompt: Sequence[int],
    plans: Sequence[Sequence[object]],
    answer: int,
    other: int | None,
    options: GenerateOptions,
) -> list[Effect]:
    """On the first new token, measured as every difference is: in the precision that the model says."""
    host, out = model.host, list[Effect]()
    with Exclusive(host.layers), computing(host, model.precision):
        alone = host.batch([list(prompt)])
        before = host.forward_at(alone, alone.last)[0]
        for start in range(0, len(plans), ROWS_PER_PASS):
            some = plans[start : start + ROWS_PER_PASS]
            batch = host.batch([list(prompt)] * len(some))
            edits = edits_of(model, batch, some, options)
            out += [
                effect(before, row, answer, other, string=host.string)
                for row in host.forward_at(batch, batch.last, edits)
            ]
    return out


def _generate_rows(
    model: Steerable, prompt: list[int], plans: Sequence[Sequence[object]], options: GenerateOptions
) -> list[Generated]:
    out: list[Generated] = []
    rows = 1 if options.engine == "static" else ROWS_PER_PASS
    for start in range(0, len(plans), rows):
        some = plans[start : start + rows]
        out += continued(model, [prompt] * len(some), some, options)
    return out


def grid(values: str | Sequence[float | str | Strength]) -> tuple[Strength, ...]:
    """A grid of strengths of one kind: numbers or text, or as text `0,2,4`, or `0:8:5` for five evenly spaced ones.

    Raises:
        UserError: there are none, or they count different things.
        InterventionError: one cannot be read.
    """
    parts = _split(values) if isinstance(values, str) else [Strength.of(value) for value in values]
    if not parts:
        raise UserError("the grid of strengths is empty", expected="strengths such as 0,2,4, x0,x1,x2 or 0r:0.4r:5")
    kinds = list(dict.fromkeys(part.kind for part in parts))
    if len(kinds) > 1:
        raise UserError(
            f"the grid mixes {' and '.join(UNITS[kind] for kind in kinds)}", expected="strengths of one kind"
        )
    return tuple(parts)


def _split(text: str) -> list[Strength]:
    if ":" not in text:
        return [Strength.parse(part.strip(), where=text) for part in text.split(",")] if text.strip() else []
    parts = text.split(":")
    if len(parts) != 3 or not re.fullmatch(r"\d{1,4}", parts[2]) or int(parts[2]) < 2:
        raise UserError(f"cannot read the grid {text!r}", expected="FROM:TO:COUNT with COUNT from 2 up, as 0:8:5")
    first, last = (Strength.parse(part, where=text) for part in parts[:2])
    if first.kind != last.kind:
        return [first, last]  # refused for mixing kinds
    steps = torch.linspace(first.amount, last.amount, int(parts[2]), dtype=torch.float64).tolist()
    return [Strength(step, first.kind) for step in steps]


def _values(items: Sequence[Resolved], takes: Sequence[bool]) -> dict[str, float]:
    """What the dose came to, by address."""
    return {
        str(item.intervention.address): item.value
        for item, took in zip(items, takes, strict=True)
        if took and item.value is not None
    }


def _answer(baseline: Generated, token: int | None, other: int | None) -> int:
    """The target: the plain answer unless named."""
    answer = int(baseline.logits[0].argmax()) if token is None else token
    if answer == other:
        raise TargetError("target and against are the same token")
    return answer
