"""The groups of a sweep: every active feature of a prompt one by one, pairs, or one feature over a grid of values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from jaxtyping import Float
from torch import Tensor

from hooks.choices import CHANGES
from hooks.errors import InterventionError, UserError
from hooks.interventions import FeatureIntervention
from hooks.interventions.ablate import Ablate
from hooks.interventions.clamp import Clamp
from hooks.interventions.scale import Scale
from hooks.passes import Recording, check_same_length
from hooks.types import FeatureAddress, Positions
from hooks.whole import wholes


@dataclass(frozen=True)
class Change:
    """How a feature's activation is changed.

    Attributes:
        kind: `zero` ablates it; `mean` sets it to its mean over the reference prompts' tokens; `resample` sets it to
            its value at the same position of the reference prompt; `scale` multiplies it by `value`; `set` sets it to
            `value`.
        reference: a recording of the reference prompts, for `mean` and `resample`.

    Raises:
        InterventionError: the kind is not known, or its value or reference is missing or superfluous.
    """

    kind: str = "zero"
    value: float | None = None
    reference: Recording | None = None

    def __post_init__(self) -> None:
        if self.kind not in CHANGES:
            raise InterventionError(f"unknown kind of change {self.kind!r}", expected=", ".join(CHANGES))
        valued, compared = self.kind in ("scale", "set"), self.kind in ("mean", "resample")
        if valued != (self.value is not None):
            wanted = "a value" if valued else "no value"
            raise InterventionError(f"change {self.kind} takes {wanted}", found=str(self.value))
        if compared != (self.reference is not None):
            wanted = "reference prompts" if compared else "no reference prompts"
            raise InterventionError(f"change {self.kind} takes {wanted}")


def active_features(
    recording: Recording, layers: Sequence[int] | None = None, positions: Sequence[int] | None = None
) -> list[FeatureAddress]:
    """Every active feature of the first recorded prompt, by layer, position and number.

    Raises:
        UserError: a layer was not recorded, or a position does not occur.
    """
    length = recording.batch.lengths[0]
    places = range(length) if positions is None else wholes(positions, "positions")
    wanted = sorted({_position(pos, length) for pos in places})
    out = []
    for layer in sorted(recording.layers if layers is None else set(wholes(layers, "layers"))):
        if layer not in recording.layers:
            raise UserError(
                f"layer {layer} was not recorded", expected=f"among {', '.join(map(str, recording.layers))}"
            )
        acts = recording.layers[layer].acts
        for pos in wanted:
            kept = acts.indices[0, pos][acts.values[0, pos] > 0].tolist()
            out += [FeatureAddress(layer, feature, Positions("index", pos)) for feature in kept]
    return out


def _position(pos: int, length: int) -> int:
    if not -length <= pos < length:
        raise UserError(f"position {pos} does not occur", expected=f"0 to {length - 1}, or -{length} to -1")
    return pos % length


def changed(
    addresses: Sequence[FeatureAddress], change: Change, recording: Recording
) -> list[list[FeatureIntervention]]:
    """One group per feature.

    Raises:
        PromptError: the reference prompt of `resample` has another length.
        UserError: `mean` and `resample` of a feature at several positions, or at a layer the reference lacks.
    """
    values = _reference_values(addresses, change, recording)
    return [[_intervention(address, change, value)] for address, value in zip(addresses, values, strict=True)]


def _intervention(address: FeatureAddress, change: Change, value: float | None) -> FeatureIntervention:
    if change.kind == "zero":
        return Ablate(address)
    if change.kind == "scale":
        assert change.value is not None
        return Scale(address, change.value)
    chosen = change.value if value is None else value
    assert chosen is not None
    return Clamp(address, chosen)


def _reference_values(
    addresses: Sequence[FeatureAddress], change: Change, recording: Recording
) -> list[float] | list[None]:
    reference = change.reference
    if reference is None:
        return [None] * len(addresses)
    if change.kind == "resample":
        check_same_length(recording, reference)
    tables = {}
    for layer in {address.layer for address in addresses}:
        if layer not in reference.layers:
            raise UserError(f"the reference prompts were not recorded at layer {layer}")
        tables[layer] = _table(reference, layer, mean=change.kind == "mean")
    length = recording.batch.lengths[0]
    return [_value(tables[address.layer], address, length) for address in addresses]


def _table(reference: Recording, layer: int, *, mean: bool) -> Float[Tensor, "pos feature"]:
    """The activations that features are set to, by position and feature; a mean is the same at every position."""
    acts, real = reference.layers[layer].acts, reference.batch.mask
    size = int(acts.indices.max()) + 1
    dense = acts.dense(size)
    return dense[real.to(dense.device)].mean(0, keepdim=True) if mean else dense[0]


def _value(table: Float[Tensor, "pos feature"], address: FeatureAddress, length: int) -> float:
    (start, stop), *more = address.positions.spans(length)
    if (more or stop != start + 1) and len(table) > 1:
        raise UserError(f"{address} is at several positions, which differ in the reference prompt", repair="name one")
    if address.feature >= table.shape[1]:
        return 0.0  # the feature was inactive at every token of the reference
    return float(table[min(start, len(table) - 1), address.feature])


def pairs(groups: Sequence[Sequence[FeatureIntervention]]) -> list[list[FeatureIntervention]]:
    """Every two groups, joined to one."""
    return [[*one, *other] for one, other in combinations(groups, 2)]


def doses(address: str | FeatureAddress, values: Sequence[float]) -> list[list[FeatureIntervention]]:
    """One feature held at each value of a grid.

    Raises:
        InterventionError: the grid is empty, or has an entry that is not a finite number.
    """
    if not len(values):
        raise InterventionError("the grid of values is empty", expected="at least one number")
    if not all(math.isfinite(value) for value in values):
        raise InterventionError("the grid of values holds what is not a finite number", found=str(list(values))[:80])
    return [[Clamp(address, float(value))] for value in values]
