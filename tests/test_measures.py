"""Scores, totals and folding: fractions worked out by hand, circuit-tracer's formula in full matrices, and laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_influence import dense_influence, dense_shares, graph_of, layered

from circuits import Graph, trace
from circuits.graph import (
    BIAS,
    ERROR,
    FEATURE,
    REMAINDER,
    REST,
    TARGET,
    TOKEN,
    NodeIndex,
    fold,
    graph_scores,
    signed_totals,
    start_weights,
    subgraph_scores,
)
from circuits.graph.nodes import KINDS
from hooks import UserError

# tokens 0, 1 → layer 0: features A@0, B@1 → layer 2: C@1 → targets G and H; A also acts on G directly
INDEX = NodeIndex.build(2, {0: [(0, 10), (1, 11)], 2: [(1, 20)]}, [1, 1], remainders=True)
T0, T1 = INDEX.rows(TOKEN)
A, B = INDEX.rows(FEATURE, 0)
(C,) = INDEX.rows(FEATURE, 2)
G, H = INDEX.rows(TARGET)
BIAS_0, REST_2, ERROR_0 = INDEX.rows(BIAS, 0)[0], INDEX.rows(REST, 2)[1], INDEX.rows(ERROR, 0)[0]
LEFT_OVER = INDEX.rows(REMAINDER)[-1]
EDGES = [
    (T0, A, 2.0), (T1, B, -1.0), (A, C, 1.0), (B, C, -2.0), (BIAS_0, C, 1.0),
    (C, G, 3.0), (A, G, 1.0), (REST_2, G, -1.0), (LEFT_OVER, G, 100.0), (C, H, 1.0), (ERROR_0, H, -1.0),
]  # fmt: skip
TARGETS = [{"name": "g", "weight": 0.5}, {"name": "h", "weight": 0.25}]
seeds = st.integers(0, 10**6)


@pytest.fixture
def graph() -> Graph:
    made = graph_of(EDGES, INDEX, targets=TARGETS)
    activation = np.zeros(len(INDEX))
    activation[[A, B, C, G, H]] = 2.0, 4.0, 8.0, 6.0, -2.0
    return replace(made, activation=activation, score=np.arange(len(INDEX)) + 1.0, effect=10 * made.weight)


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores_by_hand(graph):
    """In 160ths, I is G 80, H 40; C 3/5 G + 1/2 H = 68, rest 1/5 G = 16, error 1/2 H = 20; B 1/2 C = 34, bias
    1/4 C = 17, A 1/5 G + 1/4 C = 33; token 0 33, token 1 34: 375 in all, 67 of it at tokens.
    """
    scores = graph_scores(graph)
    assert scores.replacement == pytest.approx(67 / (67 + 16 + 20), rel=1e-14)
    assert scores.completeness == pytest.approx((375 - 16 - 20) / 375, rel=1e-14)
    scores = graph_scores(graph, unexplained=("error",))
    assert scores.replacement == pytest.approx(67 / (67 + 20), rel=1e-14)
    assert scores.completeness == pytest.approx((375 - 20) / 375, rel=1e-14)


def test_circuit_tracers_numbers_by_hand(graph):
    """Without rest and bias, in 24ths: G 12, H 6, C 9 + 3, error 3, A 3 + 4, B 8, token 0 7, token 1 8: 63 in all."""
    scores = graph_scores(graph, unexplained=("error",), without=("rest", "bias"))
    assert scores.replacement == pytest.approx(15 / (15 + 3), rel=1e-14)
    assert scores.completeness == pytest.approx((63 - 3) / 63, rel=1e-14)
    kinds = INDEX.kind[graph.source]
    its_own = graph.subgraph(
        np.flatnonzero(~np.isin(INDEX.kind, (REST, BIAS, REMAINDER))),
        np.flatnonzero(~np.isin(kinds, (REST, BIAS, REMAINDER))),
    )
    assert graph_scores(its_own) == scores  # the default, where there is nothing but its kinds


@settings(max_examples=100, deadline=None)
@given(seeds, st.sets(st.sampled_from(["error", "rest", "bias"])), st.sets(st.sampled_from(["rest", "bias"])))
def test_scores_are_circuit_tracers_formula_in_full_matrices(seed, unexplained, without):
    graph = layered(seed)
    start = start_weights(graph.index, graph.meta["targets"])
    matrix = dense_shares(graph, but=tuple(KINDS.index(kind) for kind in without))
    influence = dense_influence(matrix, start)
    errors = np.isin(graph.index.kind, [KINDS.index(kind) for kind in unexplained])
    tokens = influence[graph.index.kind == TOKEN].sum()
    scores = graph_scores(graph, unexplained=sorted(unexplained), without=sorted(without))
    through = tokens + influence[errors].sum()
    if through:
        assert scores.replacement == pytest.approx(tokens / through, rel=1e-12, abs=1e-14)
    else:
        assert math.isnan(scores.replacement)
    counted = influence + start
    complete = ((1 - matrix[:, errors].sum(1)) * counted).sum() / counted.sum()
    assert scores.completeness == pytest.approx(complete, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.1, 0.9))
def test_left_out_edges_count_like_edges_from_an_error(seed, share):
    """The mass of all edges, with some left out, is the same as those edges coming from an error node of their own."""
    graph = layered(seed)
    rng = np.random.default_rng(seed)
    counts = graph.index.kind[graph.source] != REMAINDER
    stays = ~counts | (rng.random(graph.n_edges) < share)
    size = np.where(counts, np.abs(graph.weight), 0.0)
    mass = np.bincount(graph.target, weights=size, minlength=graph.n_nodes)
    lowest = graph.index.rows(ERROR, 0)[0]
    assume(lowest not in graph.source[stays])
    moved = replace(graph, source=np.where(stays, graph.source, lowest))
    for without in ((), ("bias",)):
        moves = ~np.isin(graph.index.kind[graph.source], [KINDS.index(kind) for kind in without])
        expected = graph_scores(replace(moved, weight=np.where(moves, moved.weight, 0.0)), without=without)
        kept = graph.subgraph(np.arange(graph.n_nodes), np.flatnonzero(stays | ~moves))
        found = graph_scores(kept, mass=mass, without=without)
        assert found.replacement == pytest.approx(expected.replacement, rel=1e-9, abs=1e-12, nan_ok=True)
        assert found.completeness == pytest.approx(expected.completeness, rel=1e-9, abs=1e-12)


def test_remainders_are_in_no_mass(graph):
    mass = np.bincount(graph.target, weights=np.abs(graph.weight), minlength=len(INDEX))
    mass[G] -= 100.0
    assert graph_scores(graph, mass=mass) == graph_scores(graph)
    assert graph_scores(graph, mass=mass, without=("remainder",)) == graph_scores(graph)


def test_nothing_that_reaches_the_target_is_no_number():
    scores = graph_scores(graph_of([(T0, A, 1.0)], INDEX, targets=TARGETS))
    assert math.isnan(scores.replacement)
    assert scores.completeness == 1.0  # nothing unexplained enters a target, because nothing does


def test_unknown_kinds_are_refused(graph):
    for options in ({"unexplained": ("errors",)}, {"without": ("errors",)}):
        with pytest.raises(UserError, match="unknown kind of node 'errors'") as error:
            graph_scores(graph, **options)
        assert "error, bias" in error.value.expected


# -- signed totals -------------------------------------------------------------------------------------------------


def test_totals_by_hand(graph):
    """C 3/2 + 1/4 = 7/4, per unit 7/32; A 1/2 + 7/32, per unit 23/64; B −14/32, per unit −7/64. Zero elsewhere."""
    expected = {
        G: 3.0, H: -0.5, C: 7 / 4, REST_2: -1 / 2, LEFT_OVER: 50.0, ERROR_0: -1 / 4,
        A: 23 / 32, B: -7 / 16, BIAS_0: 7 / 32, T0: 23 / 32, T1: 7 / 64,
    }  # fmt: skip
    np.testing.assert_array_equal(signed_totals(graph), [expected.get(row, 0.0) for row in range(len(INDEX))])


def test_totals_of_a_pair_of_prompts_divide_by_the_difference(graph):
    pair = replace(graph, activation=graph.activation + 5, baseline=np.full(len(INDEX), 5.0))
    np.testing.assert_array_equal(signed_totals(pair), signed_totals(graph))


def test_a_feature_that_writes_nothing_passes_nothing_on(graph):
    silent = replace(graph, activation=np.where(np.arange(len(INDEX)) == C, 0.0, graph.activation))
    totals = signed_totals(silent)
    assert totals[A] == 0.5  # its own edge to G
    assert totals[B] == totals[T1] == totals[BIAS_0] == 0.0


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_totals_are_the_sum_over_all_paths(seed):
    graph = layered(seed, density=0.35)
    start = start_weights(graph.index, graph.meta["targets"])
    out: dict[int, list[tuple[int, float]]] = {}
    for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True):
        out.setdefault(s, []).append((t, w))

    def over_paths(row: int) -> float:
        """Along each path on its own: nothing is remembered."""
        ends = graph.index.kind == TARGET
        return sum(w * (start[t] if ends[t] else over_paths(t) / graph.activation[t]) for t, w in out.get(row, []))

    totals = signed_totals(graph)
    for row in np.flatnonzero(graph.index.kind != TARGET).tolist():
        assert totals[row] == pytest.approx(over_paths(row), rel=1e-9, abs=1e-9)


def conserving(seed: int) -> Graph:
    """A random graph in which the edges into every node sum to its value, none of them near zero."""
    graph = layered(seed)
    weight, into = graph.weight.copy(), np.bincount(graph.target, weights=graph.weight, minlength=graph.n_nodes)
    first = {int(t): edge for edge, t in reversed(list(enumerate(graph.target)))}
    for row, edge in first.items():
        if abs(into[row]) < 0.5:
            weight[edge] += 2.0
            into[row] += 2.0
    fed = np.isin(np.arange(graph.n_nodes), graph.target)
    return replace(graph, weight=weight, effect=weight, activation=np.where(fed, into, graph.activation))


def without_inputs(graph: Graph) -> np.ndarray:
    return ~np.isin(np.arange(graph.n_nodes), graph.target)


@settings(max_examples=80, deadline=None)
@given(seeds, st.floats(0, 1))
def test_totals_of_the_nodes_without_inputs_sum_to_the_targets(seed, share):
    """Whatever is folded: a rest takes over exactly what its features brought."""
    graph = conserving(seed)
    features = graph.index.rows(FEATURE)
    keep = features[np.random.default_rng(seed).random(len(features)) < share]
    for each in (graph, fold(graph, keep)):
        fed_targets = (each.index.kind == TARGET) & ~without_inputs(each)
        totals = signed_totals(each)
        free = without_inputs(each) & (each.index.kind != TARGET)
        assert totals[free].sum() == pytest.approx(totals[fed_targets].sum(), rel=1e-9, abs=1e-9 * np.abs(totals).sum())


@pytest.mark.parametrize("rule", ["affine", "half", "exact"])
def test_totals_of_a_real_graph_sum_to_the_target(odd, rule):
    """Whatever the rule: what it leaves over is a node, too. The model is fp32, hence the tolerance."""
    options = {"max_nodes": 60, "max_in_edges": 10**6, "sample": 0, "node_threshold": 1.0, "edge_threshold": 1.0}
    graph = trace(odd, "w1 w2 w3 w4 w5", rule=rule, **options)
    totals, fed = signed_totals(graph), ~without_inputs(graph)
    (target,) = graph.index.rows(TARGET)
    assert (fed == ((graph.index.kind == FEATURE) | (graph.index.kind == TARGET))).all()
    assert totals[target] == graph.activation[target]
    assert totals[~fed].sum() == pytest.approx(totals[target], abs=1e-5 * np.abs(totals[~fed]).sum())
    remainders = np.abs(totals[graph.index.kind == REMAINDER]).sum()
    assert (remainders > 0.1) == (rule == "exact")


# -- subgraphs -----------------------------------------------------------------------------------------------------


def edges_of(graph: Graph) -> dict[tuple[str, str], float]:
    return {
        (graph.names[s], graph.names[t]): w for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True)
    }


def test_folding_by_hand(graph):
    """C goes: its edges to G and H become the rest's, where 3 meets −1; nothing is said any more of what feeds it."""
    folded = fold(graph, np.array([A, B]))
    assert edges_of(folded) == {
        ("token@0", "L0/10@0"): 2.0, ("token@1", "L0/11@1"): -1.0, ("L0/10@0", "target g"): 1.0,
        ("rest L2@1", "target g"): 2.0, ("rest L2@1", "target h"): 1.0,
        ("remainder targets", "target g"): 100.0, ("error L0@0", "target h"): -1.0,
    }  # fmt: skip
    assert set(folded.names) == set(graph.names) - {"L2/20@1"}
    rest = folded.names.index("rest L2@1")
    assert folded.score[rest] == graph.score[REST_2] + graph.score[C]
    assert np.isnan(folded.activation[rest])
    assert np.isfinite(np.delete(folded.activation, rest)).all()
    assert dict(zip(folded.names, folded.influence, strict=True))["rest L2@1"] == pytest.approx(1 / 2 * 2 / 3 + 1 / 8)
    np.testing.assert_array_equal(folded.effect, 10 * folded.weight)
    assert folded.meta["folded"] == 1


