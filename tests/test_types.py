import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooks.errors import AddressError
from hooks.types import FeatureAddress, Positions

PARTS = st.one_of(
    st.just("all"),
    st.just("prompt"),
    st.just("new"),
    st.sets(st.integers(-9, 9), min_size=1, max_size=4).map(lambda marks: f"{{{','.join(map(str, marks))}}}"),
    st.integers(-9, 9).map(str),
    st.tuples(st.integers(-9, 9) | st.just(""), st.integers(-9, 9) | st.just("")).map(lambda p: f"{p[0]}:{p[1]}"),
)


@given(st.integers(0, 99), st.integers(0, 20000), PARTS)
def test_an_address_survives_text(layer, feature, part):
    address = FeatureAddress.parse(f"L{layer}/{feature}@{part}")
    assert FeatureAddress.parse(str(address)) == address
    assert (address.layer, address.feature) == (layer, feature)


@given(PARTS, st.integers(1, 12), st.integers(0, 6), st.integers(0, 12))
def test_masks_of_pieces_join_to_the_mask_of_the_whole(part, prompt, new, split):
    """Prefill and decoding together hit the same tokens as one pass over everything."""
    positions = Positions.parse(part)
    total = prompt + new
    split = min(split, total)
    whole = positions.mask(0, total, prompt).tolist()
    pieces = positions.mask(0, split, prompt).tolist() + positions.mask(split, total - split, prompt).tolist()
    assert whole == pieces


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("0", [0]), ("-1", [3]), ("3", [3]), ("1:3", [1, 2]), ("-2:", [2, 3, 4, 5]), (":2", [0, 1]),
        ("all", [0, 1, 2, 3, 4, 5]), ("new", [4, 5]), ("4", [4]), (":-1", [0, 1, 2]), (":", [0, 1, 2, 3, 4, 5]),
        ("prompt", [0, 1, 2, 3]), ("{0,3,5}", [0, 3, 5]), ("{ -1, 3 ,4}", [3, 4]), ("{2}", [2]),
    ],
)  # fmt: skip
def test_positions_of_a_prompt_of_four_and_two_new_tokens(text, hits):
    """-1 is the prompt's last token also while generating; an open slice goes on into the new tokens."""
    positions = Positions.parse(text)
    assert positions.mask(0, 6, 4).nonzero()[:, 0].tolist() == hits
    spans = positions.spans(4)
    assert [p for start, stop in spans for p in range(start, 6 if stop is None else stop)] == hits
    assert all(stop is not None and stop < start for (_, stop), (start, _) in itertools.pairwise(spans))  # a gap


@pytest.mark.parametrize(
    "text",
    [
        "",
        "L3",
        "3/118",
        "L3/118@",
        "L3/118@x",
        "L3/-1",
        "L3/118@1:2:3",
        "l3/118",
        "L3/118@{}",
        "L3/118@{1,}",
        "L3/118@{1:2}",
        "L3/118@1,2",
    ],
)
def test_malformed_addresses_are_refused(text):
    with pytest.raises(AddressError, match="expected"):
        FeatureAddress.parse(text)


@pytest.mark.parametrize("text", ["4", "-5", "4:", "2:2", "3:1", "new", "{0,4}", "{-5,0}"])
def test_positions_that_never_occur_in_a_prompt_of_four_are_refused(text):
    with pytest.raises(AddressError):
        Positions.parse(text).check(4, 0, "L0/0")


def test_generated_positions_exist_only_when_tokens_are_generated():
    Positions.parse("5").check(4, 2, "L0/0")
    with pytest.raises(AddressError, match="0 to 5"):
        Positions.parse("6").check(4, 2, "L0/0")


def test_python_forms_are_accepted():
    assert FeatureAddress.of((3, -1, 118)) == FeatureAddress.parse("L3/118@-1")
    assert FeatureAddress.of((3, slice(2, None), 118)) == FeatureAddress.parse("L3/118@2:")
    with pytest.raises(AddressError, match="step"):
        Positions.of(slice(0, 4, 2))


@pytest.mark.parametrize(
    "mask",
    [
        [3, 0, -1, 3], {0, 3, -1}, (-1, 0, 3), np.array([0, 3, -1]), torch.tensor([3, -1, 0]), "{0,3,-1}",
    ],
)  # fmt: skip
def test_a_mask_is_a_set_of_indices(mask):
    assert FeatureAddress.of((3, mask, 118)) == FeatureAddress.parse("L3/118@{-1,0,3}")


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_or_one_bool_per_position(kind):
    assert Positions.of(kind([True, False, False, True])) == Positions.parse("{0,3}")


def test_single_numbers_of_other_libraries_are_indices():
    assert Positions.of(np.int64(3)) == Positions.of(torch.tensor(3)) == Positions.parse("3")


@pytest.mark.parametrize("mask", [[], [False, False], set()])
def test_a_mask_marks_something(mask):
    with pytest.raises(AddressError, match="marks no token"):
        Positions.of(mask)


@pytest.mark.parametrize("mask", [[True, 2], [0.5], ["1"]])
def test_a_mask_is_bools_or_indices(mask):
    with pytest.raises(AddressError, match="cannot read the position mask"):
        Positions.of(mask)


ROWS = [
    (4, 9, 579), [4, 9, 579], torch.tensor([4, 9, 579]), np.array([4, 9, 579]), np.array([4.0, 9.0, 579.0]),
    pd.Series([4.0, 9.0, 579.0]), (np.int32(4), torch.tensor(9), np.float32(579)), (4.0, 9, torch.tensor(579.0)),
    (torch.tensor(4), slice(9.0, 10), 579), "L4/579@9",
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_an_address_is_read_from_a_row_of_any_library(row):
    address = FeatureAddress.of(row)
    assert (address.layer, address.feature) == (4, 579)
    assert address.positions.mask(0, 12, 12).nonzero()[:, 0].tolist() == [9]
    assert (type(address.layer), type(address.feature)) == (int, int)


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor])
@given(st.integers(0, 99), st.integers(-9, 9), st.integers(0, 20000), st.integers(0, 2), st.floats(0.001, 0.999))
def test_whole_numbers_are_read_and_no_other_is_rounded(kind, layer, pos, feature, place, part):
    whole = [float(layer), float(pos), float(feature)]
    assert FeatureAddress.of(kind(whole)) == FeatureAddress.of((layer, pos, feature))
    whole[place] += part
    with pytest.raises(AddressError, match="is not a whole number"):
        FeatureAddress.of(kind(whole))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((4, None, 579), "for every token write `all`"),
        ((4.7, 9, 579.9), "the layer 4.7 is not a whole number"),
        ((4, 9, float("nan")), "the feature nan is not a whole number"),
        ((4, float("inf"), 579), "the position inf is not a whole number"),
        ((4, slice(1.5, None), 579), "the bound 1.5"),
        ((True, 9, 579), "the layer True is not a whole number"),
        (("4", 9, "579"), "the layer '4' is not a whole number"),
        ((4, 579), "cannot read the feature"),
        ((4, 9, 579, 8.0), "cannot read the feature"),
        (torch.zeros(2, 3), "cannot read the feature"),
        (4, "cannot read the feature 4"),
        (None, "cannot read the feature None"),
        (f"L{'9' * 5000}/1", "is beyond any model"),
        (f"L1/{'9' * 5000}@3", "is beyond any model"),
        (f"L1/3@{'9' * 5000}", "is beyond any prompt"),
        ("L1/3" * 2000, "cannot read the feature address"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_address_is_refused_in_few_words(value, text):
    with pytest.raises(AddressError, match="expected") as caught:
        FeatureAddress.of(value)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 300
