"""Gemma Scope (npz) and Gemma Scope 2 (safetensors), against the tutorial's formula written densely."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from format_checks import (
    FEATURES,
    D,
    Formula,
    check_formula,
    check_native_round_trip,
    check_only,
    inputs,
    jumprelu,
    randoms,
    refused,
    write_json,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError
from hooks.files import npz_load, npz_shapes
from hooks.formats import recognise
from hooks.sites import Site

SHAPES = {"W_enc": (D, FEATURES), "W_dec": (FEATURES, D), "b_enc": (FEATURES,), "b_dec": (D,), "threshold": (FEATURES,)}
SITES = {"read": "mlp_in", "write": "mlp_out"}


def weights(seed: int, skip: bool = False) -> dict[str, Tensor]:
    state = randoms(seed, **SHAPES, **({"skip": (D, D)} if skip else {}))
    return state | {"threshold": state["threshold"].abs()}


def write_npz(folder: Path, state: dict[str, Tensor], *, lower: bool = False, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "params.npz"
    arrays = {key.replace("W_", "w_") if lower else key: tensor.numpy() for key, tensor in state.items()}
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


def write_second(folder: Path, state: dict[str, Tensor], **config: object) -> None:
    """As in Gemma Scope 2."""
    whole = {
        "hf_hook_point_in": "model.layers.22.output",
        "hf_hook_point_out": "model.layers.22.output",
        "width": FEATURES,
        "model_name": "google/gemma-3-4b-it",
        "architecture": "jump_relu",
        "l0": 20,
        "affine_connection": "skip" in state,
        "type": "sae",
    }
    write_json(folder / "config.json", whole | config)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "skip": "affine_skip_connection"}
    save_file({names.get(key, key): tensor for key, tensor in state.items()}, folder / "params.safetensors")


def dense(x: Tensor, w: dict[str, Tensor]) -> Formula:
    """JumpReLU(x @ W_enc + b_enc) @ W_dec + b_dec, and x @ skip, untransposed."""
    features = jumprelu(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    out = features @ w["W_dec"] + w["b_dec"]
    return features, out + x @ w["skip"] if "skip" in w else out


@pytest.mark.parametrize("lower", [False, True], ids=["W_enc", "w_enc"])
@pytest.mark.parametrize("packed", [False, True], ids=["stored", "deflated"])
def test_the_first_set_computes_its_formula_and_converts(tmp_path, lower, packed):
    root, states = tmp_path / "set", {layer: weights(layer) for layer in (0, 12)}
    for layer, state in states.items():
        write_npz(root / f"layer_{layer}/width_16k/average_l0_{80 + layer}", state, lower=lower, packed=packed)
    check_only("gemma_scope", root)
    store = TranscoderStore.open(root, **SITES)
    assert store.layers == (0, 12)
    assert store.convention.source == "given"
    for layer, state in states.items():
        check_formula(store[layer], inputs(), dense(inputs(), state))
    check_native_round_trip(root, tmp_path / "native", **SITES)


def test_the_sites_are_not_guessed_from_names(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-mlp"
    write_npz(root / "layer_3/width_16k/average_l0_8", weights(0))
    found = recognise(root)
    assert (found.read, found.write, found.base_model, found.sites_source) == (None, None, None, "unknown")


@pytest.mark.parametrize("inner", ["", "width_16k", "width_16k/average_l0_82"])
def test_one_set_opens_from_any_folder_around_it(tmp_path, inner):
    write_npz(tmp_path / "layer_12/width_16k/average_l0_82", weights(0))
    root = tmp_path / "layer_12" / inner
    check_only("gemma_scope", root)
    assert TranscoderStore.open(root, **SITES).layers == (12,)


def test_several_widths_or_sparsities_of_a_layer_are_refused(tmp_path):
    for inner in ("width_16k/average_l0_82", "width_16k/average_l0_20", "width_65k/average_l0_21"):
        write_npz(tmp_path / "layer_12" / inner, weights(0))
    error = refused(tmp_path)
    assert "several dictionaries for layer 12" in error.problem
    assert "layer_12/width_16k/average_l0_20, layer_12/width_16k/average_l0_82" in error.found
    assert "open the folder of one of them" in error.repair


def test_what_belongs_to_no_layer_is_left_out_and_said(tmp_path, caplog):
    write_npz(tmp_path / "layer_1/width_16k/average_l0_8", weights(0))
    write_npz(tmp_path / "embedding/width_4k/average_l0_6", weights(1))
    assert TranscoderStore.open(tmp_path, **SITES).layers == (1,)
    assert "embedding/width_4k/average_l0_6 belongs to no layer" in caplog.text


def test_without_any_layer_it_is_refused(tmp_path):
    write_npz(tmp_path / "embedding/width_4k/average_l0_6", weights(1))
    assert "no folder says which layer" in refused(tmp_path).problem


def test_a_threshold_below_zero_is_relu(tmp_path):
    state = weights(4) | {"threshold": torch.linspace(-1, 1, FEATURES)}
    write_npz(tmp_path / "layer_0", state)
    transcoder = TranscoderStore.open(tmp_path, **SITES)[0]
    assert transcoder.threshold is not None
    assert transcoder.threshold.min() == 0
    check_formula(transcoder, inputs(), dense(inputs(), state))


# -- the second set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_the_second_set_computes_its_formula_and_converts(tmp_path, skip):
    root, states = tmp_path / "resid_post", {layer: weights(layer, skip) for layer in (9, 22)}
    for layer, state in states.items():
        point = f"model.layers.{layer}.output"
        folder = root / f"layer_{layer}_width_16k_l0_medium"
        write_second(folder, state, hf_hook_point_in=point, hf_hook_point_out=point)
    check_only("gemma_scope", root)
    store = TranscoderStore.open(root)
    assert store.sites(22) == (Site("resid_post", 22), Site("resid_post", 22))
    assert store.convention.source == "stored"
    assert recognise(root).base_model == "google/gemma-3-4b-it"
    assert recognise(root).layers[0].metadata == {"l0": 20, "type": "sae"}
    for layer, state in states.items():
        check_formula(store[layer], inputs(), dense(inputs(), state))
    check_native_round_trip(root, tmp_path / "native")


def test_hook_points_that_are_no_sites_leave_them_unknown_and_are_said(tmp_path, caplog):
    norms = {"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output"}
    norms |= {"hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"}
    write_second(tmp_path / "layer_5_width_16k_l0_big_affine", weights(0, skip=True), **norms)
    assert recognise(tmp_path).sites_source == "unknown"
    TranscoderStore.open(tmp_path, **SITES)
    assert "pre_feedforward_layernorm.output" in caplog.text


def test_without_its_config_the_second_set_opens_like_the_first(tmp_path):
    folder = tmp_path / "layer_5_width_16k_l0_big"
    write_second(folder, weights(0))
    (folder / "config.json").unlink()
    assert TranscoderStore.open(tmp_path, **SITES).layers == (5,)


@pytest.mark.parametrize(("key", "said"), [("width", "says width 7"), ("hf_hook_point_in", "says the layer 3")])
def test_a_config_that_contradicts_the_files_is_refused(tmp_path, key, said):
    changed = {"width": 7} if key == "width" else {key: "model.layers.3.output", "hf_hook_point_out": None}
    write_second(tmp_path / "layer_22_width_16k_l0_small", weights(0), **changed)
    assert said in refused(tmp_path).problem


# -- what is wrong with a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SHAPES)
def test_a_missing_or_misshapen_array_is_named(tmp_path, key):
    folder = tmp_path / "layer_0/width_16k/average_l0_8"
    write_npz(folder, {name: tensor for name, tensor in weights(0).items() if name != key})
    assert f"lacks the tensor {key}" in refused(tmp_path).problem
    write_npz(folder, weights(0) | {key: torch.zeros(2, 3, 4)})
    assert f"{key} " in refused(tmp_path).problem


def test_an_unknown_array_is_refused(tmp_path):
    write_npz(tmp_path / "layer_0", weights(0) | {"scaling_factor": torch.ones(FEATURES)})
    assert "unknown tensor scaling_factor" in refused(tmp_path).problem


class Canary:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_an_array_of_objects_is_refused_and_not_unpickled(tmp_path):
    folder, canary = tmp_path / "layer_0", tmp_path / "executed"
    path = write_npz(folder, weights(0))
    arrays = dict(np.load(path)) | {"b_dec": np.array([Canary(canary)], dtype=object)}
    np.savez(path, **arrays)
    error = refused(tmp_path)
    assert "is not a readable npz file" in error.problem
    assert "object" in error.found
    assert not canary.exists()


def npy(shape: tuple[int, ...], descr: str = "<f4", body: bytes = b"") -> bytes:
    """An npy file with a header of its own making."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


