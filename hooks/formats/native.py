"""This project's own layout: `manifest.json` and one safetensors file per layer. Both matrices have one feature per
row.

    manifest.json         see `Manifest`
    layer_00.safetensors  W_enc[F,D] b_enc W_dec[F,D] b_dec, and those of ln.weight ln.bias threshold shift W_skip that
                          the manifest names

All facts are stored, so none is assumed; a fact that was assumed when the set was converted is marked as assumed.
Unknown keys are errors, on every level, and so are tensors that the manifest does not name.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hooks.errors import CheckpointError, UserError
from hooks.files import (
    FLOATS,
    hub_snapshot,
    is_file,
    read_json,
    safetensors_dtypes,
    safetensors_shapes,
    sha256,
    shown,
    write_json,
    write_safetensors,
)
from hooks.formats import Checkpoint, LayerSource, Norm, Source, TensorSource
from hooks.sites import SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder
from hooks.transcoder import Activation as ActivationName

MANIFEST = "manifest.json"
_NAME: Literal["qwen-circuits"] = "qwen-circuits"
_KEYS = {name: {"norm_weight": "ln.weight", "norm_bias": "ln.bias"}.get(name, name) for name in WEIGHTS}


_MOST_LAYERS = 10_000
_Layer = Annotated[int, Field(ge=0, lt=1_000_000, strict=False)]  # JSON has texts for keys


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class InputNorm(_Strict):
    """How the stream is normed before the encoder. `shift`: a stored vector is subtracted from it."""

    kind: Norm
    eps: PositiveFloat = 1e-5
    bias: bool = True
    shift: bool = False

    @model_validator(mode="after")
    def _shift_stands_alone(self) -> "InputNorm":
        if self.shift and self.kind != "none":
            raise ValueError("a shift belongs to an encoder without a norm")
        return self


class Activation(_Strict):
    """How features are selected: TopK then ReLU, ReLU alone, JumpReLU (a stored threshold) or GroupMax."""

    kind: ActivationName
    k: PositiveInt | None = None
    groups: PositiveInt | None = None
    order: Literal["topk-relu"] = "topk-relu"

    @model_validator(mode="after")
    def _sizes_belong(self) -> "Activation":
        if (self.kind == "topk") != (self.k is not None) or (self.kind == "groupmax") != (self.groups is not None):
            raise ValueError("topk needs k, groupmax needs groups, and nothing else has them")
        return self


class LayerEntry(_Strict):
    """One layer's file in the manifest's folder, and its digest when it was written.

    `d_features` and `k` are given if they differ from the set's; `metadata` is the training metadata of the file that
    the layer was converted from.
    """

    file: str
    sha256: str
    d_features: PositiveInt | None = None
    k: PositiveInt | None = None
    metadata: dict[str, Any] = {}


class Manifest(_Strict):
    """All facts about a set. `read` and `write` are sites relative to a layer, such as `mlp_out+1`.

    Each `..._source` says how a fact was known when the set was written. `calibration` has the findings of
    `circuits check`, `source` the origin of the set (format, files and their digests, revision, assumptions).
    """

    format: Literal["qwen-circuits"]
    version: Annotated[int, Field(ge=1, le=1)]  # a Literal would take true for 1
    base_model: str | None = None
    base_revision: str | None = None
    dtype: str | None = None
    d_model: PositiveInt
    d_features: PositiveInt
    read: str | None = None
    write: str | None = None
    sites_source: Source = "stored"
    input_norm: InputNorm
    encoder_source: Source = "stored"
    activation: Activation
    activation_source: Source = "stored"
    skip: bool = False
    layers: Annotated[dict[_Layer, LayerEntry], Field(min_length=1, max_length=_MOST_LAYERS)]
    calibration: dict[str, Any] | None = None
    source: dict[str, Any] = {}

    @model_validator(mode="after")
    def _k_fits(self) -> "Manifest":
        names = [entry.file for entry in self.layers.values()]
        if len(set(names)) < len(names):
            raise ValueError("two layers name the same file")
        for entry in self.layers.values():
            size, k = entry.d_features or self.d_features, entry.k or self.activation.k
            if k and k > size:
                raise ValueError(f"k = {k} is more than d_features = {size}")
            if self.activation.groups and size % self.activation.groups:
                raise ValueError(f"d_features = {size} is no multiple of groups = {self.activation.groups}")
            if entry.k and self.activation.kind != "topk":
                raise ValueError(f"a layer has k, and the set is {self.activation.kind}")
        return self

    def shapes(self, entry: LayerEntry) -> dict[str, tuple[int, ...]]:
        """Every tensor that a layer's file must hold, by our names."""
        d, f = self.d_model, entry.d_features or self.d_features
        normed = self.input_norm.kind != "none"
        present = {
            "W_enc": ((f, d), True),
            "b_enc": ((f,), True),
            "W_dec": ((f, d), True),
            "b_dec": ((d,), True),
            "norm_weight": ((d,), normed),
            "norm_bias": ((d,), normed and self.input_norm.bias),
            "threshold": ((f,), self.activation.kind == "jumprelu"),
            "shift": ((d,), self.input_norm.shift),
            "W_skip": ((d, d), self.skip),
        }
        return {name: shape for name, (shape, wanted) in present.items() if wanted}


