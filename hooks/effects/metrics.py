"""Metrics of rows of a sweep: read from their final streams, compared with those of unchanged rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.host import Host, execution_device

ROWS_AT_ONCE = 256  # distributions over the whole vocabulary that are computed at once
ANYWHERE = -1  # in place of the block at which an unchanged row enters: it is a pass over the whole prompt


@dataclass(frozen=True)
class Question:
    """What is measured: logit(target) − logit(against) at a position, and the columns that `metrics` names."""

    target: int
    against: int
    pos: int
    metrics: tuple[str, ...]


def baseline_of(logits: Float[Tensor, " vocab"], question: Question) -> dict[str, float]:
    """The clean run's metric, and the target's logit, probability and rank."""
    wide = logits.double()
    own, other = float(wide[question.target]), float(wide[question.against])
    rank = int((wide > own).sum()) + 1
    return {"metric": own - other, "logit": own, "prob": float(wide.softmax(-1)[question.target]), "rank": rank}


def measure_rows(
    host: Host, hidden: Float[Tensor, "row d_model"], clean: Float[Tensor, " vocab"], question: Question
) -> dict[str, Float[Tensor, " row"]]:
    """The metrics of each row itself; `against_controls` subtracts those of the unchanged rows later. The final norm
    and the logits are computed in fp32 at least."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        normed = host.decoder.norm(hidden.to(execution_device(host.decoder.norm), wide))
        if set(question.metrics) <= {"delta", "delta_logit"}:
            pair = host.unembed_rows(normed, [question.target, question.against]).double().cpu()
            found = {"delta": pair[:, 0] - pair[:, 1], "delta_logit": pair[:, 0]}
        else:
            parts = [_distributions(host.unembed(part), clean, question) for part in normed.split(ROWS_AT_ONCE)]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: found[name] for name in question.metrics}


def _distributions(
    logits: Float[Tensor, "row vocab"], clean: Float[Tensor, " vocab"], question: Question
) -> dict[str, Float[Tensor, " row"]]:
    logits = logits.double()
    log_probs, before = logits.log_softmax(-1), clean.to(logits).log_softmax(-1)
    own = logits[:, question.target]
    return {
        "delta": (own - logits[:, question.against]).cpu(),
        "delta_logit": own.cpu(),
        "delta_prob": log_probs[:, question.target].exp().cpu(),
        "kl": (before.exp() * (before - log_probs)).sum(-1).cpu(),
        "rank": ((logits > own[:, None]).sum(-1) + 1).double().cpu(),
    }


def against_controls(
    found: Mapping[str, Float[Tensor, " row"]], block: Int[Tensor, " group"], controls: Int[Tensor, " control"]
) -> dict[str, Float[Tensor, " group"]]:
    """Metrics minus their mean over the unchanged rows that enter at the same block: both then follow the same blocks
    of the clean run, and leave it at the same block. KL divergence and rank are kept as they are.

    Args:
        block: where each group enters.
        controls: where each unchanged row enters, or `ANYWHERE`.
    """
    count = len(block)
    alike = ((block[:, None] == controls) | (controls == ANYWHERE)).double()
    alike = alike / alike.sum(1, keepdim=True)
    return {
        name: values[:count] - (alike @ values[count:].double() if name.startswith("delta") else 0.0)
        for name, values in found.items()
    }
