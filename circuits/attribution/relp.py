"""relp: norm scales held, gates split by the half rule, attention live (RelP as published, arXiv:2508.21258).

Does not conserve, since the softmax is differentiated. Good for whole positions and error nodes.
"""

from collections.abc import Iterator

from circuits.attribution import LocalRun, Rows
from circuits.attribution._factored import known_edges
from circuits.blocks import Rule

CONSERVES = False
RULE = Rule(norms="frozen", attention="exact", gate="half")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges between neighbouring cuts."""
    return known_edges(run, RULE, "relp")
