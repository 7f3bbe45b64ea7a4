"""What the command line writes lands on nothing that is not ours, unless --force says so."""

from pathlib import Path

import pytest

from circuits import trace
from circuits.cli import main
from circuits.commands._places import SIGNS, check_places
from circuits.demo import report
from circuits.export import EXPORTERS, export
from circuits.graph import Graph
from hooks import Ablate
from hooks.check import quality
from hooks.choices import REPORTS, TABLES
from hooks.demo import PROMPT
from hooks.errors import OutputError

NOTES = "my notes of many weeks"


@pytest.fixture(scope="module")
def graph(demo) -> Graph:
    return trace(demo, PROMPT, max_nodes=30, sample=4)


@pytest.fixture
def refused(capsys):
    def run(*words: str) -> str:
        assert main(list(words)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


def test_an_export_onto_its_own_input_is_refused(graph, tmp_path, refused):
    path = tmp_path / "g.graph"
    graph.save(path)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link", tmp_path / "hard", tmp_path / ".." / tmp_path.name / "g.graph"):
        for force in ([], ["--force"]):
            said = refused("export", str(path), "--format", "json", "--out", str(out), *force)
            assert "is what the command reads" in said
    assert path.read_bytes() == before


COMMANDS = {
    "trace": ["trace", PROMPT, "--out", "{}"],
    "picture of a trace": ["trace", PROMPT, "--out", "new", "--plot", "{}.png"],
    "sweep": ["sweep", PROMPT, "--out", "{}.csv"],
    "json of a sweep": ["sweep", PROMPT, "--out", "{}.json"],
    "parquet of a sweep": ["sweep", PROMPT, "--out", "{}.parquet"],
    "picture of a sweep": ["sweep", PROMPT, "--plot", "{}.svg"],
    "doses": ["steer", PROMPT, "--set", "L3/383", "--strengths", "0,1", "--plot", "{}.png"],
    "check": ["check", "--plot", "{}.svg"],
    "quality": ["check", "--quality", "--out", "{}.csv"],
    **{f"export to {name}": ["export", "g.graph", "--format", name, "--out", "{}.svg"] for name in EXPORTERS},
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_notes_are_not_overwritten(tmp_path, monkeypatch, refused, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hooks.model.HookedModel.load", None)  # said before any work
    (name,) = [word.format("notes") for word in words if "{}" in word]
    Path(name).write_text(NOTES)
    said = refused(*(word.format("notes") for word in words))
    assert f"{name} exists, and holds something else" in said
    assert "--force" in said
    assert Path(name).read_text() == NOTES
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_demo_does_not_overwrite_a_report_of_others(tmp_path, refused):
    (tmp_path / "report.md").write_text(NOTES)
    assert "report.md exists, and holds something else" in refused("demo", "--out", str(tmp_path))
    assert SIGNS["report"] == b"# What the embedded model does"
    assert "What the embedded model does" in Path(report.__file__).read_text()


def test_two_results_in_one_file_are_refused(tmp_path, refused):
    path = str(tmp_path / "g.svg")
    assert "is named twice" in refused("trace", PROMPT, "--out", path, "--plot", path)
    assert not list(tmp_path.iterdir())


def test_force_and_an_empty_file_and_a_stream(graph, tmp_path):
    source, notes, empty = (tmp_path / name for name in ("g.graph", "notes.txt", "empty"))
    graph.save(source)
    notes.write_text(NOTES)
    empty.touch()
    for out, force in ((notes, ["--force"]), (empty, []), (Path("/dev/null"), [])):
        assert main(["export", str(source), "--format", "json", "--out", str(out), *force]) == 0
    assert notes.read_text().startswith("{")
    assert notes.stat().st_size == empty.stat().st_size > 0


def test_what_was_written_before_is_written_again(demo, graph, tmp_path):
    """Every kind carries its sign, so that no second run needs --force."""
    made = [(tmp_path / "g", "graph")]
    graph.save(tmp_path / "g")
    for name in EXPORTERS:
        made.append((tmp_path / f"{name}.{'svg' if name == 'scatter' else name}", name))
        export(graph, made[-1][0], name)
    swept = demo.sweep("fact: the capital of Texas is", [Ablate("L3/383@-1")])
    for suffix in TABLES:
        made.append((tmp_path / f"table{suffix}", "table"))
        swept.save(made[-1][0])
    measured = quality(demo, [PROMPT])
    for suffix in REPORTS:
        made.append((tmp_path / f"quality{suffix}", "quality"))
        measured.save(made[-1][0])
    check_places(False, made)
    for path, kind in made:  # and no kind is taken for another, but for pictures of one format
        for other in ("graph", "gexf", "dot", "table"):
            if other != kind and path.suffix != ".parquet":
                with pytest.raises(OutputError, match="holds something else"):
                    check_places(False, [(path, other)])
