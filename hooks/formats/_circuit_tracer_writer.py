"""The names of circuit-tracer's layout, and its writer; `hooks.formats.circuit_tracer` reads it."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hooks.errors import CheckpointError
from hooks.files import sha256, write_json, write_safetensors, write_text
from hooks.formats import Source
from hooks.sites import SiteSpec, to_lens
from hooks.transcoder import Transcoder

CONFIG = "config.yaml"
CONVERSION = "conversion.json"
KEYS = {"threshold": "activation_function.threshold"}  # everything else has our name
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
RMS_EPS = 1e-6
TOPK_NOTE = "of the k largest only positive features count here; circuit-tracer keeps negative ones too"

log = logging.getLogger("hooks")


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
    scan: str | None = None,
    metadata: Mapping[int, Mapping[str, Any]] | None = None,
    **source: Any,
) -> None:
    """Write a set in this layout, if the layout has a field for each of its facts. `config.yaml` is written last, so a
    folder that has one is complete.

    Args:
        root: the folder to write; made if needed.
        transcoders: one per layer from 0 on, in order; one is in memory at a time.
        sites_source: how `read` and `write` are known. Like the other two it is written to `conversion.json`, and read
            from there.
        scan: the name under which circuit-tracer looks up feature pages.
        metadata: by layer; written to `conversion.json` with `source`, as the layout has no place for them.
        source: facts about the origin of the set.

    Raises:
        CheckpointError: the layout has no field for a fact; the message names it.
    """
    if read is None or write is None:
        _lacks("unknown sites", "both sites known", f"read {read}, write {write}", "--read and --write")
    if sites_source == "undecided":  # circuit-tracer would take them for certain
        found = f"{read} and {write}, which a check did not settle"
        _lacks("undecided sites", "sites that are certain", found, "--read and --write")
    first: Transcoder | None = None
    files: dict[str, dict[str, Any]] = {}
    for number, transcoder in enumerate(transcoders):
        first = first or transcoder
        _check_sayable(transcoder, number, read, write)
        _check_like(first, transcoder)
        file = root / f"layer_{number}.safetensors"
        parts = {KEYS.get(name, name): getattr(transcoder, name) for name in PARTS}
        write_safetensors(file, {key: part for key, part in parts.items() if part is not None})
        files[file.name] = {"sha256": sha256(file), "metadata": dict((metadata or {}).get(number, {}))}
    if first is None:
        raise CheckpointError("no transcoders given", expected="at least one Transcoder")
    config = {
        "model_name": base_model,
        "model_kind": "transcoder_set",
        "feature_input_hook": to_lens(read, normed=first.norm_weight is not None),
        "feature_output_hook": to_lens(write),
        "activation": first.activation,
        "k": first.k,
        "scan": scan,
    }
    if first.activation == "topk":
        log.warning("%s", TOPK_NOTE)  # the folder has a temporary name while it is written
    known = {"sites_source": sites_source, "encoder_source": encoder_source, "activation_source": activation_source}
    write_json(root / CONVERSION, {"base_model": base_model, **known, **source, "layers": files})
    kept = {key: value for key, value in config.items() if value is not None}
    write_text(root / CONFIG, yaml.safe_dump(kept, sort_keys=False))


def _lacks(what: str, expected: str, found: str, repair: str = "") -> NoReturn:
    raise CheckpointError(
        f"circuit-tracer's layout has no field for {what}",
        expected=expected,
        found=found,
        repair=repair or "convert to the native format, which has one",
    )


def _check_sayable(transcoder: Transcoder, number: int, read: SiteSpec, write: SiteSpec) -> None:
    """Refuse a layer with a property for which the layout has no field."""
    t = transcoder
    if t.layer != number:
        _lacks("a missing layer", "every layer from 0 on, in order", f"layer {t.layer} instead of {number}")
    if read.offset or write.offset:
        _lacks("sites in another layer", "sites of the transcoder's own layer", f"{read} and {write}")
    if (t.read, t.write) != (read.at(number), write.at(number)):
        raise CheckpointError(
            f"layer {number} reads {t.read} and writes {t.write}", expected=f"{read} and {write}, as stated for the set"
        )
    if t.norm_weight is not None and t.norm_centred:
        _lacks("an input LayerNorm", "an encoder without a norm", f"layer {number} has one")
    if t.norm_weight is not None and not _is_plain_rms(t, read):
        own = "resid_mid divided by its root mean square, eps 1e-6, without weight and bias"
        _lacks("this input RMSNorm", own, f"{read} with weight, bias or eps of its own")
    if t.shift is not None:
        _lacks("a shift of the input", "an encoder that subtracts nothing", f"layer {number} has one")
    if t.groups is not None:
        _lacks("GroupMax", "topk, relu or jumprelu", f"{t.groups} groups")


def _is_plain_rms(t: Transcoder, read: SiteSpec) -> bool:
    weight = t.norm_weight
    ones = weight is not None and bool((weight == 1).all())
    return ones and t.norm_bias is None and t.norm_eps == RMS_EPS and read == SiteSpec("resid_mid")


_SHARED: dict[
    str, Callable[[Transcoder], object]
] = {  # what circuit-tracer asks of all layers, or its config says once
    "different numbers of features": lambda t: t.d_features,
    "different activations": lambda t: (t.activation, t.k),
    "a skip connection in some layers only": lambda t: t.W_skip is not None,
    "a norm in some layers only": lambda t: t.norm_weight is not None,
    "different widths": lambda t: t.d_model,
}


def _check_like(first: Transcoder, other: Transcoder) -> None:
    for what, fact in _SHARED.items():
        if fact(first) != fact(other):
            found = f"layer {first.layer}: {fact(first)}; layer {other.layer}: {fact(other)}"
            _lacks(what, "the same for all layers", found)
