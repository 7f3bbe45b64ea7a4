"""EleutherAI's sparsify: one folder per hookpoint, named by the module of the transformers model.

    config.json                      the run: the model, its revision, the data set (optional)
    layers.5.mlp/cfg.json            activation, k, num_latents or expansion_factor, transcode, skip_connection, d_in
    layers.5.mlp/sae.safetensors     encoder.weight[F,D] encoder.bias W_dec[F,D] b_dec, and with a skip W_skip[D,D]

A transcoder (`transcode: true`) reads the module's input and writes its output; an autoencoder reads and writes the
output, and subtracts b_dec from its input. The skip connection is x @ W_skip.T. EleutherAI's clt-training writes
the same files with more options; a set of one target layer is opened. Sources: `sparse_coder.py`, `fused_encoder.py`
and the trainer's hook in EleutherAI/sparsify; `config.py` and `sparse_coder.py` in EleutherAI/clt-training.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooks.errors import CheckpointError
from hooks.files import bare, check_file, flag, found, hub_snapshot, is_file, is_there, safetensors_load, shown, whole
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
)
from hooks.sites import from_module

_WEIGHTS, _CFG, _RUN = "sae.safetensors", "cfg.json", "config.json"
_KEYS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_USED = {"activation", "k", "num_latents", "expansion_factor", "transcode", "skip_connection", "d_in"}
_OF_TRAINING = {  # at inference they change nothing; the last four are clt-training's
    *("normalize_decoder", "multi_topk", "lookup_max_order"),
    *("dtype", "tp_output", "train_post_encoder", "topk_coalesced"),
}
_ACROSS_LAYERS = {"n_targets", "n_sources", "coalesce_topk", "per_source_tied", "secondary_target_tied"}
_POST = "post_enc"  # clt-training: added to the activations that TopK kept


def matches(root: Path) -> bool:
    """Whether the folder, or a folder in it, has a `sae.safetensors`."""
    return bool(_folders(root))


def locate(root: Path) -> Checkpoint:
    """Describe every hookpoint.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts itself, an option changes the computation, or there
            are several hookpoints for a layer.
        UserError: a hookpoint is none of the known sites.
    """
    folders = _folders(root)
    run = _run(root)
    cfgs = {folder: read_json(folder / _CFG) for folder in folders}
    transcodes = {folder: _transcodes(cfg, run, folder / _CFG) for folder, cfg in cfgs.items()}
    sites = {folder: _sites(folder, transcodes[folder]) for folder in folders}
    one_per_layer(((_number(pair), folder) for folder, pair in sites.items()), root)
    read, write = one_convention({_number(pair): pair for pair in sites.values()}, root)
    layers = [_layer(_number(sites[folder]), folder, cfgs[folder], transcodes[folder]) for folder in folders]
    model, revision = run.get("model"), run.get("revision")
    silent = any("transcode" not in cfg for cfg in cfgs.values()) and run.get("transcode") is not None
    note = "only the run's config says that these are transcoders: b_dec is assumed not to be subtracted from the input"
    return Checkpoint(
        root,
        "sparsify",
        tuple(sorted(layers, key=lambda source: source.layer)),
        read,
        write,
        norm="none",
        base_model=model if isinstance(model, str) else None,
        base_revision=revision if isinstance(revision, str) else None,
        notes=(note,) if silent else (),
        encoder_source="assumed" if silent else "stored",
    )


def _folders(root: Path) -> list[Path]:
    """The folders of hookpoints: the folder itself, or its subfolders, or the `seed` folders in those."""
    patterns = (_WEIGHTS, f"*/{_WEIGHTS}", f"*/seed*/{_WEIGHTS}")
    return sorted({file.parent for file in found(root, patterns)})


def _run(root: Path) -> Mapping[str, Any]:
    """The configuration of the run, in the folder that has the hookpoints' folders."""
    single = is_there(root / _WEIGHTS)
    path = (root.absolute().parent if single else root) / _RUN
    if single and is_there(path):
        check_file(path, path.parent)  # the folder itself has been checked
        if path.is_symlink() and not hub_snapshot(path.parent):
            raise CheckpointError(
                f"{path.name} beside the opened folder is a link",
                expected="the file that the training run wrote there",
                found=f"{path} -> {path.readlink()}",
                where=str(path),
                repair="open the folder above, or put a copy of the file in its place",
            )
    return read_json(path) if is_file(path) else {}


