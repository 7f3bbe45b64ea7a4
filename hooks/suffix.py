"""Many variants of one prompt, each run only from where it first differs: its own block, and its own first position.

An edit at block b and position t leaves every stream below b and before t as it was, bit for bit. So the clean run's
streams and its keys and values are kept once, and a variant (a *row*) consists of the positions from t on alone. Rows
join the pass at the block where they first differ (staggered entry), and all that are under way go through a block as
one packed list of tokens, without padding. In the attention a row's queries meet the clean keys before t, which all
rows share and none copies, and the row's own keys from t on:

    softmax over [ q · K_clean[:t] , q · K_own ] / sqrt(d_head)

Cost against a whole pass per variant: (n_layers − b)(T − t) / (n_layers T) of the work, in large products.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hooks.errors import memory_ran_out
from hooks.freeze import own_attention, plain_attention
from hooks.host import Host, tap
from hooks.sites import Site
from hooks.tokens import Batch
from hooks.types import Edit, Pass


@dataclass(frozen=True)
class Clean:
    """What a plain run of one prompt leaves for its variants.

    Attributes:
        final: the stream behind the final norm.
        streams: in front of every block, and behind the last.
        keys, values: of every block, rotated, not repeated over the group.
        cos, sin: the rotation at every position.
        seen: what stood at further sites.
    """

    batch: Batch
    final: Float[Tensor, "pos d_model"]
    streams: tuple[Float[Tensor, "pos d_model"], ...]
    keys: tuple[Float[Tensor, "n_kv pos d_head"], ...]
    values: tuple[Float[Tensor, "n_kv pos d_head"], ...]
    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]
    seen: dict[Site, Float[Tensor, "pos d_model"]]


def record_clean(host: Host, batch: Batch, sites: Sequence[Site] = ()) -> Clean:
    """One plain pass over one prompt.

    Memory: n_layers × pos × (d_model + 2 n_kv d_head) numbers, and d_model per position and further site.

    Raises:
        UserError: the model's attention is not one that can be shared between rows.
    """
    stops = [Site("resid_pre", layer) for layer in range(host.n_layers)]
    stops.append(Site("resid_post", host.n_layers - 1))
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[..., Any]:
        plain = plain_attention(host, layer)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any) -> Any:
            keys[layer], values[layer] = key[0], value[0]
            return plain(module, query, key, value, *args, **rest)

        return attend

    seen: dict[Site, Tensor] = {}
    edits = [tap(site, seen) for site in dict.fromkeys([*stops, *sites])]
    with own_attention(host, watch):
        final = host.forward_hidden(batch, edits)
    places = torch.arange(batch.ids.shape[1], device=seen[stops[0]].device)[None]
    cos, sin = host.decoder.rotary_emb(seen[stops[0]], places)
    streams, order = tuple(seen[site][0] for site in stops), range(host.n_layers)
    kept_keys, kept_values = (tuple(table[layer] for layer in order) for table in (keys, values))
    return Clean(
        batch, final[0], streams, kept_keys, kept_values, cos[0], sin[0], {site: seen[site][0] for site in sites}
    )


@dataclass(frozen=True)
class Rows:
    """Variants of a prompt.

    Attributes:
        start: each row's first position.
        block: the block in front of which it joins; n_layers: behind the last.
        delta: what is added to the clean stream as it joins, at its positions start … end−1, row after row.
        end: one past the last position that any row is followed to.
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
        """Where each row's tokens begin in `delta`."""
        return self.lengths.cumsum(0) - self.lengths


