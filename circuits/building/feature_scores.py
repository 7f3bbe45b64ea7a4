"""Scores of all active features: each one's first-order contribution to the metric.

    s_i = a_i · d_i · g[t]                     in a pair of prompts: (a_i − a'_i) · d_i · g[t]

where g is the metric's gradient at the write site. Ablating the feature is predicted to change the metric by −s_i (grad
× activation; Marks et al., Sparse Feature Circuits, arXiv:2403.19647). The rule (`circuits/attribution`) decides which
gradient is used. Under `exact` it is the plain model's own, so one backward pass gives the gradients of all sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.attribution import RULES
from circuits.edges import stack_of
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.kernels import linear_fp32
from hooks.model import HookedModel
from hooks.passes import LayerRecord, Recording
from hooks.sites import EMBEDDING


@dataclass(frozen=True)
class LayerScores:
    """The active features of one layer and their scores, by (position, feature).

    Attributes:
        activation: in the prompt; 0 for a feature that is active only in the counterfactual.
        baseline: the activation in the counterfactual; 0 without one.
    """

    pos: Int[Tensor, " node"]
    feature: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    baseline: Float[Tensor, " node"]
    score: Float[Tensor, " node"]


@dataclass(frozen=True)
class FeatureScores:
    """Scores of every active feature, and the gradients they come from.

    Attributes:
        layers: per layer, its active features.
        gradients: the metric's gradient at each layer's write site [pos d_model].
        tokens: the score of each token's embedding, x_0 · dm/dx_0.
    """

    recording: Recording
    targets: tuple[AnyTarget, ...]
    layers: Mapping[int, LayerScores]
    gradients: Mapping[int, Float[Tensor, "pos d_model"]]
    tokens: Float[Tensor, " pos"]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All active features as a table, strongest |score| first; ties by (layer, position, feature).

        Columns: layer, pos, feature, activation, baseline, score.
        """
        names = ("pos", "feature", "activation", "baseline", "score")
        parts = [
            pd.DataFrame({name: getattr(scored, name).double().cpu().numpy() for name in names}).assign(layer=layer)
            for layer, scored in sorted(self.layers.items())
        ]
        table = pd.concat(parts, ignore_index=True).astype({"pos": np.int64, "feature": np.int64, "layer": np.int64})
        order = np.argsort(-table["score"].abs().to_numpy(), kind="stable")
        return table.iloc[order][["layer", *names]].reset_index(drop=True)


def score_features(
    model: HookedModel,
    recording: Recording,
    target: AnyTarget | Sequence[AnyTarget],
    *,
    rule: str = "exact",
    counterfactual: Recording | None = None,
) -> FeatureScores:
    """Score every active feature of a recorded prompt (one row).

    Args:
        target: resolved targets; several are summed, each times its weight.
        rule: the rule whose gradient is used, a file in `circuits/attribution/`.
        counterfactual: the other prompt of a pair, of the same length; then scores are of the difference from it.

    Memory: the rule's memory for one gradient, then pos × d_features numbers per layer, one layer at a time.

    Raises:
        UserError: the rule is unknown or cannot be applied to this model.
    """
    if rule not in RULES:
        raise UserError(f"unknown attribution rule {rule!r}", expected=", ".join(RULES), where="--rule")
    targets = (target,) if isinstance(target, AnyTarget) else tuple(target)
    layers = below(model, recording, targets)
    sites = {layer: model.store.convention.write.at(layer) for layer in layers}
    held = (
        None if rule == "autograd" else stack_of(model.host, recording)
    )  # keeps the stack in memory for the calls below
    found = RULES[rule].gradients(model, recording, targets, (EMBEDDING, *sites.values()), counterfactual)
    scores = from_gradients(
        model, recording, targets, {layer: found[site] for layer, site in sites.items()}, counterfactual
    )
    start = embedding_of(model, recording)
    if counterfactual is not None:
        start = start - embedding_of(model, counterfactual)
    tokens = (start * found[EMBEDDING].to(start)).sum(-1)
    scores = replace(scores, tokens=tokens)
    scores = rescored(model, scores, rule) if hasattr(RULES[rule], "rescore") else scores
    del held
    return scores


def rescored(model: HookedModel, scores: FeatureScores, rule: str = "ose") -> FeatureScores:
    """The same features, scored by a rule that runs the model for each of them."""
    layers = {}
    for layer, scored in scores.layers.items():
        nodes = (scored.pos, scored.feature, scored.activation - scored.baseline)
        found = RULES[rule].rescore(model, scores.recording, scores.targets, layer, nodes)
        layers[layer] = replace(scored, score=found.to(scored.score))
    return replace(scores, layers=layers)


def below(model: HookedModel, recording: Recording, targets: Sequence[AnyTarget]) -> list[int]:
    """Layers whose write site is below the targets."""
    end = targets[0].site
    sites = {layer: model.store.convention.write.at(layer) for layer in recording.layers}
    return [layer for layer, site in sites.items() if end is None or _feeds(model, layer, end.depth)]


def _feeds(model: HookedModel, layer: int, end: tuple[int, int]) -> bool:
    read, write = model.store.sites(layer)
    return write.depth <= end and (read.depth, write.depth) != (end, end)


def from_gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    gradients: Mapping[int, Float[Tensor, "pos d_model"]],
    counterfactual: Recording | None = None,
) -> FeatureScores:
    """Scores from given gradients at the write sites."""
    layers = {}
    for layer, gradient in gradients.items():
        transcoder = model.store[layer]
        along = linear_fp32(gradient.to(transcoder.device), transcoder.W_dec, None)  # d_i · g for every feature
        other = None if counterfactual is None else counterfactual.layers[layer]
        layers[layer] = _scored(recording.layers[layer], other, along, transcoder.d_features)
    tokens = recording.final.new_zeros(recording.batch.lengths[0])
    return FeatureScores(recording, targets, layers, dict(gradients), tokens)


def _scored(
    record: LayerRecord, other: LayerRecord | None, along: Float[Tensor, "pos feature"], d_features: int
) -> LayerScores:
    values, indices = record.acts.values[0], record.acts.indices[0]
    if other is None:
        pos, slot = (values > 0).nonzero(as_tuple=True)
        feature, activation = indices[pos, slot], values[pos, slot]
        baseline = torch.zeros_like(activation)
    else:
        clean, corrupted = (part.acts.dense(d_features)[0] for part in (record, other))
        either: Bool[Tensor, "pos feature"] = (clean > 0) | (corrupted > 0)
        pos, feature = either.nonzero(as_tuple=True)
        activation, baseline = clean[pos, feature], corrupted[pos, feature]
    score = (activation - baseline) * along[pos, feature].to(activation.dtype)
    return LayerScores(pos, feature, activation, baseline, score.detach())


def embedding_of(model: HookedModel, recording: Recording) -> Float[Tensor, "pos d_model"]:
    """x_0 in fp32 or better."""
    embed: Any = model.host.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        x = embed(recording.batch.ids[0].to(model.host.device))
    return x.to(torch.promote_types(x.dtype, torch.float32))
