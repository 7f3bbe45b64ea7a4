"""Stored tensors → the fields of `Transcoder`, where a format stores something else; computed in fp32 at least."""

import torch
from einops import rearrange
from torch import Tensor

from hooks.kernels import working_dtype


def fold_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """relu(r W x + b_mag), r = exp(r_mag), where W x + b_gate > 0: where r W x + b_mag is above b_mag − r b_gate.

    The equivalence is that of Rajamanoharan et al. 2024 (arXiv 2404.16014). Below a threshold of 0 the ReLU decides.
    """
    dtype = working_dtype(weights["W_enc"])
    W_enc, b_gate, r_mag, b_mag = (weights[name].to(dtype) for name in ("W_enc", "b_gate", "r_mag", "b_mag"))
    r = r_mag.exp()
    kept = {name: weight for name, weight in weights.items() if name not in ("b_gate", "r_mag", "b_mag")}
    folded = {"W_enc": W_enc * _column(r), "b_enc": b_mag, "threshold": (b_mag - r * b_gate).clamp_min(0)}
    return kept | folded


def lift_threshold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAELens applies ReLU too, so a threshold below 0 is one of 0."""
    return weights | {"threshold": weights["threshold"].clamp_min(0)}


def fold_decoder_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """TopK selects pre · ‖decoder row‖, and the decoder is used at norm 1: the same, with the norms in the encoder.

    A row of zeros stays one; SAELens divides by its norm, so such a feature must never be active.
    """
    dtype = working_dtype(weights["W_enc"])
    W_enc, b_enc, W_dec = (weights[name].to(dtype) for name in ("W_enc", "b_enc", "W_dec"))
    norm = W_dec.norm(dim=-1)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    return weights | {"W_enc": W_enc * _column(norm), "b_enc": b_enc * norm, "W_dec": W_dec * _column(inverse)}


def add_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A norm without a weight of its own, as `ln2.hook_normalized` means it."""
    return weights | {"norm_weight": torch.ones_like(weights["b_dec"])}


def _column(vector: Tensor) -> Tensor:
    return rearrange(vector, "feature -> feature 1")
