"""One layer's transcoder: frozen weights and the pure functions encode, decode and error.

The published encoder is `enc.0 = nn.LayerNorm(d_model)` (mean-centred, eps 1e-5, affine), then Linear, TopK, ReLU;
the code on its model card (add `enc.0.bias`, ReLU, TopK) computes other features.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from hooks.errors import ModelError
from hooks.kernels import decode_sparse, gather_selected, linear_fp32, select_relu, select_topk, working_dtype
from hooks.sites import Site
from hooks.types import SparseActs


@dataclass(frozen=True)
class Transcoder:
    """Encoder and decoder of one layer.

        pre   = LayerNorm(x; norm_weight, norm_bias, norm_eps) @ W_enc.T + b_enc
        a     = relu(topk(pre, k))            (k = None: relu(pre))
        x_hat = a @ W_dec + b_dec

    `W_enc` and `W_dec` both hold one feature per row. Weights may be stored in half precision; every result is fp32
    (fp64 for fp64 weights).

    Attributes:
        read: where `x` is taken from.
        write: what `x_hat` reconstructs.
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
        """Where the weights are; streams are brought here to be encoded."""
        return self.W_enc.device

    @property
    def nbytes(self) -> int:
        """Bytes the weights take where they are."""
        parts = (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.norm_weight, self.norm_bias)
        return sum(part.nbytes for part in parts if part is not None)

    def normed(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """The encoder's input norm, in the working precision, on the weights' device."""
        dtype = working_dtype(self.W_enc)
        x = x.to(self.device)
        if self.norm_weight is None:
            return x.to(dtype)
        bias = None if self.norm_bias is None else self.norm_bias.to(dtype)
        return F.layer_norm(x.to(dtype), (self.d_model,), self.norm_weight.to(dtype), bias, self.norm_eps)

    def preactivations(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """What TopK selects from."""
        return linear_fp32(self.normed(x), self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*token d_model"]) -> SparseActs:
        """The active features of each token."""
        return self.select(self.preactivations(x))

    def select(self, pre: Float[Tensor, "*token feature"]) -> SparseActs:
        """TopK then ReLU; ReLU alone where the set has no TopK.

        Raises:
            ModelError: a pre-activation is not a number.
        """
        self._require_numbers(pre)
        return select_relu(pre) if self.k is None else select_topk(pre, self.k)

    def activations(
        self, pre: Float[Tensor, "token feature"], token: Int[Tensor, " hit"], feature: Int[Tensor, " hit"]
    ) -> Float[Tensor, " hit"]:
        """Single activations, as `select` has them, without a selection: feature `feature[h]` at token `token[h]`.

        Raises:
            ModelError: a pre-activation is not a number.
        """
        self._require_numbers(pre)
        return gather_selected(pre, token, feature, self.k)

    def _require_numbers(self, pre: Float[Tensor, "*token feature"]) -> None:
        if pre.numel() and math.isnan(pre.detach().max()):  # the maximum is no number if any entry is none
            raise ModelError(
                f"the stream at {self.read} is not a number",
                expected="finite activations",
                repair="run the model in bfloat16 or float32; fp16 overflows in this family",
            )

    def decode(self, acts: SparseActs) -> Float[Tensor, "*token d_model"]:
        """The reconstruction of the write site."""
        return decode_sparse(acts, self.W_dec, self.b_dec)

    def error(self, acts: SparseActs, target: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """What the reconstruction leaves of the write site: target − decode(acts)."""
        return target.to(self.device, working_dtype(self.W_dec)) - self.decode(acts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Transcoder":
        """A copy with its weights elsewhere or in another precision."""

        def move(name: str) -> Any:
            part: Tensor | None = getattr(self, name)
            return None if part is None else part.to(device=device, dtype=dtype or part.dtype)

        return replace(self, **{name: move(name) for name in WEIGHTS})


WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "norm_weight", "norm_bias")
OPTIONAL_WEIGHTS = ("norm_weight", "norm_bias")
