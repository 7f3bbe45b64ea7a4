"""The sites of a decoder block that can be read or written, under TransformerLens names.

This is the only file that knows hook names and HF module paths (docs/architecture.md, "Sites"):

| site | TransformerLens name | HF module |
|---|---|---|
| resid_pre L | `blocks.L.hook_resid_pre`, `.hook_in` | input of `model.layers[L]` |
| resid_mid L | `blocks.L.hook_resid_mid` | input of `layers[L].post_attention_layernorm` |
| mlp_in L | `blocks.L.mlp.hook_in` | input of `layers[L].mlp` |
| mlp_out L | `blocks.L.hook_mlp_out`, `.mlp.hook_out` | output of `layers[L].mlp` |
| attn_out L | `blocks.L.hook_attn_out`, `.attn.hook_out` | output of `layers[L].self_attn`, or of `.linear_attn` |
| resid_post L | `blocks.L.hook_resid_post`, `.hook_out` | output of `layers[L]` |

`blocks.L.ln2.hook_in` is not resid_mid: a TransformerBridge hook there edits only the copy that the MLP's norm reads.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hooks.errors import CheckpointError, ModelError, UserError

End = Literal["input", "output"]


@dataclass(frozen=True)
class _Place:
    lens: str  # TransformerLens name, with {layer}
    path: str  # module inside the HF decoder layer; "" is the layer itself
    end: End
    depth: int  # order inside one block
    whole_stream: bool  # the site is the residual stream itself, so replacing it cuts every path
    alias: str = ""  # the other TransformerLens name, if there is one
    other_path: str = ""  # the module in blocks of another kind, if there are such


_PLACES = {
    "resid_pre": _Place("blocks.{layer}.hook_resid_pre", "", "input", 0, True, "blocks.{layer}.hook_in"),
    "attn_out": _Place(
        "blocks.{layer}.hook_attn_out",
        "self_attn",
        "output",
        1,
        False,
        "blocks.{layer}.attn.hook_out",
        "linear_attn",  # where attention is linear: most blocks of a hybrid such as Qwen3.5
    ),
    "resid_mid": _Place("blocks.{layer}.hook_resid_mid", "post_attention_layernorm", "input", 2, True),
    "mlp_in": _Place("blocks.{layer}.mlp.hook_in", "mlp", "input", 3, False),
    "mlp_out": _Place("blocks.{layer}.hook_mlp_out", "mlp", "output", 4, False, "blocks.{layer}.mlp.hook_out"),
    "resid_post": _Place("blocks.{layer}.hook_resid_post", "", "output", 5, True, "blocks.{layer}.hook_out"),
}
SITE_NAMES = tuple(_PLACES)


@dataclass(frozen=True)
class SiteSpec:
    """A kind of site relative to a transcoder's own layer: `resid_pre`, `mlp_out`, `mlp_out+1`, ..."""

    name: str
    offset: int = 0

    @classmethod
    def parse(cls, text: str) -> "SiteSpec":
        """Read `NAME` or `NAME+N`.

        Raises:
            UserError: the name is not a site; the message lists the known ones.
        """
        match = re.fullmatch(r"(\w+?)(?:\+(\d{1,6}))?", text.strip())
        if not match or match[1] not in _PLACES:
            raise UserError(
                f"unknown site {text[:80]!r}",
                expected=f"one of {', '.join(SITE_NAMES)}, optionally followed by +N for N layers later",
                where="--read / --write or the manifest",
            )
        return cls(match[1], int(match[2] or 0))

    def at(self, layer: int) -> "Site":
        """The concrete site for a transcoder of `layer`."""
        return Site(self.name, layer + self.offset)

    def __str__(self) -> str:
        return self.name + (f"+{self.offset}" if self.offset else "")


@dataclass(frozen=True)
class Site:
    """One site in one block of a model.

    Examples:
        >>> Site("resid_pre", 3).lens_name
        'blocks.3.hook_resid_pre'
    """

    name: str
    layer: int

    @property
    def lens_name(self) -> str:
        """The TransformerLens hook name."""
        return _PLACES[self.name].lens.format(layer=self.layer)

    @property
    def whole_stream(self) -> bool:
        """Whether this is the residual stream itself (replacing it cuts every path through this depth)."""
        return _PLACES[self.name].whole_stream

    @property
    def depth(self) -> tuple[int, int]:
        """Sorts sites by the order of computation; `resid_post L` equals `resid_pre L+1`."""
        if self.name == "resid_post":
            return (self.layer + 1, 0)
        return (self.layer, _PLACES[self.name].depth)

    def __str__(self) -> str:
        return f"{self.name} {self.layer}"


