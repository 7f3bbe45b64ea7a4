"""Whatever is wrong with the input: exit status 2, one message on stderr, nothing on stdout, no file left."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits.attribution import RULES
from circuits.cli import main
from circuits.export import EXPORTERS
from hooks import HookedModel
from hooks.demo import PROMPT, WEIGHTS
from hooks.formats import native
from hooks.interventions import INTERVENTIONS
from hooks.sites import SITE_NAMES, SiteSpec

ABLATE, FEATURES, STEER = ("ablate", PROMPT), ("features", PROMPT), ("steer", PROMPT)
TRACE = ("trace", PROMPT, "--out", "graph.safetensors")


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, so that whatever is left behind is seen."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run a command that must be refused; returns what it says on stderr."""

    def run(*argv: str) -> str:
        before = everything(here)
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        assert status == 2, f"exit status {status}: {err}"
        assert out == ""
        assert "error: " in err
        assert "Traceback" not in err
        assert everything(here) == before
        return err

    return run


# Each: the command, and what its message has to contain.
WRONG = {
    "no command": ([], ["COMMAND"]),
    "unknown command": (["explain"], ["explain", "trace"]),
    "unknown option": ([*FEATURES, "--colour"], ["--colour"]),
    "features without prompt": (["features"], ["PROMPT"]),
    "ablate without feature": ([*ABLATE], ["--feature"]),
    "trace without out": (["trace", PROMPT], ["--out"]),
    "export without format": (["export", "graph.safetensors", "--out", "x.json"], ["--format"]),
    "export without out": (["export", "graph.safetensors", "--format", "json"], ["--out"]),
    "steer without interventions": ([*STEER], ["--set", "--do"]),
    "number expected": ([*FEATURES, "--top", "many"], ["--top", "many"]),
    "layers no numbers": ([*FEATURES, "--layers", "0,b"], ["--layers", "0,b", "0,1,5"]),
    "swap layers no numbers": (["swap", PROMPT, "--layers", "some"], ["--layers", "some"]),
    "unknown error mode": (["swap", PROMPT, "--error", "melt"], ["melt", "live", "frozen", "zero"]),
    "error mode without swap": ([*ABLATE, "--feature", "L0/1", "--error", "zero"], ["zero", "swap"]),
    "unknown mask mode": ([*ABLATE, "--feature", "L0/1", "--mask", "half"], ["half", "frozen"]),
    "unknown demo set": (["demo", "--transcoders", "big"], ["big", "demo-dense"]),
    # models and transcoders
    "unknown model": (
        ["features", PROMPT, "--model", "no-such-model", "--transcoders", "demo"],
        ["no-such-model"],
    ),
    "unknown hub model": (
        ["features", PROMPT, "--model", "no/such-model", "--transcoders", "demo"],
        ["no/such-model"],
    ),
    "unknown model folder": (
        ["features", PROMPT, "--model", "./nowhere", "--transcoders", "demo"],
        ["there is no folder", "nowhere", "config.json"],
    ),
    "model without transcoders": (["features", PROMPT, "--model", "no-such-model"], ["--transcoders"]),
    "unknown transcoders": (
        [*FEATURES, "--transcoders", "nowhere"],
        ["nowhere", "expected", "found: nothing"],
    ),
    "unknown hub transcoders": ([*FEATURES, "--transcoders", "no/where"], ["no/where", "demo-dense"]),
    "unknown transcoder folder": (
        [*FEATURES, "--transcoders", "/no/where/at/all"],
        ["there is no folder /no/where"],
    ),
    "unknown site": ([*FEATURES, "--read", "residual"], ["unknown site 'residual'", *SITE_NAMES]),
    "unknown write site": ([*FEATURES, "--write", "mlp_out-1"], ["unknown site 'mlp_out-1'", "+N"]),
    "contradicting site": (
        [*FEATURES, "--read", "mlp_in"],
        ["--read mlp_in contradicts", "resid_pre, as stored"],
    ),
    "k of zero": ([*FEATURES, "--k", "0"], ["k = 0", "expected: 1 to"]),
    "k beyond the dictionary": ([*FEATURES, "--k", "99999"], ["k = 99999", "expected: 1 to"]),
    "unknown dtype": ([*FEATURES, "--dtype", "float12"], ["float12", "float32, bfloat16"]),
    "unknown device": ([*FEATURES, "--device", "abacus"], ["abacus", "found: ", "--device"]),
    "missing device": ([*FEATURES, "--device", "cuda:77"], ["cuda:77", "--device"]),
    "unknown device map": ([*FEATURES, "--device-map", "nonsense"], ["nonsense"]),
    # prompts and targets
    "empty prompt": (["features", ""], ["the prompt is empty", "at least one token", "found: ''"]),
    "blank prompt": ([*ABLATE[:1], " ", "--feature", "L0/1"], ["the prompt is empty", "found: ' '"]),
    "empty prompt to trace": (["trace", "", "--out", "graph.safetensors"], ["the prompt is empty"]),
    "long prompt": (["features", "fact: " * 600], ["the prompt has ", "at most "]),
    "target of two tokens": (
        [*ABLATE, "--feature", "L0/1", "--target", "San Antonio"],
        ["'San Antonio' is not one token", "' San' | ' Antonio'"],
    ),
    "against of two tokens": (
        [*ABLATE, "--feature", "L0/1", "--against", "San Antonio"],
        ["'San Antonio' is not one token", "' San' | ' Antonio'"],
    ),
    "traced target of two tokens": ([*TRACE, "--target", "San Antonio"], ["' San' | ' Antonio'"]),
    "empty target": (
        [*ABLATE, "--feature", "L0/1", "--target", ""],
        ["'' is not one token", "an empty text"],
    ),
    "target not in the vocabulary": (
        [*ABLATE, "--feature", "L0/1", "--target", "qzxq"],
        ["'qzxq' is not in the vocabulary"],
    ),
    "against without target": ([*TRACE, "--against", "Austin"], ["--against needs --target"]),
    # addresses
    "no address": ([*ABLATE, "--feature", "118"], ["cannot read the feature address '118'", "L3/383@-1"]),
    "address without feature": ([*ABLATE, "--feature", "L3"], ["'L3'", "L{layer}/{feature}"]),
    "address with a negative layer": ([*ABLATE, "--feature", "L-1/3"], ["'L-1/3'", "expected"]),
    "address without position": ([*ABLATE, "--feature", "L0/1@"], ["'L0/1@'", "expected"]),
    "position no number": ([*ABLATE, "--feature", "L0/1@last"], ["'last'", "2:5"]),
    "position with a step": ([*ABLATE, "--feature", "L0/1@1:5:2"], ["'1:5:2'", "2:5"]),
    "layer out of range": (
        [*ABLATE, "--feature", "L99/1"],
        ["L99/1: layer 99", "expected: a layer among 0, 1"],
    ),
    "feature out of range": (
        [*ABLATE, "--feature", "L0/99999"],
        ["no feature 99999", "expected: 0 to", "layer 0"],
    ),
    "huge feature": ([*ABLATE, "--feature", "L0/" + "9" * 30], ["is beyond any model", "expected: L{layer}/{feature}"]),
    "position beyond the prompt": (
        [*ABLATE, "--feature", "L0/1@40"],
        ["position 40", "expected: positions 0 to ", "the prompt has "],
    ),
    "position before the prompt": ([*ABLATE, "--feature", "L0/1@-99"], ["position -99", " to -1)"]),
    "empty slice": ([*ABLATE, "--feature", "L0/1@4:2"], ["position 4:2", "does not occur"]),
    "slice beyond the prompt": ([*ABLATE, "--feature", "L0/1@99:"], ["position 99:", "positions 0 to "]),
    "new tokens without generation": ([*ABLATE, "--feature", "L0/1@new"], ["@new", "circuits steer"]),
    "swapped layer out of range": (
        ["swap", PROMPT, "--layers", "0,99"],
        ["layer 99", "expected: layers among 0-"],
    ),
    "shown layer out of range": ([*FEATURES, "--layers", "99"], ["99", "expected: "]),
    # interventions
    "set without value": ([*STEER, "--set", "L0/1"], ["L0/1", "ADDRESS=VALUE"]),
    "set an empty value": ([*STEER, "--set", "L0/1="], ["'' is not a number", "L0/1="]),
    "set a word": ([*STEER, "--set", "L0/1=strong"], ["'strong' is not a number"]),
    "set NaN": ([*STEER, "--set", "L0/1=nan"], ["nan is not a finite number", "L0/1"]),
    "set infinity": ([*STEER, "--set", "L0/1=-inf"], ["-inf is not a finite number"]),
    "set nothing to a value": ([*STEER, "--set", "=3"], ["feature address ''"]),
    "set twice": (
        [*STEER, "--set", "L0/1=1", "L0/1@3=2"],
        ["two interventions act on the same", "L0/1@3", "at most one"],
    ),
    "clamp and ablate": (
        [*STEER, "--set", "L0/1=1", "--do", "ablate:L0/1@2:4"],
        ["two interventions act on the same", "L0/1"],
    ),
    "ablate twice": ([*ABLATE, "--feature", "L0/1@-1", "L0/1"], ["two interventions act on the same", "narrow"]),
    "unknown intervention": ([*STEER, "--do", "freeze:L0/1=1"], ["'freeze'", *INTERVENTIONS]),
    "ablate to a value": ([*STEER, "--do", "ablate:L0/1=2"], ["ablate takes no value", "clamp"]),
    "scale without a value": ([*STEER, "--do", "scale:L0/1"], ["scale", "value"]),
    "no new tokens": ([*STEER, "--set", "L0/1=1", "--max-new-tokens", "0"], ["0 tokens", "at least 1"]),
    "too many new tokens": ([*STEER, "--set", "L0/1=1", "--max-new-tokens", "9999"], ["9999", "at most "]),
    "frozen error while generating": (
        [*STEER, "--set", "L0/1=1", "--swap", "all", "--error", "frozen"],
        ["frozen", "live or zero"],
    ),
    # graphs and files
    "features top 0": ([*FEATURES, "--top", "0"], ["--top", "from 1 up"]),
    "unknown rule": ([*TRACE, "--rule", "guess"], ["unknown attribution rule 'guess'", *RULES]),
    "no nodes": ([*TRACE, "--max-nodes", "0"], ["0", "at least 1"]),
    "node threshold": ([*TRACE, "--node-threshold", "80"], ["80", "above 0, at most 1"]),
    "edge threshold": ([*TRACE, "--edge-threshold", "nan"], ["nan", "above 0, at most 1"]),
    "export nothing": (
        ["export", "gone", "--format", "json", "--out", "x"],
        ["no graph file gone", "circuits trace"],
    ),
    "unknown format": (["export", "gone", "--format", "docx", "--out", "x"], ["'docx'", *EXPORTERS]),
}


