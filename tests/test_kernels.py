"""Fast = plain, ties by index, precision as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks import Ablate, Add, Clamp, Scale
from hooks.errors import ModelError
from hooks.kernels import (
    count_before,
    decode_sparse,
    gather_features,
    gather_selected,
    linear_fp32,
    select_relu,
    select_static,
    select_topk,
    working_dtype,
)
from hooks.kernels.products import (
    _linear_cast,
    _split_product,
    decode_plain,
    topk_mask,
    topk_mask_plain,
    topk_mask_static,
)
from hooks.passes import NEVER, LayerTable, make_edits, make_plan
from hooks.types import Pass, SparseActs


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
    assert torch.equal(fast, topk_mask_static(pre, k))
    assert (fast.sum(-1) == k).all()
    acts, static = select_topk(pre, k), select_static(pre, k)
    assert torch.equal(static.indices, acts.indices)
    assert torch.equal(static.values, acts.values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_every_precision_and_shape_selects_alike(dtype, shape):
    pre = torch.randn(*shape, 700, generator=torch.Generator().manual_seed(1)).to(dtype)  # bf16: many ties
    assert torch.equal(topk_mask(pre, 84), topk_mask_plain(pre, 84))
    assert select_topk(pre, 84).indices.shape == (*shape, 84)


def test_static_selection_without_topk_has_a_place_for_every_feature():
    pre = torch.tensor([[1.0, -1.0, 2.0]])
    assert select_static(pre, None).values.tolist() == [[1.0, 0.0, 2.0]]
    assert select_static(pre, None).indices.tolist() == [[0, 1, 2]]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 3), features=st.integers(1, 30), levels=st.integers(1, 5), hits=st.integers(1, 25),
    share=st.floats(0, 1), seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_counting_gives_the_activations_that_a_selection_gives(rows, features, levels, hits, share, seed, dtype):
    """Few and many pairs, ties everywhere, repeated pairs; by NumPy, by tensors and by the mask: the same bits."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (rows, features), generator=generator).to(dtype)
    token = torch.randint(rows, (hits,), generator=generator)
    feature = torch.randint(features, (hits,), generator=generator)
    k = 1 + int(share * (features - 1))
    acts = select_topk(pre, k)
    picked = SparseActs(acts.values[token], acts.indices[token])
    slow = gather_features(picked, feature[:, None])[:, 0]
    assert torch.equal(gather_selected(pre, token, feature, k), slow)
    with_gradient = gather_selected(pre.clone().requires_grad_(), token, feature, k)
    assert torch.equal(with_gradient, slow)
    assert torch.equal(gather_selected(pre, token, feature, None), pre[token, feature].relu())
    assert torch.equal(count_before(pre[token], feature) < k, topk_mask_plain(pre, k)[token, feature])


def test_places_in_the_order_of_topk_by_hand():
    """2.0 stands at indices 1, 3 and 4: places 1, 2, 3 behind the 5.0."""
    pre = torch.tensor([[0.0, 2.0, 5.0, 2.0, 2.0, -1.0]])
    assert count_before(pre, torch.arange(6)).tolist() == [4, 1, 0, 2, 3, 5]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_split_product_keeps_what_half_precision_would_round_off(monkeypatch, dtype):
    """On CUDA `mm` takes half-precision factors and gives fp32; here the same in plain fp32."""
    seen = []

    def mm(a, b, *, out_dtype):
        assert a.dtype == b.dtype == dtype
        seen.append(tuple(a.shape))
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(3, 200, generator=generator), torch.randn(200, 50, generator=generator).to(dtype)
    out = _split_product(x, matrix)
    assert out.dtype == torch.float32
    terms = {torch.bfloat16: 3, torch.float16: 2}[dtype]
    assert seen == [(3 * terms, 200)]  # one product: the matrix is read once
    exact = x.double() @ matrix.double()
    # three numbers of 8 (bf16) or two of 11 (fp16) bits hold at least 22 bits of each entry; 200 summands of about 1
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=200 * 2**-22)
    assert (out - exact).abs().max() < (x.to(dtype).double() @ matrix.double() - exact).abs().max() / 500


