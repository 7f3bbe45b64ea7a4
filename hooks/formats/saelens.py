"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, or folders of that kind, one layer each.

    cfg.json                   architecture, k, apply_b_dec_to_input, metadata {hook_name, hook_name_out, model_name, …}
    sae_weights.safetensors    W_enc[D,F] b_enc W_dec[F,D] b_dec, threshold[F] or b_gate r_mag b_mag, W_skip[D,D]

Up to version 5 the configuration is flat. A sparse autoencoder reads and writes `hook_name`; a transcoder writes
`hook_name_out`. Two things are folded when a layer is loaded, in fp32 at least: the gate of a gated autoencoder, which
is a JumpReLU, and `rescale_acts_by_decoder_norm`, a change of units. Sources: docs/formats/saelens.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from hooks.errors import CheckpointError, UserError
from hooks.files import bare, flag, found, safetensors_load, shown, whole
from hooks.formats import Checkpoint, Finish, LayerSource, TensorSource
from hooks.formats._folds import add_norm, fold_decoder_norm, fold_gate, lift_threshold
from hooks.formats._stored import (
    check_shapes,
    check_size,
    float_shapes,
    matrix,
    one_convention,
    one_per_layer,
    read_json,
)
from hooks.sites import Site, from_lens
from hooks.transcoder import Activation

CONFIG, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_RMS_EPS = 1e-6
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_ABOUT = (  # entries of a flat configuration that version 6 has under `metadata`
    *(
        "model_name",
        "model_class_name",
        "model_from_pretrained_kwargs",
        "hook_name",
        "hook_name_out",
        "hook_head_index",
    ),
    *("hook_head_index_out", "prepend_bos", "exclude_special_tokens", "context_size", "seqpos_slice", "dataset_path"),
    *("neuronpedia_id", "sae_lens_version", "sae_lens_training_version"),
)


@dataclass(frozen=True)
class _Architecture:
    """The tensors of an architecture in addition to W_enc, W_dec and b_dec."""

    activation: Activation
    vectors: tuple[str, ...] = ("b_enc",)  # of one number per feature
    transcoder: bool = False
    skip: bool = False


_ARCHITECTURES = {
    "standard": _Architecture("relu"),
    "topk": _Architecture("topk"),
    "jumprelu": _Architecture("jumprelu", ("b_enc", "threshold")),
    "gated": _Architecture("jumprelu", ("b_gate", "r_mag", "b_mag")),
    "transcoder": _Architecture("relu", transcoder=True),
    "skip_transcoder": _Architecture("relu", transcoder=True, skip=True),
    "jumprelu_transcoder": _Architecture("jumprelu", ("b_enc", "threshold"), transcoder=True),
    "jumprelu_skip_transcoder": _Architecture("jumprelu", ("b_enc", "threshold"), transcoder=True, skip=True),
}


@dataclass(frozen=True)
class _Config:
    """One `cfg.json` of any version: the settings of the computation, and the metadata."""

    path: Path
    computed: Mapping[str, Any]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class _Member:
    """One dictionary of a set."""

    source: LayerSource
    read: Site
    write: Site
    normed: bool
    scaled: bool  # trained on inputs multiplied by a number that is not stored
    base_model: str | None
    processed: bool  # trained on a model whose weights TransformerLens had changed


def matches(root: Path) -> bool:
    """Whether there is a `sae_weights.safetensors` in the folder or in a subfolder."""
    return bool(_folders(root))


def _folders(root: Path) -> list[Path]:
    patterns = (WEIGHTS_FILE, f"*/{WEIGHTS_FILE}", f"*/*/{WEIGHTS_FILE}")
    return sorted({path.parent for path in found(root, patterns)})


