"""exact: the full Jacobian of the model between two nodes, with softmax, norms and gates; factored, without autograd.

It is exact to first order: scaling the source by (1 + ε) changes the target's pre-activation by ε e_ij + O(ε²). It does
not conserve: the edges into a target do not sum to its value, and a remainder node has the difference. Its edges equal
those of `autograd`, which is used where the algebra does not support the model.
"""

from collections.abc import Iterator

from torch import Tensor

from circuits.attribution import autograd
from circuits.blocks import Rule
from circuits.edges import LocalRun, Rows, all_edges, all_gradients
from circuits.targets import AnyTarget
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

CONSERVES = False
RULE = Rule(norms="exact", attention="exact", gate="exact")


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph."""
    return all_edges(run, RULE) or autograd.edge_rows(run)


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The metric's gradient at some sites, [pos d_model] each; in a pair of prompts it is at the clean prompt, too."""
    return all_gradients(model, recording, targets, sites, RULE) or autograd.gradients(model, recording, targets, sites)
