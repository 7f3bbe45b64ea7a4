"""sparsify: hookpoint folders of EleutherAI's library, against its formula written densely."""

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
    write_json,
)
from safetensors.torch import save_file
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError, UserError
from hooks.formats import recognise
from hooks.sites import Site, SiteSpec

K = 5
SHAPES = {"encoder.weight": (FEATURES, D), "encoder.bias": (FEATURES,), "W_dec": (FEATURES, D), "b_dec": (D,)}


def weights(seed: int, skip: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = SHAPES | ({"W_skip": (D, D)} if skip else {})
    return {name: tensor.to(dtype) for name, tensor in randoms(seed, **shapes).items()}


def cfg(**changes: object) -> dict[str, object]:
    """As `save_to_disk` of version 1.3 writes it."""
    whole = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": FEATURES,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    }
    return {key: value for key, value in (whole | changes).items() if value is not ...}


def write(folder: Path, tensors: dict[str, Tensor], **changes: object) -> None:
    write_json(folder / "cfg.json", cfg(**changes))
    save_file(tensors, folder / "sae.safetensors")


def dense(x: Tensor, w: dict[str, Tensor], *, transcode: bool, groups: bool = False) -> Formula:
    """relu(Linear(x − b_dec)) or relu(Linear(x)); the k largest, or the largest of each of k groups of neighbours."""
    pre = torch.relu((x if transcode else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    features = torch.zeros_like(pre)
    if groups:
        size = FEATURES // K
        for token in range(len(pre)):
            for group in range(K):
                best = max(range(group * size, (group + 1) * size), key=lambda f: pre[token, f].item())
                features[token, best] = pre[token, best]
    else:
        features = topk(pre, K)
    out = features @ w["W_dec"] + w["b_dec"]
    return features, out + x @ w["W_skip"].mT if "W_skip" in w else out


VARIANTS = {
    "autoencoder": ("layers.{}", False, False, False, ("resid_post", "resid_post")),
    "of the MLP": ("layers.{}.mlp", False, False, False, ("mlp_out", "mlp_out")),
    "groupmax": ("layers.{}.mlp", False, False, True, ("mlp_out", "mlp_out")),
    "transcoder": ("layers.{}.mlp", True, False, False, ("mlp_in", "mlp_out")),
    "skip transcoder": ("layers.{}.mlp", True, True, False, ("mlp_in", "mlp_out")),
    "block": ("layers.{}", True, True, True, ("resid_pre", "resid_post")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_computes_its_formula_and_converts(tmp_path, variant):
    name, transcode, skip, groups, (read, written) = VARIANTS[variant]
    root, states = tmp_path / "run", {layer: weights(layer, skip) for layer in (2, 11)}
    for layer, state in states.items():
        changes = {"activation": "groupmax" if groups else "topk", "transcode": transcode, "skip_connection": skip}
        write(root / name.format(layer), state, **changes)
    write_json(root / "config.json", {"model": "Qwen/Qwen3-1.7B", "revision": None, "dataset": "x", "lr": 1e-3})
    check_only("sparsify", root)
    store = TranscoderStore.open(root)
    assert store.layers == (2, 11)
    assert store.sites(11) == (Site(read, 11), Site(written, 11))
    assert store.convention.source == "stored"
    assert recognise(root).base_model == "Qwen/Qwen3-1.7B"
    for layer, state in states.items():
        check_formula(store[layer], inputs(), dense(inputs(), state, transcode=transcode, groups=groups))
        assert (store[layer].shift is None) == transcode
    check_native_round_trip(root, tmp_path / "native")


def test_the_folder_of_one_hookpoint_opens_by_itself(tmp_path):
    write_json(tmp_path / "config.json", {"model": "Qwen/Qwen3-0.6B", "revision": "abc"})
    folder = tmp_path / "model.layers.7.self_attn"
    write(folder, weights(0))
    check_only("sparsify", folder)
    found = recognise(folder)
    assert (found.base_model, found.base_revision) == ("Qwen/Qwen3-0.6B", "abc")
    assert [source.layer for source in found.layers] == [7]
    assert found.read == found.write == SiteSpec("attn_out")


def test_files_before_there_was_transcode_are_autoencoders(tmp_path):
    old = {"num_latents": 0, "signed": False}
    left = dict.fromkeys(("activation", "transcode", "skip_connection", "expansion_factor", "multi_topk"), ...)
    write(tmp_path / "layers.3", weights(1), **old, **left)
    store = TranscoderStore.open(tmp_path)
    check_formula(store[3], inputs(), dense(inputs(), weights(1), transcode=False))


def test_where_only_the_run_says_transcode_it_is_used_and_said(tmp_path, caplog):
    write(tmp_path / "layers.3.mlp", weights(1, skip=True), transcode=..., skip_connection=True)
    write_json(tmp_path / "config.json", {"model": "m", "transcode": True})
    store = TranscoderStore.open(tmp_path)
    check_formula(store[3], inputs(), dense(inputs(), weights(1, skip=True), transcode=True))
    assert recognise(tmp_path).encoder_source == "assumed"
    assert "assumed" in caplog.text


def test_half_precision_is_kept(tmp_path):
    write(tmp_path / "layers.0.mlp", weights(1, dtype=torch.bfloat16), transcode=True)
    transcoder = TranscoderStore.open(tmp_path)[0]
    assert transcoder.W_enc.dtype == transcoder.W_dec.dtype == torch.bfloat16
    state = {name: tensor.float() for name, tensor in weights(1, dtype=torch.bfloat16).items()}
    check_formula(transcoder, inputs(), dense(inputs(), state, transcode=True))


def test_one_seed_opens_and_several_are_refused(tmp_path):
    write(tmp_path / "layers.0" / "seed0", weights(0))
    assert TranscoderStore.open(tmp_path).layers == (0,)
    write(tmp_path / "layers.0" / "seed1", weights(1))
    error = refused(tmp_path)
    assert "several dictionaries for layer 0" in error.problem
    assert "layers.0/seed0, layers.0/seed1" in error.found


def test_two_hookpoints_of_a_layer_are_refused(tmp_path):
    write(tmp_path / "layers.4", weights(0))
    write(tmp_path / "layers.4.mlp", weights(1))
    assert "layers.4, layers.4.mlp" in refused(tmp_path).found


def test_hookpoints_of_several_kinds_are_refused(tmp_path):
    write(tmp_path / "layers.4", weights(0))
    write(tmp_path / "layers.5.mlp", weights(1))
    error = refused(tmp_path)
    assert "several sites" in error.problem
    assert "layer 5: mlp_out -> mlp_out" in error.found


@pytest.mark.parametrize("name", ["h.4.mlp", "layers.4.mlp.gate_proj", "embed_tokens", "layers.x"])
def test_a_module_that_is_no_site_is_refused(tmp_path, name):
    write(tmp_path / name, weights(0))
    with pytest.raises(UserError, match="no site is at"):
        TranscoderStore.open(tmp_path)


@pytest.mark.parametrize("key", [*SHAPES, "W_skip"])
def test_a_missing_tensor_is_named(tmp_path, key):
    state = weights(0, skip=True)
    del state[key]
    write(tmp_path / "layers.0.mlp", state, transcode=True, skip_connection=True)
    assert f"lacks the tensor {key}" in refused(tmp_path).problem


@pytest.mark.parametrize("key", [*SHAPES, "W_skip"])
def test_a_tensor_of_another_shape_is_named(tmp_path, key):
    state = weights(0, skip=True)
    state[key] = state[key][:-1].clone()
    write(tmp_path / "layers.0.mlp", state, transcode=True, skip_connection=True, num_latents=FEATURES)
    assert "the wrong shape" in refused(tmp_path).problem


def test_numbers_that_are_no_floats_are_refused(tmp_path):
    write(tmp_path / "layers.0", weights(0) | {"b_dec": torch.zeros(D, dtype=torch.int32)})
    assert "b_dec holds no floating-point numbers" in refused(tmp_path).problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"signed": True}, "has the option signed"),
        ({"embed_skip": True}, "has the option embed_skip"),
        ({"n_targets": 3}, "cross-layer"),
        ({"skip_connection": True}, "copies what it reads"),
        ({"num_latents": 8}, "says num_latents 8"),
        ({"num_latents": 0, "expansion_factor": 3}, "says num_latents 36"),
        ({"d_in": 13}, "says d_in 13"),
        ({"k": 0}, "k cannot be 0"),
        ({"k": FEATURES + 1}, "k cannot be 41"),
        ({"k": True}, "k cannot be True"),
        ({"k": ...}, "k cannot be None"),
        ({"activation": "relu"}, "the activation relu"),
        ({"activation": "groupmax", "k": 7}, "the activation groupmax with k 7"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path, change, said):
    write(tmp_path / "layers.0", weights(0), **change)
    error = refused(tmp_path)
    assert said in error.problem
    assert error.where.endswith("cfg.json")


def test_a_skip_that_the_configuration_denies_is_refused(tmp_path):
    write(tmp_path / "layers.0.mlp", weights(0, skip=True), transcode=True)
    assert "unknown tensor W_skip" in refused(tmp_path).problem


@pytest.mark.parametrize("text", [None, "{", "[]", "3"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    write(tmp_path / "layers.0", weights(0))
    path = tmp_path / "layers.0" / "cfg.json"
    path.unlink() if text is None else path.write_text(text)
    error = refused(tmp_path)
    assert error.problem == "cfg.json cannot be read"
    assert error.where == str(path)


CLT = {  # SparseCoderConfig of EleutherAI/clt-training with one target
    "dtype": "none", "tp_output": True, "n_targets": 0, "n_sources": 0, "normalize_io": False,
    "train_post_encoder": True,
    "divide_cross_layer": False, "post_encoder_scale": False, "coalesce_topk": "none", "topk_coalesced": True,
    "matryoshka": False, "matryoshka_k_values": [], "use_fp8": False,
}  # fmt: skip


def test_clt_training_with_one_target_is_opened(tmp_path):
    tensors = weights(3)
    folder = tmp_path / "layers.2.mlp"
    write(folder, tensors | {"post_enc": torch.zeros(FEATURES)}, transcode=True, **CLT)
    x = inputs()
    check_formula(TranscoderStore.open(tmp_path)[2], x, dense(x, tensors, transcode=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_targets": 2}, "cross-layer"),
        ({"n_sources": 1}, "cross-layer"),
        ({"coalesce_topk": "concat"}, "cross-layer"),
        ({"post_encoder_scale": True}, "has the option post_encoder_scale"),
        ({"normalize_io": True}, "has the option normalize_io"),
        ({"activation": "batchtopk"}, "the activation batchtopk"),
    ],
)
def test_what_else_clt_training_trains_is_refused_for_what_it_is(tmp_path, change, said):
    write(tmp_path / "layers.2.mlp", weights(3), transcode=True, **(CLT | change))
    with pytest.raises(CheckpointError, match=said):
        TranscoderStore.open(tmp_path)


def test_a_bias_behind_topk_is_refused(tmp_path):
    write(tmp_path / "layers.2.mlp", weights(3) | {"post_enc": torch.full((FEATURES,), 0.1)}, transcode=True, **CLT)
    with pytest.raises(CheckpointError, match="post_enc is not 0"):
        TranscoderStore.open(tmp_path)


@pytest.mark.parametrize("key", ["transcode", "skip_connection"])
@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, [], 0.0])
def test_a_truth_value_is_true_or_false_and_nothing_else(tmp_path, key, value):
    write(tmp_path / "layers.2.mlp", weights(3), **{key: value})
    with pytest.raises(CheckpointError, match=f"{key} cannot be"):
        TranscoderStore.open(tmp_path)


@pytest.mark.parametrize("value", ["false", 1])
def test_a_truth_value_of_the_run_likewise(tmp_path, value):
    write(tmp_path / "layers.2.mlp", weights(3), transcode=...)
    write_json(tmp_path / "config.json", {"transcode": value})
    with pytest.raises(CheckpointError, match="transcode cannot be"):
        TranscoderStore.open(tmp_path)
