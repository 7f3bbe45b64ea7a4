"""Many variants of one prompt, each run only from where it first differs: its own block, and its own first position.

An edit at block b and position t leaves every stream below b and before t as it was, bit for bit. So the clean run's
streams and its keys and values are kept once, and a variant (a *row*) consists only of the positions from t on. A row
enters the pass at the block where it first differs (staggered entry). All rows that have entered pass through a block
as one packed list of tokens, without padding. In the attention a row's queries attend to the clean keys before t, which
all rows share without a copy, and to the row's own keys from t on:

    softmax over [ q · K_clean[:t] , q · K_own ] / sqrt(d_head)

A query may attend to the same positions as in the clean run: each block's mask is kept with its keys, so sliding
windows need no knowledge of the architecture. `misses` measures whether rows give the model's own result. If attention
is of another kind, or keeps a state instead of keys, rows cannot be used.

Cost against a whole pass per variant: (n_layers − b)(T − t) / (n_layers T) of the work, in large products.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import memory_ran_out
from hooks.host import Batch, Host, own_attention, plain_attention, tap, unknown_attention
from hooks.sites import Site
from hooks.types import Edit, Pass


@dataclass(frozen=True)
class Shared:
    """The values of a plain run that all rows share.

    Attributes:
        keys, values: of every block, rotated, not repeated over the group.
        masks: of every block, True where a query may attend to a key; None: to every key up to its own position.
        cos, sin: the rotation at every position.
    """

    keys: tuple[Float[Tensor, "n_kv pos d_head"], ...]
    values: tuple[Float[Tensor, "n_kv pos d_head"], ...]
    masks: tuple[Bool[Tensor, "pos pos"] | None, ...]
    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]


@dataclass(frozen=True)
class Clean:
    """The values of a plain run of one prompt that its variants need.

    Attributes:
        final: the stream after the final norm.
        streams: before every block, and after the last.
        seen: the tensors at further sites.
        shared: the values that rows share; or a text that says why rows cannot share them.
    """

    batch: Batch
    final: Float[Tensor, "pos d_model"]
    streams: tuple[Float[Tensor, "pos d_model"], ...]
    seen: dict[Site, Float[Tensor, "pos d_model"]]
    shared: Shared | str


def record_clean(host: Host, batch: Batch, sites: Sequence[Site] = ()) -> Clean:
    """One plain pass over one prompt.

    Memory: n_layers × pos × (d_model + 2 n_kv d_head) numbers, d_model per position and further site, and a byte per
    pair of positions and mask.

    Raises:
        UserError: the model's attention is held.
    """
    stops = [Site("resid_pre", layer) for layer in range(host.n_layers)]
    stops.append(Site("resid_post", host.n_layers - 1))
    seen: dict[Site, Tensor] = {}
    edits = [tap(site, seen) for site in dict.fromkeys([*stops, *sites])]
    reason = unknown_attention(host)
    calls: dict[int, _Call] = {}
    watching = contextlib.nullcontext() if reason else own_attention(host, partial(_watch, host, calls))
    with watching:
        final = host.forward_hidden(batch, edits)
    streams = tuple(seen[site][0] for site in stops)
    shared = reason or _shared(host, streams[0], calls)
    return Clean(batch, final[0], streams, {site: seen[site][0] for site in sites}, shared)


@dataclass(frozen=True)
class _Call:
    """The inputs of one block's attention."""

    key: Float[Tensor, "1 n_kv pos d_head"]
    value: Float[Tensor, "1 n_kv pos d_head"]
    mask: Tensor | None


def _watch(host: Host, calls: dict[int, _Call], layer: int) -> Callable[..., Any]:
    plain = plain_attention(host, layer)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        calls[layer] = _Call(key, value, mask)
        return plain(module, query, key, value, mask, **rest)

    return attend


