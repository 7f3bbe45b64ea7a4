"""A graph that contradicts itself is refused, wherever it comes from; names stay apart; any text can be drawn."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import networkx as nx
import numpy as np
import pydot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from worlds import random_qwen2, random_transcoder

from circuits import Direction, Feature, Graph, Logit, Mass, Target, check_graph, fold, trace
from circuits.cli import main
from circuits.drawing.scatter import Panel, scatter_plot
from circuits.export import EXPORTERS, export
from circuits.faithfulness import Curve
from circuits.faithfulness.curves import plot_curves
from circuits.graph import FEATURE, REST, TARGET, NodeIndex, plain
from circuits.plots import sweep_plot
from circuits.shown import clean, drawn, unique
from hooks import Ablate, HookedModel, Site
from hooks.errors import OutputError, TargetError, UserError
from hooks.files.documents import parse_json
from stress.graphs import DAMAGES, File, bounded, by_command, damage, resident

TEXT = "w1 w2 w3 w4"
NASTY = '$a_$ \\frac{ \x01\x1b[31m\n\t<&>" $ 京 \ufffe'


@pytest.fixture(scope="module")
def graph(odd) -> Graph:
    return trace(odd, TEXT, max_nodes=30, sample=6)


@pytest.fixture(scope="module")
def saved(graph, tmp_path_factory):
    path = tmp_path_factory.mktemp("graphs") / "good.safetensors"
    graph.save(path)
    return path


@pytest.mark.parametrize("number", range(2 * len(DAMAGES)))
def test_a_damaged_file_is_refused_or_a_sound_graph(saved, tmp_path, number):
    """The first of the files of stress/graphs.py."""
    _, raw = damage(saved, number)
    (tmp_path / "bad").write_bytes(raw)
    formats = ("svg", "dot", "graphml") if number % 8 == 5 else ("json", "gexf")
    found, fault, _ = bounded(tmp_path / "bad", tmp_path, formats)
    assert not fault
    assert found in ("refused", "loaded")
    if number < 3:
        assert not by_command(tmp_path / "bad", tmp_path)


def put(graph: Graph, name: str, row: int, value: float) -> Graph:
    """The graph with one number changed."""
    home = graph.index if hasattr(graph.index, name) else graph
    column = getattr(home, name).copy()
    column[row] = value
    if home is graph:
        return replace(graph, **{name: column})
    return replace(graph, index=replace(graph.index, **{name: column}))


def features(graph: Graph) -> list[int]:
    return graph.index.rows(FEATURE).tolist()


WRONG = {  # what is done to a graph, what is then said
    "a kind that is none": (lambda g: put(g, "kind", 0, 7), "the kind of node 0"),
    "a negative layer": (lambda g: put(g, "layer", features(g)[0], -1), "the layer of node"),
    "a token with a layer": (lambda g: put(g, "layer", 0, 1), "the layer of node 0, a token"),
    "a negative position": (lambda g: put(g, "pos", 0, -2), "the pos of node 0"),
    "a feature without a number": (lambda g: put(g, "feature", features(g)[0], -1), "the feature of node"),
    "a position beyond the prompt": (lambda g: put(g, "pos", 0, 99), "the position of a node"),
    "a layer that is not among those of the graph": (lambda g: g.with_meta(layers=[0, 1]), "layer of a node"),
    "the same node twice": (lambda g: put(g, "pos", 0, 1), "is not what a graph has"),
    "an edge from nowhere": (lambda g: put(g, "source", 0, -1), "the source of edge 0"),
    "an edge beyond the nodes": (lambda g: put(g, "target", 0, g.n_nodes), "the target of edge 0"),
    "an edge to itself": (lambda g: put(g, "source", 0, g.target[0]), "edge 0"),
    "an edge downward": (lambda g: replace(g, source=g.target, target=g.source), "edge"),
    "the same edge twice": (lambda g: twice(g), "an edge"),
    "a weight that is NaN": (lambda g: put(g, "weight", 0, np.nan), "the weight of edge 0"),
    "an infinite effect": (lambda g: put(g, "effect", 0, np.inf), "the effect of edge 0"),
    "a score that no model has": (lambda g: put(g, "score", 0, 1e300), "the score of node 0"),
    "a negative influence": (lambda g: put(g, "influence", 0, -1.0), "the influence of node 0"),
    "a feature without an activation": (lambda g: put(g, "activation", features(g)[0], np.nan), "the activation of"),
    "a token too few": (lambda g: g.with_meta(tokens=g.meta["tokens"][:-1]), "tokens and ids"),
    "a token that is a number": (lambda g: g.with_meta(tokens=[1, 2, 3, 4]), "meta: tokens"),
    "no target for its node": (lambda g: g.with_meta(targets=[]), "meta: targets"),
    "a target without a name": (lambda g: target(g, name=None), "target 0: name"),
    "a target at another position": (lambda g: target(g, pos=0), "target 0"),
    "a coefficient too many": (lambda g: target(g, coefficients=[1.0, 2.0, 3.0]), "target 0"),
    "a weight that is text": (lambda g: target(g, weight="1"), "target 0: weight"),
    "a truth value for a position": (lambda g: target(g, pos=True), "target 0: pos"),
    "an unknown kind of target": (lambda g: target(g, kind="other"), "target 0: kind"),
    "a rule that is a number": (lambda g: g.with_meta(rule=3), "meta: rule"),
    "labels that are a list": (lambda g: g.with_meta(labels=["a"]), "meta: labels"),
    "half a character": (lambda g: g.with_meta(prompt="\ud800"), "not Unicode"),
    "what JSON does not have": (lambda g: g.with_meta(note={1, 2}), "not plain data"),
    "facts within facts": (lambda g: g.with_meta(note=nested(50)), "nested too deeply"),
    "a count that is text": (lambda g: g.with_meta(verification=g.meta["verification"] | {"n": "6"}), "cation: n"),
    "sampled columns of two lengths": (lambda g: uneven(g), "verification_sample: edges"),
}  # fmt: skip


def twice(graph: Graph) -> Graph:
    columns = {name: np.append(getattr(graph, name), getattr(graph, name)[:1]) for name in ("source", "target")}
    columns |= {name: np.append(getattr(graph, name), 0.5) for name in ("weight", "effect")}
    return replace(graph, **columns)


def target(graph: Graph, **facts) -> Graph:
    return graph.with_meta(targets=[{**graph.meta["targets"][0], **facts}])


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def uneven(graph: Graph) -> Graph:
    sample = graph.meta["verification_sample"]
    return graph.with_meta(verification_sample=sample | {"edges": {"weight": [1.0], "effect": []}})


@pytest.mark.parametrize("name", WRONG)
def test_what_contradicts_itself_is_refused_in_words(graph, tmp_path, name):
    """The same by the check, when it is written, and when it is exported."""
    change, said = WRONG[name]
    wrong = change(graph)
    for use in (check_graph, lambda g: g.save(tmp_path / "a"), lambda g: export(g, tmp_path / "a", "json")):
        with pytest.raises(UserError, match=said):
            use(wrong)
    assert not list(tmp_path.iterdir())


def test_a_sound_graph_passes_folded_or_without_facts(graph, tmp_path):
    """The norm of a rest that grew is not known; a graph made by hand may know nothing but its nodes."""
    folded = fold(graph, graph.index.rows(FEATURE)[:2])
    assert np.isnan(folded.activation[folded.index.rows(REST)]).any()
    for number, one in enumerate(
        (folded, replace(graph, meta={}), graph.subgraph(np.array([0]), np.array([], dtype=int)))
    ):
        check_graph(one)
        one.save(tmp_path / f"{number}")
        assert Graph.load(tmp_path / f"{number}").names == one.names
        for kind in set(EXPORTERS) - {"scatter"}:
            export(one, tmp_path / f"a.{kind}", kind)


def test_what_is_not_known_is_null_and_never_nan(graph, tmp_path):
    unknown = graph.with_meta(
        verification={**graph.meta["verification"], "node_pearson": float("nan")}, note=float("inf")
    )
    unknown.save(tmp_path / "a")
    loaded = Graph.load(tmp_path / "a")
    assert loaded.meta["verification"]["node_pearson"] is None is loaded.meta["note"]
    export(unknown, tmp_path / "a.json", "json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0)["graph"]["note"] is None
    assert plain({"a": (float("nan"), np.float64(1.5))}) == {"a": [None, 1.5]}


def test_too_many_facts_are_refused_before_they_are_read(saved, tmp_path):
    file = File(saved)
    file.head["meta"]["note"] = [[]] * 600_000
    (tmp_path / "more").write_bytes(file.raw())
    assert bounded(tmp_path / "more", tmp_path, ())[:2] == ("refused", "")


def test_counting_the_values_of_a_header_takes_no_memory_for_the_text_in_it():
    """A million escaped quotes: a pattern that could go back to each of them took 400 MB."""
    raw = json.dumps({"a": '"' * 1_000_000, "b": "," * 300_000}).encode()
    before = resident(anew=True)
    assert len(parse_json(raw)["a"]) == 1_000_000
    assert resident() - before < 30 << 20


# ---- names


@given(st.lists(st.sampled_from(["a", "a (2)", "a (3)", "b", "", "a (2) (2)"]), max_size=9))
def test_unique_names_are_unique_and_a_name_that_stands_alone_stays(names):
    found = unique(names)
    assert len(set(found)) == len(found) == len(names)
    assert [new for name, new in zip(names, found, strict=True) if names.count(name) == 1] == [
        name for name in names if names.count(name) == 1
    ]
    assert {name: found[names.index(name)] for name in names} == {name: name for name in names}


@pytest.fixture(scope="module")
def bytewise() -> HookedModel:
    """A vocabulary of single bytes, and ids beyond it that decode to nothing."""
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model = random_qwen2()
    model.resize_token_embeddings(280, mean_resizing=False)
    return HookedModel.from_model(
        model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), [random_transcoder(0, 40)]
    )


def test_targets_whose_tokens_read_the_same_are_told_apart(bytewise, tmp_path):
    ranked = bytewise.run("京都").top_before(280)
    pieces = [top.id for top in ranked if top.token == "\ufffd"][:2]
    beyond = [top.id for top in ranked if top.id >= 256][:2]
    for targets, count in ((pieces, 2), (beyond, 2), (Mass(1.0, most=30), 30)):
        graph = trace(bytewise, "京都", targets, sample=0, max_nodes=20)
        rows = graph.index.rows(TARGET)
        assert len(rows) == len({graph.names[row] for row in rows}) == count
        assert len(set(graph.nodes_frame()["name"])) == graph.n_nodes == len(graph.to_networkx())
        graph.save(tmp_path / "a")
        assert Graph.load(tmp_path / "a").names == graph.names
    assert f"#{beyond[0]}" in trace(bytewise, "京都", beyond, sample=0, max_nodes=20).target_names[0]
    with pytest.raises(TargetError, match="given twice"):
        trace(bytewise, "京都", [pieces[0], pieces[0]])


def test_targets_that_a_person_named_alike_are_numbered(odd):
    same = [Target("m", (3,), (1.0,), -1), Target("m", (4,), (1.0,), -1)]
    assert trace(odd, TEXT, same, sample=0, max_nodes=9).target_names == ("m (ids 3)", "m (ids 4)")
    vectors = [Direction(row, Site("resid_post", 3), name="v") for row in torch.eye(odd.host.d_model)[:2]]
    assert trace(odd, TEXT, vectors, sample=0, max_nodes=9).target_names == ("v", "v (2)")
    with pytest.raises(TargetError, match="given twice"):
        trace(odd, TEXT, [Feature("L3/1@-1"), Feature("L3/1@3", 2.0)])


@pytest.mark.filterwarnings("ignore:.*deprecated - use:DeprecationWarning")  # pydot's parser, of pyparsing
def test_names_that_a_format_cannot_tell_apart_are_numbered(tmp_path):
    """Two zero bytes, or two control characters, in names: in XML and in DOT each would be one node."""
    index = NodeIndex.build(1, {}, [0, 0, 0])
    names = ("a\0", "a\ufffd", "a\x01")
    flat = np.zeros(len(index))
    graph = Graph(index, flat, flat, flat, *(np.zeros(0, dtype=int),) * 2, *(np.zeros(0),) * 2,
                  meta={"targets": [{"name": name} for name in names]})  # fmt: skip
    for kind, read in (("graphml", nx.read_graphml), ("gexf", nx.read_gexf)):
        export(graph, tmp_path / "a", kind)
        assert len(read(tmp_path / "a")) == graph.n_nodes
    graph.save(tmp_path / "a")  # though several of its columns are one array
    assert Graph.load(tmp_path / "a").names == graph.names
    export(graph, tmp_path / "a.dot", "dot")
    (drawing,) = pydot.graph_from_dot_file(tmp_path / "a.dot")
    assert len({node.get_name() for node in drawing.get_nodes()}) == graph.n_nodes


# ---- what several targets are


def test_a_list_and_a_tuple_of_targets_mean_the_same(odd):
    for several in (["w1", "w2", Logit("w3")], ("w1", "w2", Logit("w3"))):
        assert len(trace(odd, TEXT, several, sample=0, max_nodes=9).target_names) == 3
    assert len(trace(odd, TEXT, ["w1", "w2"], sample=0, max_nodes=9).target_names) == 2


def test_against_names_the_other_token_and_a_tuple_of_two_still_does_with_a_warning(odd):
    wanted = trace(odd, TEXT, Logit("w1", "w2"), sample=0, max_nodes=9).meta["targets"]
    assert trace(odd, TEXT, "w1", against="w2", sample=0, max_nodes=9).meta["targets"] == wanted
    with pytest.warns(DeprecationWarning, match=r"write Logit\('w1', 'w2'\)"):
        assert trace(odd, TEXT, ("w1", "w2"), sample=0, max_nodes=9).meta["targets"] == wanted
    with pytest.raises(TargetError, match="against= belongs to one token"):
        trace(odd, TEXT, ["w1", "w3"], against="w2")


# ---- pictures


def test_any_text_can_be_drawn(odd, graph, tmp_path):
    """As it is: a dollar sign is no TeX; what XML cannot hold is replaced. Read back from the SVG."""
    swept = odd.sweep(TEXT, [[Ablate("L0/1@1")], [Ablate("L1/2@2")]])
    table = swept.table.assign(name=NASTY)
    curve = Curve(NASTY, "signed", (0.1, 1.0), (1.0, 9.0), torch.ones(1, 2), torch.ones(1))
    named = graph.with_meta(prompt=NASTY, rule=NASTY, tokens=[NASTY] * 4, labels=dict.fromkeys(graph.names, NASTY))
    pictures = {
        "sweep": lambda path: sweep_plot(replace(swept, tokens=(NASTY,) * 4, table=table), path),
        "scatter": lambda path: scatter_plot([Panel(NASTY, [1e-6, 1.0], [1e-6, 1.0], unit=NASTY)], path),
        "curves": lambda path: plot_curves({NASTY: [curve]}, path, NASTY),
        "graph": lambda path: export(target(named, name=NASTY), path, path.suffix[1:]),
    }
    for name, draw in pictures.items():
        for suffix in ("svg", "png"):
            draw(tmp_path / f"{name}.{suffix}")
        text = "".join(ET.parse(tmp_path / f"{name}.svg").getroot().itertext())
        assert "$a_$" in text, name
    assert "10⁻" in "".join(ET.parse(tmp_path / "scatter.svg").getroot().itertext())


@given(st.text(st.characters(codec=None), max_size=40))
def test_drawn_text_is_one_short_line_that_xml_can_hold(text):
    line = drawn(text, 20)
    assert len(line) <= 20
    assert len(line.splitlines()) <= 1 or "\x85" in line or "\u2028" in line or "\u2029" in line
    assert ET.fromstring(f"<a>{line.replace('&', '&amp;').replace('<', '&lt;')}</a>").text in (line, None)
    assert clean(line) == line


def test_a_picture_too_large_for_a_png_is_refused_in_words(tmp_path):
    flat = np.zeros(2001)
    index = NodeIndex.build(2000, {}, [])
    wide = Graph(index, flat, flat, flat, *(np.zeros(0, dtype=int),) * 2, *(np.zeros(0),) * 2)
    with pytest.raises(OutputError, match="too large for a PNG"):
        export(wide, tmp_path / "a.png", "png")


def test_what_was_measured_is_kept_when_its_picture_fails(tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("of the drawing")

    monkeypatch.setattr("circuits.commands.sweep.sweep_plot", fail)
    arguments = ["sweep", "fact: the capital", "--layer", "4", "--position", "2", "--json"]
    status = main([*arguments, "--out", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")])
    out, err = capsys.readouterr()
    assert status == 2
    assert json.loads(out)["rows"]
    assert "of the drawing" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


# ---- what they say of themselves


def test_graph_run_recording_session_and_effect_say_what_they_are_on_one_line(demo, graph):
    run, session = demo.run("fact: the capital of the state containing Dallas is"), demo.session("fact: the")
    effect = run.effect("Austin", "Denver")
    said = {repr(graph): f"{graph.n_nodes} nodes, {graph.n_edges} edges", repr(run): "10 tokens, answer ' Austin'",
            repr(demo.record(["fact: the", "fact:"])): "2 prompts, ", repr(session): "' fact: the'",
            repr(effect): "Effect(' Austin' − ' Denver'"}  # fmt: skip
    for line, part in said.items():
        assert part in line
        assert "\n" not in line
        assert len(line) < 200
    assert effect == replace(effect, target_text="")
    for shown in (run, effect, graph):
        ET.fromstring(f"<div>{shown._repr_html_()}</div>")
