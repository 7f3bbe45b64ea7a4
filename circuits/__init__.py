"""Why does the model do it? Attribution graphs that carry their own verification.

from hooks import HookedModel
from circuits import trace
graph = trace(HookedModel.load("demo"), "fact: the capital of the state containing Dallas is")
graph.to_networkx()
"""

from typing import TYPE_CHECKING

from qwen_circuits import refuse_another

refuse_another("hooks")  # other distributions have packages of this name

from hooks.lazy import lazily  # noqa: E402

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_packages.py compares the three lists
    from circuits.attribution import RULES
    from circuits.building import FeatureScores, score_features
    from circuits.export import export
    from circuits.faithfulness import RANKINGS, Pair, completeness, faithfulness, make_cases, measure, plot_curves, rank
    from circuits.graph import (
        FEATURE,
        TARGET,
        Graph,
        GraphScores,
        check_graph,
        fold,
        graph_scores,
        merge_chains,
        prune,
        signed_totals,
        subgraph_scores,
        supernode_graph,
    )
    from circuits.plots import dose_plot, sweep_plot
    from circuits.targets import Answer, Direction, Feature, Logit, Mass, Target
    from circuits.tracing import prepare, trace
    from circuits.verification import Verification, decompose, verify
    from hooks.version import __version__ as __version__

__all__ = [
    "FEATURE",
    "RANKINGS",
    "RULES",
    "TARGET",
    "Answer",
    "Direction",
    "Feature",
    "FeatureScores",
    "Graph",
    "GraphScores",
    "Logit",
    "Mass",
    "Pair",
    "Target",
    "Verification",
    "check_graph",
    "completeness",
    "decompose",
    "dose_plot",
    "export",
    "faithfulness",
    "fold",
    "graph_scores",
    "make_cases",
    "measure",
    "merge_chains",
    "plot_curves",
    "prepare",
    "prune",
    "rank",
    "score_features",
    "signed_totals",
    "subgraph_scores",
    "supernode_graph",
    "sweep_plot",
    "trace",
    "verify",
]

lazily(
    __name__,
    {
        "circuits.attribution": ("RULES",),
        "circuits.building": ("FeatureScores", "score_features"),
        "circuits.export": ("export",),
        "circuits.faithfulness": (
            "RANKINGS",
            "Pair",
            "completeness",
            "faithfulness",
            "make_cases",
            "measure",
            "plot_curves",
            "rank",
        ),
        "circuits.graph": (
            "FEATURE",
            "TARGET",
            "Graph",
            "GraphScores",
            "check_graph",
            "fold",
            "graph_scores",
            "merge_chains",
            "prune",
            "signed_totals",
            "subgraph_scores",
            "supernode_graph",
        ),
        "circuits.plots": ("dose_plot", "sweep_plot"),
        "circuits.targets": ("Answer", "Direction", "Feature", "Logit", "Mass", "Target"),
        "circuits.tracing": ("prepare", "trace"),
        "circuits.verification": ("Verification", "decompose", "verify"),
        "hooks.version": ("__version__",),
    },
)
