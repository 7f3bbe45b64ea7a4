"""Small frozen types that all other files use: sparse activations, feature addresses, edits."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import AddressError
from hooks.sites import Site
from hooks.whole import counted

ErrorMode = Literal["live", "frozen", "zero"]
"""What happens to the reconstruction error at a replaced site.

`live`: it is recomputed from the edited run's own stream, so an empty edit is exact. `frozen`: the clean run's error is
added. `zero`: no error is added.
"""

MaskMode = Literal["frozen", "live"]
"""Whether TopK selects again when a feature is ablated. `frozen`: no. `live`: yes, so the next feature takes its
place."""

Engine = Literal["static", "dynamic"]
"""How tokens are generated. `dynamic`: the cache grows, and edits are attached for each pass. `static`: cache and
tables have a fixed size, and on CUDA a token is one CUDA graph (`hooks.generation.FastDecoder`)."""

_DIGITS = 9  # a number with more digits is no layer, feature or position of any model


def whole_number(value: object, what: str) -> int:
    """An integer of any library, or a float that is one: the 4.0 of a table whose columns are all floats.

    Raises:
        AddressError: it is neither; rounding it would give another address than the user meant.
    """
    if type(value) is int:
        return value
    if getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]
    number = int(value) if isinstance(value, float) and value.is_integer() else counted(value)
    if number is not None:
        return number
    raise AddressError(f"the {what} {shortened(repr(value))} is not a whole number", expected="such as 4, or 4.0")


def as_row(value: object) -> list[Any] | None:
    """The entries of a tuple, a list, or one row of an array, table or tensor; None for anything else."""
    if isinstance(value, tuple | list):
        return list(value)
    items: Any = value
    return list(items.tolist()) if len(getattr(value, "shape", ())) == 1 else None


def shortened(text: str, limit: int = 60) -> str:
    """Enough of a text to recognise it in a message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class SparseActs:
    """The features that TopK kept, in one form everywhere.

    `indices` ascend along the last axis. A value of 0 means "selected, then cut by ReLU": the feature is inactive.
    Without TopK (plain ReLU), `k` is the largest number of active features of any token in the batch.

    `real` is False at padding tokens, whose features mean nothing. None: there is no padding.
    """

    values: Float[Tensor, "*token k"]
    indices: Int[Tensor, "*token k"]
    real: Bool[Tensor, "*token"] | None = None

    def dense(self, d_features: int) -> Float[Tensor, "*token feature"]:
        """Scatter into a dense tensor. For tests and tables; never on a hot path at 32B."""
        out = self.values.new_zeros(*self.values.shape[:-1], d_features)
        return out.scatter_add(-1, self.indices, self.values)

    @property
    def l0(self) -> float:
        """Mean number of active features per token, padding excluded."""
        active = (self.values > 0).sum(-1).double()
        return float((active if self.real is None else active[self.real.to(active.device)]).mean())


_POSITION = "an index such as 3 or -1, a slice such as 2:5, a mask such as {0,3,5}, `all`, `prompt` or `new`"