@pytest.mark.parametrize(("argv", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_input_is_refused(refused, argv, said):
    message = refused(*argv)
    for text in said:
        assert text in message


@pytest.mark.parametrize(
    "name",
    [
        "unknown transcoders",
        "empty prompt",
        "target of two tokens",
        "layer out of range",
        "set NaN",
        "unknown rule",
    ],
)
def test_with_json_a_refusal_prints_nothing_on_stdout(refused, name):
    argv, said = WRONG[name]
    message = refused(argv[0], "--json", *argv[1:])
    assert all(text in message for text in said)


@pytest.mark.parametrize("name", ["unknown transcoders", "empty prompt", "target of two tokens", "unknown site"])
def test_a_message_says_expected_and_found_on_their_own_lines(refused, name):
    lines = refused(*WRONG[name][0]).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    labels = [line.strip().split(":")[0] for line in lines[start + 1 :]]
    assert labels[0] == "expected"
    assert set(labels) <= {"expected", "found", "where", "repair"}


# -- folders -------------------------------------------------------------------------------------------------


def published(root: Path, **changes: object) -> Path:
    width = json.loads((WEIGHTS / "config.json").read_text())["hidden_size"]
    coder = random_transcoder(0, width)
    state = {
        "_orig_mod.enc.0.weight": coder.norm_weight,
        "_orig_mod.enc.0.bias": coder.norm_bias,
        "_orig_mod.enc.1.weight": coder.W_enc,
        "_orig_mod.enc.1.bias": coder.b_enc,
        "_orig_mod.dec.weight": coder.W_dec.T.contiguous(),
        "_orig_mod.dec.bias": coder.b_dec,
    }
    content = {"layer": 0, "state_dict": state, "training_metadata": {"final_l0_pct": 12.0}, **changes}
    root.mkdir()
    torch.save(content, root / "transcoder_L0.pt")
    return root


def own(root: Path, width: int, layers: tuple[int, ...] = (0,)) -> Path:
    site = SiteSpec("resid_pre")
    native.save(root, [random_transcoder(layer, width) for layer in layers], read=site, write=site)
    return root


def test_the_published_set_of_these_tests_is_fine(here, capsys):
    published(here / "set")
    assert main([*FEATURES, "--json", "--transcoders", "set"]) == 0
    assert {row["layer"] for row in json.loads(capsys.readouterr().out)["features"]} == {0}


def test_a_folder_without_transcoders_is_refused(here, refused):
    (here / "set").mkdir()
    assert "found: an empty folder" in refused(*FEATURES, "--transcoders", "set")
    (here / "set" / "notes.txt").touch()
    message = refused(*FEATURES, "--transcoders", "set")
    assert "no transcoders found in set" in message
    assert "notes.txt" in message


def test_a_file_in_place_of_the_folder_is_refused(here, refused):
    published(here / "set")
    assert "found: a file" in refused(*FEATURES, "--transcoders", "set/transcoder_L0.pt")


def test_transcoders_of_another_width_are_refused(here, demo, refused):
    width = demo.host.d_model
    own(here / "set", width + 8)
    message = refused(*FEATURES, "--transcoders", "set")
    assert f"expected: width {width}" in message
    assert f"found: width {width + 8}" in message


def test_transcoders_of_a_deeper_model_are_refused(here, demo, refused):
    own(here / "set", demo.host.d_model, (0, 30))
    message = refused(*FEATURES, "--transcoders", "set")
    assert f"expected: a layer from 0 to {demo.host.n_layers - 1}" in message
    assert "found: layer 30" in message


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_file_is_refused(here, refused, share):
    path = published(here / "set") / "transcoder_L0.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refused(*FEATURES, "--transcoders", "set")
    assert "transcoder_L0.pt is damaged or incomplete" in message
    assert "download it again" in message


def test_an_empty_file_is_refused(here, refused):
    (published(here / "set") / "transcoder_L0.pt").write_bytes(b"")
    assert "transcoder_L0.pt" in refused(*FEATURES, "--transcoders", "set")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_is_refused_and_not_executed(here, refused, kind):
    root = published(here / "set", note=Trap())
    if kind == "pickle":
        (root / "transcoder_L0.pt").write_bytes(pickle.dumps(Trap()))
    message = refused(*FEATURES, "--transcoders", "set")
    assert "more than tensors" in message
    assert not (here / "sprung").exists()


def test_a_file_of_another_layer_is_refused(here, refused):
    published(here / "set", layer=7)
    assert "says it is layer 7" in refused(*FEATURES, "--transcoders", "set")


def test_graphs_need_a_site_that_joins_the_stream(here, refused):
    published(here / "set")
    message = refused(*TRACE, "--transcoders", "set", "--read", "resid_pre", "--write", "mlp_in")
    assert "there is no graph for transcoders that read resid_pre and write mlp_in" in message
    assert "one of resid_pre, resid_mid, resid_post, mlp_out, attn_out" in message


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--select", "luck"], "unknown order of selection 'luck'"),
        (["--mass", "0.9", "--answer", "Austin"], "--answer and --mass each name a target"),
        (["--plot", "check.png", "--sample", "0"], "--plot draws the verification"),
        (["--counterfactual", "fact: the capital of"], "the same number of tokens"),
        (["--explain", "L0/3@2"], "nothing that the transcoders write reaches L0/3@2"),
        (["--explain", "L9/3"], "layer 9 has no transcoder"),
        (["--explain", "L3/99999"], "feature 99999 does not exist in layer 3"),
        (["--mass", "2"], "mass 2.0 of at most 10 tokens holds nothing"),
        (["--at", "99"], "position 99 does not occur"),
        (["--plot", "check.bmp"], "unknown picture format '.bmp'"),
    ],
)
def test_what_trace_cannot_explain_is_refused(here, refused, options, text):
    assert text in refused(*TRACE, *options)


