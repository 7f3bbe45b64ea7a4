"""Stored tensors → the fields of `Transcoder`, for formats that store other tensors; computed in fp32 at least."""

import torch
from einops import rearrange
from torch import Tensor

from hooks.kernels import working_dtype


def fold_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """relu(r W x + b_mag), r = exp(r_mag), where W x + b_gate > 0: where r W x + b_mag is above b_mag − r b_gate.

    The equivalence is that of Rajamanoharan et al. 2024 (arXiv 2404.16014). Below a threshold of 0 the ReLU decides.
    """
    dtype = working_dtype(weights["W_enc"])
    b_gate, r_mag, b_mag = (weights[name].to(dtype) for name in ("b_gate", "r_mag", "b_mag"))
    r = r_mag.exp()
    kept = {name: weight for name, weight in weights.items() if name not in ("b_gate", "r_mag", "b_mag")}
    folded = {"W_enc": _scaled(weights["W_enc"], r), "b_enc": b_mag, "threshold": (b_mag - r * b_gate).clamp_min(0)}
    return kept | folded


def lift_threshold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAELens applies ReLU too, so a threshold below 0 becomes 0."""
    return weights | {"threshold": weights["threshold"].clamp_min(0)}


def fold_decoder_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """TopK selects by pre · ‖decoder row‖, and decoder rows are used with norm 1. The result is the same if the norms
    are multiplied into the encoder.

    A row of zeros stays zero; SAELens divides by its norm, so such a feature must never be active.
    """
    dtype = working_dtype(weights["W_enc"])
    W_enc, b_enc, W_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec"))
    norm = W_dec.to(dtype).norm(dim=-1)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    scaled = {"W_enc": _scaled(W_enc, norm), "b_enc": b_enc.to(dtype) * norm, "W_dec": _scaled(W_dec, inverse)}
    return weights | scaled


def add_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a norm without a weight, as `ln2.hook_normalized` means."""
    return weights | {"norm_weight": torch.ones_like(weights["b_dec"])}


def _scaled(rows: Tensor, by: Tensor) -> Tensor:
    """Each row times its number in `by`, in the rows' precision; a matrix that has to be cast is copied only once."""
    wide = rows.to(by.dtype)
    return wide * _column(by) if wide is rows else wide.mul_(_column(by))


def _column(vector: Tensor) -> Tensor:
    return rearrange(vector, "feature -> feature 1")
