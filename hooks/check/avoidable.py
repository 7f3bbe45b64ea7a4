"""The avoidable error: the part of a decoder's reconstruction error that a linear refit of the decoder would remove.

A decoder that was trained on squared error is the best linear map for its training features and its training target:
its error is uncorrelated with every feature. For other features or another target it is not the best one. So among
candidates that reconstruct about equally well, the one whose decoder cannot be improved is the one it was trained for.
The error itself is no such test, because it can be smaller for a target that is easier to reconstruct.

The refit is a ridge regression of the error on the features. It is fitted on one half of the rows and evaluated on the
other half, and then the other way round. The best of `PENALTIES` is used; if none helps, the avoidable error is 0.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PENALTIES = (0.01, 0.1, 1.0, 10.0)  # times the mean square of a feature


def avoidable_by_row(
    features: Float[Tensor, "token feature"],
    error: Float[Tensor, "token d_model"],
    row: Int[Tensor, " token"],
    rows: int,
    spread: float,
) -> Float[Tensor, " row"]:
    """How much a refit of the decoder reduces |x − x_hat|² in each row, divided by `spread`: the sum is in units of
    FVU.

    Args:
        row: the index of each token's text, below `rows`. Texts with even and with odd index are the two halves.
        spread: sum |x − mean x|² of the target.
    """
    wide, left, odd = features.double(), error.double(), (row % 2 == 1).to(error.device)
    gains = _gain(wide, left, odd) + _gain(wide, left, ~odd)
    gains = torch.cat([gains, torch.zeros_like(gains[:1])])  # with few tokens every refit only adds noise
    return by_row(gains[int(gains.sum(-1).argmax())], row, rows) / spread


def _gain(
    features: Float[Tensor, "token feature"], error: Float[Tensor, "token d_model"], held: Bool[Tensor, " token"]
) -> Float[Tensor, "penalty token"]:
    """How much a refit on the other tokens reduces |error|² at the held-out ones, for every penalty; 0 elsewhere."""
    own_mean, error_mean = features[~held].mean(0), error[~held].mean(0)
    a, e, met = features[~held] - own_mean, error[~held] - error_mean, features[held] - own_mean
    dual = len(a) < a.shape[1]
    gram, sought = (a @ a.T, e) if dual else (a.T @ a, a.T @ e)
    through = met @ a.T if dual else met
    penalty = a.square().sum() / a.shape[1] + torch.finfo(a.dtype).tiny
    before, out = error[held], error.new_zeros(len(PENALTIES), len(error))
    for number, share in enumerate(PENALTIES):
        root = torch.linalg.cholesky(gram + share * penalty * torch.eye(len(gram), dtype=a.dtype, device=a.device))
        guess = error_mean + through @ torch.cholesky_solve(sought, root)
        out[number, held] = before.square().sum(-1) - (before - guess).square().sum(-1)
    return out


def separation(mine: Float[Tensor, " row"], other: Float[Tensor, " row"]) -> float:
    """How many standard errors the sum of `other` is above the sum of `mine`, from differences per row."""
    gap = other - mine
    noise = float(gap.std()) * len(gap) ** 0.5
    return float(gap.sum()) / noise if noise > 0 else 0.0


def by_row(values: Float[Tensor, " token"], row: Int[Tensor, " token"], rows: int) -> Float[Tensor, " row"]:
    """Sums of each row, on the CPU."""
    wide = values.double().cpu()
    return wide.new_zeros(rows).index_add(0, row.cpu(), wide)
