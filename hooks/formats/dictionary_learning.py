"""dictionary_learning (saprmarks): `ae.pt`, a state dict, beside `config.json`; one folder, or folders within.

    config.json     trainer: dict_class, activation_dim, dict_size, k, layer, lm_name, submodule_name; buffer: io
    ae.pt           by dict_class, see `_CLASSES`

The name of a class says what it does with its decoder bias at the encoder, and how it selects; see the table. Outside
training, batch TopK keeps the features above one stored threshold. A gated autoencoder is a
JumpReLU: the gate x_enc + gate_bias > 0 is the same as pre > mag_bias − exp(r_mag) · gate_bias with
pre = exp(r_mag) · x_enc + mag_bias. Features are activations of the rows as stored: some versions of the library
report them times the norm of their row. Source: `dictionary.py` and `trainers/` in saprmarks/dictionary_learning.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import found, shown, whole
from hooks.formats import Checkpoint, Finish, LayerSource, Source, TensorSource
from hooks.formats._folds import fold_gate
from hooks.formats._stored import (
    Sites,
    check_shapes,
    check_size,
    float_shapes,
    matrix,
    one_convention,
    one_per_layer,
    read_json,
    spread_threshold,
    state_dict,
)
from hooks.sites import Site
from hooks.transcoder import Activation

_WEIGHTS, _CONFIG = "ae.pt", "config.json"
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")
_BUFFERS = ("k", "threshold", "group_sizes")


@dataclass(frozen=True)
class _Class:
    """The names of a class's tensors. `bias` is b_dec; `centred`: it is subtracted from the encoder's input."""

    activation: Activation
    bias: str = "b_dec"
    centred: bool = True
    linear: bool = True  # encoder.weight [F,D] and decoder.weight [D,F]; else W_enc [D,F] and W_dec [F,D]
    vectors: tuple[str, ...] = ()  # further [F]
    threshold: bool = False  # one for all features
    finish: Finish | None = None

    def keys(self) -> dict[str, str]:
        """Our names → those in the file."""
        names = ("encoder.weight", "encoder.bias", "decoder.weight") if self.linear else ("W_enc", "b_enc", "W_dec")
        keys = dict(zip(("W_enc", "b_enc", "W_dec"), names, strict=True)) | {"b_dec": self.bias}
        if "gate_bias" in self.vectors:
            del keys["b_enc"]
        further = (*self.vectors, *(("threshold",) if self.threshold else ()), *(("shift",) if self.centred else ()))
        return keys | {name: self.bias if name == "shift" else name for name in further}

    def shapes(self, f: int, d: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in the file."""
        sizes: dict[str, tuple[int, ...]] = {"b_dec": (d,), "shift": (d,), "threshold": () if self.threshold else (f,)}
        sizes |= {"W_enc": (f, d) if self.linear else (d, f), "W_dec": (d, f) if self.linear else (f, d)}
        return {key: sizes.get(name, (f,)) for name, key in self.keys().items()}


def _folded_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate and magnitude → JumpReLU."""
    return fold_gate({_GATE.get(name, name): weight for name, weight in weights.items()})


_GATE = {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}  # their names → those of `fold_gate`
_CLASSES = {
    "AutoEncoder": _Class("relu", bias="bias"),
    "AutoEncoderNew": _Class("relu", bias="decoder.bias", centred=False),
    "AutoEncoderTopK": _Class("topk"),
    "BatchTopKSAE": _Class("jumprelu", threshold=True, finish=spread_threshold),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", linear=False, threshold=True, finish=spread_threshold),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", centred=False, linear=False, vectors=("threshold",), finish=spread_threshold
    ),
    "GatedAutoEncoder": _Class("jumprelu", bias="decoder_bias", vectors=tuple(_GATE), finish=_folded_gate),
}
_MODULES = {"resid": ("resid_pre", "resid_post"), "mlp": ("mlp_in", "mlp_out"), "attn": (None, "attn_out")}
_SUBMODULE = re.compile(r"(resid|mlp|attn)((?<=resid)_post|(?<!resid)_out)?(?:_layer)?(?:_(\d{1,6}))?")


def matches(root: Path) -> bool:
    """Whether the folder, or a subfolder up to three levels deep, has an `ae.pt`."""
    return bool(_files(root))


def _files(root: Path) -> list[Path]:
    return found(root, [depth + _WEIGHTS for depth in _DEPTHS])


def locate(root: Path) -> Checkpoint:
    """Describe the dictionary of each layer.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts itself, its class is unknown, or there are several
            dictionaries for a layer.
    """
    folders = sorted({path.parent for path in _files(root)})
    described = {folder: _config(folder / _CONFIG) for folder in folders}
    numbers = {folder: _number(trainer, folder / _CONFIG) for folder, (trainer, _) in described.items()}
    one_per_layer(((number, folder) for folder, number in numbers.items()), root)
    named = {folder: _sites(numbers[folder], *configs) for folder, configs in described.items()}
    read, write = one_convention({numbers[folder]: pair for folder, (pair, _) in named.items()}, root)
    layers = [_layer(numbers[folder], folder, trainer) for folder, (trainer, _) in described.items()]
    notes = tuple(dict.fromkeys(note for _, note in named.values() if note))
    models = {str(trainer["lm_name"]) for trainer, _ in described.values() if trainer.get("lm_name")}
    sites_source: Source = "unknown" if read is None else "assumed" if notes else "stored"
    return Checkpoint(
        root,
        "dictionary_learning",
        tuple(sorted(layers, key=lambda source: source.layer)),
        read,
        write,
        norm="none",
        base_model=models.pop() if len(models) == 1 else None,
        notes=notes,
        sites_source=sites_source,
    )


def _config(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The parts of the configuration about the trainer and about the buffer of activations."""
    content = read_json(path)
    trainer, buffer = content.get("trainer"), content.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise CheckpointError(
            f"{path.name} does not describe a dictionary",
            expected="trainer: dict_class, layer, ...; buffer: io, ...",
            found=", ".join(content)[:300] or "an empty object",
            where=str(path),
            repair="take the config.json that the library wrote beside ae.pt",
        )
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise CheckpointError(
            f"{path.name} names the unknown class {shown(name)}",
            expected=f"one of {', '.join(_CLASSES)}",
            found=shown(name),
            where=str(path),
            repair="save the weights as one of these classes",
        )
    return trainer, buffer


