"""Llama Scope and other sets saved by OpenMOSS's Language-Model-SAEs of 2024: one folder per layer, or a single one.

    L15R-8x/hyperparams.json                hook_point_in, hook_point_out, act_fn, jump_relu_threshold, …
    L15R-8x/checkpoints/final.safetensors   encoder.weight[F,D] encoder.bias decoder.weight[D,F] decoder.bias

Trained on n x with n = √D / (average norm of x), so the features of x itself are W x + b / n, and the decoder's bias is
divided by n too. A feature is active where its activation times the norm of its decoder row is above one threshold,
in the units after that scaling; here the rows are scaled to norm 1, so the product is the activation. Sources:
docs/formats/llama-scope.md.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hooks.errors import CheckpointError, UserError
from hooks.files import flag, found, real, shown, whole
from hooks.formats import Checkpoint, LayerSource, TensorSource
from hooks.formats._folds import add_norm, fold_decoder_norm
from hooks.formats._stored import (
    check_shapes,
    check_size,
    float_shapes,
    matrix,
    one_convention,
    one_per_layer,
    read_json,
)
from hooks.kernels import working_dtype
from hooks.sites import Site, from_lens
from hooks.transcoder import Activation

_WEIGHTS, _CONFIG = "checkpoints/final.safetensors", "hyperparams.json"
_KEYS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_NORM, _AVERAGE = "norm_activation", "dataset_average_activation_norm"
_RMS_EPS = 1e-6


def matches(root: Path) -> bool:
    """Whether the folder, or a direct subfolder, has a `hyperparams.json` and a `checkpoints/final.safetensors`."""
    return bool(_folders(root))


def _folders(root: Path) -> list[Path]:
    return sorted({path.parent.parent for path in found(root, (_WEIGHTS, f"*/{_WEIGHTS}"))})


def locate(root: Path) -> Checkpoint:
    """Describe every layer's folder.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts itself, a setting is not supported by this project,
            or there are several dictionaries for a layer.
    """
    configs = {folder: read_json(folder / _CONFIG) for folder in _folders(root)}
    hooks = {folder: _sites(config, folder / _CONFIG) for folder, config in configs.items()}
    one_per_layer(((read.layer, folder) for folder, (read, _, _) in hooks.items()), root)
    read, write = one_convention({read.layer: (read, write) for read, write, _ in hooks.values()}, root)
    normed = any(is_normed for _, _, is_normed in hooks.values())
    if normed and not all(is_normed for _, _, is_normed in hooks.values()):
        _refuse(root / _CONFIG, "hook_point_in", "one kind of hook for the whole set", "normed and plain ones")
    layers = [_layer(folder, config, hooks[folder]) for folder, config in configs.items()]
    unscaled = any(_AVERAGE not in config for config in configs.values())
    return Checkpoint(
        root,
        "llama_scope",
        tuple(sorted(layers, key=lambda source: source.layer)),
        read,
        write,
        norm_eps=_RMS_EPS,
        norm="rms" if normed else "none",
        encoder_source="assumed" if normed or unscaled else "stored",
        notes=(f"{_CONFIG} has no {_AVERAGE}: the inputs are assumed not to have been scaled",) if unscaled else (),
    )


def _refuse(path: Path, key: str, expected: str, stated: object) -> NoReturn:
    raise CheckpointError(
        f"{path.name}: {key} cannot be used",
        expected=expected,
        found=shown(stated, 160),
        where=str(path),
        repair="correct the entry if it is wrong; otherwise this set cannot be opened",
    ) from None


def _sites(config: Mapping[str, Any], path: Path) -> tuple[Site, Site, bool]:
    """The read and the write site, and whether the read site is divided by its norm."""
    inward = config.get("hook_point_in")
    outward = config.get("hook_point_out", inward)
    (read, normed), (write, beyond) = (_site(key, name, path) for key, name in (("in", inward), ("out", outward)))
    if beyond:
        _refuse(path, "hook_point_out", "a site itself, where something is written", outward)
    if write.layer < read.layer:
        _refuse(path, "hook_point_out", f"layer {read.layer} or later", outward)
    return read, write, normed


def _site(end: str, name: object, path: Path) -> tuple[Site, bool]:
    try:
        site, normed = from_lens(name if isinstance(name, str) else "")
    except UserError as error:
        _refuse(path, f"hook_point_{end}", error.expected, name)
    if not isinstance(site, Site):
        _refuse(path, f"hook_point_{end}", "a hook with its layer, after `blocks.LAYER.`", name)
    return site, normed


def _scale(config: Mapping[str, Any], d: int, path: Path) -> float:
    """The number by which inputs and outputs were multiplied in training."""
    norm, averages = config.get(_NORM, "dataset-wise"), config.get(_AVERAGE)
    if norm == "inference" or (averages is None and _NORM not in config):
        return 1.0
    if norm != "dataset-wise":
        _refuse(path, _NORM, "dataset-wise or inference: another scales every token by itself", norm)
    if not isinstance(averages, dict):
        _refuse(path, _AVERAGE, "the average norms `in` and `out`, for dataset-wise", averages)
    inward, outward = (real(f"{_AVERAGE}.{end}", averages.get(end), path, 1e-30) for end in ("in", "out"))
    if inward != outward:
        raise CheckpointError(
            f"{path.name}: the files do not say in which unit the threshold of such a transcoder is",
            expected=f"one {_AVERAGE} for what is read and what is written, as an autoencoder has it",
            found=f"in {inward:g}, out {outward:g}",
            where=str(path),
            repair="save it with one of the libraries that open it, with these norms folded into its weights",
        )
    return math.sqrt(d) / inward


def _layer(folder: Path, config: Mapping[str, Any], hooks: tuple[Site, Site, bool]) -> LayerSource:
    file, path, (read, _, normed) = folder / _WEIGHTS, folder / _CONFIG, hooks
    shapes = float_shapes(file)
    f, d = matrix(shapes, _KEYS["W_enc"], file)
    for key, true in (("d_model", d), ("d_sae", f)):
        check_size(key, config.get(key), true, path)
    if flag(config, "use_glu_encoder", path) or not flag(config, "use_decoder_bias", path, True):
        _refuse(path, "use_glu_encoder and use_decoder_bias", "one encoder, and a bias of the decoder", "others")
    check_shapes(
        shapes, {_KEYS["W_enc"]: (f, d), _KEYS["b_enc"]: (f,), _KEYS["W_dec"]: (d, f), _KEYS["b_dec"]: (d,)}, file
    )
    name = config.get("act_fn")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        _refuse(path, "act_fn", ", ".join(_ACTIVATIONS), name)
    threshold = real("jump_relu_threshold", config.get("jump_relu_threshold"), path) if name == "jumprelu" else None
    tensors = {part: TensorSource(file, (key,), transposed=part == "W_dec") for part, key in _KEYS.items()}
    if flag(config, "apply_decoder_bias_to_pre_encoder", path):
        tensors["shift"] = TensorSource(file, (_KEYS["b_dec"],))
    return LayerSource(
        read.layer,
        d,
        f,
        tensors,
        whole("top_k", config.get("top_k"), path, most=f) if name == "topk" else None,
        "stored",
        activation=_ACTIVATIONS[name],
        finish=partial(
            _finished,
            scale=_scale(config, d, path),
            threshold=threshold,
            by_decoder=flag(config, "sparsity_include_decoder_norm", path, True),
            normed=normed,
        ),
    )


def _finished(
    weights: dict[str, Tensor], *, scale: float, threshold: float | None, by_decoder: bool, normed: bool
) -> dict[str, Tensor]:
    """Weights in the units of x itself, with decoder rows of norm 1 if they are part of the selection, and the
    threshold repeated."""
    dtype = working_dtype(weights["W_enc"])
    biases = {name: weights[name].to(dtype) / scale for name in ("b_enc", "b_dec", "shift") if name in weights}
    weights = weights | biases
    if by_decoder:
        weights = fold_decoder_norm(weights)
    if threshold is not None:
        weights = weights | {"threshold": torch.full_like(weights["b_enc"], threshold)}
    return add_norm(weights) if normed else weights
