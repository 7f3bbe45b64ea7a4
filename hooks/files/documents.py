"""The small files that describe a set, JSON and YAML: bounded before they are parsed, and read strictly.

A short text can take hundreds of times its size in memory (an empty list is two characters and takes 64 bytes). So the
values are counted in the text before it is parsed. No value is converted: a truth value is `true` or `false`, never
the word "false", and a whole number is neither 8.0 nor "8".
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hooks.errors import CheckpointError, first_line

TEXT_LIMIT = 4 << 20  # bytes; the manifest of 63 layers has some 10 kB
_VALUES = 200_000  # in one document, names included
_DEPTH = 32  # containers within containers
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)  # possessive: each point of backtracking would take 100 bytes
_YAML_LIMIT = 256 << 10
_YAML_VALUES = 20_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # not every build of yaml has the parser in C


def read_json(path: Path) -> Any:
    """The content of a small JSON file.

    Raises:
        CheckpointError: it is too large, nested too deeply, names a key twice, or is no JSON.
    """
    try:
        return parse_json(_bytes(path, TEXT_LIMIT))
    except (ValueError, OSError) as error:
        _unreadable(path, f"JSON of at most {TEXT_LIMIT >> 20} MiB", error)


def parse_json(raw: bytes) -> Any:
    """The value of some JSON text.

    Raises:
        ValueError: it holds too many values, is nested too deeply, names a key twice, has half a character, or is no
            JSON.
    """
    if _count(raw) > _VALUES and (count := _count(_TEXT.sub(b"", raw))) > _VALUES:
        raise ValueError(f"{count:,} values")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("containers nested too deeply") from None
    check_values(content)
    return content


def _count(raw: bytes) -> int:
    """The number of values in some JSON, or more if its strings contain JSON's own signs."""
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return out


def check_values(content: object) -> None:
    """Refuse what cannot be written again: containers nested too deeply, and text with half a character.

    Raises:
        ValueError: saying which.
    """
    waiting = [(content, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, str):
            check_text(part)
        elif isinstance(part, dict | list):
            if depth > _DEPTH:
                raise ValueError("containers nested too deeply")
            parts = (*part.keys(), *part.values()) if isinstance(part, dict) else part
            waiting.extend((inner, depth + 1) for inner in parts)


def check_text(text: str) -> None:
    """Refuse half a character (a surrogate), which no file and no terminal takes.

    Raises:
        ValueError: there is one.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"half a character in {text[:80]!a}") from None


def read_yaml(path: Path) -> Any:
    """The content of a small YAML file of plain values.

    Raises:
        CheckpointError: it is too large, nested too deeply, refers to a part of itself, names a key twice, or is no
            YAML.
    """
    try:
        text = _bytes(path, _YAML_LIMIT).decode("utf-8")
        _check_events(text)
        content = yaml.load(text, _LOADER)
        check_values(content)
        return content
    except Exception as error:  # yaml's constructors raise many kinds: KeyError, AttributeError, …
        _unreadable(path, f"YAML of plain values, {_YAML_LIMIT:,} bytes at most", error)


def _check_events(text: str) -> None:
    """Read the document's events without building any object."""
    count = 0
    within: list[list[Any] | None] = []
    for event in yaml.parse(text, _LOADER):
        count += 1
        if count > _YAML_VALUES:
            raise ValueError(f"more than {_YAML_VALUES:,} values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError("an anchor, or a reference to one")
        if isinstance(event, yaml.CollectionEndEvent):
            within.pop()
            continue
        mapping = within[-1] if within else None
        if mapping is not None and isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            _next_of_mapping(mapping, event)
        if isinstance(event, yaml.CollectionStartEvent):
            within.append([True, set()] if isinstance(event, yaml.MappingStartEvent) else None)
            if len(within) > _DEPTH:
                raise ValueError("containers nested too deeply")


def _next_of_mapping(mapping: list[Any], event: yaml.Event) -> None:
    """Keys and values alternate in a mapping; a key that occurred before is refused, as in JSON."""
    is_name, names = mapping
    if is_name and isinstance(event, yaml.ScalarEvent):
        if event.value in names:
            raise ValueError(f"the key {event.value[:80]!r} occurs twice")
        names.add(event.value)
    mapping[0] = not is_name


def _bytes(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path.stat().st_size:,} bytes")
    return raw


def _unreadable(path: Path, expected: str, error: Exception) -> NoReturn:
    known = isinstance(error, yaml.YAMLError | ValueError | OSError)
    raise CheckpointError(
        f"{path.name} cannot be read",
        expected=expected,
        found=first_line(error) if known else f"{type(error).__name__}: {first_line(error)}",
        where=str(path),
        repair="download or convert the set again",
    ) from None


# -- single values -----------------------------------------------------------------------------------------------


def truth(name: str, value: object, path: Path) -> bool:
    """A truth value.

    Raises:
        CheckpointError: it is something else, the word "false" and the number 0 included.
    """
    if isinstance(value, bool):
        return value
    _refuse(name, value, path, "true or false, without quotation marks")


def flag(config: Mapping[str, Any], key: str, path: Path, default: bool = False) -> bool:
    """A truth value of a configuration; `default` where there is no such entry.

    Raises:
        CheckpointError: it is something else, null included.
    """
    return truth(key, config[key], path) if key in config else default


def whole(name: str, value: object, path: Path, least: int = 1, most: int | None = None) -> int:
    """A whole number, for example k.

    Raises:
        CheckpointError: it is something else, 8.0 and "8" included, or out of range.
    """
    if type(value) is int and value >= least and (most is None or value <= most):
        return value
    _refuse(name, value, path, f"a whole number from {least}" + (f" to {most}" if most is not None else ""))


def real(name: str, value: object, path: Path, least: float = 0.0, most: float = 1e30) -> float:
    """A number, for example a threshold.

    Raises:
        CheckpointError: it is something else, NaN and "0.5" included, or out of range.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    _refuse(name, value, path, f"a number from {least:g} to {most:g}")


def _refuse(name: str, value: object, path: Path, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{path.name}: {name} cannot be {bare(value)}",
        expected=expected,
        found=f"{type(value).__name__} {shown(value)}",
        where=str(path),
        repair="correct the entry",
    )


def bare(value: object, limit: int = 80) -> str:
    """The same as `shown`, but text has no quotation marks."""
    return shown(value, limit).strip("'")


def shown(value: object, limit: int = 80) -> str:
    """A foreign value for a message, whatever it is and however large."""
    if isinstance(value, int) and abs(value) >= 10**limit:  # Python refuses to spell out one of thousands of digits
        return f"a number of more than {limit} digits"
    if isinstance(value, str | int | float | bool | None):
        return repr(value)[:limit]
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, Mapping | list | tuple | set) else f"a {kind}"