def matches(root: Path) -> bool:
    """Whether the folder has a manifest that names this format."""
    path = root / MANIFEST
    if not is_file(path):
        return False
    try:
        content = read_json(path)
    except CheckpointError:
        return any(root.glob("layer_*.safetensors"))  # the manifest is damaged; `locate` raises the error
    return isinstance(content, dict) and content.get("format") == _NAME


def read_manifest(root: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointError: it has unknown, missing or impossible entries.
    """
    path = root / MANIFEST
    content = read_json(path)
    if isinstance(content, dict) and (unknown := sorted(content.keys() - Manifest.model_fields)):
        _refuse(path, f"{shown(unknown[0])}: there is no such entry")  # only the first of many is named
    try:
        manifest = Manifest.model_validate(content)
        if len(manifest.layers) < len(content["layers"]):
            _refuse(path, "a layer occurs twice")
        return manifest
    except ValidationError as error:
        _refuse(path, faults(error, "manifest"))


def faults(error: ValidationError, whole: str) -> str:
    """The errors of a validation in one line; `whole` is the name of the whole document."""
    said = (
        f"{'.'.join(map(str, fault['loc'])) or whole}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_context=False, include_input=False)[:9]
    )
    return "; ".join(said)[:400]


def _refuse(path: Path, found: str) -> NoReturn:
    raise CheckpointError(
        "the manifest does not fit this version",
        expected=f"version 1 with {', '.join(Manifest.model_fields)}",
        found=found,
        where=str(path),
        repair="convert the set again",
    ) from None


def locate(root: Path) -> Checkpoint:
    """Describe the set from its manifest.

    Raises:
        CheckpointError: the manifest has unknown, missing or impossible entries, or a file is missing, damaged or of
            wrong shape.
    """
    manifest = read_manifest(root)
    read, write = (_site(site, root / MANIFEST) for site in (manifest.read, manifest.write))
    left = _not_fetched(root, manifest)
    return Checkpoint(
        root,
        "native",
        tuple(_layer(root, number, manifest) for number in sorted(manifest.layers.keys() - left)),
        read,
        write,
        manifest.input_norm.eps,
        manifest.base_model,
        sites_source=manifest.sites_source,
        norm=manifest.input_norm.kind,
        encoder_source=manifest.encoder_source,
        base_revision=manifest.base_revision,
        revision=revision if isinstance(revision := manifest.source.get("revision"), str) else None,
        notes=(f"not fetched from the hub: layer {', '.join(map(str, sorted(left)))}",) if left else (),
    )


def _site(text: str | None, path: Path) -> SiteSpec | None:
    try:
        return SiteSpec.parse(text) if text else None
    except UserError as error:
        _refuse(path, error.problem)


def _not_fetched(root: Path, manifest: Manifest) -> set[int]:
    """Layers whose files are missing in the hub's cache, where only some may be there. A local folder must be
    complete."""
    if not hub_snapshot(root):
        return set()
    left = {number for number, entry in manifest.layers.items() if not is_file(_file(root, number, entry.file))}
    return left if len(left) < len(manifest.layers) else set()


def _file(root: Path, number: int, name: str) -> Path:
    if not re.fullmatch(r"[\w.-]{1,200}", name) or name in (".", ".."):
        raise CheckpointError(
            f"layer {number} names a file outside its folder",
            expected="the name of a file beside the manifest, such as layer_00.safetensors",
            found=shown(name),
            where=str(root / MANIFEST),
            repair="convert the set again, or use another source",
        )
    return root / name


def _layer(root: Path, number: int, manifest: Manifest) -> LayerSource:
    entry = manifest.layers[number]
    file = _file(root, number, entry.file)
    if not is_file(file):
        raise CheckpointError(
            f"layer {number} is missing",
            expected=f"the file {entry.file} in the folder of the manifest",
            found="a link to nothing" if file.is_symlink() else "no such file",
            where=str(root / MANIFEST),
            repair="download or convert the set again",
        )
    expected = {_KEYS[name]: shape for name, shape in manifest.shapes(entry).items()}
    found = safetensors_shapes(file)
    _check_dtypes(file)
    for key in sorted({*expected, *found}):
        if found.get(key) != expected.get(key):
            raise CheckpointError(
                f"{file.name}: {key} does not fit the manifest",
                expected=str(expected[key]) if key in expected else "no such tensor",
                found=str(found[key]) if key in found else "no such tensor",
                where=str(file),
                repair="download or convert it again",
            )
    rule = manifest.activation
    return LayerSource(
        number,
        manifest.d_model,
        entry.d_features or manifest.d_features,
        {name: TensorSource(file, (_KEYS[name],)) for name in manifest.shapes(entry)},
        entry.k or rule.k,
        manifest.activation_source,
        entry.metadata,
        entry.sha256,
        activation=rule.kind,
        groups=rule.groups,
    )


def _check_dtypes(file: Path) -> None:
    for key, dtype in safetensors_dtypes(file).items():
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{file.name}: {key} holds no floating-point numbers",
                expected="float32, bfloat16, float16 or float64",
                found=str(dtype).removeprefix("torch."),
                where=str(file),
                repair="download or convert it again",
            )


def save(
    root: Path,
    transcoders: Iterable[Transcoder],
    *,
    read: SiteSpec | None,
    write: SiteSpec | None,
    sites_source: Source = "stored",
    encoder_source: Source = "stored",
    activation_source: Source = "stored",
    base_model: str | None = None,
    base_revision: str | None = None,
    calibration: dict[str, Any] | None = None,
    metadata: Mapping[int, Mapping[str, Any]] | None = None,
    **source: Any,
) -> None:
    """Write a set in this format. The manifest is written last, so a folder that has one is complete.

    Args:
        root: the folder to write; made if needed.
        transcoders: one per layer, of one width, norm and selection rule; one is in memory at a time.
        sites_source: how `read` and `write` are known (pass `store.convention.source`, so an assumption stays marked).
        metadata: by layer, see `LayerEntry`.
        source: facts about the origin of the set (`trained_by`, `seed`, ...).

    Raises:
        CheckpointError: the layers differ in a fact that the manifest has only once, or have other sites than stated.
    """
    entries: dict[int, LayerEntry] = {}
    first: Transcoder | None = None
    for transcoder in transcoders:
        first = first or transcoder
        _check_alike(first, transcoder)
        _check_sites(transcoder, read, write)
        file = root / f"layer_{transcoder.layer:02d}.safetensors"
        weights = {key: getattr(transcoder, name) for name, key in _KEYS.items()}
        write_safetensors(file, {key: weight for key, weight in weights.items() if weight is not None})
        own_size = transcoder.d_features if transcoder.d_features != first.d_features else None
        own_k = transcoder.k if transcoder.k != first.k else None
        entries[transcoder.layer] = LayerEntry(
            file=file.name,
            sha256=sha256(file),
            d_features=own_size,
            k=own_k,
            metadata=dict((metadata or {}).get(transcoder.layer, {})),
        )
    if first is None:
        raise CheckpointError("no transcoders given", expected="at least one Transcoder")
    manifest = Manifest(
        format=_NAME,
        version=1,
        base_model=base_model or None,
        base_revision=base_revision,
        dtype=str(first.W_enc.dtype).removeprefix("torch."),
        d_model=first.d_model,
        d_features=first.d_features,
        read=str(read) if read else None,
        write=str(write) if write else None,
        sites_source=sites_source,
        input_norm=_input_norm(first),
        encoder_source=encoder_source,
        activation=Activation(kind=first.activation, k=first.k, groups=first.groups),
        activation_source=activation_source,
        skip=first.W_skip is not None,
        layers=dict(sorted(entries.items())),
        calibration=calibration,
        source=source,
    )
    write_json(root / MANIFEST, manifest.model_dump(mode="json", exclude_none=True))


def _input_norm(transcoder: Transcoder) -> InputNorm:
    if transcoder.norm_weight is None:
        return InputNorm(kind="none", eps=transcoder.norm_eps, shift=transcoder.shift is not None)
    kind: Norm = "layernorm" if transcoder.norm_centred else "rms"
    return InputNorm(kind=kind, eps=transcoder.norm_eps, bias=transcoder.norm_bias is not None)


def _check_sites(transcoder: Transcoder, read: SiteSpec | None, write: SiteSpec | None) -> None:
    if (read and transcoder.read != read.at(transcoder.layer)) or (
        write and transcoder.write != write.at(transcoder.layer)
    ):
        raise CheckpointError(
            f"layer {transcoder.layer} reads {transcoder.read} and writes {transcoder.write}",
            expected=f"{read} and {write}, as stated for the set",
        )


def _check_alike(first: Transcoder, other: Transcoder) -> None:
    def facts(t: Transcoder) -> dict[str, object]:
        return {
            "width": t.d_model,
            "activation": t.activation,
            "groups": t.groups,
            "input norm": _input_norm(t).model_dump(),
            "skip connection": t.W_skip is not None,
        }

    differing = [name for name, fact in facts(first).items() if facts(other)[name] != fact]
    if differing:
        raise CheckpointError(
            "the layers differ, and this format has one entry for all of them",
            expected=f"the same {', '.join(differing)} everywhere",
            found=f"layer {first.layer} and layer {other.layer} differ",
            repair="save them as several sets",
        )