def _shared(host: Host, x: Float[Tensor, "pos d_model"], calls: dict[int, _Call]) -> Shared | str:
    if len(calls) < host.n_layers:
        return f"only {len(calls)} of {host.n_layers} blocks look their attention up"
    order = [calls[layer] for layer in range(host.n_layers)]
    read: dict[int, Bool[Tensor, "pos pos"] | None] = {}  # many blocks get the same mask object
    for call in order:
        if call.mask is not None and id(call.mask) not in read:
            read[id(call.mask)] = _attended(call.mask)
    masks = tuple(None if call.mask is None else read[id(call.mask)] for call in order)
    if any(mask is None and call.mask is not None for mask, call in zip(masks, order, strict=True)):
        return "its mask does more than leave keys out"
    cos, sin = host.decoder.rotary_emb(x[None], torch.arange(len(x), device=x.device)[None])
    keys, values = tuple(call.key[0] for call in order), tuple(call.value[0] for call in order)
    return Shared(keys, values, masks, cos[0], sin[0])


def _attended(mask: Tensor) -> Bool[Tensor, "pos pos"] | None:
    """True where a mask lets a query attend to a key. None if the mask does anything else, or differs by head."""
    if mask.shape[:2] != (1, 1):
        return None
    if mask.dtype == torch.bool:
        return mask[0, 0]
    if not mask.is_floating_point():
        return None
    allowed = mask == 0
    left_out = mask <= torch.finfo(mask.dtype).min
    return allowed[0, 0] if bool((allowed | left_out).all()) else None


@dataclass(frozen=True)
class Variants:
    """Variants of a prompt.

    Attributes:
        start: each row's first position.
        block: the block before which it enters; n_layers: after the last.
        delta: added to the clean stream when the row enters, at its positions start … end−1; row after row.
        end: one past the last position that is computed.
    """

    start: Int[Tensor, " row"]
    block: Int[Tensor, " row"]
    delta: Float[Tensor, "token d_model"]
    end: int

    @cached_property
    def lengths(self) -> Int[Tensor, " row"]:
        """Positions of each row."""
        return self.end - self.start

    @cached_property
    def offsets(self) -> Int[Tensor, " row"]:
        """The index in `delta` of each row's first token."""
        return self.lengths.cumsum(0) - self.lengths


@dataclass(frozen=True)
class Layout:
    """How the rows that have entered are packed: rows with the same first position are next to each other, in the order
    of entry.

    Attributes:
        segments: pairs (first position, rows).
    """

    segments: tuple[tuple[int, Int[Tensor, " _row"]], ...]
    end: int

    @cached_property
    def slices(self) -> list[slice]:
        """The tokens of each segment."""
        out, at = [], 0
        for start, rows in self.segments:
            out.append(slice(at, at + len(rows) * (self.end - start)))
            at = out[-1].stop
        return out

    @cached_property
    def pos(self) -> Int[Tensor, " token"]:
        """Each token's position."""
        parts = [torch.arange(start, self.end).repeat(len(rows)) for start, rows in self.segments]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def tokens(self, count: int) -> Int[Tensor, " row"]:
        """The index of the first token of each of `count` rows; −1 for rows that have not entered."""
        out = torch.full((count,), -1)
        for (start, rows), here in zip(self.segments, self.slices, strict=True):
            out[rows] = torch.arange(here.start, here.stop, self.end - start)
        return out


