"""Changes of a feature's activation. One file each; the file name is the public name.

An intervention is affine in the activation a:  a -> factor · a + shift.  That covers ablation (0, 0), clamping
(0, v), scaling (c, 0) and adding (1, v). Thousands of interventions run as one table, and the two numbers are all that
a saved result needs. A file defines

    Intervention            a frozen dataclass with `address`, `when_inactive`, and the property `affine`
    from_text(address, value) -> Intervention        used by the command line; value is None if none was typed

An inactive feature is one that TopK did not keep; its activation is 0. `when_inactive="apply"` edits it nevertheless,
`"skip"` leaves the token unchanged. TopK is not run again on edited activations, with one exception: with
`mask="live"` the next feature in the order of TopK takes the place of an ablated one.
"""

import math
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import InterventionError
from hooks.plugins import discover
from hooks.types import FeatureAddress, shortened

WhenInactive = Literal["apply", "skip"]


@runtime_checkable
class FeatureIntervention(Protocol):
    """What every intervention offers."""

    @property
    def address(self) -> FeatureAddress:
        """The feature and the tokens it applies to."""
        ...

    @property
    def when_inactive(self) -> WhenInactive:
        """What happens where the feature is inactive."""
        ...

    @property
    def affine(self) -> tuple[float, float]:
        """(factor, shift) of a -> factor · a + shift."""
        ...


def change(
    old: Float[Tensor, " entry"],
    factor: Float[Tensor, " entry"],
    shift: Float[Tensor, " entry"],
    skip_inactive: Bool[Tensor, " entry"] | None,
) -> Float[Tensor, " entry"]:
    """new − old, in fp64. `skip_inactive` None: every entry is applied to inactive features too."""
    old = old.double()
    moved = factor * old + shift - old
    return moved if skip_inactive is None else moved.masked_fill(skip_inactive & (old == 0), 0)


def check_strength(value: Any, where: str) -> float:
    """A finite number of any library, or text that is one, such as "8"; else an error before the model runs.

    Raises:
        InterventionError: the strength is no number, NaN or infinite.
    """
    try:
        number = None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = None
    if number is None:
        raise InterventionError(
            f"the strength {shortened(repr(value))} is not a number",
            expected="an activation, such as 8.0",
            where=where,
            repair='for one relative to the model, Steer(address, "x2") or Steer(address, "0.1r")',
        )
    if not math.isfinite(number):
        raise InterventionError(f"the strength {shortened(str(value))} is not a finite number", where=where)
    return number


def check_when_inactive(value: str, where: str) -> WhenInactive:
    """`apply` or `skip`, or an error before the model runs.

    Raises:
        InterventionError: it is neither.
    """
    if value not in get_args(WhenInactive):
        raise InterventionError(f"unknown when_inactive {value!r}", expected="apply or skip", where=where)
    return value  # type: ignore[return-value]


INTERVENTIONS = discover(__name__, ("Intervention", "from_text"))
