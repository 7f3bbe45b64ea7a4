"""Influence and pruning on graphs small enough to do by hand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Graph, prune
from circuits.graph import ERROR, FEATURE, REMAINDER, TARGET, TOKEN, NodeIndex, node_influence, start_weights
from circuits.graph.influence import levels, mass_threshold
from hooks import UserError

# tokens 0, 1 → layer 0: features A@0, B@1 → layer 1: C@1, D@1 → target
INDEX = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 1: [(1, 20), (1, 21)]}, [1])
T0, T1 = INDEX.rows(TOKEN)
A, B = INDEX.rows(FEATURE, 0)
C, D = INDEX.rows(FEATURE, 1)
(GOAL,) = INDEX.rows(TARGET)
ERROR_C = INDEX.rows(ERROR, 1)[1]
EDGES = [
    (T0, A, 2.0), (T1, B, -1.0), (A, C, 1.0), (B, C, -3.0), (B, D, 5.0),
    (C, GOAL, 2.0), (D, GOAL, -1.0), (ERROR_C, GOAL, 1.0),
]  # fmt: skip


def graph_of(edges: list[tuple[int, int, float]], index: NodeIndex = INDEX, **meta: Any) -> Graph:
    source, target = (np.array([edge[end] for edge in edges], dtype=np.int64) for end in (0, 1))
    weight = np.array([edge[2] for edge in edges], dtype=np.float64)
    influence, _ = node_influence(index, source, target, weight, start=start_weights(index, meta.get("targets", [])))
    nothing = np.zeros(len(index))
    return Graph(index, nothing, nothing, influence, source, target, weight, weight, meta)


def layered(seed: int, *, density: float = 0.5, remainders: bool = True) -> Graph:
    """A random graph whose edges skip layers, in random order: every kind of node, weighted targets."""
    rng = np.random.default_rng(seed)
    n_pos, n_targets = (int(n) for n in rng.integers(1, 4, size=2))
    places = [(pos, feature) for pos in range(n_pos) for feature in range(3)]
    selected = {layer: [place for place in places if rng.random() < 0.4] for layer in (0, 1, 3)}
    index = NodeIndex.build(n_pos, selected, [n_pos - 1] * n_targets, remainders=remainders)
    above = np.where(index.kind == TARGET, 9, index.layer)
    fed = np.flatnonzero((index.kind == FEATURE) | (index.kind == TARGET))
    pairs = [(s, t) for t in fed for s in np.flatnonzero(above < above[t]) if rng.random() < density]
    rng.shuffle(pairs)
    targets = [{"name": str(n), "weight": float(rng.uniform(0.1, 1))} for n in range(n_targets)]
    graph = graph_of([(int(s), int(t), float(rng.normal())) for s, t in pairs], index, targets=targets)
    return replace(graph, activation=rng.uniform(0.5, 2, len(index)))


def dense_shares(graph: Graph, but: tuple[int, ...] = ()) -> np.ndarray:
    """circuit-tracer's matrix: targets are rows, sources columns, |e| over the sum of its row."""
    matrix = np.zeros((graph.n_nodes, graph.n_nodes))
    for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True):
        if graph.index.kind[s] not in (REMAINDER, *but):
            matrix[t, s] += abs(w)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-10)


def dense_influence(matrix: np.ndarray, start: np.ndarray) -> np.ndarray:
    """circuit-tracer's I = w Â + w Â² + …, until nothing is left."""
    total, power = np.zeros(len(matrix)), start @ matrix
    while power.any():
        total, power = total + power, power @ matrix
    return total


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
    start = (index.kind == TARGET).astype(float)
    np.testing.assert_allclose(graph.influence, start + dense_influence(dense_shares(graph), start), atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_edges_may_skip_layers_and_targets_have_weights(seed):
    graph = layered(seed)
    start, matrix = start_weights(graph.index, graph.meta["targets"]), dense_shares(graph)
    expected = start + dense_influence(matrix, start)
    influence, flow = node_influence(graph.index, graph.source, graph.target, graph.weight, start=start)
    np.testing.assert_allclose(influence, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(flow, (matrix * expected[:, None])[graph.target, graph.source], rtol=1e-12, atol=1e-14)


def test_targets_by_hand():
    """G has weight 1/2, H 1/4. Into G: A 1/4 (skipping layer 1) and C 3/4; into H: C; into C: A and B, half each."""
    index = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 1: [(1, 20), (1, 21)]}, [1, 1], remainders=True)
    g, h = index.rows(TARGET)
    edges = [(A, g, 1.0), (C, g, -3.0), (C, h, 2.0), (A, C, 1.0), (B, C, 1.0), (index.rows(REMAINDER)[-1], g, 50.0)]
    graph = graph_of(edges, index, targets=[{"name": "g", "weight": 0.5}, {"name": "h", "weight": 0.25}])
    expected = {g: 1 / 2, h: 1 / 4, C: 3 / 8 + 1 / 4, A: 1 / 8 + 5 / 16, B: 5 / 16}
    np.testing.assert_array_equal(graph.influence, [expected.get(row, 0.0) for row in range(len(index))])