def test_the_split_product_of_numbers_beyond_fp16s_range(monkeypatch):
    """fp16 ends at 65,504 and loses bits below 2^-14: rows are brought into its range by powers of two."""
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, generator=generator) * torch.tensor([1e7, 1.0, 1e-7])[:, None]
    x[1] = 0
    matrix = torch.randn(200, 50, generator=generator).half()
    exact = x.double() @ matrix.double()
    out = _split_product(x, matrix)
    assert (out[1] == 0).all()
    assert ((out - exact).abs()[[0, 2]].amax(1) < 1e-5 * exact.abs()[[0, 2]].amax(1)).all()


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_wide_products_of_bf16_rows_in_place_equal_the_plain_twin(rows):
    """Compiled where there is numba and a register's worth of columns; cast tile by tile elsewhere."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 160, generator=generator), torch.randn(1700, 160, generator=generator).bfloat16()
    out = linear_fp32(x, weight, None)
    torch.testing.assert_close(out, _linear_cast(x, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def test_gather_gives_zero_where_topk_did_not_keep():
    acts = SparseActs(torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 4]]))
    assert gather_features(acts, torch.tensor([[4, 0, 1]])).tolist() == [[3.0, 0.0, 2.0]]


def test_gradients_flow_to_kept_preactivations_only():
    pre = torch.tensor([[1.0, 3.0, 2.0, -1.0]], requires_grad=True)
    select_topk(pre, 2).values.sum().backward()
    assert pre.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


# -- edits by counting -------------------------------------------------------------------------------------------


def slow_edit(model, plan, x, at):
    """The whole selection, then each entry at each of its tokens, one after the other."""
    (layer,) = plan.tables
    table, transcoder = plan.tables[layer], model.store[layer]
    count = x.shape[1]
    flat, dtype = x.reshape(-1, x.shape[-1]), working_dtype(transcoder.W_dec)
    entry, tokens = table.hits(at, count)
    delta = torch.zeros(len(flat), x.shape[-1], dtype=dtype)
    touched = tokens.unique()
    acts = transcoder.encode(flat[touched])
    for e, t in zip(entry.tolist(), tokens.tolist(), strict=True):
        own = touched.tolist().index(t)
        old = gather_features(SparseActs(acts.values[own], acts.indices[own]), table.features[e][None])[0].double()
        change = table.factor[e] * old + table.shift[e] - old
        if not (table.skip_inactive[e] and old == 0):
            delta[t] += change.to(dtype) * transcoder.W_dec[table.features[e]].to(dtype)
    out = flat.clone()
    out[touched] = (flat[touched].to(dtype) + delta[touched]).to(x.dtype)
    return out.view_as(x)


@pytest.mark.parametrize("first", [0, 6, 7, 20])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_edit_is_the_slow_one_bit_for_bit(odd, first, rows):
    """Prompt passes and decode steps; rows in and out of order; several entries at a token, and tokens with none."""
    plans = [
        [Clamp("L1/7@new", 3.0), Add("L1/8@4:", -0.5, when_inactive="skip"), Scale("L1/9", 2.0)],
        [Ablate("L1/7@2:4")],
        [Add("L1/3", 1.5)],
    ]
    plan = make_plan(odd.store, plans[:rows][::-1], [6] * rows, new_tokens=30)
    (edit,) = make_edits(odd.store, plan)
    x = torch.randn(rows, 6 if first == 0 else 1, 40, generator=torch.Generator().manual_seed(first))
    for _ in range(2):  # what was laid out at the first step serves the second
        at = Pass(first, [6] * rows)
        assert torch.equal(edit.apply(x, at), slow_edit(odd, plan, x, at))


def test_a_decode_step_outside_all_spans_changes_nothing(odd):
    plan = make_plan(odd.store, [[Clamp("L1/7@2:4", 3.0)]], [6], new_tokens=9)
    (edit,) = make_edits(odd.store, plan)
    x = torch.randn(1, 1, 40)
    assert edit.apply(x, Pass(8, [6])) is x
    assert edit.apply(x, Pass(3, [6])) is not x


def test_hits_of_a_step_are_those_of_a_pass_over_one_token():
    table = LayerTable(
        rows=torch.tensor([1, 0, 1]), features=torch.tensor([4, 5, 6]), factor=torch.zeros(3).double(),
        shift=torch.ones(3).double(), skip_inactive=torch.tensor([False, True, False]),
        start=torch.tensor([0, 3, 9]), stop=torch.tensor([5, NEVER, NEVER]),
    )  # fmt: skip
    for first in range(12):
        entry, flat = table.hits(Pass(first, [3, 3]), 1)
        touched = table.touched(Pass(first, [3, 3]), 1)
        if touched is None:
            assert not len(entry)
            continue
        assert touched.tokens[touched.where].tolist() == flat.tolist()
        assert touched.features.tolist() == table.features[entry].tolist()


@pytest.mark.parametrize("mask", ["frozen", "live"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_that_is_no_number_is_refused_by_every_edit(odd, mask, count):
    plan = make_plan(odd.store, [[Ablate("L1/7")]], [3], new_tokens=5, mask=mask)
    (edit,) = make_edits(odd.store, plan)
    x = torch.zeros(1, count, 40)
    x[0, -1, 5] = torch.nan
    with pytest.raises(ModelError, match="not a number"):
        edit.apply(x, Pass(3, [3]))