def locate(root: Path) -> Checkpoint:
    """Describe every dictionary.

    Raises:
        CheckpointError: a file is damaged or contradicts another, an architecture or a setting is not supported by this
            project, or the dictionaries do not form one set.
    """
    members = {folder: _member(folder) for folder in _folders(root)}
    one_per_layer(((member.source.layer, folder) for folder, member in members.items()), root)
    read, write = one_convention({m.source.layer: (m.read, m.write) for m in members.values()}, root)
    normed = _shared({folder: member.normed for folder, member in members.items()}, "hook_name", root)
    base_model = _shared({folder: member.base_model for folder, member in members.items()}, "model_name", root)
    scaled, processed = (any(getattr(m, name) for m in members.values()) for name in ("scaled", "processed"))
    notes = {
        f"what is read is resid_mid divided by its root mean square; eps {_RMS_EPS:g} is assumed, as the files do not "
        "store it": normed,
        "normalize_activations is expected_average_only_in: the inputs were scaled by a number that is not stored; as "
        "when SAELens opens the files, they are not scaled here": scaled,
        "the base model was loaded with fold_ln or center_writing_weights: its streams were not those of the model in "
        "transformers": processed,
    }
    return Checkpoint(
        root,
        "saelens",
        tuple(sorted((member.source for member in members.values()), key=lambda source: source.layer)),
        read,
        write,
        norm_eps=_RMS_EPS,
        base_model=base_model,
        notes=tuple(note for note, holds in notes.items() if holds),
        norm="rms" if normed else "none",
        encoder_source="assumed" if normed or scaled else "stored",
    )


def _shared(facts: Mapping[Path, Any], entry: str, root: Path) -> Any:
    if len(set(facts.values())) > 1:
        raise CheckpointError(
            f"the folders differ in {entry}",
            expected="one base model and one pair of hooks for the whole set",
            found="; ".join(f"{folder.name}: {fact}" for folder, fact in facts.items())[:400],
            where=str(root),
            repair="open one of them at a time",
        )
    return next(iter(facts.values()))


def _read_config(path: Path) -> _Config:
    flat = {_RENAMED.get(key, key): value for key, value in read_json(path).items()}
    about = flat.get("metadata") or flat.get("meta") or {}  # `meta`: release candidates of version 6
    if not isinstance(about, dict):
        _refuse(path, "metadata", "names and values", about)
    return _Config(path, flat, {key: flat[key] for key in _ABOUT if key in flat} | about)


def _refuse(path: Path, key: str, expected: str, found: object) -> NoReturn:
    raise CheckpointError(
        f"{path.name}: {key} cannot be used",
        expected=expected,
        found=shown(found, 160),
        where=str(path),
        repair="correct the entry if it is wrong; otherwise this set cannot be opened",
    ) from None


def _member(folder: Path) -> _Member:
    config, file = _read_config(folder / CONFIG), folder / WEIGHTS_FILE
    name, architecture = _architecture(config)
    _check_settings(config, architecture)
    read, normed = _site(config, "hook_name")
    write, beyond = _site(config, "hook_name_out") if architecture.transcoder else (read, normed)
    if beyond:
        key = "hook_name_out" if architecture.transcoder else "hook_name"
        _refuse(config.path, key, "a site itself, where something is written", config.about[key])
    if write.layer < read.layer:
        _refuse(config.path, "hook_name_out", f"layer {read.layer} or later", config.about["hook_name_out"])
    normalize = config.computed.get("normalize_activations")
    kwargs = config.about.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, dict):
        _refuse(config.path, "model_from_pretrained_kwargs", "names and values", kwargs)
    base_model = config.about.get("model_name")
    return _Member(
        _source(config, file, name, architecture, read.layer, normed),
        read,
        write,
        normed,
        scaled=normalize is True or normalize == "expected_average_only_in",
        base_model=base_model if isinstance(base_model, str) else None,
        processed=flag(kwargs, "fold_ln", config.path) or flag(kwargs, "center_writing_weights", config.path),
    )


def _architecture(config: _Config) -> tuple[str, _Architecture]:
    """The architecture and its name. Up to version 5, TopK is a standard autoencoder with another activation
    function."""
    name = config.computed.get("architecture", "standard")
    function = config.computed.get("activation_fn", "relu")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise CheckpointError(
            f"{config.path.name}: the architecture {bare(name)} is not known here",
            expected=", ".join(_ARCHITECTURES),
            found=shown(name),
            where=str(config.path),
            repair="use a set of one of these",
        )
    if function == "topk" and name == "standard":
        name = "topk"
    if function != "relu" and (function, name) != ("topk", "topk"):
        _refuse(config.path, "activation_fn", "relu, or topk for an autoencoder", function)
    return name, _ARCHITECTURES[name]


