"""Text that a model writes itself: what it was trained on, as far as it shows."""

from typing import Any

import torch
from tqdm import tqdm

from hooks.errors import ModelError
from hooks.host import Host

ROWS = 16  # texts at a time


@torch.no_grad()
def written_by(host: Host, tokens: int, context: int, seed: int, *, progress: bool = False) -> list[list[int]]:
    """Token ids of texts sampled from the model at temperature 1, each begun with its own first token.

    The first token is the tokenizer's BOS, or what ends a text, or else a random one.

    Raises:
        ModelError: the model cannot generate.
    """
    model = host.model
    if not hasattr(model, "generate"):
        raise ModelError(f"a {type(model).__name__} cannot generate", repair="give a text (--text)")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    out: list[list[int]] = []
    try:
        with tqdm(total=tokens, desc="writing", unit="tok", disable=not progress, leave=False) as bar:
            while (have := sum(map(len, out))) < tokens:
                rows = _sampled(host, _first(host), context)
                out += rows
                bar.update(min(tokens, sum(map(len, out))) - have)
    finally:
        torch.random.set_rng_state(state)
    return out


def _first(host: Host) -> torch.Tensor:
    start = getattr(host.tokenizer, "bos_token_id", None)
    ends = sorted(host.end_tokens)
    if start is None and ends:
        start = ends[0]
    if start is None:
        return torch.randint(0, host.d_vocab, (ROWS, 1))
    return torch.full((ROWS, 1), int(start))


def _sampled(host: Host, first: torch.Tensor, context: int) -> list[list[int]]:
    ends = torch.tensor(sorted(host.end_tokens), dtype=torch.int64)
    model: Any = host.model
    made: torch.Tensor = model.generate(
        first.to(host.device),
        attention_mask=torch.ones_like(first).to(host.device),
        max_new_tokens=max(1, context - 1),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=int(ends[0]) if len(ends) else 0,
    )
    rows = []
    for row in made.cpu():
        stop = torch.isin(row[1:], ends).nonzero()
        rows.append(row[: int(stop[0]) + 1 if len(stop) else len(row)].tolist())
    return [row for row in rows if len(row) > 1] or [made[0].tolist()]
