"""What is explained: a target is a linear functional of the logits at one position.

The default is the metric used everywhere: logit(answer) − logit(best other token), both of the clean run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooks.errors import TargetError
from hooks.host import Host
from hooks.readout import best_other


@dataclass(frozen=True)
class Target:
    """sum_v coefficient_v · logit_v at one position.

    Attributes:
        name: how it is shown, for example `' Austin' − ' Sacramento'`.
        tokens, coefficients: the functional.
        pos: absolute position whose next-token logits are meant.
    """

    name: str
    tokens: tuple[int, ...]
    coefficients: tuple[float, ...]
    pos: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Target":
        """Read back what a saved graph knows of a target."""
        return cls(facts["name"], tuple(facts["tokens"]), tuple(facts["coefficients"]), facts["pos"])

    def value(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "*batch"]:
        """The target's value, differentiable, in fp32 or better."""
        return self.of_row(logits[..., self.pos, :])

    def of_row(self, row: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
        """The same from the logits at the target's position alone."""
        wide = row if row.dtype.itemsize >= 4 else row.float()
        picked = wide[..., list(self.tokens)]
        return (picked * picked.new_tensor(self.coefficients)).sum(-1)


TargetLike = str | int | Target | tuple[str | int, str | int]


def resolve_targets(
    host: Host, logits: Float[Tensor, "pos vocab"], targets: TargetLike | Sequence[TargetLike] | None
) -> tuple[Target, ...]:
    """Turn what the user named into targets; the first is the metric that scores are measured in.

    Args:
        logits: of the clean run, to find the answer and the best other token.
        targets: None (the model's own answer), a token, `(answer, against)`, a `Target`, or a list of these.

    Raises:
        TargetError: a name is not one token, a position does not occur, or a target is empty or doubled.
    """
    listed: Sequence[Any] = targets if isinstance(targets, list) else [targets]
    if not listed:
        raise TargetError("no target given", expected="a token, (answer, against), a Target, or None for the answer")
    found = tuple(_resolve(host, logits, target) for target in listed)
    names = [target.name for target in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TargetError(f"the target {twice[0]} is given twice")
    return found


def _resolve(host: Host, logits: Float[Tensor, "pos vocab"], target: TargetLike | None) -> Target:
    if isinstance(target, Target):
        pos = target.pos + len(logits) if target.pos < 0 else target.pos
        if not 0 <= pos < len(logits):
            raise TargetError(f"position {target.pos} does not occur", expected=f"0 to {len(logits) - 1}")
        return replace(target, pos=pos)
    named, against = target if isinstance(target, tuple) else (target, None)
    answer = int(logits[-1].argmax()) if named is None else host.token_id(named)
    other = best_other(logits[-1], answer) if against is None else host.token_id(against)
    if answer == other:
        raise TargetError("target and against are the same token", found=repr(host.string(answer)))
    name = f"{host.string(answer)!r} − {host.string(other)!r}"
    return Target(name, (answer, other), (1.0, -1.0), len(logits) - 1)
