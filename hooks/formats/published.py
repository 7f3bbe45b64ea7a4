"""The published Qwen2.5 sets: one `transcoder_L{i}.pt` per layer (KokosDev/qwen25-32b-clt and similar sets).

Each file is a dict with `state_dict` (or only the state dict), with or without the key prefix `_orig_mod.` of
torch.compile. `enc.0` is `nn.LayerNorm(d_model)`, eps 1e-5 (as in the training script; the card's code adds
`enc.0.bias` instead). `dec` may have decoders for several target layers, one below the other: one of them is opened,
by default the first. Neither the sites nor k nor the use of TopK are stored. `final_l0_pct` is evidence about TopK,
for the whole set, since one run trains all its layers. TopK with k = max(1, int(0.12 F)) (the training script's
default), followed by ReLU, keeps 12 % or less. If a layer has more, the set was trained with plain ReLU (the script's
other mode). If no file states it, TopK is assumed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import FLOATS, bare, open_pt, shown
from hooks.formats import Checkpoint, LayerSource, Source, TensorSource
from hooks.transcoder import Activation

_FILE = re.compile(r"transcoder_L(\d{1,6})\.pt")
_TOPK_FRACTION = 0.12
_L0_TOLERANCE_PCT = 0.5
_L0 = "final_l0_pct"
_REPAIR = "download it again, or ask whoever made it for another file"
_KEYS = {  # our name -> (key in the state dict, stored [d_model feature])
    "norm_weight": ("enc.0.weight", False),
    "norm_bias": ("enc.0.bias", False),
    "W_enc": ("enc.1.weight", False),
    "b_enc": ("enc.1.bias", False),
    "W_dec": ("dec.weight", True),
    "b_dec": ("dec.bias", False),
}


def matches(root: Path) -> bool:
    """Whether the folder has at least one `transcoder_L{i}.pt`."""
    return any(_FILE.fullmatch(path.name) for path in root.iterdir())


def locate(root: Path) -> Checkpoint:
    """Describe every layer file.

    Raises:
        CheckpointError: a file is damaged, contains code, lacks a tensor, or has shapes that contradict each other.
    """
    files = sorted((int(m[1]), path) for path in root.iterdir() if (m := _FILE.fullmatch(path.name)))
    for (number, path), (other, twin) in pairwise(files):
        if number == other:
            raise CheckpointError(
                f"two files for layer {number}",
                expected="one file for each layer",
                found=f"{path.name}, {twin.name}",
                where=str(root),
                repair="keep one",
            )
    described = [_layer(number, path) for number, path in files]
    layers, decoders = _selected([source for source, _ in described]), {count for _, count in described}
    if len(decoders) > 1:
        raise CheckpointError(
            "the layers have different numbers of decoders",
            expected="as many target layers for each",
            found="; ".join(f"layer {source.layer}: {count}" for source, count in described)[:400],
            where=str(root),
            repair="open layers of one kind alone",
        )
    return Checkpoint(
        root,
        "published",
        layers,
        read=None,
        write=None,
        selection_notes=tuple(_notes(layers)),
        sites_source="unknown",
        encoder_source="assumed",
        decoders=decoders.pop(),
    )


def _layer(number: int, path: Path) -> tuple[LayerSource, int]:
    """One file, and how many decoders it holds."""
    content = open_pt(path)
    state, prefix = _state_dict(content, path)
    sources = {name: _source(state, prefix, key, flip, path) for name, (key, flip) in _KEYS.items()}
    shapes = {name: tuple(_tensor(state, source).shape) for name, source in sources.items()}
    d_features, d_model, decoders = _check_shapes(shapes, path)
    wrapper = content if isinstance(content, Mapping) and "state_dict" in content else {}
    _check_wrapper(wrapper, {"layer": number, "hidden_dim": d_model, "feature_dim": d_features}, path)
    metadata = wrapper.get("training_metadata")
    metadata = {} if metadata is None else metadata
    _check_stated(metadata, path)
    nested = ("state_dict",) if wrapper else ()
    tensors = {name: TensorSource(path, (*nested, *source.key), source.transposed) for name, source in sources.items()}
    k = max(1, int(d_features * _TOPK_FRACTION))
    return LayerSource(number, d_model, d_features, tensors, k, "assumed", dict(metadata)), decoders


def _state_dict(content: Any, path: Path) -> tuple[Mapping[str, Tensor], str]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if isinstance(state, Mapping):
        for prefix in ("_orig_mod.", ""):
            if f"{prefix}enc.1.weight" in state:
                return state, prefix
    keys = _names(state) if isinstance(state, Mapping) else f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path.name} is not a transcoder",
        expected="a state dict with enc.0, enc.1 and dec, bare or under 'state_dict'",
        found=keys or "an empty dict",
        where=str(path),
        repair=_REPAIR,
    )


def _names(state: Mapping[Any, object]) -> str:
    return ", ".join(bare(key) for key in list(state)[:12])


def _source(state: Mapping[str, Tensor], prefix: str, key: str, flip: bool, path: Path) -> TensorSource:
    found = state.get(prefix + key)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"{path.name} lacks the tensor {prefix + key}",
            expected=", ".join(prefix + name for name, _ in _KEYS.values()),
            found=_names(state),
            where=str(path),
            repair=_REPAIR,
        )
    if found.dtype not in FLOATS:
        raise CheckpointError(
            f"{path.name}: {prefix + key} holds no floating-point numbers",
            expected="float32, bfloat16, float16 or float64",
            found=str(found.dtype).removeprefix("torch."),
            where=str(path),
            repair=_REPAIR,
        )
    return TensorSource(path, (prefix + key,), flip)


def _tensor(state: Mapping[str, Tensor], source: TensorSource) -> Tensor:
    return state[source.key[-1]]


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> tuple[int, int, int]:
    if len(shapes["W_enc"]) != 2 or 0 in shapes["W_enc"]:
        raise CheckpointError(
            f"{path.name}: enc.1.weight must be a matrix",
            expected="(features, width of the model)",
            found=str(shapes["W_enc"]),
            where=str(path),
            repair=_REPAIR,
        )
    d_features, d_model = shapes["W_enc"]
    rows = shapes["W_dec"][0] if shapes["W_dec"] else 0
    decoders = rows // d_model if rows and rows % d_model == 0 else 1
    expected = {
        "norm_weight": (d_model,),
        "norm_bias": (d_model,),
        "b_enc": (d_features,),
        "W_dec": (decoders * d_model, d_features),
        "b_dec": (decoders * d_model,),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{path.name}: {_KEYS[name][0]} has the wrong shape",
                expected=f"{shape}, from enc.1.weight {shapes['W_enc']}",
                found=f"{shapes[name]}",
                where=str(path),
                repair=_REPAIR,
            )
    return d_features, d_model, decoders


def _check_wrapper(wrapper: Mapping[str, Any], facts: Mapping[str, int], path: Path) -> None:
    for key, fact in facts.items():
        stated = wrapper.get(key, fact)
        if type(stated) is not int or stated != fact:
            said = shown(stated)
            raise CheckpointError(
                f"{path.name} says {key} {said}" if key != "layer" else f"{path.name} says it is layer {said}",
                expected=f"{fact}, from its tensors" if key != "layer" else f"layer {fact}, from the file's name",
                found=said,
                where=str(path),
                repair=_REPAIR if key != "layer" else "rename the file to the layer it was trained on",
            )


def _check_stated(metadata: Any, path: Path) -> None:
    usable = isinstance(metadata, Mapping)
    l0_pct = metadata.get(_L0) if usable else metadata
    if usable and l0_pct is None:
        return
    if not usable or isinstance(l0_pct, bool) or not isinstance(l0_pct, int | float) or not 0 <= l0_pct <= 100:
        raise CheckpointError(
            f"{path.name}: the training metadata cannot be used",
            expected=f"{_L0}, a percentage",
            found=shown(l0_pct),
            where=str(path),
            repair=_REPAIR,
        )


def _selected(layers: list[LayerSource]) -> tuple[LayerSource, ...]:
    """The layers with the selection rule that follows from the densities of all of them; see the module's docstring."""
    stated = [source for source in layers if source.metadata.get(_L0) is not None]
    by_relu = any(_excess(source) > _L0_TOLERANCE_PCT for source in stated)
    activation: Activation = "relu" if by_relu else "topk"

    def ruled(source: LayerSource) -> LayerSource:
        origin: Source = "metadata" if source in stated else "assumed"
        return replace(source, activation=activation, k=None if by_relu else source.k, k_source=origin)

    return tuple(ruled(source) for source in layers)


