"""Our own layout: `manifest.json` and one safetensors file per layer, one feature per row both ways.

    manifest.json       format, version, d_model, d_features, read, write, input_norm, activation, layers{file, sha256}
    layer_00.safetensors  ln.weight ln.bias W_enc[F,D] b_enc W_dec[F,D] b_dec

Everything a format can know is stored, so nothing is assumed. Unknown keys are errors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks.errors import CheckpointError
from hooks.files import safetensors_shapes, sha256, write_json, write_safetensors
from hooks.formats import Checkpoint, LayerSource, TensorSource
from hooks.sites import SiteSpec
from hooks.transcoder import OPTIONAL_WEIGHTS, Transcoder

MANIFEST = "manifest.json"
_NAME = "qwen-circuits"
_VERSION = 1
_KEYS = {
    "norm_weight": "ln.weight",
    "norm_bias": "ln.bias",
    "W_enc": "W_enc",
    "b_enc": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
_REQUIRED = {
    "format",
    "version",
    "d_model",
    "d_features",
    "read",
    "write",
    "input_norm",
    "activation",
    "layers",
}
_OPTIONAL = {"base_model", "sites_source", "source"}


def matches(root: Path) -> bool:
    """Whether the folder has a manifest that names this format."""
    path = root / MANIFEST
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") == _NAME
    except (ValueError, AttributeError):
        return False


def locate(root: Path) -> Checkpoint:
    """Describe the set from its manifest.

    Raises:
        CheckpointError: the manifest has unknown or missing keys, or a file is missing, damaged or of wrong shape.
    """
    path = root / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    _check_keys(manifest, path)
    norm, activation = manifest["input_norm"], manifest["activation"]
    if norm.get("kind") not in ("layernorm", "none") or activation.get("kind") not in ("topk", "relu"):
        raise CheckpointError(
            "the manifest names an encoder this version does not know",
            expected="input_norm layernorm or none; activation topk or relu",
            found=f"{norm}, {activation}",
            where=str(path),
        )
    k = int(activation["k"]) if activation["kind"] == "topk" else None
    layers = tuple(
        _layer(root, int(number), entry, manifest, k)
        for number, entry in sorted(manifest["layers"].items(), key=lambda item: int(item[0]))
    )
    read, write = SiteSpec.parse(manifest["read"]), SiteSpec.parse(manifest["write"])
    eps = float(norm.get("eps", 1e-5))
    return Checkpoint(root, "native", layers, read, write, eps, manifest.get("base_model"))


def _check_keys(manifest: Mapping[str, Any], path: Path) -> None:
    missing, unknown = _REQUIRED - set(manifest), set(manifest) - _REQUIRED - _OPTIONAL
    if missing or unknown or manifest["version"] != _VERSION:
        raise CheckpointError(
            "the manifest does not fit this version",
            expected=f"version {_VERSION} with {', '.join(sorted(_REQUIRED))}",
            found=f"missing {sorted(missing)}, unknown {sorted(unknown)}, version {manifest.get('version')}",
            where=str(path),
        )


def _layer(
    root: Path, number: int, entry: Mapping[str, Any], manifest: Mapping[str, Any], k: int | None
) -> LayerSource:
    file = root / entry["file"]
    if file.parent != root or not file.is_file():
        raise CheckpointError(
            f"layer {number} is missing",
            expected=f"the file {entry['file']} in the folder of the manifest",
            where=str(root / MANIFEST),
        )
    d_model, d_features = int(manifest["d_model"]), int(manifest["d_features"])
    shapes = safetensors_shapes(file)
    expected = {
        "norm_weight": (d_model,),
        "norm_bias": (d_model,),
        "W_enc": (d_features, d_model),
        "b_enc": (d_features,),
        "W_dec": (d_features, d_model),
        "b_dec": (d_model,),
    }
    for name, shape in expected.items():
        found = shapes.get(_KEYS[name])
        optional = name in OPTIONAL_WEIGHTS and manifest["input_norm"]["kind"] == "none"
        if found != shape and not (optional and found is None):
            raise CheckpointError(
                f"{file.name}: {_KEYS[name]} does not fit the manifest",
                expected=str(shape),
                found=str(found) if found else "no such tensor",
                where=str(file),
            )
    tensors = {name: TensorSource(file, (key,)) for name, key in _KEYS.items() if key in shapes}
    return LayerSource(number, d_model, d_features, tensors, k, "stored")


def save(
    root: Path,
    transcoders: list[Transcoder],
    *,
    read: SiteSpec,
    write: SiteSpec,
    base_model: str = "",
    **source: Any,
) -> None:
    """Write a set in this format; the manifest goes last, so a folder with one is complete.

    Args:
        root: the folder to write; made if needed.
        transcoders: one per layer, all of one width, k and norm.
        source: whatever says where the set comes from (`trained_by`, `seed`, ...).
    """
    first = transcoders[0]
    layers = {}
    for transcoder in transcoders:
        file = root / f"layer_{transcoder.layer:02d}.safetensors"
        weights = {key: getattr(transcoder, name) for name, key in _KEYS.items()}
        write_safetensors(file, {key: weight for key, weight in weights.items() if weight is not None})
        layers[str(transcoder.layer)] = {"file": file.name, "sha256": sha256(file)}
    manifest = {
        "format": _NAME,
        "version": _VERSION,
        "base_model": base_model,
        "d_model": first.d_model,
        "d_features": first.d_features,
        "read": str(read),
        "write": str(write),
        "sites_source": "stored",
        "input_norm": {"kind": "none" if first.norm_weight is None else "layernorm", "eps": first.norm_eps},
        "activation": {"kind": "relu"} if first.k is None else {"kind": "topk", "k": first.k, "order": "topk-relu"},
        "layers": layers,
        "source": source,
    }
    write_json(root / MANIFEST, manifest)
