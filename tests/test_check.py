"""`circuits check` on the command line: what it says, what it writes, what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from worlds import random_transcoder

from circuits.cli import main
from circuits.commands import check as command
from hooks.checkpoints import FILE, Candidate, Findings, Selection, TranscoderStore, read_findings, save_findings
from hooks.demo import TRANSCODERS
from hooks.errors import CheckpointError
from hooks.formats import native, recognise
from hooks.sites import SiteSpec

QUICK = ("check", "--transcoders", "demo-dense", "--tokens", "300", "--layers", "1,2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def copied(here: Path, **changes) -> Path:
    """The embedded dense set in a folder of its own, its manifest changed."""
    root = here / "set"
    shutil.copytree(TRANSCODERS["demo-dense"], root)
    manifest = json.loads((root / native.MANIFEST).read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    (root / native.MANIFEST).write_text(json.dumps(manifest))
    return root


def published(here: Path) -> Path:
    """One layer of the embedded dense set in the published layout."""
    native_set, root = recognise(TRANSCODERS["demo-dense"]), here / "published"
    root.mkdir()
    coder = TranscoderStore.open(native_set.root)[1]
    state = {
        "enc.0.weight": coder.norm_weight,
        "enc.0.bias": coder.norm_bias,
        "enc.1.weight": coder.W_enc,
        "enc.1.bias": coder.b_enc,
        "dec.weight": coder.W_dec.T.contiguous(),
        "dec.bias": coder.b_dec,
    }
    facts = {"final_l0_pct": 12.0, "final_rec_loss": 0.004}
    torch.save({"layer": 1, "state_dict": state, "training_metadata": facts}, root / "transcoder_L1.pt")
    return root


# -- what it says ----------------------------------------------------------------------------------------------------


def test_json_has_every_figure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, *QUICK, "--json"))
    assert found["convention"] == {
        "read": "resid_pre",
        "write": "resid_pre",
        "encoder": "trained",
        "margin": pytest.approx(found["ranking"][1]["fvu"] - found["best"]["fvu"]),
        "verdict": "clear",
        "source": "calibrated",
    }
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    for layer in found["layers"]:
        assert {"layer", "read", "write", "encoder", "fvu", "l0", "ok"} <= set(layer)
        assert layer["ok"]
        assert 0 < layer["fvu"] < 0.1
    assert found["tokens"] == 300
    assert found["text"] == "sentences of the demo's world"
    assert found["stored"]["read"] == {"value": "resid_pre", "source": "stored"}
    assert found["saved"] is None
    assert list(here.iterdir()) == []


def test_the_verdict_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *QUICK)
    assert out.splitlines()[-1].startswith("clear: reads resid_pre, writes resid_pre, trained encoder (FVU 0.0")
    assert "topk, k = 18 (stored)" in out
    assert "FVU by k: " in out


def test_a_published_set_needs_no_sites(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = published(here)
    found = json.loads(run(capsys, "check", "--transcoders", str(root), "--tokens", "600", "--json"))
    assert (found["convention"]["read"], found["convention"]["write"]) == ("resid_pre", "resid_pre")
    assert found["stored"]["read"] == {"value": None, "source": "unknown"}
    assert found["layers"][0]["stored_loss"] == 0.004
    assert "assum" not in caplog.text  # nothing had to be assumed to measure it


def test_a_text_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.txt").write_text("one dog and two dogs\nfact: the capital of Texas is Austin\n" * 40)
    found = json.loads(run(capsys, *QUICK, "--text", "mine.txt", "--json"))
    assert found["text"] == "mine.txt"
    assert found["tokens"] == 300


def test_the_picture_has_every_candidate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *QUICK, "--plot", "map.svg")
    drawn = (here / "map.svg").read_text()
    for text in ("resid_mid+1", "mlp_out+1", "card encoder", "trained encoder", "FVU by k", "ReLU"):
        assert text in drawn
    run(capsys, *QUICK, "--plot", "again.svg")
    assert (here / "again.svg").read_bytes() == (here / "map.svg").read_bytes()


def test_a_plan_loads_no_model(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_host", None)
    assert "what fits a device" in run(capsys, "check", "--plan")


# -- what it writes --------------------------------------------------------------------------------------------------


def test_findings_of_a_published_set_stand_beside_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = published(here)
    assert read_findings(root) is None
    before = (root / "transcoder_L1.pt").read_bytes()
    found = json.loads(run(capsys, "check", "--transcoders", str(root), "--tokens", "600", "--save", "--json"))
    kept = read_findings(root)
    assert kept is not None
    assert kept.model_dump(mode="json") == {name: found[name] for name in Findings.model_fields}
    assert sorted(path.name for path in root.iterdir()) == [FILE, "transcoder_L1.pt"]
    assert (root / "transcoder_L1.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("stored", "source"), [(None, "unknown"), ("mlp_out", "assumed"), ("resid_pre", "stored")], ids=str
)
def test_a_manifest_gets_the_measured_sites_where_it_had_none(
    stored: str | None, source: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(here, read=stored, write=stored, sites_source=source)
    found = json.loads(run(capsys, "check", "--transcoders", str(root), "--tokens", "300", "--save", "--json"))
    manifest = native.read_manifest(root)
    assert (manifest.read, manifest.write) == ("resid_pre", "resid_pre")
    assert manifest.sites_source == ("stored" if source == "stored" else "calibrated")
    assert read_findings(root).best.fvu == found["best"]["fvu"]
    assert recognise(root).facts()["read"] == ("resid_pre", manifest.sites_source)
    assert native.read_manifest(TRANSCODERS["demo-dense"]).layers == manifest.layers


@pytest.mark.parametrize("change", [{"verdict": "too close"}, {"verdict": "none is good"}, {"other_model": True}])
def test_an_open_question_changes_no_sites(change: dict, here: Path) -> None:
    root = copied(here, read=None, write=None, sites_source="unknown")
    findings = some_findings().model_copy(update=change)
    assert save_findings(root, findings) == root / native.MANIFEST
    manifest = native.read_manifest(root)
    assert (manifest.read, manifest.write, manifest.sites_source) == (None, None, "unknown")
    assert read_findings(root) == findings


def some_findings() -> Findings:
    best = Candidate(read="resid_mid", write="mlp_out+1", encoder="trained", fvu=0.1)
    rule = Selection(activation=None, k=None, source="undetermined", measured_with="relu", reason="none")
    return Findings(
        verdict="clear",
        other_model=False,
        best=best,
        margin=0.2,
        ranking=(best,),
        layers=(),
        selection=rule,
        tokens=5,
        sinks=0,
        text="t",
        model="m",
        fingerprint="f",
        date="2026-01-01",
        program="p",
    )


def test_findings_know_their_sites(tmp_path: Path) -> None:
    save_findings(tmp_path, some_findings())
    found = read_findings(tmp_path)
    assert (found.read, found.write) == (SiteSpec("resid_mid"), SiteSpec("mlp_out", 1))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 2}', '{"best": 1}', "{}" * 3],
)
def test_damaged_findings_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=FILE):
        read_findings(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("read", "nowhere"), ("fvu", "much"), ("extra", 1)])
def test_findings_with_a_wrong_entry_are_refused(key: str, value: object, tmp_path: Path) -> None:
    content = some_findings().model_dump(mode="json")
    content["best"][key] = value
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="findings"):
        read_findings(tmp_path)


# -- what it refuses -------------------------------------------------------------------------------------------------

WRONG = {
    "unknown text": (["check", "--text", "none.txt"], ["cannot read the text none.txt", "--text"]),
    "text is no text": (["check", "--text", "binary.txt"], ["cannot read the text", "UTF-8"]),
    "text is a folder": (["check", "--text", "folder"], ["cannot read the text"]),
    "empty text": (["check", "--text", "empty.txt"], ["the text to measure on is empty", "0 tokens"]),
    "no tokens": (["check", "--tokens", "0"], ["--tokens", "0"]),
    "one token": (["check", "--tokens", "1"], ["the text to measure on is empty", "1 tokens"]),
    "negative tokens": (["check", "--tokens", "-5"], ["--tokens"]),
    "layer without transcoder": (["check", "--layers", "0,9"], ["no transcoder for layer 9", "0-4"]),
    "layers no numbers": (["check", "--layers", "a"], ["--layers"]),
    "unknown read site": (["check", "--read", "nowhere"], ["nowhere", "resid_pre"]),
    "write before read": (["check", "--read", "resid_post", "--write", "resid_pre"], ["no candidate reads resid_post"]),
    "unknown encoder": (["check", "--encoder", "mine"], ["the set has no encoder mine", "trained"]),
    "unknown decoder": (["check", "--decoder", "3"], ["the set has no decoder 3"]),
    "k of no set": (["check", "--k", "100000"], ["k = 100000 is out of range"]),
    "no set": (["check", "--transcoders", "nowhere"], ["nowhere"]),
    "no set named": (["check", "--model", "folder"], ["no transcoders given for folder"]),
    "unknown device": (["check", "--device", "cuda:99"], ["cuda:99", "--device"]),
    "unknown dtype": (["check", "--dtype", "int3"], ["int3"]),
    "picture format": (["check", "--plot", "map.gif"], [".gif", ".png"]),
    "picture nowhere": (["check", "--plot", "empty.txt/map.png"], ["cannot write"]),
    "embedded set is not written": (["check", "--save"], ["the embedded set demo stays as it is"]),
    "two questions": (["check", "--plan", "--quality"], ["--plan", "--quality"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_ends_with_status_2(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty.txt").write_text(" \n\n \n")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (here / "folder").mkdir()
    before = sorted(path.name for path in here.rglob("*"))
    argv, texts = WRONG[case]
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    for text in texts:
        assert text in err
    assert sorted(path.name for path in here.rglob("*")) == before


def test_a_set_of_another_width_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = SiteSpec("resid_pre")
    native.save(here / "wide", [random_transcoder(0, 48)], read=site, write=site)
    assert main(["check", "--transcoders", str(here / "wide")]) == 2
    assert "do not fit the model" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_cannot_be_written_is_said_before_measuring(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = published(here)
    root.chmod(0o500)
    monkeypatch.setattr(command, "load_host", None)
    assert main(["check", "--transcoders", str(root), "--save"]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plan", "--save"), "--save has no meaning for --plan"),
        (("--plan", "--plot", "map.png"), "--plot has no meaning for --plan"),
        (("--quality", "--save"), "--save has no meaning for --quality"),
        (("--out", "report.csv"), "--out has no meaning for a check"),
        (("--save", "--read", "resid_pre"), "--read and --save contradict each other"),
        (("--save", "--layers", "1"), "--layers and --save contradict each other"),
        (("--plan", "--nodes", "0"), "--nodes 0 is out of range"),
        (("--plan", "--k", "-5"), "--k -5 is out of range"),
        (("--plan", "--k", "99999999"), "--k 99999999 is out of range"),
        (("--plan", "--devices", "1e300"), "unknown device"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
