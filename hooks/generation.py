"""Token by token, with a key/value cache, edits at absolute positions.

An edit that hits position t changes the keys and values that later tokens see, and the cache keeps them, so a run with
cache equals one that recomputes everything. Edits are attached once for the whole generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from hooks.errors import PromptError, UserError
from hooks.host import Attached, Batch, Host
from hooks.types import Edit

Step = Callable[[list[int]], Tensor]
"""New tokens so far → logits of the next one."""


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
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                f"cannot sample with temperature {self.temperature} and top_p {self.top_p}",
                expected="temperature at least 0, top_p above 0 and at most 1",
            )

    def pick(self, logits: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
        """The next token."""
        if self.temperature == 0:
            return int(logits.argmax())
        probs, order = (logits.double() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        probs = probs.where(probs.cumsum(-1) - probs < self.top_p, torch.zeros_like(probs))
        return int(order[torch.multinomial(probs.cpu(), 1, generator=generator)])


@dataclass(frozen=True)
class Generated:
    """New tokens behind a prompt.

    Attributes:
        prompt: ids of the prompt.
        ids: ids of the new tokens, the end token included if it came.
        text: the new tokens as text.
        logits: what each new token was chosen from.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    logits: Float[Tensor, "new vocab"]


def generate(
    host: Host,
    batch: Batch,
    edits: Sequence[Edit],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    use_cache: bool = True,
) -> Generated:
    """Continue one prompt.

    Raises:
        PromptError: prompt and new tokens together exceed the context.
    """
    length = batch.lengths[0]
    if length + max_new_tokens > host.max_positions:
        raise PromptError(
            f"{length} prompt tokens and {max_new_tokens} new ones do not fit",
            expected=f"at most {host.max_positions} together, the model's context",
            repair="lower --max-new-tokens or shorten the prompt",
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    rows: list[Tensor] = []
    ids: list[int] = []
    with host.attached(edits) as session, torch.no_grad():
        step = _cached(session, host, batch) if use_cache else _uncached(session, batch)
        while len(ids) < max_new_tokens:
            rows.append(step(ids))
            ids.append(sampling.pick(rows[-1], generator))
            if ids[-1] in host.end_tokens:
                break
    prompt = tuple(batch.ids[0].tolist())
    logits = torch.stack(rows) if rows else torch.zeros(0, host.d_vocab)
    return Generated(prompt, tuple(ids), host.text(ids), logits)


def _cached(session: Attached, host: Host, batch: Batch) -> Step:
    cache = DynamicCache(config=host.model.config)  # type: ignore[arg-type]

    def step(ids: list[int]) -> Float[Tensor, " vocab"]:
        feed: Int[Tensor, "1 pos"] = torch.tensor([ids[-1:]]) if ids else batch.ids
        return session.step(feed, cache, batch.lengths[0])[0]

    return step


def _uncached(session: Attached, batch: Batch) -> Step:
    def step(ids: list[int]) -> Float[Tensor, " vocab"]:
        whole = torch.cat([batch.ids, torch.tensor([ids], dtype=torch.int64)], dim=1)
        grown = Batch(whole, (whole.shape[1],), batch.strings)
        return session.run(grown, prompt_lengths=batch.lengths)[0, -1]

    return step