def _transcodes(cfg: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> bool:
    options = sorted(key for key, value in cfg.items() if value and value != "none" and key not in _USED | _OF_TRAINING)
    if across := [key for key in options if key in _ACROSS_LAYERS]:
        raise CheckpointError(
            f"{path.name} is of a cross-layer transcoder, which cannot be opened",
            expected="features that write to one layer: no " + ", ".join(sorted(_ACROSS_LAYERS)),
            found=f"{across[0]}: {shown(cfg[across[0]])}",
            where=str(path),
            repair="use a set of one transcoder per layer",
        )
    if options:
        raise CheckpointError(
            f"{path.name} has the option {options[0][:80]}",
            expected=f"only {', '.join(sorted(_USED))}: another may change what is computed",
            found=f"{options[0][:80]}: {shown(cfg[options[0]])}",
            where=str(path),
            repair="open it with the version of sparsify that wrote it",
        )
    transcode = flag(cfg, "transcode", path, flag(run, "transcode", path.with_name(_RUN)))
    if flag(cfg, "skip_connection", path) and not transcode:
        raise CheckpointError(
            f"{path.name}: an autoencoder with a skip connection copies what it reads",
            expected="transcode: true, or no skip_connection",
            found="skip_connection without transcode",
            where=str(path),
            repair="correct cfg.json, if it was trained to predict the module's output from its input",
        )
    return transcode


def _sites(folder: Path, transcode: bool) -> Sites:
    own = folder.absolute()
    name = own.parent.name if re.fullmatch(r"seed\d+", own.name) else own.name
    write = from_module(name, "output")
    return (from_module(name, "input") if transcode else write), write


def _number(pair: Sites) -> int:
    assert pair[1] is not None, "every hookpoint writes somewhere"
    return pair[1].layer


def _layer(number: int, folder: Path, cfg: Mapping[str, Any], transcode: bool) -> LayerSource:
    file, path = folder / _WEIGHTS, folder / _CFG
    shapes = float_shapes(file)
    f, d = matrix(shapes, "encoder.weight", file)
    keys = _KEYS | ({"W_skip": "W_skip"} if flag(cfg, "skip_connection", path) else {})
    sizes = {"W_enc": (f, d), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "W_skip": (d, d)}
    expected = {key: sizes[name] for name, key in keys.items()} | ({_POST: (f,)} if _POST in shapes else {})
    check_shapes(shapes, expected, file)
    if _POST in shapes:
        _check_post(file)
    check_size("d_in", cfg.get("d_in"), d, path)
    if cfg.get("num_latents") not in (None, 0):
        check_size("num_latents", cfg["num_latents"], f, path)
    elif cfg.get("expansion_factor") is not None:
        check_size("num_latents", whole("expansion_factor", cfg["expansion_factor"], path) * d, f, path)
    if not transcode:
        keys |= {"shift": "b_dec"}
    tensors = {name: TensorSource(file, (key,)) for name, key in keys.items()}
    kind, k = cfg.get("activation", "topk"), whole("k", cfg.get("k"), path, most=f)
    if kind not in ("topk", "groupmax") or (kind == "groupmax" and f % k):
        raise CheckpointError(
            f"{path.name}: the activation {bare(kind, 40)} with k {k} cannot be used",
            expected="topk, or groupmax with as many groups of equal size",
            found=f"{f} features",
            where=str(path),
            repair="download it again",
        )
    topk = kind == "topk"
    return LayerSource(
        number,
        d,
        f,
        tensors,
        k if topk else None,
        "stored",
        {key: value for key, value in cfg.items() if key in _OF_TRAINING},
        activation="topk" if topk else "groupmax",
        groups=None if topk else k,
    )


def _check_post(file: Path) -> None:
    """clt-training adds a trained number to every feature that TopK kept; before training it is 0."""
    if bool((safetensors_load(file, _POST) != 0).any()):
        raise CheckpointError(
            f"{file.name}: {_POST} is not 0 everywhere",
            expected="features as TopK leaves them: nothing is added behind it",
            found="a bias behind TopK",
            where=str(file),
            repair="train with train_post_encoder=False; this set cannot be opened",
        )
