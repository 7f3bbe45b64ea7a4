"""Damaged and hostile checkpoints: status 2, a message that says everything, nothing executed, nothing written.

Every case goes through the command line. The canary is a file that each payload would make: `everything` sees it.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from worlds import random_transcoder

from circuits.cli import main
from hooks.checkpoints import TranscoderStore
from hooks.demo import PROMPT, WEIGHTS
from hooks.errors import OutputError, UserError
from hooks.files import new_folder, write_safetensors, write_text
from hooks.formats import native, recognise
from hooks.sites import SiteSpec, from_lens, from_module
from hooks.transcoder import WEIGHTS as PARTS
from stress import sets
from stress.sets import damaged, nested, with_header

WIDTH = json.loads((WEIGHTS / "config.json").read_text())["hidden_size"]
FEATURES = 96
PT, TENSORS, MANIFEST = "transcoder_L0.pt", "layer_00.safetensors", "manifest.json"
CANARY = "canary"
COMMAND = f"touch {CANARY}"


def everything(root: Path) -> dict[str, bytes | str]:
    """Every entry below a folder, links as links."""
    return {
        str(path.relative_to(root)): f"-> {path.readlink()}"
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in root.rglob("*")
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """The set in the folder `set` must be refused, by the command line and by `convert`; returns the message."""

    def run(named: str) -> str:
        before = everything(here)
        status = main(["features", PROMPT, "--transcoders", "set", "--read", "resid_pre", "--write", "resid_pre"])
        out, message = capsys.readouterr()
        assert (status, out) == (2, ""), message
        assert "Traceback" not in message
        for part in (named, "\n  expected: ", "\n  found: ", "\n  where: ", "\n  repair: "):
            assert part in message, f"no {part!r} in: {message}"
        assert everything(here) == before
        assert main(["convert", "set", "converted"]) == 2
        out, again = capsys.readouterr()
        assert out == ""
        assert again.split("error: ")[1] == message.split("error: ")[1]
        assert everything(here) == before  # no folder `converted`, not even a part of one
        return message

    return run


def state_dict(**changes: object) -> dict[str, object]:
    coder = random_transcoder(0, WIDTH, FEATURES)
    return {
        "enc.0.weight": coder.norm_weight,
        "enc.0.bias": coder.norm_bias,
        "enc.1.weight": coder.W_enc,
        "enc.1.bias": coder.b_enc,
        "dec.weight": coder.W_dec.T.contiguous(),
        "dec.bias": coder.b_dec,
    } | changes


def packed(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def published(root: Path, content: object = None, *, raw: bytes | None = None) -> Path:
    root.mkdir(exist_ok=True)
    path = root / PT
    path.write_bytes(packed(state_dict() if content is None else content) if raw is None else raw)
    return path


def own(root: Path, layers: int = 1) -> Path:
    site = SiteSpec("resid_pre")
    native.save(root, [random_transcoder(n, WIDTH, FEATURES) for n in range(layers)], read=site, write=site)
    return root


def test_the_sets_of_these_tests_are_fine(here, capsys):
    published(here / "set")
    own(here / "own")
    for name in ("set", "own"):
        assert main(["features", PROMPT, "--transcoders", name]) == 0
        assert main(["convert", name, f"{name}-converted"]) == 0
        assert main(["features", PROMPT, "--transcoders", f"{name}-converted"]) == 0


# -- truncated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twentieth", range(20))
def test_a_truncated_pt(here, refused, twentieth):
    path = published(here / "set")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * twentieth // 20])
    assert "damaged" in refused(PT)


@pytest.mark.parametrize("twentieth", range(20))
def test_a_truncated_safetensors_file(here, refused, twentieth):
    path = own(here / "set") / TENSORS
    path.write_bytes(path.read_bytes()[: path.stat().st_size * twentieth // 20])
    assert "not a readable safetensors file" in refused(TENSORS)


@pytest.mark.parametrize("twentieth", range(20))
def test_a_truncated_manifest(here, refused, twentieth):
    path = own(here / "set") / MANIFEST
    path.write_bytes(path.read_bytes()[: path.stat().st_size * twentieth // 20])
    refused(MANIFEST)


# -- pickles ---------------------------------------------------------------------------------------------------


class Call:
    """Pickles into a call."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(pickled: bytes, *, source: object = None, **options: object) -> bytes:
    """A sound archive whose pickle is another."""
    return sets.archive(pickled, packed(source or state_dict()), **options)


def tar(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name in ("storages", "tensors", "pickle", "../../canary"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def script() -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), out)
    return out.getvalue()


