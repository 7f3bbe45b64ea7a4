"""What is printed for people never acts on their terminal."""

import argparse
import json
import re
import unicodedata

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

import circuits.commands._options as options
from circuits.cli import main
from circuits.commands._output import say, show, table
from hooks import HookedModel
from hooks.errors import PromptError, printable

ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


@given(st.text(st.characters(exclude_categories=[])))
def test_what_is_printed_has_no_control_characters_and_is_else_the_same(text):
    shown = printable(text)
    assert not ACTING.search(shown)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in shown)
    shown.encode("utf-8")
    assert printable(shown) == shown
    if not ACTING.search(text) and not set(text) & {"\u2028", "\u2029"}:
        assert shown == text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb", "a\\rb"),
        ("\udcff", "\\udcff"),
        ("\u202eabc", "\\u202eabc"),
        ("two\nlines\tand 日本語 é 👩‍👩‍👧", "two\nlines\tand 日本語 é 👩‍👩‍👧"),
    ],
)
def test_known_sequences(raw, shown, capsys):
    assert printable(raw) == shown
    show(argparse.Namespace(json=False), raw)
    say(raw)
    assert capsys.readouterr() == (f"{shown}\n", f"{shown}\n")
    assert str(PromptError("p", found=raw)) == f"p\n  found: {shown}"


def test_tables_are_as_wide_as_what_they_show():
    lines = table(pd.DataFrame({"token": ["\x1b[31m", "b"], "n": [1, 2]})).splitlines()
    assert "\\x1b[31m" in lines[1]
    assert len(set(map(len, lines))) == 1


def test_tokens_of_a_model_reach_no_terminal_raw(monkeypatch, capsys):
    """A tokenizer may call its tokens what it likes."""

    class Loud:
        def __init__(self):
            self._inner = word_tokenizer()

        def __call__(self, text, **options):
            return self._inner(text, **options)

        def decode(self, ids):
            return "".join(f"\x1b[3{i % 8}m\x9b\x07w{i}" for i in ids)

    model = HookedModel.from_model(random_qwen2(), Loud(), [random_transcoder(0, 40)])
    monkeypatch.setattr(options.HookedModel, "load", lambda *_, **__: model)
    feature = int(random_hooked().record("w1 w2").layers[0].acts.indices[0, -1, 0])
    for words in (
        ["features", "w1 w2"],
        ["ablate", "w1 w2", "--feature", f"L0/{feature}"],
        ["steer", "w1 w2", "--set", f"L0/{feature}=4", "--max-new-tokens", "3"],
        ["sweep", "w1 w2", "--group", f"L0/{feature}"],
    ):
        assert main(words) == 0, capsys.readouterr().err
        out = capsys.readouterr()
        assert not ACTING.search(out.out), words
        assert "\\x1b[3" in out.out, words
        assert main([*words, "--json"]) == 0
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("option", ["--target", "--against"])
def test_bytes_that_are_no_text_as_a_target_are_one_sentence(option, capsys):
    beside = [] if option == "--target" else ["--target", "Austin"]
    words = ["ablate", "fact: Dallas is in", "--feature", "L3/118", *beside, option, "\udcff"]
    assert main(words) == 2
    assert "error: the target is not valid text\n  found: '\\udcff'" in capsys.readouterr().err
