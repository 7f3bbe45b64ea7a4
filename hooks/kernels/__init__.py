"""Functions of tensors only: deterministic TopK, sparse decoding, products with rows of a table."""

from hooks.kernels.products import (
    CAST_BLOCK,
    CAST_CHUNK,
    CAST_TILE,
    FEW,
    count_before,
    decode_sparse,
    gather_features,
    gather_selected,
    largest,
    linear_fp32,
    matmul_fp32,
    select_relu,
    select_static,
    select_topk,
    working_dtype,
)
from hooks.kernels.rows_in_place import INNER, add_products, compiled, cut_blocks, on_every_thread, usable

__all__ = [
    "CAST_BLOCK",
    "CAST_CHUNK",
    "CAST_TILE",
    "FEW",
    "INNER",
    "add_products",
    "compiled",
    "count_before",
    "cut_blocks",
    "decode_sparse",
    "gather_features",
    "gather_selected",
    "largest",
    "linear_fp32",
    "matmul_fp32",
    "on_every_thread",
    "select_relu",
    "select_static",
    "select_topk",
    "usable",
    "working_dtype",
]
