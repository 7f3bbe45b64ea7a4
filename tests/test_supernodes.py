"""Chains of features: known cosines and shares, and the definition read off a real graph edge by edge."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from test_influence import graph_of
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import Graph, trace
from circuits.graph import FEATURE, REST, TARGET, TOKEN, NodeIndex, merge_chains, supernode_graph
from hooks import HookedModel, UserError

LAYERS = (0, 1, 3)  # layer 2 has no transcoder, so 1 and 3 are neighbours
ALONG, ACROSS = 5, 6  # in every layer: feature 5 writes nearly one direction, feature 6 another
COSINE = 0.95


@pytest.fixture(scope="module")
def model() -> HookedModel:
    """Feature 5 turns by acos(0.95) from layer to layer, feature 6 stands at a right angle to all of it."""
    coders = []
    for number, layer in enumerate(LAYERS):
        coder = random_transcoder(layer, 40, seed=1)
        rows, angle = coder.W_dec.clone(), number * np.arccos(COSINE)
        rows[[ALONG, ACROSS]] = 0.0
        rows[ALONG, :2] = (layer + 1) * torch.tensor([np.cos(angle), np.sin(angle)], dtype=rows.dtype)
        rows[ACROSS, 2] = 1.0
        coders.append(replace(coder, W_dec=rows))
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


INDEX = NodeIndex.build(2, {layer: [(p, f) for p in range(2) for f in (ALONG, ACROSS)] for layer in LAYERS}, [1])
ROWS = {(int(INDEX.layer[row]), int(INDEX.pos[row]), int(INDEX.feature[row])): int(row) for row in INDEX.rows(FEATURE)}
(GOAL,) = INDEX.rows(TARGET)
LOW, MID, TOP = (ROWS[layer, 1, ALONG] for layer in LAYERS)
CHAIN = [(LOW, MID, 1.6), (MID, TOP, 1.4)]  # of an activation of 2


def made(model: HookedModel, edges: list[tuple[int, int, float]], **meta: Any) -> Graph:
    tokens = ["a", "b"]
    graph = graph_of(edges, INDEX, fingerprint=model.fingerprint, tokens=tokens, targets=[{"name": "m"}], **meta)
    return replace(graph, activation=np.full(len(INDEX), 2.0), effect=10 * graph.weight)


def found(model: HookedModel, edges: list[tuple[int, int, float]], **options: float) -> list[list[str]]:
    return list(merge_chains(made(model, edges), model, **options).meta["supernodes"].values())


def test_a_chain_is_one_supernode(model):
    graph = merge_chains(made(model, CHAIN), model)
    assert graph.meta["supernodes"] == {"L0/5@1 … L3/5@1": ["L0/5@1", "L1/5@1", "L3/5@1"]}


@pytest.mark.parametrize(
    "edge",
    [
        (LOW, MID, 1.0),  # exactly half
        (LOW, MID, -1.6),
        (ROWS[0, 1, ACROSS], ROWS[3, 1, ACROSS], 1.6),  # the same direction, but layer 1 lies between
        (ROWS[0, 0, ALONG], MID, 1.6),  # another token
        (ROWS[0, 1, ACROSS], MID, 1.6),  # another direction
        (int(INDEX.rows(REST, 0)[1]), MID, 1.6),
        (int(INDEX.rows(TOKEN)[1]), LOW, 1.6),
        (TOP, int(GOAL), 1.6),
    ],
    ids=["half", "negative", "skips", "position", "direction", "rest", "token", "target"],
)
def test_what_is_no_chain(model, edge):
    assert found(model, [edge]) == []
    assert found(model, [*CHAIN, edge]) == [["L0/5@1", "L1/5@1", "L3/5@1"]]


def test_the_thresholds_are_where_they_are_said_to_be(model):
    """Shares of the two edges are 0.8 and 0.7, their cosines 0.95."""
    lower, upper = ["L0/5@1", "L1/5@1"], ["L1/5@1", "L3/5@1"]
    assert found(model, CHAIN, share=0.75) == [lower]
    assert found(model, CHAIN, share=0.85) == []
    assert found(model, CHAIN, similarity=COSINE - 1e-6) == [[*lower, upper[1]]]
    assert found(model, CHAIN, similarity=COSINE + 1e-6) == []


def test_supernodes_can_branch_and_stand_side_by_side(model):
    """Feature 6 keeps its direction exactly; both chains start at layer 0, one of them of two features at layer 3."""
    other = [ROWS[layer, 1, ACROSS] for layer in LAYERS]
    edges = [*CHAIN, (other[1], other[2], 1.9), (other[0], other[1], 1.9)]
    groups = [["L0/5@1", "L1/5@1", "L3/5@1"], ["L0/6@1", "L1/6@1", "L3/6@1"]]
    assert found(model, edges) == groups
    assert found(model, edges[::-1]) == groups  # whatever the order of the edges
    assert found(model, [*edges, (LOW, other[1], 1.9)], similarity=0.0) == groups  # a right angle is not above 0
    assert len(found(model, [*edges, (LOW, MID, 1.6)])) == 2


def test_in_a_pair_of_prompts_the_share_is_of_the_difference(model):
    graph = replace(made(model, CHAIN), activation=np.full(len(INDEX), 9.0), baseline=np.full(len(INDEX), 7.0))
    assert list(merge_chains(graph, model).meta["supernodes"].values()) == [["L0/5@1", "L1/5@1", "L3/5@1"]]


def test_supernodes_are_the_components_of_the_edges_that_carry_on(demo, odd):
    """The definition, edge by edge, with cosines of their own."""
    merged = 0
    for engine, text in ((demo, "fact: the capital of the state containing Dallas is"), (odd, "w1 w2 w3 w4 w5")):
        graph = trace(engine, text, max_nodes=None, sample=0, node_threshold=1.0, edge_threshold=1.0)
        index, above = graph.index, dict(pairwise(engine.store.layers))
        carrying = nx.Graph()
        for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight, strict=True):
            if index.kind[s] != FEATURE or index.kind[t] != FEATURE or index.pos[s] != index.pos[t]:
                continue
            a, b = (engine.store[int(index.layer[r])].W_dec[index.feature[r]].double() for r in (s, t))
            cosine = float(a @ b / (a.norm() * b.norm()))
            if above.get(index.layer[s]) == index.layer[t] and cosine > 0.5 and w / graph.activation[t] > 0.1:
                carrying.add_edge(graph.names[s], graph.names[t])
        expected = {frozenset(group) for group in nx.connected_components(carrying)}
        supernodes = merge_chains(graph, engine, similarity=0.5, share=0.1).meta["supernodes"]
        assert {frozenset(names) for names in supernodes.values()} == expected
        assert sum(map(len, supernodes.values())) == carrying.number_of_nodes()
        merged += len(expected)
    assert merged > 5


def test_supernodes_survive_the_file(model, tmp_path):
    graph = merge_chains(made(model, CHAIN), model)
    graph.save(tmp_path / "g.safetensors")
    assert Graph.load(tmp_path / "g.safetensors").meta["supernodes"] == graph.meta["supernodes"]
    assert json.loads(json.dumps(graph.meta["supernodes"])) == graph.meta["supernodes"]


def test_wrong_models_and_thresholds_are_refused(model, odd):
    graph = made(model, CHAIN)
    with pytest.raises(UserError, match="belongs to another model"):
        merge_chains(graph, odd)
    for options in ({"similarity": 1.0}, {"similarity": -0.1}, {"share": -1.0}, {"share": float("nan")}):
        with pytest.raises(UserError, match="is out of range"):
            merge_chains(graph, model, **options)


# -- the graph of supernodes ---------------------------------------------------------------------------------------

LABEL = "L0/5@1 … L3/5@1"
ASIDE = ROWS[1, 1, ACROSS]
T1 = int(INDEX.rows(TOKEN)[1])


def test_edges_of_members_add_up(model):
    edges = [*CHAIN, (T1, LOW, 1.0), (T1, MID, 0.5), (MID, GOAL, -3.0), (TOP, GOAL, 2.0), (ASIDE, GOAL, 0.25)]
    graph = merge_chains(made(model, edges, labels={"L0/5@1": "Texas", "L1/5@1": "Texas"}), model)
    graph = replace(graph, score=np.where(np.arange(len(INDEX)) == MID, -7.0, 1.0))
    merged = supernode_graph(graph)
    assert set(merged) == {name for name in graph.names if name not in graph.meta["supernodes"][LABEL]} | {LABEL}
    assert {(s, t): (d["weight"], d["effect"]) for s, t, d in merged.edges(data=True)} == {
        ("token@1", LABEL): (1.5, 15.0), (LABEL, "target m"): (-1.0, -10.0), ("L1/6@1", "target m"): (0.25, 2.5),
    }  # fmt: skip
    node = merged.nodes[LABEL]
    assert node == {
        "kind": "supernode", "members": ["L0/5@1", "L1/5@1", "L3/5@1"], "layers": (0, 3), "position": 1, "token": "b",
        "label": "Texas", "score": -7.0, "influence": max(graph.influence[[LOW, MID, TOP]]),
    }  # fmt: skip
    assert merged.nodes["L1/6@1"] == graph.to_networkx().nodes["L1/6@1"]
    assert merged.graph["acyclic"] is True


def test_a_chain_that_is_left_and_entered_again_is_a_cycle(model):
    graph = merge_chains(made(model, [*CHAIN, (LOW, ASIDE, 1.0), (ASIDE, TOP, 0.3)]), model)
    merged = supernode_graph(graph)
    assert merged.graph["acyclic"] is False
    assert nx.find_cycle(merged, LABEL) == [(LABEL, "L1/6@1"), ("L1/6@1", LABEL)]


def test_without_supernodes_it_is_the_plain_graph(model):
    graph = made(model, CHAIN)
    plain, merged = graph.to_networkx(), supernode_graph(graph)
    assert dict(merged.nodes(data=True)) == dict(plain.nodes(data=True))
    assert list(merged.edges(data=True)) == list(plain.edges(data=True))


def test_members_that_are_gone_are_left_out(model):
    graph = merge_chains(made(model, CHAIN), model)
    for gone, members in (([LOW], ["L1/5@1", "L3/5@1"]), ([LOW, MID, TOP], None)):
        left = graph.subgraph(np.setdiff1d(np.arange(len(INDEX)), gone), np.arange(graph.n_edges))
        assert dict(supernode_graph(left).nodes(data="members")).get(LABEL) == members


def test_what_enters_the_target_is_conserved(demo):
    graph = trace(demo, "fact: the capital of the state containing Dallas is", sample=0)
    graph = merge_chains(graph, demo, similarity=0.3, share=0.1)
    assert graph.meta["supernodes"]
    merged, plain = supernode_graph(graph), graph.to_networkx()
    (target,) = (graph.names[row] for row in graph.index.rows(TARGET))
    for key in ("weight", "effect"):
        sums = [sum(d[key] for _, _, d in network.in_edges(target, data=True)) for network in (merged, plain)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    members = {name for names in graph.meta["supernodes"].values() for name in names}
    assert merged.number_of_nodes() == plain.number_of_nodes() - len(members) + len(graph.meta["supernodes"])
