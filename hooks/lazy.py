"""A package whose public names are imported when they are first used, so that importing the package is cheap."""

import importlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package that knows where its names are defined; see `lazily`."""

    names_: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name in self.names_:
            value = getattr(importlib.import_module(self.names_[name]), name)
            super().__setattr__(name, value)
            return value
        whole = f"{self.__name__}.{name}"
        if name.startswith("_") or find_spec(whole) is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        return importlib.import_module(whole)

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module as attribute of its package; `circuits.faithfulness` stays the function
        if not (isinstance(value, ModuleType) and name in self.names_):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.names_})


def lazily(package: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Give `package` its public names: {module: names it defines}; a module is imported at the first use of one.

    This is a class and not the function `__getattr__` of PEP 562, for two reasons. `circuits.faithfulness` is both a
    function and the folder that defines it. And type checkers assume that a package with `__getattr__` has every name.
    """
    module = sys.modules[package]
    module.__class__ = LazyPackage
    module.__dict__["names_"] = {name: place for place, found in names.items() for name in found}
