"""The lock files name every dependency, direct or not, at versions that pyproject.toml allows."""

import importlib.util
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
spec = importlib.util.spec_from_file_location("upgrade", ROOT / "locks" / "upgrade.py")
assert spec
assert spec.loader
upgrade = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upgrade)


def lock(name: str) -> dict[str, str]:
    return upgrade.blocks((ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8"))


def version(text: str) -> str:
    return re.findall(r"==([^\s;]+)", text)[0]


def direct(extras: list[str], groups: list[str]) -> list[Requirement]:
    build = PROJECT["build-system"]["requires"]
    return [Requirement(each) for each in (*build, *upgrade.wanted(PROJECT, extras, groups))]


@pytest.mark.parametrize(
    ("name", "extras", "groups"),
    [
        ("all", list(PROJECT["project"]["optional-dependencies"]), list(PROJECT["dependency-groups"])),
        ("demo", ["plot"], []),
    ],
)
def test_every_direct_dependency_is_locked_at_a_version_that_is_allowed(name, extras, groups):
    locked = lock(name) | {"torch": (ROOT / "locks" / "torch.txt").read_text(encoding="utf-8")}
    wanted = direct(extras, groups)
    assert len(wanted) > 15
    for requirement in wanted:
        pinned = version(locked[canonicalize_name(requirement.name)])
        assert requirement.specifier.contains(pinned), f"{requirement}, locked {pinned}: make upgrade"


@pytest.mark.parametrize("name", ["all", "demo", "build"])
def test_every_line_of_a_lock_is_one_version_with_hashes(name):
    locked = lock(name)
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8")
    assert text == upgrade.HEAD + "".join(locked.values())
    for package, lines in locked.items():
        assert re.fullmatch(r"[^\s=]+==[\w.!+]+( ; [^\\]+)? \\", lines.split("\n")[0]), package
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", lines), package
        assert not upgrade.OF_TORCH.match(package)


def test_smaller_locks_are_parts_of_the_largest():
    everything = lock("all")
    for name in ("demo", "build"):
        smaller = lock(name)
        assert smaller
        assert smaller.items() <= everything.items()


@pytest.mark.parametrize("name", ["all", "demo"])
def test_what_locked_packages_need_is_locked_too(name):
    """By what the installed packages say of themselves, where they are those of the lock."""
    locked, seen = lock(name), 0
    for package, lines in locked.items():
        try:
            installed = distribution(package)
        except PackageNotFoundError:  # of another system, or not installed with the demo
            continue
        if installed.version != version(lines):  # the newest set is not the locked one
            continue
        seen += 1
        for text in installed.requires or ():
            need = Requirement(text)
            if need.name == "torch" or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            line = locked[canonicalize_name(need.name)]
            assert need.specifier.contains(version(line), prereleases=True), text
            assert Requirement(line.split(" \\\n")[0]).marker in (None, need.marker), f"{text}, not on every system"
    assert seen


def test_what_belongs_to_one_build_of_torch_is_left_to_torch():
    """What a resolver says on a machine whose torch carries CUDA."""
    answer = "\n".join(
        f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64}\n    # via {needed_by}"
        for name, needed_by in {
            "appnope": "pyproject.toml",
            "cuda-bindings": "torch",
            "mpmath": "sympy",
            "nvidia-cublas": "torch",
            "numpy": "pandas, pyproject.toml",
            "pandas": "pyproject.toml",
            "sympy": "torch",
            "torch": "pyproject.toml",
            "triton": "torch",
            "tzdata": "pandas, pyproject.toml",
        }.items()
    )
    kept = upgrade.portable(answer)
    assert list(upgrade.blocks(kept)) == ["appnope", "mpmath", "numpy", "pandas", "sympy", "tzdata"]
    assert "tzdata==1.0 \\" in kept  # needed here, too
    assert kept.split("\n")[1] == 'appnope==1.0 ; platform_system == "Darwin" \\'
    assert list(upgrade.blocks(upgrade.part(kept, ["torch>=2.11"]))) == ["mpmath", "sympy"]
    assert list(upgrade.blocks(upgrade.part(kept, ["pandas[x]>=2"]))) == ["numpy", "pandas", "tzdata"]