EMBEDDING = Site("resid_pre", 0)


def lens_sites(n_layers: int) -> dict[str, Site]:
    """Every TransformerLens hook name that is a site of a model with so many layers, aliases included."""
    return {
        lens.format(layer=layer): Site(name, layer)
        for layer in range(n_layers)
        for name, place in _PLACES.items()
        for lens in (place.lens, place.alias)
        if lens
    }


_NORMED_MID = "ln2.hook_normalized"  # resid_mid after the second norm, before that norm's weight


def from_lens(name: str) -> tuple[Site | SiteSpec, bool]:
    """A site from a TransformerLens hook name, and whether the name means the site divided by its norm.

    `blocks.5.hook_mlp_out` is a `Site`, `hook_mlp_out` (relative to a layer, as some configurations have it) a
    `SiteSpec`. `ln2.hook_normalized` is resid_mid after RMSNorm without its weight: (resid_mid, True).

    Raises:
        UserError: it is the name of no site; the message lists the known ones.
    """
    match = re.fullmatch(r"(?:blocks\.(\d{1,6})\.)?(.+)", name.strip())
    known = {
        lens.removeprefix("blocks.{layer}."): site
        for site, place in _PLACES.items()
        for lens in (place.lens, place.alias)
        if lens
    }
    known[_NORMED_MID] = "resid_mid"
    if not match or match[2] not in known:
        raise UserError(
            f"no site is called {name[:80]!r}",
            expected=f"{', '.join(known)}, alone or after `blocks.LAYER.`",
            where="hook name",
        )
    site = known[match[2]]
    return SiteSpec(site) if match[1] is None else Site(site, int(match[1])), match[2] == _NORMED_MID


def to_lens(site: SiteSpec, *, normed: bool = False) -> str:
    """The TransformerLens name of a site inside its block, without `blocks.LAYER.`; `from_lens` reads it back.

    `normed`: resid_mid after RMSNorm without its weight. An offset to another layer has no such name.
    """
    assert not site.offset, f"{site} is in another block"
    assert not normed or site.name == "resid_mid", f"the norm of {site} has no name"
    return _NORMED_MID if normed else _PLACES[site.name].lens.removeprefix("blocks.{layer}.")


def from_module(path: str, end: End) -> Site:
    """A site from a module of a transformers model (`model.layers.5.mlp`, `layers.5`) and one of its ends.

    Raises:
        UserError: no site is there; the message lists the known ones.
    """
    match = re.fullmatch(r"(?:model\.)?layers\.(\d{1,6})(?:\.(.+))?", path.strip())
    known = {
        (path, place.end): site
        for site, place in _PLACES.items()
        for path in dict.fromkeys((place.path, place.other_path or place.path))
    }
    if not match or (match[2] or "", end) not in known:
        names = ", ".join(f"layers.N{'.' if path else ''}{path} ({end})" for path, end in known)
        raise UserError(f"no site is at the {end} of {path[:80]!r}", expected=names, where="module name")
    return Site(known[match[2] or "", end], int(match[1]))


def branches_off(site: Site) -> bool:
    """Whether the site's module gets only a copy of the stream, so that editing its input does not edit the stream.

    This is so at resid_mid: the block keeps the stream in a local variable and gives a copy to the norm before the MLP.
    """
    return site.name == "resid_mid"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a HF causal language model (`model.model.layers`).

    Raises:
        UserError: the model is built differently.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"{type(model).__name__} has no model.layers",
            expected="a Qwen2, Qwen3 or Llama style causal language model of transformers",
        )
    return layers


def module_at(model: nn.Module, site: Site) -> tuple[nn.Module, End]:
    """The module whose input or output is `site`, and which of the two.

    Raises:
        CheckpointError: the model has no such layer.
        ModelError: its layers are built differently.
    """
    layers = decoder_layers(model)
    if not 0 <= site.layer < len(layers):
        raise CheckpointError(
            f"site {site} does not exist in this model",
            expected=f"a layer from 0 to {len(layers) - 1}",
            found=f"layer {site.layer}",
            repair="check --read/--write and that the transcoders belong to this model",
        )
    place = _PLACES[site.name]
    module: Any = layers[site.layer]
    if not place.path:
        return module, place.end
    parts = [getattr(module, path, None) for path in (place.path, place.other_path) if path]
    found = [part for part in parts if isinstance(part, nn.Module)]
    if not found:
        raise ModelError(
            f"a {type(module).__name__} has no {place.path}, where {site.name} is",
            expected="a pre-norm decoder as in Qwen2, Qwen3 or Llama",
            found=", ".join(name for name, _ in module.named_children()),
        )
    return found[0], place.end
