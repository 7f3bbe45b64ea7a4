"""Predictions of a graph against measurements; edges split by head."""

from circuits.verification.by_head import decompose
from circuits.verification.verifying import Verification, measure_edges, measure_nodes, verify, verify_in

__all__ = [
    "Verification",
    "decompose",
    "measure_edges",
    "measure_nodes",
    "verify",
    "verify_in",
]
