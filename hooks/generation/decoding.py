"""Token by token, with a key/value cache, edits at absolute positions.

An edit that hits position t changes the keys and values that later tokens see, and the cache keeps them, so a run with
cache equals one that recomputes everything. Hooks are attached for the length of one pass, never between two: whoever
holds a half-read stream has the plain model.

prompts → rows of tokens, padded on the left → pass → logits → one more token per row → pass → …
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from hooks.errors import ModelError, PromptError, UserError
from hooks.generation.generation_config import Processing
from hooks.generation.observe import Observer
from hooks.generation.sampling import Sampling, TextPieces
from hooks.host import Batch, Host, Precision, computing
from hooks.renamed import deprecated
from hooks.types import Edit, SparseActs
from hooks.whole import whole

Reason = Literal["length", "end", "stop"]


@dataclass(frozen=True)
class Token:
    """One new token, as it comes.

    Attributes:
        text: what can be shown now. Empty while a character is incomplete or a stop string may have begun; the pieces
            of a generation join to its text.
        logprob: log-probability that the edited model gave it, in nats, at temperature 1.
        pos: its place behind the row's first token.
        reason: why it is the last one; None if it is not.
    """

    id: int
    text: str
    logprob: float
    pos: int
    reason: Reason | None

    @property
    def position(self) -> int:
        """The earlier name of `pos`."""
        deprecated("position", "pos")
        return self.pos


@dataclass(frozen=True)
class Generated:
    """New tokens behind a prompt.

    Attributes:
        prompt: ids of the prompt.
        ids: ids of the new tokens, the end token or what belongs to a stop string included if it came.
        text: the new tokens as text, cut in front of a stop string.
        logits: what each new token was chosen from.
        reason: what ended it: `length`, the model's `end` token, or a `stop` string.
        features: per observed layer, the features of every token, prompt and new.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logits: Float[Tensor, "new vocab"]
    reason: Reason = "length"
    features: Mapping[int, SparseActs] = field(default_factory=dict)

    @property
    def logprobs(self) -> Float[Tensor, " new"]:
        """Log-probability that the edited model gave each new token, in nats, at temperature 1."""
        chosen = torch.tensor(self.ids, dtype=torch.int64, device=self.logits.device)[:, None]
        return self.logits.double().log_softmax(-1).gather(-1, chosen)[:, 0]


