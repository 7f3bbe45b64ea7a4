"""Why does the model do it? Attribution graphs that carry their own verification.

from hooks import HookedModel
from circuits import trace
graph = trace(HookedModel.load("demo"), "fact: the capital of the state containing Dallas is")
graph.to_networkx()
"""

from pathlib import Path
from typing import TYPE_CHECKING

import hooks
from hooks.lazy import lazily

if not hooks.__file__ or Path(hooks.__file__).parent.parent != Path(__file__).parent.parent:
    raise ImportError(  # the import names are generic; another distribution may own one of them
        f"`hooks` comes from {hooks.__file__ or 'a folder without __init__.py'}, which is not the one of qwen-circuits "
        f"beside {Path(__file__).parent}: another package of that name is in the way"
    )

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_packages.py compares the three lists
    from circuits.attribution import RULES
    from circuits.building import FeatureScores, score_features
    from circuits.faithfulness import Pair, completeness, faithfulness, make_cases
    from circuits.graph import (
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
    from circuits.targets import Answer, Direction, Feature, Logit, Mass, Target
    from circuits.tracing import prepare, trace
    from circuits.verification import Verification, decompose, verify
    from hooks.version import __version__ as __version__

__all__ = [
    "RULES",
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
    "faithfulness",
    "fold",
    "graph_scores",
    "make_cases",
    "merge_chains",
    "prepare",
    "prune",
    "score_features",
    "signed_totals",
    "subgraph_scores",
    "supernode_graph",
    "trace",
    "verify",
]

lazily(
    __name__,
    {
        "circuits.attribution": ("RULES",),
        "circuits.building": (
            "FeatureScores",
            "score_features",
        ),
        "circuits.faithfulness": (
            "Pair",
            "completeness",
            "faithfulness",
            "make_cases",
        ),
        "circuits.graph": (
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
        "circuits.targets": (
            "Answer",
            "Direction",
            "Feature",
            "Logit",
            "Mass",
            "Target",
        ),
        "circuits.tracing": (
            "prepare",
            "trace",
        ),
        "circuits.verification": (
            "Verification",
            "decompose",
            "verify",
        ),
        "hooks.version": ("__version__",),
    },
)
