"""Texts are run through the model block by block: the tensors at every site around one layer, for all tokens at once.

texts → rows of tokens → stream before block 0 → block by block; the sites of a few blocks are kept, then dropped

Every block runs once over all tokens, so a set of transcoders is measured with each of them loaded once, and memory
does not grow with the number of blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import PromptError
from hooks.host import Batch, Host, Prompt, tap
from hooks.sites import Site
from hooks.types import Edit, Pass

ROW = 128  # tokens: longer texts are cut
_TOKENS_AT_ONCE = 8192  # in one pass of a block, padding included
_INSIDE = ("attn_out", "resid_mid", "mlp_in", "mlp_out")

Streams = dict[Site, Float[Tensor, "token d_model"]]


@dataclass(frozen=True)
class TextRows:
    """Rows of tokens. Each row is a text or a piece of one, padded on the right within its batch."""

    batches: tuple[Batch, ...]

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return sum(sum(batch.lengths) for batch in self.batches)

    @property
    def row(self) -> Int[Tensor, " token"]:
        """The row of each token."""
        lengths = [length for batch in self.batches for length in batch.lengths]
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def head(self, tokens: int) -> "TextRows":
        """Whole rows, evenly spaced among all rows, with about so many tokens in total; at least one row."""
        rows = [ids[:length] for batch in self.batches for ids, length in zip(batch.ids, batch.lengths, strict=True)]
        step = max(1, -(-self.n_tokens // tokens))
        return _batched([row.tolist() for row in rows[::step]])


def rows_of(host: Host, texts: Sequence[Prompt], tokens: int) -> TextRows:
    """The first texts that together have so many tokens, or all of them; the last one is cut.

    Raises:
        PromptError: there is no text, or fewer than two tokens.
    """
    rows: list[list[int]] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        ids = host.tokenize(text)[:left] if not isinstance(text, str) or text.strip() else []
        rows += [ids[start : start + ROW] for start in range(0, len(ids), ROW)]
        left -= len(ids)
    if sum(map(len, rows)) < 2:
        raise PromptError(
            "the text to measure on is empty",
            expected="some thousand tokens: paragraphs behind empty lines, or one text per line",
            found=f"{sum(map(len, rows))} tokens",
        )
    return _batched(rows)


def _batched(rows: list[list[int]]) -> TextRows:
    """Batches of rows of similar length; the order of rows is not kept."""
    parts: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if not parts or (len(parts[-1]) + 1) * len(row) > _TOKENS_AT_ONCE:
            parts.append([])
        parts[-1].append(row)

    def batch(part: list[list[int]]) -> Batch:
        width = max(map(len, part))
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in part])
        return Batch(ids, tuple(map(len, part)), ((),) * len(part))

    return TextRows(tuple(map(batch, parts)))


def streams_by_layer(host: Host, rows: TextRows, layers: Sequence[int], ahead: int) -> Iterator[tuple[int, Streams]]:
    """For each of the layers, in order: the tensors at every site of blocks `layer` to `layer + ahead`, as far as there
    are such blocks.

    `resid_pre L+1` is stored as `resid_post L`, which is the same tensor; only the layer's own `resid_pre` has that
    key.

    Memory: 6 (ahead + 1) × token × d_model numbers in the model's precision, on its devices.
    """
    wanted, seen = sorted(set(layers)), Streams()
    masks = [batch.mask for batch in rows.batches]
    streams = [_before_first_block(host, batch) for batch in rows.batches]
    seen[Site("resid_pre", 0)] = _real(streams, masks)
    for block in range(min(host.n_layers, wanted[-1] + ahead + 1)):
        sites = [Site(name, block) for name in _INSIDE] if _needed(block, wanted, ahead) else []
        streams, inside = _through(host, streams, masks, block, sites)
        seen |= inside
        seen[Site("resid_post", block)] = _real(streams, masks)
        if block - ahead in wanted:
            yield block - ahead, _around(seen, block - ahead)
        seen = {site: x for site, x in seen.items() if site.layer >= block - ahead}
    for layer in wanted:
        if layer + ahead >= host.n_layers:
            yield layer, _around(seen, layer)


def _needed(block: int, layers: Sequence[int], ahead: int) -> bool:
    return any(layer <= block <= layer + ahead for layer in layers)


def _around(seen: Streams, layer: int) -> Streams:
    own = {site: x for site, x in seen.items() if site.layer >= layer}
    if layer:
        own[Site("resid_pre", layer)] = seen[Site("resid_post", layer - 1)]
    return own


def _through(
    host: Host, streams: list[Tensor], masks: list[Tensor], block: int, sites: Sequence[Site]
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Streams]:
    """Run all rows through one block: its outputs, and the tensors at its sites."""
    out: list[Tensor] = []
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for x, mask in zip(streams, masks, strict=True):
        here: dict[Site, Tensor] = {}
        with host.attached([tap(site, here) for site in sites]):
            out.append(host.through_blocks(x, block, block + 1))
        for site in sites:
            found[site].append(here[site][mask.to(here[site].device)])
    return out, {site: torch.cat(parts) for site, parts in found.items()}


def _real(
    streams: Sequence[Float[Tensor, "batch pos d_model"]], masks: Sequence[Bool[Tensor, "batch pos"]]
) -> Float[Tensor, "token d_model"]:
    return torch.cat([x[mask.to(x.device)] for x, mask in zip(streams, masks, strict=True)])


class _Reached(Exception):  # noqa: N818
    """Ends a pass early, because the rest of it is not needed."""


def _before_first_block(host: Host, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
    """The model's own input of block 0; nothing after it is computed."""
    seen: list[Tensor] = []

    def stop(x: Tensor, at: Pass) -> Tensor:
        seen.append(x)
        raise _Reached

    with contextlib.suppress(_Reached):
        host.forward_hidden(batch, [Edit(Site("resid_pre", 0), stop)])
    return seen[0]
