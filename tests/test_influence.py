"""Influence and pruning on graphs small enough to do by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Graph, prune
from circuits.influence import mass_threshold, node_influence
from circuits.nodes import FEATURE, TARGET, TOKEN, NodeIndex
from hooks import UserError

# tokens 0, 1 → layer 0: features A@0, B@1 → layer 1: C@1, D@1 → target
INDEX = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 1: [(1, 20), (1, 21)]}, [1])
T0, T1 = INDEX.rows(TOKEN)
A, B = INDEX.rows(FEATURE, 0)
C, D = INDEX.rows(FEATURE, 1)
(GOAL,) = INDEX.rows(TARGET)
ERROR_C = INDEX.rows(3, 1)[1]
EDGES = [
    (T0, A, 2.0), (T1, B, -1.0), (A, C, 1.0), (B, C, -3.0), (B, D, 5.0),
    (C, GOAL, 2.0), (D, GOAL, -1.0), (ERROR_C, GOAL, 1.0),
]  # fmt: skip


def graph_of(edges: list[tuple[int, int, float]], index: NodeIndex = INDEX) -> Graph:
    source, target, weight = (np.array(column) for column in zip(*edges, strict=True))
    influence, _ = node_influence(index, source, target, weight)
    nothing = np.zeros(len(index))
    return Graph(index, nothing, nothing, influence, source, target, weight.astype(float), weight.astype(float))


def test_influence_by_hand():
    """Into the target: C 2/4, D 1/4, error 1/4. Into C: A 1/4, B 3/4. So A = 1/8, B = 3/8 + 1/4."""
    graph = graph_of(EDGES)
    expected = {C: 1 / 2, D: 1 / 4, ERROR_C: 1 / 4, A: 1 / 8, B: 5 / 8, T0: 1 / 8, T1: 5 / 8, GOAL: 1.0}
    for row, value in expected.items():
        assert graph.influence[row] == pytest.approx(value), graph.names[row]


def test_edge_flow_by_hand():
    source, target, weight = (np.array(column) for column in zip(*EDGES, strict=True))
    _, flow = node_influence(INDEX, source, target, weight)
    np.testing.assert_allclose(flow, [1 / 8, 5 / 8, 1 / 8, 3 / 8, 1 / 4, 1 / 2, 1 / 4, 1 / 4])


def test_the_layered_sweep_is_the_sum_of_matrix_powers():
    rng = np.random.default_rng(0)
    index = NodeIndex.build(3, {layer: [(p, f) for p in range(3) for f in range(4)] for layer in range(3)}, [2])
    levels = [
        index.rows(TOKEN),
        *(np.flatnonzero(index.layer == layer) for layer in range(3)),
        index.rows(TARGET),
    ]
    edges = []
    for below, above in pairwise(levels):
        targets = above[(index.kind[above] == FEATURE) | (index.kind[above] == TARGET)]
        edges += [(s, t, rng.normal()) for s in below for t in targets if rng.random() < 0.7]
    graph = graph_of(edges, index)
    adjacency = np.zeros((len(index), len(index)))
    for s, t, w in edges:
        adjacency[t, s] = abs(w)
    share = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1e-10)
    power, total = np.zeros(len(index)), np.zeros(len(index))
    power[index.rows(TARGET)[0]] = 1.0
    for _ in range(6):
        total += power
        power = power @ share
    np.testing.assert_allclose(graph.influence, total, atol=1e-12)


def test_pruning_by_hand():
    """Counted nodes in order: B 5/8, C 1/2, D 1/4, error 1/4, A 1/8 of 14/8 in all.

    70 % is reached by B, C and the tied D and error; A goes, and with it the only way from token 0.
    """
    pruned = prune(graph_of(EDGES), node_threshold=0.7, edge_threshold=1.0)
    assert set(pruned.names) == {
        "token@0",
        "token@1",
        "L0/11@1",
        "L1/20@1",
        "L1/21@1",
        "error L1@1",
        "target 0",
    }
    pairs = {(pruned.names[s], pruned.names[t]) for s, t in zip(pruned.source, pruned.target, strict=True)}
    assert pairs == {
        ("token@1", "L0/11@1"), ("L0/11@1", "L1/20@1"), ("L0/11@1", "L1/21@1"),
        ("L1/20@1", "target 0"), ("L1/21@1", "target 0"), ("error L1@1", "target 0"),
    }  # fmt: skip


def test_loose_ends_are_dropped_until_nothing_changes():
    """Without D's way out, D goes; then nothing needs the edge into it."""
    edges = [edge for edge in EDGES if edge[:2] != (D, GOAL)]
    pruned = prune(graph_of(edges), node_threshold=1.0, edge_threshold=1.0)
    assert "L1/21@1" not in pruned.names
    assert "L0/11@1" in pruned.names


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_pruning_keeps_a_well_formed_subgraph(seed, nodes, edges):
    rng = np.random.default_rng(seed)
    weighted = [(s, t, float(rng.normal())) for s, t, _ in EDGES]
    graph = graph_of(weighted)
    pruned = prune(graph, node_threshold=nodes, edge_threshold=edges)
    old = {
        (graph.names[s], graph.names[t]): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)
    }
    for s, t, w in zip(pruned.source, pruned.target, pruned.weight, strict=True):
        assert old[pruned.names[s], pruned.names[t]] == w
    for row in np.flatnonzero(pruned.index.kind == FEATURE):
        assert row in pruned.source
        assert row in pruned.target
    assert {"token@0", "token@1", "target 0"} <= set(pruned.names)
    again = prune(pruned, node_threshold=1.0, edge_threshold=1.0)
    assert set(again.names) == set(pruned.names)


@pytest.mark.parametrize(
    ("fraction", "value"), [(0.4, 5.0), (0.5, 5.0), (0.51, 3.0), (0.8, 3.0), (0.9, 1.0), (1.0, 1.0)]
)
def test_mass_threshold(fraction, value):
    assert mass_threshold(np.array([1.0, 5.0, 0.0, 3.0, 1.0]), fraction) == value


def test_thresholds_are_checked():
    with pytest.raises(UserError, match="node_threshold"):
        prune(graph_of(EDGES), node_threshold=0.0)
    with pytest.raises(UserError, match="edge_threshold"):
        prune(graph_of(EDGES), edge_threshold=1.5)
