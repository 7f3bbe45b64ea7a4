"""Clamp: set a feature to a value, whatever it was."""

from dataclasses import dataclass
from typing import Any

from hooks.errors import InterventionError
from hooks.interventions import WhenInactive, check_strength, check_when_inactive
from hooks.types import AddressLike, FeatureAddress


@dataclass(frozen=True)
class Clamp:
    """`Clamp("L3/383", 8.0)` holds feature 383 of layer 3 at 8.0, on the prompt and on every new token.

    `when_inactive="apply"` is the default: a clamp usually means to bring a feature in.
    """

    address: FeatureAddress
    value: float
    when_inactive: WhenInactive = "apply"

    def __init__(self, address: AddressLike, value: Any, *, when_inactive: WhenInactive = "apply"):
        object.__setattr__(self, "address", FeatureAddress.of(address))
        object.__setattr__(self, "value", check_strength(value, f"Clamp {self.address}"))
        checked = check_when_inactive(when_inactive, f"Clamp {self.address}")
        object.__setattr__(self, "when_inactive", checked)

    @property
    def affine(self) -> tuple[float, float]:
        """a -> value."""
        return 0.0, self.value


Intervention = Clamp


def from_text(address: str, value: float | None) -> Clamp:
    """`clamp` needs a value.

    Raises:
        InterventionError: no value was given.
    """
    if value is None:
        raise InterventionError("clamp needs a value", where=address, repair="write ADDRESS=VALUE")
    return Clamp(address, value)