@dataclass(frozen=True)
class Positions:
    """Which tokens an intervention touches. Positions count the real tokens of a row, padding excluded.

    An index, a slice bound or a mark that is negative counts from the end of the *prompt*, also while generating. A
    slice with an open end includes the generated tokens; `prompt` ends before them, `new` is exactly those;
    `all` is every token. A mask names single tokens, `marks`, in ascending order.
    """

    kind: Literal["index", "slice", "mask", "all", "prompt", "new"]
    start: int | None = None
    stop: int | None = None
    marks: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Positions":
        """Read `all`, `prompt`, `new`, an index, `a:b` with either bound left out, or a mask `{a,b,c}`.

        Raises:
            AddressError: none of these.
        """
        text = text.strip()
        if any(len(number) > _DIGITS for number in re.findall(r"\d+", text)):
            raise AddressError(f"the position {shortened(repr(text))} is beyond any prompt", expected=_POSITION)
        if text in ("all", "prompt", "new"):
            return cls(text)  # type: ignore[arg-type]
        if re.fullmatch(r"-?\d+", text):
            return cls("index", int(text))
        match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
        if match:
            start, stop = (int(bound) if bound else None for bound in match.groups())
            return cls("slice", start, stop)
        if re.fullmatch(r"\{\s*-?\d+\s*(,\s*-?\d+\s*)*\}", text):
            return cls._mask([int(number) for number in text[1:-1].split(",")])
        raise AddressError(
            f"cannot read the position {shortened(repr(text))}",
            expected=_POSITION,
        )

    @classmethod
    def of(cls, value: "int | slice | str | Collection[Any] | Positions") -> "Positions":
        """Accept a number, a slice, text or a `Positions`. A mask is given as indices, or as one bool per position, in
        a list, a set, an array or a tensor. A float that is a whole number is read as that number.

        Raises:
            AddressError: it cannot be read, or a mask marks no token.
        """
        if isinstance(value, Positions):
            return value
        if isinstance(value, slice):
            if value.step not in (None, 1):
                raise AddressError(f"a position slice cannot have a step, found {value}")
            start, stop = (None if b is None else whole_number(b, "bound") for b in (value.start, value.stop))
            return cls("slice", start, stop)
        if isinstance(value, str):
            return cls.parse(value)
        items: Any = value
        shape = getattr(value, "shape", None)
        if shape or (shape is None and isinstance(value, Collection)):
            return cls._mask(items.tolist() if hasattr(items, "tolist") else list(items))
        if value is None:
            raise AddressError(
                "cannot read the position None",
                expected=_POSITION,
                repair="for every token write `all`, or slice(None)",
            )
        return cls("index", whole_number(value, "position"))

    @classmethod
    def _mask(cls, items: list[Any]) -> "Positions":
        bools = [item for item in items if isinstance(item, bool)]
        if len(bools) == len(items):
            items = [place for place, hit in enumerate(items) if hit]
        expected = "indices such as {0, 3, 5}, or one bool per position with at least one True"
        if not items:
            raise AddressError("the mask [] marks no token", expected=expected)
        try:
            return cls("mask", marks=tuple(sorted({whole_number(item, "position") for item in items})))
        except AddressError as error:
            raise AddressError("cannot read the position mask", expected=expected, found=error.problem) from None

    def bounds(self, prompt_length: int) -> tuple[int, int | None]:
        """First position, and the one after the last (None: no end), for a prompt of this length. The bounds of a mask
        include the positions between its marks; `spans` leaves those out."""

        def absolute(bound: int) -> int:
            return bound + prompt_length if bound < 0 else bound

        if self.kind == "all":
            return 0, None
        if self.kind == "prompt":
            return 0, prompt_length
        if self.kind == "new":
            return prompt_length, None
        if self.kind == "mask":
            marks = [absolute(mark) for mark in self.marks]
            return min(marks), max(marks) + 1
        if self.kind == "index":
            assert self.start is not None
            return absolute(self.start), absolute(self.start) + 1
        start = 0 if self.start is None else absolute(self.start)
        return start, None if self.stop is None else absolute(self.stop)

    def spans(self, prompt_length: int) -> list[tuple[int, int | None]]:
        """The positions as ranges (start, stop) without gaps, ascending. Only a mask can give more than one range."""
        if self.kind != "mask":
            return [self.bounds(prompt_length)]
        out: list[tuple[int, int | None]] = []
        for mark in sorted({mark + prompt_length if mark < 0 else mark for mark in self.marks}):
            first = out.pop()[0] if out and out[-1][1] == mark else mark
            out.append((first, mark + 1))
        return out

    def mask(self, first: int, count: int, prompt_length: int) -> Bool[Tensor, " pos"]:
        """Which of the positions `first .. first+count-1` are meant."""
        here = torch.arange(first, first + count)
        hit = torch.zeros(count, dtype=torch.bool)
        for start, stop in self.spans(prompt_length):
            inside = here >= start
            hit |= inside if stop is None else inside & (here < stop)
        return hit

    def check(self, prompt_length: int, new_tokens: int, where: str) -> None:
        """Refuse positions that can never occur in a run of this length.

        Raises:
            AddressError: the position is before the prompt or after its last token, or the slice is empty.
        """
        start, stop = self.bounds(prompt_length)
        end = prompt_length + new_tokens
        if self.kind == "new" and new_tokens == 0:
            raise AddressError(
                "`@new` means generated tokens, and this run generates none",
                where=where,
                repair="use generate (or `circuits steer`), or address prompt positions",
            )
        beyond = stop is not None and (stop <= start or stop > end)
        if start < 0 or (self.kind != "all" and start >= end) or beyond:
            span = f"0 to {end - 1} (or -{prompt_length} to -1)"
            raise AddressError(
                f"position {self} does not occur",
                expected=f"positions {span}: the prompt has {prompt_length} tokens"
                + (f", and {new_tokens} new ones follow" if new_tokens else ""),
                where=where,
            )

    def __str__(self) -> str:
        if self.kind == "index":
            return str(self.start)
        if self.kind == "slice":
            return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"
        if self.kind == "mask":
            return f"{{{','.join(map(str, self.marks))}}}"
        return self.kind


