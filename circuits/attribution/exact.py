"""exact: the full Jacobian of the piece between two cuts, softmax, norms and gates included; factored, no autograd.

First-order exact: scaling the source by (1 + ε) changes the target's pre-activation by ε e_ij + O(ε²). It does not
conserve: the edges into a target do not sum to its value, and what is left is reported, never hidden in a node. Equal
to `autograd`, which it falls back to where the algebra does not know the model.
"""

from collections.abc import Iterator

from circuits.attribution import LocalRun, Rows, autograd
from circuits.attribution._factored import all_edges
from circuits.blocks import Rule

CONSERVES = False
RULE = Rule(norms="exact", attention="exact", gate="exact")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges between neighbouring cuts."""
    return all_edges(run, RULE) or autograd.edge_rows(run)