HOSTILE = {
    "a name with a path": ({"../W_enc.npy": npy((2,), body=bytes(8))}, "../W_enc.npy"),
    "an absolute name": ({"/W_enc.npy": npy((2,), body=bytes(8))}, "/W_enc.npy"),
    "no array": ({"W_enc.txt": b"hello"}, "W_enc.txt"),
    "a bomb": ({"W_enc.npy": npy((1 << 20,), body=bytes(4 << 20))}, "bytes of arrays in an archive"),
    "a header of a terabyte": ({"W_enc.npy": npy((1 << 19, 1 << 19), body=bytes(64))}, "its header says"),
    "a negative shape": ({"W_enc.npy": npy((-1, -2), body=bytes(8))}, "(-1, -2)"),
    "whole numbers": ({"W_enc.npy": npy((2,), "<i8", bytes(16))}, "an array of int64"),
    "text": ({"W_enc.npy": npy((2,), "<U2", bytes(16))}, "an array of <U2"),
    "records": ({"W_enc.npy": npy((2,), "<c8", bytes(16))}, "an array of complex64"),
    "no npy": ({"W_enc.npy": b"\x93NUMPX" + bytes(40)}, "magic"),
    "an empty member": ({"W_enc.npy": b""}, ""),
    "code in a header": ({"W_enc.npy": npy((2,)).replace(b"False", b"int()")}, ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tricks_in_an_archive_are_refused(tmp_path, case):
    members, said = HOSTILE[case]
    (tmp_path / "layer_0").mkdir()
    zipped(tmp_path / "layer_0" / "params.npz", members)
    error = refused(tmp_path)
    assert error.problem == "params.npz is not a readable npz file"
    assert said in error.found


def test_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", npy((2,), body=bytes(8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("W_enc.npy", npy((2,), body=bytes(8)))
    with pytest.raises(CheckpointError, match="is not a readable npz file"):
        npz_shapes(path)


def test_shapes_are_read_without_the_arrays(tmp_path):
    path = tmp_path / "params.npz"
    np.savez(path, W_dec=np.zeros((300, 200), "<f4"))
    raw = bytearray(path.read_bytes())
    raw[200_000] ^= 0xFF  # within the array, whose checksum fails when it is read
    path.write_bytes(raw)
    assert npz_shapes(path) == {"W_dec": (300, 200)}
    with pytest.raises(CheckpointError, match="is not a readable npz file") as caught:
        npz_load(path, "W_dec")
    assert "CRC" in caught.value.found


@pytest.mark.parametrize("descr", ["<f2", "<f4", "<f8", ">f4"])
def test_every_float_is_read_as_it_is(tmp_path, descr):
    array = np.arange(6, dtype=descr).reshape(2, 3)
    for order in "CF":
        np.savez(tmp_path / "params.npz", a=np.array(array, order=order))
        tensor = npz_load(tmp_path / "params.npz", "a")
        assert tensor.tolist() == array.tolist()
        assert tensor.element_size() == array.itemsize


WHOLE = weights(0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_reads_the_same(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "layer_0"
    path = write_npz(folder, WHOLE, packed=data.draw(st.booleans()))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        transcoder = TranscoderStore.open(folder, **SITES)[0]
    except CheckpointError:
        return
    assert torch.equal(transcoder.W_enc, WHOLE["W_enc"].T)
    assert torch.equal(transcoder.W_dec, WHOLE["W_dec"])
    assert torch.equal(transcoder.threshold, WHOLE["threshold"])