def test_a_model_folder_without_a_model_is_refused(here, refused):
    (here / "model").mkdir()
    message = refused(*FEATURES, "--model", "model", "--transcoders", "demo")
    assert "the folder model holds no model" in message
    assert "found: an empty folder" in message


def test_the_demo_set_does_not_fit_another_model(here, refused, demo):
    random_qwen2().save_pretrained(here / "model")
    word_tokenizer().save_pretrained(here / "model")
    message = refused("features", "w1 w2", "--model", "model", "--transcoders", "demo")
    assert "expected: width 40" in message
    assert f"found: width {demo.host.d_model}" in message


def test_damaged_model_weights_are_refused(here, refused):
    random_qwen2().save_pretrained(here / "model")
    word_tokenizer().save_pretrained(here / "model")
    own(here / "set", 40)
    path = here / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model" in refused("features", "w1 w2", "--model", "model", "--transcoders", "set")


# -- where to write, and what to export ----------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file/graph.safetensors", "file/deeper/graph.safetensors", "folder"])
def test_an_unwritable_place_is_refused_before_any_work(here, refused, out, monkeypatch):
    (here / "file").write_text("in the way")
    (here / "folder").mkdir()
    monkeypatch.setattr(HookedModel, "load", None)  # the place is looked at first
    message = refused("trace", PROMPT, "--out", out)
    assert f"cannot write {out}" in message
    assert "found: " in message
    if out != "folder":
        assert "cannot write file" in refused("demo", "--out", out)


