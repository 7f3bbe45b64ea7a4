"""How interventions are carried out: made once from the keywords of a call, checked, and handed along."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from hooks.checkpoints import TranscoderStore
from hooks.host import Batch, Hold, HoldLike, Host, check_hold
from hooks.passes.plan import Interventions, make_edits, make_plan
from hooks.passes.recording import record
from hooks.passes.swap import Swap, Where, check_modes
from hooks.types import Edit, ErrorMode, MaskMode


@runtime_checkable
class HostAndStore(Protocol):
    """A language model and its transcoders, as `HookedModel` has them."""

    host: Host
    store: TranscoderStore


@dataclass(frozen=True)
class RunOptions:
    """What `HookedModel.run` and every method like it is told beside the prompt and the interventions.

    Attributes:
        swap: layers whose sites are replaced by their reconstruction: `"all"`, a list, or None for delta form.
        error: what becomes of the reconstruction error at replaced sites.
        mask: whether TopK selects again when a feature is ablated.
        positions, skip: at which tokens sites are replaced; see `Where`.
        hold: what keeps its clean value.
        precision: in which arithmetic tokens are generated.

    Raises:
        UserError: a word that is not known, or one about replaced sites where no site is replaced.
        AddressError: the positions cannot be read.
    """

    swap: str | Sequence[int] | None = None
    error: ErrorMode = "live"
    mask: MaskMode = "frozen"
    positions: Any = None
    skip: str | Sequence[str] = ()
    hold: HoldLike = "nothing"
    precision: str = "native"

    def __post_init__(self) -> None:
        check_modes(self.error, self.mask, swapping=self.swap is not None)
        self.where.check(swapping=self.swap is not None)

    @cached_property
    def where(self) -> Where:
        """At which tokens sites are replaced."""
        return Where(self.positions, self.skip)

    def layers(self, store: TranscoderStore) -> tuple[int, ...]:
        """Layers whose sites are replaced.

        Raises:
            UserError: they are no layers, or have no transcoder.
        """
        return () if self.swap is None else store.chosen(self.swap)

    def held(self, host: Host, store: TranscoderStore) -> Hold:
        """What keeps its clean value.

        Raises:
            UserError: as `check_hold`.
        """
        return check_hold(self.hold, host.n_layers, [store.sites(layer)[1] for layer in self.layers(store)])

    def edits(
        self, host: Host, store: TranscoderStore, batch: Batch, per_row: Sequence[Interventions], new_tokens: int = 0
    ) -> list[Edit]:
        """The edits of a batch, one list of interventions per row; `new_tokens` may follow the prompts.

        Raises:
            UserError: as `make_plan`, `layers` and `Where.on`.
        """
        pads = batch.left_pads if new_tokens else ()
        plan = make_plan(store, per_row, batch.lengths, new_tokens=new_tokens, mask=self.mask, pads=pads)
        return make_edits(store, plan, self._swap(host, store, batch, new_tokens))

    def _swap(self, host: Host, store: TranscoderStore, batch: Batch, new_tokens: int) -> Swap | None:
        if self.swap is None:
            return None
        layers, places = self.layers(store), self.where.on(host, batch, new_tokens)
        clean = {}
        if self.error == "frozen":
            recording = record(host, store, batch, layers)
            clean = {layer: seen.error for layer, seen in recording.layers.items()}
        return Swap(layers, self.error, clean, places)