SYSTEM = Call(os.system, COMMAND)
EVAL = Call(eval, f"open({CANARY!r}, 'w').close()")
PAYLOADS: dict[str, Callable[[], bytes]] = {
    "os.system, a plain pickle": lambda: pickle.dumps(SYSTEM),
    "os.system, protocol 0": lambda: pickle.dumps(SYSTEM, 0),
    "os.system, protocol 2": lambda: pickle.dumps(SYSTEM, 2),
    "os.system, protocol 4": lambda: pickle.dumps(SYSTEM, 4),
    "os.system, protocol 5 in an archive": lambda: archive(pickle.dumps({"layer": SYSTEM}, 5)),
    "os.system, written by torch.save": lambda: packed(state_dict(note=SYSTEM)),
    "os.system, torch's old layout": lambda: packed(state_dict(note=SYSTEM), zipped=False),
    "os.system by INST": lambda: archive(f"(S'{COMMAND}'\nios\nsystem\n.".encode()),
    "os.system by GLOBAL and REDUCE": lambda: archive(f"cos\nsystem\n(S'{COMMAND}'\ntR.".encode()),
    "os.system by OBJ": lambda: archive(f"(cos\nsystem\nS'{COMMAND}'\no.".encode()),
    "builtins.eval": lambda: packed(state_dict(note=EVAL)),
    "builtins.exec, as a weight": lambda: packed(state_dict(**{"dec.bias": Call(exec, f"open({CANARY!r}, 'w')")})),
    "getattr to reach system": lambda: archive(
        f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'{COMMAND}'\ntR.".encode()
    ),
    "numpy's loader": lambda: packed(state_dict(note=Call(np.load, CANARY, None, True))),
    "torch.load within": lambda: packed(state_dict(note=Call(torch.load, CANARY))),
    "an extension code": lambda: archive(b"\x80\x02\x82\x01."),
    "a whole module": lambda: packed(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FEATURES))),
    "a TorchScript archive": script,
    "a tar, the layout before torch 0.4": lambda: tar(pickle.dumps(SYSTEM)),
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_a_pickle_that_calls_is_refused_and_never_executed(here, refused, payload):
    published(here / "set", raw=payload())
    assert "damaged" in (message := refused(PT)) or "more than tensors" in message
    assert not (here / CANARY).exists()


@pytest.mark.parametrize("payload", [SYSTEM, EVAL], ids=["system", "eval"])
def test_the_canary_would_be_seen(here, payload):
    before = everything(here)
    pickle.loads(pickle.dumps(payload))
    assert everything(here) != before


# -- what an unpickler makes without running code ---------------------------------------------------------------


def edited(content: object, change: Callable[[bytes], bytes]) -> bytes:
    """An archive whose pickle is edited by hand, checksums and all."""
    with zipfile.ZipFile(io.BytesIO(packed(content))) as old:
        name = next(name for name in old.namelist() if name.endswith("data.pkl"))
        before = old.read(name)
    after = change(before)
    assert after != before
    return archive(after, source=content)


def integer(value: int) -> bytes:
    """As torch's pickles have it."""
    stream = pickle.dumps(value, 2)
    return stream[2:-1]


def laughing() -> object:
    """Ten lists of ten of the list below: 10^30 entries in half a kilobyte."""
    out: object = "ha"
    for _ in range(30):
        out = [out] * 10
    return out


def in_itself() -> bytes:
    """A list that holds itself, as the value of a key."""
    return archive(b"\x80\x02}U\x05layer]q\x01h\x01as.")


def overwritten_get() -> bytes:
    """An ordered dict with an attribute `get` that is no function."""
    return archive(b"\x80\x02ccollections\nOrderedDict\n)R}U\x03getK\x01sb.")


