"""The command line's contract: flags, JSON keys, exit status, and what goes to which stream."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from circuits import Graph
from circuits.cli import main

PROMPT = "fact: the capital of the state containing Dallas is"


def run(capsys, *argv: str) -> dict:
    """Run with --json; stdout must be exactly one JSON object."""
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_features(capsys, demo):
    result = run(capsys, "features", PROMPT, "--top", "3")
    assert len(result["tokens"]) == 10
    table = demo.features(PROMPT, top=3)
    assert len(result["features"]) == len(table) == 30
    for row, (_, expected) in zip(result["features"], table.iterrows(), strict=True):
        assert {"layer", "pos", "feature", "activation"} <= set(row)
        assert row["activation"] == pytest.approx(expected["activation"], rel=1e-6)


def test_swap(capsys):
    result = run(capsys, "swap", PROMPT, "--layers", "1,2", "--error", "zero")
    assert [layer["layer"] for layer in result["layers"]] == [1, 2]
    assert {"fvu", "loss", "l0"} <= set(result["layers"][0])
    assert result["kl"] >= 0
    assert 0 <= result["top1_agreement"] <= 1
    exact = run(capsys, "swap", PROMPT, "--layers", "all", "--error", "live")
    assert exact["kl"] == 0
    assert exact["top1_agreement"] == 1


@pytest.mark.parametrize("spread", [True, False])
def test_ablate_takes_features_in_either_form(capsys, demo, spread):
    table = demo.features(PROMPT, top=2).query("pos == 9")
    a, b = (f"L{row.layer}/{row.feature}@-1" for row in table.itertuples())
    flags = ["--feature", a, "--feature", b] if spread else ["--feature", a, b]
    result = run(capsys, "ablate", PROMPT, *flags, "--target", "Austin", "--against", "Sacramento")
    assert result["target"]["token"] == " Austin"
    assert result["against"]["token"] == " Sacramento"
    for state in ("baseline", "ablated"):
        assert set(result[state]) == {"logit", "prob", "rank"}
    assert result["delta"]["logit"] == pytest.approx(result["ablated"]["logit"] - result["baseline"]["logit"])
    assert set(result["delta"]) == {"logit", "prob", "metric"}
    assert result["top_before"][0]["token"] == " Austin"
    assert set(result["top_after"][0]) == {"token", "id", "logit", "prob"}


def test_ablate_defaults_to_the_models_own_answer_against_the_best_other(capsys):
    result = run(capsys, "ablate", PROMPT, "--feature", "L1/0")
    assert result["target"]["token"] == " Austin"
    assert result["against"]["id"] == result["top_before"][1]["id"]


def test_steer(capsys, demo):
    row = demo.features(PROMPT, top=1).query("pos == 9").iloc[0]
    result = run(capsys, "steer", PROMPT, "--set", f"L{row.layer}/{row.feature}@-1=-9", "--max-new-tokens", "3")
    assert result["baseline"]["text"].startswith(" Austin")
    assert 1 <= len(result["steered"]["ids"]) <= 3
    assert result["steered"] != result["baseline"]
    done = run(capsys, "steer", PROMPT, "--do", f"clamp:L{row.layer}/{row.feature}@-1=-9", "--max-new-tokens", "3")
    assert done["steered"] == result["steered"]


def test_trace_and_export(capsys, tmp_path):
    path = tmp_path / "deep" / "g.graph"
    result = run(capsys, "trace", PROMPT, "--out", str(path), "--max-nodes", "100", "--target", "Austin")
    graph = Graph.load(path)
    assert (result["nodes"], result["edges"]) == (graph.n_nodes, graph.n_edges)
    assert result["path"] == str(path)
    assert set(result["verification"]) >= {
        "metric", "node_pearson", "node_spearman", "edge_pearson", "edge_spearman", "n", "noise_floor",
    }  # fmt: skip
    assert result["verification"] == graph.meta["verification"]
    assert 0 <= result["remainder_share"] <= 1
    assert result["seconds"] > 0
    assert result["peak_bytes"] > 0
    for kind in ("json", "graphml", "svg", "png"):
        out = tmp_path / f"c.{kind}"
        exported = run(capsys, "export", str(path), "--format", kind, "--out", str(out))
        assert exported["path"] == str(out)
        assert out.stat().st_size > 0
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "c.json", "c.graphml", "c.svg", "c.png"}


def test_without_json_people_get_text(capsys, tmp_path):
    assert main(["ablate", PROMPT, "--feature", "L1/0"]) == 0
    out = capsys.readouterr().out
    assert "target ' Austin'" in out
    assert "before: " in out
    assert main(["trace", PROMPT, "--out", str(tmp_path / "g")]) == 0
    out = capsys.readouterr().out
    assert "Spearman" in out
    assert "peak" in out
    assert main(["features", PROMPT, "--top", "1"]) == 0
    assert "activation" in capsys.readouterr().out
    assert main(["swap", PROMPT]) == 0
    assert "KL" in capsys.readouterr().out
    assert main(["steer", PROMPT, "--set", "L1/0=1", "--max-new-tokens", "1"]) == 0
    assert "steered:" in capsys.readouterr().out


def test_the_installed_command_runs(tmp_path: Path):
    command = [str(Path(sys.executable).parent / "circuits"), "features", PROMPT, "--top", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["features"]) == 10


def test_undefined_figures_are_null_and_said(capsys, tmp_path):
    """One verified feature has no correlation; one token has no variance. JSON knows neither NaN nor Infinity."""
    result = run(capsys, "trace", PROMPT, "--out", str(tmp_path / "g"), "--sample", "1")
    assert result["verification"]["node_spearman"] is None
    assert main(["trace", PROMPT, "--out", str(tmp_path / "g"), "--sample", "1"]) == 0
    assert "undefined" in capsys.readouterr().out
    assert run(capsys, "swap", "Dallas")["layers"][0]["fvu"] is None
