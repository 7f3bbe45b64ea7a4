"""Earlier names that are still taken, each with a DeprecationWarning: of keywords, and of columns of tables."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pandas as pd

Params = ParamSpec("Params")
Result = TypeVar("Result")
_OURS = ("hooks", "circuits", "pandas", "jaxtyping", "beartype")
COLUMNS = {"id": "name", "position": "pos", "delta_metric": "delta"}  # of tables: earlier name → name


def deprecated(earlier: str, name: str) -> None:
    """Warn that a name has changed. The warning points at the first caller outside this project's own files."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{earlier} is deprecated; it is {name} now", DeprecationWarning, stacklevel=level)


def keywords(**names: str) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """A function that takes some keywords by an earlier name as well: `keywords(position="pos")`.

    Raises:
        TypeError: when the function is called with both names of one keyword.
    """

    def decorate(function: Callable[Params, Result]) -> Callable[Params, Result]:
        @functools.wraps(function)
        def call(*args: Params.args, **given: Params.kwargs) -> Result:
            for earlier in names.keys() & given.keys():
                name = names[earlier]
                if name in given:
                    raise TypeError(f"{function.__name__}() got both {earlier}= and {name}=, which are one")
                deprecated(f"{earlier}=", f"{name}=")
                given[name] = given.pop(earlier)
            return function(*args, **given)

        return call

    return decorate


class Table(pd.DataFrame):
    """A `pandas.DataFrame` whose columns can be read by their earlier names, as `table["id"]` or `table.id`."""

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def __getitem__(self, key: Any) -> Any:
        """A column, or several."""
        if isinstance(key, list):
            return super().__getitem__([self._current(one) for one in key])
        return super().__getitem__(self._current(key))

    def __getattr__(self, name: str) -> Any:
        """A column as an attribute."""
        return super().__getattr__(self._current(name) if name in COLUMNS else name)

    def _current(self, name: Any) -> Any:
        if not isinstance(name, str) or name not in COLUMNS or name in self.columns:
            return name
        if COLUMNS[name] not in self.columns:
            return name
        deprecated(f"the column {name!r}", repr(COLUMNS[name]))
        return COLUMNS[name]
