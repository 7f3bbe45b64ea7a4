"""circuit-tracer's transcoder sets: `config.yaml` and one `layer_{i}.safetensors` per layer.

    config.yaml           model_kind: transcoder_set, feature_input_hook, feature_output_hook, model_name, activation, k
    layer_0.safetensors   W_enc[F,D] b_enc W_dec[F,D] b_dec, activation_function.threshold[F], W_skip[D,D], k

The hooks are TransformerLens names inside a block. Without `activation`, a layer with a threshold is JumpReLU and one
without is ReLU, as in circuit-tracer. With `ln2.hook_normalized` neither weight nor eps is stored: the input is
resid_mid divided by its root mean square. Sources: docs/formats/circuit-tracer.md.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from hooks.errors import CheckpointError, UserError
from hooks.files import is_file, is_there, read_yaml, safetensors_load, shown, whole
from hooks.formats import Checkpoint, LayerSource, Source, TensorSource
from hooks.formats._circuit_tracer_writer import CONFIG, CONVERSION, KEYS, PARTS, RMS_EPS, TOPK_NOTE
from hooks.formats._circuit_tracer_writer import save as save
from hooks.formats._folds import add_norm
from hooks.formats._stored import check_shapes, float_shapes, matrix, read_json
from hooks.sites import SiteSpec, from_lens
from hooks.transcoder import Activation

_FILE = re.compile(r"layer_(\d{1,6})\.safetensors")
_K = "k"
_ACTIVATIONS: dict[str, Activation] = {"topk": "topk", "relu": "relu", "jumprelu": "jumprelu"}
_ENTRIES = {
    *("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k", "transcoders"),
    *("scan", "scan_name", "repo_id", "revision", "subfolder"),
}


def matches(root: Path) -> bool:
    """Whether there is a `config.yaml` that states a kind of transcoders, or that has layer files beside it."""
    path = root / CONFIG
    if not is_file(path):
        return False
    try:
        config = _read_config(path)
    except CheckpointError:
        return bool(_layer_files(root))
    return not config.keys().isdisjoint({"model_kind", "feature_input_hook"}) or bool(_layer_files(root))


def locate(root: Path) -> Checkpoint:
    """Describe every layer file.

    Raises:
        CheckpointError: the configuration or a file is damaged or contradicts another, or the set is of a kind that
            this project does not support.
    """
    path = root / CONFIG
    config = _read_config(path)
    _check_kind(config, path)
    files = _found_files(root, config)
    read, normed = _site(config, "feature_input_hook", path)
    write, beyond = _site(config, "feature_output_hook", path)
    if beyond:
        _refuse(path, "feature_output_hook", "a site itself", "a site divided by its norm")
    activation, k = _rule(config, path)
    layers = tuple(_layer(number, file, activation, k, normed) for number, file in files)
    known = _known(root)
    if rule := known.get("activation_source"):
        layers = tuple(replace(source, k_source=rule) for source in layers)
    base_model = config.get("model_name")
    if not isinstance(base_model, str | None):
        _refuse(path, "model_name", "a name", shown(base_model))
    return Checkpoint(
        root,
        "circuit_tracer",
        layers,
        read,
        write,
        norm_eps=RMS_EPS,
        base_model=base_model or None,
        notes=tuple(_notes(config, [number for number, _ in files], normed)),
        norm="rms" if normed else "none",
        sites_source=known.get("sites_source", "stored"),
        encoder_source=known.get("encoder_source", "assumed" if normed else "stored"),
        selection_notes=tuple(_selection_notes(layers)),
    )


def _known(root: Path) -> dict[str, Source]:
    """How the set's facts were known when it was converted by this project, from `conversion.json`; empty for other
    sets."""
    path = root / CONVERSION
    content = read_json(path) if is_there(path) else {}
    known: dict[str, Any] = {
        key: content[key] for key in ("sites_source", "encoder_source", "activation_source") if key in content
    }
    for key, value in known.items():
        if value not in get_args(Source):
            _refuse(path, key, ", ".join(get_args(Source)), shown(value))
    return known


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        _refuse(path, "the whole file", "entries such as `model_kind: transcoder_set`", shown(config))
    return config


def _refuse(path: Path, key: str, expected: str, found: str) -> NoReturn:
    raise CheckpointError(
        f"{path.name}: {key} cannot be used",
        expected=expected,
        found=found,
        where=str(path),
        repair="correct the entry if it is wrong; otherwise this set cannot be opened",
    ) from None


def _check_kind(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("model_kind")
    if kind == "cross_layer_transcoder":
        raise CheckpointError(
            "cross-layer transcoders cannot be opened",
            expected="model_kind: transcoder_set; here each feature has one decoder, and writes to one layer",
            found="model_kind: cross_layer_transcoder, whose features write to several layers",
            where=str(path),
            repair="use a set of one transcoder per layer",
        )
    if kind != "transcoder_set" and not _is_first_version(config):
        _refuse(path, "model_kind", "transcoder_set", shown(kind))


def _is_first_version(config: Mapping[str, Any]) -> bool:
    """Whether the config is of circuit-tracer 0.1: it has no kind, and a list of one transcoder per layer."""
    listed = config.get("transcoders")
    return "model_kind" not in config and isinstance(listed, list) and all(isinstance(one, dict) for one in listed)


def _layer_files(root: Path) -> list[tuple[int, Path]]:
    return sorted((int(m[1]), path) for path in root.iterdir() if (m := _FILE.fullmatch(path.name)))


def _found_files(root: Path, config: Mapping[str, Any]) -> list[tuple[int, Path]]:
    files = _layer_files(root)
    for (number, path), (other, twin) in pairwise(files):
        if number == other:
            raise CheckpointError(
                f"two files for layer {number}", found=f"{path.name}, {twin.name}", where=str(root), repair="keep one"
            )
    if not files:
        listed = "transcoders" in config
        raise CheckpointError(
            f"{CONFIG} lists files that are elsewhere" if listed else f"{CONFIG} has no layer files beside it",
            expected="layer_0.safetensors, layer_1.safetensors, … in the same folder",
            found="no such file",
            where=str(root),
            repair="download the files it lists into this folder under these names; nothing is fetched unasked"
            if listed
            else "complete the folder",
        )
    return files


def _site(config: Mapping[str, Any], key: str, path: Path) -> tuple[SiteSpec, bool]:
    """A site relative to a transcoder's layer, and whether it is divided by its norm."""
    name = config.get(key)
    try:
        site, normed = from_lens(name if isinstance(name, str) else "")
    except UserError as error:
        _refuse(path, key, error.expected, shown(name))
    if not isinstance(site, SiteSpec):
        _refuse(path, key, "a hook inside a block, without `blocks.LAYER.`", shown(name))
    return site, normed


