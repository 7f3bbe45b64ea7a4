"""TransformerLens hook functions as our edits.

(name, function) pairs → lens_edits → edits → model.run, model.run_many, model.generate
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import UserError
from hooks.sites import Site, lens_sites
from hooks.types import Edit, Pass

LensFunction = Callable[..., Tensor | None]
"""`fn(activation, hook)`: a new activation, or None where it left it alone or edited it in place."""

LensHook = tuple[str | Callable[[str], bool], LensFunction]
"""A TransformerLens hook name, or a filter of names, and a function."""


@dataclass
class LensPoint:
    """What a hook function gets as `hook`; a TransformerLens `HookPoint`, as far as functions look at it.

    Attributes:
        name: as it was asked for.
        first: column of the first token of this pass: 0, or how many tokens are cached while generating.
        lengths: real tokens of each row's prompt.
        pads: padding in front of each row; empty where there is none. Padding behind rows is not counted.
        ctx: whatever functions at this site want to keep, for the length of one call of `run` or `generate`.
    """

    name: str
    ctx: dict[Any, Any]
    first: int = 0
    lengths: list[int] = field(default_factory=list)
    pads: tuple[int, ...] = ()

    def layer(self) -> int:
        """The block's number."""
        return int(self.name.split(".")[1])


def lens_edits(hooks: Sequence[LensHook], n_layers: int) -> list[Edit]:
    """TransformerLens hook functions as edits, in the order given.

    Raises:
        UserError: a name is not served, or a filter matches none.
    """
    sites = lens_sites(n_layers)
    contexts: dict[Site, dict[Any, Any]] = {}
    edits = []
    for wanted, function in hooks:
        for name in _served(wanted, sites):
            point = LensPoint(name, contexts.setdefault(sites[name], {}))
            edits.append(_lens_edit(sites[name], point, function))
    return edits


def _served(wanted: str | Callable[[str], bool], sites: dict[str, Site]) -> list[str]:
    if isinstance(wanted, str):
        names = [wanted] if wanted in sites else []
    else:
        names = [name for name, site in sites.items() if name == site.lens_name and wanted(name)]
    if not names:
        known = dict.fromkeys(name.replace("blocks.0.", "") for name in sites)
        layers = max(site.layer for site in sites.values())
        raise UserError(
            f"no hook {wanted!r} here",
            expected=f"blocks.L. and one of {', '.join(known)}, L from 0 to {layers}",
            where="lens_hooks",
            repair="model.bridge has every TransformerLens hook",
        )
    return names


def _lens_edit(site: Site, point: LensPoint, function: LensFunction) -> Edit:
    def apply(x: Tensor, at: Pass) -> Tensor:
        point.first, point.lengths, point.pads = at.first, list(at.prompt_lengths), at.pads
        given = x.clone()  # functions that edit in place must not reach what others still hold
        out = function(given, hook=point)
        out = given if out is None else out
        _check_returned(out, x, point.name)
        out = out.to(x)
        return x if torch.equal(out, x) else out

    return Edit(site, apply)


def _check_returned(out: object, x: Float[Tensor, "batch pos d_model"], name: str) -> None:
    if not isinstance(out, Tensor) or out.shape != x.shape:
        found = f"shape {' × '.join(map(str, out.shape))}" if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"the function at {name} returned something else than an activation",
            expected=f"a tensor of shape {' × '.join(map(str, x.shape))}, or None",
            found=found,
        )