def test_an_unwritable_export_is_refused(here, refused):
    (here / "file").write_text("in the way")
    for name in EXPORTERS:
        assert "cannot write file/x" in refused("export", "gone", "--format", name, "--out", "file/x")


def test_a_refused_trace_leaves_no_folder(refused):
    refused("trace", "", "--out", "new/graph.safetensors")


CONTENT = {
    "text": b"hello, I am no graph",
    "nothing": b"",
    "json": b'{"nodes": []}',
}


@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT.keys())
@pytest.mark.parametrize("name", sorted(EXPORTERS))
def test_what_is_not_a_graph_is_not_exported(here, refused, content, name):
    (here / "file").write_bytes(content)
    message = refused("export", "file", "--format", name, "--out", "out")
    assert "file is not a readable safetensors file" in message


def test_safetensors_of_something_else_are_not_exported(here, refused):
    save_file({"x": torch.zeros(2)}, here / "file")
    message = refused("export", "file", "--format", "json", "--out", "out")
    assert "file is not a graph of this version" in message
    assert "circuits trace" in message


def test_a_folder_is_not_exported(here, refused):
    (here / "graph").mkdir()
    assert "no graph file graph" in refused("export", "graph", "--format", "json", "--out", "out")


# -- known to be wrong ---------------------------------------------------------------------------------------

