"""Texts as windows of token ids: which are trained on, which are held out, and in which order they are read."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hooks.errors import PromptError
from hooks.host import Host, Prompt

SHORTEST = 8  # tokens of a window; what is left of a text behind its last window is dropped below this
HELD_OUT = 20  # every so manyth text is held out
HELD_OUT_TOKENS = 8192  # of those, at most


@dataclass(frozen=True)
class Windows:
    """Token ids of a text, cut into windows.

    Attributes:
        trained: windows to train on.
        held_out: windows of other texts, to measure on.
        skipped: texts that were empty, or too short for a window.
    """

    trained: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    skipped: int

    @cached_property
    def tokens(self) -> int:
        """Tokens of one reading."""
        return sum(map(len, self.trained))

    @cached_property
    def digest(self) -> str:
        """Tells texts apart, in whatever form they were given."""
        digest = hashlib.sha256()
        for windows in (self.trained, self.held_out):
            for window in windows:
                digest.update(np.asarray([len(window), *window], dtype="<i4").tobytes())
        return digest.hexdigest()


def cut(host: Host, texts: Sequence[Prompt], context: int) -> Windows:
    """Tokenise texts and cut each into windows; a window never holds parts of two texts.

    Raises:
        PromptError: no text is long enough for a window, or all of them are held out.
    """
    context = min(context, host.max_positions)
    trained: list[tuple[int, ...]] = []
    held_out: list[tuple[int, ...]] = []
    skipped, most = 0, max(1, HELD_OUT_TOKENS // context)
    for number, text in enumerate(texts):
        windows = list(_windows(_ids(host, text), context))
        skipped += not windows
        if number % HELD_OUT == HELD_OUT - 1 and len(held_out) < most:
            held_out += windows[: most - len(held_out)]  # the rest of such a text is not trained on either
        else:
            trained += windows
    if not held_out and len(trained) > 1:  # few texts: the last windows
        count = min(most, max(1, len(trained) // HELD_OUT))
        trained, held_out = trained[:-count], trained[-count:]
    if not trained or not held_out:
        raise PromptError(
            "the text is too short to train on",
            expected=f"at least two windows of {SHORTEST} tokens",
            found=f"{len(trained) + len(held_out)} of {len(texts)} texts",
            repair="give a longer text",
        )
    return Windows(tuple(trained), tuple(held_out), skipped)


def _ids(host: Host, text: Prompt) -> list[int]:
    """Token ids of a whole text, which may be longer than the context."""
    return host.text_ids(text) if isinstance(text, str) else host.tokenize(text)


def _windows(ids: Sequence[int], context: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(ids), context):
        if len(ids) - start >= min(SHORTEST, context):
            yield tuple(ids[start : start + context])


def chunks(windows: Windows, tokens: int, chunk: int, seed: int) -> list[list[int]]:
    """Which windows each chunk holds: the text in a random order, read again until there are `tokens` of them."""
    out: list[list[int]] = []
    read, reading = 0, 0
    left = 0  # tokens that the last chunk has room for
    while read < tokens:
        order = list(range(len(windows.trained)))
        random.Random(f"{seed} {reading}").shuffle(order)
        for number in order:
            size = len(windows.trained[number])
            if left < size:
                out.append([])
                left = chunk
            out[-1].append(number)
            left, read = left - size, read + size
            if read >= tokens:
                break
        reading += 1
    return out
