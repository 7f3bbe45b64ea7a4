"""The avoidable error: how much of what a decoder leaves unexplained a linear refit of it would explain.

A decoder that was trained on squared error is, on the features and the target it was trained on, the best linear map
there is: its error is uncorrelated with every feature. On other features, or towards another target, it is not. So of
candidates that reconstruct about equally well, the one whose decoder cannot be improved is the one it was trained for.
The error itself is no such test: a target that is easier to hit can have the smaller one.

The refit is a ridge regression of the error on the features, fitted on one half of the rows and judged on the other,
both ways; of `PENALTIES` the best one counts, and where none helps, the decoder is left as it is: nothing is avoidable.
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
    """What a refit of the decoder takes off |x − x_hat|² in each row, over the spread: the sum is in units of FVU.

    Args:
        row: which of the `rows` texts a token is in. Every other text is in the same half.
        spread: sum |x − mean x|² of the target.
    """
    wide, left, odd = features.double(), error.double(), (row % 2 == 1).to(error.device)
    gains = _gain(wide, left, odd) + _gain(wide, left, ~odd)
    gains = torch.cat([gains, torch.zeros_like(gains[:1])])  # with few tokens every refit only adds noise
    return by_row(gains[int(gains.sum(-1).argmax())], row, rows) / spread


def _gain(
    features: Float[Tensor, "token feature"], error: Float[Tensor, "token d_model"], held: Bool[Tensor, " token"]
) -> Float[Tensor, "penalty token"]:
    """What the refit on the other tokens takes off |error|² at the held ones, for every penalty; 0 elsewhere."""
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
    """How many standard errors the other's sum is above mine, compared row by row; positive speaks for mine."""
    gap = other - mine
    noise = float(gap.std()) * len(gap) ** 0.5
    return float(gap.sum()) / noise if noise > 0 else 0.0


def by_row(values: Float[Tensor, " token"], row: Int[Tensor, " token"], rows: int) -> Float[Tensor, " row"]:
    """Sums of each row, on the CPU."""
    wide = values.double().cpu()
    return wide.new_zeros(rows).index_add(0, row.cpu(), wide)
