"""Edges and scores against finite differences of the real model, conservation, and the graph as a thing."""

import json

import networkx as nx
import numpy as np
import pytest
import torch
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import Graph, Logit, Target, score_features, trace
from circuits.attribution.exact import edge_rows
from circuits.building import by_layer, make_run, select, settle
from circuits.edges import LocalRun, constants, contract
from circuits.graph import BIAS, ERROR, FEATURE, NONE, REMAINDER, REST, TARGET, TOKEN
from circuits.graph.nodes import KINDS
from hooks import HookedModel, Scale, Site, UserError
from hooks.errors import CheckpointError, TargetError
from hooks.host import tap
from hooks.types import Edit

TEXT = "w1 w2 w3 w4 w5"
STEP = 1e-3  # relative; norms of the HF block run in fp32, so a difference carries about 1e-7 / STEP


@pytest.fixture(scope="module")
def wide() -> HookedModel:
    """fp64 weights, random, layer 2 without a transcoder: one edge piece spans two blocks."""
    return random_hooked(dtype=torch.float64, seed=3)


@pytest.fixture(scope="module")
def whole(wide) -> Graph:
    return trace(wide, TEXT, node_threshold=1.0, edge_threshold=1.0, sample=0)


def local_run(model: HookedModel, text: str, max_nodes: int = 10_000) -> tuple[LocalRun, Target]:
    setting = settle(model, text)
    run = make_run(setting, by_layer(setting, select(setting, max_nodes, "score")))
    return run, setting.targets[0]


def test_a_score_is_the_derivative_of_the_metric_by_the_feature(wide):
    recording = wide.record(TEXT)
    answer, other = recording.logits[0, -1].topk(2).indices.tolist()
    target = Target("m", (answer, other), (1.0, -1.0), 4)
    table = score_features(wide, recording, target).frame
    for row in table.iloc[::17].itertuples():
        address = f"L{row.layer}/{row.feature}@{row.pos}"
        up, down = (float(target.value(wide.run(TEXT, [Scale(address, 1 + step)]).logits)) for step in (STEP, -STEP))
        assert (up - down) / (2 * STEP) == pytest.approx(row.score, rel=2e-3, abs=5e-4)


def test_scores_lie_in_order_and_cover_every_active_feature(model, prompt):
    recording = model.record(prompt)
    target = Target("m", (3,), (1.0,), recording.batch.lengths[0] - 1)
    table = score_features(model, recording, target).frame
    active = sum(int((record.acts.values > 0).sum()) for record in recording.layers.values())
    assert len(table) == active
    assert (table["score"].abs().diff().dropna() <= 1e-12).all()


def test_every_edge_is_the_derivative_of_its_target_by_its_source(wide):
    """Each node's vector is moved by ±STEP of itself at its cut, and the piece up to the next cut really runs."""
    run, target = local_run(wide, TEXT, max_nodes=110)
    rows = list(edge_rows(run))
    checked = 0
    for number in range(1, len(run.cuts) + 1):
        cut = run.cuts[number - 1]
        table = torch.cat([block.weights for block in rows if torch.equal(block.sources, run.source_rows(number))])
        targets = torch.cat([block.targets for block in rows if torch.equal(block.sources, run.source_rows(number))])
        for column, row in enumerate(run.source_rows(number).tolist()):
            if column % 5:
                continue
            up, down = (_values(run, target, number, _moved(run, cut, row, step)) for step in (STEP, -STEP))
            measured = (up - down) / (2 * STEP)
            order = [run.target_rows(number).tolist().index(t) for t in targets.tolist()]
            constant = constants(run, number, slice(None)) if run.index.kind[row] == BIAS else torch.zeros(1)
            slope = table[:, column] - constant  # what does not depend on the stream has no derivative
            torch.testing.assert_close(slope, measured[order], rtol=3e-3, atol=2e-3)
            checked += len(measured)
    assert checked > 200


def _moved(run: LocalRun, cut, row: int, step: float) -> Edit:
    kind, pos, feature = (int(c[row]) for c in (run.index.kind, run.index.pos, run.index.feature))
    places = range(len(run.embedding)) if pos == NONE else [pos]
    record = run.recording.layers[cut.layer]
    vector = {
        FEATURE: lambda p: record.acts.dense(cut.transcoder.d_features)[0, p, feature] * cut.transcoder.W_dec[feature],
        REST: lambda p: cut.rest[p],
        ERROR: lambda p: record.error[0, p],
        BIAS: lambda p: cut.transcoder.b_dec,
    }[kind]

    def apply(x, at):
        out = x.clone()
        for p in places:
            out[:, p] += step * vector(p)
        return out

    return Edit(cut.transcoder.write, apply)