BUGS = {
    "huge slice": [*ABLATE, "--feature", "L0/1@0:" + "9" * 20],
    "negative sample": [*TRACE, "--sample", "-5"],
    "negative seed": [*TRACE, "--seed", "-1"],
    "negative top": [*ABLATE, "--feature", "L0/1", "--top", "-1"],
    "device without memory": [*FEATURES, "--device", "meta"],
    "prompt that is not UTF-8": ["features", "fact: \udcff"],
}


@pytest.mark.parametrize("argv", BUGS.values(), ids=BUGS.keys())
def test_these_wrong_inputs_are_refused_too(refused, argv):
    refused(*argv)


@pytest.mark.parametrize(
    "name",
    ["no address", "unknown rule", "no nodes", "node threshold", "against without target", "unknown device"],
)
def test_what_needs_no_model_is_checked_before_loading_one(refused, name, monkeypatch):
    monkeypatch.setattr("hooks.model.loading.Host", None)
    refused(*WRONG[name][0])


# -- as a process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["features", PROMPT, "--json", "--transcoders", "/no/where"],
            "error: there is no folder /no/where\n",
        ),
        (["trace", PROMPT, "--json"], "the following arguments are required: --out"),
    ],
    ids=["ours", "argparse"],
)
def test_the_process_exits_with_2_and_says_why_on_stderr(here, argv, said):
    process = subprocess.run(
        [sys.executable, "-m", "circuits.cli", *argv], capture_output=True, text=True, cwd=here, timeout=120
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert said in process.stderr
    assert "Traceback" not in process.stderr
    assert everything(here) == {}
