"""Texts to measure on: from a file, or built in."""

import errno
import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import pandas as pd

from hooks.demo.world import SentenceSource
from hooks.errors import PromptError, first_line
from hooks.host import Prompt

_SAMPLE = Path(__file__).with_name("sample_text.txt")
_SENTENCES = 4096
KEY = "text"


@dataclass(frozen=True)
class Texts:
    """Texts to measure on, and a name for them."""

    name: str
    texts: tuple[Prompt, ...]

    @classmethod
    def built_in(cls, demo: bool) -> "Texts":
        """For the embedded model, new sentences of its own world; for other models, passages in the public domain."""
        if not demo:
            return cls("built-in passages", paragraphs(_SAMPLE.read_text(encoding="utf-8")))
        source = SentenceSource(0, Random("calibration"))
        return cls("sentences of the demo's world", tuple(sentence.text for sentence in islice(source, _SENTENCES)))

    @classmethod
    def of_file(cls, path: Path) -> "Texts":
        """Texts of a file.

        A text file: paragraphs separated by empty lines; without any empty line, one text per line. `.jsonl`: an
        object per line, with the key `text`. `.parquet`: the column `text`.

        Raises:
            PromptError: there is no such file, it is not UTF-8, a line is no such object, the column is
                missing, or parquet needs a package that is not installed.
        """
        suffix = path.suffix.lower()
        try:
            if suffix == ".parquet":
                return cls(path.name, _column(path))
            text = path.read_text(encoding="utf-8")
            return cls(path.name, _objects(text, path) if suffix == ".jsonl" else paragraphs(text))
        except (OSError, UnicodeDecodeError) as error:
            found = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or ""
            raise PromptError(
                f"cannot read the text {path}", expected="a text file in UTF-8", found=found, where="--text"
            ) from None


def _objects(text: str, path: Path) -> tuple[str, ...]:
    """The texts of lines that hold one JSON object each."""
    out = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not isinstance(content.get(KEY), str):
            raise PromptError(
                f"line {number} of {path} holds no text",
                expected=f'a JSON object with the key "{KEY}"',
                found=repr(line[:60]),
                where="--text",
            )
        out.append(content[KEY])
    return tuple(out)


def _column(path: Path) -> tuple[str, ...]:
    """The texts of a parquet file."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        frame = pd.read_parquet(path, columns=[KEY])
    except ImportError:
        raise PromptError("parquet needs pyarrow", repair="pip install 'qwen-circuits[parquet]'") from None
    except Exception as error:  # pyarrow raises many kinds
        raise PromptError(
            f"cannot read the column {KEY} of {path}",
            expected=f"a parquet file with a column of texts called {KEY}",
            found=first_line(error),
            where="--text",
        ) from None
    return tuple(text for text in frame[KEY] if isinstance(text, str))


def paragraphs(text: str) -> tuple[str, ...]:
    """Paragraphs separated by empty lines, each on one line; without any empty line, every line."""
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    whole = [part for part in parts if part]
    return tuple(whole) if len(whole) > 1 else tuple(line.strip() for line in text.splitlines() if line.strip())