ODD: dict[str, Callable[[], object]] = {
    "a tensor of one number, seen a trillion times": lambda: state_dict(
        **{"enc.1.weight": torch.zeros(1).expand(10**6, 10**6)}
    ),
    "a tensor without numbers": lambda: state_dict(**{"enc.1.weight": torch.empty(10**8, WIDTH, device="meta")}),
    "a sparse tensor": lambda: state_dict(**{"enc.1.weight": torch.eye(WIDTH).to_sparse()}),
    "a compressed sparse tensor": lambda: state_dict(**{"enc.1.weight": torch.eye(WIDTH).to_sparse_csr()}),
    "a quantised tensor": lambda: state_dict(
        **{"enc.1.weight": torch.quantize_per_tensor(torch.eye(WIDTH), 0.1, 0, torch.qint8)}
    ),
    "lists within lists": lambda: state_dict(note=nested(200)),
    "a matrix that is a vector": lambda: state_dict(**{"enc.1.weight": torch.zeros(WIDTH)}),
    "a matrix of three axes": lambda: state_dict(**{"enc.1.weight": torch.zeros(2, 3, WIDTH)}),
    "a matrix that is a number": lambda: state_dict(**{"dec.weight": torch.tensor(1.0)}),
    "an empty matrix": lambda: state_dict(**{"enc.1.weight": torch.zeros(0, WIDTH)}),
    "a bias that is a matrix": lambda: state_dict(**{"enc.1.bias": torch.zeros(FEATURES, 1)}),
    "a decoder the other way round": lambda: state_dict(**{"dec.weight": torch.zeros(FEATURES, WIDTH)}),
    "whole numbers": lambda: state_dict(**{"enc.1.weight": torch.ones(FEATURES, WIDTH, dtype=torch.int32)}),
    "complex numbers": lambda: state_dict(**{"dec.bias": torch.ones(WIDTH, dtype=torch.complex64)}),
    "truth values": lambda: state_dict(**{"dec.bias": torch.ones(WIDTH, dtype=torch.bool)}),
    "numbers of eight bits": lambda: state_dict(**{"dec.bias": torch.ones(WIDTH).to(torch.float8_e4m3fn)}),
    "a list for a tensor": lambda: state_dict(**{"dec.bias": [0.0] * WIDTH}),
    "a missing tensor": lambda: {key: part for key, part in state_dict().items() if key != "dec.bias"},
    "NaN": lambda: state_dict(**{"enc.1.weight": torch.full((FEATURES, WIDTH), float("nan"))}),
    "one NaN": lambda: state_dict(
        **{"dec.weight": torch.zeros(WIDTH, FEATURES).index_fill_(0, torch.tensor(3), np.nan)}
    ),
    "infinity": lambda: state_dict(**{"enc.1.bias": torch.full((FEATURES,), float("inf"))}),
    "minus infinity": lambda: state_dict(**{"dec.bias": torch.full((WIDTH,), float("-inf"))}),
    "NaN in the norm": lambda: state_dict(**{"enc.0.weight": torch.full((WIDTH,), float("nan"))}),
    "nothing": lambda: {},
    "a number": lambda: 7,
    "a tensor alone": lambda: torch.ones(3),
    "a layer that is a tensor": lambda: {"layer": torch.ones(3), "state_dict": state_dict()},
    "a layer that is a text": lambda: {"layer": "0", "state_dict": state_dict()},
    "a layer that is another": lambda: {"layer": 7, "state_dict": state_dict()},
    "a width that is huge": lambda: {"hidden_dim": laughing(), "state_dict": state_dict()},
    "metadata that is a tensor": lambda: {"training_metadata": torch.ones(3), "state_dict": state_dict()},
    "metadata that is a number": lambda: {"training_metadata": 12, "state_dict": state_dict()},
    "metadata that is a text": lambda: {"training_metadata": "x", "state_dict": state_dict()},
    "a share that is NaN": lambda: {"training_metadata": {"final_l0_pct": float("nan")}, "state_dict": state_dict()},
    "a share that is endless": lambda: {"training_metadata": {"final_l0_pct": laughing()}, "state_dict": state_dict()},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
def test_a_pt_of_something_else(here, refused, content):
    published(here / "set", content())
    assert len(refused(PT)) < 3000


RAW: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(5000),
    "text": lambda: b"this is not a checkpoint\n" * 99,
    "a page in place of the file": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 251677022\n",
    "a list that holds itself": in_itself,
    "an ordered dict without its methods": overwritten_get,
    "a storage of eight gigabytes": lambda: edited(
        {"a": torch.zeros(1000)}, lambda raw: raw.replace(integer(1000), integer(2 * 10**9))
    ),
    "a tensor beyond its storage": lambda: edited(
        {"a": torch.zeros(100, 10)}, lambda raw: raw.replace(integer(100) + integer(10), integer(10**8) + integer(10))
    ),
    "an old layout that claims a terabyte": lambda: packed({"a": torch.zeros(1000)}, zipped=False).replace(
        integer(1000), b"\x8a\x06" + (2**40).to_bytes(6, "little")
    ),
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_bytes_that_are_no_set(here, refused, raw):
    published(here / "set", raw=raw())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(PT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


# -- archives --------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """The archive of a sound set with each member written anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed(state_dict()))) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return out.getvalue()


def bomb() -> bytes:
    """Half a gigabyte of zeros as the pickle, compressed a thousandfold."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("x/.format_version", b"1", zipfile.ZIP_STORED)
        with file.open("x/data.pkl", "w") as member:
            for _ in range(512):
                member.write(bytes(1 << 20))
    return out.getvalue()


def flagged(raw: bytes) -> bytes:
    """With the first entry of the directory marked as encrypted."""
    place = raw.index(b"PK\x01\x02") + 8
    return raw[:place] + struct.pack("<H", 1) + raw[place + 2 :]


def claiming(raw: bytes) -> bytes:
    """With a first entry that claims three gigabytes, packed and unpacked."""
    place = raw.index(b"PK\x01\x02") + 20
    return raw[:place] + struct.pack("<II", 3 << 30, 3 << 30) + raw[place + 8 :]


def twice(new: zipfile.ZipFile, name: str, content: bytes) -> None:
    new.writestr(name, content)
    if name.endswith("data.pkl"):
        new.writestr(name, pickle.dumps(SYSTEM, 2))


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a bomb": bomb,
    "compressed members": lambda: rewritten(lambda new, name, raw: new.writestr(name, raw, zipfile.ZIP_DEFLATED)),
    "encrypted": lambda: flagged(packed(state_dict())),
    "a member larger than the file": lambda: claiming(packed(state_dict())),
    "a member above the archive": lambda: rewritten(lambda new, name, raw: new.writestr(f"../../{name}", raw)),
    "a member at the root": lambda: rewritten(lambda new, name, raw: new.writestr(f"/{name}", raw)),
    "a member twice": lambda: rewritten(twice),
    "no pickle": lambda: rewritten(lambda new, name, raw: None if "data.pkl" in name else new.writestr(name, raw)),
    "no numbers": lambda: rewritten(lambda new, name, raw: None if "/data/" in name else new.writestr(name, raw)),
    "numbers of the other endianness": lambda: rewritten(
        lambda new, name, raw: new.writestr(name, b"big" if name.endswith("byteorder") else raw)
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("raw", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_that_torch_does_not_write(here, refused, raw):
    published(here / "set", raw=raw())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "damaged" in refused(PT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kB: 256 MB, half of the bomb


@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_a_flipped_bit_among_the_numbers_of_a_pt(here, refused, part):
    path = published(here / "set")
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("/data/2"))
    start = raw.index(state_dict()["enc.1.weight"].numpy().tobytes())
    raw[start + {"first": 0, "middle": member.file_size // 2, "last": member.file_size - 1}[part]] ^= 1
    path.write_bytes(raw)
    assert "checksum" in refused(PT) or "CRC" in refused(PT)


def test_an_archive_without_checksums_is_opened(here):
    """torch can be told to leave them away; then all are 0."""
    before = torch.utils.serialization.config.save.compute_crc32
    try:
        torch.utils.serialization.config.save.compute_crc32 = False
        published(here / "set")
    finally:
        torch.utils.serialization.config.save.compute_crc32 = before
    assert torch.equal(TranscoderStore.open("set")[0].b_dec, state_dict()["dec.bias"])


# -- safetensors headers -----------------------------------------------------------------------------------------


def replaced(name: str, **entries: object) -> Callable[[dict[str, dict[str, object]]], None]:
    return lambda header: header[name].update(entries)


def moved(by: int) -> Callable[[dict[str, dict[str, object]]], None]:
    def change(header: dict[str, dict[str, object]]) -> None:
        for entry in header.values():
            entry["data_offsets"] = [place + by for place in entry["data_offsets"]]

    return change


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a length of eight exabytes": lambda raw: struct.pack("<Q", 2**63 - 1) + raw[8:],
    "a length beyond the file": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "a length of nothing": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "a huge header": lambda raw: struct.pack("<Q", 200 << 20) + b"{" + b" " * 1000 + raw[8:],
    "a terabyte by its shape": lambda raw: with_header(raw, replaced("W_enc", shape=[2**28, 2**10])),
    "a terabyte by its shape and place": lambda raw: with_header(
        raw, replaced("W_enc", shape=[2**28, 2**10], data_offsets=[0, 2**40])
    ),
    "a shape beyond all numbers": lambda raw: with_header(raw, replaced("W_enc", shape=[2**62, 2**62, 2**62])),
    "a negative shape": lambda raw: with_header(raw, replaced("W_enc", shape=[-FEATURES, -WIDTH])),
    "a shape of fractions": lambda raw: with_header(raw, replaced("b_dec", shape=[WIDTH + 0.0])),
    "a shape that is a text": lambda raw: with_header(raw, replaced("b_dec", shape="wide")),
    "no shape": lambda raw: with_header(raw, lambda header: header["b_dec"].pop("shape") and None),
    "one offset": lambda raw: with_header(raw, replaced("b_dec", data_offsets=[0])),
    "offsets the wrong way round": lambda raw: with_header(
        raw, lambda header: header["W_enc"]["data_offsets"].reverse()
    ),
    "offsets behind the end": lambda raw: with_header(raw, moved(64)),
    "overlapping tensors": lambda raw: with_header(
        raw, lambda header: header["W_dec"].update(data_offsets=header["W_enc"]["data_offsets"])
    ),
    "a hole": lambda raw: with_header(raw, lambda header: header.pop("b_dec") and None),
    "bytes behind the end": lambda raw: raw + bytes(64),
    "a tensor twice": lambda raw: with_header(
        raw,
        lambda header: json.dumps(header)[:-1].encode() + b', "b_dec": ' + json.dumps(header["b_dec"]).encode() + b"}",
    ),
    "a list for a header": lambda raw: with_header(raw, list),
    "a number for a tensor": lambda raw: with_header(raw, lambda header: {**header, "b_dec": 3}),
    "an unknown kind of number": lambda raw: with_header(raw, replaced("b_dec", dtype="F31")),
    "a kind of number that is a list": lambda raw: with_header(raw, replaced("b_dec", dtype=["F32"])),
    "a header nested deeply": lambda raw: with_header(raw, lambda _: b"[" * 100_000 + b"]" * 100_000),
    "a header that is no UTF-8": lambda raw: with_header(raw, lambda header: json.dumps(header).encode("utf-16")),
    "a pickle": lambda raw: pickle.dumps(SYSTEM),
    "an archive": lambda raw: packed(state_dict()),
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_is_not_true(here, refused, change):
    path = own(here / "set") / TENSORS
    path.write_bytes(change(path.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "not a readable safetensors file" in refused(TENSORS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kB


def resigned(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors in the file, and a manifest that agrees with it."""
    save_file(tensors, root / TENSORS)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["layers"]["0"]["sha256"] = hashlib.sha256((root / TENSORS).read_bytes()).hexdigest()
    (root / MANIFEST).write_text(json.dumps(manifest))


def native_tensors() -> dict[str, torch.Tensor]:
    coder = random_transcoder(0, WIDTH, FEATURES)
    parts = {native._KEYS[name]: getattr(coder, name) for name in PARTS}
    return {key: part for key, part in parts.items() if part is not None}


CONTENTS: dict[str, dict[str, torch.Tensor]] = {
    "NaN": {"W_enc": torch.full((FEATURES, WIDTH), float("nan"))},
    "infinity": {"W_dec": torch.full((FEATURES, WIDTH), float("inf"))},
    "one infinity": {"b_enc": torch.zeros(FEATURES).index_fill_(0, torch.tensor(7), float("-inf"))},
    "whole numbers": {"W_enc": torch.ones(FEATURES, WIDTH, dtype=torch.int64)},
    "complex numbers": {"b_dec": torch.ones(WIDTH, dtype=torch.complex64)},
    "numbers of eight bits": {"b_dec": torch.ones(WIDTH).to(torch.float8_e5m2)},
    "another rank": {"W_enc": torch.ones(FEATURES, WIDTH, 1)},
    "another size": {"b_enc": torch.ones(FEATURES + 1)},
    "a tensor too many": {"scale": torch.ones(1)},
}


@pytest.mark.parametrize("changes", CONTENTS.values(), ids=CONTENTS.keys())
def test_tensors_that_cannot_be_weights(here, refused, changes):
    resigned(own(here / "set"), native_tensors() | changes)
    refused(TENSORS)


def test_a_flipped_bit_among_the_numbers_of_safetensors(here, refused):
    path = own(here / "set") / TENSORS
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 4
    path.write_bytes(raw)
    assert "sha256" in refused(TENSORS)


# -- manifests -------------------------------------------------------------------------------------------------


def entries(**changes: object) -> Callable[[dict], object]:
    return lambda manifest: manifest["layers"]["0"].update(changes)


MANIFESTS: dict[str, Callable[[dict], object]] = {
    "a file above": entries(file="../layer_00.safetensors"),
    "a file far above": entries(file="../../../../etc/passwd"),
    "an absolute file": entries(file="/etc/passwd"),
    "a file below": entries(file="below/layer_00.safetensors"),
    "a file of Windows": entries(file="..\\layer_00.safetensors"),
    "the folder itself": entries(file="."),
    "the folder above": entries(file=".."),
    "no name": entries(file=""),
    "a name with a zero": entries(file="layer_00\0.safetensors"),
    "an endless name": entries(file="l" * 100_000),
    "half a character": entries(file="\ud800"),
    "the manifest": entries(file=MANIFEST),
    "a negative layer": lambda manifest: manifest["layers"].update({"-1": manifest["layers"]["0"]}),
    "a layer twice": lambda manifest: manifest["layers"].update({"00": manifest["layers"]["0"]}),
    "a file twice": lambda manifest: manifest["layers"].update({"1": manifest["layers"]["0"]}),
    "a million layers": lambda manifest: manifest.update(
        layers={str(n): {"file": f"{n}", "sha256": ""} for n in range(10**6)}
    ),
    "a hundred thousand layers": lambda manifest: manifest.update(
        layers={str(n): {"file": f"{n}.safetensors", "sha256": ""} for n in range(10**5)}
    ),
    "a model wider than memory": lambda manifest: manifest.update(d_model=10**15),
    "a width of a hundred digits": lambda manifest: manifest.update(d_model=10**100),
    "an eps without end": lambda manifest: manifest["input_norm"].update(eps=float("inf")),
    "an eps that is no number": lambda manifest: manifest["input_norm"].update(eps=float("nan")),
    "a site that is none": lambda manifest: manifest.update(read="everywhere"),
    "layers that are a list": lambda manifest: manifest.update(layers=[0]),
    "another digest": entries(sha256="0" * 64),
    "a digest that is a number": entries(sha256=0),
    "no files": lambda manifest: manifest.update(layers={}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_is_not_true(here, refused, change):
    path = own(here / "set") / MANIFEST
    (here / TENSORS).write_bytes((here / "set" / TENSORS).read_bytes())  # what `../` would find
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(refused("")) < 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


TEXTS = {
    "nested deeply": b"[" * 1_000_000,
    "nested deeply in a dict": b'{"format":"qwen-circuits","layers":' + b'{"0":' * 100_000,
    "a key twice": b'{"format":"qwen-circuits","format":"qwen-circuits","version":1}',
    "a number of ten thousand digits": b'{"format":"qwen-circuits","version":' + b"1" * 10_000 + b"}",
    "binary": bytes(range(256)),
    "another encoding": '{"format":"qwen-circuits"}'.encode("utf-16"),
    "thirty megabytes of nothing": b'{"format":"qwen-circuits"' + b" " * (30 << 20) + b"}",
    "null": b"null",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_manifest_that_cannot_be_read(here, refused, text):
    (own(here / "set") / MANIFEST).write_bytes(text)
    assert len(refused(MANIFEST)) < 3000


# -- folders and links -------------------------------------------------------------------------------------------


def test_an_empty_folder(here, refused):
    (here / "set").mkdir()
    assert "an empty folder" in refused("set")


def test_a_folder_of_something_else(here, refused):
    (here / "set").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "notes.txt"):
        (here / "set" / name).write_bytes(b"{}")
    assert "no transcoders found" in refused("notes.txt")


def test_two_files_for_a_layer(here, refused):
    path = published(here / "set")
    for name in ("transcoder_L1.pt", "transcoder_L01.pt"):
        (here / "set" / name).write_bytes(path.read_bytes())
    assert "two files for layer 1" in refused("transcoder_L01.pt")


def test_layers_of_two_widths(here, refused):
    published(here / "set")
    narrow = random_transcoder(1, 8, 16)
    other = state_dict(**{"enc.0.weight": narrow.norm_weight, "enc.0.bias": narrow.norm_bias})
    other |= {"enc.1.weight": narrow.W_enc, "enc.1.bias": narrow.b_enc}
    other |= {"dec.weight": narrow.W_dec.T.contiguous(), "dec.bias": narrow.b_dec}
    (here / "set" / "transcoder_L1.pt").write_bytes(packed(other))
    assert "different widths" in refused("set")


def test_a_folder_in_place_of_a_file(here, refused):
    (here / "set" / PT).mkdir(parents=True)
    refused(PT)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_does_not_hang(here, capsys):
    (here / "set").mkdir()
    os.mkfifo(here / "set" / PT)
    assert main(["features", PROMPT, "--transcoders", "set"]) == 2
    assert "is no ordinary file" in capsys.readouterr().err


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "a file elsewhere": lambda folder, away: (folder / PT).symlink_to(published(away)),
    "a file elsewhere, relative": lambda folder, away: (folder / PT).symlink_to(f"../away/{published(away).name}"),
    "a device": lambda folder, away: (folder / PT).symlink_to("/dev/zero"),
    "a private file": lambda folder, away: (folder / "config.json").symlink_to("/etc/passwd"),
    "a link to a link": lambda folder, away: (
        (folder / PT).symlink_to("inner"), (folder / "inner").symlink_to(published(away))
    ),
    "a folder elsewhere": lambda folder, away: (
        published(away), (folder / "layers.0.mlp").symlink_to(away, target_is_directory=True)
    ),
    "a file in a hidden folder": lambda folder, away: (
        (folder / ".x").mkdir(), (folder / ".x" / "sae.safetensors").symlink_to(published(away))
    ),
    "behind a link within": lambda folder, away: (
        (folder / ".cache" / "x").mkdir(parents=True),
        (folder / ".cache" / "x" / "config.json").symlink_to("/etc/passwd"),
        (folder / "layer0").symlink_to(".cache/x", target_is_directory=True),
    ),
    "nothing elsewhere": lambda folder, away: (folder / PT).symlink_to(away / "gone"),
}  # fmt: skip


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())
def test_a_link_that_leaves_the_folder(here, refused, link):
    (here / "set").mkdir()
    link(here / "set", here / "away")
    message = refused("set")
    assert "leads out of its folder" in message
    assert " -> /" in message  # both ends


@pytest.mark.parametrize("target", ["itself", "nothing"])
def test_a_link_to_nothing(here, refused, target):
    (here / "set").mkdir()
    (here / "set" / PT).symlink_to(PT if target == "itself" else "gone")
    refused(PT)


def test_links_within_the_folder_are_followed(here):
    (here / "set" / "files").mkdir(parents=True)
    published(here / "set" / "files").rename(here / "set" / "files" / "weights")
    (here / "set" / PT).symlink_to("files/weights")
    (here / "link").symlink_to("set")
    for name in ("set", "link"):  # the folder itself may be given by a link
        assert TranscoderStore.open(name)[0].d_model == WIDTH


@pytest.mark.parametrize("tool", [".git", ".cache"])
def test_what_tools_keep_for_themselves_is_no_part_of_a_set(tmp_path, tool):
    """The same set in `.git` or `.cache` is not looked at, and links there do no harm."""
    for write in (dictionary_learning_set, gemma_scope_set, saelens_set, sparsify_set):
        root = tmp_path / write.__name__
        (root / tool).mkdir(parents=True)
        write(root / tool)
        (root / tool / "link").symlink_to("/etc/passwd")
        with pytest.raises(UserError, match="no transcoders found"):
            recognise(root)
        write(root)
        assert recognise(root).layers[0].layer == 0


def test_a_folder_of_too_many_entries_is_refused_and_not_cut(tmp_path, monkeypatch):
    dictionary_learning_set(tmp_path)
    monkeypatch.setattr("hooks.files.links._ENTRIES", 2)
    recognise(tmp_path)
    (tmp_path / "z").mkdir()
    with pytest.raises(UserError, match="has more than 2 entries"):
        recognise(tmp_path)


def test_the_run_beside_a_single_hookpoint_is_no_link(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    sparsify_set(run)
    (run / "config.json").write_text(json.dumps({"model": "M"}))
    assert recognise(run / "layers.0.mlp").base_model == "M"
    (run / "config.json").rename(run / "inner")
    (tmp_path / "outer").write_text(json.dumps({"model": "M"}))
    for target, said in (("inner", "is a link"), ("../outer", "leads out"), ("/dev/zero", "leads out")):
        (run / "config.json").unlink(missing_ok=True)
        (run / "config.json").symlink_to(target)
        with pytest.raises(UserError, match=said):
            recognise(run / "layers.0.mlp")


YAML = ("!!bool maybe", "!!int ''", "!!timestamp foo", "!!float ''", "0x" + "f" * 5000, "!!binary ä", "!!pairs [1]")


@pytest.mark.parametrize("key", ["k", "model_kind", "feature_input_hook", "activation"])
@pytest.mark.parametrize("value", YAML, ids=lambda value: value[:16])
def test_yaml_that_its_own_parser_stumbles_over(tmp_path, key, value):
    circuit_tracer_set(tmp_path)
    config = (tmp_path / "config.yaml").read_text().splitlines()
    lines = [line for line in config if not line.startswith(f"{key}:")]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, f"{key}: {value}"]))
    with pytest.raises(UserError) as caught:
        recognise(tmp_path)
    assert len(str(caught.value)) < 2000
    (tmp_path / "layer_0.safetensors").unlink()  # then it is nobody's
    (tmp_path / "config.yaml").write_text(f"other: {value}")
    with pytest.raises(UserError, match="no transcoders found"):
        recognise(tmp_path)


