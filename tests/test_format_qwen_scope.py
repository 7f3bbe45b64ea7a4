"""Qwen-Scope: one `layer{n}.sae.pt` per layer, against the card's formula written densely."""

import logging
from pathlib import Path

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
    randoms,
    refused,
    topk,
)
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError
from hooks.formats import recognise
from hooks.sites import Site

K = 6
SHAPES = {"W_enc": (FEATURES, D), "W_dec": (D, FEATURES), "b_enc": (FEATURES,), "b_dec": (D,)}


def write(root: Path, layer: int, **changes: Tensor | None) -> dict[str, Tensor]:
    root.mkdir(parents=True, exist_ok=True)
    state = randoms(layer, **SHAPES) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, root / f"layer{layer}.sae.pt")
    return state


def dense(x: Tensor, w: dict[str, Tensor], k: int) -> Formula:
    """pre = x @ W_enc.T + b_enc, nothing subtracted; the k largest, then ReLU."""
    features = topk(x @ w["W_enc"].T + w["b_enc"], k)
    return features, features @ w["W_dec"].T + w["b_dec"]


def test_the_formula_of_the_card(tmp_path, caplog):
    root = tmp_path / "set"
    states = {layer: write(root, layer) for layer in (0, 9, 27)}
    check_only("qwen_scope", root)
    store = TranscoderStore.open(root, k=K)
    assert store.layers == (0, 9, 27)
    assert (store.k(9), store.k_source(9)) == (K, "given")
    for layer, state in states.items():
        check_formula(store[layer], inputs(), dense(inputs(), state, K))
        assert store[layer].W_dec.is_contiguous()
    assert store.sites(9) == (Site("resid_post", 9), Site("resid_post", 9))
    assert store.convention.source == "assumed"
    assert "resid_post) is assumed" in caplog.text
    check_native_round_trip(root, tmp_path / "native", k=K)


def test_another_site_may_be_given_for_the_assumed_one(tmp_path):
    write(tmp_path, 3)
    store = TranscoderStore.open(tmp_path, k=K, read="resid_pre", write="resid_pre")
    assert store.sites(3) == (Site("resid_pre", 3), Site("resid_pre", 3))
    assert store.convention.source == "given"


def test_without_k_it_is_refused_and_told_where_k_stands(tmp_path):
    write(tmp_path, 0)
    assert recognise(tmp_path).layers[0].k_source == "unknown"
    assert recognise(tmp_path).facts()["k"] == (None, "unknown")
    error = refused(tmp_path)
    assert "do not say how many features TopK keeps" in error.problem
    assert error.expected == "--k N"
    assert "L0_50: --k 50" in error.found


@pytest.mark.parametrize(
    "name",
    ["SAE-Res-Qwen3.5-27B-W80K-L0_100", "models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_100/snapshots/3f0c"],
)
def test_a_k_in_the_folders_name_is_pointed_to_and_not_used(tmp_path, name):
    write(tmp_path / name, 0)
    assert refused(tmp_path / name).found.endswith("L0_100: --k 100")


@pytest.mark.parametrize("layers", [None, [4]])
def test_the_layers_that_are_asked_for_need_k(tmp_path, layers):
    write(tmp_path, 4)
    write(tmp_path, 5)
    refused(tmp_path, layers=layers)
    assert TranscoderStore.open(tmp_path, layers=layers, k=1)[4].k == 1


@pytest.mark.parametrize("k", [0, FEATURES + 1])
def test_an_impossible_k_is_refused(tmp_path, k):
    write(tmp_path, 0)
    with pytest.raises(CheckpointError, match=f"k = {k} is out of range"):
        TranscoderStore.open(tmp_path, k=k)


def test_half_precision_is_kept(tmp_path):
    write(tmp_path, 0, **{key: value.bfloat16() for key, value in randoms(0, **SHAPES).items()})
    assert TranscoderStore.open(tmp_path, k=K)[0].W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize("key", SHAPES)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, key):
    write(tmp_path, 0, **{key: None})
    assert f"lacks the tensor {key}" in refused(tmp_path, k=K).problem
    write(tmp_path, 0, **{key: torch.zeros(3)})
    assert key in refused(tmp_path, k=K).problem
    write(tmp_path, 0, **{key: torch.zeros(SHAPES[key], dtype=torch.int64)})
    assert f"{key} holds no floating-point numbers" in refused(tmp_path, k=K).problem


def test_a_transposed_decoder_is_refused(tmp_path):
    write(tmp_path, 0, W_dec=torch.zeros(FEATURES, D))
    assert "W_dec has the wrong shape" in refused(tmp_path, k=K).problem


def test_an_unknown_tensor_is_refused(tmp_path):
    write(tmp_path, 0, threshold=torch.zeros(FEATURES))
    assert "unknown tensor threshold" in refused(tmp_path, k=K).problem


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"W_enc": 3}, {"state_dict": {"W_enc": torch.ones(2, 2)}}])
def test_another_kind_of_file_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "layer0.sae.pt")
    assert "is no state dict" in refused(tmp_path, k=K).problem


def test_two_files_for_a_layer_are_refused(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "layer01.sae.pt").write_bytes((tmp_path / "layer1.sae.pt").read_bytes())
    assert "several dictionaries for layer 1" in refused(tmp_path, k=K).problem


def test_nothing_is_said_of_k_when_it_is_given(tmp_path, caplog):
    write(tmp_path, 0)
    with caplog.at_level(logging.WARNING, "hooks"):
        TranscoderStore.open(tmp_path, k=K)
    assert "--k" not in caplog.text
