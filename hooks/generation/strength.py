"""How strong: an activation, a multiple of the feature's typical one, or a share of the residual stream.

    "8.0"      the activation itself
    "x2"       2 · typical, the mean of the feature's positive activations on the prompt (and on further texts)
    "0.1r"     what the feature writes is 0.1 · |x|:  strength = 0.1 · mean |x| / |d|

with d the feature's decoder row and |x| the norm of the residual stream at the prompt tokens that the address names
(all of them for `@new`). Attention sinks, tokens of more than ten times the median norm, are left out of that mean. A
relative strength is measured on the plain model and becomes a number before anything is steered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import InterventionError
from hooks.host import Batch, Prompt, tap
from hooks.interventions import FeatureIntervention, WhenInactive, check_strength, check_when_inactive
from hooks.interventions.add import Add
from hooks.interventions.clamp import Clamp
from hooks.passes import HostAndStore, as_interventions, is_sink, make_plan
from hooks.sites import Site
from hooks.types import AddressLike, FeatureAddress

Kind = Literal["absolute", "typical", "residual"]
How = Literal["clamp", "add"]
UNITS: Mapping[Kind, str] = {"absolute": "activation", "typical": "× typical activation", "residual": "share of |x|"}
TEXTS_PER_PASS = 32


@dataclass(frozen=True)
class Strength:
    """A number and what it counts.

    Examples:
        >>> Strength.parse("x2")
        Strength(amount=2.0, kind='typical')
    """

    amount: float
    kind: Kind = "absolute"

    def __post_init__(self) -> None:
        check_strength(self.amount, f"strength {self}")

    @classmethod
    def parse(cls, text: str, where: str = "") -> "Strength":
        """Read `8.0`, `x2` or `0.1r`; any of them may be negative, as in `x-1`.

        Raises:
            InterventionError: none of these, or not a finite number.
        """
        match = re.fullmatch(r"(x?)([+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf))(r?)", text)
        if not match or (match[1] and match[3]):
            raise InterventionError(
                f"the strength {text!r} is not a number",
                expected="8.0 (an activation), x2 (times the typical one) or 0.1r (share of the residual norm)",
                where=where,
            )
        amount = check_strength(float(match[2]), where)
        return cls(amount, "typical" if match[1] else "residual" if match[3] else "absolute")

    @classmethod
    def of(cls, value: "float | str | Strength") -> "Strength":
        """Accept a number, text, or a `Strength`."""
        if isinstance(value, Strength):
            return value
        return cls.parse(value) if isinstance(value, str) else cls(check_strength(value, "a strength"))

    def __str__(self) -> str:
        short = f"{self.amount:g}"
        number = short if float(short) == self.amount else repr(self.amount)
        return {"absolute": number, "typical": f"x{number}", "residual": f"{number}r"}[self.kind]


def check_how(value: str, where: str) -> How:
    """`clamp` or `add`, or an error before the model runs.

    Raises:
        InterventionError: it is neither.
    """
    if value not in get_args(How):
        raise InterventionError(f"cannot steer by {value!r}", expected="clamp or add", where=where)
    return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Steer:
    """A clamp or an add whose strength may be relative, or left open for a sweep (`None`).

    `Steer("L3/383@new", "x2")` holds a feature at twice its typical activation; `Steer("L3/383", "0.1r", "add")` adds a
    tenth of the residual norm along its decoder row.
    """

    address: FeatureAddress
    strength: Strength | None
    how: How
    when_inactive: WhenInactive

    def __init__(
        self,
        address: AddressLike,
        strength: float | str | Strength | None = None,
        how: How = "clamp",
        *,
        when_inactive: WhenInactive = "apply",
    ):
        object.__setattr__(self, "address", FeatureAddress.of(address))
        object.__setattr__(self, "strength", None if strength is None else Strength.of(strength))
        object.__setattr__(self, "how", check_how(how, str(self.address)))
        object.__setattr__(self, "when_inactive", check_when_inactive(when_inactive, f"Steer {self.address}"))

    @classmethod
    def parse(cls, text: str, how: How = "clamp", *, when_inactive: WhenInactive = "apply") -> "Steer":
        """Read `ADDRESS=STRENGTH`, or `ADDRESS` alone, which leaves the strength open.

        Raises:
            AddressError, InterventionError: the address or the strength cannot be read.
        """
        address, equals, value = text.rpartition("=")
        strength = Strength.parse(value, where=text) if equals else None
        return cls(address if equals else text, strength, how, when_inactive=when_inactive)

    def given(self, strength: Strength) -> "Steer":
        """The same with the open strength filled in; one that is there already stays."""
        return self if self.strength else Steer(self.address, strength, self.how, when_inactive=self.when_inactive)

    def at(self, value: float) -> FeatureIntervention:
        """The intervention of an absolute strength."""
        make = Clamp if self.how == "clamp" else Add
        return make(self.address, value, when_inactive=self.when_inactive)


@dataclass(frozen=True)
class Resolved:
    """An intervention that can be run, and where its number comes from.

    Attributes:
        intervention: the same, its strength an activation.
        strength: as it was asked for; None for one that is no `Steer`.
        value: the activation that the strength came to; None likewise.
        source: what it was measured on; empty for a strength given absolutely.
    """

    intervention: FeatureIntervention
    strength: Strength | None = None
    value: float | None = None
    source: str = ""


@dataclass(frozen=True)
class _Unit:
    """What one unit of a relative strength is, as an activation, and what it was measured on."""

    size: float
    source: str


def resolve(
    model: HostAndStore, prompt: Prompt, plans: Sequence[Sequence[object]], texts: Sequence[Prompt] = ()
) -> list[tuple[Resolved, ...]]:
    """Lists of interventions with relative strengths → with numbers, in one pass for all of them.

    Args:
        plans: each a list of `Steer` and of anything `run` accepts.
        texts: further texts to take typical activations from, beside the prompt.

    Raises:
        InterventionError: a strength is missing, or relative to the activation of a feature that is never active.
        AddressError: an address names what does not exist; nothing has run then.
    """
    open_ = next((item for plan in plans for item in plan if isinstance(item, Steer) and item.strength is None), None)
    if open_:
        raise InterventionError(
            f"{open_.how} {open_.address} has no strength", expected="ADDRESS=VALUE, or a grid of strengths to sweep"
        )
    relative = {
        (item.address, item.strength.kind)
        for plan in plans
        for item in plan
        if isinstance(item, Steer) and item.strength and item.strength.kind != "absolute"
    }
    batch = model.host.batch([prompt])
    for plan in plans:
        make_plan(model.store, [preliminary(plan)], batch.lengths, new_tokens=model.host.max_positions)
    units: dict[tuple[FeatureAddress, Kind], _Unit] = {}
    typical = [address for address, kind in sorted(relative, key=str) if kind == "typical"]
    residual = [address for address, kind in sorted(relative, key=str) if kind == "residual"]
    if typical:
        units |= {(a, "typical"): unit for a, unit in _typical(model, batch, typical, texts).items()}
    if residual:
        units |= {(a, "residual"): unit for a, unit in _residual(model, batch, residual).items()}
    return [tuple(_resolved(item, units) for item in plan) for plan in plans]


def preliminary(plan: Sequence[object]) -> list[object]:
    """The same list with every relative or open strength at 1, so that all the rest can be checked."""
    return [item.at(1.0) if isinstance(item, Steer) else item for item in plan]


def _resolved(item: object, units: Mapping[tuple[FeatureAddress, Kind], _Unit]) -> Resolved:
    if not isinstance(item, Steer):
        return Resolved(as_interventions([item])[0])
    assert item.strength is not None
    if item.strength.kind == "absolute":
        return Resolved(item.at(item.strength.amount), item.strength, item.strength.amount)
    unit = units[item.address, item.strength.kind]
    value = item.strength.amount * unit.size
    return Resolved(item.at(value), item.strength, value, unit.source)


def _typical(
    model: HostAndStore, batch: Batch, addresses: Sequence[FeatureAddress], texts: Sequence[Prompt]
) -> dict[FeatureAddress, _Unit]:
    """Mean of the positive activations, over all tokens of the prompt and of the texts."""
    batches = [batch]
    for start in range(0, len(texts), TEXTS_PER_PASS):
        batches.append(model.host.batch(texts[start : start + TEXTS_PER_PASS]))
    found: dict[FeatureAddress, list[Tensor]] = {address: [] for address in addresses}
    for part in batches:
        seen = _streams(model, part, {model.store.sites(address.layer)[0] for address in addresses})
        for layer in sorted({address.layer for address in addresses}):
            acts = model.store[layer].encode(seen[model.store.sites(layer)[0]])
            values, indices, real = acts.values.cpu(), acts.indices.cpu(), part.mask[..., None]
            for address in (address for address in addresses if address.layer == layer):
                hit = real & (indices == address.feature) & (values > 0)
                found[address].append(values[hit].double())
    tokens = sum(sum(part.lengths) for part in batches)
    place = f"{tokens} tokens of the prompt" + (f" and {len(texts)} texts" if texts else "")
    return {address: _mean_active(address, torch.cat(values), place) for address, values in found.items()}


def _mean_active(address: FeatureAddress, active: Float[Tensor, " item"], place: str) -> _Unit:
    if not len(active):
        raise InterventionError(
            f"{address} is never active, so it has no typical activation",
            expected="a feature that is active on the prompt, or on texts given for that",
            found=f"0 of the {place}",
            repair="give texts in which it is active, or an absolute strength",
        )
    mean = float(active.mean())
    return _Unit(mean, f"typical activation {mean:.4g}, mean where active: {len(active)} of the {place}")


def _residual(model: HostAndStore, batch: Batch, addresses: Sequence[FeatureAddress]) -> dict[FeatureAddress, _Unit]:
    """mean |x| / |d| over the prompt tokens that each address names."""
    seen = _streams(model, batch, {_stream_behind(model.store, address.layer) for address in addresses})
    out = {}
    for address in addresses:
        norms = seen[_stream_behind(model.store, address.layer)][0].double().norm(dim=-1).cpu()
        here = address.positions.mask(0, len(norms), len(norms))
        counted = _without_sinks(norms, here if bool(here.any()) else torch.ones_like(here))
        row = float(model.store[address.layer].W_dec[address.feature].double().norm())
        if row == 0:
            raise InterventionError(
                f"{address} writes nothing, so no share of the residual norm can be reached",
                expected="a decoder row that is not zero",
            )
        mean = float(norms[counted].mean())
        source = f"|x| {mean:.4g}, mean of {int(counted.sum())} of the {len(norms)} tokens of the prompt; |d| {row:.4g}"
        out[address] = _Unit(mean / row, source)
    return out


def _without_sinks(norms: Float[Tensor, " pos"], here: Bool[Tensor, " pos"]) -> Bool[Tensor, " pos"]:
    """The tokens but for attention sinks; if they are nothing else, all of them."""
    plain = here & ~is_sink(norms)
    return plain if bool(plain.any()) else here


def _stream_behind(store: TranscoderStore, layer: int) -> Site:
    """The residual stream that a layer's write site is, or is added to."""
    write = store.sites(layer)[1]
    return write if write.whole_stream else Site("resid_post", write.layer)


def _streams(model: HostAndStore, batch: Batch, sites: set[Site]) -> dict[Site, Tensor]:
    """What the plain model has at some sites; no logits are formed."""
    seen: dict[Site, Tensor] = {}
    model.host.forward_hidden(batch, [tap(site, seen) for site in sorted(sites, key=str)])
    return seen
