"""Whole numbers that a caller gives: a count, a seed, a layer, a position. Anything else is refused, never rounded."""

import operator
import re
from collections.abc import Iterable
from typing import Any

from hooks.errors import UserError, first_line


def whole(
    value: object,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
) -> int:
    """A whole number: Python's, NumPy's, or a tensor of one integer.

    Args:
        name: of the argument, for the message.
        least, most: the smallest and the largest that are allowed.

    Raises:
        UserError: it is a float (2.0 too), text, a bool or no number at all; or it is out of range.
    """
    number = counted(value)
    if number is None:
        raise UserError(f"{name} = {_shown(value)} is not a whole number", expected=_range(least, most), where=name)
    if (least is not None and number < least) or (most is not None and number > most):
        raise UserError(f"{name} = {_shown(number)} is out of range", expected=_range(least, most), where=name)
    return number


def wholes(
    values: object,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
) -> tuple[int, ...]:
    """Several whole numbers, in order; a single one counts as a list of one.

    Raises:
        UserError: as `whole`; or text in place of a list.
    """
    if counted(values) is not None:
        return (whole(values, name, least=least, most=most),)
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UserError(
            f"{name} = {_shown(values)} is not a list of whole numbers", expected="such as [0, 2]", where=name
        )
    return tuple(whole(value, f"an entry of {name}", least=least, most=most) for value in values)


def whole_text(text: str) -> int:
    """A whole number in digits, as it is typed.

    Raises:
        UserError: the text is something else, or the number does not fit into 64 bits.
    """
    if not re.fullmatch(r"[-+]?[0-9]+", text):
        raise UserError(f"{text!r} is not a whole number")
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:  # `int` refuses numbers of thousands of digits
        raise UserError(f"{text[:20]}… has {len(text)} digits; 64 bits hold 19")
    return int(text)


def counted(value: Any) -> int | None:
    """The value as an int if Python would accept it as an index, else None. A bool gives None."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers raises one of these, by its kind
        return None


def _range(least: int | None, most: int | None) -> str:
    ends = [f"{word} {end}" for word, end in (("at least", least), ("at most", most)) if end is not None]
    return " and ".join(["a whole number", *ends]) if not ends else f"a whole number, {' and '.join(ends)}"


def _shown(value: object) -> str:
    """A value as it was given; Python refuses to write out numbers of thousands of digits."""
    try:
        return first_line(ValueError(repr(value)), 80)
    except ValueError:
        return "a number of thousands of digits"
