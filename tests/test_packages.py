"""The packages as a user meets them: names that load when they are used, a version, types, `python -m circuits`."""

import ast
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import circuits
import hooks
from circuits.attribution import RULES
from circuits.building import choose_nodes as select
from circuits.export import EXPORTERS
from circuits.options import convert, export, steer, trace
from hooks.checkpoints.conversion import WRITERS
from hooks.choices import ENGINES
from hooks.interventions import INTERVENTIONS
from hooks.types import Engine

ROOT = Path(__file__).parents[1]
PACKAGES = [hooks, circuits]
HEAVY = ("torch", "transformers", "numpy", "pandas", "pydantic", "networkx", "matplotlib")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_three_lists_of_names_agree(package: ModuleType):
    """Those that run, those that type checkers read, and those that a star import takes."""
    (block,) = [node for node in ast.parse(Path(package.__file__).read_text()).body if isinstance(node, ast.If)][-1:]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == package.names_
    assert {*package.__all__, "__version__"} == set(typed)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package: ModuleType):
    star: dict[str, object] = {}
    exec(f"from {package.__name__} import *", star)
    assert set(package.__all__) <= set(star)
    assert set(package.__all__) <= set(dir(package))
    assert not [name for name in package.__all__ if isinstance(star[name], ModuleType)]
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_a_function_keeps_its_name_from_the_module_that_defines_it():
    """`circuits.faithfulness` is the function, not the room it is in; `import hooks` reaches all rooms."""
    code = "import circuits.faithfulness; from circuits.faithfulness.evaluate import faithfulness as first\n"
    code += "import circuits; from circuits import faithfulness, trace\n"
    code += "print(callable(trace), callable(faithfulness), faithfulness is first, circuits.faithfulness is first)\n"
    code += "import hooks; print(hooks.kernels.products.__name__, hooks.Site is hooks.sites.Site)"
    assert fresh(code).split() == ["True"] * 4 + ["hooks.kernels.products", "True"]


def test_the_parser_needs_no_heavy_library():
    code = f"import sys; from circuits import cli; cli.build_parser(); print([m for m in {HEAVY} if m in sys.modules])"
    assert fresh(code).strip() == "[]"
    assert fresh(f"import sys, hooks; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


def test_the_words_of_options_are_those_of_the_code():
    assert tuple(RULES) == trace.RULES
    assert tuple(select.ORDERS) == trace.ORDERS
    assert tuple(EXPORTERS) == export.EXPORTERS
    assert tuple(WRITERS) == convert.WRITERS
    assert tuple(INTERVENTIONS) == steer.INTERVENTIONS
    assert get_args(Engine) == ENGINES


@pytest.mark.parametrize("package", PACKAGES)
def test_version_and_types(package: ModuleType):
    assert package.__version__ == version("qwen-circuits")
    assert files(package).joinpath("py.typed").is_file()


def test_python_m_runs_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "circuits", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: circuits ")


@pytest.mark.parametrize("command", ["export", "convert"])
def test_commands_without_a_model_need_no_transformers(command: str):
    code = f"import sys, circuits.commands.{command}; print([m for m in sys.modules if m.startswith('transformers')])"
    assert fresh(code).strip() == "[]"
