"""Figures of the demo: accuracy, the sites that represent the state, and the quality of the transcoders."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.demo.questions import POSITIONS, STATE_NAMES, Exam, Questions
from hooks.demo.world import TEST_TEMPLATE, TWO_HOP_TEMPLATES, held_out_sentences
from hooks.passes import SiteQuality, site_quality
from hooks.sites import Site
from hooks.types import Edit, ErrorMode, Pass

ROWS = 256
FRESH_SENTENCES = 1500


@dataclass(frozen=True)
class TwoHop:
    """Share of capital questions answered right, over all wordings."""

    trained: float
    held_out: float


def two_hop_accuracy(exam: Exam, *, swap: Sequence[int] | None = None, error: ErrorMode = "live") -> TwoHop:
    """Top-1 over the whole vocabulary; optionally with sites replaced by their reconstruction."""
    scores = []
    for cities in (exam.trained, exam.held_out):
        questions = exam.ask(cities, TWO_HOP_TEMPLATES["capital"])
        logits = exam.model.run_many(questions.prompts, swap=swap, error=error)
        scores.append(float(exam.correct(logits, questions.states).mean()))
    return TwoHop(*scores)


def ordered_pairs() -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """(source state, target state) for every ordered pair of different states."""
    states = torch.arange(len(STATE_NAMES))
    source, target = (axis.flatten() for axis in torch.meshgrid(states, states, indexing="ij"))
    return source[source != target], target[source != target]


def mean_swap_scan(exam: Exam) -> dict[tuple[int, str], float]:
    """Which sites represent the state? At each site add mean(target state) − mean(own state) to the stream, and count
    how often the answer changes to the target's capital.

    Returns:
        per (layer, "city" or "final"): the share of all ordered pairs of held-out cities whose most likely token
        becomes the target's capital. The means are over all cities of a state in the test wording.
    """
    everyone = exam.ask(tuple(c for c in (*exam.trained, *exam.held_out)), (TEST_TEMPLATE,))
    test = exam.test_questions()
    scan = {}
    for layer in range(exam.model.host.n_layers):
        site = Site("resid_pre", layer)
        for place in POSITIONS:
            scan[layer, place] = _moved(exam, site, place, _means(exam, site, place, everyone), test)
    return scan


def _means(exam: Exam, site: Site, place: str, questions: Questions) -> Float[Tensor, "state d_model"]:
    rows = []
    for start in range(0, len(questions), ROWS):
        batch = exam.model.host.batch(questions.prompts[start : start + ROWS])
        _, seen = exam.model.host.capture(batch, [site])
        pos = questions.positions[place][start : start + ROWS]
        rows.append(seen[site][torch.arange(len(pos)), pos])
    stream = torch.cat(rows)
    return torch.stack([stream[questions.states == state].mean(0) for state in range(len(STATE_NAMES))])


def _moved(exam: Exam, site: Site, place: str, means: Float[Tensor, "state d_model"], test: Questions) -> float:
    source, target = ordered_pairs()
    right = []
    for start in range(0, len(source), ROWS):
        own, wanted = source[start : start + ROWS], target[start : start + ROWS]
        batch = exam.model.host.batch([test.prompts[i] for i in own.tolist()])
        shift, pos, row = means[wanted] - means[own], test.positions[place][own], torch.arange(len(own))

        def move(x: Tensor, at: Pass, shift: Tensor = shift, pos: Tensor = pos, row: Tensor = row) -> Tensor:
            return x.index_put((row, pos), shift, accumulate=True)

        logits = exam.model.host.forward(batch, [Edit(site, move)])[row, batch.last]
        right.append(exam.correct(logits, wanted))
    return float(torch.cat(right).mean())


def reconstruction_quality(exam: Exam, *, kind: str = "") -> tuple[SiteQuality, ...]:
    """FVU, loss and L0 of every site on sentences that no training text holds, held-out questions among them.

    Args:
        kind: only sentences whose kind begins so, such as `induction` or `two_hop`.
    """
    fresh = held_out_sentences(exam.seed, FRESH_SENTENCES)
    recording = exam.model.record([sentence.text for sentence in fresh if sentence.kind.startswith(kind)])
    return tuple(site_quality(recording, layer) for layer in recording.layers)
