"""Add: raise or lower a feature's activation by an amount."""

from dataclasses import dataclass
from typing import Any

from hooks.errors import InterventionError
from hooks.interventions import WhenInactive, check_strength, check_when_inactive
from hooks.types import AddressLike, FeatureAddress


@dataclass(frozen=True)
class Add:
    """`Add("L3/383", 1.5)` adds 1.5 times the feature's decoder row.

    `when_inactive="apply"` is the default: adding to an inactive feature is plain steering along its decoder row.
    """

    address: FeatureAddress
    amount: float
    when_inactive: WhenInactive = "apply"

    def __init__(self, address: AddressLike, amount: Any, *, when_inactive: WhenInactive = "apply"):
        object.__setattr__(self, "address", FeatureAddress.of(address))
        object.__setattr__(self, "amount", check_strength(amount, f"Add {self.address}"))
        checked = check_when_inactive(when_inactive, f"Add {self.address}")
        object.__setattr__(self, "when_inactive", checked)

    @property
    def affine(self) -> tuple[float, float]:
        """a -> a + amount."""
        return 1.0, self.amount


Intervention = Add


def from_text(address: str, value: float | None) -> Add:
    """`add` needs a value.

    Raises:
        InterventionError: no value was given.
    """
    if value is None:
        raise InterventionError("add needs a value", where=address, repair="write ADDRESS=VALUE")
    return Add(address, value)
