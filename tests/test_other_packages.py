"""PyPI has other packages called `circuits` and `hooks`: in either order of installing, and in front on the path."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import circuits
import hooks
import qwen_circuits

ROOT = Path(__file__).parents[1]
OTHERS = {"circuits": "3.2.5", "hooks": "0.1.1"}


def wheel_of_another(name: str, folder: Path) -> Path:
    """A stand-in: a package of that name with one function, as a wheel."""
    version = OTHERS[name]
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "def of_another():\n    pass\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": f"{name}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    out = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return out


@pytest.fixture(scope="module")
def our_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours as pip builds it, without the demo's weights: no model is loaded here."""
    folder = tmp_path_factory.mktemp("ours")
    for package in ("hooks", "circuits", "qwen_circuits"):
        left_out = shutil.ignore_patterns("weights", "__pycache__")
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=left_out)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source" / file)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    return next(folder.glob("*.whl"))


def pip(command: str, *words: str | Path) -> None:
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-index", "--no-deps", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Place:
    """A folder that wheels are installed into, one after the other, and what Python says there."""

    def __init__(self, prefix: Path, *wheels: Path):
        self.prefix = prefix
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
        for wheel in wheels:
            pip("install", "--ignore-installed", "--no-compile", "--prefix", prefix, wheel)

    def run(self, *words: str, first: Path | None = None) -> subprocess.CompletedProcess:
        path = os.pathsep.join(str(each) for each in (first, self.packages) if each)
        environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(words, cwd=self.prefix, env=environment, capture_output=True, text=True, timeout=60)

    def python(self, code: str, **rest: Path) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-c", code, **rest)

    def commands(self, **rest: Path) -> dict[str, subprocess.CompletedProcess]:
        """Every way to the command line."""
        scripts = Path(sysconfig.get_path("scripts", vars={"base": str(self.prefix)}))
        ways = {name: (str(scripts / name),) for name in ("circuits", "qwen-circuits")}
        ways["python -m"] = (sys.executable, "-m", "qwen_circuits")
        return {name: self.run(*words, "--version", **rest) for name, words in ways.items()}


@pytest.fixture
def place(our_wheel: Path, tmp_path: Path) -> Callable[..., Place]:
    """Ours and a stand-in, in the order of the names."""

    def install(*names: str) -> Place:
        wheels = [our_wheel if name == "ours" else wheel_of_another(name, tmp_path) for name in names]
        return Place(tmp_path / "prefix", *wheels)

    return install


def refused(done: subprocess.CompletedProcess, *says: str) -> None:
    """One line on stderr, with all of that, and exit status 2."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for text in ("error: ", *says):
        assert text in done.stderr


def repair(name: str) -> tuple[str, ...]:
    return f"`{name}`", f"`pip uninstall {name}`", "`pip install --force-reinstall --no-deps qwen-circuits`"


@pytest.mark.slow
def test_another_circuits_that_overwrote_ours(place: Callable[..., Place]):
    here = place("ours", "circuits")
    done = here.python("import hooks; print(hooks.Site.__name__)")
    assert done.stdout == "Site\n"  # `hooks` works
    assert "UserWarning: `circuits` of qwen-circuits was overwritten by another package" in done.stderr
    assert all(text in done.stderr for text in repair("circuits"))
    assert "ImportError: `circuits` of qwen-circuits was" in here.python("from qwen_circuits import trace").stderr
    for done in (*here.commands().values(), here.run(sys.executable, "-m", "circuits")):
        refused(done, *repair("circuits"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ours_that_overwrote_another(place: Callable[..., Place], name: str):
    """Ours works; when the other goes, it takes the file that both have."""
    here = place(name, "ours")
    for done in here.commands().values():
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("circuits ")
    done = here.python("import circuits, hooks, qwen_circuits as both; print(both.Site is hooks.Site)")
    assert (done.stdout, done.stderr) == ("True\n", "")
    (here.packages / name / "__init__.py").unlink()  # `pip uninstall NAME`
    for done in here.commands().values():
        refused(done, f"`{name}` of qwen-circuits has lost ", repair(name)[-1])


@pytest.mark.slow
def test_another_hooks_that_overwrote_ours(place: Callable[..., Place]):
    here = place("ours", "hooks")
    for code in ("from circuits import trace", "from qwen_circuits import HookedModel"):
        done = here.python(code)
        assert done.returncode == 1
        assert "ImportError: `hooks` of qwen-circuits was overwritten" in done.stderr
        assert all(text in done.stderr for text in repair("hooks"))
    for done in here.commands().values():
        refused(done, *repair("hooks"))


@pytest.mark.slow
def test_another_one_in_front_of_ours(place: Callable[..., Place], tmp_path: Path):
    here = place("ours")
    front = Place(tmp_path / "front", *(wheel_of_another(name, tmp_path) for name in OTHERS)).packages
    for done in here.commands(first=front).values():
        refused(
            done, f"`hooks` is {front / 'hooks' / '__init__.py'}, which comes before", "run `pip uninstall hooks`\n"
        )
    shutil.rmtree(front / "hooks")
    warned = here.python("import hooks", first=front)
    assert warned.returncode == 0
    assert f"UserWarning: `circuits` is {front}" in warned.stderr
    own = tmp_path / "own"
    own.mkdir()
    (own / "hooks.py").touch()  # a script of the user's
    done = here.python("import circuits", first=own)
    assert f"ImportError: `hooks` is {own / 'hooks.py'}, which comes before qwen-circuits" in done.stderr
    assert done.stderr.endswith(": rename that file or its folder\n")


def test_nothing_is_said_of_our_own():
    assert qwen_circuits.fault("hooks") is qwen_circuits.fault("circuits") is None


def test_one_name_for_both():
    assert qwen_circuits.hooks is hooks
    assert qwen_circuits.circuits is circuits
    assert not {*hooks.__all__} & {*circuits.__all__}
    for package in (hooks, circuits):
        assert {*package.__all__} <= {*dir(qwen_circuits)}
        for name in package.__all__:
            assert getattr(qwen_circuits, name) is getattr(package, name)
    with pytest.raises(AttributeError, match="module 'qwen_circuits' has no attribute 'nonsense'"):
        _ = qwen_circuits.nonsense