@dataclass(frozen=True)
class Layout:
    """How the rows under way are packed: those with the same first position stand together, in order of entry.

    Attributes:
        segments: first position, rows.
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
        """Where each of `count` rows begins; −1 for those not under way."""
        out = torch.full((count,), -1)
        for (start, rows), here in zip(self.segments, self.slices, strict=True):
            out[rows] = torch.arange(here.start, here.stop, self.end - start)
        return out


@dataclass
class Walk:
    """A pass under way. `layout` is what edits inside a block see; it changes between blocks only."""

    host: Host
    clean: Clean
    rows: Rows
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = Layout((), self.rows.end)

    @cached_property
    def _entering(self) -> dict[int, list[tuple[int, Int[Tensor, " row"]]]]:
        """By block: first position and rows that join."""
        out: dict[int, list[tuple[int, Tensor]]] = {}
        for block in self.rows.block.unique().tolist():
            here = self.rows.block == block
            for start in self.rows.start[here].unique().tolist():
                out.setdefault(block, []).append((start, (here & (self.rows.start == start)).nonzero()[:, 0]))
        return out

    def run(self, edits: Sequence[Edit]) -> Float[Tensor, "row d_model"]:
        """Each row's stream behind the last block, at its last position.

        Args:
            edits: inside blocks; they see the packed tokens as a batch of one, and `layout`.
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

    def _through(self, x: Float[Tensor, "token d_model"], block: int) -> Float[Tensor, "token d_model"]:
        pos = self.layout.pos.to(self.clean.cos.device)
        rotary = tuple(part[pos][None].to(x.device) for part in (self.clean.cos, self.clean.sin))
        places = pos[None].to(x.device)
        return self.host.layers[block](
            x[None], attention_mask=None, position_ids=places, position_embeddings=rotary
        )[0]  # fmt: skip

    def _join(self, x: Float[Tensor, "joined d_model"], block: int) -> Float[Tensor, "token d_model"]:
        """Let the rows of this block in, and pack again."""
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
        """Rows as they join: the clean stream plus what each adds; added wide, cast once."""
        stream, delta = self.clean.streams[block][start : self.rows.end], self.rows.delta
        at = self.rows.offsets[rows, None] + torch.arange(self.rows.end - start)
        added = delta[at.to(delta.device)].to(stream.device)
        return rearrange((stream.to(added.dtype) + added).to(stream.dtype), "row pos d -> (row pos) d")

    def _attention(self, layer: int) -> Callable[..., Any]:
        return partial(self._attend, self.clean.keys[layer], self.clean.values[layer])

    def _attend(
        self,
        clean_keys: Float[Tensor, "n_kv pos d_head"],
        clean_values: Float[Tensor, "n_kv pos d_head"],
        module: Any,
        query: Float[Tensor, "1 head token d_head"],
        key: Float[Tensor, "1 n_kv token d_head"],
        value: Float[Tensor, "1 n_kv token d_head"],
        *_: Any,
        scaling: float,
        **__: Any,
    ) -> tuple[Float[Tensor, "1 token head d_head"], None]:
        parts = []
        for (start, rows), here in zip(self.layout.segments, self.layout.slices, strict=True):
            prefix = clean_keys[:, :start], clean_values[:, :start]
            own = key[0, :, here], value[0, :, here]
            parts.append(_shared_attention(query[0, :, here] * scaling, prefix, own, len(rows)))
        return torch.cat(parts)[None], None


Pair = tuple[Tensor, Tensor]


def _shared_attention(query: Float[Tensor, "head token d_head"], prefix: Pair, own: Pair, rows: int) -> Tensor:
    """Attention of `rows` rows of the same length to a shared prefix and to themselves: [token head d_head].

    Scores and softmax in fp32 at least, as SDPA has them: rounding scores to bf16 costs more than all else here.
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
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    alone = alone.view(*q.shape[:-1], length).masked_fill(later, -torch.inf)
    pattern = torch.cat([shared, alone], dim=-1).softmax(-1)
    z = (rearrange(pattern[..., :before], "kv row group s p -> kv (row group s) p") @ shared_v).view_as(q)
    z = z + (rearrange(pattern[..., before:], "kv row group s r -> kv row (group s) r") @ v).view_as(q)
    return rearrange(z, "kv row group s h -> (row s) (kv group) h").to(query.dtype)


@contextlib.contextmanager
def out_of_memory() -> Iterator[list[bool]]:
    """Catch an allocation that fails, on either kind of device; the list then holds True."""
    failed: list[bool] = []
    try:
        yield failed
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one of the first kind, NumPy's the second
        if not memory_ran_out(error):
            raise
        failed.append(True)
    if failed and torch.cuda.is_available():
        torch.cuda.empty_cache()
