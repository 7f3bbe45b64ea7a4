"""Both packages under one name, and the check that `hooks` and `circuits` are the ones of this distribution.

    from qwen_circuits import HookedModel, trace

The names `hooks` and `circuits` are generic, and PyPI has other packages of both. One of those can replace the
`__init__.py` of ours, or stand in front of it on `sys.path`.
"""

import importlib
import os
import sys
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import circuits as circuits
    import hooks as hooks
    from circuits import *  # noqa: F403
    from hooks import *  # noqa: F403

_NAMES = ("hooks", "circuits")
_FOLDER = os.path.dirname(os.path.dirname(__file__))
_MARK = b"qwen_circuits"  # in both `__init__.py`, which call the functions below
_REINSTALL = "`pip install --force-reinstall --no-deps qwen-circuits`"


def fault(name: str) -> str | None:
    """Why `import NAME` does not give ours, and the repair, in one sentence; None where it does."""
    spec, ours = find_spec(name), os.path.join(_FOLDER, name, "__init__.py")
    file = spec and spec.origin
    if not file:  # nothing, or a folder without __init__.py
        return f"`{name}` of qwen-circuits has lost {ours}: run {_REINSTALL}"
    if os.path.splitext(file)[0] != ours[:-3] and os.path.realpath(file) != os.path.realpath(ours):
        repair = " and ".join(_uninstall(name)) or "rename that file or its folder"
        return f"`{name}` is {file}, which comes before qwen-circuits in {_FOLDER}: {repair}"
    if os.path.isfile(file) and not _has_mark(file):
        repair = ", then ".join([*_uninstall(name), f"run {_REINSTALL}"])
        return f"`{name}` of qwen-circuits was overwritten by another package ({file}): {repair}"
    return None


def _has_mark(file: str) -> bool:
    with open(file, "rb") as opened:
        return _MARK in opened.read()


def _uninstall(name: str) -> list[str]:
    """How the others that have this name go. The search takes a tenth of a second, so only where something is wrong."""
    found = importlib.import_module("importlib.metadata").packages_distributions().get(name, ())
    others = sorted({*found} - {"qwen-circuits"})
    return [f"run `pip uninstall {' '.join(others)}`"] if others else []


def warn_of_another(name: str) -> None:
    """Warn where `import NAME` does not give ours: for a package that works without it."""
    if said := fault(name):
        warnings.warn(said, stacklevel=3)


def refuse_another(name: str) -> None:
    """Stop the import of a package that needs ours.

    Raises:
        ImportError: `import NAME` would not give ours.
    """
    if said := fault(name):
        raise ImportError(said, name=name)


def main() -> int:
    """The command `circuits`; returns the exit status."""
    for name in _NAMES:
        if said := fault(name):
            sys.stderr.write(f"error: {said}\n")
            return 2
    status: int = importlib.import_module("circuits.cli").main()
    return status


def __getattr__(name: str) -> Any:
    """A package, or a public name of one of them."""
    if name in _NAMES:
        refuse_another(name)
        return importlib.import_module(name)
    if not name.startswith("_"):
        for package in map(__getattr__, _NAMES):
            if name in package.__all__:
                return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *(name for package in map(__getattr__, _NAMES) for name in package.__all__)})