class Decoding:
    """Rows of tokens that grow, and what the cache holds of them.

    Attributes:
        rows: the tokens of each row, padding in front included.
        pads: padding in front of each row; edits count columns, so positions are shifted by as much.
        edits: attached for each pass; to change them, `crop` to the first column where they differ.
    """

    def __init__(
        self,
        host: Host,
        batch: Batch,
        edits: Sequence[Edit],
        *,
        use_cache: bool = True,
        precision: Precision = "native",
    ):
        self._host, self._use_cache, self._precision = host, use_cache, precision
        self.lengths, self.pads = batch.lengths, batch.left_pads
        # any token will do as padding; the row's own first one is sure to be harmless
        real = [row[:length] for row, length in zip(batch.ids.tolist(), batch.lengths, strict=True)]
        self.rows = [row[:1] * pad + row for row, pad in zip(real, self.pads, strict=True)]
        self.edits = list(edits)
        self._cache = self._empty()

    def _empty(self) -> DynamicCache | None:
        return DynamicCache(config=self._host.model.config) if self._use_cache else None  # type: ignore[arg-type]

    @property
    def cached(self) -> int:
        """Columns whose keys and values are kept."""
        return self._cache.get_seq_length() if self._cache is not None else 0

    def logits(self) -> Float[Tensor, "batch vocab"]:
        """What comes next in every row, after feeding the columns that the cache does not hold yet."""
        self.crop(len(self.rows[0]) - 1)  # the last token has to be read for its logits
        feed = torch.tensor([row[self.cached :] for row in self.rows])
        try:
            computes = computing(self._host, self._precision)
            with computes, self._host.attached(self.edits) as session, torch.no_grad():
                return session.step(feed, self._cache, self.lengths, self.pads)
        except BaseException:  # an interrupted pass leaves some layers' caches longer than others
            self._cache = self._empty()
            raise

    def append(self, tokens: Sequence[int]) -> None:
        """One more token per row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)

    def crop(self, columns: int) -> None:
        """Forget keys and values from this column on."""
        if self._cache is None or columns >= self.cached:
            return
        if columns <= 0 or not all(map(_keeps_all, self._cache.layers)):
            self._cache = self._empty()
        else:
            self._cache.crop(columns - self.cached)


def _keeps_all(layer: Any) -> bool:
    """Whether a layer's cache can go back to fewer tokens: a sliding window has dropped some, linear attention has one
    state for all of them."""
    return not getattr(layer, "is_sliding", False) and not hasattr(layer, "recurrent_states")


class Row:
    """One row's new tokens, chosen without a look at the other rows, as the model's generation_config says.

    Args:
        prompt: its tokens, no padding.
        before: tokens behind the prompt that were chosen earlier.

    Raises:
        ModelError: the generation_config asks for what is not done here.
    """

    def __init__(
        self,
        host: Host,
        sampling: Sampling,
        generator: torch.Generator,
        stops: tuple[str, ...],
        room: int,
        prompt: Sequence[int],
        before: Sequence[int] = (),
    ):
        self._ends, self._room, self._before = host.end_tokens, room, list(before)
        self._sampling, self._generator = sampling, generator
        longest = len(self._before) + room
        self._processing = Processing(host, prompt, longest, sampling.warpers(), sampling.repetition_penalty)
        self._pieces = TextPieces(host.text, (*stops, *self._processing.stops))
        self.ids: list[int] = []
        self.text: list[str] = []
        self.reason: Reason | None = None

    def take(self, logits: Float[Tensor, " vocab"]) -> int:
        """Choose the next token.

        Raises:
            ModelError: a logit is not a number, or the generation_config leaves no token to choose from.
        """
        peak = float(logits.max())  # NaN if there is one
        if not math.isfinite(peak):
            raise ModelError(
                f"the logits behind {len(self.ids)} new tokens are not finite",
                found=str(peak),
                repair="weaken the interventions, or run the model in bfloat16 or float32 (fp16 overflows easily)",
            )
        scores = self._processing.scores([*self._before, *self.ids], logits)
        token = self._sampling.pick(scores, self._generator)
        self.ids.append(token)
        piece = self._pieces.take(token)
        if self._pieces.stopped or self._processing.stopped([*self._before, *self.ids]):
            self.reason = "stop"
        elif token in self._ends:
            self.reason = "end"
        elif len(self.ids) == self._room:
            self.reason = "length"
        if self.reason:
            piece += self._pieces.rest()
        self.text.append(piece)
        return token

    def newest(self, logits: Float[Tensor, " vocab"], pos: int) -> Token:
        """The token that was taken last, from these logits, and is now at `pos`."""
        logprob = float(logits.double().log_softmax(-1)[self.ids[-1]])
        return Token(self.ids[-1], self.text[-1], logprob, pos, self.reason)


def advance(decoding: Decoding, rows: Sequence[Row]) -> Iterator[Float[Tensor, "batch vocab"]]:
    """Pass by pass until every row is done; yields what the tokens just appended were chosen from.

    A row that is done goes on with its last token repeated, and nobody looks at it: nothing of it reaches the others.
    """
    while any(row.reason is None for row in rows):
        logits = decoding.logits()
        decoding.append([row.ids[-1] if row.reason else row.take(logits[i]) for i, row in enumerate(rows)])
        yield logits


def check_length(host: Host, length: int, max_new_tokens: int) -> int:
    """The number of new tokens; refuses what cannot fit, before the model runs.

    Raises:
        UserError: not a single token is wanted, or no whole number of them.
        PromptError: prompt and new tokens together exceed the context.
    """
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", most=1 << 62)
    if max_new_tokens < 1:
        raise UserError(f"cannot generate {max_new_tokens} tokens", expected="at least 1")
    if length + max_new_tokens > host.max_positions:
        raise PromptError(
            f"{length} prompt tokens and {max_new_tokens} new ones do not fit",
            expected=f"at most {host.max_positions} together, the model's context",
            repair="lower --max-new-tokens, shorten the prompt, or say how far the model reads: context=N, --context N",
        )
    return max_new_tokens


def generate(
    host: Host,
    batch: Batch,
    edits: Sequence[Edit],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    stops: tuple[str, ...] = (),
    observer: Observer | None = None,
    use_cache: bool = True,
    precision: Precision = "native",
) -> list[Generated]:
    """Continue every prompt of a batch, each as if it were alone. `edits` count columns, see `Batch.left_pads`.

    Raises:
        UserError: not one sampling per prompt.
        PromptError: a prompt and its new tokens together exceed the context.
        ModelError: the model's logits are not numbers.
    """
    max_new_tokens = check_length(host, max(batch.lengths), max_new_tokens)
    samplings = [sampling] * len(batch.lengths) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(batch.lengths):
        raise UserError(f"{len(samplings)} samplings for {len(batch.lengths)} prompts", expected="one, or one each")
    watching = observer.edits() if observer else []
    decoding = Decoding(host, batch, [*watching, *edits], use_cache=use_cache, precision=precision)
    rows = [
        Row(host, own, seeded(own), stops, max_new_tokens, row[pad:])
        for own, row, pad in zip(samplings, decoding.rows, decoding.pads, strict=True)
    ]
    passes = list(advance(decoding, rows))
    if observer:
        decoding.logits()  # the last tokens have been chosen, but not read
    out = []
    for i, row in enumerate(rows):
        pad, length = decoding.pads[i], batch.lengths[i]
        end = pad + length + len(row.ids)
        logits = torch.stack([logits[i] for logits in passes[: len(row.ids)]])
        features = observer.features(i, pad, end) if observer else {}
        prompt = tuple(decoding.rows[i][pad : pad + length])
        out.append(Generated(prompt, tuple(row.ids), "".join(row.text), logits, row.reason or "length", features))
    return out


def stream(decoding: Decoding, row: Row) -> Iterator[Token]:
    """The new tokens of a single row, as they come. Whoever stops reading leaves nothing attached."""
    for logits in advance(decoding, [row]):
        yield row.newest(logits[0], len(decoding.rows[0]) - 1)


def seeded(sampling: Sampling) -> torch.Generator:
    """A row's random numbers: they depend on the seed alone, not on the other rows."""
    return torch.Generator().manual_seed(sampling.seed)
