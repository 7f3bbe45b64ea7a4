"""How the next token is chosen, and how tokens become text while they come: nothing is shown that may still change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hooks.errors import ModelError, UserError
from hooks.generation.generation_config import SAMPLING, asked_of, check_config
from hooks.whole import whole

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no complete character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy.

    What is not named here is not done: a model's own `temperature`, `top_k` and `top_p` count in `Sampling.of(model)`
    only. Whatever else its generation_config says (`repetition_penalty`, bad words, least lengths) counts always,
    greedy decoding included.

    Attributes:
        top_p: sample from the most likely tokens that hold this much probability.
        top_k: sample from so many of the most likely tokens; 0: from all.
        min_p: leave out tokens below this share of the most likely one's probability.
        repetition_penalty: divides the positive logits of tokens that the text has, prompt included, and multiplies the
            negative ones; None: what the model's generation_config says.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= _real(self.temperature) < math.inf and 0 < _real(self.top_p) <= 1):
            raise UserError(
                f"cannot sample with temperature {self.temperature} and top_p {self.top_p}",
                expected="temperature at least 0, top_p above 0 and at most 1",
            )
        if not abs(whole(self.seed, "seed")) < 1 << 63:
            raise UserError(f"cannot sample with seed {self.seed}", expected="a whole number of 64 bits")
        whole(self.top_k, "top_k", least=0)
        if not 0 <= _real(self.min_p) <= 1:
            raise UserError(f"cannot sample with min_p {self.min_p}", expected="0 to 1")
        if self.repetition_penalty is not None and not 0 < _real(self.repetition_penalty) < math.inf:
            raise UserError(
                f"cannot sample with repetition_penalty {self.repetition_penalty}",
                expected="a number above 0, 1 for none",
            )

    @classmethod
    def of(cls, model: Any, seed: int = 0) -> "Sampling":
        """As the model's own generation_config samples; greedy where it does not sample.

        Args:
            model: a `HookedModel`, or a transformers model.

        Raises:
            ModelError: it samples in a way that is not known here (`typical_p`, `top_h`, `epsilon_cutoff`,
                `eta_cutoff`), or asks for another kind of decoding.
        """
        plain = getattr(getattr(model, "host", None), "model", model)
        check_config(plain)
        _, config = asked_of(plain, [0], 1, LogitsProcessorList())
        if not config.do_sample:
            return cls(seed=seed)
        for name in ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(config, name) not in (None, SAMPLING[name]):
                raise ModelError(
                    f"the model's generation_config samples by {name}, which is not supported here",
                    expected="temperature, top_k, top_p and min_p",
                    found=str(getattr(config, name)),
                    repair="say what you want: Sampling(temperature=0.7, top_p=0.8)",
                )
        top_k = min(config.top_k or 0, plain.config.vocab_size)
        return cls(config.temperature, config.top_p, seed, top_k, config.min_p or 0.0)

    def warpers(self) -> LogitsProcessorList:
        """What transformers does to scores before it samples from them, in its order; nothing where greedy."""
        out = LogitsProcessorList()
        if self.temperature == 0:
            return out
        if self.temperature != 1:
            out.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            out.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p < 1:
            out.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            out.append(MinPLogitsWarper(float(self.min_p)))
        return out

    def pick(self, scores: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
        """The next token, from scores behind the processors and `warpers`. Random numbers belong to token ids, not to
        ranks: a last-bit change of the logits, as another batch shape makes it, moves no other token's chance."""
        if self.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.double().softmax(-1).cpu(), 1, generator=generator))


def _real(value: Any) -> float:
    """A number as a float; NaN, which is in no range, for what is none."""
    return math.nan if isinstance(value, str | bytes | bool) or not isinstance(value, SupportsFloat) else float(value)


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
