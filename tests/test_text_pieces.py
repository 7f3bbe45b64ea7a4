"""Text comes in pieces that are never taken back, and together they are the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from worlds import word_tokenizer

from hooks import UserError
from hooks.generation import stop_strings
from hooks.generation.sampling import TextPieces

MERGES = [("Ġ", "t"), ("h", "e"), ("Ã", "©"), ("ð", "Ł"), ("Ġt", "he")]  # " t", "he", "é", half an emoji, " the"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as the full-size model has it: a token is any run of bytes, half characters included."""
    vocabulary = {piece: i for i, piece in enumerate([*sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


BYTES, WORDS = byte_tokenizer(), word_tokenizer()


def pieces_of(tokenizer, ids, stops=()):
    """Every piece, the rest at the end, and whether it stopped."""
    pieces = TextPieces(tokenizer.decode, stops)
    out = []
    for token in ids:
        out.append(pieces.take(token))
        if pieces.stopped:
            break
    return [*out, pieces.rest()], pieces.stopped


@given(st.text(alphabet="the é\n€🙂🇩x", max_size=12))
def test_pieces_of_whole_characters_join_to_the_text(text):
    ids = BYTES(text).input_ids
    pieces, _ = pieces_of(BYTES, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing waits behind a complete text


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=14))
def test_pieces_of_any_bytes_join_to_what_the_tokenizer_says(ids):
    """Bytes that are no text too: they come as replacement characters, as soon as that is certain."""
    pieces, _ = pieces_of(BYTES, ids)
    assert "".join(pieces) == BYTES.decode(ids)


@given(st.lists(st.integers(0, 63), max_size=10))
def test_words_keep_the_spaces_between_them(ids):
    """This decoder writes a space between two tokens: one token alone does not show it."""
    assert "".join(pieces_of(WORDS, ids)[0]) == WORDS.decode(ids)


def test_a_character_waits_for_its_last_byte():
    ids = BYTES("a🙂b").input_ids
    assert len(ids) == 5  # a | two bytes merged | one | one | b
    assert pieces_of(BYTES, ids)[0] == ["a", "", "", "🙂", "b", ""]


def test_what_may_begin_a_stop_string_waits():
    ids = [BYTES.convert_tokens_to_ids(c) for c in "abacabx"]
    assert pieces_of(BYTES, ids, ("abx",)) == (["", "", "ab", "ac", "", "", "", ""], True)
    assert pieces_of(BYTES, ids[:6], ("abx",)) == (["", "", "ab", "ac", "", "", "ab"], False)


@given(
    st.text(alphabet="ab🙂", max_size=12),
    st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple),
)
def test_the_text_ends_in_front_of_the_first_stop_string(text, stops):
    """The law: walk through the tokens; at the first whose text contains a stop string, cut in front of it."""
    ids = BYTES(text).input_ids
    expected, number = text, len(ids)
    for count in range(1, len(ids) + 1):
        so_far = BYTES.decode(ids[:count])
        found = [so_far.index(stop) for stop in stops if stop in so_far]
        if found:
            expected, number = so_far[: min(found)], count
            break
    pieces, stopped = pieces_of(BYTES, ids, stops)
    assert "".join(pieces) == expected
    assert stopped == any(stop in text for stop in stops)
    assert len(pieces) == number + 1


@pytest.mark.parametrize("stop", ["", ("",), ("a", "")])
def test_a_stop_string_is_a_text(stop):
    with pytest.raises(UserError, match="cannot stop at"):
        stop_strings(stop)


def test_one_stop_string_need_not_be_a_list():
    assert stop_strings("\n") == ("\n",)
    assert stop_strings(["a", "b"]) == ("a", "b")
    assert stop_strings(()) == ()
