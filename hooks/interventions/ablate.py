"""Ablate: set a feature to zero. Where it is inactive there is nothing to remove."""

from dataclasses import dataclass

from hooks.errors import InterventionError
from hooks.interventions import WhenInactive
from hooks.types import AddressLike, FeatureAddress


@dataclass(frozen=True)
class Ablate:
    """`Ablate("L3/383@-1")` zeroes feature 383 of layer 3 at the last prompt token."""

    address: FeatureAddress

    def __init__(self, address: AddressLike):
        object.__setattr__(self, "address", FeatureAddress.of(address))

    @property
    def when_inactive(self) -> WhenInactive:
        """Zero stays zero either way."""
        return "skip"

    @property
    def affine(self) -> tuple[float, float]:
        """a -> 0."""
        return 0.0, 0.0


Intervention = Ablate


def from_text(address: str, value: float | None) -> Ablate:
    """`ablate` takes no value.

    Raises:
        InterventionError: a value was given.
    """
    if value is not None:
        raise InterventionError(
            f"ablate takes no value, found {value}", where=address, repair="use clamp to set a value"
        )
    return Ablate(address)
