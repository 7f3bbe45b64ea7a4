"""affine: attention pattern, norm scales and gates held at their clean values, which makes every piece an affine map.

Conserves: the edges into a target, value biases included, sum to its value. Right for decomposing a value; for
predicting what a change does, `exact` is better (docs/graphs.md).
"""

from collections.abc import Iterator

from circuits.attribution import LocalRun, Rows
from circuits.attribution._factored import known_edges
from circuits.blocks import Rule

CONSERVES = True
RULE = Rule(norms="frozen", attention="frozen", gate="frozen")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges between neighbouring cuts."""
    return known_edges(run, RULE, "affine")