def test_a_subgraph_is_not_better_for_what_it_leaves_out(graph):
    """Without B, in 160ths: token 1 loses its 34, which the rest at layer 0 has now; half of C's 68 is unexplained.

    Merely dropped, B leaves its part of C to A and the bias, and 34 fewer are unexplained of 358.
    """
    scores = subgraph_scores(graph, np.array([A, C]))
    assert scores.replacement == pytest.approx(33 / (33 + 34 + 16 + 20), rel=1e-14)
    assert scores.completeness == pytest.approx((341 - 16 - 20 - 34) / 341, rel=1e-14)
    dropped = graph_scores(graph.subgraph(np.delete(np.arange(len(INDEX)), B), np.arange(graph.n_edges)))
    assert dropped.replacement == pytest.approx(50 / (50 + 16 + 20), rel=1e-14)
    assert dropped.completeness == pytest.approx((358 - 16 - 20) / 358, rel=1e-14)


def test_a_pair_of_prompts_folds(graph):
    pair = replace(graph, baseline=np.arange(len(INDEX)) / 2)
    folded = fold(pair, np.array([A, B]))
    rows = [graph.names.index(name) for name in folded.names]
    expected = np.where(np.array(folded.names) == "rest L2@1", np.nan, pair.baseline[rows])
    np.testing.assert_array_equal(folded.baseline, expected)
    assert "rest L0@0" in fold(pair.subgraph(np.array([A, C, G]), np.arange(graph.n_edges)), np.array([1])).names