@dataclass
class StaggeredPass:
    """One pass with staggered rows. Edits inside a block read `layout`, which changes only between blocks."""

    host: Host
    clean: Clean
    rows: Variants
    layout: Layout = field(init=False)
    shared: Shared = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.clean.shared, Shared), self.clean.shared
        self.layout, self.shared = Layout((), self.rows.end), self.clean.shared

    @cached_property
    def _entering(self) -> dict[int, list[tuple[int, Int[Tensor, " row"]]]]:
        """By block: pairs (first position, rows that enter)."""
        out: dict[int, list[tuple[int, Tensor]]] = {}
        for block in self.rows.block.unique().tolist():
            here = self.rows.block == block
            for start in self.rows.start[here].unique().tolist():
                out.setdefault(block, []).append((start, (here & (self.rows.start == start)).nonzero()[:, 0]))
        return out

    def run(self, edits: Sequence[Edit]) -> Float[Tensor, "row d_model"]:
        """Each row's stream after the last block, at its last position.

        Args:
            edits: edits inside blocks; they get the packed tokens as a batch of one, and read `layout`.
        """
        first = min(self._entering)
        x = self.clean.streams[0].new_zeros(0, self.host.d_model)
        with own_attention(self.host, self._attention), self.host.attached(edits) as session, torch.no_grad():
            session.current = Pass(0, [0])
            for block in range(first, self.host.n_layers + 1):
                x = self._join(x.to(self.clean.streams[block].device), block)
                if block < self.host.n_layers:
                    x = self._through(x, block)
        last = self.layout.tokens(len(self.rows.start)) + self.rows.lengths - 1
        return x[last.to(x.device)]

    def one_by_one(self, first: int) -> Generator[tuple[int, Float[Tensor, "token d_model"]], None, None]:
        """The output of each block from `first` on for the clean stream before it, at the positions of all rows."""
        by_start = {int(start): (self.rows.start == start).nonzero()[:, 0] for start in self.rows.start.unique()}
        self.layout = Layout(tuple(by_start.items()), self.rows.end)
        with own_attention(self.host, self._attention), torch.no_grad():
            for block in range(first, self.host.n_layers):
                stream = self.clean.streams[block]
                yield block, self._through(stream[self.layout.pos.to(stream.device)], block)

    def _through(self, x: Float[Tensor, "token d_model"], block: int) -> Float[Tensor, "token d_model"]:
        pos = self.layout.pos.to(self.shared.cos.device)
        rotary = tuple(part[pos][None].to(x.device) for part in (self.shared.cos, self.shared.sin))
        places = pos[None].to(x.device)
        return self.host.layers[block](
            x[None], attention_mask=None, position_ids=places, position_embeddings=rotary
        )[0]  # fmt: skip

    def _join(self, x: Float[Tensor, "joined d_model"], block: int) -> Float[Tensor, "token d_model"]:
        """Add the rows that enter at this block, and pack again."""
        entering = dict(self._entering.get(block, ()))
        if not entering:
            return x
        here = {
            start: (rows, x[part]) for (start, rows), part in zip(self.layout.segments, self.layout.slices, strict=True)
        }
        segments, parts = [], []
        for start in sorted({*here, *entering}):
            rows, tokens = here.get(start, (torch.zeros(0, dtype=torch.int64), x[:0]))
            if start in entering:
                rows = torch.cat([rows, entering[start]])
                tokens = torch.cat([tokens, self._fresh(start, entering[start], block)])
            segments.append((start, rows))
            parts.append(tokens)
        self.layout = Layout(tuple(segments), self.rows.end)
        return torch.cat(parts)

    def _fresh(self, start: int, rows: Int[Tensor, " row"], block: int) -> Float[Tensor, "token d_model"]:
        """Rows that enter: the clean stream plus each row's delta; added in fp32 or wider, cast once."""
        stream, delta = self.clean.streams[block][start : self.rows.end], self.rows.delta
        at = self.rows.offsets[rows, None] + torch.arange(self.rows.end - start)
        added = delta[at.to(delta.device)].to(stream.device)
        return rearrange((stream.to(added.dtype) + added).to(stream.dtype), "row pos d -> (row pos) d")

    def _attention(self, layer: int) -> Callable[..., Any]:
        return partial(self._attend, layer)

    def _attend(
        self,
        layer: int,
        module: Any,
        query: Float[Tensor, "1 head token d_head"],
        key: Float[Tensor, "1 n_kv token d_head"],
        value: Float[Tensor, "1 n_kv token d_head"],
        *_: Any,
        scaling: float,
        **__: Any,
    ) -> tuple[Float[Tensor, "1 token head d_head"], None]:
        keys, values, mask = self.shared.keys[layer], self.shared.values[layer], self.shared.masks[layer]
        parts, end = [], self.rows.end
        for (start, rows), here in zip(self.layout.segments, self.layout.slices, strict=True):
            prefix = keys[:, :start], values[:, :start]
            own = key[0, :, here], value[0, :, here]
            allowed = None if mask is None else mask[start:end, :end]
            parts.append(_shared_attention(query[0, :, here] * scaling, prefix, own, len(rows), allowed))
        return torch.cat(parts)[None], None