def _rule(config: Mapping[str, Any], path: Path) -> tuple[Activation | None, int | None]:
    """The selection rule in the configuration; None: the tensors decide."""
    name, k = config.get("activation"), config.get("k")
    if name is not None and (not isinstance(name, str) or name not in _ACTIVATIONS):
        _refuse(path, "activation", ", ".join(_ACTIVATIONS), shown(name))
    if k is not None:
        whole("k", k, path)
    if name != "topk" and k is not None:
        _refuse(path, "k", "activation: topk beside it", f"activation {shown(name)}, k {shown(k)}")
    return (None if name is None else _ACTIVATIONS[name]), k


def _layer(number: int, path: Path, activation: Activation | None, k: int | None, normed: bool) -> LayerSource:
    shapes = float_shapes(path, buffers=(_K,))
    f, d = matrix(shapes, "W_enc", path)
    required = {"W_enc": (f, d), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    optional: dict[str, tuple[int, ...]] = {KEYS["threshold"]: (f,), "W_skip": (d, d), _K: ()}
    check_shapes(shapes, required | {key: shape for key, shape in optional.items() if key in shapes}, path)
    gated = KEYS["threshold"] in shapes
    stored: Activation = "jumprelu" if gated else "relu"
    if activation is not None and gated != (activation == "jumprelu"):
        raise CheckpointError(
            f"{path.name} {'has' if gated else 'has no'} thresholds, and {CONFIG} says activation {activation}",
            expected=f"{KEYS['threshold']} for jumprelu, and for nothing else",
            found=", ".join(shapes),
            where=str(path),
            repair=f"correct {CONFIG} if it is wrong, or download the set again",
        )
    if _K in shapes:
        activation, k = "topk", _stored_k(path, activation, k)
    if activation == "topk" and k is None:
        _refuse(path.parent / CONFIG, "k", "a number of features above 0, for activation topk", "none")
    if k is not None and k > f:
        _refuse(path.parent / CONFIG, "k", f"{f} at most, the features of {path.name}", shown(k))
    if gated:
        _check_thresholds(path)
    tensors = {name: TensorSource(path, (key,)) for name in PARTS if (key := KEYS.get(name, name)) in shapes}
    return LayerSource(
        number,
        d,
        f,
        tensors,
        k,
        "stored" if activation or gated else "assumed",
        activation=activation or stored,
        finish=add_norm if normed else None,
    )


def _stored_k(path: Path, activation: Activation | None, stated: int | None) -> int:
    """The number k that circuit-tracer's own `to_safetensors` stores with the weights of a TopK transcoder."""
    k = safetensors_load(path, _K)
    if k.dtype.is_floating_point or k.dtype.is_complex or k.dtype == torch.bool or int(k) < 1:
        _refuse(path, _K, "a whole number above 0", shown(k.item()))
    if activation not in (None, "topk") or (stated is not None and stated != int(k)):
        _refuse(path, _K, f"what {CONFIG} says: activation {shown(activation)}, k {shown(stated)}", shown(int(k)))
    return int(k)


def _check_thresholds(path: Path) -> None:
    lowest = float(safetensors_load(path, KEYS["threshold"]).min())
    if not lowest >= 0:
        raise CheckpointError(
            f"{path.name}: a threshold of JumpReLU is negative or no number",
            expected="0 or above: below it circuit-tracer would let negative activations through",
            found=f"{lowest:.4g}",
            where=str(path),
            repair="download it again; if it is like that at its source, this layer cannot be opened",
        )


def _notes(config: Mapping[str, Any], numbers: list[int], normed: bool) -> Iterable[str]:
    listed = config.get("transcoders")
    count = max(numbers[-1] + 1, len(listed) if isinstance(listed, list) else 0)
    missing = sorted(set(range(count)) - set(numbers))
    if normed:
        yield (
            f"what is read is resid_mid divided by its root mean square; eps {RMS_EPS:g} is assumed, as the files do "
            "not store it"
        )
    if _is_first_version(config):
        yield f"{CONFIG} is of circuit-tracer 0.1, which names no kind: one transcoder per layer is assumed"
    if listed is not None:
        yield f"the files that {CONFIG} lists are not fetched; those in the folder are taken"
    if missing:
        yield f"no file for layer {', '.join(map(str, missing[:8]))}; the others keep their numbers"
    if unknown := sorted(config.keys() - _ENTRIES):
        yield f"{CONFIG} has entries that are not read: {', '.join(unknown)[:200]}"


def _selection_notes(layers: tuple[LayerSource, ...]) -> Iterable[str]:
    if any(source.activation == "relu" and source.k_source == "assumed" for source in layers):
        yield f"{CONFIG} names no activation, and there are no thresholds: ReLU is assumed, as in circuit-tracer"
    if any(source.activation == "topk" for source in layers):
        yield TOPK_NOTE
