"""Llama Scope: normalised in training, one threshold for all features, and a decoder stored the other way round."""

import math
from pathlib import Path

import pytest
from format_checks import (
    FEATURES,
    D,
    check_formula,
    check_native_round_trip,
    inputs,
    jumprelu,
    randoms,
    topk,
    write_json,
)
from safetensors.torch import save_file
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError
from hooks.formats import recognise
from hooks.sites import SiteSpec

AVERAGE = 2.5
SHAPES = {
    "encoder.weight": (FEATURES, D),
    "encoder.bias": (FEATURES,),
    "decoder.weight": (D, FEATURES),
    "decoder.bias": (D,),
}


def hyperparams(layer: int, **changes: object) -> dict[str, object]:
    hook = f"blocks.{layer}.hook_resid_post"
    norms = {"in": AVERAGE, "out": AVERAGE}
    known = {"d_model": D, "d_sae": FEATURES, "act_fn": "jumprelu", "jump_relu_threshold": 1.5, "top_k": 5}
    known |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": norms, "use_decoder_bias": True}
    known |= {"hook_point_in": hook, "hook_point_out": hook, "apply_decoder_bias_to_pre_encoder": False}
    known |= {"sparsity_include_decoder_norm": True}
    return {key: value for key, value in (known | changes).items() if value is not ...}


def write(root: Path, layer: int = 3, **changes: object) -> dict[str, Tensor]:
    folder = root / f"Llama3_1-8B-Base-L{layer}R-8x"
    write_json(folder / "hyperparams.json", hyperparams(layer, **changes))
    (folder / "checkpoints").mkdir()
    tensors = randoms(layer, **SHAPES)
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    return tensors


def dense(x: Tensor, w: dict[str, Tensor], kind: str = "jumprelu", n: float = math.sqrt(D) / AVERAGE) -> tuple:
    """In training's units: n x goes in, and what comes out is divided by n. Activations are those of rows of norm 1."""
    x, w = x.double(), {key: part.double() for key, part in w.items()}
    norms = w["decoder.weight"].norm(dim=0)
    score = ((n * x) @ w["encoder.weight"].T + w["encoder.bias"]) / n * norms
    features = {"jumprelu": lambda: jumprelu(score, 1.5), "relu": score.relu, "topk": lambda: topk(score, 5)}[kind]()
    out = (features * n / norms) @ w["decoder.weight"].T + w["decoder.bias"]
    return features.float(), (out / n).float()


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "topk"])
def test_the_formula(tmp_path, kind):
    w = write(tmp_path, act_fn=kind)
    store = TranscoderStore.open(tmp_path)
    assert (store.layers, store.convention.read) == ((3,), SiteSpec("resid_post"))
    check_formula(store[3], inputs(), dense(inputs(), w, kind))


def test_weights_that_were_folded_already_are_left_alone(tmp_path):
    w = write(tmp_path, norm_activation="inference", dataset_average_activation_norm=...)
    check_formula(TranscoderStore.open(tmp_path)[3], inputs(), dense(inputs(), w, n=1.0))


def test_no_word_of_a_norm_is_assumed_to_be_none_and_said(tmp_path, caplog):
    w = write(tmp_path, norm_activation=..., dataset_average_activation_norm=...)
    check_formula(TranscoderStore.open(tmp_path)[3], inputs(), dense(inputs(), w, n=1.0))
    assert "assumed not to have been scaled" in caplog.text
    assert recognise(tmp_path).encoder_source == "assumed"


def test_several_layers_and_native_and_back(tmp_path):
    for layer in (0, 3):
        write(tmp_path / "set", layer)
    assert recognise(tmp_path / "set").format == "llama_scope"
    check_native_round_trip(tmp_path / "set", tmp_path / "native")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_average_activation_norm": {"in": 64.0, "out": 3.4}}, "in which unit the threshold"),
        (
            {"dataset_average_activation_norm": {"in": 0.0, "out": 0.0}},
            "dataset_average_activation_norm.in cannot be 0",
        ),
        ({"dataset_average_activation_norm": ...}, "dataset_average_activation_norm cannot be used"),
        ({"norm_activation": "token-wise"}, "norm_activation cannot be used"),
        ({"act_fn": "batchtopk"}, "act_fn cannot be used"),
        ({"jump_relu_threshold": "0.5"}, "jump_relu_threshold cannot be 0.5"),
        ({"jump_relu_threshold": float("nan")}, "jump_relu_threshold cannot be nan"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"use_decoder_bias": "false"}, "use_decoder_bias cannot be false"),
        ({"sparsity_include_decoder_norm": 0}, "sparsity_include_decoder_norm cannot be 0"),
        ({"act_fn": "topk", "top_k": 5.0}, "top_k cannot be 5.0"),
        ({"d_sae": FEATURES + 1}, "says d_sae"),
        ({"hook_point_in": "blocks.3.attn.hook_q"}, "hook_point_in cannot be used"),
        ({"hook_point_out": "blocks.2.hook_resid_post"}, "hook_point_out cannot be used"),
        ({"hook_point_in": "hook_resid_post"}, "hook_point_in cannot be used"),
    ],
    ids=str,
)
def test_what_cannot_be_held_or_is_not_sure_is_refused(tmp_path, change, said):
    write(tmp_path, **change)
    with pytest.raises(CheckpointError, match=said):
        TranscoderStore.open(tmp_path)