@pytest.mark.parametrize(
    "read",
    [
        lambda digits: SiteSpec.parse(f"mlp_out+{digits}"),
        lambda digits: from_lens(f"blocks.{digits}.hook_mlp_out"),
        lambda digits: from_module(f"model.layers.{digits}.mlp", "output"),
    ],
)
def test_numbers_of_thousands_of_digits_are_no_sites(read):
    read("123456")
    for digits in ("1" * 7, "1" * 5000):
        with pytest.raises(UserError) as caught:
            read(digits)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("field", ["io", "submodule_name"])
@pytest.mark.parametrize("value", [["in"], {"in": 1}, None, 7, "mlp_" + "1" * 4000], ids=str)
def test_a_site_that_is_no_text(tmp_path, field, value):
    dictionary_learning_set(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["buffer" if field == "io" else "trainer"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        assert field != "io" or recognise(tmp_path).read is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6.5, 6 + 1j])
def test_a_k_beside_the_weights_that_is_no_whole_number(tmp_path, value):
    dictionary_learning_set(tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    state = {"b_dec" if key == "bias" else key: part for key, part in state.items()}
    torch.save(state | {"k": torch.tensor(value)}, tmp_path / "ae.pt")
    content = json.loads((tmp_path / "config.json").read_text())
    content["trainer"] |= {"dict_class": "AutoEncoderTopK", "k": 6}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="says k 6"):
        recognise(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64], ids=str)
