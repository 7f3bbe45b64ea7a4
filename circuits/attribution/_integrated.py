"""Integrated gradients of features and errors, one site at a time (Marks et al., Sparse Feature Circuits,
arXiv:2403.19647).

    score_i = (a_i − a'_i) d_i · ḡ        ḡ = mean_s dm/dx (x + s/steps · (x' − x)),  s = 0 … steps − 1
    score_e = (e − e') · ḡ

The features *and* the error of one site are changed together, in a straight line, from the clean run to a baseline. The
baseline is a counterfactual prompt, or zero (a' = 0 and e' = 0, so x' = b_dec). Decoding is linear, so the stream
itself changes in a straight line. The gradient is that of the plain model after the site. With more steps, the sum of
a site's scores comes closer to m(clean) − m(the site's stream replaced by x').

Rule `ig` computes edges from the same gradient. Here all features of a site are scored as one table, and its errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.ig import STEPS, mean_gradient
from circuits.targets import AnyTarget
from hooks.errors import UserError
from hooks.kernels import linear_fp32
from hooks.model import HookedModel
from hooks.passes import LayerRecord, Recording, check_same_length
from hooks.transcoder import Transcoder
from hooks.whole import whole


@dataclass(frozen=True)
class IntegratedScores:
    """Integrated-gradient scores of the features and errors of each site.

    Attributes:
        features: per layer [pos feature], in units of the target; 0 for features active in neither prompt.
        errors: per layer [pos].
    """

    features: Mapping[int, Float[Tensor, "pos feature"]]
    errors: Mapping[int, Float[Tensor, " pos"]]

    def total(self, layer: int) -> float:
        """The sum over one site: near m(clean) − m(the site's stream replaced by the baseline's)."""
        return float(self.features[layer].double().sum() + self.errors[layer].double().sum())


def integrated_scores(
    model: HookedModel, recording: Recording, target: AnyTarget, baseline: Recording | None, steps: int = STEPS
) -> IntegratedScores:
    """Score every feature and error of a recorded prompt (one row) at every recorded layer.

    Memory: the autograd graph of `steps` copies of the prompt from one site on, and pos × d_features numbers per layer.

    Args:
        baseline: a recording of a counterfactual prompt of the same length with the same layers; None for zero.
        steps: rows of the forward and backward pass; there is one such pass per site.

    Raises:
        PromptError: the two prompts differ in length.
        UserError: `steps` is below 1.
    """
    if baseline is not None:
        check_same_length(recording, baseline)
    steps = whole(steps, "steps")
    if steps < 1:
        raise UserError(f"cannot integrate in {steps} steps", expected="at least 1")
    features, errors = {}, {}
    for layer, record in recording.layers.items():
        transcoder = model.store[layer]
        clean, end = _Parts.of(record, transcoder), _Parts.nothing(record, transcoder)
        if baseline is not None:
            end = _Parts.of(baseline.layers[layer], transcoder)
        moved = clean.stream.to(end.stream.dtype) - end.stream
        gradient = mean_gradient(model, recording, (target,), transcoder.write, moved, steps).to(transcoder.device)
        along = linear_fp32(gradient, transcoder.W_dec, None)  # d_i · ḡ for every feature
        features[layer] = (clean.acts - end.acts) * along.to(clean.acts.dtype)
        errors[layer] = einsum(clean.error - end.error, gradient.to(clean.error.dtype), "pos d, pos d -> pos")
    return IntegratedScores(features, errors)


@dataclass(frozen=True)
class _Parts:
    """One site of one prompt, split into parts: stream = acts @ W_dec + b_dec + error."""

    stream: Float[Tensor, "pos d_model"]
    acts: Float[Tensor, "pos feature"]
    error: Float[Tensor, "pos d_model"]

    @classmethod
    def of(cls, record: LayerRecord, transcoder: Transcoder) -> "_Parts":
        return cls(record.target[0], record.acts.dense(transcoder.d_features)[0], record.error[0])

    @classmethod
    def nothing(cls, like: LayerRecord, transcoder: Transcoder) -> "_Parts":
        """No feature and no error: only the decoder's bias is left."""
        error = torch.zeros_like(like.error[0])
        acts = like.acts.values.new_zeros(len(error), transcoder.d_features)
        return cls(error + transcoder.b_dec.to(error.dtype), acts, error)