def test_a_target_without_a_weight_counts_one():
    index = NodeIndex.build(1, {0: []}, [0, 0, 0])
    targets = [{"name": "a", "weight": 0.25}, {"name": "b"}]
    rows = index.rows(TARGET)
    assert start_weights(index, targets)[rows].tolist() == [0.25, 1.0, 1.0]
    some = index.take(rows[1:])  # the number of a target is not its row
    assert start_weights(some, targets).tolist() == [1.0, 1.0]
    assert start_weights(index.take(rows[:1]), targets).tolist() == [0.25]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_the_sweep_meets_every_edge_once_from_the_top_and_in_order(seed):
    graph = layered(seed)
    parts = list(levels(graph.index, graph.target))
    layers = [np.where(graph.index.kind == TARGET, 9, graph.index.layer)[graph.target[part]] for part in parts]
    assert sorted(np.concatenate(parts).tolist()) == list(range(graph.n_edges))
    assert all((layer == layer[0]).all() for layer in layers if len(layer))
    assert all(upper[0] > lower[0] for upper, lower in pairwise(layers))
    assert all((np.diff(part) > 0).all() for part in parts)


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


def test_remainders_stay_with_what_they_lead_to_and_are_never_counted():
    """With remainders a hundred times as strong as everything else, the same nodes and edges are kept."""
    index = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 1: [(1, 20), (1, 21)]}, [1], remainders=True)
    below, above, last = index.rows(REMAINDER)
    extra = [(below, A, 900.0), (below, B, 900.0), (above, D, -900.0), (last, GOAL, 900.0)]
    kept = {"node_threshold": 0.5, "edge_threshold": 0.8}
    graph = graph_of([*EDGES, *extra], index)
    loud = replace(graph, influence=np.where(index.kind == REMAINDER, 9.0, graph.influence))
    plain, pruned = prune(graph_of(EDGES), **kept), prune(loud, **kept)

    def pairs(graph: Graph) -> set[tuple[str, str]]:
        return {(graph.names[s], graph.names[t]) for s, t in zip(graph.source, graph.target, strict=True)}

    stays = {("remainder L0", "L0/11@1"), ("remainder targets", "target 0")}  # A and D are pruned
    assert "L1/21@1" not in plain.names
    assert pairs(pruned) == pairs(plain) | stays
    assert set(pruned.names) == {*plain.names, "remainder L0", "remainder targets"}


def test_a_remainder_does_not_feed_a_feature():
    """C's only other way in is pruned; that something is left over there is no reason to keep it."""
    index = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 1: [(1, 20), (1, 21)]}, [1], remainders=True)
    _, above, _ = index.rows(REMAINDER)
    edges = [(T1, B, 1.0), (B, D, 1.0), (D, GOAL, 1.0), (C, GOAL, 1.0), (above, C, 1.0)]
    pruned = prune(graph_of(edges, index), node_threshold=1.0, edge_threshold=1.0)
    assert set(pruned.names) == {"token@0", "token@1", "L0/11@1", "L1/21@1", "target 0"}


def test_pruning_weighs_the_targets():
    """All of H's weight comes through B; where H counts little, B is not worth keeping."""
    index = NodeIndex.build(2, {0: [(0, 10), (1, 11)]}, [1, 1])
    a, b = index.rows(FEATURE)
    g, h = index.rows(TARGET)
    edges = [(T0, a, 1.0), (T1, b, 1.0), (a, g, 1.0), (b, h, 1.0)]
    for weight, names in ((1.0, {"L0/10@0", "L0/11@1"}), (0.1, {"L0/10@0"})):
        targets = [{"name": "g", "weight": 1.0}, {"name": "h", "weight": weight}]
        pruned = prune(graph_of(edges, index, targets=targets), node_threshold=0.8, edge_threshold=0.9)
        assert {pruned.names[row] for row in pruned.index.rows(FEATURE)} == names
        direct = prune(graph_of([(T0, g, 1.0), (T1, h, 1.0)], index, targets=targets), edge_threshold=0.9)
        assert direct.n_edges == len(names)  # of the edges, too


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
