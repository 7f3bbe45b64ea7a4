"""Record and score a prompt, choose the nodes, put edges and nodes together."""

from circuits.building.assembly import Setting, assemble, make_run, recorded, score_setting, settle
from circuits.building.choose_nodes import ORDERS, by_layer, coverage, select
from circuits.building.feature_scores import FeatureScores, score_features

__all__ = [
    "ORDERS",
    "FeatureScores",
    "Setting",
    "assemble",
    "by_layer",
    "coverage",
    "make_run",
    "recorded",
    "score_features",
    "score_setting",
    "select",
    "settle",
]
