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
"""`fn(activation, hook)`: returns a new activation; or None, if it changed nothing or edited the activation in
place."""

LensHook = tuple[str | Callable[[str], bool], LensFunction]
"""A TransformerLens hook name, or a filter of names, and a function."""


@dataclass
class LensPoint:
    """The argument `hook` of a hook function: it has those attributes of a TransformerLens `HookPoint` that functions
    use.

    Attributes:
        name: the hook's name, as the user wrote it.
        first: column of the first token of this pass: 0, or how many tokens are cached while generating.
        lengths: real tokens of each row's prompt.
        pads: padding before each row; empty if there is none. Padding after rows is not counted.
        ctx: a dict in which functions at this site can store values during one call of `run` or `generate`.
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
        UserError: a name is not supported here, or a filter matches none.
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
        given = x.clone()  # a function may edit in place, and others may still use x
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
