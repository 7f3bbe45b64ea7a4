"""dictionary_learning: every class of the library, against its formula written densely."""

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
    jumprelu,
    randoms,
    refused,
    topk,
    write_json,
)
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.formats import recognise
from hooks.sites import Site, SiteSpec

K, THRESHOLD = 4, 0.6
LINEAR = {"encoder.weight": (FEATURES, D), "encoder.bias": (FEATURES,), "decoder.weight": (D, FEATURES)}
MATRICES = {"W_enc": (D, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, D), "b_dec": (D,)}
GATE = dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (FEATURES,))


def state_of(kind: str, seed: int) -> dict[str, Tensor]:
    """The state dict of a class, random, buffers included."""
    shapes = {
        "AutoEncoder": LINEAR | {"bias": (D,)},
        "AutoEncoderNew": LINEAR | {"decoder.bias": (D,)},
        "AutoEncoderTopK": LINEAR | {"b_dec": (D,)},
        "BatchTopKSAE": LINEAR | {"b_dec": (D,)},
        "MatryoshkaBatchTopKSAE": MATRICES,
        "JumpReluAutoEncoder": MATRICES | {"threshold": (FEATURES,)},
        "GatedAutoEncoder": {k: LINEAR[k] for k in ("encoder.weight", "decoder.weight")}
        | {"decoder_bias": (D,)}
        | GATE,
    }[kind]
    state = randoms(seed, **shapes)
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = state["threshold"].abs()
    if "TopK" in kind:
        state |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(THRESHOLD)}
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([8, 16, 16])
    return state


def dense(kind: str, w: dict[str, Tensor], x: Tensor) -> Formula:
    """Each class's encode and decode, as its own file has them."""
    match kind:
        case "AutoEncoder":
            features = torch.relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
            return features, features @ w["decoder.weight"].T + w["bias"]
        case "AutoEncoderNew":
            features = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"])
            return features, features @ w["decoder.weight"].T + w["decoder.bias"]
        case "AutoEncoderTopK":
            features = topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K)
            return features, features @ w["decoder.weight"].T + w["b_dec"]
        case "BatchTopKSAE":
            features = jumprelu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], THRESHOLD)
            return features, features @ w["decoder.weight"].T + w["b_dec"]
        case "MatryoshkaBatchTopKSAE":
            features = jumprelu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], THRESHOLD)
            return features, features @ w["W_dec"] + w["b_dec"]
        case "JumpReluAutoEncoder":
            features = jumprelu(x @ w["W_enc"] + w["b_enc"], w["threshold"])
            return features, features @ w["W_dec"] + w["b_dec"]
        case _:
            encoded = (x - w["decoder_bias"]) @ w["encoder.weight"].T
            gate = (encoded + w["gate_bias"] > 0).float()
            features = gate * torch.relu(w["r_mag"].exp() * encoded + w["mag_bias"])
            return features, features @ w["decoder.weight"].T + w["decoder_bias"]


KINDS = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("jumprelu", True),
}


def config(kind: str, layer: int | None, /, **changes: object) -> dict[str, object]:
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": kind,
        "lr": 5e-5,
        "steps": 1000,
        "seed": 0,
        "activation_dim": D,
        "dict_size": FEATURES,
        "device": "cuda:0",
        "layer": layer,
        "lm_name": "Qwen/Qwen2.5-7B-Instruct",
        "wandb_name": "x",
        "submodule_name": f"resid_post_layer_{layer}",
    }
    if "TopK" in kind:
        trainer["k"] = K
    buffer = {"d_submodule": D, "io": "out", "n_ctxs": 244, "ctx_len": 1024, "device": "cuda:0"}
    if "io" in changes:
        buffer["io"] = changes.pop("io")
    return {"trainer": trainer | changes, "buffer": buffer}


def write(folder: Path, kind: str, layer: int | None, /, *, seed: int = 0, **changes: object) -> dict[str, Tensor]:
    state = state_of(kind, seed)
    write_json(folder / "config.json", config(kind, layer, **changes))
    torch.save(state, folder / "ae.pt")
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_computes_its_formula_and_converts(tmp_path, kind):
    root, (activation, centred) = tmp_path / "set", KINDS[kind]
    states = {layer: write(root / f"layer{layer}" / "trainer_0", kind, layer, seed=layer) for layer in (3, 19)}
    check_only("dictionary_learning", root)
    found = recognise(root)
    assert found.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert (found.read, found.write, found.sites_source) == (SiteSpec("resid_post"), SiteSpec("resid_post"), "stored")
    store = TranscoderStore.open(root)
    assert store.layers == (3, 19)
    assert store.k(19) == (K if activation == "topk" else None)
    for layer, state in states.items():
        assert store[layer].activation == activation
        assert (store[layer].shift is not None) == centred
        check_formula(store[layer], inputs(), dense(kind, state, inputs()))
    assert found.layers[0].metadata["steps"] == 1000
    check_native_round_trip(root, tmp_path / "native")


