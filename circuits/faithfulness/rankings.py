"""Rankings of features: by scores, and baselines for comparison.

A ranking rule turns a case into a number per feature, without running any circuit. `ig`, `grad x difference` and
`difference` use the difference between a feature's activation and its ablation value; the others use its activation.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import integrated_scores
from circuits.building import score_features
from circuits.faithfulness.cases import Case, Ranking
from hooks.kernels import linear_fp32
from hooks.model import HookedModel
from hooks.whole import whole

RankingRule = Callable[[HookedModel, Case], Ranking]


def integrated(model: HookedModel, case: Case) -> Ranking:
    """Integrated gradients per site, in ten steps from the clean run to the ablation values."""
    return integrated_scores(model, case.clean, case.target, case.towards).features


def gradient(model: HookedModel, case: Case) -> Ranking:
    """grad × activation, a_i d_i · g: the score of graphs."""
    return {layer: case.acts(layer) * along for layer, along in _slopes(model, case).items()}


def gradient_difference(model: HookedModel, case: Case) -> Ranking:
    """Attribution patching: the first-order effect of (a_i − ã_i) d_i."""
    return {layer: (case.acts(layer) - case.ablated[layer]) * along for layer, along in _slopes(model, case).items()}


def activation(model: HookedModel, case: Case) -> Ranking:
    """Baseline: the largest activations."""
    return {layer: case.acts(layer) for layer in case.ablated}


def difference(model: HookedModel, case: Case) -> Ranking:
    """Baseline: the largest |a_i − ã_i|."""
    return {layer: (case.acts(layer) - ablated).abs() for layer, ablated in case.ablated.items()}


def chance(seed: int = 0) -> RankingRule:
    """Baseline: random order. For a pair of prompts it is the same, whatever its place in a list."""

    seed = whole(seed, "seed")

    def draw(model: HookedModel, case: Case) -> Ranking:
        prompts = [case.clean, case.counterfactual]
        ids = [None if recording is None else recording.batch.ids.tolist() for recording in prompts]
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, ids)).encode()))
        return {
            layer: torch.rand(values.shape, generator=generator).to(values) for layer, values in case.ablated.items()
        }

    return draw


RANKINGS: Mapping[str, RankingRule] = MappingProxyType(
    {
        "ig": integrated,
        "grad x difference": gradient_difference,
        "grad x act": gradient,
        "difference": difference,
        "activation": activation,
        "random": chance(),
    }
)
"""Name of a ranking → the function that ranks the features of a case."""


def rank(
    model: HookedModel, cases: Sequence[Case], rules: Mapping[str, RankingRule] = RANKINGS
) -> dict[str, tuple[Ranking, ...]]:
    """Every rule's ranking of every case, for `faithfulness` and `completeness`."""
    return {name: tuple(rule(model, case) for case in cases) for name, rule in rules.items()}


def _slopes(model: HookedModel, case: Case) -> dict[int, Float[Tensor, "pos feature"]]:
    """d_i · g for every feature: the metric's derivative along each decoder row, at the clean run."""
    gradients = score_features(model, case.clean, case.target).gradients
    return {
        layer: linear_fp32(gradients[layer].to(model.store[layer].device), model.store[layer].W_dec, None)
        for layer in case.ablated
    }
