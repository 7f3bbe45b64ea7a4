"""Our own layout: `manifest.json` and one safetensors file per layer, one feature per row both ways.

    manifest.json         see `Manifest`
    layer_00.safetensors  ln.weight ln.bias W_enc[F,D] b_enc W_dec[F,D] b_dec

Everything a format can know is stored, so nothing is assumed. Unknown keys are errors, on every level.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from hooks.errors import CheckpointError
from hooks.files import safetensors_shapes, sha256, write_json, write_safetensors
from hooks.formats import Checkpoint, LayerSource, TensorSource
from hooks.sites import SiteSpec
from hooks.transcoder import OPTIONAL_WEIGHTS, Transcoder

MANIFEST = "manifest.json"
_NAME: Literal["qwen-circuits"] = "qwen-circuits"
_KEYS = {
    "norm_weight": "ln.weight",
    "norm_bias": "ln.bias",
    "W_enc": "W_enc",
    "b_enc": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputNorm(_Strict):
    """What happens to the stream before the encoder."""

    kind: Literal["layernorm", "none"]
    eps: PositiveFloat = 1e-5


class Activation(_Strict):
    """How features are selected: TopK then ReLU, or ReLU alone."""

    kind: Literal["topk", "relu"]
    k: PositiveInt | None = None
    order: Literal["topk-relu"] = "topk-relu"

    @model_validator(mode="after")
    def _k_belongs_to_topk(self) -> "Activation":
        if (self.kind == "topk") != (self.k is not None):
            raise ValueError("topk needs k, relu has none")
        return self


class LayerEntry(_Strict):
    """One layer's file in the manifest's folder, and its digest when it was written."""

    file: str
    sha256: str


class Manifest(_Strict):
    """Everything known about a set. `read` and `write` are sites relative to a layer, such as `mlp_out+1`."""

    format: Literal["qwen-circuits"]
    version: Literal[1]
    base_model: str | None = None
    d_model: PositiveInt
    d_features: PositiveInt
    read: str
    write: str
    sites_source: Literal["stored", "given", "assumed", "calibrated"] = "stored"
    input_norm: InputNorm
    activation: Activation
    layers: Annotated[dict[int, LayerEntry], Field(min_length=1)]
    source: dict[str, Any] = {}

    @model_validator(mode="after")
    def _k_fits(self) -> "Manifest":
        if self.activation.k and self.activation.k > self.d_features:
            raise ValueError(f"k = {self.activation.k} is more than d_features = {self.d_features}")
        return self


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
        CheckpointError: the manifest has unknown, missing or impossible entries, or a file is missing, damaged or of
            wrong shape.
    """
    path = root / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}" for fault in error.errors()]
        raise CheckpointError(
            "the manifest does not fit this version",
            expected=f"version 1 with {', '.join(Manifest.model_fields)}",
            found="; ".join(faults)[:400],
            where=str(path),
        ) from None
    layers = tuple(_layer(root, number, manifest) for number in sorted(manifest.layers))
    read, write = SiteSpec.parse(manifest.read), SiteSpec.parse(manifest.write)
    norm, source = manifest.input_norm, manifest.sites_source
    return Checkpoint(root, "native", layers, read, write, norm.eps, manifest.base_model, sites_source=source)


def _layer(root: Path, number: int, manifest: Manifest) -> LayerSource:
    name = manifest.layers[number].file
    file = root / name
    if file.parent != root or not file.is_file():
        raise CheckpointError(
            f"layer {number} is missing",
            expected=f"the file {name} in the folder of the manifest",
            where=str(root / MANIFEST),
        )
    d_model, d_features = manifest.d_model, manifest.d_features
    shapes = safetensors_shapes(file)
    expected = {
        "norm_weight": (d_model,),
        "norm_bias": (d_model,),
        "W_enc": (d_features, d_model),
        "b_enc": (d_features,),
        "W_dec": (d_features, d_model),
        "b_dec": (d_model,),
    }
    for weight, shape in expected.items():
        found = shapes.get(_KEYS[weight])
        optional = weight in OPTIONAL_WEIGHTS and manifest.input_norm.kind == "none"
        if found != shape and not (optional and found is None):
            raise CheckpointError(
                f"{file.name}: {_KEYS[weight]} does not fit the manifest",
                expected=str(shape),
                found=str(found) if found else "no such tensor",
                where=str(file),
            )
    tensors = {weight: TensorSource(file, (key,)) for weight, key in _KEYS.items() if key in shapes}
    digest = manifest.layers[number].sha256
    return LayerSource(number, d_model, d_features, tensors, manifest.activation.k, "stored", sha256=digest)


def save(
    root: Path,
    transcoders: list[Transcoder],
    *,
    read: SiteSpec,
    write: SiteSpec,
    sites_source: Literal["stored", "given", "assumed", "calibrated"] = "stored",
    base_model: str = "",
    **source: Any,
) -> None:
    """Write a set in this format; the manifest goes last, so a folder with one is complete.

    Args:
        root: the folder to write; made if needed.
        transcoders: one per layer, all of one width, dictionary size, k and norm.
        sites_source: how `read` and `write` are known; an assumption stays one (pass `store.convention.source`).
        source: whatever says where the set comes from (`trained_by`, `seed`, ...).

    Raises:
        CheckpointError: the layers differ in what the manifest can say only once, or sit elsewhere than stated.
    """
    first = transcoders[0]
    astray = [t for t in transcoders if (t.read, t.write) != (read.at(t.layer), write.at(t.layer))]
    if astray:
        raise CheckpointError(
            f"layer {astray[0].layer} reads {astray[0].read} and writes {astray[0].write}",
            expected=f"{read} and {write}, as stated for the set",
        )
    shared = {(t.d_model, t.d_features, t.k, t.norm_eps, t.norm_weight is None) for t in transcoders}
    if len(shared) > 1:
        raise CheckpointError(
            "the layers differ, and this format has one entry for all of them",
            expected="one width, dictionary size, k, norm and eps",
            found="; ".join(map(str, sorted(shared, key=str))),
            repair="save them as several sets",
        )
    layers = {}
    for transcoder in transcoders:
        file = root / f"layer_{transcoder.layer:02d}.safetensors"
        weights = {key: getattr(transcoder, name) for name, key in _KEYS.items()}
        write_safetensors(file, {key: weight for key, weight in weights.items() if weight is not None})
        layers[transcoder.layer] = LayerEntry(file=file.name, sha256=sha256(file))
    manifest = Manifest(
        format=_NAME,
        version=1,
        base_model=base_model,
        d_model=first.d_model,
        d_features=first.d_features,
        read=str(read),
        write=str(write),
        sites_source=sites_source,
        input_norm=InputNorm(kind="none" if first.norm_weight is None else "layernorm", eps=first.norm_eps),
        activation=Activation(kind="relu") if first.k is None else Activation(kind="topk", k=first.k),
        layers=layers,
        source=source,
    )
    write_json(root / MANIFEST, manifest.model_dump(mode="json", exclude_none=True))
