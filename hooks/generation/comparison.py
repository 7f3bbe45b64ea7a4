"""Steering as an experiment: what is said with and without it, and what it costs in fluency.

Two continuations of one prompt, plain and steered. Each is then read once more by both models, plain and steered, in
one pass without a cache (teacher forcing), which gives log p(token | everything before it) for every token. The steered
text under the plain model says how strange steering made it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.generation.engines import continued, open_session, streamed
from hooks.generation.options import GenerateOptions
from hooks.generation.strength import Resolved, preliminary, resolve
from hooks.host import Batch, Host, Precision, Prompt, measured
from hooks.passes import HostAndStore, Interventions, listed
from hooks.types import Edit

ROWS_PER_PASS = 16


@runtime_checkable
class Steerable(HostAndStore, Protocol):
    """A language model and its transcoders, and in which arithmetic differences are measured."""

    precision: Precision


@dataclass(frozen=True)
class Scored:
    """One continuation, read by both models.

    Attributes:
        text, ids: as generated; `ids` include what was cut from the text behind a stop string, and the end token.
        tokens: every id as text.
        plain, steered: log-probability of each token in nats, at temperature 1, under the plain and the steered model.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    plain: Float[Tensor, " new"]
    steered: Float[Tensor, " new"]

    @property
    def mean_plain(self) -> float:
        """Mean log-probability per token under the plain model, in nats."""
        return float(self.plain.mean())

    @property
    def mean_steered(self) -> float:
        """The same under the steered model."""
        return float(self.steered.mean())

    @property
    def perplexity(self) -> float:
        """exp(−mean log-probability) under the plain model."""
        return perplexity(self.mean_plain)


@dataclass(frozen=True)
class Comparison:
    """A prompt continued plain and steered.

    Attributes:
        prompt: its tokens as text, special ones included.
        interventions: what was done, with the numbers that relative strengths came to.
    """

    prompt: tuple[str, ...]
    interventions: tuple[Resolved, ...]
    baseline: Scored
    steered: Scored

    @property
    def cost(self) -> float:
        """What steering cost in fluency: nats per token that its text is less likely than the plain text, both under
        the plain model."""
        return self.baseline.mean_plain - self.steered.mean_plain

    @property
    def first_difference(self) -> int | None:
        """The first new token that differs; None if none does."""
        pairs = zip(self.baseline.ids, self.steered.ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        shorter = min(len(self.baseline.ids), len(self.steered.ids))
        return shorter if same is None and len(self.baseline.ids) != len(self.steered.ids) else same

    def frame(self) -> pd.DataFrame:
        """One row per new token of either text: its log-probability under both models."""
        rows = [
            {"text": name, "pos": pos, "token": token, "id": i, "plain": plain, "steered": steered}
            for name, scored in (("baseline", self.baseline), ("steered", self.steered))
            for pos, (token, i, plain, steered) in enumerate(
                zip(scored.tokens, scored.ids, scored.plain.tolist(), scored.steered.tolist(), strict=True),
                start=len(self.prompt),
            )
        ]
        return pd.DataFrame(rows)


def compare_steering(
    model: Steerable,
    prompt: Prompt,
    interventions: Interventions,
    *,
    options: GenerateOptions = GenerateOptions(),  # noqa: B008 (frozen)
    texts: Sequence[Prompt] = (),
) -> Comparison:
    """Continue a prompt plain and steered, and have both texts read by both models.

    Args:
        interventions: `Steer`, or anything `run` accepts.
        texts: where typical activations are measured beside the prompt; see `hooks.generation.strength`.

    Raises:
        UserError: as `generate` and `resolve`.
    """
    (resolved,) = prepare(model, prompt, [listed(interventions)], options, texts)
    return compare(model, prompt, resolved, options)


def prepare(
    model: Steerable,
    prompt: Prompt,
    plans: Sequence[Sequence[object]],
    options: GenerateOptions,
    texts: Sequence[Prompt] = (),
) -> list[tuple[Resolved, ...]]:
    """Check everything, then give relative strengths their numbers.

    Raises:
        UserError: as `generate` and `resolve`; nothing has run then, unless a feature turns out never to be active.
    """
    for plan in plans:  # a session that is never used: it checks whatever a generation checks
        open_session(model, prompt, preliminary(plan), options, options.max_new_tokens)
    return resolve(model, prompt, plans, texts)


def compare(
    model: Steerable,
    prompt: Prompt,
    resolved: Sequence[Resolved],
    options: GenerateOptions,
    watch: Callable[[str], object] | None = None,
) -> Comparison:
    """`compare_steering` once strengths are numbers.

    Args:
        watch: is given the steered text piece by piece, as it comes.
    """
    tokens, plan = [], numbers(resolved)
    for token in streamed(model, prompt, plan, options):
        tokens.append(token)
        if watch:
            watch(token.text)
    (baseline,) = continued(model, [prompt], (), options.plain)
    texts, ids = [baseline.text, "".join(token.text for token in tokens)], [baseline.ids, tuple(t.id for t in tokens)]
    plain = log_probabilities(model, baseline.prompt, ids, None, options)
    under = log_probabilities(model, baseline.prompt, ids, [plan, plan], options)
    read = [scored(model.host, *row) for row in zip(texts, ids, plain, under, strict=True)]
    return Comparison(model.host.strings(baseline.prompt), tuple(resolved), read[0], read[1])


def log_probabilities(
    model: Steerable,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    plans: Sequence[Sequence[object]] | None,
    options: GenerateOptions,
) -> list[Float[Tensor, " new"]]:
    """log p(token | everything before it) of every new token behind one prompt, in nats.

    Passes over whole rows, without a cache; logits are formed only where a new token is predicted.

    Args:
        prompt, continuations: token ids.
        plans: the interventions for each continuation; None for the plain model.
    """
    out = []
    for start in range(0, len(continuations), ROWS_PER_PASS):
        some = continuations[start : start + ROWS_PER_PASS]
        prompts = model.host.batch([list(prompt)] * len(some))
        whole = model.host.batch([[*prompt, *ids] for ids in some])
        edits: list[Edit] = []
        if plans is not None:
            rows = plans[start : start + ROWS_PER_PASS]
            edits = edits_of(model, prompts, rows, options)
        with model.host.attached(edits) as session, torch.no_grad():
            hidden = session.hidden(whole, prompts.lengths)
            for ids, states in zip(some, hidden, strict=True):
                logits = model.host.unembed(states[len(prompt) - 1 : len(prompt) - 1 + len(ids)]).double().cpu()
                out.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)])
    return out


@measured
def edits_of(model: Steerable, batch: Batch, plans: Sequence[Sequence[object]], options: GenerateOptions) -> list[Edit]:
    """The edits of a batch that is being continued, a list of interventions for each row."""
    return options.edits(model.host, model.store, batch, plans, options.max_new_tokens)


def perplexity(mean: float) -> float:
    """exp(−mean log-probability); infinite where that is beyond a float."""
    return math.exp(-mean) if mean > -700 else math.inf


def numbers(resolved: Sequence[Resolved]) -> list[object]:
    """The interventions alone."""
    return [item.intervention for item in resolved]


def scored(
    host: Host,
    text: str,
    ids: Sequence[int],
    plain: Float[Tensor, " new"],
    steered: Float[Tensor, " new"],
) -> Scored:
    """A continuation with its log-probabilities."""
    return Scored(text, tuple(ids), host.strings(ids), plain, steered.double().cpu())
