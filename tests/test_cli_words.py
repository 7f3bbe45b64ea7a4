"""What is typed and what is printed: mistakes, values that look like options, streams that end or know only ASCII."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from circuits import cli
from circuits.cli import main
from circuits.options import steer, sweep
from hooks.demo import PROMPT

ROOT = Path(__file__).parents[1]
NINES = "9" * 5000


def parsed(*words: str):
    return cli.build_parser().parse_args(list(words))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message behind the usage lines."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err) < 3000
    return err[err.index("error: ") :]


def run(*words: str, **settings) -> subprocess.CompletedProcess:
    env = os.environ | settings.pop("env", {})
    command = [sys.executable, "-m", "circuits", *words]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=300, env=env, **settings)


# -- what is typed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["-2,0,2", "-1e3", "-.5:3:2", "-x2,x0", "-0.1r"])
def test_a_value_may_begin_with_a_dash(values):
    assert parsed("steer", PROMPT, "--set", "L0/1", "--strengths", values).strengths == values
    assert parsed("steer", "--strengths", values, PROMPT).prompt == PROMPT
    assert parsed("sweep", PROMPT, "--dose", "L0/1", "--values", values).values == values
    assert parsed("ablate", PROMPT, "--feature", "L0/1", "--target", "-").target == "-"
    assert parsed("sweep", PROMPT, "--positions", "-1", "-2").positions == [-1, -2]


@pytest.mark.parametrize("module", [steer, sweep])
def test_options_may_stand_in_front_of_the_prompt(module):
    name = module.__name__.rpartition(".")[2]
    assert parsed(name, "--seed" if name == "steer" else "--at", "3", PROMPT).prompt == PROMPT


@pytest.mark.parametrize("name", list(cli.build_parser().commands))
def test_the_examples_of_the_help_can_be_typed(name):
    parser = cli.build_parser().commands[name]
    lines = [line.strip() for line in parser.epilog.splitlines()[1:]]
    assert lines
    for line in lines:
        assert cli.build_parser().parse_args(shlex.split(line.partition(" > ")[0])[1:]).command == name


MISTYPED = {
    "a command": (["ablat", "x"], ["did you mean ablate?"]),
    "an option": (["features", "x", "--tpo", "3"], ["--tpo", "did you mean --top?"]),
    "a required option": (["ablate", "x", "--featrue", "L0/1"], ["--feature", "did you mean --feature?"]),
    "an option with a value": (["features", "x", "--layres=2"], ["did you mean --layers?"]),
    "an option of the whole": (["--verison"], ["did you mean --version?"]),
    "an option before the command": (["--json", "features", "x"], ["--json is before the command"]),
    "a model before the command": (["--model", "demo", "features", "x"], ["--model is before the command"]),
    "no quotes": (
        ["features", "the", "capital", "of", "Texas", "is", "--top", "3"],
        ["'the' is followed by 'capital'", "circuits features 'the capital of Texas is' --top 3"],
    ),
    "no quotes behind options": (
        ["features", "--top", "3", "the", "capital"],
        ["circuits features 'the capital' --top 3"],
    ),
    "a list takes the prompt": (
        ["ablate", "--feature", "L0/1", "the capital"],
        ["PROMPT", "--feature takes every word behind it", "circuits ablate 'the capital' --feature L0/1"],
    ),
    "a long number": (["features", "x", "--top", NINES], ["--top", "5000 digits"]),
    "a long list": (["features", "x", "--layers", f"1,{NINES}"], ["--layers", "0,1,5", "…"]),
    "a long layer": (["sweep", "x", "--layers", NINES], ["--layers", "…"]),
    "more than 64 bits": (["trace", "x", "--out", "g", "--seed", str(2**63)], ["--seed", "64 bits"]),
    "no number": (["trace", "x", "--out", "g", "--seed", "٣x"], ["--seed", "not a whole number"]),
}


@pytest.mark.parametrize(("words", "shown"), MISTYPED.values(), ids=MISTYPED)
def test_what_is_mistyped_is_answered_with_what_was_meant(capsys, words, shown):
    message = said(capsys, *words)
    for part in shown:
        assert part in message


def test_what_was_meant_is_not_guessed_where_nothing_is_near(capsys):
    assert "did you mean" not in said(capsys, "features", "x", "--zzzzzz")
    assert "did you mean" not in said(capsys, "quux")
    assert "did you mean" not in said(capsys, "features", "--", "--top", "--tpo")


@pytest.mark.parametrize("budget", ["inf", "nan", "1e300", "0", "-1"])
def test_a_budget_that_is_none(capsys, budget):
    assert main(["features", PROMPT, "--budget-gb", budget]) == 2
    assert "--budget-gb" in capsys.readouterr().err


@pytest.mark.parametrize("typed", [("fea", "features"), ("steer x --stren", "--strengths"), ("sweep x --error ", "")])
def test_bash_completes_commands_options_and_words(typed, tmp_path):
    start, expected = typed
    script = run("completion", "bash", capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    (tmp_path / "script").write_text(script.stdout)
    words = shlex.join(["circuits", *start.split(" ")])
    asked = f"source ./script; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_circuits; "
    done = subprocess.run(
        ["bash", "-c", asked + 'echo "${COMPREPLY[@]}"'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell, capsys):
    assert main(["completion", shell, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == shell
    for word in ("features", "strengths", "live"):
        assert word in found["script"]


def test_a_completion_starts_no_torch():
    code = "import sys; from circuits.cli import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"circuits {version('qwen-circuits')}\n"


# -- what is printed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["features", "--help"]])
def test_a_full_device_behind_stdout(words, buffered):
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full, stderr=subprocess.PIPE, text=True, env={"PYTHONUNBUFFERED": buffered})
    assert done.returncode == 2
    assert done.stderr == "error: the output: No space left on device\n"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_gone(buffered):
    read, write = os.pipe()
    os.close(read)
    done = run("--help", stdout=write, stderr=subprocess.PIPE, env={"PYTHONUNBUFFERED": buffered})
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_results_that_cannot_be_written(monkeypatch, capsys):
    """The same after the work is done, whatever else may fail there: one sentence, and no traceback."""
    for error, status, text in [
        (OSError(28, "No space left on device"), 2, "error: the output: No space left on device\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (PermissionError(13, "Permission denied", "/locked/x"), 2, "error: /locked/x: Permission denied\n"),
        (OSError(12, "Cannot allocate memory"), 2, "error: OSError: Cannot allocate memory\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ]:

        def broken(args, error=error):
            raise error

        monkeypatch.setattr(cli, "run", broken)
        assert main(["features", PROMPT]) == status
        assert capsys.readouterr().err == text


def test_closed_streams():
    def close() -> None:
        os.close(1)
        os.close(2)

    assert run("features", "--help", preexec_fn=close).returncode == 0
    assert run("features", "--tpo", preexec_fn=close).returncode == 2


def test_ctrl_c_is_one_line(tmp_path):
    command = [sys.executable, "-m", "circuits", "demo", "--out", str(tmp_path / "never")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a test run in the background of a shell may have been told to ignore the signal, and hands that on
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes) as running:
        first = running.stderr.readline()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    assert first.startswith("measuring")
    assert running.returncode == 130
    assert out == ""
    assert [line for line in err.splitlines() if not line.startswith("  ")] == ["interrupted"]


PLAIN = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "MPLBACKEND": "nonsense"}


def test_a_terminal_of_ascii_and_a_backend_that_is_not_there(tmp_path):
    """A token of the minus sign and of an accent, as text and as JSON; a picture beside it."""
    plot = str(tmp_path / "p.svg")
    words = ["sweep", "fact: the capital of Texas is", "--layers", "3", "--positions", "-1", "--plot", plot]
    done = run(*words, capture_output=True, text=True, env=PLAIN)
    assert done.returncode == 0, done.stderr
    assert "\\u2212" in done.stdout  # logit − logit
    assert Path(plot).stat().st_size > 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_json_in_any_encoding(monkeypatch, tmp_path, encoding):
    result = {"token": " Zürich − 😀", "half": "\udcff"}
    monkeypatch.setattr(cli, "run", lambda args: result)
    with (tmp_path / "out").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["features", PROMPT, "--json"]) == 0
        monkeypatch.undo()
    assert json.loads((tmp_path / "out").read_text(encoding)) == result
