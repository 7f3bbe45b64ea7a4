"""What a run holds at its clean value while edits act: parts of the model, and outputs of its modules.

A block adds the outputs of two modules to the stream: attention and MLP. If a module's output is held at its clean
value, no effect passes through the module. If only its parts are held (`frozen_parts`), the module stays live and is
affine.

clean run → its parts are held → module outputs of an unedited run with these parts held → edits that restore them
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hooks.errors import UserError
from hooks.host.frozen_parts import PARTS, held, record_held
from hooks.host.host import Host, tap
from hooks.host.tokens import Batch
from hooks.sites import Site
from hooks.types import Edit

ENTRY = {"attn_out": 0, "mlp_out": 3}  # depth in the block of a module's input: resid_pre, mlp_in

Layers = str | Sequence[int]  # "all", or numbers


@dataclass(frozen=True)
class Hold:
    """What is held at its clean value while edits act.

    `Hold("norms", attn_out="all", mlp_out=(2, 3), open=["attn_out 1"])` holds the scale of every norm, the outputs of
    the MLPs 2 and 3, and of every attention but that of layer 1.

    Attributes:
        parts: `attention` patterns, `norms`, `gates`, as in `hooks.host.frozen_parts`; with all three the model is
            affine.
        attn_out, mlp_out: layers whose module's output is held, at every token. An edit of a feature at the same site
            is added to the clean value.
        open: modules that are excepted and stay live.
    """

    parts: tuple[str, ...]
    attn_out: Literal["all"] | tuple[int, ...]
    mlp_out: Literal["all"] | tuple[int, ...]
    open: tuple[Site, ...]

    def __init__(
        self,
        parts: str | Sequence[str] = "nothing",
        *,
        attn_out: Layers = (),
        mlp_out: Layers = (),
        open: Sequence[str | Site] = (),
    ):
        named = (() if parts == "nothing" else (parts,)) if isinstance(parts, str) else tuple(parts)
        for part in named:
            if part not in PARTS:
                raise UserError(f"unknown part {part!r} to hold", expected=f"nothing, {', '.join(PARTS)}, or a Hold")
        object.__setattr__(self, "parts", named)
        object.__setattr__(self, "attn_out", _layers(attn_out))
        object.__setattr__(self, "mlp_out", _layers(mlp_out))
        object.__setattr__(self, "open", tuple(map(module, open)))

    @classmethod
    def of(cls, value: "str | Sequence[str] | Hold") -> "Hold":
        """Accept `"nothing"`, a part, several parts, or a `Hold`.

        Raises:
            UserError: a part is not known.
        """
        return value if isinstance(value, Hold) else cls(value)

    def outputs(self, n_layers: int) -> frozenset[Site]:
        """The module outputs that are held in a model of so many layers.

        Raises:
            UserError: a layer does not exist, or `open` names a module that is not held.
        """
        chosen = set()
        for name, layers in (("attn_out", self.attn_out), ("mlp_out", self.mlp_out)):
            chosen |= {Site(name, layer) for layer in (range(n_layers) if layers == "all" else layers)}
        for site in (*chosen, *self.open):
            check_layer(site, n_layers)
        if never := set(self.open) - chosen:
            raise UserError(f"{min(map(str, never))} is open, and nothing holds it", repair="leave it away")
        return frozenset(chosen - set(self.open))


HoldLike = str | Sequence[str] | Hold


def check_hold(hold: HoldLike, n_layers: int, replaced: Collection[Site] = ()) -> Hold:
    """Check a hold before anything runs. `replaced`: write sites that a swap replaces.

    Raises:
        UserError: a part or layer in it does not exist, or an output is both held and replaced.
    """
    checked = Hold.of(hold)
    if both := checked.outputs(n_layers) & set(replaced):
        raise UserError(
            f"{min(map(str, both))} is held at its clean value, and replaced by its reconstruction",
            repair="swap other layers, or hold other modules",
        )
    return checked


@contextlib.contextmanager
def holding(host: Host, batch: Batch, hold: Hold) -> Iterator[list[Edit]]:
    """Hold inside the `with`. It yields edits, which must come before all others.

    Module outputs are those of the unedited run *with the parts held*. So the unedited run inside is the same, bit for
    bit, whichever modules are held. `Hold()` runs nothing and yields nothing.

    Cost: one pass for the parts and one for the modules. Memory: as `record_held`, plus batch × modules × pos ×
    d_model.
    """
    with parts_held(host, batch, hold):
        clean = _clean_outputs(host, batch, hold.outputs(host.n_layers))
        yield [_put_back(site, value) for site, value in clean.items()]


@contextlib.contextmanager
def parts_held(host: Host, batch: Batch, hold: Hold) -> Iterator[None]:
    """Hold the parts only; the caller holds module outputs. If the batch is one prompt, any number of rows may run."""
    if not hold.parts:
        yield
        return
    with held(host, record_held(host, batch, hold.parts)):
        yield


def _clean_outputs(
    host: Host, batch: Batch, sites: Collection[Site]
) -> Mapping[Site, Float[Tensor, "batch pos d_model"]]:
    seen: dict[Site, Tensor] = {}
    if sites:
        host.forward_hidden(batch, [tap(site, seen) for site in sorted(sites, key=lambda site: site.depth)])
    return seen


def _put_back(site: Site, clean: Float[Tensor, "batch pos d_model"]) -> Edit:
    """An edit that replaces the site's value by the clean one."""
    return Edit(site, lambda x, at: clean.to(x.device))


# -- modules and layers ---------------------------------------------------------------------------------------------


def _layers(value: Layers) -> Literal["all"] | tuple[int, ...]:
    if isinstance(value, str):
        if value != "all":
            raise UserError(f"unknown layers {value!r}", expected='"all" or a list of layer numbers')
        return "all"
    return tuple(sorted(set(value)))


def module(value: str | Site) -> Site:
    """A module's output: `"mlp_out 3"` or the site.

    Raises:
        UserError: it is another site, or none.
    """
    name, _, layer = str(value).partition(" ")
    if name not in ENTRY or not layer.isdecimal():
        raise UserError(
            f"{str(value)!r} is not the output of a module", expected="attn_out L or mlp_out L, for example mlp_out 3"
        )
    return Site(name, int(layer))


def modules(n_layers: int) -> list[Site]:
    """All module outputs, in the order of computation."""
    return [Site(name, layer) for layer in range(n_layers) for name in ENTRY]


def check_layer(site: Site, n_layers: int) -> None:
    """Raises UserError where the model has no such layer."""
    if not 0 <= site.layer < n_layers:
        raise UserError(f"there is no {site} in this model", expected=f"a layer from 0 to {n_layers - 1}")