def _values(run: LocalRun, target: Target, number: int, edit: Edit) -> torch.Tensor:
    """What arrives: pre-activations of all features at the next cut, or the target."""
    seen = {}
    if number == len(run.cuts):
        logits = run.model.host.forward(run.recording.batch, [edit])
        return target.value(logits)
    cut = run.cuts[number]
    run.model.host.forward(run.recording.batch, [edit, tap(cut.transcoder.read, seen)])
    pre = cut.transcoder.preactivations(seen[cut.transcoder.read][0])
    return pre[cut.pos, cut.feature]


def test_token_edges_make_up_the_preactivation_at_the_embedding(wide, whole):
    """There the encoder's norm is frozen, so the one token explains all but the constants, which the bias does."""
    transcoder = wide.store[0]
    x = wide.record(TEXT).layers[0].read[0]
    pre = transcoder.preactivations(x)
    rows = whole.index.rows(FEATURE, 0)
    kind = whole.index.kind[whole.source]
    into, constant = (
        {
            int(t): float(w)
            for t, w, k in zip(whole.target, whole.weight, kind, strict=True)
            if t in rows and k == wanted
        }
        for wanted in (TOKEN, BIAS)
    )
    assert len(into) == len(rows)
    for row in rows[::7]:
        pos, feature = int(whole.index.pos[row]), int(whole.index.feature[row])
        bias = transcoder.b_enc[feature] + transcoder.W_enc[feature] @ transcoder.norm_bias
        assert into[int(row)] == pytest.approx(float(pre[pos, feature] - bias), rel=1e-6)
        assert constant[int(row)] == pytest.approx(float(bias), rel=1e-6)


def test_edges_are_causal(whole):
    index = whole.index
    both = (index.pos[whole.source] != NONE) & (index.pos[whole.target] != NONE)
    assert (index.pos[whole.source][both] <= index.pos[whole.target][both]).all()


def test_edges_join_neighbouring_cuts_only(whole):
    layers = [NONE, 0, 1, 3]  # layer 2 has no transcoder
    index = whole.index
    source = np.array([layers.index(layer) for layer in index.layer[whole.source]])
    target = np.where(
        index.kind[whole.target] == TARGET, len(layers), [layers.index(x) for x in index.layer[whole.target]]
    )
    real = index.kind[whole.source] != REMAINDER
    assert (target - source == 1)[real].all()


def test_the_rest_node_carries_exactly_what_is_not_selected(wide, whole):
    """Into the same target, the edges of any selection sum to the same: rest is a node of its own, not a remainder."""
    few = trace(wide, TEXT, max_nodes=12, node_threshold=1.0, edge_threshold=1.0, sample=0)
    sums = []
    for graph in (whole, few):
        into = (graph.target == graph.index.rows(TARGET)[0]) & (graph.index.kind[graph.source] != REMAINDER)
        sums.append(float(graph.weight[into].sum()))
        assert np.isclose(sums[-1], graph.score[graph.source[into]].sum(), rtol=1e-6)  # fp32 norms
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert (few.index.kind == FEATURE).sum() == 12


def test_a_cut_adds_up_to_the_stream(model, prompt):
    run, _ = local_run(model, prompt, max_nodes=20)
    for cut in run.cuts:
        written = torch.zeros_like(cut.rest)
        for pos, feature, a in zip(cut.pos.tolist(), cut.feature.tolist(), cut.activation, strict=True):
            written[pos] += a * cut.transcoder.W_dec[feature]
        total = written + cut.rest + cut.transcoder.b_dec + cut.error
        torch.testing.assert_close(total, run.recording.layers[cut.layer].target[0], rtol=1e-5, atol=1e-5)


