"""The memory of the architecture: rooms in one order, one door each, one owner per outside thing."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = {  # lowest first: a room, or a file beside the rooms, imports only what stands before it
    "hooks": [
        "version", "lazy", "errors", "whole", "choices", "renamed", "plugins", "sites", "types", "readout", "kernels",
        "transcoder", "files", "formats", "checkpoints", "interventions", "host", "passes", "effects", "generation",
        "lens", "demo", "names", "memory", "model", "check", "train",
    ],
    "circuits": [
        "agreement", "shown", "drawing", "targets", "blocks", "graph", "edges", "attribution", "building", "plots",
        "export", "faithfulness", "verification", "tracing", "demo", "options", "commands", "cli", "__main__",
    ],
}  # fmt: skip
PLACE = {f"{package}.{m}": (p, i) for p, package in enumerate(ORDER) for i, m in enumerate(ORDER[package])}
ROOMS = {name for name in PLACE if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
OPEN = {
    "hooks.interventions",
    "hooks.demo",
    "hooks.formats.native",
}  # public by name: plug-ins, the world, our own form
HEAVY = {"transformer_lens", "matplotlib"}  # the only imports allowed inside functions
SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}


def names(node: ast.AST, path: Path) -> Iterator[str]:
    """What is imported, as dotted names; `from a import b` is a.b."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: use absolute imports"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


def place(dotted: str) -> str | None:
    """The room, or the file beside the rooms, that a name of ours belongs to."""
    parts = dotted.split(".")
    return ".".join(parts[:2]) if parts[0] in ORDER and len(parts) > 1 else None


def module_of(dotted: str) -> str | None:
    """The module of ours that is imported for a name."""
    if dotted in MODULES:
        return dotted
    parent = dotted.rpartition(".")[0]
    return parent if parent in MODULES else None


@cache
def parsed() -> list[tuple[str, Path, ast.Module]]:
    out = []
    for path in SOURCES:
        where = path.relative_to(ROOT)
        if where.parts[1:] != ("__init__.py",):  # the two packages name what they give, from everywhere
            module = ".".join(where.with_suffix("").parts).removesuffix(".__init__")
            out.append((module, where, ast.parse(path.read_text())))
    return out


@cache
def imports() -> list[tuple[str, Path, str]]:
    return [
        (module, path, name) for module, path, tree in parsed() for node in ast.walk(tree) for name in names(node, path)
    ]


def test_imports_point_down() -> None:
    unplaced = {place(module) for module, *_ in parsed()} - set(PLACE)
    assert not unplaced, f"{unplaced} have no place in the order of tests/test_layering.py"
    wrong = [
        f"{path} imports {name}"
        for module, path, name in imports()
        if (other := place(name)) and other != place(module) and PLACE[other] > PLACE[place(module) or ""]
    ]
    assert not wrong, f"what is not below them is imported: {wrong}"


def test_a_room_is_entered_by_its_door() -> None:
    """`from hooks.files import replacing`, not `from hooks.files.output import replacing`, outside `hooks.files`."""
    wrong = [
        f"{path} imports {name}"
        for module, path, name in imports()
        if (room := place(name)) in ROOMS - OPEN and room != place(module) and module_of(name) not in (room, *OPEN)
    ]
    assert not wrong, f"files that are private to a room are imported from outside: {wrong}"


def test_a_door_names_what_it_gives() -> None:
    for room in sorted(ROOMS - OPEN - {"circuits.commands"}):
        tree = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
        listed = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        assert listed, f"{room} has no __all__"
        assert ast.get_docstring(tree), f"{room} does not say what happens in it"


def test_files_of_a_room_import_each_other_in_one_order() -> None:
    for room in sorted(ROOMS):
        below: dict[str, set[str]] = {}
        for module, _, name in imports():
            other = module_of(name)
            if other and place(module) == place(other) == room and room not in (module, other) and other != module:
                below.setdefault(module, set()).add(other)
        TopologicalSorter(below).prepare()  # raises CycleError


def test_imports_inside_functions_are_heavy_optional_packages() -> None:
    wrong = []
    for _, path, tree in parsed():
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in {inner for function in functions for inner in ast.walk(function)}:
            wrong += [f"{path} imports {name}" for name in names(node, path) if name.split(".")[0] not in HEAVY]
    assert not wrong, f"imports in functions: {wrong}"


def test_the_page_on_the_architecture_lists_every_place() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", page, flags=re.M)
    listed = {name.strip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    missing = {name.split(".")[1] for name in PLACE} - listed - {"__main__"}
    assert not missing, f"docs/architecture.md has no row for {sorted(missing)}"


OWNERS = {  # pattern in the code → files that may contain it
    r"hook_resid_|\.hook_in\b|hook_mlp_out|hook_attn_out": {"hooks/sites.py"},
    r"register_forward_|register_full_backward": {  # looks at the bridge's twin; noise in training
        "hooks/host/host.py",
        "hooks/lens/bridge.py",
        "hooks/demo/train_model.py",
    },
    r"torch\.load\(": {"hooks/files/weight_files.py"},
    r"\bpickle\.(load|dump)|torch\.save\(": set(),
    r"(?<!\.)\bprint\(": {"circuits/cli.py", "circuits/commands/_output.py", "hooks/demo/build.py"},
    r"safetensors\.torch|safe_open": {"hooks/files/weight_files.py"},
    r"from __future__ import annotations": set(),
}


@cache
def code_of(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("pattern", OWNERS)
def test_one_owner_per_outside_thing(pattern: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, code_of(path))}
    assert found <= OWNERS[pattern]
