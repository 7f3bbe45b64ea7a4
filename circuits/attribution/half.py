"""half: as `affine`, but the gate's product silu(z_g) · z_u is split evenly between its two factors.

The half rule of RelP (arXiv:2508.21258) with the attention pattern held, which makes it conserve: it is the Shapley
split of the product against a zero baseline, a rule for large changes.
"""

from collections.abc import Iterator

from circuits.attribution import LocalRun, Rows
from circuits.attribution._factored import known_edges
from circuits.blocks import Rule

CONSERVES = True
RULE = Rule(norms="frozen", attention="frozen", gate="half")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges between neighbouring cuts."""
    return known_edges(run, RULE, "half")
