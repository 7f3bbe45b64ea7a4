"""What a run and a swap give back."""

import html
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

from jaxtyping import Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import TargetError
from hooks.host import Batch, Host, measured
from hooks.passes import SiteQuality, SwapEffect, inactive
from hooks.readout import Effect, RankedToken, effect, token_name
from hooks.renamed import keywords
from hooks.types import FeatureAddress
from hooks.whole import whole


@dataclass(frozen=True)
class Run:
    """One prompt, run plain and run with interventions. Logits are formed where they are asked for.

    Attributes:
        before, after: the streams behind the final norm of the plain and of the edited run.
        precision: in which arithmetic both were computed.
    """

    batch: Batch
    before: Float[Tensor, "pos d_model"]
    after: Float[Tensor, "pos d_model"]
    host: Host
    precision: str
    store: TranscoderStore
    interventions: tuple[Any, ...] = ()

    @cached_property
    @measured
    def inactive(self) -> tuple[FeatureAddress, ...]:
        """Addresses of interventions whose feature the clean run activates at none of the tokens they name: to ablate
        or scale it does nothing. Found by one more pass, when it is asked for."""
        return inactive(self.host, self.store, self.batch, self.interventions)

    @cached_property
    def baseline(self) -> Float[Tensor, "pos vocab"]:
        """Logits of the plain run, at every position."""
        return self.host.unembed(self.before)

    @cached_property
    def logits(self) -> Float[Tensor, "pos vocab"]:
        """Logits of the edited run, at every position."""
        return self.baseline if self.after is self.before else self.host.unembed(self.after)

    @keywords(position="pos")
    def effect(
        self, target: str | SupportsIndex | None = None, against: str | SupportsIndex | None = None, pos: int = -1
    ) -> Effect:
        """What happened to a target token at one position; by default the clean run's answer at the last token.

        Raises:
            TargetError: target or against is not one token, or the position does not occur.
        """
        place = self._place(pos)
        before, after = (self.host.unembed(stream[place]) for stream in (self.before, self.after))
        token = int(before.argmax()) if target is None else self.host.token_id(target)
        other = None if against is None else self.host.token_id(against)
        if token == other:
            raise TargetError("target and against are the same token", found=repr(self.host.string(token)))
        return effect(before, after, token, other, string=self.host.string)

    def __repr__(self) -> str:
        """One line: how long the prompt is, and the answer before and after."""
        before, after = (token_name(top.token, top.id) for (top,) in (self.top_before(1), self.top_after(1)))
        return f"Run({len(self.before)} tokens, answer {before} → {after})"

    def _repr_html_(self) -> str:
        """For notebooks: the likeliest next tokens before and after."""
        rows = zip(self.top_before(), self.top_after(), strict=True)
        cells = [[(token_name(top.token, top.id), f"{top.prob:.3f}") for top in pair] for pair in rows]
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(name)}</td><td>{prob}</td>" for name, prob in row) + "</tr>"
            for row in cells
        )
        return f"<table><tr><th colspan='2'>plain</th><th colspan='2'>with interventions</th></tr>{body}</table>"

    @keywords(position="pos")
    def top_before(self, n: int = 5, pos: int = -1) -> list[RankedToken]:
        """The clean run's most likely next tokens."""
        return self.host.top(self.host.unembed(self.before[self._place(pos)]), n)

    @keywords(position="pos")
    def top_after(self, n: int = 5, pos: int = -1) -> list[RankedToken]:
        """The edited run's most likely next tokens."""
        return self.host.top(self.host.unembed(self.after[self._place(pos)]), n)

    def _place(self, pos: int) -> int:
        length = len(self.before)
        return whole(pos, "position", least=-length, most=length - 1)


@dataclass(frozen=True)
class SwapReport:
    """Reconstruction quality per layer, and what replacing the chosen layers did.

    Attributes:
        positions: where sites were replaced, and what `layers` is over.
        measured: what `effect` is over.
    """

    layers: tuple[SiteQuality, ...]
    effect: SwapEffect
    run: Run
    positions: tuple[int, ...]
    measured: tuple[int, ...]