def test_one_folder_opens_by_itself(tmp_path):
    state = write(tmp_path, "AutoEncoder", 7)
    check_only("dictionary_learning", tmp_path)
    check_formula(TranscoderStore.open(tmp_path)[7], inputs(), dense("AutoEncoder", state, inputs()))


def test_the_folded_gate_agrees_at_its_edge(tmp_path):
    """A feature whose gate opens above 0 does not count in between; one whose gate opens below 0 is a plain ReLU."""
    state = state_of("GatedAutoEncoder", 1)
    state["encoder.weight"] = torch.eye(D).repeat(4, 1)[:FEATURES]
    state |= {"decoder_bias": torch.zeros(D), "r_mag": torch.full((FEATURES,), 0.5), "mag_bias": torch.zeros(FEATURES)}
    state["gate_bias"] = torch.where(torch.arange(FEATURES) % 2 == 0, -1.0, 2.0)
    write_json(tmp_path / "config.json", config("GatedAutoEncoder", 0))
    torch.save(state, tmp_path / "ae.pt")
    transcoder = TranscoderStore.open(tmp_path)[0]
    x = torch.tensor([[0.99], [1.01], [0.01], [-0.5]]).expand(4, D)
    features = transcoder.encode(x).dense(FEATURES)
    rise = torch.tensor(0.5).exp()
    even, odd = torch.tensor([0, 1.01, 0, 0]) * rise, torch.tensor([0.99, 1.01, 0.01, 0]) * rise
    torch.testing.assert_close(features[:, 0], even)
    torch.testing.assert_close(features[:, 1], odd)


def test_a_topk_class_does_not_use_its_threshold(tmp_path):
    state = write(tmp_path, "AutoEncoderTopK", 0)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    assert TranscoderStore.open(tmp_path)[0].threshold is None


def test_half_precision_is_kept(tmp_path):
    state = write(tmp_path, "BatchTopKSAE", 0)
    torch.save({key: t.bfloat16() if t.ndim else t for key, t in state.items()}, tmp_path / "ae.pt")
    transcoder = TranscoderStore.open(tmp_path)[0]
    assert transcoder.W_enc.dtype == transcoder.W_dec.dtype == torch.bfloat16
    assert transcoder.threshold is not None
    assert transcoder.threshold.tolist() == [torch.tensor(THRESHOLD).item()] * FEATURES


# -- where it sits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "io", "read", "written"),
    [
        ("resid_post_layer_5", "out", "resid_post", "resid_post"),
        ("resid_post", ..., "resid_post", "resid_post"),
        ("resid_5", "out", "resid_post", "resid_post"),
        ("resid_5", "in", "resid_pre", "resid_pre"),
        ("resid_5", "in_and_out", "resid_pre", "resid_post"),
        ("mlp_5", "out", "mlp_out", "mlp_out"),
        ("mlp_out_layer_5", "out", "mlp_out", "mlp_out"),
        ("mlp_5", "in_and_out", "mlp_in", "mlp_out"),
        ("attn_5", "out", "attn_out", "attn_out"),
    ],
)
def test_a_named_submodule_is_stored(tmp_path, name, io, read, written):
    write(tmp_path, "AutoEncoder", 5, submodule_name=name, io=io if io is not ... else "out")
    if io is ...:
        whole = config("AutoEncoder", 5, submodule_name=name)
        write_json(tmp_path / "config.json", {"trainer": whole["trainer"]})
    store = TranscoderStore.open(tmp_path)
    assert store.sites(5) == (Site(read, 5), Site(written, 5))
    assert store.convention.source == "stored"


@pytest.mark.parametrize(
    ("io", "read", "written"),
    [("out", "resid_post", "resid_post"), ("in", "resid_pre", "resid_pre"), ("in_and_out", "resid_pre", "resid_post")],
)
def test_an_empty_name_means_an_assumed_residual_stream(tmp_path, caplog, io, read, written):
    write(tmp_path, "AutoEncoder", 5, submodule_name=None, io=io)
    store = TranscoderStore.open(tmp_path)
    assert store.sites(5) == (Site(read, 5), Site(written, 5))
    assert store.convention.source == "assumed"
    assert "residual stream is assumed" in caplog.text
    other = TranscoderStore.open(tmp_path, read="mlp_out", write="mlp_out")
    assert (other.convention.read, other.convention.source) == (SiteSpec("mlp_out"), "given")


