"""Does the tracer find the state's features without being told, and does its score predict real ablations?"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median

import pandas as pd
import torch

from circuits.agreement import rank_correlation
from circuits.building import score_features, settle
from circuits.demo.feature_swap import SiteStatistics
from circuits.demo.questions import STATE_NAMES, Exam
from circuits.targets import resolve_targets
from circuits.tracing import trace
from circuits.verification import measure_edges, measure_nodes
from hooks.demo.world import TWO_HOP_TEMPLATES, capital_of_city

PROMPTS = 10
SAMPLE = 200


@dataclass(frozen=True)
class Discovery:
    """Median rank of the state's selective features among all active features of their prompts, as a share.

    Attributes:
        by_score: ranked by |score|, as the tracer ranks them.
        by_activation: ranked by activation.
        by_chance: in random order.
        found: how many (prompt, feature) pairs entered.
    """

    by_score: float
    by_activation: float
    by_chance: float
    found: int


def discovery_ranks(
    exam: Exam, selections: Mapping[tuple[int, str], SiteStatistics], site: tuple[int, str]
) -> Discovery:
    """Ranks over all held-out cities in the test wording.

    The features are each state's four most selective ones (average precision on the selection questions, which the
    tracer never sees) that are active at the site the mean-swap scan found.
    """
    layer, place = site
    test = exam.test_questions()
    generator = torch.Generator().manual_seed(0)
    ranks: dict[str, list[float]] = {"score": [], "activation": [], "chance": []}
    for state, prompt in enumerate(test.prompts):
        recording = exam.model.record(prompt)
        (target,) = resolve_targets(exam.model.host, recording.logits[0], int(exam.answers[state]))
        table = score_features(exam.model, recording, target).frame
        here = (table["layer"] == layer) & (table["pos"] == int(test.positions[place][state]))
        wanted = here & table["feature"].isin(selections[site].most_selective(state))
        orders = {
            "score": table["score"].abs().rank(ascending=False),
            "activation": table["activation"].rank(ascending=False),
            "chance": pd.Series(1 + torch.randperm(len(table), generator=generator).numpy()),
        }
        for name, order in orders.items():
            ranks[name] += (order[wanted] / len(table)).tolist()
    middle = {name: median(values) if values else 1.0 for name, values in ranks.items()}
    return Discovery(middle["score"], middle["activation"], middle["chance"], len(ranks["score"]))


@dataclass(frozen=True)
class MeanAgreement:
    """Means over the prompts of Spearman's correlation between prediction and real ablation.

    Attributes:
        metric: feature scores, on logit(answer) − logit(best other).
        plain_logit: the same features on the answer's plain logit.
        edges: edge weights against ablation through the piece between two cuts.
    """

    metric: float
    plain_logit: float
    edges: float
    each: tuple[float, ...]


def verification_prompts(exam: Exam) -> list[tuple[str, str]]:
    """Ten capital questions: every fifth state's held-out city, wordings in turn. (prompt, capital)"""
    wordings = TWO_HOP_TEMPLATES["capital"]
    cities = exam.held_out[:: len(STATE_NAMES) // PROMPTS]
    return [(wordings[i % len(wordings)].format(c=city), capital_of_city(city)) for i, city in enumerate(cities)]


def agreement(exam: Exam, *, edges: bool = True) -> MeanAgreement:
    """At least 200 features (and edges) per prompt, spread over strength, layer and position."""
    scores, logits, joints = [], [], []
    for prompt, capital in verification_prompts(exam):
        answer = exam.model.host.tokenize(capital)[0]
        setting = settle(exam.model, prompt, answer)
        nodes, _ = measure_nodes(setting, n=SAMPLE, seed=0)
        scores.append(rank_correlation(nodes["score"], nodes["effect"]))
        logits.append(rank_correlation(nodes["logit_score"], nodes["logit_effect"]))
        if edges:
            graph = trace(exam.model, prompt, answer, sample=0, node_threshold=1.0, edge_threshold=1.0)
            table, _ = measure_edges(setting, graph, n=SAMPLE, seed=0)
            joints.append(rank_correlation(table["weight"], table["effect"]))
    return MeanAgreement(mean(scores), mean(logits), mean(joints) if joints else float("nan"), tuple(scores))