def test_keeping_every_feature_changes_nothing(graph):
    folded = fold(graph, INDEX.rows(FEATURE))
    assert folded.names == graph.names
    assert edges_of(folded) == edges_of(graph)
    np.testing.assert_allclose(folded.influence, graph.influence, rtol=1e-14)
    for column in ("activation", "score"):
        np.testing.assert_array_equal(getattr(folded, column), getattr(graph, column))
    assert subgraph_scores(graph, INDEX.rows(FEATURE)) == graph_scores(graph)


def test_keeping_no_feature_explains_nothing(graph):
    folded = fold(graph, np.array([], dtype=np.int64))
    assert FEATURE not in folded.index.kind
    assert subgraph_scores(graph, np.array([], dtype=np.int64)).replacement == 0.0


def test_a_rest_that_was_pruned_comes_back(graph):
    """Into its own place in the order of nodes, so the folded graph is laid out like any other."""
    bare = graph.subgraph(np.flatnonzero(INDEX.kind != REST), np.arange(graph.n_edges))
    folded = fold(bare, np.array([bare.names.index("L0/10@0")]))
    wanted = ["token@0", "token@1", "bias embedding", "L0/10@0", "rest L0@1", "error L0@0", "error L0@1", "bias L0"]
    wanted += ["rest L2@1", "error L2@0", "error L2@1", "bias L2", "target g", "target h"]
    assert list(folded.names) == [*wanted, "remainder L0", "remainder L2", "remainder targets"]
    assert edges_of(folded)["rest L2@1", "target g"] == 3.0


