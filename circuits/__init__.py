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
    from circuits.build.feature_scores import FeatureScores, score_features
    from circuits.faithfulness.cases import Pair, make_cases
    from circuits.faithfulness.evaluate import completeness, faithfulness
    from circuits.graph.graph import Graph, check_graph
    from circuits.graph.prune import prune
    from circuits.graph.scores import GraphScores, fold, graph_scores, signed_totals, subgraph_scores
    from circuits.graph.supernodes import merge_chains, supernode_graph
    from circuits.targets import Answer, Direction, Feature, Logit, Mass, Target
    from circuits.trace import prepare, trace
    from circuits.verification.decompose import decompose
    from circuits.verification.verify import Verification, verify
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
        "circuits.faithfulness.cases": ("Pair", "make_cases"),
        "circuits.verification.decompose": ("decompose",),
        "circuits.faithfulness.evaluate": ("completeness", "faithfulness"),
        "circuits.graph.graph": ("Graph", "check_graph"),
        "circuits.graph.scores": ("GraphScores", "fold", "graph_scores", "signed_totals", "subgraph_scores"),
        "circuits.graph.prune": ("prune",),
        "circuits.build.feature_scores": ("FeatureScores", "score_features"),
        "circuits.graph.supernodes": ("merge_chains", "supernode_graph"),
        "circuits.targets": ("Answer", "Direction", "Feature", "Logit", "Mass", "Target"),
        "circuits.trace": ("prepare", "trace"),
        "circuits.verification.verify": ("Verification", "verify"),
        "hooks.version": ("__version__",),
    },
)
