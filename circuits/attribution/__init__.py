"""Attribution rules: how the edges of a graph are computed. One file per rule; the file name is the rule's name.

A rule defines

    CONSERVES: bool          whether the edges into a target sum to its value, biases included
    edge_rows(run: LocalRun) -> Iterator[Rows]
    gradients(model, recording, targets, sites, counterfactual) -> dict[Site, Tensor]
                             the metric's gradient in the plain model, [pos d_model] per site
"""

from circuits.attribution._integrated import integrated_scores
from circuits.attribution.ose import one_step_scores
from hooks.plugins import discover

RULES = discover(__name__, ("CONSERVES", "edge_rows", "gradients"))
"""Name of a rule → its file, a module with `CONSERVES`, `edge_rows` and `gradients`."""

__all__ = ["RULES", "integrated_scores", "one_step_scores"]
