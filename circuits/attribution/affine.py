"""affine: attention pattern, norm scales and gates are held at their clean values, so the model between two nodes is an
affine map.

It conserves: the edges into a target, value biases included, sum to its value. Use it to decompose a value; to predict
the effect of a change, `exact` is better (docs/graphs.md).
"""

from collections.abc import Iterator

from torch import Tensor

from circuits.blocks import Rule
from circuits.edges import LocalRun, Rows, known_edges, known_gradients
from circuits.targets import AnyTarget
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

CONSERVES = True
RULE = Rule(norms="frozen", attention="frozen", gate="frozen")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph."""
    return known_edges(run, RULE, "affine")


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The metric's gradient at some sites, [pos d_model] each."""
    return known_gradients(model, recording, targets, sites, RULE, "affine")
