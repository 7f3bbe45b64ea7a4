"""Gemma Scope and Gemma Scope 2: JumpReLU autoencoders and transcoders, one folder per layer, width and sparsity.

    layer_12/width_16k/average_l0_82/params.npz             W_enc[D,F] W_dec[F,D] b_enc b_dec threshold[F]
    layer_12_width_16k_l0_medium/params.safetensors         the same in lower case, affine_skip_connection[D,D] at will
    layer_12_width_16k_l0_medium/config.json                hf_hook_point_in, hf_hook_point_out, model_name (2 only)

pre = x @ W_enc + b_enc, nothing is subtracted; features are active above their threshold; the skip connection is
x @ affine_skip_connection, untransposed. The files of the first set do not state its sites (only its repository's name
does: res, mlp, att, transcoders), so the sites stay unknown. Sources: the layouts on the hub, the
tutorial's `JumpReLUSAE`, SAELens's `gemma_2` and `gemma_3` loaders.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks.errors import CheckpointError, UserError
from hooks.files import found, is_file
from hooks.formats import Checkpoint, LayerSource, TensorSource
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
)
from hooks.sites import Site, from_module

_FILES, _CONFIG, _SKIP = ("params.npz", "params.safetensors"), "config.json", "affine_skip_connection"
_LAYER = re.compile(r"layer_(\d{1,6})(_.*)?")
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # the folder of one set, a layer, all layers, all sites


def matches(root: Path) -> bool:
    """Whether the folder, or a subfolder up to three levels deep, has a `params.npz` or `params.safetensors`."""
    return bool(_files(root))


def _files(root: Path) -> list[Path]:
    return found(root, [depth + name for depth in _DEPTHS for name in _FILES])


def locate(root: Path) -> Checkpoint:
    """Describe the one set of each layer.

    Raises:
        CheckpointError: a file is damaged or contradicts itself, no folder says the layer, or there are several widths
            or sparsities for a layer.
    """
    files = _files(root)
    layered = [path for path in files if _is_layered(path)]
    others = [path for path in files if not _is_layered(path)]
    if not layered:
        raise CheckpointError(
            f"no folder says which layer {files[0].name} belongs to",
            expected="a folder layer_N, as in layer_12/width_16k/average_l0_82",
            found=str(files[0].relative_to(root)),
            where=str(files[0].parent),
            repair="keep the folders of the repository around the file",
        )
    numbers = {path: _number(path) for path in layered}
    one_per_layer(((numbers[path], path.parent) for path in layered), root)
    configs = {path: _config(path) for path in layered}
    pairs = {path: _sites(config) for path, config in configs.items()}
    read, write = one_convention({numbers[path]: pair for path, pair in pairs.items()}, root)
    layers = [_layer(numbers[path], path, configs[path], pairs[path]) for path in layered]
    models = {str(config["model_name"]) for config in configs.values() if config.get("model_name")}
    return Checkpoint(
        root,
        "gemma_scope",
        tuple(sorted(layers, key=lambda source: source.layer)),
        read,
        write,
        norm="none",
        base_model=models.pop() if len(models) == 1 else None,
        notes=_notes(root, others, configs, bool(read and write)),
        sites_source="stored" if read and write else "unknown",
        encoder_source="assumed",
    )


def _notes(root: Path, others: list[Path], configs: Mapping[Path, Mapping[str, Any]], known: bool) -> tuple[str, ...]:
    out = [f"{path.parent.relative_to(root)} belongs to no layer and is left out" for path in others]
    points = {f"{c.get('hf_hook_point_in')} -> {c.get('hf_hook_point_out')}" for c in configs.values() if c}
    if points and not known:
        out.append(f"{sorted(points)[0]} is no pair of sites that is known here; --read and --write name others")
    return tuple(out)


def _folder_layers(path: Path) -> list[int]:
    """The numbers in the names of the folders around a file, outermost first."""
    return [int(match[1]) for part in path.absolute().parts[:-1] if (match := _LAYER.fullmatch(part))]


def _is_layered(path: Path) -> bool:
    return bool(_folder_layers(path))


def _number(path: Path) -> int:
    return _folder_layers(path)[-1]


def _config(path: Path) -> Mapping[str, Any]:
    config = path.with_name(_CONFIG)
    return read_json(config) if path.suffix == ".safetensors" and is_file(config) else {}


def _sites(config: Mapping[str, Any]) -> Sites:
    """The sites that a config names; None for points that a Qwen or Llama block does not have (after Gemma's MLP
    norm)."""
    read = _site(config.get("hf_hook_point_in"))
    write = _site(config.get("hf_hook_point_out") or config.get("hf_hook_point_in"))
    return (read, write) if read and write else (None, None)


def _site(point: object) -> Site | None:
    match = re.fullmatch(r"(.+)\.(input|output)", point) if isinstance(point, str) else None
    if not match:
        return None
    try:
        return from_module(match[1], "input" if match[2] == "input" else "output")
    except UserError:
        return None


def _layer(number: int, path: Path, config: Mapping[str, Any], sites: Sites) -> LayerSource:
    shapes = float_shapes(path)
    lower = "w_enc" in shapes
    encoder, decoder = ("w_enc", "w_dec") if lower else ("W_enc", "W_dec")
    d, f = matrix(shapes, encoder, path)
    expected = {encoder: (d, f), decoder: (f, d), "b_enc": (f,), "b_dec": (d,), "threshold": (f,)}
    if _SKIP in shapes:
        expected[_SKIP] = (d, d)
    check_shapes(shapes, expected, path)
    if config:
        check_size("width", config.get("width"), f, path.with_name(_CONFIG))
        if sites[0]:
            check_size("the layer", sites[0].layer, number, path.with_name(_CONFIG))
    named = {"W_enc": encoder, "W_dec": decoder, "W_skip": _SKIP, "b_enc": "b_enc", "b_dec": "b_dec"}
    tensors = {
        name: TensorSource(path, (key,), transposed=name in ("W_enc", "W_skip"))
        for name, key in (named | {"threshold": "threshold"}).items()
        if key in shapes
    }
    metadata = {key: config[key] for key in ("l0", "type") if key in config}
    return LayerSource(number, d, f, tensors, None, "stored", metadata, activation="jumprelu", finish=spread_threshold)