Pair = tuple[Tensor, Tensor]


def _shared_attention(
    query: Float[Tensor, "head token d_head"],
    prefix: Pair,
    own: Pair,
    rows: int,
    allowed: Bool[Tensor, "query_pos pos"] | None = None,
) -> Tensor:
    """Attention of `rows` rows of the same length to a shared prefix and to themselves: [token head d_head].

    Scores and softmax are in fp32 at least, as in SDPA: rounding scores to bf16 would be the largest error here.

    Args:
        allowed: which keys, of the prefix and of the row, each position of a row may attend to; by default all up to
            its own position.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    n_kv, before = prefix[0].shape[:2]
    q = rearrange(query.to(wide), "(kv group) (row s) h -> kv row group s h", kv=n_kv, row=rows)
    k, v = (rearrange(part.to(wide), "kv (row r) h -> kv row r h", row=rows) for part in own)
    shared_k, shared_v = (part.to(wide) for part in prefix)
    flat = rearrange(q, "kv row group s h -> kv (row group s) h")
    shared = (flat @ shared_k.mT).view(*q.shape[:-1], before)
    alone = rearrange(q, "kv row group s h -> kv row (group s) h") @ k.mT
    length = q.shape[3]
    if allowed is None:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    else:
        later = ~allowed[:, before:]
        shared = shared.masked_fill(~allowed[:, :before], -torch.inf)
    alone = alone.view(*q.shape[:-1], length).masked_fill(later, -torch.inf)
    pattern = torch.cat([shared, alone], dim=-1).softmax(-1)
    z = (rearrange(pattern[..., :before], "kv row group s p -> kv (row group s) p") @ shared_v).view_as(q)
    z = z + (rearrange(pattern[..., before:], "kv row group s r -> kv row (group s) r") @ v).view_as(q)
    return rearrange(z, "kv row group s h -> (row s) (kv group) h").to(query.dtype)


# -- measured ------------------------------------------------------------------------------------------------------


def misses(host: Host, clean: Clean, starts: Sequence[int], first: int, end: int) -> str:
    """A text that says where unchanged rows differ from the model's own result; empty if they do not.

    Each block is checked alone, from the clean stream before it. Its output may differ by rounding. The tolerance is
    never below fp32's, since transformers computes norms (and the softmax of eager attention) in fp32 in every
    precision. Cost: one pass over the rows.

    Args:
        starts: first positions of these rows.
        first: the first block that is checked.
        end: one past their last position.
    """
    precision = max(torch.finfo(dtype).eps for dtype in (clean.streams[0].dtype, torch.float32))
    room = max(precision**0.5, 25 * precision)
    start = torch.tensor(sorted(set(starts)))
    rows = Variants(start, torch.full_like(start, first), torch.zeros(0, host.d_model), end)
    running = StaggeredPass(host, clean, rows)
    with contextlib.closing(running.one_by_one(first)) as blocks:
        for block, made in blocks:
            before, after = (
                stream[running.layout.pos.to(stream.device)] for stream in clean.streams[block : block + 2]
            )
            made, before = made.to(after.device), before.to(after.device)
            step, size = (after - before).norm(dim=-1), after.norm(dim=-1)
            off = (made - after).norm(dim=-1)
            if not bool((off <= room * step + 4 * precision * size).all()):
                return f"block {block} adds something else to rows, off by {float((off / step).max()):.1g} of it"
    return ""


@contextlib.contextmanager
def out_of_memory() -> Iterator[list[bool]]:
    """Catch an allocation that fails, on either kind of device; the list then has one True."""
    failed: list[bool] = []
    try:
        yield failed
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, NumPy's is a MemoryError
        if not memory_ran_out(error):
            raise
        failed.append(True)
    if failed and torch.cuda.is_available():
        torch.cuda.empty_cache()
