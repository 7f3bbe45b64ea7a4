"""Unsigned influence of every node on the first target: one sweep down the layers, never a node × node matrix.

    Â[j, i] = |e_ij| / sum_i |e_ij|        I = w Â + w Â² + …        w = 1 at the target

(circuit-tracer's definition; Ameisen et al. 2025.) Edges join neighbouring cuts, so the sum of powers is one pass
from the targets down.
"""

import numpy as np
from jaxtyping import Float, Int

from circuits.nodes import TARGET, NodeIndex

EPS = 1e-10  # circuit-tracer's clamp


def node_influence(
    index: NodeIndex,
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weight: Float[np.ndarray, " edge"],
    mass: Float[np.ndarray, " node"] | None = None,
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " edge"]]:
    """Influence per node, and per edge Â · (influence of its target). The first target itself counts as 1.

    Args:
        mass: sum |e| into each node, where edges were left out that must count in the normalisation.
    """
    size = np.abs(weight)
    total = np.bincount(target, weights=size, minlength=len(index)) if mass is None else mass
    total = np.maximum(total, EPS)
    share = size / total[target]
    influence = np.zeros(len(index))
    influence[index.rows(TARGET)[:1]] = 1.0
    flow = np.zeros(len(source))
    depth = _depth(index)
    for level in sorted(set(depth[target].tolist()), reverse=True):
        here = np.flatnonzero(depth[target] == level)
        flow[here] = share[here] * influence[target[here]]
        influence += np.bincount(source[here], weights=flow[here], minlength=len(index))
    return influence, flow


def _depth(index: NodeIndex) -> Int[np.ndarray, " node"]:
    """Tokens and layers ascending, targets last."""
    return np.where(index.kind == TARGET, index.layer.max() + 1, index.layer)


def mass_threshold(values: Float[np.ndarray, " item"], fraction: float) -> float:
    """The largest value whose items and all larger ones carry `fraction` of the sum (ties stay in)."""
    ordered = np.sort(values)[::-1]
    last = int(np.count_nonzero(ordered)) - 1
    if last < 0:
        return 0.0
    if fraction >= 1:  # rounding of the running sum must not cost the smallest
        return float(ordered[last])
    place = int(np.searchsorted(np.cumsum(ordered) / ordered.sum(), fraction))
    return float(ordered[place if place < last else last])
