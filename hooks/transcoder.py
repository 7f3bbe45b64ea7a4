"""One layer's transcoder: frozen weights and the pure functions encode, decode and error.

The published encoder is `enc.0 = nn.LayerNorm(d_model)` (mean-centred, eps 1e-5, affine), then Linear, TopK, ReLU;
the code on its model card (add `enc.0.bias`, ReLU, TopK) computes other features.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import ModelError
from hooks.kernels import decode_sparse, gather_selected, largest, linear_fp32, select_relu, select_topk, working_dtype
from hooks.sites import Site
from hooks.types import SparseActs

Activation = Literal["topk", "relu", "jumprelu", "groupmax"]


@dataclass(frozen=True)
class Transcoder:
    """Encoder and decoder of one layer.

        given = LayerNorm(x; norm_weight, norm_bias, norm_eps)      or RMSNorm(x), or x - shift
        pre   = given @ W_enc.T + b_enc
        a     = relu(topk(pre, k))                                  or relu(gated(pre))
        x_hat = a @ W_dec + b_dec                                   + given @ W_skip.T

    `W_enc` and `W_dec` both hold one feature per row. Weights may be stored in half precision; every result is fp32
    (fp64 for fp64 weights). TopK before or after ReLU gives the same features: only positive ones count.

    Attributes:
        read: the site of `x`.
        write: the site that `x_hat` reconstructs.
        norm_weight: None: there is no norm.
        norm_centred: LayerNorm subtracts the mean; without it the norm is RMSNorm.
        k: how many features TopK keeps; None: no TopK.
        threshold: JumpReLU: a feature is active only above it. Never negative.
        groups: GroupMax: the features form so many groups of neighbours, and only the largest of each is active.
        shift: subtracted from x, where there is no norm (`b_dec` of most sparse autoencoders).
        W_skip: a skip connection: a linear map from the encoder's input to the reconstruction.
    """

    layer: int
    read: Site
    write: Site
    W_enc: Float[Tensor, "feature d_model"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]
    norm_weight: Float[Tensor, " d_model"] | None
    norm_bias: Float[Tensor, " d_model"] | None
    norm_eps: float
    k: int | None
    norm_centred: bool = True
    threshold: Float[Tensor, " feature"] | None = None
    groups: int | None = None
    shift: Float[Tensor, " d_model"] | None = None
    W_skip: Float[Tensor, "d_model d_model"] | None = None

    def __post_init__(self) -> None:
        rules = [self.k is not None, self.threshold is not None, self.groups is not None]
        assert sum(rules) <= 1, "one of TopK, JumpReLU and GroupMax"
        assert self.shift is None or self.norm_weight is None, "a shift belongs to an encoder without a norm"

    @property
    def activation(self) -> Activation:
        """The name of the selection rule."""
        if self.k is not None:
            return "topk"
        return "jumprelu" if self.threshold is not None else "groupmax" if self.groups is not None else "relu"

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.W_enc.shape[1]

    @property
    def d_features(self) -> int:
        """Size of the dictionary."""
        return self.W_enc.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights; streams are moved here to be encoded."""
        return self.W_enc.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, on their device."""
        return sum(part.nbytes for name in WEIGHTS if (part := getattr(self, name)) is not None)

    def normed(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """The encoder's input: x after its norm or shift, in the working precision, on the weights' device."""
        dtype = working_dtype(self.W_enc)
        x = x.to(self.device, dtype)
        if self.norm_weight is None:
            return x if self.shift is None else x - self.shift.to(dtype)
        weight, bias = (None if part is None else part.to(dtype) for part in (self.norm_weight, self.norm_bias))
        if self.norm_centred:
            return F.layer_norm(x, (self.d_model,), weight, bias, self.norm_eps)
        out = F.rms_norm(x, (self.d_model,), weight, self.norm_eps)
        return out if bias is None else out + bias

    def preactivations(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Pre-activations: what TopK selects from."""
        return linear_fp32(self.normed(x), self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*token d_model"]) -> SparseActs:
        """The active features of each token."""
        return self.select(self.preactivations(x))

    def select(self, pre: Float[Tensor, "*token feature"]) -> SparseActs:
        """TopK then ReLU; for a set without TopK, ReLU of the gated pre-activations.

        Raises:
            ModelError: a pre-activation is not a number.
        """
        self._require_numbers(pre)
        return select_relu(self.gated(pre)) if self.k is None else select_topk(pre, self.k)

    def gated(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """JumpReLU and GroupMax: pre-activations of features that are not active become 0. Other sets: unchanged."""
        if self.threshold is not None:
            return torch.where(pre > self.threshold.to(pre), pre, 0)
        if self.groups is None:
            return pre
        parts = rearrange(pre, "... (group member) -> ... group member", group=self.groups)
        first = torch.zeros_like(parts, dtype=torch.bool).scatter(-1, parts.argmax(-1, keepdim=True), True)
        return torch.where(rearrange(first, "... group member -> ... (group member)"), pre, 0)

    def activations(
        self, pre: Float[Tensor, "token feature"], token: Int[Tensor, " hit"], feature: Int[Tensor, " hit"]
    ) -> Float[Tensor, " hit"]:
        """Single activations, equal to those of `select`, without running it: feature `feature[h]` at token `token[h]`.

        Raises:
            ModelError: a pre-activation is not a number.
        """
        self._require_numbers(pre)
        return gather_selected(self.gated(pre), token, feature, self.k)

    def activations_at(
        self, x: Float[Tensor, "token d_model"], token: Int[Tensor, " hit"], feature: Int[Tensor, " hit"]
    ) -> Float[Tensor, " hit"]:
        """The same from the read site's x, which is encoded only if one of the named features can be active.

        Raises:
            ModelError: a pre-activation is not a number.
        """
        given = self.normed(x)
        if len(token) <= len(x) and not given.requires_grad and not self.W_enc.is_cuda:
            own = self._surely_inactive(given[token], feature)
            if bool(own.all()):
                return given.new_zeros(len(token))
        return self.activations(linear_fp32(given, self.W_enc, self.b_enc), token, feature)

    def _surely_inactive(
        self, given: Float[Tensor, "hit d_model"], feature: Int[Tensor, " hit"]
    ) -> Bool[Tensor, " hit"]:
        """True where a feature's pre-activation is so far below 0 that no order of summation could make it positive."""
        rows, bias = self.W_enc[feature].to(given.dtype), self.b_enc[feature].to(given.dtype)
        products = given * rows
        slack = torch.finfo(given.dtype).eps * (self.d_model + 1) * (products.abs().sum(-1) + bias.abs())
        return products.sum(-1) + bias < -slack

    def _require_numbers(self, pre: Float[Tensor, "*token feature"]) -> None:
        if pre.numel() and math.isnan(largest(pre.detach())):  # the maximum is no number if any entry is none
            raise ModelError(
                f"the stream at {self.read} is not a number",
                expected="finite activations",
                repair="run the model in bfloat16 or float32; fp16 overflows in this family",
            )

    def decode(self, acts: SparseActs) -> Float[Tensor, "*token d_model"]:
        """The features' part of the reconstruction: all of it, unless there is a skip connection."""
        return decode_sparse(acts, self.W_dec, self.b_dec)

    def skipped(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"] | None:
        """The skip connection's part of the reconstruction, from the read site's x; None where there is none."""
        return None if self.W_skip is None else linear_fp32(self.normed(x), self.W_skip, None)

    def reconstruct(self, acts: SparseActs, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """The reconstruction of the write site, skip connection included. `x` is the stream at the read site."""
        skipped = self.skipped(x)
        return self.decode(acts) if skipped is None else self.decode(acts) + skipped

    def error(
        self, acts: SparseActs, x: Float[Tensor, "*token d_model"], target: Float[Tensor, "*token d_model"]
    ) -> Float[Tensor, "*token d_model"]:
        """The reconstruction error at the write site: target − reconstruct(acts, x)."""
        return target.to(self.device, working_dtype(self.W_dec)) - self.reconstruct(acts, x)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Transcoder":
        """A copy with its weights on another device or in another precision."""

        def move(name: str) -> Any:
            part: Tensor | None = getattr(self, name)
            return None if part is None else part.to(device=device, dtype=dtype or part.dtype)

        return replace(self, **{name: move(name) for name in WEIGHTS})


OPTIONAL_WEIGHTS = ("norm_weight", "norm_bias", "threshold", "shift", "W_skip")
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", *OPTIONAL_WEIGHTS)
