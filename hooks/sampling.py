"""How the next token is chosen, and how tokens become text while they come: nothing is shown that may still change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UserError
from hooks.whole import whole

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no complete character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise UserError(
                f"cannot sample with temperature {self.temperature} and top_p {self.top_p}",
                expected="temperature at least 0, top_p above 0 and at most 1",
            )
        if not abs(whole(self.seed, "seed")) < 1 << 63:
            raise UserError(f"cannot sample with seed {self.seed}", expected="a whole number of 64 bits")

    def pick(self, logits: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
        """The next token. Random numbers belong to token ids, not to ranks: a last-bit change of the logits, as
        another batch shape makes it, moves no other token's chance."""
        if self.temperature == 0:
            return int(logits.argmax())
        probs = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            # a token below this share, and all behind it, together hold less than 1 − top_p: no need to sort them
            likely = (probs >= (1 - self.top_p) / len(probs)).nonzero()[:, 0]
            ordered, order = probs[likely].sort(descending=True, stable=True)
            kept = ordered.cumsum(-1) - ordered < self.top_p
            probs = torch.zeros_like(probs).index_copy(0, likely[order], ordered * kept)
        return int(torch.multinomial(probs.cpu(), 1, generator=generator))


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One or several texts that end a generation.

    Raises:
        UserError: one of them is empty: every text contains it.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not text:
            raise UserError(f"cannot stop at {text!r}", expected="a text of at least one character", where="stop")
    return stops


class TextPieces:
    """The text of tokens that come one by one, in pieces that never have to be taken back.

    A character whose bytes are spread over several tokens waits for the last of them, and what may be the beginning
    of a stop string waits until it is one or is not.

    Attributes:
        stopped: a stop string came; the text ends in front of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: tuple[str, ...] = ()):
        self._decode, self._stops = decode, stops
        self._window: list[int] = []  # the last tokens: a tokenizer may write a token's space by what stands before
        self._settled = 0  # tokens of the window whose text is complete
        self._read = 0  # characters of the window's text that were taken
        self._held = ""  # taken, but possibly the beginning of a stop string
        self.stopped = False

    def take(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = text.rstrip(_INCOMPLETE)
        self._held += certain[self._read :]
        self._read = max(self._read, len(certain))
        if certain == text:  # a clean end: everything before the previous one can go
            self._window = self._window[self._settled :]
            self._settled, self._read = len(self._window), len(self._decode(self._window))
        return self._release()

    def rest(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        self._held += self._decode(self._window)[self._read :]
        piece = self._release()
        return piece + ("" if self.stopped else self._held)

    def _release(self) -> str:
        found = [self._held.find(stop) for stop in self._stops]
        self.stopped = any(at >= 0 for at in found)
        if self.stopped:
            return self._held[: min(at for at in found if at >= 0)]
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        ready = len(self._held) - max(lengths, default=0)
        piece, self._held = self._held[:ready], self._held[ready:]
        return piece
