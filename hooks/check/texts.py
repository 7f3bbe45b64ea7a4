"""Texts to measure on: a file's, or what is built in."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from hooks.demo.world import SentenceSource
from hooks.errors import PromptError
from hooks.host import Prompt

_SAMPLE = Path(__file__).with_name("sample_text.txt")
_SENTENCES = 4096


@dataclass(frozen=True)
class Texts:
    """Texts to measure on, and what to call them."""

    name: str
    texts: tuple[Prompt, ...]

    @classmethod
    def built_in(cls, demo: bool) -> "Texts":
        """For the embedded model fresh sentences of its own world; for any other passages in the public domain."""
        if not demo:
            return cls("built-in passages", paragraphs(_SAMPLE.read_text(encoding="utf-8")))
        source = SentenceSource(0, Random("calibration"))
        return cls("sentences of the demo's world", tuple(sentence.text for sentence in islice(source, _SENTENCES)))

    @classmethod
    def of_file(cls, path: Path) -> "Texts":
        """Paragraphs separated by empty lines; without any empty line, one text per line.

        Raises:
            PromptError: there is no such file, or it is not UTF-8.
        """
        try:
            return cls(path.name, paragraphs(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            found = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or ""
            raise PromptError(
                f"cannot read the text {path}", expected="a text file in UTF-8", found=found, where="--text"
            ) from None


def paragraphs(text: str) -> tuple[str, ...]:
    """Paragraphs separated by empty lines, each on one line; without any empty line, every line."""
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    whole = [part for part in parts if part]
    return tuple(whole) if len(whole) > 1 else tuple(line.strip() for line in text.splitlines() if line.strip())
