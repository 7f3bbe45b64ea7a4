"""Every format holds the whole graph; the picture can be read."""

import json
import xml.etree.ElementTree as ET

import networkx as nx
import pydot
import pytest

from circuits import Graph, prune, trace
from circuits.export import EXPORTERS, export
from circuits.export._picture import choose
from circuits.graph import FEATURE, TARGET, TOKEN
from hooks.errors import OutputError


@pytest.fixture(scope="module")
def graph(model, prompt):
    return trace(model, prompt, sample=20)


@pytest.mark.parametrize("kind", EXPORTERS)
def test_every_format_writes_the_same_bytes_twice(graph, tmp_path, kind):
    suffix = {"scatter": "svg"}.get(kind, kind)  # a scatter is a picture of either kind
    paths = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for path in paths:
        export(graph, path, kind)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 1000


def test_json_is_node_link_data_with_everything_known(graph, tmp_path):
    export(graph, tmp_path / "g.json", "json")
    data = json.loads((tmp_path / "g.json").read_text())
    assert data["graph"]["verification"] == graph.meta["verification"]
    back, network = nx.node_link_graph(data, edges="edges"), graph.to_networkx()
    assert dict(back.nodes(data=True)) == dict(network.nodes(data=True))
    assert list(back.edges(data=True)) == list(network.edges(data=True))


def test_graphml_reads_back_typed(graph, tmp_path):
    export(graph, tmp_path / "g.graphml", "graphml")
    back, network = nx.read_graphml(tmp_path / "g.graphml"), graph.to_networkx()
    assert set(back) == set(network)
    for name, attributes in network.nodes(data=True):
        assert back.nodes[name] == attributes
    assert {(s, t): d["weight"] for s, t, d in back.edges(data=True)} == {
        (s, t): d["weight"] for s, t, d in network.edges(data=True)
    }


def test_gexf_reads_back_typed(graph, tmp_path):
    named = graph.with_meta(labels={graph.names[graph.index.rows(FEATURE)[0]]: "Texas"})
    export(named, tmp_path / "g.gexf", "gexf")
    back, network = nx.read_gexf(tmp_path / "g.gexf"), named.to_networkx()
    assert set(back) == set(network)
    for name, attributes in network.nodes(data=True):
        assert back.nodes[name] == attributes | {"label": attributes["label"] or name}
    assert "Texas" in {label for _, label in back.nodes(data="label")}
    edges = {(s, t): d for s, t, d in network.edges(data=True)}
    for s, t, d in back.edges(data=True):
        del d["id"]  # GEXF numbers its edges
        assert edges.pop((s, t)) == d
    assert not edges


def test_gexf_does_not_say_when_it_was_written(graph, tmp_path):
    export(graph, tmp_path / "g.gexf", "gexf")
    assert "lastmodified" not in (tmp_path / "g.gexf").read_text()


AWKWARD = 'a "quoted" \\ <b>\n:&; \x01 \\'  # a byte that no XML can hold, and a backslash at the end


@pytest.fixture
def awkward(graph) -> Graph:
    small = prune(graph, node_threshold=0.5, edge_threshold=0.8)
    targets = [{**target, "name": AWKWARD} for target in small.meta["targets"]]
    return small.with_meta(prompt=AWKWARD, tokens=[AWKWARD] * len(small.meta["tokens"]), targets=targets)


def test_gexf_holds_any_text(awkward, tmp_path):
    export(awkward, tmp_path / "g.gexf", "gexf")
    back = nx.read_gexf(tmp_path / "g.gexf")
    shown = AWKWARD.replace("\x01", "\ufffd")
    assert back.nodes["token@0"]["token"] == shown
    assert f"target {shown}" in back


@pytest.mark.filterwarnings("ignore:.*deprecated - use:DeprecationWarning")  # pydot's parser, of pyparsing
def test_dot_reads_back(awkward, tmp_path):
    """Every attribute; numbers as numbers, text as text with the escapes of JSON."""
    named = awkward.with_meta(labels={awkward.names[awkward.index.rows(FEATURE)[0]]: "Texas"})
    export(named, tmp_path / "g.dot", "dot")
    (drawing,) = pydot.graph_from_dot_file(tmp_path / "g.dot")
    network = named.to_networkx()
    assert drawing.get_type() == "digraph"
    assert plain(drawing.get_attributes()) == network.graph | {"rankdir": "BT"}
    nodes = {plain(node.get_name()): plain(node.get_attributes()) for node in drawing.get_nodes()}
    labelled = {name for name, label in network.nodes(data="label") if label}
    assert nodes == {
        name: {key: value for key, value in facts.items() if key != "label" or name in labelled}
        for name, facts in network.nodes(data=True)
    }
    assert len(labelled) == 1
    edges = {
        (plain(edge.get_source()), plain(edge.get_destination())): plain(edge.get_attributes())
        for edge in drawing.get_edges()
    }
    assert edges == {(s, t): facts for s, t, facts in network.edges(data=True)}


def plain(value):
    """What DOT text means: quoted numbers (pydot quotes negative ones) and bare ones, else text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if value.startswith('"'):
        value = json.loads(value, strict=False)
    try:
        return json.loads(value)
    except ValueError:
        return value


def test_the_picture_shows_tokens_target_and_the_strongest_features(graph, tmp_path):
    export(graph, tmp_path / "g.svg", "svg")
    text = "".join(ET.parse(tmp_path / "g.svg").getroot().itertext())
    shown, edges = choose(graph)
    kinds = graph.index.kind[shown]
    assert (kinds == TOKEN).sum() == len(graph.meta["tokens"])
    assert (kinds == TARGET).sum() == 1
    for row in shown[kinds == FEATURE]:
        assert f"L{graph.index.layer[row]}/{graph.index.feature[row]}" in text
    assert graph.meta["targets"][0]["name"] in text
    assert "Spearman" in text
    assert f"{len(shown)} of {graph.n_nodes} nodes and {len(edges)} of {graph.n_edges} edges" in text


def test_the_png_is_an_image_of_readable_size(graph, tmp_path):
    export(graph, tmp_path / "g.png", "png")
    head = (tmp_path / "g.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(head[i : i + 4]) for i in (16, 20))
    assert 800 < width < 6000
    assert 500 < height < 4000


def test_unknown_formats_are_refused_with_the_known_ones(graph, tmp_path):
    with pytest.raises(OutputError, match="dot, gexf, graphml, json, png"):
        export(graph, tmp_path / "g.pdf", "pdf")
    assert not list(tmp_path.iterdir())
