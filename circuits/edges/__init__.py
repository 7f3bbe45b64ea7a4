"""How edges are computed, below the rules: cuts, recorded blocks, gradients that are carried down through them."""

from circuits.edges.factored import all_edges, all_gradients, group_edges, known_edges, known_gradients
from circuits.edges.heads import Parts, parts_of
from circuits.edges.measured import Removal, feature_values, run_held
from circuits.edges.metric_ends import constants, ends
from circuits.edges.run import Cut, LocalRun, Rows, contract, make_cuts, stretches
from circuits.edges.stack import (
    MIDDLE,
    WRITABLE,
    Block,
    Point,
    Stack,
    joins_at,
    read_from,
    rotary,
    stack_of,
    stream_sites,
)
from circuits.edges.tokens import token_rows
from circuits.edges.totals import chain_gradients

__all__ = [
    "MIDDLE",
    "WRITABLE",
    "Block",
    "Cut",
    "LocalRun",
    "Parts",
    "Point",
    "Removal",
    "Rows",
    "Stack",
    "all_edges",
    "all_gradients",
    "chain_gradients",
    "constants",
    "contract",
    "ends",
    "feature_values",
    "group_edges",
    "joins_at",
    "known_edges",
    "known_gradients",
    "make_cuts",
    "parts_of",
    "read_from",
    "rotary",
    "run_held",
    "stack_of",
    "stream_sites",
    "stretches",
    "token_rows",
]