def test_weights_of_other_numbers_in_a_state_dict(tmp_path, dtype):
    dictionary_learning_set(tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(state | {"bias": state["bias"].to(dtype)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="bias holds no floating-point numbers"):
        recognise(tmp_path)


@pytest.fixture
def full_disk():
    """Every file ends at 4 kB, as on a disk that is full: the system's own refusal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up(tmp_path, full_disk):
    big = {"x": torch.zeros(10_000)}
    with pytest.raises(OutputError, match="could not be written to its end"):
        write_safetensors(tmp_path / "x.safetensors", big)
    with pytest.raises(OutputError, match="could not be written to its end"):
        write_text(tmp_path / "x.txt", "x" * 10_000)
    with pytest.raises(OutputError, match="could not be written to its end"), new_folder(tmp_path / "y", 1) as folder:
        (folder / "z").write_bytes(bytes(10_000))
    assert everything(tmp_path) == {}


# -- any damage ------------------------------------------------------------------------------------------------

SOUND = {"published": packed({"layer": 0, "state_dict": state_dict()}), "legacy": packed(state_dict(), zipped=False)}


def check_damaged(root: Path) -> None:
    """Refused as a user's error, or weights of the right shape, all finite."""
    try:
        coder = TranscoderStore.open(root)[0]
    except UserError:
        return
    assert coder.W_enc.shape == coder.W_dec.shape == (FEATURES, WIDTH)
    for name in PARTS:
        part = getattr(coder, name)
        assert part is None or bool(part.isfinite().all()), name


places = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", ["published", "legacy", "pickle", "directory", "header", "numbers", "manifest"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=places)
def test_any_damage_is_refused_or_harmless(kind, where, capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        if kind in SOUND:
            published(root, raw=damaged(SOUND[kind], where))
        elif kind == "pickle":  # with a checksum that agrees, so that the unpickler sees the damage
            published(root, raw=edited_anywhere(SOUND["published"], where))
        elif kind == "directory":
            raw = SOUND["published"]
            start = raw.index(b"PK\x01\x02")
            published(root, raw=raw[:start] + damaged(raw[start:], where))
        else:
            path = own(root) / (MANIFEST if kind == "manifest" else TENSORS)
            raw = path.read_bytes()
            end = 8 + struct.unpack("<Q", raw[:8])[0] if kind == "header" else len(raw)
            path.write_bytes(damaged(raw[:end], where) + raw[end:])
        check_damaged(root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB: a gigabyte


def edited_anywhere(raw: bytes, where: list[tuple[float, int]]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        pickled = old.read(next(name for name in old.namelist() if name.endswith("data.pkl")))
    return archive(damaged(pickled, where), source={"layer": 0, "state_dict": state_dict()})


# -- the other formats -----------------------------------------------------------------------------------------


def parts(d: int = 8, f: int = 24) -> dict[str, torch.Tensor]:
    coder = random_transcoder(0, d, f)
    return {"W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}


def circuit_tracer_set(root: Path) -> None:
    save_file(parts(), root / "layer_0.safetensors")
    config = "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (root / "config.yaml").write_text(config)


def saelens_set(root: Path) -> None:
    save_file({**parts(), "W_enc": parts()["W_enc"].T.contiguous()}, root / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post", "hook_head_index": None}
    sizes = {"architecture": "standard", "d_in": 8, "d_sae": 24, "dtype": "float32", "normalize_activations": "none"}
    (root / "cfg.json").write_text(json.dumps({**sizes, "apply_b_dec_to_input": True, "metadata": metadata}))


def sparsify_set(root: Path) -> None:
    folder = root / "layers.0.mlp"
    folder.mkdir()
    renamed = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    save_file({renamed.get(name, name): part for name, part in parts().items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "num_latents": 24, "k": 5, "d_in": 8}))


def dictionary_learning_set(root: Path) -> None:
    state = parts()
    state = {"encoder.weight": state["W_enc"], "encoder.bias": state["b_enc"], "decoder.weight": state["W_dec"].T}
    torch.save({**state, "bias": parts()["b_dec"]}, root / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "activation_dim": 8, "dict_size": 24, "layer": 0}
    trainer |= {"submodule_name": "resid_post_layer_0", "lm_name": "Qwen/Qwen2.5-7B"}
    (root / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "d_submodule": 8}}))


def gemma_scope_set(root: Path) -> None:
    folder = root / "layer_0" / "width_24" / "average_l0_5"
    folder.mkdir(parents=True)
    arrays = {name: part.numpy() for name, part in parts().items()}
    np.savez(folder / "params.npz", **{**arrays, "W_enc": arrays["W_enc"].T, "threshold": np.ones(24, np.float32)})


def qwen_scope_set(root: Path) -> None:
    torch.save({**parts(), "W_dec": parts()["W_dec"].T.contiguous()}, root / "layer0.sae.pt")


OTHERS = (circuit_tracer_set, saelens_set, sparsify_set, dictionary_learning_set, gemma_scope_set, qwen_scope_set)


def opened(root: Path) -> TranscoderStore:
    k = 6 if (root / "layer0.sae.pt").exists() else None
    return TranscoderStore.open(root, k=k, read="mlp_in" if (root / "layer_0").exists() else None)


@pytest.mark.parametrize("write", OTHERS)
def test_the_other_sets_are_fine(tmp_path, write):
    write(tmp_path)
    store = opened(tmp_path)
    assert store[0].W_dec.shape == (24, 8)


@pytest.mark.parametrize("write", OTHERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=places, cut=st.none() | st.floats(0, 1), which=st.integers(0, 5))
@example(where=[(0.2, 12)], cut=None, which=0)  # once: an archive whose member goes on behind the end of the file
def test_any_damage_to_the_others_is_refused_or_harmless(write, where, cut, which):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = files[which % len(files)]
        raw = path.read_bytes()
        path.write_bytes(damaged(raw, where) if cut is None else raw[: int(cut * len(raw))])
        try:
            store = opened(root)
            coders = [store[layer] for layer in store.layers]
        except UserError:
            return
    for coder in coders:
        assert coder.W_enc.shape == coder.W_dec.shape == (24, 8)
        assert all(bool(part.isfinite().all()) for name in PARTS if (part := getattr(coder, name)) is not None)


def test_a_twentieth_of_the_stress_script():
    """200 damaged sets of all formats: refused, or copied with the right numbers; memory and time within bounds."""
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "stress" / "sets.py"), "--json", "--count", "200", "--processes", "0"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["failed"], found["count"]) == (0, 0, 200), found["failures"]
    assert min(found["refused"], found["opened"]) > 20  # both happen


# -- places and memory -----------------------------------------------------------------------------------------------

NAMES = ["x" * 5000, "x" * 300, "y/" * 3000, "a\0b", "~nobody-at-all/x"]


@pytest.mark.parametrize("name", NAMES, ids=["endless", "long", "deep", "a zero", "no home"])
def test_a_name_that_no_disk_takes(here, capsys, name):
    assert main(["features", PROMPT, "--transcoders", name]) == 2
    assert "Traceback" not in (message := capsys.readouterr().err)
    assert "error: " in message


@pytest.fixture
def nobody():
    """Somebody whom permissions bind: for root they do not exist."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield
    os.seteuid(me)


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["not readable", "not searchable"])
@pytest.mark.parametrize("below", ["", "set"])
def test_a_folder_that_nobody_may_look_into(tmp_path, request, mode, below):
    locked = tmp_path / "locked"
    own(locked / "set")
    own(locked)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    locked.chmod(mode)
    request.getfixturevalue("nobody")
    with pytest.raises(UserError) as caught:
        recognise(locked / below)
    assert "ermission" in str(caught.value)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_no_memory_for_a_file_is_said_to_be_that(here, monkeypatch, kind):
    """The system's own words, as torch and safetensors pass them on."""

    def refuse(*_: object, **__: object) -> None:
        if kind == "pt":
            raise RuntimeError("unable to mmap 100 bytes from file <x>: Cannot allocate memory (12)")
        raise OSError(12, "Cannot allocate memory")

    published(here / "set") if kind == "pt" else own(here / "set")
    monkeypatch.setattr(
        "hooks.files.weight_files.torch.load" if kind == "pt" else "hooks.files.weight_files.safe_open", refuse
    )
    with pytest.raises(UserError, match="memory ran out while"):
        TranscoderStore.open("set")[0]


@pytest.mark.parametrize("text", ["\ud800", "x\udfff"])
def test_half_a_character_is_refused_wherever_it_stands(here, refused, text):
    published(here / "set", {"training_metadata": {"note": text}, "state_dict": state_dict()})
    assert "half a character" in refused(PT)


MANY = {
    "lists": "[" + "[]," * 300_000 + "[]]",
    "names": "{" + ",".join(f'"{n}":{{}}' for n in range(150_000)) + "}",
}


@pytest.mark.parametrize("text", MANY.values(), ids=MANY.keys())
def test_values_are_counted_before_they_are_made(here, refused, text):
    (own(here / "set") / MANIFEST).write_text(text)
    assert "values" in refused(MANIFEST)


@pytest.mark.parametrize("zipped", [True, False])
def test_steps_of_a_pickle_are_counted_before_they_are_taken(here, refused, zipped):
    flood = b"\x80\x02" + b"]" * 1_000_000 + b"."
    published(here / "set", raw=archive(flood) if zipped else flood)
    assert "more than 300,000 steps" in refused(PT)


def test_a_pickle_that_asks_for_memory_is_not_opened(here, refused):
    published(here / "set", raw=archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."))
    assert "builtins.bytearray" in refused(PT)


@pytest.mark.parametrize(
    "changes", [{"d_model": "40"}, {"d_model": 40.0}, {"skip": "false"}, {"skip": 0}, {"version": True}]
)
def test_a_manifest_has_numbers_for_numbers_and_truth_values_for_truth_values(here, refused, changes):
    path = own(here / "set") / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert next(iter(changes)) in refused(MANIFEST)