def _number(trainer: Mapping[str, Any], path: Path) -> int:
    match = _SUBMODULE.fullmatch(str(trainer.get("submodule_name")))
    named = int(match[3]) if match and match[3] else None
    number = named if trainer.get("layer") is None else whole("layer", trainer["layer"], path, 0, 999_999)
    if number is None or (named is not None and named != number):
        raise CheckpointError(
            f"{path.name} does not say which layer the dictionary belongs to",
            expected="trainer: layer, and the same in submodule_name if a number is there",
            found=f"layer {trainer.get('layer')}, submodule_name {str(trainer.get('submodule_name'))[:80]}",
            where=str(path),
            repair="write the layer into config.json",
        )
    return number


def _sites(number: int, trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> tuple[Sites, str]:
    """The sites of the dictionary, and a note about what is assumed."""
    name, io = trainer.get("submodule_name"), buffer.get("io", "out")
    match = _SUBMODULE.fullmatch(name) if isinstance(name, str) else None
    module = "resid" if name is None else match[1] if match else None
    before, behind = _MODULES[module] if module else (None, None)
    ends = {"out": (behind, behind), "in": (before, before), "in_and_out": (before, behind)}
    read, write = ends.get(io if isinstance(io, str) else "", (None, None))
    if match and match[2] and io == "in":  # the name says the output, the buffer the input
        read = None
    if read is None or write is None:
        return (None, None), f"submodule_name {str(name)[:80]} with io {str(io)[:40]} is no site that is known here"
    sites = (Site(read, number), Site(write, number))
    return (
        sites,
        "" if name else "submodule_name is empty: a residual stream is assumed, as in the library's own scripts",
    )


def _layer(number: int, folder: Path, trainer: Mapping[str, Any]) -> LayerSource:
    file, path = folder / _WEIGHTS, folder / _CONFIG
    kind = _CLASSES[trainer["dict_class"]]
    keys = kind.keys()
    shapes = float_shapes(file, buffers=set(_BUFFERS) - set(keys.values()))
    sizes = matrix(shapes, keys["W_enc"], file)
    f, d = sizes if kind.linear else sizes[::-1]
    check_shapes(shapes, kind.shapes(f, d), file, ignored=_BUFFERS)
    check_size("activation_dim", trainer.get("activation_dim"), d, path)
    check_size("dict_size", trainer.get("dict_size"), f, path)
    if kind.threshold:
        _check_threshold(file)
    k = _k(file, trainer, path, f) if kind.activation == "topk" else None
    flipped = "W_dec" if kind.linear else "W_enc"
    return LayerSource(
        number,
        d,
        f,
        {name: TensorSource(file, (key,), transposed=name == flipped) for name, key in keys.items()},
        k,
        "stored",
        {key: value for key, value in trainer.items() if isinstance(value, str | int | float | bool)},
        activation=kind.activation,
        finish=kind.finish,
    )


def _check_threshold(file: Path) -> None:
    threshold = float(state_dict(file)["threshold"])
    if not 0 <= threshold < math.inf:
        raise CheckpointError(
            f"{file.name}: the threshold is {threshold}",
            expected="the smallest activation that counts, measured in training; −1 says that it never was",
            found=str(threshold),
            where=str(file),
            repair="take a later checkpoint of the run",
        )


def _k(file: Path, trainer: Mapping[str, Any], path: Path, f: int) -> int:
    k = whole("k", trainer.get("k"), path, most=f)
    stored = state_dict(file).get("k")
    if stored is not None and stored.numel() == 1 and stored.item() != k:  # also where it is NaN
        raise CheckpointError(
            f"{path.name} says k {k}",
            expected=f"{stored.item()}, from {file.name}",
            found=str(k),
            where=str(path),
            repair="bring configuration and weights of the same training run together",
        )
    return k
