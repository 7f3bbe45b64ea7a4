"""Damaged transcoder sets: each is refused as a user's error, or converted to the right numbers, in bounded memory.

Every case is one small sound set of some format with one damage. `circuits convert` must give exit status 2 and a
message, or exit status 0 and a copy that equals the opened damaged set, finite and of the right shape. Memory is the
process's peak above its use before the case; time is CPU time.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuits.cli import main as command_line
from hooks.checkpoints import TranscoderStore
from hooks.errors import UserError
from hooks.formats import native
from hooks.sites import SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

D, F, LAYERS = 8, 24, (0, 1)
SPARE_BYTES, SECONDS = 200 << 20, 5.0
CHUNK = 100  # cases of one worker process


# -- sound sets ------------------------------------------------------------------------------------------------


def parts(layer: int) -> dict[str, Tensor]:
    """The four tensors that every format has, one feature per row."""
    generator = torch.Generator().manual_seed(layer)
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published(root: Path, *, bare: bool = False, zipped: bool = True) -> None:
    """One `.pt` per layer, of today's layout or that before torch 1.6."""
    for layer in LAYERS:
        p = parts(layer)
        state = {"enc.0.weight": torch.ones(D), "enc.0.bias": torch.zeros(D), "enc.1.weight": p["W_enc"]}
        state |= {"enc.1.bias": p["b_enc"], "dec.weight": p["W_dec"].T.contiguous(), "dec.bias": p["b_dec"]}
        facts = {"steps": 500, "final_l0_pct": 11.2, "dead_pct": 0.0}
        whole = {"layer": layer, "hidden_dim": D, "feature_dim": F, "state_dict": state, "training_metadata": facts}
        torch.save(state if bare else whole, root / f"transcoder_L{layer}.pt", _use_new_zipfile_serialization=zipped)


def own(root: Path) -> None:
    """The native format, with a LayerNorm and TopK."""
    site = SiteSpec("resid_pre")

    def coder(layer: int) -> Transcoder:
        norm = {"norm_weight": torch.ones(D), "norm_bias": torch.zeros(D), "norm_eps": 1e-5}
        return Transcoder(layer=layer, **parts(layer), **norm, k=5, read=site.at(layer), write=site.at(layer))

    native.save(root, [coder(layer) for layer in LAYERS], read=site, write=site, base_model="some/model")


