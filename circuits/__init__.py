"""Why does the model do it? Attribution graphs that carry their own verification.

from hooks import HookedModel
from circuits import trace
graph = trace(HookedModel.load("demo"), "fact: the capital of the state containing Dallas is")
graph.to_networkx()
"""

from circuits.graph import Graph
from circuits.prune import prune
from circuits.scores import FeatureScores, score_features
from circuits.targets import Target
from circuits.trace import trace
from circuits.verify import Verification, verify

__all__ = ["FeatureScores", "Graph", "Target", "Verification", "prune", "score_features", "trace", "verify"]