@settings(max_examples=100, deadline=None)
@given(seeds, st.floats(0, 1))
def test_folding_conserves_what_enters_every_node_that_stays(seed, share):
    graph = layered(seed)
    features = graph.index.rows(FEATURE)
    keep = features[np.random.default_rng(seed).random(len(features)) < share]
    folded = fold(graph, keep)
    assert {folded.names[row] for row in folded.index.rows(FEATURE)} == {graph.names[row] for row in keep}
    assert folded.score.sum() == pytest.approx(graph.score.sum(), abs=1e-12)
    for column in ("weight", "effect"):
        before, after = (
            dict(zip(g.names, np.bincount(g.target, weights=getattr(g, column), minlength=g.n_nodes), strict=True))
            for g in (graph, folded)
        )
        for name in folded.names:
            assert after[name] == pytest.approx(before[name], abs=1e-12), name
    assert len(set(zip(folded.source.tolist(), folded.target.tolist(), strict=True))) == folded.n_edges
    twice = fold(fold(graph, keep), np.array([], dtype=np.int64))
    once = fold(graph, np.array([], dtype=np.int64))
    assert edges_of(twice) == pytest.approx(edges_of(once), abs=1e-12)


def test_a_real_graph_has_scores_and_folds(model, prompt):
    graph = trace(model, prompt, max_nodes=120, sample=0, node_threshold=1.0, edge_threshold=1.0)
    scores, features = graph_scores(graph), graph.index.rows(FEATURE)
    assert 0 < scores.replacement < 1
    assert 0 < scores.completeness < 1
    strongest = features[np.argsort(-graph.influence[features], kind="stable")]
    by_size = [subgraph_scores(graph, strongest[:n]).completeness for n in (len(strongest) // 4, len(strongest))]
    assert by_size[0] < by_size[1] == scores.completeness
