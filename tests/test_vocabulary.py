"""One word for one thing: options over all commands, columns, signs, colours; and earlier names, which still work."""

import argparse
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from circuits import Logit, trace
from circuits.cli import build_parser, main
from circuits.drawing import OPPOSES, QUIET, ROLE, SUPPORTS
from circuits.plots.sweep import _cells, _ranking
from hooks import Ablate, Add, Clamp, Scale, Steer
from hooks.demo import PROMPT
from hooks.effects import Sweep
from hooks.effects.metrics import Question
from hooks.errors import UserError
from hooks.renamed import Table, keywords

PAGE = (Path(__file__).parents[1] / "docs" / "vocabulary.md").read_text(encoding="utf-8")
COMMANDS = build_parser().commands


def options() -> dict[str, dict[str, argparse.Action]]:
    """Every option, by command."""
    found: dict[str, dict[str, argparse.Action]] = {}
    for command, parser in COMMANDS.items():
        for action in parser._actions:
            for name in action.option_strings:
                if name.startswith("--") and name != "--help":
                    found.setdefault(name, {})[command] = action
    return found


def rows(heading: str) -> list[list[str]]:
    """The table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]


def words(help: str) -> str:
    """What an option means, without what it means at one command."""
    return re.split(r"[:;(]", help)[0].strip()


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_page_has_every_option_and_no_other():
    written = {row[0].strip("`"): row[3] for row in rows("Options")}
    found = {name: ", ".join(by) if len(by) < len(COMMANDS) else "all" for name, by in options().items()}
    assert written == found


@pytest.mark.parametrize("name", [name for name, by in options().items() if len(by) > 1])
def test_an_option_means_the_same_in_every_command(name):
    meanings = {
        (words(action.help), action.type, action.metavar, action.nargs, action.dest, type(action))
        for action in options()[name].values()
    }
    assert len(meanings) == 1


@pytest.mark.parametrize("command", [name for name, action in options()["--layers"].items()])
@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["2,3"], [2, 3]),
        (["2", "3"], [2, 3]),
        (["2,", "3"], [2, 3]),
        (["0-2", "4"], [0, 1, 2, 4]),
        (["1-1"], [1]),
        (["all"], "all"),
        (["1", "--layers", "3"], [1, 3]),
    ],
)
def test_layers_are_written_alike_in_every_command(command, typed, read):
    before = {"convert": ["set", "folder"], "check": [], "train": ["--out", "folder"]}.get(command, [PROMPT])
    assert build_parser().parse_args([command, *before, "--layers", *typed]).layers == read
    assert build_parser().parse_args([command, "--layers", *typed, *before]).layers == read


def test_positions_count_from_either_end():
    parsed = build_parser().parse_args(["sweep", "--positions", "0-2", "-1", PROMPT, "--at", "-2"])
    assert (parsed.positions, parsed.at, parsed.prompt) == ([0, 1, 2, -1], -2, PROMPT)


@pytest.mark.parametrize("typed", ["3-1", "1-", "-", "1--3", "0-99999999999", "a", "1,,2", ""])
def test_what_is_no_list_of_layers_is_refused(typed, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["features", PROMPT, f"--layers={typed}"])
    assert "neither `all` nor numbers such as 0,1,5 or 0-3" in capsys.readouterr().err


OLD_OPTIONS = {  # what was typed → what it is now
    "layer": (["sweep", PROMPT, "--layer", "2", "3", "--layer", "4"], ["sweep", PROMPT, "--layers", "2,3,4"]),
    "position": (["sweep", PROMPT, "--position", "-1", "8"], ["sweep", PROMPT, "--positions", "-1,8"]),
    "equals": (["sweep", PROMPT, "--layer=2"], ["sweep", PROMPT, "--layers", "2"]),
    "at": (["trace", PROMPT, "--out", "g", "--position", "3"], ["trace", PROMPT, "--out", "g", "--at", "3"]),
}


@pytest.mark.parametrize("case", OLD_OPTIONS)
def test_earlier_options_work_and_say_so_once(case, capsys):
    earlier, now = (build_parser().parse_args(line) for line in OLD_OPTIONS[case])
    assert earlier == now
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"circuits \w+: --(layer|position) is deprecated; it is --\w+ now", line)


def test_the_page_has_every_earlier_option():
    written = {tuple(row[0].strip("`").split()) for row in rows("Earlier names")}
    found = {(command, name) for command, parser in COMMANDS.items() for name in parser.renamed}
    assert {pair for pair in written if pair[0] in COMMANDS and len(pair) == 2} == found


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (["features", PROMPT], "features"),
        (["ablate", PROMPT, "--feature", "L3/383@-1"], "top_after"),
        (["sweep", PROMPT, "--layers", "3", "--positions", "-1"], "rows"),
    ],
)
def test_top_says_how_many_json_gives(line, key, capsys, monkeypatch, demo):
    monkeypatch.setattr(f"circuits.commands.{line[0]}.load", lambda *_: demo)
    given = []
    for number in (2, 3):
        assert main([*line, "--top", str(number), "--json"]) == 0
        given.append(capsys.readouterr().out.count('"activation"' if key != "top_after" else '"prob"'))
    per_unit = {"features": len(demo.host.batch([PROMPT]).strings[0]), "top_after": 2, "rows": 1}[key]
    assert given[1] - given[0] == per_unit


# -- signs and colours -------------------------------------------------------------------------------------------------


def test_an_ablation_of_what_supports_is_negative_and_its_score_positive(demo):
    graph = trace(demo, PROMPT, sample=0, max_nodes=40)
    nodes = graph.nodes_frame().query("kind == 'feature' and pos == 9").head(5)
    found = demo.sweep(PROMPT, [Ablate(name) for name in nodes["name"]]).table
    doubled = demo.sweep(PROMPT, [Scale(name, 2.0) for name in nodes["name"]]).table
    for score, one, two in zip(nodes["score"], found.itertuples(), doubled.itertuples(), strict=True):
        assert one.role == ("supports" if one.delta < 0 else "opposes")
        assert two.role == ("supports" if two.delta > 0 else "opposes")
        assert one.role == ("supports" if score > 0 else "opposes")


def test_the_role_is_known_where_all_activations_move_one_way(odd):
    acts = odd.record("w1 w2 w3").layers[0].acts
    at = int((acts.values[0] > 0).any(-1).nonzero()[0])
    feature = int(acts.indices[0, at, acts.values[0, at].argmax()])
    quiet = next(number for number in range(odd.store[0].d_features) if number not in acts.indices[0].tolist()[at])
    address = f"L0/{feature}@{at}"
    groups = [
        [Ablate(address)],
        [Add(address, 1.0)],
        [Ablate(address), Add(f"L0/{quiet}@{at}", 1.0)],
        [Ablate(f"L0/{quiet}@{at}")],
        [Clamp(f"L0/{quiet}@{at}", 3.0, when_inactive="skip")],
    ]
    table = odd.sweep("w1 w2 w3", groups, pos=at).table
    for moved, delta, resolved, role in zip(
        (-1, 1), *(table[:2][name] for name in ("delta", "resolved", "role")), strict=True
    ):
        assert resolved
        assert role == ("supports" if moved * delta > 0 else "opposes")
    assert table["role"][2:].isna().all()


def swept(deltas: list[float], roles: list[str | None]) -> Sweep:
    table = pd.DataFrame({"name": [f"L0/{i}@0" for i in range(len(deltas))], "layer": 0, "pos": 0, "feature": 1})
    table = table.assign(delta=deltas, resolved=True, role=roles)
    return Sweep(table, 0.0, {}, Question(0, 1, 0, ("delta",)), ("a",), 1, "float32")


def test_colours_follow_the_role_and_not_the_sign():
    axes = Figure().subplots()
    sweep = swept([-3.0, 2.0, 1.5, -1.0, 0.5], ["supports", "opposes", "supports", "opposes", None])
    _ranking(axes, sweep)
    bars = [to_hex(bar.get_facecolor()) for bar in axes.patches[:5]]
    assert bars == [SUPPORTS, OPPOSES, SUPPORTS, OPPOSES, QUIET]
    assert _cells(sweep.table, 1)[1].tolist() == [[3.0]]
    assert _cells(sweep.table[1:], 1)[1].tolist() == [[-2.0]]
    assert set(ROLE) == {"supports", "opposes"}


# -- earlier names -----------------------------------------------------------------------------------------------------


def warns(earlier: str, name: str):
    return pytest.warns(DeprecationWarning, match=f"^{re.escape(earlier)} is deprecated; it is {re.escape(name)} now$")


def test_earlier_keywords_mean_the_same(demo):
    run = demo.run(PROMPT, [Ablate("L3/99@8")])
    calls = {
        "effect": run.effect,
        "top_before": lambda **at: run.top_before(2, **at),
        "top_after": lambda **at: run.top_after(2, **at),
        "sweep": lambda **at: demo.sweep(PROMPT, [Ablate("L3/99@8")], **at).question,
        "effects": lambda **at: demo.effects(PROMPT, [Ablate("L3/99@8")], **at),
        "path_effect": lambda **at: demo.path_effect(PROMPT, Ablate("L3/99@8"), "L4/242@8", **at).effect,
    }
    for call in calls.values():
        with warns("position=", "pos=") as seen:
            found = call(position=8)
        assert seen[0].filename == __file__
        assert found == call(pos=8)
    with pytest.raises(TypeError, match="both position= and pos="):
        run.effect(pos=1, position=1)


def test_earlier_attributes_and_columns_mean_the_same(demo):
    effect = demo.run(PROMPT, [Ablate("L3/99@8")]).effect()
    with warns("delta_metric", "delta") as seen:
        assert effect.delta_metric == effect.delta
    assert seen[0].filename == __file__
    token = next(iter(demo.stream(PROMPT, max_new_tokens=1)))
    with warns("position", "pos"):
        assert token.position == token.pos
    frame = demo.dose(PROMPT, [Steer("L3/99@8")], [0.0], max_new_tokens=1).frame()
    with warns("the column 'delta_metric'", "'delta'"):
        assert frame["delta_metric"].tolist() == frame["delta"].tolist()


def test_a_table_is_read_by_earlier_names():
    table = Table({"name": ["a", "b"], "pos": [0, 1], "n": [5, 6]})
    with warns("the column 'id'", "'name'") as seen:
        assert table["id"].tolist() == ["a", "b"]
    assert seen[0].filename == __file__
    with warns("the column 'position'", "'pos'"):
        assert table[table["n"] > 5].position.tolist() == [1]
    with warns("the column 'id'", "'name'"):
        assert table[["id", "n"]].columns.tolist() == ["name", "n"]
    assert table["name"].tolist() == ["a", "b"]
    assert table.query("pos == 1")["n"].tolist() == [6]
    own = Table({"id": [1], "name": ["x"]})
    assert own["id"].tolist() == [1]
    with pytest.raises(KeyError):
        table["delta_metric"]
    with pytest.raises(AttributeError):
        _ = table.nothing


def test_a_function_takes_the_earlier_keyword():
    call = keywords(old="new")(lambda new=1, other=2: (new, other))
    assert call(new=5) == (5, 2)
    with warns("old=", "new="):
        assert call(old=5, other=0) == (5, 0)


def test_target_and_targets_are_one(demo):
    one = trace(demo, PROMPT, targets=Logit(" Austin"), sample=0, max_nodes=10)
    other = trace(demo, PROMPT, target=Logit(" Austin"), sample=0, max_nodes=10)
    assert one.names == other.names
    assert torch.equal(torch.from_numpy(one.weight), torch.from_numpy(other.weight))
    with pytest.raises(UserError, match="target= and targets= are one argument"):
        trace(demo, PROMPT, " Austin", target=" Austin")