@pytest.mark.parametrize(
    ("name", "io"),
    [
        ("resid_post_layer_5", "in"),
        ("attn_5", "in_and_out"),
        ("dit_block", "out"),
        ("mlp_post_5", "out"),
        ("mlp_5", "x"),
    ],
)
def test_what_is_no_known_site_is_unknown_and_said(tmp_path, caplog, name, io):
    write(tmp_path, "AutoEncoder", 5, submodule_name=name, io=io)
    found = recognise(tmp_path)
    assert (found.read, found.write, found.sites_source) == (None, None, "unknown")
    store = TranscoderStore.open(tmp_path, read="mlp_out", write="mlp_out")
    assert store.convention.source == "given"
    assert "no site that is known here" in caplog.text


def test_the_layer_may_stand_in_the_name_alone(tmp_path):
    write(tmp_path, "AutoEncoder", None, submodule_name="resid_11")
    assert TranscoderStore.open(tmp_path).layers == (11,)


@pytest.mark.parametrize("change", [{"layer": None, "submodule_name": None}, {"submodule_name": "resid_post_layer_4"}])
def test_a_layer_that_is_not_said_or_said_twice_differently_is_refused(tmp_path, change):
    write(tmp_path, "AutoEncoder", 5, **change)
    assert "does not say which layer" in refused(tmp_path).problem


# -- what is wrong with a folder -------------------------------------------------------------------------------------


def test_several_trainers_of_a_layer_are_refused(tmp_path):
    for trainer in range(3):
        write(tmp_path / f"trainer_{trainer}", "AutoEncoderTopK", 5)
    error = refused(tmp_path)
    assert "several dictionaries for layer 5" in error.problem
    assert error.found == "trainer_0, trainer_1, trainer_2"


def test_layers_at_several_sites_are_refused(tmp_path):
    write(tmp_path / "a", "AutoEncoder", 1, submodule_name="mlp_1")
    write(tmp_path / "b", "AutoEncoder", 2, submodule_name="resid_2")
    assert "several sites" in refused(tmp_path).problem


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, kind):
    needed = [key for key in state_of(kind, 0) if key not in ("k", "group_sizes")]
    if kind == "AutoEncoderTopK":
        needed.remove("threshold")
    for key in needed:
        state = write(tmp_path, kind, 0)
        torch.save({name: tensor for name, tensor in state.items() if name != key}, tmp_path / "ae.pt")
        assert f"lacks the tensor {key}" in refused(tmp_path).problem
        torch.save(state | {key: torch.zeros(2, 3, 4)}, tmp_path / "ae.pt")
        assert f"ae.pt: {key} " in refused(tmp_path).problem


def test_an_unknown_tensor_is_refused(tmp_path):
    torch.save(write(tmp_path, "AutoEncoder", 0) | {"W_skip": torch.eye(D)}, tmp_path / "ae.pt")
    assert "unknown tensor W_skip" in refused(tmp_path).problem


def test_the_weights_of_another_class_are_refused(tmp_path):
    write(tmp_path, "AutoEncoder", 0)
    torch.save(state_of("JumpReluAutoEncoder", 0), tmp_path / "ae.pt")
    assert "lacks the tensor encoder.weight" in refused(tmp_path).problem


@pytest.mark.parametrize("kind", ["CrossCoder", "IdentityDict", "", None, ["AutoEncoder"]])
def test_an_unknown_class_is_refused(tmp_path, kind):
    write(tmp_path, "AutoEncoder", 0, dict_class=kind)
    error = refused(tmp_path)
    assert "names the unknown class" in error.problem
    assert "GatedAutoEncoder" in error.expected


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_measured_is_refused(tmp_path, kind, threshold):
    torch.save(write(tmp_path, kind, 0) | {"threshold": torch.tensor(threshold)}, tmp_path / "ae.pt")
    assert "the threshold is" in refused(tmp_path).problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 3}, "says k 3"),
        ({"k": 0}, "k cannot be 0"),
        ({"k": None}, "k cannot be None"),
        ({"k": FEATURES + 1}, "k cannot be 41"),
        ({"activation_dim": 7}, "says activation_dim 7"),
        ({"dict_size": 7}, "says dict_size 7"),
        ({"layer": -1}, "layer cannot be -1"),
        ({"layer": "5"}, "layer cannot be 5"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(tmp_path, change, said):
    write(tmp_path, "AutoEncoderTopK", 5, **change)
    assert said in refused(tmp_path).problem


@pytest.mark.parametrize("content", [{}, {"trainer": 3}, {"trainer": {}, "buffer": 3}])
def test_another_configuration_describes_no_dictionary(tmp_path, content):
    write(tmp_path, "AutoEncoder", 0)
    write_json(tmp_path / "config.json", content)
    assert refused(tmp_path).where.endswith("config.json")


def test_without_its_configuration_it_is_refused(tmp_path):
    write(tmp_path, "AutoEncoder", 0)
    (tmp_path / "config.json").unlink()
    assert "config.json cannot be read" in refused(tmp_path).problem