def _check_settings(config: _Config, architecture: _Architecture) -> None:
    """Refuse settings that change the computation and for which `Transcoder` has no field."""
    computed, about, path = config.computed, config.about, config.path
    normalize = computed.get("normalize_activations")
    if not isinstance(normalize, bool | None) and normalize not in ("none", "expected_average_only_in"):
        _refuse(path, "normalize_activations", "none or expected_average_only_in", computed["normalize_activations"])
    if computed.get("reshape_activations") not in (None, "none"):
        _refuse(path, "reshape_activations", "none: heads are no site", computed["reshape_activations"])
    for key in ("hook_head_index", "hook_head_index_out"):
        if about.get(key) is not None:
            _refuse(path, key, "none: heads are no site", about[key])
    if architecture.transcoder and flag(computed, "apply_b_dec_to_input", path):
        _refuse(path, "apply_b_dec_to_input", "false for a transcoder", True)
    if flag(computed, "rescale_acts_by_decoder_norm", path) and architecture.activation != "topk":
        _refuse(path, "rescale_acts_by_decoder_norm", "false for everything but topk", True)


def _site(config: _Config, key: str) -> tuple[Site, bool]:
    """A site from a TransformerLens hook name, and whether it is divided by its norm."""
    name = config.about.get(key)
    try:
        site, normed = from_lens(name if isinstance(name, str) else "")
    except UserError as error:
        _refuse(config.path, key, error.expected, name)
    if not isinstance(site, Site):
        _refuse(config.path, key, "a hook with its layer, after `blocks.LAYER.`", name)
    return site, normed


def _source(
    config: _Config, file: Path, name: str, architecture: _Architecture, layer: int, normed: bool
) -> LayerSource:
    shapes = float_shapes(file)
    d, f = matrix(shapes, "W_enc", file)
    expected = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)} | dict.fromkeys(architecture.vectors, (f,))
    expected |= {"W_skip": (d, d)} if architecture.skip else {}
    expected |= {"scaling_factor": (f,)} if "scaling_factor" in shapes else {}
    for key, true in (("d_in", d), ("d_sae", f), ("d_out", d)):
        check_size(key, config.computed.get(key), true, config.path)
    check_shapes(shapes, expected, file)
    if "scaling_factor" in shapes:
        _check_unscaled(file)
    tensors = {key: TensorSource(file, (key,), key == "W_enc") for key in expected if key != "scaling_factor"}
    if not architecture.transcoder and flag(config.computed, "apply_b_dec_to_input", config.path, True):
        tensors["shift"] = TensorSource(file, ("b_dec",))
    k = _k(config, f) if architecture.activation == "topk" else None
    about = {**config.about, "architecture": name}
    rescaled = flag(config.computed, "rescale_acts_by_decoder_norm", config.path)
    finish = _finish(file, architecture, rescaled, normed)
    return LayerSource(layer, d, f, tensors, k, "stored", about, activation=architecture.activation, finish=finish)


def _k(config: _Config, d_features: int) -> int:
    older = config.computed.get("activation_fn_kwargs")
    k = config.computed.get("k", older.get("k") if isinstance(older, dict) else None)
    return whole("k", k, config.path, most=d_features)


def _check_unscaled(file: Path) -> None:
    """Refuse a `scaling_factor` other than 1: decoder scales of a fine-tuning that version 6 dropped."""
    if not bool((safetensors_load(file, "scaling_factor") == 1).all()):
        raise CheckpointError(
            f"{file.name}: scaling_factor is not 1 everywhere",
            expected="a set without finetuning_scaling_factor",
            found="decoder rows that are scaled when they are used",
            where=str(file),
            repair="multiply the rows of W_dec by it, and save the set without it",
        )


def _finish(file: Path, architecture: _Architecture, rescaled: bool, normed: bool) -> Finish | None:
    steps: list[Finish] = []
    if "b_gate" in architecture.vectors:
        steps.append(fold_gate)
    if "threshold" in architecture.vectors and bool((safetensors_load(file, "threshold") < 0).any()):
        steps.append(lift_threshold)
    if rescaled:
        steps.append(fold_decoder_norm)
    if normed:
        steps.append(add_norm)

    def finish(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for step in steps:
            weights = step(weights)
        return weights

    return finish if steps else None