def _excess(source: LayerSource) -> float:
    """Percentage points by which a layer's stated density is above TopK's; below 0 if ReLU removed some features."""
    k = max(1, int(source.d_features * _TOPK_FRACTION))
    nominal = max(100 * k / source.d_features, 100 * _TOPK_FRACTION)  # in a small dictionary int() gives less than 12 %
    l0_pct: Any = source.metadata[_L0]
    return float(l0_pct) - nominal


def _notes(layers: tuple[LayerSource, ...]) -> Iterator[str]:
    stated = [source for source in layers if source.metadata.get(_L0) is not None]
    if not stated:
        yield "the files do not say how features are selected: TopK at 12 % (the card) is assumed"
        return
    if silent := [source.layer for source in layers if source not in stated]:
        yield f"no {_L0} at layers {', '.join(map(str, silent))[:200]}: taken to be selected as in the others"
    most, least = max(stated, key=_excess), min(stated, key=_excess)
    if layers[0].activation == "relu":
        yield (
            f"{_L0} is {most.metadata[_L0]:.4g} at layer {most.layer}, more than TopK at 12 % leaves, so plain ReLU is "
            "assumed for the whole set; --k N says otherwise"
        )
    elif _excess(least) < -_L0_TOLERANCE_PCT:
        yield (
            f"{_L0} is {least.metadata[_L0]:.4g} at layer {least.layer} and nowhere above 12, so TopK at 12 % is taken "
            "for the whole set (ReLU behind it can only lower the share); --k N says otherwise"
        )
