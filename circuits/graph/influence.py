"""Unsigned influence of every node on the targets: one pass down the layers, without a node × node matrix.

    Â[j, i] = |e_ij| / sum_i |e_ij|        I = w + w Â + w Â² + …        w = the weights of the targets

(circuit-tracer's definition, with w itself added at the targets; Ameisen et al. 2025.) An edge leads from a lower layer
to a higher one, over any number of layers. So when the pass reaches a node, the influence of everything above it is
known, and the sum of powers is one pass over the edges. Remainder nodes stand for what the rule does not explain: their
edges are not counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from circuits.graph.nodes import REMAINDER, TARGET, NodeIndex

EPS = 1e-10  # circuit-tracer's clamp


def node_influence(
    index: NodeIndex,
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weight: Float[np.ndarray, " edge"],
    mass: Float[np.ndarray, " node"] | None = None,
    start: Float[np.ndarray, " node"] | None = None,
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " edge"]]:
    """Influence per node, and per edge Â · (influence of its target).

    Args:
        mass: sum |e| into each node, if edges were left out that the normalisation must include; without the edges of
            remainder nodes.
        start: w, see `start_weights`; None: every target counts 1.
    """
    share = shares(index, source, target, weight, mass)
    return sweep(index, source, target, share, start_weights(index) if start is None else start)


def sweep(
    index: NodeIndex,
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    share: Float[np.ndarray, " edge"],
    start: Float[np.ndarray, " node"],
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " edge"]]:
    """Start with a number at each node and pass it down the edges in proportion to their shares. Returns the sum per
    node, and the amount per edge."""
    influence, flow = start.copy(), np.zeros(len(source))
    for edges in levels(index, target):
        flow[edges] = share[edges] * influence[target[edges]]
        influence += np.bincount(source[edges], weights=flow[edges], minlength=len(index))
    return influence, flow


def shares(
    index: NodeIndex,
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weight: Float[np.ndarray, " edge"],
    mass: Float[np.ndarray, " node"] | None = None,
) -> Float[np.ndarray, " edge"]:
    """Â: an edge's share of the sum of |e| into its target; 0 for the edges of remainder nodes."""
    size = np.where(index.kind[source] == REMAINDER, 0.0, np.abs(weight))
    total = np.bincount(target, weights=size, minlength=len(index)) if mass is None else mass
    return size / np.maximum(total, EPS)[target]


def start_weights(index: NodeIndex, targets: Sequence[Mapping[str, Any]] = ()) -> Float[np.ndarray, " node"]:
    """w: the weight of each target, 0 at every other node.

    Args:
        targets: `graph.meta["targets"]`; a target without a "weight" counts 1.
    """
    start = np.zeros(len(index))
    rows = index.rows(TARGET)
    numbers = index.feature[rows].tolist()
    start[rows] = [targets[number].get("weight", 1.0) if number < len(targets) else 1.0 for number in numbers]
    return start


def levels(index: NodeIndex, target: Int[np.ndarray, " edge"]) -> Iterator[Int[np.ndarray, " kept"]]:
    """The edges grouped by the layer they lead to, from the targets down; each edge once, in stable order."""
    depth = np.where(index.kind == TARGET, index.layer.max() + 1, index.layer)[target].astype(np.int16)
    order = np.argsort(depth, kind="stable")  # a radix sort, since these are 16-bit numbers
    steps = np.flatnonzero(np.diff(depth[order])) + 1
    yield from reversed(np.split(order, steps))


def mass_threshold(values: Float[np.ndarray, " item"], fraction: float) -> float:
    """The largest value v such that all items of at least v make up `fraction` of the sum."""
    ordered = np.sort(values)[::-1]
    last = int(np.count_nonzero(ordered)) - 1
    if last < 0:
        return 0.0
    if fraction >= 1:  # else rounding of the running sum could leave out the smallest item
        return float(ordered[last])
    place = int(np.searchsorted(np.cumsum(ordered) / ordered.sum(), fraction))
    return float(ordered[place if place < last else last])
