"""How well a site is reconstructed, as sums over tokens, so that the sums of several batches can be added.

    FVU = sum_t |x_t − x̂_t|² / sum_t |x_t − mean x|²

is computed over all tokens; without attention sinks, whose norm would dominate the variance; and with x/rms(x) and
x̂/rms(x̂) in place of x and x̂, as a later block's norm computes them. All sums are fp64.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from hooks.transcoder import Transcoder

CONSTANT = 1e-9  # a spread below this share of the summed squares is their rounding


@dataclass(frozen=True)
class Spread:
    """The sums for an FVU. x may be measured from any origin, if all batches use the same one."""

    count: int
    total: Float[Tensor, " d_model"]
    square: float
    error: float

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "token d_model"],
        error: Float[Tensor, "token d_model"],
        origin: Float[Tensor, " d_model"] | None = None,
    ) -> "Spread":
        """The sums of some tokens. An origin near the mean loses fewer digits."""
        shifted = x.double() if origin is None else x.double() - origin
        total = reduce(shifted, "token d_model -> d_model", "sum")
        return cls(len(x), total, float(shifted.square().sum()), float(error.double().square().sum()))

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Spread)))

    @property
    def fvu(self) -> float | None:
        """The fraction of variance unexplained; None where there is no variance, because all tokens are equal."""
        if not self.count:
            return None
        spread = self.square - float(self.total.square().sum()) / self.count
        return self.error / spread if spread > CONSTANT * self.square else None


@dataclass(frozen=True)
class SiteSums:
    """The sums of one site.

    Attributes:
        all, calm, normed: for the FVU over all tokens, without sinks, and of x / rms(x).
        cosine: of cos(x, x̂).
        ratio: of |x̂| / |x| over the `sized` tokens, whose x is not 0.
        fired: of each feature, the number of tokens at which it was active.
    """

    all: Spread
    calm: Spread
    normed: Spread
    cosine: float
    ratio: float
    sized: int
    fired: Int[Tensor, " feature"]

    def __add__(self, other: "SiteSums") -> "SiteSums":
        return SiteSums(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(SiteSums)))


def site_sums(
    transcoder: Transcoder,
    read: Float[Tensor, "token d_model"],
    target: Float[Tensor, "token d_model"],
    mean: Float[Tensor, " d_model"],
    sink_norm: float,
    eps: float,
) -> SiteSums:
    """The sums of some tokens, encoded and reconstructed here.

    Args:
        mean: about the site's mean; only rounding depends on it.
        sink_norm: tokens of a larger |target| are sinks.
        eps: of the model's norms.
    """
    acts = transcoder.encode(read)
    x_hat = transcoder.reconstruct(acts, read)
    x, mean = target.to(x_hat), mean.to(x_hat.device)
    norms = x.double().norm(dim=-1)
    calm, sized = norms <= sink_norm, norms > 0
    unit, unit_hat = (F.rms_norm(part, part.shape[-1:], eps=eps) for part in (x, x_hat))
    active = acts.indices[acts.values > 0]
    return SiteSums(
        all=Spread.of(x, x - x_hat, mean),
        calm=Spread.of(x[calm], (x - x_hat)[calm], mean),
        normed=Spread.of(unit, unit - unit_hat),
        cosine=float(F.cosine_similarity(x.double(), x_hat.double(), dim=-1).sum()),
        ratio=float((x_hat.double().norm(dim=-1)[sized] / norms[sized]).sum()),
        sized=int(sized.sum()),
        fired=torch.bincount(active, minlength=transcoder.d_features).cpu(),
    )
