"""relp: norm scales held, gates split by the half rule, attention live (RelP as published, arXiv:2508.21258).

It does not conserve, since the softmax is differentiated. It is good for whole positions and error nodes.
"""

from collections.abc import Iterator

from torch import Tensor

from circuits.blocks import Rule
from circuits.edges import LocalRun, Rows, known_edges, known_gradients
from circuits.targets import AnyTarget
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

CONSERVES = False
RULE = Rule(norms="frozen", attention="exact", gate="half")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph."""
    return known_edges(run, RULE, "relp")


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The metric's gradient at some sites, [pos d_model] each."""
    return known_gradients(model, recording, targets, sites, RULE, "relp")
