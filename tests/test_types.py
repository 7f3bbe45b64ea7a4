import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks.errors import AddressError
from hooks.types import FeatureAddress, Positions

PARTS = st.one_of(
    st.just("all"),
    st.just("new"),
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
    ],
)  # fmt: skip
def test_positions_of_a_prompt_of_four_and_two_new_tokens(text, hits):
    """-1 is the prompt's last token also while generating; an open slice goes on into the new tokens."""
    mask = Positions.parse(text).mask(0, 6, 4)
    assert mask.nonzero()[:, 0].tolist() == hits


@pytest.mark.parametrize("text", ["", "L3", "3/118", "L3/118@", "L3/118@x", "L3/-1", "L3/118@1:2:3", "l3/118"])
def test_malformed_addresses_are_refused(text):
    with pytest.raises(AddressError, match="expected"):
        FeatureAddress.parse(text)


@pytest.mark.parametrize("text", ["4", "-5", "4:", "2:2", "3:1", "new"])
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
