"""Find the modules of a plug-in folder: one file is one plug-in, and its file name is its public name."""

import importlib
import pkgutil
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
