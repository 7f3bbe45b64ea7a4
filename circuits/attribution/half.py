"""half: as `affine`, but the gate's product silu(z_g) · z_u is split evenly between its two factors.

This is the half rule of RelP (arXiv:2508.21258) with the attention pattern held, so that it conserves. The split is the
Shapley value of the product with a zero baseline, so the rule is meant for large changes.
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
RULE = Rule(norms="frozen", attention="frozen", gate="half")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph."""
    return known_edges(run, RULE, "half")


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The metric's gradient at some sites, [pos d_model] each."""
    return known_gradients(model, recording, targets, sites, RULE, "half")
