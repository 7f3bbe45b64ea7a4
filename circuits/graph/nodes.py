"""The index of a graph's nodes: what each row is. Only this file computes row numbers.

Order of rows: tokens by position, the bias of the blocks below the first cut; then per cut (a layer with a transcoder,
ascending): features by (position, feature), one rest node per position, one error node per position, one bias node;
then targets; then, for a rule that does not conserve, one remainder node per group of targets: the targets' values
minus the sum of the edges into them. A remainder has no layer and no position; its `feature` is the layer of the
group, and `NONE` for the targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

KINDS = ("token", "feature", "rest", "error", "bias", "target", "remainder")
TOKEN, REST, ERROR, BIAS, REMAINDER = (KINDS.index(kind) for kind in ("token", "rest", "error", "bias", "remainder"))
FEATURE = KINDS.index("feature")
"""The kind of features: `graph.index.rows(FEATURE)` are their rows."""
TARGET = KINDS.index("target")
"""The kind of targets: `graph.index.rows(TARGET)` are their rows."""
NONE = -1  # no layer, no position, or no feature


@dataclass(frozen=True)
class NodeIndex:
    """Kind, layer, position and feature of every row; `NONE` where a kind has no such thing."""

    kind: Int[np.ndarray, " node"]
    layer: Int[np.ndarray, " node"]
    pos: Int[np.ndarray, " node"]
    feature: Int[np.ndarray, " node"]

    @classmethod
    def build(
        cls,
        n_pos: int,
        selected: Mapping[int, Sequence[tuple[int, int]]],
        target_positions: Sequence[int],
        *,
        remainders: bool = False,
    ) -> "NodeIndex":
        """The rows for a prompt of `n_pos` tokens.

        Args:
            selected: per layer with a transcoder, the (position, feature) pairs that become nodes.
            target_positions: the position of each target.
            remainders: whether each group of targets gets a remainder node.
        """
        rows = [(TOKEN, NONE, pos, NONE) for pos in range(n_pos)]
        rows.append((BIAS, NONE, NONE, NONE))
        for layer in sorted(selected):
            rows += [(FEATURE, layer, pos, feature) for pos, feature in sorted(selected[layer])]
            rows += [(kind, layer, pos, NONE) for kind in (REST, ERROR) for pos in range(n_pos)]
            rows.append((BIAS, layer, NONE, NONE))
        rows += [(TARGET, NONE, pos, number) for number, pos in enumerate(target_positions)]
        if remainders:
            rows += [(REMAINDER, NONE, NONE, layer) for layer in (*sorted(selected), NONE)]
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        return cls(*(np.ascontiguousarray(column) for column in table.T))

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, kind: int, layer: int | None = None) -> Int[np.ndarray, " row"]:
        """The rows of one kind, at one layer or at all."""
        hit = self.kind == kind
        return np.flatnonzero(hit if layer is None else hit & (self.layer == layer))

    def take(self, keep: Int[np.ndarray, " row"]) -> "NodeIndex":
        """Some rows, in order."""
        return NodeIndex(self.kind[keep], self.layer[keep], self.pos[keep], self.feature[keep])

    def name(self, row: int, target_names: Sequence[str] = ()) -> str:
        """A unique readable id: a feature's is its address."""
        kind, layer, pos, feature = (int(column[row]) for column in (self.kind, self.layer, self.pos, self.feature))
        if kind == FEATURE:
            return f"L{layer}/{feature}@{pos}"
        if kind == TOKEN:
            return f"token@{pos}"
        if kind == TARGET:
            return f"target {target_names[feature]}" if feature < len(target_names) else f"target {feature}"
        if kind == REMAINDER:
            return "remainder targets" if feature == NONE else f"remainder L{feature}"
        place = "embedding" if layer == NONE else f"L{layer}"
        return f"{KINDS[kind]} {place}" + ("" if pos == NONE else f"@{pos}")