def test_contract_is_the_dot_product_of_every_node_with_the_gradient(odd):
    run, _ = local_run(odd, TEXT, max_nodes=30)
    cut = run.cuts[1]
    gradients = torch.randn(3, 5, 40)
    table = contract(cut, gradients, run.embedding)
    for column in range(len(cut.pos)):
        vector = cut.activation[column] * cut.transcoder.W_dec[cut.feature[column]]
        torch.testing.assert_close(table[:, column], gradients[:, cut.pos[column]] @ vector, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(table[:, -1], (gradients @ cut.transcoder.b_dec).sum(1), rtol=1e-4, atol=1e-4)


def test_tokens_reach_the_first_cut_through_the_blocks_before_it():
    coders = [random_transcoder(layer, 40, dtype=torch.float64) for layer in (1, 3)]
    model = HookedModel.from_model(random_qwen2(dtype=torch.float64), word_tokenizer(), coders)
    graph = trace(model, TEXT, node_threshold=1.0, edge_threshold=1.0, sample=20)
    tokens = graph.index.kind[graph.source] == TOKEN
    assert set(graph.index.layer[graph.target[tokens]]) == {1}
    assert len(set(graph.index.pos[graph.source[tokens]])) == 5


def test_effects_are_weights_times_the_targets_own_effect(whole):
    feature = whole.index.kind[whole.target] == FEATURE
    per_unit = whole.score / np.where(whole.activation == 0, 1, whole.activation)
    expected = whole.weight[feature] * per_unit[whole.target[feature]]
    np.testing.assert_allclose(whole.effect[feature], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(whole.effect[~feature], whole.weight[~feature])


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (None, "' Austin' − "), ("Austin", "' Austin' − "),
        (Logit("Austin", "Sacramento"), "' Austin' − ' Sacramento'"),
        (["Austin", Logit("Denver", "Boise")], "' Austin' − "),
    ],
)  # fmt: skip
def test_targets(demo, targets, name):
    graph = trace(demo, "fact: the capital of the state containing Dallas is", targets, sample=0)
    assert graph.meta["targets"][0]["name"].startswith(name)
    logits = demo.run("fact: the capital of the state containing Dallas is").baseline[-1]
    rows = graph.index.rows(TARGET)
    for row, target in zip(rows, graph.meta["targets"], strict=True):
        value = float(logits[target["tokens"][0]] - logits[target["tokens"][1]])
        assert graph.activation[row] == pytest.approx(value, abs=1e-4)


def test_a_target_of_several_tokens_is_refused(demo):
    with pytest.raises(TargetError, match=r"' San' \| ' Antonio'"):
        trace(demo, "fact: the capital of the state containing Dallas is", "San Antonio")


def test_targets_that_make_no_sense_are_refused(odd):
    for targets, text in (
        ([], "no target given"), (["w1", "w1"], "given twice"), (Logit("w1", "w1"), "same token"),
        (Target("m", (3,), (1.0,), 9), "position 9 does not occur"),
    ):  # fmt: skip
        with pytest.raises(TargetError, match=text):
            trace(odd, TEXT, targets)
    graph = trace(odd, TEXT, Target("m", (3,), (1.0,), -1), sample=0)
    assert graph.meta["targets"][0]["pos"] == 4


def test_strong_edges_are_kept_and_the_rest_still_counts(model, prompt):
    """Influence, conservation and remainder are those of all edges, however few are kept."""
    full = trace(model, prompt, rule="affine", sample=0, node_threshold=1.0, edge_threshold=1.0)
    few = trace(model, prompt, rule="affine", max_in_edges=5, sample=0, node_threshold=1.0, edge_threshold=1.0)
    assert few.meta["conservation"] == full.meta["conservation"]
    assert np.bincount(few.target).max() == 5
    edges = full.edges_frame().set_index(["source", "target"])["weight"]
    for row in few.edges_frame().head(50).itertuples():
        into = full.edges_frame().query("target == @row.target")["weight"].abs()
        assert abs(row.weight) >= into.nlargest(5).min() * (1 - 1e-9)
        assert edges[row.source, row.target] == row.weight
    assert few.meta["kept_weight"] < full.meta["kept_weight"] == pytest.approx(1.0)


def test_the_complete_graph_has_every_active_feature(model, prompt):
    graph = trace(model, prompt, max_nodes=None, sample=0, node_threshold=1.0, edge_threshold=1.0)
    assert graph.meta["selection"]["selected"] == graph.meta["selection"]["active_features"]
    assert graph.meta["selection"]["covered_score"] == pytest.approx(1.0)