def circuit_tracer(root: Path, *, kind: str = "topk") -> None:
    """As `circuit-tracer` has it: a YAML file, and TopK with its own k, or JumpReLU."""
    extra = {"k": torch.tensor(5)} if kind == "topk" else {"activation_function.threshold": torch.ones(F)}
    for layer in LAYERS:
        save_file(parts(layer) | extra, root / f"layer_{layer}.safetensors")
    config = {"model_name": "some/model", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in"}
    config |= {"feature_output_hook": "mlp.hook_out", "activation": kind} | ({"k": 5} if kind == "topk" else {})
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def saelens(root: Path, *, kind: str = "topk") -> None:
    """SAELens 6, one folder per layer."""
    for layer in LAYERS:
        p = parts(layer)
        tensors = p | {"W_enc": p["W_enc"].T.contiguous()}
        if kind == "gated":
            del tensors["b_enc"]
            tensors |= {name: torch.rand(F) for name in ("b_gate", "r_mag", "b_mag")}
        about = {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "m", "sae_lens_version": "6.54.12"}
        config = {"architecture": kind, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}
        config |= {"metadata": about} | ({"k": 5, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {})
        _folder(root / f"layer_{layer}", "cfg.json", config, "sae_weights.safetensors", tensors)


def sparsify(root: Path, *, kind: str = "topk") -> None:
    """EleutherAI's sparsify, transcoders with a skip connection, or groups."""
    for layer in LAYERS:
        p = parts(layer)
        tensors = {"encoder.weight": p["W_enc"], "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
        config = {"activation": kind, "num_latents": F, "k": 6, "d_in": D, "transcode": kind == "topk"}
        if kind == "topk":
            config, tensors = config | {"skip_connection": True}, tensors | {"W_skip": torch.eye(D)}
        _folder(root / f"layers.{layer}.mlp", "cfg.json", config, "sae.safetensors", tensors)
    (root / "config.json").write_text(json.dumps({"model": "some/model", "transcode": True}))


def dictionary_learning(root: Path, *, kind: str = "AutoEncoderTopK") -> None:
    """saprmarks' library: a state dict beside its configuration."""
    for layer in LAYERS:
        p, folder = parts(layer), root / f"layer_{layer}"
        folder.mkdir()
        state = {"encoder.weight": p["W_enc"], "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T.contiguous()}
        state |= {"b_dec": p["b_dec"], "threshold": torch.tensor(0.5)}
        torch.save(state | ({"k": torch.tensor(5)} if kind == "AutoEncoderTopK" else {}), folder / "ae.pt")
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": layer, "k": 5, "lm_name": "m"}
        config = {"trainer": trainer | {"submodule_name": f"resid_post_layer_{layer}"}, "buffer": {"io": "out"}}
        (folder / "config.json").write_text(json.dumps(config))


def gemma_scope(root: Path, *, packed: bool = True) -> None:
    """Gemma Scope's archives of arrays, or the safetensors of its second edition."""
    for layer in LAYERS:
        p, folder = parts(layer), root / f"layer_{layer}" / "width_24" / "average_l0_5"
        folder.mkdir(parents=True)
        tensors = p | {"W_enc": p["W_enc"].T.contiguous(), "threshold": torch.ones(F)}
        if packed:
            np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
            continue
        save_file({name.lower(): tensor for name, tensor in tensors.items()}, folder / "params.safetensors")
        points = {"hf_hook_point_in": f"model.layers.{layer}.output", "width": F, "model_name": "m"}
        (folder / "config.json").write_text(json.dumps(points))


def qwen_scope(root: Path) -> None:
    """The Qwen team's autoencoders."""
    for layer in LAYERS:
        torch.save(parts(layer) | {"W_dec": parts(layer)["W_dec"].T.contiguous()}, root / f"layer{layer}.sae.pt")


def llama_scope(root: Path) -> None:
    """OpenMOSS's folders."""
    for layer in LAYERS:
        p, hook = parts(layer), f"blocks.{layer}.hook_resid_post"
        tensors = {"encoder.weight": p["W_enc"], "encoder.bias": p["b_enc"], "decoder.bias": p["b_dec"]}
        tensors["decoder.weight"] = p["W_dec"].T.contiguous()
        config = {"hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu", "jump_relu_threshold": 0.5}
        config |= {"d_model": D, "d_sae": F, "dataset_average_activation_norm": {"in": 2.0, "out": 2.0}}
        folder = root / f"L{layer}R-8x"
        _folder(folder, "hyperparams.json", config, "checkpoints/final.safetensors", tensors)


def _folder(folder: Path, name: str, config: dict[str, Any], weights: str, tensors: dict[str, Tensor]) -> None:
    (folder / weights).parent.mkdir(parents=True)
    (folder / name).write_text(json.dumps(config))
    save_file(tensors, folder / weights)


SETS: dict[str, Callable[[Path], None]] = {
    "published": published,
    "published, bare": lambda root: published(root, bare=True),
    "published, old layout": lambda root: published(root, zipped=False),
    "native": own,
    "circuit_tracer": circuit_tracer,
    "circuit_tracer, jumprelu": lambda root: circuit_tracer(root, kind="jumprelu"),
    "saelens": saelens,
    "saelens, gated": lambda root: saelens(root, kind="gated"),
    "sparsify": sparsify,
    "sparsify, groups": lambda root: sparsify(root, kind="groupmax"),
    "dictionary_learning": dictionary_learning,
    "dictionary_learning, batch": lambda root: dictionary_learning(root, kind="BatchTopKSAE"),
    "gemma_scope": gemma_scope,
    "gemma_scope 2": lambda root: gemma_scope(root, packed=False),
    "qwen_scope": qwen_scope,
    "llama_scope": llama_scope,
}


# -- damage to bytes ---------------------------------------------------------------------------------------------


def damaged(raw: bytes, where: list[tuple[float, int]]) -> bytes:
    """Bytes changed at some shares of the length, each by exclusive or."""
    out = bytearray(raw)
    for place, change in where:
        if out:
            out[int(place * len(out))] ^= change
    return bytes(out)


def _spots(draw: random.Random) -> list[tuple[float, int]]:
    return [(draw.random(), draw.randint(1, 255)) for _ in range(draw.randint(1, 5))]


def _swapped(draw: random.Random, raw: bytes) -> bytes:
    a, b = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    return raw[b:] + raw[a:b] + raw[:a]


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "flipped": lambda draw, raw: damaged(raw, _spots(draw)),
    "flipped near the beginning": lambda draw, raw: damaged(raw[:200], _spots(draw)) + raw[200:],
    "flipped near the end": lambda draw, raw: raw[:-300] + damaged(raw[-300:], _spots(draw)),
    "cut": lambda draw, raw: raw[: draw.randrange(len(raw) + 1)],
    "cut in front": lambda draw, raw: raw[draw.randrange(len(raw) + 1) :],
    "longer": lambda draw, raw: raw + draw.randbytes(draw.randint(1, 4000)),
    "in another order": _swapped,
    "zeros": lambda draw, raw: bytes(len(raw)),
    "noise": lambda draw, raw: draw.randbytes(len(raw)),
    "twice": lambda draw, raw: raw * 2,
    "another encoding": lambda draw, raw: raw.decode("latin-1").encode("utf-16"),
    "no UTF-8": lambda draw, raw: raw.replace(b'"', b'"\xff', 3) + b"\xff",
}


def some_bytes(draw: random.Random, root: Path) -> str:
    """Change the bytes of one file."""
    path, (name, change) = draw.choice(_files(root)), draw.choice(sorted(BYTES.items()))
    path.write_bytes(change(draw, path.read_bytes()))
    return f"{path.name}: {name}"


# -- damage to what the text files say ------------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    """A list within lists."""
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


VALUES: tuple[Any, ...] = (
    *(
        "false",
        "true",
        "",
        "8",
        "topk",
        "relu",
        "x" * 10_000,
        "\ud800",
        "../../etc/passwd",
        "\x1b[31m",
        "a\0b",
        "5" * 4000,
    ),
    *(True, False, None, 0, 1, -1, 5, 8.0, 0.5, 24, 10**30, -(10**30), 10**400, 1e308, 5e-324, -0.0),
    *(math.nan, math.inf, -math.inf, [], {}, [8], {"a": 1}, ["topk"], nested(20), nested(500), [0] * 1000),
)


def _mutated(draw: random.Random, content: Any) -> str:
    """One entry of a document, replaced, removed, doubled under another name or joined by a new one."""
    holder = content
    while isinstance(holder, dict) and holder:
        key = draw.choice(sorted(holder))
        if isinstance(holder[key], dict) and draw.random() < 0.7:
            holder = holder[key]
            continue
        how = draw.choice(["value", "value", "value", "gone", "renamed", "more"])
        if how == "value":
            holder[key] = draw.choice(VALUES)
        elif how == "gone":
            del holder[key]
        elif how == "renamed":
            holder[key.upper() + "x"] = holder.pop(key)
        else:
            holder[draw.choice(["signed", "note", "k", "transcoders", "metadata", "scan"])] = draw.choice(VALUES)
        return f"{key} {how}"
    return "nothing"


def some_entry(draw: random.Random, root: Path) -> str:
    """Change one entry of a JSON or YAML file; of a set without one, some bytes."""
    texts = [path for path in _files(root) if path.suffix in (".json", ".yaml")]
    if not texts:
        return some_bytes(draw, root)
    path = draw.choice(texts)
    content = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    said = _mutated(draw, content)
    path.write_text(json.dumps(content))  # which is YAML too, but for what only JSON has
    return f"{path.name}: {said}"


def _laughs() -> str:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(["a0: &a0 [ha]", *lines])


BOMBS: dict[str, Callable[[], str]] = {
    "deep": lambda: "[" * 900_000,
    "deep in names": lambda: '{"a":' * 100_000,
    "many lists": lambda: "[" + "[]," * 600_000 + "[]]",
    "many names": lambda: "{" + ",".join(f'"{n}":0' for n in range(150_000)) + "}",
    "many numbers": lambda: "[" + "1," * 900_000 + "1]",
    "a long number": lambda: '{"k": ' + "9" * 1_000_000 + "}",
    "a long text": lambda: '{"format": "' + "x" * 3_900_000 + '"}',
    "megabytes of nothing": lambda: "{" + " " * 30_000_000 + "}",
    "laughs": _laughs,
    "references": lambda: "a: &a [1]\n" + "".join(f"b{n}: *a\n" for n in range(60_000)),
    "sets and tags": lambda: "k: !!set {a, b}\nmodel_kind: !!python/object/apply:os.system [true]",
    "a number of fs": lambda: "k: 0x" + "f" * 20_000,
    "many lines": lambda: "".join(f"k{n}: {n}\n" for n in range(70_000)),
    "indented": lambda: "".join(" " * n + "a:\n" for n in range(600)),
    "questions": lambda: "? " * 200_000,
    "tabs and bars": lambda: "|\n" + "\t" * 200_000,
    "times": lambda: "k: 9999-99-99T99:99:99Z",
    "merged": lambda: "<<: [{a: 1}, {b: 2}]\nmodel_kind: transcoder_set",
}


def a_bomb(draw: random.Random, root: Path) -> str:
    """A text that is small on the disk and large in memory, in place of one that describes the set, or beside it."""
    name = draw.choice(sorted(BOMBS))
    names = [path for path in _files(root) if path.suffix in (".json", ".yaml")]
    path = draw.choice([*names, root / "config.json", root / "calibration.json", root / "config.yaml"])
    path.write_text(BOMBS[name]())
    return f"{path.name}: {name}"


# -- damage to tensors ------------------------------------------------------------------------------------------------


def _retyped(draw: random.Random, tensor: Tensor) -> Tensor:
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]
    return tensor.to(draw.choice([*kinds, torch.float8_e4m3fn]))


def _filled(draw: random.Random, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor + draw.choice([1, -100, 10**9])
    out = tensor.clone().reshape(-1)
    out[draw.randrange(max(1, len(out)))] = draw.choice([math.nan, math.inf, -math.inf, 3e38, -1.0, 1e-40])
    return out.reshape(tensor.shape)


TENSORS: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "another dtype": _retyped,
    "one odd number": _filled,
    "turned": lambda draw, tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
    "one more axis": lambda draw, tensor: tensor[..., None],
    "empty": lambda draw, tensor: tensor[:0].clone() if tensor.ndim else tensor[None][:0],
    "one row less": lambda draw, tensor: tensor[:-1].clone() if tensor.ndim else tensor * 2,
    "one row more": lambda draw, tensor: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor + 0.5,
    "a number": lambda draw, tensor: tensor.reshape(-1)[0].clone(),
    "zeros": lambda draw, tensor: torch.zeros_like(tensor),
    "negative": lambda draw, tensor: -tensor.abs() - 1,
}


def some_tensor(draw: random.Random, root: Path) -> str:
    """Change, rename, remove, exchange or add a tensor, in a sound file."""
    path = draw.choice([path for path in _files(root) if path.suffix in (".pt", ".safetensors", ".npz")])
    content, state = _tensors(path)
    key = draw.choice(sorted(state))
    how = draw.choice(["changed", "changed", "changed", "gone", "renamed", "exchanged", "more"])
    if how == "changed":
        how, change = draw.choice(sorted(TENSORS.items()))
        state[key] = change(draw, state[key])
    elif how == "gone":
        del state[key]
    elif how == "renamed":
        state[draw.choice(["W_dec", key + "x", "_orig_mod." + key, "x" * 5000])] = state.pop(key)
    elif how == "exchanged":
        other = draw.choice(sorted(state))
        state[key], state[other] = state[other].clone(), state[key].clone()
    else:
        state[draw.choice(["threshold", "W_skip", "k", "b_enc", "scaling_factor"])] = torch.ones(draw.choice([1, D, F]))
    _save(path, content, state)
    if draw.random() < 0.7:
        _resign(root)
    return f"{path.name}: {key} {how}"


def _tensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    if path.suffix == ".safetensors":
        content = load_file(path)
        return content, content
    if path.suffix == ".npz":
        content = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        return content, content
    content = torch.load(path, weights_only=True)
    return content, content.get("state_dict", content)


def _save(path: Path, content: Any, state: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        plain = {key: tensor for key, tensor in state.items() if tensor.dtype != torch.float8_e4m3fn}
        arrays = {key[:80]: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for key, t in plain.items()}
        np.savez(path, **arrays)
    else:
        torch.save(content, path)


def _resign(root: Path) -> None:
    """Make the digests of a native manifest agree with the files."""
    manifest = root / native.MANIFEST
    if manifest.exists():
        content = json.loads(manifest.read_text())
        for entry in content["layers"].values():
            entry["sha256"] = native.sha256(root / entry["file"])
        manifest.write_text(json.dumps(content))


# -- damage to containers ---------------------------------------------------------------------------------------------


def archive(pickled: bytes, source: bytes, **options: Any) -> bytes:
    """A sound archive of torch whose pickle is another, checksums and all."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = pickled if member.filename.endswith("data.pkl") else old.read(member)
            new.writestr(member.filename, content, **options)
    return out.getvalue()


def with_header(raw: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The same numbers behind another safetensors header."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    other = change(header)
    text = other if isinstance(other, bytes) else json.dumps(header if other is None else other).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def _pickles(draw: random.Random, raw: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        name = next(name for name in old.namelist() if name.endswith("data.pkl"))
        pickled = old.read(name)
    allocate = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."
    storage = b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\x00\x00\x00\x00\x02\x85R."
    pickled = draw.choice(
        [damaged(pickled, _spots(draw))] * 4 + [b"\x80\x02" + b"]" * 2_000_000 + b".", allocate, storage]
    )
    return archive(pickled, raw, **draw.choice([{}, {}, {"compress_type": zipfile.ZIP_DEFLATED}]))


def _crowded(draw: random.Random, raw: bytes) -> bytes:
    out = io.BytesIO(raw)
    with warnings.catch_warnings(), zipfile.ZipFile(out, "a") as more:
        warnings.simplefilter("ignore")
        for number in range(draw.choice([3, 40_000])):
            more.writestr(f"x/{number % 30_000}", b"")
    return out.getvalue()


def _packed(draw: random.Random, raw: bytes) -> bytes:
    out = io.BytesIO()
    name = draw.choice(["W_enc.npy", "x/data.pkl", "archive/data.pkl"])
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open(name, "w") as member:
        if name.endswith("npy"):
            shape = (1 << 23, D)
            np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _ in range(256):
            member.write(bytes(1 << 20))
    return out.getvalue()


def _directory(draw: random.Random, raw: bytes) -> bytes:
    start = raw.find(b"PK\x01\x02")
    return raw[:start] + damaged(raw[start:], _spots(draw))


def _header(draw: random.Random, raw: bytes) -> bytes:
    number = draw.choice([0, -1, 2**31, 2**40, 2**63, 10**30, 1.5, "8", None, True, [1]])

    def change(header: dict[str, Any]) -> Any:
        entry = header[draw.choice(sorted(header))]
        key = draw.choice(["shape", "data_offsets", "dtype", "all", "metadata"])
        if key in ("shape", "data_offsets") and entry[key]:
            entry[key][draw.randrange(len(entry[key]))] = number
        elif key == "all":
            return draw.choice([b"[" * 500_000, b'{"a":' * 100_000, b"{" + b"[]," * 10, [1], b"\xff\xfe", {}])
        elif key == "metadata":
            header["__metadata__"] = draw.choice([{"a": "\ud800"}, {"a": 1}, [], "x", {"a": "x" * 100_000}])
        else:
            entry["dtype"] = draw.choice(["F64", "F16", "I8", "BOOL", "F31", number])
        return None

    return with_header(raw, change)


CONTAINERS: dict[str, tuple[str, Callable[[random.Random, bytes], bytes]]] = {
    "a pickle": (".pt", _pickles),
    "more files": (".pt", _crowded),
    "a bomb": (".pt", _packed),
    "the directory": (".pt", _directory),
    "the directory of arrays": (".npz", _directory),
    "more arrays": (".npz", _crowded),
    "a bomb of arrays": (".npz", _packed),
    "a header": (".safetensors", _header),
}


def a_container(draw: random.Random, root: Path) -> str:
    """Change what holds the tensors: an archive's directory or pickle, or a header."""
    fitting = [
        (path, name) for path in _files(root) for name, (suffix, _) in CONTAINERS.items() if path.suffix == suffix
    ]
    path, name = draw.choice(fitting)
    raw = path.read_bytes()
    if path.suffix == ".pt" and not zipfile.is_zipfile(io.BytesIO(raw)):
        path.write_bytes(
            draw.choice([pickle.dumps(nested(300)), b"\x80\x02" + b"]" * 3_000_000 + b".", raw[:2000] * 5])
        )
        return f"{path.name}: an old pickle"
    path.write_bytes(CONTAINERS[name][1](draw, raw))
    return f"{path.name}: {name}"


# -- damage to the folder ---------------------------------------------------------------------------------------------


def _replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _as_layer_7(path: Path) -> Path:
    """The same name with 7 for its number; of a name without one, another."""
    name = re.sub(r"\d+", "7", path.name, count=1)
    return path.with_name(name if name != path.name else "7" + name)


FOLDER: dict[str, Callable[[Path, Path], Any]] = {
    "gone": lambda path, root: path.unlink(),
    "a folder": lambda path, root: _replaced(path, Path.mkdir),
    "a pipe": lambda path, root: _replaced(path, os.mkfifo),
    "a link to itself": lambda path, root: _replaced(path, lambda p: p.symlink_to(p.name)),
    "a link to nothing": lambda path, root: _replaced(path, lambda p: p.symlink_to("gone")),
    "a link to a device": lambda path, root: _replaced(path, lambda p: p.symlink_to("/dev/zero")),
    "a link elsewhere": lambda path, root: _replaced(path, lambda p: p.symlink_to("/etc/passwd")),
    "a link within": lambda path, root: (path.rename(path.with_name("w")), path.symlink_to("w")),
    "unreadable": lambda path, root: path.chmod(0),
    "a copy beside it": lambda path, root: shutil.copy(path, path.with_name("copy_" + path.name)),
    "a copy as another layer": lambda path, root: shutil.copy(path, _as_layer_7(path)),
    "a folder within itself": lambda path, root: (path.parent / "again").symlink_to("."),
    "a name of no text": lambda path, root: (Path(os.fsdecode(os.fsencode(root) + b"/layer_\xff.safetensors"))).touch(),
    "a long name": lambda path, root: (root / ("layer_0" + "9" * 200 + ".safetensors")).touch(),
    "another format": lambda path, root: published(root),
    "empty files": lambda path, root: [(root / f"layer_{n}.safetensors").touch() for n in range(40)],
}


def the_folder(draw: random.Random, root: Path) -> str:
    """Change what the folder holds, and not what is in the files."""
    path, name = draw.choice(_files(root)), draw.choice(sorted(FOLDER))
    FOLDER[name](path, root)
    return f"{path.name}: {name}"


DAMAGES = (some_bytes, some_entry, some_entry, a_bomb, some_tensor, some_tensor, a_container, the_folder)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


# -- results -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"qwen_scope": {"k": 5}}


def outcome(root: Path, out: Path, **options: Any) -> str:
    """`refused`, or `opened` where the copy has the right numbers; else what is wrong."""
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = command_line(["convert", str(root), str(out), *given])
    message = said.getvalue()
    if "Traceback" in message or status not in (0, 2):
        return f"status {status}: {message[-300:]}"
    if len(message) > 10_000:
        return f"a message of {len(message):,} characters"
    if status == 2:
        told = "error: " in message and not out.exists()
        return "refused" if told else f"a refusal without a reason: {message[-200:]}"
    return _compared(TranscoderStore.open(root, **options), TranscoderStore.open(out))


def _compared(given: TranscoderStore, copy: TranscoderStore) -> str:
    if given.layers != copy.layers:
        return "the copy has other layers"
    for one, other in zip(given, copy, strict=True):
        x = torch.linspace(-2, 2, 3 * one.d_model).reshape(3, -1).to(one.W_enc.dtype)
        if one.W_enc.shape != one.W_dec.shape or one.k != other.k or one.groups != other.groups:
            return f"layer {one.layer}: other sizes"
        for name in WEIGHTS:
            a, b = getattr(one, name), getattr(other, name)
            if (a is None) != (b is None) or (a is not None and not (torch.equal(a, b) and bool(a.isfinite().all()))):
                return f"layer {one.layer}: another {name}"
        if one.k and bool((one.encode(x).dense(one.d_features) > 0).sum(-1).max() > one.k):
            return f"layer {one.layer}: more than {one.k} features"
    return "opened"


def _alarm(*_: Any) -> None:
    raise TimeoutError("a minute, and no end")


def case(seed: int) -> dict[str, Any]:
    """One damaged set, and its result."""
    draw = random.Random(seed)
    kind = draw.choice(sorted(SETS))
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "set", Path(folder) / "out"
        root.mkdir()
        SETS[kind](root)
        damage = draw.choice(DAMAGES)(draw, root)
        size = sum(path.stat().st_size for path in _files(root))
        before, clock = _peak_from_here(), time.process_time()
        signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(60)
        try:
            found = outcome(root, out, **OPTIONS.get(kind, {}))
        except UserError as error:
            found = f"refused only when it was opened again: {error.problem}"
        except Exception:
            found = traceback.format_exc()[-600:]
        signal.alarm(0)
        seconds, extra = time.process_time() - clock, _peak() - before
    if extra > 3 * size + SPARE_BYTES:
        found = f"{extra:,} bytes of memory for {size:,} on the disk ({found})"
    if seconds > SECONDS:
        found = f"{seconds:.1f} s ({found})"
    return {"seed": seed, "set": kind, "damage": damage, "found": found, "seconds": seconds, "bytes": extra}


def _peak() -> int:
    """The most bytes of memory that this process has held, since `_peak_from_here` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _peak_from_here() -> int:
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        with contextlib.suppress(OSError):
            forget.write_text("5")
    return _peak()


def chunk(seeds: list[int]) -> list[dict[str, Any]]:
    """Cases of one process."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:  # what is imported at the first use counts for no case
        for name in ("native", "gemma_scope", "circuit_tracer"):
            (root := Path(folder) / name).mkdir()
            SETS[name](root)
            assert outcome(root, Path(folder) / f"{name} copied") == "opened"
    return [case(seed) for seed in seeds]


def measure(count: int, seed: int, processes: int = 2) -> dict[str, Any]:
    """The results of `count` damaged sets."""
    seeds = [seed * 1_000_000 + number for number in range(count)]
    results = list(_in_processes([seeds[start : start + CHUNK] for start in range(0, count, CHUNK)], processes))
    failed = [result for result in results if result["found"] not in ("refused", "opened")]
    return {
        "count": count,
        "failed": len(failed),
        "refused": sum(result["found"] == "refused" for result in results),
        "opened": sum(result["found"] == "opened" for result in results),
        "most_seconds": round(max(result["seconds"] for result in results), 2),
        "most_bytes": max(result["bytes"] for result in results),
        "failures": failed[:50],
    }


def _in_processes(chunks: list[list[int]], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 0:
        yield from (result for seeds in chunks for result in chunk(seeds))
        return
    with ProcessPoolExecutor(processes) as pool:
        for results in pool.map(chunk, chunks):
            yield from results


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object (the only form)")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="0: in this one")
    chosen = parser.parse_args()
    found = measure(chosen.count, chosen.seed, chosen.processes)
    print(json.dumps(found, indent=None if chosen.json else 2, ensure_ascii=True))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
