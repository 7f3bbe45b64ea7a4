"""Scores of all active features: one forward and one backward of the plain model.

    s_i = a_i · d_i · dm/dx_L[t]

is the first-order effect on the metric m of the feature's whole contribution: ablating it is predicted to change m by
−s_i (grad × activation, the exact Jacobian; Marks et al., Sparse Feature Circuits, arXiv:2403.19647). Nothing is
frozen, so g_L is the plain model's own gradient and one backward serves every site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.targets import Target
from hooks.host import tap
from hooks.kernels import linear_fp32
from hooks.model import HookedModel
from hooks.recording import Recording
from hooks.sites import Site
from hooks.types import Edit, Pass

EMBEDDING = Site("resid_pre", 0)


@dataclass(frozen=True)
class FeatureScores:
    """Scores of every kept feature, and the gradients they come from.

    Attributes:
        values: per layer [pos k], aligned with the recording's `SparseActs`; 0 where a feature is inactive.
        gradients: dm/dx at each layer's write site [pos d_model].
        tokens: score of each token's embedding, x_0 · dm/dx_0.
    """

    recording: Recording
    target: Target
    values: Mapping[int, Float[Tensor, "pos k"]]
    gradients: Mapping[int, Float[Tensor, "pos d_model"]]
    tokens: Float[Tensor, " pos"]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All active features as a table: layer, pos, feature, activation, score; strongest |score| first."""
        parts = []
        for layer, scores in self.values.items():
            acts = self.recording.layers[layer].acts
            pos, slot = (acts.values[0] > 0).nonzero(as_tuple=True)
            columns = {
                "pos": pos.tolist(),
                "feature": acts.indices[0, pos, slot].tolist(),
                "activation": acts.values[0, pos, slot].tolist(),
                "score": scores[pos, slot].tolist(),
            }
            parts.append(pd.DataFrame(columns).assign(layer=layer))
        table = pd.concat(parts, ignore_index=True)[["layer", "pos", "feature", "activation", "score"]]
        table["size"] = table["score"].abs()
        order = ["size", "layer", "pos", "feature"]
        table = table.sort_values(order, ascending=[False, True, True, True], ignore_index=True)
        return table.drop(columns="size")


def score_features(model: HookedModel, recording: Recording, target: Target) -> FeatureScores:
    """Score every active feature of a recorded prompt (one row).

    Memory: the autograd graph of one forward pass, then pos × d_features numbers per layer, one layer at a time.
    """
    gradients, tokens = _gradients(model, recording, target)
    values = {}
    for layer, record in recording.layers.items():
        transcoder = model.store[layer]
        along = linear_fp32(gradients[layer].to(transcoder.device), transcoder.W_dec, None)  # d_i · g for every feature
        acts = record.acts
        values[layer] = (acts.values[0] * along.gather(-1, acts.indices[0]).to(acts.values.dtype)).detach()
    return FeatureScores(recording, target, values, gradients, tokens)


def _gradients(
    model: HookedModel, recording: Recording, target: Target
) -> tuple[dict[int, Tensor], Float[Tensor, " pos"]]:
    """dm/dx at every write site, and each token's embedding score."""
    sites = {layer: model.store.convention.write.at(layer) for layer in recording.layers}
    seen: dict[Site, Tensor] = {}

    def start(x: Tensor, at: Pass) -> Tensor:
        return x.detach().requires_grad_()

    edits = [Edit(EMBEDDING, start), *(tap(site, seen) for site in dict.fromkeys([EMBEDDING, *sites.values()]))]
    logits = model.host.forward_with_gradients(recording.batch, edits)
    metric = target.value(logits)[0]
    order = list(seen)
    grads = dict(zip(order, torch.autograd.grad(metric, [seen[site] for site in order]), strict=True))
    wide = torch.promote_types(grads[EMBEDDING].dtype, torch.float32)
    embedding = (seen[EMBEDDING].detach().to(wide) * grads[EMBEDDING].to(wide))[0].sum(-1)
    return {layer: grads[site][0] for layer, site in sites.items()}, embedding
