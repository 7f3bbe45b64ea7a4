"""Scale: multiply a feature's activation."""

from dataclasses import dataclass
from typing import Any

from hooks.errors import InterventionError
from hooks.interventions import WhenInactive, check_strength, check_when_inactive
from hooks.types import AddressLike, FeatureAddress


@dataclass(frozen=True)
class Scale:
    """`Scale("L3/383@4:", 2.0)` doubles feature 383 of layer 3 from position 4 on.

    `when_inactive="skip"` is the default: a multiple of zero is zero, so the choice changes nothing.
    """

    address: FeatureAddress
    factor: float
    when_inactive: WhenInactive = "skip"

    def __init__(self, address: AddressLike, factor: Any, *, when_inactive: WhenInactive = "skip"):
        object.__setattr__(self, "address", FeatureAddress.of(address))
        object.__setattr__(self, "factor", check_strength(factor, f"Scale {self.address}"))
        checked = check_when_inactive(when_inactive, f"Scale {self.address}")
        object.__setattr__(self, "when_inactive", checked)

    @property
    def affine(self) -> tuple[float, float]:
        """a -> factor · a."""
        return self.factor, 0.0


Intervention = Scale


def from_text(address: str, value: float | None) -> Scale:
    """`scale` needs a value.

    Raises:
        InterventionError: no value was given.
    """
    if value is None:
        raise InterventionError("scale needs a value", where=address, repair="write ADDRESS=VALUE")
    return Scale(address, value)
