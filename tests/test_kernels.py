"""Fast = plain, ties by index, precision as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.kernels import (
    decode_plain,
    decode_sparse,
    gather_features,
    linear_fp32,
    select_relu,
    select_topk,
    topk_mask,
    topk_mask_plain,
)
from hooks.types import SparseActs


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4), features=st.integers(1, 40), levels=st.integers(1, 6), seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
)  # fmt: skip
def test_topk_is_the_stable_sort_even_when_everything_ties(rows, features, levels, seed, share):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (rows, features), generator=generator).float()
    k = 1 + int(share * (features - 1))
    fast = topk_mask(pre, k)
    assert torch.equal(fast, topk_mask_plain(pre, k))
    assert (fast.sum(-1) == k).all()


def test_ties_fall_to_the_lower_index():
    pre = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    acts = select_topk(pre, 3)
    assert acts.indices.tolist() == [[1, 2, 3]]
    assert acts.values.tolist() == [[3.0, 2.0, 2.0]]


def test_relu_comes_after_topk_so_negative_winners_become_inactive():
    acts = select_topk(torch.tensor([[-1.0, -2.0, 4.0, -3.0]]), 3)
    assert acts.indices.tolist() == [[0, 1, 2]]
    assert acts.values.tolist() == [[0.0, 0.0, 4.0]]


def test_relu_without_topk_keeps_exactly_the_positive_ones():
    pre = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-1.0, -1.0, -1.0, 5.0]])
    acts = select_relu(pre)
    assert acts.values.shape == (2, 2)
    torch.testing.assert_close(acts.dense(4), pre.relu())
    assert select_relu(-torch.ones(2, 3)).dense(3).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sparse_decode_equals_dense_decode(dtype):
    torch.manual_seed(0)
    w_dec, b_dec = torch.randn(50, 12).to(dtype), torch.randn(12).to(dtype)
    acts = select_topk(torch.randn(2, 3, 50).to(torch.float64 if dtype == torch.float64 else torch.float32), 7)
    fast, plain = decode_sparse(acts, w_dec, b_dec), decode_plain(acts, w_dec, b_dec)
    assert fast.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_preactivations_of_bf16_weights_come_out_in_fp32():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 64), torch.randn(5000, 64).bfloat16(), torch.randn(5000).bfloat16()
    out = linear_fp32(x, w, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.double() @ w.double().T + b.double(), rtol=1e-5, atol=1e-4)
    assert len(out[0].unique()) > 4900  # bf16 output would leave a few hundred distinct values


def test_gather_gives_zero_where_topk_did_not_keep():
    acts = SparseActs(torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 4]]))
    assert gather_features(acts, torch.tensor([[4, 0, 1]])).tolist() == [[3.0, 0.0, 2.0]]


def test_gradients_flow_to_kept_preactivations_only():
    pre = torch.tensor([[1.0, 3.0, 2.0, -1.0]], requires_grad=True)
    select_topk(pre, 2).values.sum().backward()
    assert pre.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
