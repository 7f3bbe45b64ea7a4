"""A generation that can be stopped, looked at, steered otherwise, and gone on with: the cache is kept.

Keys and values of position t are made under the edits that were active when t was read. When the edits change, those
from the first position on where old and new differ are stale: they are dropped and read again. So what comes next
equals a fresh start under the new edits on the whole text so far.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from hooks.generation.decoding import Decoding, Generated, Row, Token, advance, check_length, seeded, stream
from hooks.generation.generation_config import check_config
from hooks.generation.sampling import Sampling, stop_strings
from hooks.host import Batch, Host, Precision
from hooks.passes import NEVER, Interventions, as_interventions, listed
from hooks.types import Edit


class Session:
    """One text that grows. Made by `HookedModel.session`.

    Positions keep their meaning throughout: negative ones count from the end of the *first* prompt, `new` is everything
    behind it. Random numbers are drawn on: generating twice 3 tokens equals generating 6.
    """

    def __init__(
        self,
        host: Host,
        batch: Batch,
        make: Callable[[Interventions], list[Edit]],
        interventions: Interventions,
        sampling: Sampling,
        precision: Precision = "native",
    ):
        check_config(host.model)
        self._host, self._make, self._sampling = host, make, sampling
        self._prompt = batch.lengths[0]
        self._interventions = tuple(listed(interventions))
        self._decoding = Decoding(host, batch, make(interventions), precision=precision)
        self._generator = seeded(sampling)

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole text so far, prompt included."""
        return tuple(self._decoding.rows[0])

    @property
    def text(self) -> str:
        """The whole text so far, as the tokenizer writes it, special tokens shown."""
        return self._host.text(self.ids)

    def __repr__(self) -> str:
        """One line: how long the text is, what is active, and how the text ends."""
        count, text = len(self._interventions), self.text
        end = text if len(text) <= 60 else f"…{text[-59:]}"
        return f"Session({len(self.ids)} tokens, {self.cached} cached, {count} interventions: {end!r})"

    @property
    def interventions(self) -> tuple[object, ...]:
        """What is active now."""
        return self._interventions

    @property
    def cached(self) -> int:
        """How many positions need not be read again; the newest token is always still to be read."""
        return self._decoding.cached

    def set(self, interventions: Interventions) -> int:
        """Go on with other interventions, on the whole text so far. The list replaces the old one.

        Returns:
            How many positions are read again with the next token, the newest one included.

        Raises:
            UserError: as `HookedModel.generate`; the session is then as it was.
        """
        edits = self._make(interventions)
        before, after = self._interventions, tuple(listed(interventions))
        self._decoding.crop(first_difference(before, after, self._prompt))
        self._decoding.edits, self._interventions = edits, after
        return len(self.ids) - self.cached

    def generate(self, max_new_tokens: int = 32, *, stop: str | Sequence[str] = ()) -> Generated:
        """Some more tokens. `Generated.prompt` is the text that stood before them.

        Raises:
            UserError: an empty stop string, no token wanted, or more than fit into the context.
        """
        row, before = self._row(max_new_tokens, stop), self.ids
        logits = [passed[0] for passed in advance(self._decoding, [row])]
        return Generated(before, tuple(row.ids), "".join(row.text), torch.stack(logits), row.reason or "length")

    def stream(self, max_new_tokens: int = 32, *, stop: str | Sequence[str] = ()) -> Iterator[Token]:
        """The same, token by token. Tokens that were read belong to the text, wherever the reader stops.

        Raises:
            UserError: as `generate`, at once.
        """
        return stream(self._decoding, self._row(max_new_tokens, stop))

    def _row(self, max_new_tokens: int, stop: str | Sequence[str]) -> Row:
        max_new_tokens = check_length(self._host, len(self.ids), max_new_tokens)
        prompt, before = self.ids[: self._prompt], self.ids[self._prompt :]
        return Row(self._host, self._sampling, self._generator, stop_strings(stop), max_new_tokens, prompt, before)


def first_difference(before: Sequence[object], after: Sequence[object], prompt_length: int) -> int:
    """The first position where two lists of interventions do different things; beyond every position if none."""
    old, new = _switches(before, prompt_length), _switches(after, prompt_length)
    places = [NEVER]
    for key in old.keys() | new.keys():
        # a feature's edit is switched on and off at ascending places; the first place that is not in both decides
        places += set(old.get(key, ())) ^ set(new.get(key, ()))
    return min(places)


def _switches(items: Sequence[object], prompt_length: int) -> dict[object, list[int]]:
    """(feature, what is done to it) → the places where that begins and ends."""
    spans: dict[object, list[tuple[int, int]]] = {}
    for item in as_interventions(items):
        key = (item.address.layer, item.address.feature, item.affine, item.when_inactive)
        here = item.address.positions.spans(prompt_length)
        spans.setdefault(key, []).extend((start, NEVER if stop is None else stop) for start, stop in here)
    out: dict[object, list[int]] = {}
    for edit, pieces in spans.items():
        edges = [edge for piece in pieces for edge in piece]
        out[edit] = sorted(edge for edge in edges if edges.count(edge) == 1)  # twice: one piece goes on where one ends
    return out
