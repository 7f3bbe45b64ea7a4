"""Find the modules of a plug-in folder: one file is one plug-in, and its file name is its public name."""

import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def discover(package: str, requires: tuple[str, ...]) -> dict[str, ModuleType]:
    """Import every public module in `package` and check that it defines the names in `requires`.

    Raises:
        TypeError: a file in the folder does not fulfil the folder's contract.
    """
    folder = importlib.import_module(package)
    found = {}
    for info in pkgutil.iter_modules(folder.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        missing = [name for name in requires if not hasattr(module, name)]
        if missing:
            raise TypeError(f"{module.__file__} is in {package}/ but does not define {missing}")
        found[info.name] = module
    return found


def names(package: str, defines: str) -> tuple[str, ...]:
    """The plug-ins of a folder whose source text defines or imports the function `defines`. No plug-in is imported.

    Help and completion use this instead of `discover`, because it loads none of the libraries that a plug-in needs.
    """
    spec = find_spec(package)
    assert spec is not None, f"there is no package {package}"
    assert spec.submodule_search_locations, f"{package} is no folder"
    defining = re.compile(rf"^def {defines}\(|^from .* import .*\b{defines}\b", re.MULTILINE)
    folder = Path(spec.submodule_search_locations[0])
    sources = {info.name: folder / f"{info.name}.py" for info in pkgutil.iter_modules([str(folder)])}
    return tuple(
        name
        for name, source in sources.items()
        if not name.startswith("_") and defining.search(source.read_text(encoding="utf-8"))
    )