_ADDRESS = "L{layer}/{feature} or L{layer}/{feature}@{position}, for example L3/383 or L3/383@-1"


@dataclass(frozen=True)
class FeatureAddress:
    """`L{layer}/{feature}` with optional `@{position}`; no position means every token.

    Examples:
        >>> str(FeatureAddress.parse("L3/383@-1"))
        'L3/383@-1'
    """

    layer: int
    feature: int
    positions: Positions = field(default_factory=lambda: Positions("all"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole_number(self.layer, "layer"))
        object.__setattr__(self, "feature", whole_number(self.feature, "feature"))

    @classmethod
    def parse(cls, text: str) -> "FeatureAddress":
        """Read an address.

        Raises:
            AddressError: the text is not an address.
        """
        match = re.fullmatch(r"L(\d+)/(\d+)(?:@(.+))?", text.strip())
        if not match:
            raise AddressError(f"cannot read the feature address {shortened(repr(text))}", expected=_ADDRESS)
        if max(len(match[1]), len(match[2])) > _DIGITS:
            raise AddressError(f"the address {shortened(repr(text))} is beyond any model", expected=_ADDRESS)
        positions = Positions.parse(match[3]) if match[3] else Positions("all")
        return cls(int(match[1]), int(match[2]), positions)

    @classmethod
    def of(cls, value: "AddressLike") -> "FeatureAddress":
        """Accept text, an address, or `(layer, position, feature)` as circuit-tracer writes it: a tuple, a list, or a
        row of an array, table or tensor. Whole numbers may be floats.

        Raises:
            AddressError: it cannot be read.
        """
        if isinstance(value, FeatureAddress):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        row = as_row(value)
        if row is None or len(row) != 3:
            raise AddressError(
                f"cannot read the feature {shortened(repr(value))}",
                expected="(layer, position, feature), or text such as L3/383 or L3/383@-1",
            )
        layer, positions, feature = row
        return cls(whole_number(layer, "layer"), whole_number(feature, "feature"), Positions.of(positions))

    def __str__(self) -> str:
        tail = "" if self.positions.kind == "all" else f"@{self.positions}"
        return f"L{self.layer}/{self.feature}{tail}"


AddressLike = Any
"""What `FeatureAddress.of` reads: an address, text, or a row (layer, position, feature) of any library."""


@dataclass
class Pass:
    """The state of one forward pass while it runs. Every pass has a new one.

    Attributes:
        first: column of the first token of this pass (0, or the cache length while decoding).
        prompt_lengths: real tokens of the prompt, per row; generated tokens follow them.
        memo: values that an edit at a read site stores for the edit at the write site.
        pads: padding in front of each row; empty where there is none. Column c of a row is position c − pad.
    """

    first: int
    prompt_lengths: list[int]
    memo: dict[Any, Any] = field(default_factory=dict)
    pads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Edit:
    """A change to a forward pass: a function of the tensor at one site.

    `apply` never modifies its tensor. It returns a new tensor, or the same object if it changes nothing. So an edit
    that changes nothing leaves the pass the same, bit for bit.
    """

    site: Site
    apply: Callable[[Float[Tensor, "batch pos d_model"], Pass], Float[Tensor, "batch pos d_model"]]