def test_what_cannot_be_traced_is_refused(odd):
    with pytest.raises(UserError, match="unknown attribution rule"):
        trace(odd, TEXT, rule="magic")
    with pytest.raises(UserError, match="max_nodes"):
        trace(odd, TEXT, max_nodes=0)
    coders = [random_transcoder(n, 40, read=Site("resid_pre", n), write=Site("mlp_in", n)) for n in (0, 1)]
    other = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    with pytest.raises(UserError, match="there is no graph for transcoders that read resid_pre and write mlp_in"):
        trace(other, TEXT)


def test_a_graph_survives_its_file_and_the_same_trace_gives_the_same_bytes(model, prompt, tmp_path):
    first, second = (trace(model, prompt, sample=30) for _ in range(2))
    first.save(tmp_path / "a.graph")
    second.save(tmp_path / "b.graph")
    assert (tmp_path / "a.graph").read_bytes() == (tmp_path / "b.graph").read_bytes()
    loaded = Graph.load(tmp_path / "a.graph")
    assert loaded.names == first.names
    assert loaded.meta == json.loads(json.dumps(dict(first.meta)))
    for column in ("activation", "score", "influence", "source", "target", "weight", "effect"):
        np.testing.assert_array_equal(getattr(loaded, column), getattr(first, column))
    loaded.save(tmp_path / "c.graph")
    assert (tmp_path / "c.graph").read_bytes() == (tmp_path / "a.graph").read_bytes()


def test_files_that_are_no_graphs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no graph file"):
        Graph.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        Graph.load(tmp_path / "text")


def test_half_precision_transcoders_lose_nothing_but_their_own_rounding():
    """bf16 weights and the same weights written out in fp32 give the same graph: every product is taken in fp32."""
    graphs = []
    for upcast in (False, True):
        coders = [random_transcoder(n, 40).to("cpu", torch.bfloat16) for n in (0, 1, 3)]
        coders = [coder.to("cpu", torch.float32) for coder in coders] if upcast else coders
        model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
        graphs.append(trace(model, TEXT, sample=0, node_threshold=1.0, edge_threshold=1.0))
    nodes = [graph.nodes_frame().query("kind == 'feature'").set_index("name").sort_index() for graph in graphs]
    assert list(nodes[0].index) == list(nodes[1].index)
    for column in ("activation", "score"):
        np.testing.assert_allclose(nodes[0][column], nodes[1][column], rtol=1e-3, atol=1e-4)
    edges = [graph.edges_frame().set_index(["source", "target"])["weight"] for graph in graphs]
    both = edges[0].index.intersection(edges[1].index)  # a rest that is all rounding exists in one graph only
    assert len(both) > 0.9 * max(map(len, edges))
    np.testing.assert_allclose(edges[0][both], edges[1][both], rtol=1e-3, atol=1e-4)


def test_networkx_has_every_node_edge_and_attribute(model, prompt):
    graph = trace(model, prompt, sample=20)
    network = graph.to_networkx()
    assert isinstance(network, nx.DiGraph)
    assert (network.number_of_nodes(), network.number_of_edges()) == (graph.n_nodes, graph.n_edges)
    assert nx.is_directed_acyclic_graph(network)
    for name, row in zip(graph.names, range(graph.n_nodes), strict=True):
        node = network.nodes[name]
        assert node["kind"] == KINDS[graph.index.kind[row]]
        assert node["score"] == graph.score[row]
        assert ("position" in node) == (graph.index.pos[row] != NONE)
        assert ("feature" in node) == (node["kind"] == "feature")
        if node["kind"] == "feature":
            assert name == f"L{node['layer']}/{node['feature']}@{node['position']}"
            assert node["token"] == graph.meta["tokens"][node["position"]]
    weights = nx.get_edge_attributes(network, "weight")
    for s, t, w in zip(graph.source, graph.target, graph.weight, strict=True):
        assert weights[graph.names[s], graph.names[t]] == w


def test_frames_are_sorted_tables(model, prompt):
    graph = trace(model, prompt, sample=0)
    nodes, edges = graph.nodes_frame(), graph.edges_frame()
    assert (nodes["influence"].diff().dropna() <= 0).all()
    assert (edges["effect"].abs().diff().dropna() <= 0).all()
    assert len(nodes) == graph.n_nodes
    assert len(edges) == graph.n_edges
