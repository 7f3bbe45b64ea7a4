"""What one decoding step does at one layer, on buffers of fixed size: nothing in it depends on data but numbers.

No branch, no shape and no Python value depends on a token or an intervention, so that the step can be captured as a
CUDA graph and stay valid whatever is written into the buffers.
"""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.interventions import change
from hooks.kernels import count_before, select_static, working_dtype
from hooks.passes import LayerTable
from hooks.transcoder import Transcoder
from hooks.types import Edit, Pass, SparseActs


@dataclass(frozen=True)
class EntryBuffers:
    """The interventions at one layer, in memory of fixed size on its device; see `LayerTable` for their meaning."""

    features: Int[Tensor, " entry"]
    factor: Float[Tensor, " entry"]
    shift: Float[Tensor, " entry"]
    skip_inactive: Bool[Tensor, " entry"]
    start: Int[Tensor, " entry"]
    stop: Int[Tensor, " entry"]
    enabled: Bool[Tensor, " entry"]

    @classmethod
    def empty(cls, capacity: int, device: torch.device) -> "EntryBuffers":
        """Room for `capacity` interventions, none of them enabled."""
        whole, real, flag = ({"dtype": d, "device": device} for d in (torch.int64, torch.float64, torch.bool))
        kinds = (whole, real, real, flag, whole, whole, flag)
        return cls(*(torch.zeros(capacity, **kind) for kind in kinds))  # type: ignore[call-overload]

    def write(self, table: LayerTable | None) -> None:
        """Replace what is there; no table disables everything."""
        self.enabled.zero_()
        if table is None:
            return
        count = len(table.features)
        for name in ("features", "factor", "shift", "skip_inactive", "start", "stop"):
            getattr(self, name)[:count].copy_(getattr(table, name))
        self.enabled[:count].fill_(True)

    def change(self, old: Float[Tensor, " entry"], position: Int[Tensor, "1"]) -> Float[Tensor, " entry"]:
        """new − old where an entry is enabled and its span holds the position, else 0."""
        here = self.enabled & (self.start <= position) & (position < self.stop)
        return change(old, self.factor, self.shift, self.skip_inactive).masked_fill(~here, 0)


@dataclass(frozen=True)
class LayerStep:
    """One layer's encoder, and what becomes of its activations: edited, observed, put in place of the site.

    Attributes:
        observed: where the token's features are left.
        position: of the token that is read, a buffer of the decoder.
        bad: becomes true when a stream is not a number; nobody can be told inside a step.
    """

    coder: Transcoder
    table: EntryBuffers | None
    observed: SparseActs | None
    replaced: bool
    position: Int[Tensor, "1"]
    bad: Bool[Tensor, ""]

    def edits(self) -> list[Edit]:
        """What carries it out, to be attached for each step that is not a replay."""
        coder = self.coder
        if coder.read == coder.write:
            return [Edit(coder.read, lambda x, at: self._write(x, *self._read(x)))]
        memo: list[tuple[Tensor | None, SparseActs | None, Tensor | None]] = []

        def read(x: Tensor, at: Pass) -> Tensor:
            memo[:] = [self._read(x)]
            return x

        return [Edit(coder.read, read), Edit(coder.write, lambda x, at: self._write(x, *memo.pop()))]

    def _read(
        self, x: Float[Tensor, "1 1 d_model"]
    ) -> tuple[Float[Tensor, " d_model"] | None, SparseActs | None, Float[Tensor, "1 d_model"] | None]:
        """What the interventions add, the token's features, and what the skip connection adds, as far as needed."""
        coder = self.coder
        pre = coder.preactivations(x[0])
        self.bad.logical_or_(pre.isnan().any())
        acts = select_static(coder.gated(pre), coder.k) if self.observed or self.replaced else None
        skipped = coder.skipped(x[0]) if self.replaced else None
        if self.observed and acts:
            self.observed.values.copy_(acts.values[0])
            self.observed.indices.copy_(acts.indices[0])
        if self.table is None:
            return None, acts, skipped
        features = self.table.features
        own = coder.gated(pre)[0, features].relu()
        if coder.k is not None:
            own = own.masked_fill(count_before(pre, features) >= coder.k, 0)
        rows = coder.W_dec[features].to(own.dtype)
        return einsum(self.table.change(own, self.position).to(own.dtype), rows, "entry, entry d -> d"), acts, skipped

    def _write(
        self,
        x: Float[Tensor, "1 1 d_model"],
        delta: Float[Tensor, " d_model"] | None,
        acts: SparseActs | None,
        skipped: Float[Tensor, "1 d_model"] | None,
    ) -> Float[Tensor, "1 1 d_model"]:
        out = self.coder.decode(acts)[None] if self.replaced and acts else x
        if skipped is not None:
            out = out + skipped
        return (out if delta is None else out.to(delta.dtype) + delta).to(x.dtype)


def acts_buffer(coder: Transcoder) -> SparseActs:
    """Room for one token's features [k]; without TopK for all of them [feature]."""
    k = coder.d_features if coder.k is None else coder.k
    values = torch.zeros(k, dtype=working_dtype(coder.W_enc), device=coder.device)
    return SparseActs(values, torch.zeros(k, dtype=torch.int64, device=coder.device))
