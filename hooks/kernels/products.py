"""Encode, decode and gather: the three inner loops. Each has a plain twin, a short function that defines its result.

TopK is deterministic: by (value descending, index ascending), so that equal pre-activations give the same set on
every device. bf16 *outputs* would tie at the threshold (about 22 features share the k-th value at the published
size), so pre-activations are always computed with fp32 output (fp64 for fp64 weights).

On the CPU the threshold comes from NumPy's vectorised quickselect, several times faster than `torch.topk` there. On
other devices `torch.topk` finds it; no kernel of our own is written for CUDA.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.kernels.rows_in_place import products, usable
from hooks.types import SparseActs

CAST_CHUNK = 1 << 24  # weight elements upcast at a time: 64 MB of fp32
CAST_BLOCK = 1 << 20  # of a decoder: 4 MB, which a cache holds
CAST_TILE = 1 << 22  # of any other matrix: one buffer of 16 MB, used again and again
FEW = 64  # tokens, up to which a weight's rows are widened in registers
_WORTH_IT = 1 << 18  # multiplications below which compiled threads cost more than they save


def working_dtype(weight: Tensor) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def linear_fp32(
    x: Float[Tensor, "*token d_model"],
    weight: Float[Tensor, "feature d_model"],
    bias: Float[Tensor, " feature"] | None,
) -> Float[Tensor, "*token feature"]:
    """`x @ weight.T + bias` with fp32 accumulation *and* fp32 output, whatever the weights are stored in.

    A half-precision weight is never copied as a whole. On the CPU its rows are widened in registers if there are few
    tokens (numba, `rows_in_place`), else some rows at a time are cast into one buffer. On CUDA the products run in the
    stored precision with fp32 results; x is split into a sum of half-precision numbers, so x is not rounded.
    Gradients flow to x.
    """
    dtype = working_dtype(weight)
    if weight.dtype == dtype:
        out = F.linear(x.to(dtype), weight)
    else:
        flat = rearrange(x, "... d -> (...) d").to(dtype)
        out = _WideLinear.apply(flat, weight).view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias.to(dtype)


class _WideLinear(torch.autograd.Function):
    """`x @ weight.T` for a half-precision weight. Backward keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if weight.is_cuda:
            return _split_product(x, weight.T)
        few = len(x) <= FEW and usable(x.detach(), weight, len(x) * weight.numel(), _WORTH_IT)
        return products(x.detach(), weight) if few else _linear_cast(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return matmul_fp32(gradient, weight), None


def _linear_cast(x: Float[Tensor, "row inner"], weight: Float[Tensor, "outer inner"]) -> Float[Tensor, "row outer"]:
    """The plain twin: some rows of the weight at a time, cast into one buffer."""
    rows = max(1, CAST_TILE // weight.shape[1])
    wide = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=x.dtype, device=weight.device)
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    for part, place in zip(weight.split(rows), out.split(rows, dim=1), strict=True):
        place.copy_(F.linear(x, wide[: len(part)].copy_(part)))
    return out


def _split_product(x: Float[Tensor, "row inner"], matrix: Float[Tensor, "inner outer"]) -> Float[Tensor, "row outer"]:
    """`x @ matrix` on CUDA for a half-precision matrix: x as a sum of half-precision numbers, in one product with fp32
    results, so that the matrix is read once."""
    scale = _row_scale(x) if matrix.dtype == torch.float16 else torch.ones_like(x[:, :1])
    terms = split_terms(x * scale, matrix.dtype)
    product = torch.mm(torch.cat(terms), matrix, out_dtype=x.dtype)
    return torch.stack(product.chunk(len(terms))).sum(0) / scale


def _row_scale(x: Float[Tensor, "row inner"]) -> Float[Tensor, "row 1"]:
    """The power of two that scales a row's largest number to between 2^13 and 2^14. fp16 has no numbers above 65,504,
    and numbers below 2^-14 lose bits."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    return torch.ldexp(torch.ones_like(x[:, :1]), 14 - exponent)


def split_terms(x: Float[Tensor, "row inner"], dtype: torch.dtype) -> list[Float[Tensor, "row inner"]]:
    """Half-precision numbers whose sum is x: three of bf16 (8 bits each), or two of fp16 (11 bits each)."""
    terms, left = [], x
    for _ in range(3 if dtype == torch.bfloat16 else 2):
        terms.append(left.to(dtype))
        left = left - terms[-1].to(x.dtype)
    return terms


def matmul_fp32(x: Float[Tensor, "*row inner"], matrix: Float[Tensor, "inner outer"]) -> Float[Tensor, "*row outer"]:
    """`x @ matrix`, accumulated and returned in the precision of x, which is not rounded.

    A half-precision matrix is not copied as a whole. On the CPU some of its stored rows are cast at a time: they give
    columns of the result if the matrix is stored transposed, else parts of the sum. On CUDA x is split, as in
    `linear_fp32`. No gradient.
    """
    if matrix.dtype == x.dtype:
        return x @ matrix
    if matrix.dtype.itemsize > x.dtype.itemsize or x.dtype.itemsize > 4:
        return x @ matrix.to(x.dtype)
    flat = rearrange(x, "... inner -> (...) inner")
    if matrix.is_cuda:
        out = _split_product(flat, matrix)
    else:
        out = _linear_cast(flat, matrix.T) if matrix.stride(0) == 1 else _summed_cast(flat, matrix)
    return out.view(*x.shape[:-1], matrix.shape[1])


def _summed_cast(x: Float[Tensor, "row inner"], matrix: Float[Tensor, "inner outer"]) -> Float[Tensor, "row outer"]:
    rows = max(1, CAST_TILE // matrix.shape[1])
    wide = torch.empty(min(rows, len(matrix)), matrix.shape[1], dtype=x.dtype, device=x.device)
    out = torch.zeros(len(x), matrix.shape[1], dtype=x.dtype, device=x.device)
    for columns, part in zip(x.split(rows, dim=1), matrix.split(rows), strict=True):
        out.addmm_(columns, wide[: len(part)].copy_(part))
    return out


def topk_mask(pre: Float[Tensor, "*token feature"], k: int) -> Bool[Tensor, "*token feature"]:
    """True for the k largest, ties broken by the lower index. Exactly k per token."""
    if _vectorised(pre):
        flat = rearrange(pre.detach(), "... feature -> (...) feature").numpy()
        return torch.from_numpy(_topk_mask_numpy(flat, k)).view(pre.shape)
    return topk_mask_static(pre, k)


def topk_mask_static(pre: Float[Tensor, "*token feature"], k: int) -> Bool[Tensor, "*token feature"]:
    """The same by tensor operations only. No shape and no branch depends on data, so a CUDA graph can capture it."""
    tau = pre.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = pre > tau, pre == tau
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _vectorised(pre: Tensor) -> bool:
    """Whether NumPy can work on the tensor where it is."""
    return pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.float64)


def largest(pre: Float[Tensor, "*token feature"]) -> float:
    """The largest entry; NaN if any entry is. On the CPU NumPy finds it: for one token that takes a tenth of the time
    that torch needs to dispatch."""
    return float(pre.numpy().max() if _vectorised(pre) else pre.max())


def _topk_mask_numpy(pre: Float[np.ndarray, "token feature"], k: int) -> Bool[np.ndarray, "token feature"]:
    """Quickselect finds the threshold; ties are broken only in rows that have some."""
    threshold = pre.shape[1] - k
    tau = np.partition(pre, threshold, axis=-1)[:, threshold, None]
    keep = pre >= tau
    if np.count_nonzero(keep) != len(pre) * k:
        above, tied = pre > tau, pre == tau
        keep = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdims=True)))
    return keep


def topk_mask_plain(pre: Float[Tensor, "*token feature"], k: int) -> Bool[Tensor, "*token feature"]:
    """The plain twin of `topk_mask`: a stable sort."""
    order = pre.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, order, True)


def select_topk(pre: Float[Tensor, "*token feature"], k: int) -> SparseActs:
    """TopK, then ReLU. Gradients flow to the kept pre-activations; membership itself has none."""
    keep = topk_mask(pre.detach(), k)
    if keep.device.type == "cpu":  # NumPy's search is three times faster than `nonzero`
        kept = torch.from_numpy(np.flatnonzero(keep.numpy())).view(*pre.shape[:-1], k)
        indices = kept % pre.shape[-1]
    else:
        indices = keep.nonzero()[:, -1].view(*pre.shape[:-1], k)
    return SparseActs(pre.gather(-1, indices).relu(), indices)


def select_static(pre: Float[Tensor, "*token feature"], k: int | None) -> SparseActs:
    """`select_topk` without a shape that depends on data. Without TopK every feature has a place, inactive ones too."""
    features = torch.arange(pre.shape[-1], device=pre.device).expand(pre.shape)
    if k is None:
        return SparseActs(pre.relu(), features)
    keep = topk_mask_static(pre, k)
    place = (keep.cumsum(-1) - 1).masked_fill(~keep, k)  # features that are not kept share one extra column at the end
    indices = torch.zeros(*pre.shape[:-1], k + 1, dtype=torch.int64, device=pre.device)
    indices = indices.scatter(-1, place, features)[..., :k]
    return SparseActs(pre.gather(-1, indices).relu(), indices)


def select_relu(pre: Float[Tensor, "*token feature"]) -> SparseActs:
    """Plain ReLU, no TopK: padded with zeros to the densest token."""
    active = pre.detach() > 0
    k = max(1, int(active.sum(-1).max())) if active.numel() else 1
    indices = (~active).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :k].sort(dim=-1).values
    return SparseActs(pre.gather(-1, indices).relu(), indices)


def decode_sparse(
    acts: SparseActs, w_dec: Float[Tensor, "feature d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "*token d_model"]:
    """sum_i a_i d_i + b_dec over the kept features only. Never holds a d_model vector per active feature."""
    dtype = working_dtype(w_dec)
    k = acts.values.shape[-1]
    values, indices = acts.values.to(dtype).reshape(-1, k), acts.indices.reshape(-1, k)
    if w_dec.dtype == dtype:
        out = F.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")
    elif w_dec.is_cuda and len(indices) == 1:
        out = _split_product(values, w_dec[indices[0]])
    elif w_dec.is_cuda:  # gather and cast the rows of a few tokens at a time
        tokens = max(1, CAST_CHUNK // (k * w_dec.shape[1]))
        parts = zip(values.split(tokens), indices.split(tokens), strict=True)
        out = torch.cat([einsum(v, w_dec[i].to(dtype), "token k, token k d -> token d") for v, i in parts])
    else:
        out = _decode_cast(values, indices, w_dec)
    return out.view(*acts.values.shape[:-1], -1) + b_dec.to(dtype)


def _decode_cast(
    values: Float[Tensor, "token k"], indices: Int[Tensor, "token k"], w_dec: Float[Tensor, "feature d_model"]
) -> Float[Tensor, "token d_model"]:
    """Half-precision rows on the CPU, each cast once: all the rows that some token kept, a block at a time."""
    kept, column = indices.unique(return_inverse=True)
    dense = values.new_zeros(len(values), len(kept)).scatter_add(1, column, values)
    rows = max(1, CAST_BLOCK // w_dec.shape[1])
    out = values.new_zeros(len(values), w_dec.shape[1])
    for part, block in zip(kept.split(rows), dense.split(rows, dim=1), strict=True):
        out = out.addmm(block, w_dec[part].to(values.dtype))
    return out


def decode_plain(
    acts: SparseActs, w_dec: Float[Tensor, "feature d_model"], b_dec: Float[Tensor, " d_model"]
) -> Float[Tensor, "*token d_model"]:
    """The plain twin of `decode_sparse`: scatter to dense, one matrix product."""
    dtype = working_dtype(w_dec)
    return acts.dense(len(w_dec)).to(dtype) @ w_dec.to(dtype) + b_dec.to(dtype)


def gather_features(acts: SparseActs, features: Int[Tensor, "*token at"]) -> Float[Tensor, "*token at"]:
    """The activation of the named features at each token; 0 where TopK did not keep them."""
    same = rearrange(acts.indices, "... k -> ... 1 k") == rearrange(features, "... at -> ... at 1")
    return (same * rearrange(acts.values, "... k -> ... 1 k")).sum(-1)


_COUNT_PER_TOKEN = 4  # more features per token than this are looked up in the mask of all


def gather_selected(
    pre: Float[Tensor, "token feature"], token: Int[Tensor, " hit"], feature: Int[Tensor, " hit"], k: int | None
) -> Float[Tensor, " hit"]:
    """The activation of each (token, feature) pair: relu(pre_i) where TopK keeps i, else 0. Nothing is selected.

    Feature i is kept iff #{l : pre_l > pre_i} + #{l < i : pre_l = pre_i} < k, which counting decides in one pass
    over the token's pre-activations. The same as `gather_features` of `select_topk`, to the bit.
    """
    if k is None:
        return pre[token, feature].relu()
    few = len(token) <= _COUNT_PER_TOKEN * len(pre)
    if few and _vectorised(pre) and not pre.requires_grad:
        return torch.from_numpy(_gather_selected_numpy(pre.numpy(), token.tolist(), feature.tolist(), k))
    keep = count_before(pre[token], feature) < k if few else topk_mask(pre, k)[token, feature]
    return torch.where(keep, pre[token, feature], 0).relu()


def count_before(pre: Float[Tensor, "#hit feature"], feature: Int[Tensor, " hit"]) -> Int[Tensor, " hit"]:
    """How many features of its row come before each named one in the order of TopK."""
    named = rearrange(feature, "hit -> hit 1")
    own = pre.expand(len(feature), -1).gather(-1, named)
    lower = torch.arange(pre.shape[1], device=pre.device) < named
    return ((pre > own) | ((pre == own) & lower)).sum(-1)


def _gather_selected_numpy(
    pre: Float[np.ndarray, "token feature"], token: list[int], feature: list[int], k: int
) -> Float[np.ndarray, " hit"]:
    """The same count, pair by pair: an equal value counts only if its index is lower."""
    out = np.zeros(len(token), dtype=pre.dtype)
    for hit, (row, i) in enumerate(zip(token, feature, strict=True)):
        own = pre[row, i]
        if own > 0 and np.count_nonzero(pre[row, :i] >= own) + np.count_nonzero(pre[row, i:] > own) < k:
            out[hit] = own
    return out
