"""The architecture's memory: one arrow of imports, one owner per outside thing."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = {  # lowest first: a module imports only what stands before it
    "hooks": [
        "version", "lazy", "errors", "whole", "choices", "renamed", "plugins", "sites", "types", "_tiles", "rows",
        "kernels", "transcoder", "links", "documents", "guard", "output", "files", "formats", "hub", "findings",
        "convention", "loading", "residency", "store", "convert", "context", "readout", "exclusive", "tokens", "host",
        "arithmetic", "freeze", "hold", "recording", "swap", "interventions", "intervene", "paths", "observe",
        "generation_config", "sampling", "ulps", "suffix", "variants", "sweep", "candidates", "generation", "session",
        "strength", "steering", "dose", "bridge", "lens", "feature_cache", "demo", "names", "memory", "site_sums",
        "walk", "refit", "site_fits", "selection", "verdict", "texts", "site_passes", "calibrate", "model",
        "layer_step", "decode", "quality_report", "quality",
    ],
    "circuits": [
        "nodes", "shown", "colours", "sound", "graph", "identity", "targets", "held", "blocks", "attribution", "scores",
        "influence", "prune", "measures", "assemble", "select", "agreement", "scatter", "dose_plot", "sweep_plot",
        "check_plot", "quality_plot", "verify", "supernodes", "decompose", "trace", "cases", "curves", "rankings",
        "evaluate", "export", "demo", "options", "commands", "cli", "__main__",
    ],
}  # fmt: skip
RANK = {f"{package}.{m}": (p, i) for p, package in enumerate(ORDER) for i, m in enumerate(ORDER[package])}
HEAVY = {"transformer_lens", "matplotlib"}  # the only imports allowed inside functions
SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def names(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: use absolute imports"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


def stage(dotted: str) -> str | None:
    parts = dotted.split(".")
    return ".".join(parts[:2]) if parts[0] in ORDER and len(parts) > 1 else None


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def test_imports_point_down() -> None:
    wrong = []
    for path, tree in parsed():
        me = stage(".".join(path.with_suffix("").parts))
        if path.name == "__init__.py" and len(path.parts) == 2:
            continue
        assert me in RANK, f"{path} has no place in the order of tests/test_layering.py"
        others = {stage(name) for node in ast.walk(tree) for name in names(node, path)}
        wrong += [f"{path} imports {other}" for other in others if other and other != me and RANK[other] > RANK[me]]
    assert not wrong, f"modules import what is not below them: {wrong}"


def test_imports_inside_functions_are_heavy_optional_packages() -> None:
    wrong = []
    for path, tree in parsed():
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in {inner for function in functions for inner in ast.walk(function)}:
            wrong += [f"{path} imports {name}" for name in names(node, path) if name.split(".")[0] not in HEAVY]
    assert not wrong, f"imports in functions: {wrong}"


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
