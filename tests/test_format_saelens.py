"""SAELens: each architecture computes what SAELens computes, whichever version wrote it; the rest is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hooks.checkpoints import TranscoderStore, convert
from hooks.errors import CheckpointError
from hooks.formats import native, recognise
from hooks.formats._folds import fold_gate
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

D, FEATURES, K, LAYER = 20, 100, 9, 3
NORMED = f"blocks.{LAYER}.ln2.hook_normalized"
VECTORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in VECTORS if name != "topk"},
    "topk": ("topk", {"k": K}),
    "topk, rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk, b_dec kept": ("topk", {"k": K, "apply_b_dec_to_input": False}),
    "topk, rescaled, b_dec kept": (
        "topk",
        {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    ),
    "standard, b_dec kept": ("standard", {"apply_b_dec_to_input": False}),
    "gated, b_dec kept": ("gated", {"apply_b_dec_to_input": False}),
    "jumprelu, b_dec kept": ("jumprelu", {"apply_b_dec_to_input": False}),
    "transcoder, normed": ("transcoder", {"hook_name": NORMED}),
    "jumprelu skip, normed": ("jumprelu_skip_transcoder", {"hook_name": NORMED}),
}


def state(
    architecture: str, seed: int = 0, d: int = D, f: int = FEATURES, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`sae_weights.safetensors`: the encoder is stored [d_model feature]."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)}
    shapes |= dict.fromkeys(VECTORS[architecture], (f,)) | ({"W_skip": (d, d)} if "skip" in architecture else {})
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in tensors:
        tensors["threshold"] *= 3  # also below zero, where SAELens' ReLU decides
    if "b_gate" in tensors:
        tensors = tensors | {name: 2 * tensors[name] for name in ("b_gate", "b_mag")}
        tensors["r_mag"] *= 0.5
    tensors["W_dec"] *= 1 + torch.rand(f, 1, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def config(architecture: str, layer: int = LAYER, **entries: Any) -> dict[str, Any]:
    """`cfg.json` of version 6. Entries of `metadata` are given beside the others; `...` leaves one away."""
    transcoder = "transcoder" in architecture
    metadata = {
        "sae_lens_version": "6.54.12",
        "model_name": "qwen2.5-7b",
        "model_class_name": "HookedTransformer",
        "hook_name": f"blocks.{layer}.hook_resid_mid" if transcoder else f"blocks.{layer}.hook_resid_post",
        "hook_head_index": None,
        "prepend_bos": False,
        "context_size": 1024,
        "dataset_path": "some/texts",
    } | ({"hook_name_out": f"blocks.{layer}.hook_mlp_out"} if transcoder else {})
    own = {name: entries.pop(name) for name in list(entries) if name.startswith(("hook_", "model_", "sae_lens"))}
    top = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
    } | ({"d_out": D} if transcoder else {})
    cfg = {**top, **entries, "metadata": {k: v for k, v in {**metadata, **own}.items() if v is not ...}}
    return {key: value for key, value in cfg.items() if value is not ...}


def write(folder: Path, cfg: object, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def formula(
    x: Tensor,
    tensors: dict[str, Tensor],
    architecture: str,
    *,
    k: int = K,
    rescale_acts_by_decoder_norm: bool = False,
    apply_b_dec_to_input: bool = True,
    hook_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Features and reconstruction in SAELens' own terms: gate beside magnitude, norms where it applies them."""
    t, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    if "hook_normalized" in hook_name:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    inner = x - t["b_dec"] if apply_b_dec_to_input and "transcoder" not in architecture else x
    norm = t["W_dec"].norm(dim=-1) if rescale_acts_by_decoder_norm else torch.ones(len(t["W_dec"])).double()
    if architecture == "gated":
        magnitude = (inner @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).clamp_min(0)
        features = magnitude * (inner @ t["W_enc"] + t["b_gate"] > 0)
    else:
        pre = (inner @ t["W_enc"] + t["b_enc"]) * norm
        features = pre.clamp_min(0)
        if "threshold" in t:
            features = features * (pre > t["threshold"])
        elif architecture == "topk":
            top = pre.topk(k)
            features = torch.zeros_like(pre).scatter(-1, top.indices, top.values.clamp_min(0))
    skipped = x @ t["W_skip"].T if "W_skip" in t else 0
    return features, (features / norm) @ t["W_dec"] + t["b_dec"] + skipped


def inputs(seed: int = 9) -> Tensor:
    return 3 * torch.randn(2, 7, D, generator=torch.Generator().manual_seed(seed)) + 0.4


def check_against_formula(root: Path, tensors: dict[str, Tensor], architecture: str, **entries: Any) -> None:
    """In fp64 on both sides: only the order of sums of 20 and 100 terms, and of the folded products, differs."""
    x = inputs()
    features, reconstruction = formula(x, tensors, architecture, **entries)
    transcoder = TranscoderStore.open(root, dtype=torch.float64)[LAYER]
    acts = transcoder.encode(x)
    found = acts.dense(FEATURES)
    assert 0 < found.count_nonzero() < found.numel()
    if transcoder.W_enc.dtype == tensors["W_enc"].dtype or not folded(architecture, entries):
        tolerance = {"rtol": 1e-11, "atol": 1e-10}
    else:  # folded in fp32, then cast: one rounding of 6e-8 per weight, 20 or 100 terms of size 10
        tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found, features, **tolerance)
    torch.testing.assert_close(transcoder.reconstruct(acts, x), reconstruction, **tolerance)


def folded(architecture: str, entries: dict[str, Any]) -> bool:
    return architecture == "gated" or bool(entries.get("rescale_acts_by_decoder_norm"))


def assert_same(one: Transcoder, other: Transcoder) -> None:
    """Bit for bit: every weight, every feature, every reconstruction."""
    for name in WEIGHTS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    for name in ("layer", "read", "write", "k", "groups", "norm_eps", "activation"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.norm_weight is None or one.norm_centred == other.norm_centred
    x = inputs()
    acts = one.encode(x)
    assert torch.equal(acts.dense(FEATURES), other.encode(x).dense(FEATURES))
    assert torch.equal(one.reconstruct(acts, x), other.reconstruct(other.encode(x), x))


# -- what is opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_computes_what_saelens_computes(tmp_path, variant, dtype):
    architecture, entries = VARIANTS[variant]
    tensors = state(architecture, dtype=dtype)
    check_against_formula(write(tmp_path, config(architecture, **entries), tensors), tensors, architecture, **entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_to_native_nothing_changes(tmp_path, variant, dtype):
    architecture, entries = VARIANTS[variant]
    store = TranscoderStore.open(
        write(tmp_path / "set", config(architecture, **entries), state(architecture, dtype=dtype))
    )
    convention = store.convention
    native.save(tmp_path / "native", store, read=convention.read, write=convention.write)
    again = TranscoderStore.open(tmp_path / "native")
    assert_same(store[LAYER], again[LAYER])


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_folded_in_fp32_and_otherwise_left_alone(tmp_path, variant):
    architecture, entries = VARIANTS[variant]
    tensors = state(architecture, dtype=torch.bfloat16)
    root = write(tmp_path, config(architecture, **entries), tensors)
    check_against_formula(root, tensors, architecture, **entries)
    transcoder = TranscoderStore.open(root)[LAYER]
    is_folded = folded(architecture, entries)
    assert transcoder.W_enc.dtype == (torch.float32 if is_folded else torch.bfloat16)
    if not is_folded:
        assert torch.equal(transcoder.W_enc, tensors["W_enc"].T)
    assert TranscoderStore.open(root, dtype=torch.bfloat16)[LAYER].W_enc.dtype == torch.bfloat16


def test_a_gate_is_a_threshold():
    """By hand, one feature: open above x = 3, magnitude 2 x − 0.5, which is 5.5 there."""
    one = torch.ones(1)
    weights = {"W_enc": torch.ones(1, 1), "b_gate": -3 * one, "r_mag": torch.log(2 * one), "b_mag": -0.5 * one}
    out = fold_gate(weights | {"W_dec": torch.ones(1, 1)})
    torch.testing.assert_close(out["threshold"], torch.tensor([5.5]))
    torch.testing.assert_close(out["W_enc"], torch.tensor([[2.0]]))
    torch.testing.assert_close(out["b_enc"], torch.tensor([-0.5]))
    assert set(out) == {"W_enc", "b_enc", "threshold", "W_dec"}
    open_gate = fold_gate(weights | {"b_gate": one})  # open above x = −1, where the magnitude is −2.5: ReLU decides
    assert open_gate["threshold"].item() == 0


def test_a_decoder_row_of_zeros_stays_one(tmp_path):
    tensors = state("topk")
    tensors["W_dec"][5] = 0
    root = write(tmp_path, config("topk", k=FEATURES, rescale_acts_by_decoder_norm=True), tensors)
    transcoder = TranscoderStore.open(root)[LAYER]
    assert not transcoder.W_dec[5].any()
    assert not transcoder.encode(inputs()).dense(FEATURES)[..., 5].any()


@pytest.mark.parametrize("version", ["3.22.2", None])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk by function", "jumprelu", "gated"])
def test_flat_configurations_of_older_versions(tmp_path, kind, version):
    architecture = kind.split()[0]
    tensors = state(architecture)
    cfg = {
        "architecture": "standard" if kind == "topk by function" else architecture,
        "d_in": D,
        "d_sae": FEATURES,
        "activation_fn_str": "topk" if architecture == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if architecture == "topk" else {},
        "model_name": "gpt2-small",
        "hook_name": f"blocks.{LAYER}.hook_resid_pre",
        "hook_layer": LAYER,
        "hook_head_index": None,
        "prepend_bos": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "l1_coefficient": 5,
    }
    cfg |= {"sae_lens_training_version": version} if version else {}
    root = write(tmp_path, cfg, tensors)
    check_against_formula(root, tensors, architecture)
    found = recognise(root)
    assert (found.base_model, found.read, found.write) == ("gpt2-small", SiteSpec("resid_pre"), SiteSpec("resid_pre"))
    assert found.layers[0].metadata["prepend_bos"] is True


def test_the_oldest_configurations(tmp_path):
    """`hook_point`, a boolean `normalize_activations`, no architecture, and a scaling factor of ones."""
    tensors = state("standard")
    cfg = {
        "d_in": D,
        "d_sae": FEATURES,
        "model_name": "gpt2-small",
        "hook_point": f"blocks.{LAYER}.hook_mlp_out",
        "hook_point_layer": LAYER,
        "hook_point_head_index": None,
        "normalize_activations": False,
    }
    root = write(tmp_path, cfg, tensors | {"scaling_factor": torch.ones(FEATURES)})
    check_against_formula(root, tensors, "standard")
    assert recognise(root).write == SiteSpec("mlp_out")


def test_what_the_files_say(tmp_path):
    found = recognise(write(tmp_path, config("topk", k=K), state("topk")))
    assert found.format == "saelens"
    assert found.facts() == {
        "base_model": ("qwen2.5-7b", "stored"),
        "read": ("resid_post", "stored"),
        "write": ("resid_post", "stored"),
        "input_norm": ("none", "stored"),
        "activation": ("topk", "stored"),
        "k": (str(K), "stored"),
    }
    assert found.notes == found.selection_notes == ()
    about = found.layers[0].metadata
    assert (about["prepend_bos"], about["context_size"], about["architecture"]) == (False, 1024, "topk")


def test_a_transcoder_may_write_a_later_layer(tmp_path):
    cfg = config("transcoder", hook_name_out=f"blocks.{LAYER + 1}.hook_mlp_out")
    store = TranscoderStore.open(write(tmp_path, cfg, state("transcoder")))
    assert store.sites(LAYER) == (Site("resid_mid", LAYER), Site("mlp_out", LAYER + 1))
    assert str(store.convention.write) == "mlp_out+1"


@pytest.mark.parametrize("depth", [1, 2])
def test_folders_are_a_set_and_a_missing_layer_is_not_shifted(tmp_path, depth):
    states = {layer: state("topk", seed=layer) for layer in (0, 2, 11)}
    for layer, tensors in states.items():
        folder = tmp_path / f"blocks.{layer}.hook_resid_post"
        write(folder / "width_100" if depth == 2 else folder, config("topk", layer, k=K), tensors)
    store = TranscoderStore.open(tmp_path)
    assert store.layers == (0, 2, 11)
    for layer, tensors in states.items():
        assert torch.equal(store[layer].W_enc, tensors["W_enc"].T)
        assert store[layer].write == Site("resid_post", layer)


def test_a_normed_hook_is_said_to_be_assumed(tmp_path, caplog):
    root = write(tmp_path, config("transcoder", hook_name=NORMED), state("transcoder"))
    with caplog.at_level(logging.WARNING, "hooks"):
        store = TranscoderStore.open(root)
    assert "eps 1e-06 is assumed" in caplog.text
    assert recognise(root).facts()["input_norm"] == ("rms", "assumed")
    assert store.convention.read == SiteSpec("resid_mid")


@pytest.mark.parametrize("value", ["expected_average_only_in", True])
def test_scaled_inputs_are_opened_as_saelens_opens_them_and_said_aloud(tmp_path, value):
    tensors = state("standard")
    root = write(tmp_path, config("standard", normalize_activations=value), tensors)
    check_against_formula(root, tensors, "standard")
    found = recognise(root)
    assert found.encoder_source == "assumed"
    assert any("a number that is not stored" in note for note in found.notes)


@pytest.mark.parametrize("entry", ["fold_ln", "center_writing_weights"])
def test_a_rewritten_base_model_is_said_aloud(tmp_path, entry):
    cfg = config("standard", model_from_pretrained_kwargs={entry: True, "n_devices": 2})
    assert any(entry in note for note in recognise(write(tmp_path, cfg, state("standard"))).notes)
    cfg = config("standard", model_from_pretrained_kwargs={entry: False})
    assert not recognise(write(tmp_path, cfg, state("standard"))).notes


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_convert_to_circuit_tracers_layout(tmp_path, architecture):
    for layer in (0, 1):
        write(tmp_path / "set" / f"layer_{layer}", config(architecture, layer), state(architecture, seed=layer))
    done = convert(tmp_path / "set", tmp_path / "out", to="circuit_tracer")
    assert done.layers == (0, 1)
    one, other = TranscoderStore.open(tmp_path / "set"), TranscoderStore.open(tmp_path / "out")
    assert (other.convention.read, other.convention.write) == (SiteSpec("resid_mid"), SiteSpec("mlp_out"))
    for layer in (0, 1):
        lifted = architecture.startswith("jumprelu")
        assert not lifted or one[layer].threshold.min() == 0  # below it circuit-tracer has no ReLU
        assert_same(one[layer], other[layer])


def test_a_shift_does_not_convert_to_circuit_tracers_layout(tmp_path):
    write(tmp_path / "set", config("topk", 0, k=K), state("topk"))
    with pytest.raises(CheckpointError, match="no field for a shift of the input"):
        convert(tmp_path / "set", tmp_path / "out", to="circuit_tracer")
    assert not (tmp_path / "out").exists()


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(root: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        list(TranscoderStore.open(root))
    assert str(root) in caught.value.where
    assert all((caught.value.expected, caught.value.found, caught.value.repair))
    return caught.value


@pytest.mark.parametrize(
    "architecture",
    ["temporal", "matching_pursuit", "abstopk", "batchtopk", "matryoshka_batchtopk", "", 7, ["topk"], None],
)
def test_other_architectures_are_refused_by_name(tmp_path, architecture):
    cfg = config("standard") | {"architecture": architecture}
    error = refused(write(tmp_path, cfg, state("standard")))
    named = "a list of 1" if isinstance(architecture, list) else architecture
    assert f"architecture {named} " in error.problem
    assert "jumprelu_skip_transcoder" in error.expected


@pytest.mark.parametrize(
    ("architecture", "entries", "key"),
    [
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations"),
        ("standard", {"normalize_activations": "constant_norm_rescale"}, "normalize_activations"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "normalize_activations"),
        ("standard", {"normalize_activations": {"a": 1}}, "normalize_activations"),
        ("standard", {"normalize_activations": 5}, "normalize_activations"),
        ("standard", {"reshape_activations": "hook_z"}, "reshape_activations"),
        ("standard", {"hook_head_index": 4}, "hook_head_index"),
        ("transcoder", {"hook_head_index_out": 0}, "hook_head_index_out"),
        ("standard", {"hook_name": f"blocks.{LAYER}.attn.hook_z"}, "hook_name"),
        ("standard", {"hook_name": "hook_embed"}, "hook_name"),
        ("standard", {"hook_name": "hook_resid_pre"}, "hook_name"),
        ("standard", {"hook_name": ...}, "hook_name"),
        ("standard", {"hook_name": 3}, "hook_name"),
        ("standard", {"hook_name": NORMED}, "hook_name"),
        ("standard", {"hook_name": f"model.layers.{LAYER}"}, "hook_name"),
        ("transcoder", {"hook_name_out": ...}, "hook_name_out"),
        ("transcoder", {"hook_name_out": NORMED}, "hook_name_out"),
        ("transcoder", {"hook_name_out": f"blocks.{LAYER - 1}.hook_mlp_out"}, "hook_name_out"),
        ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ("jumprelu", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ("standard", {"activation_fn": "tanh-relu"}, "activation_fn"),
        ("jumprelu", {"activation_fn": "topk"}, "activation_fn"),
        ("standard", {"activation_fn": ["relu"]}, "activation_fn"),
        ("topk", {"k": ...}, "k"),
        ("topk", {"k": 0}, "k"),
        ("topk", {"k": FEATURES + 1}, "k"),
        ("topk", {"k": 1.5}, "k"),
        ("topk", {"k": True}, "k"),
    ],
)
def test_a_setting_of_no_use_is_named(tmp_path, architecture, entries, key):
    entries = ({"k": K} if architecture == "topk" else {}) | entries
    assert f"cfg.json: {key} " in refused(write(tmp_path, config(architecture, **entries), state(architecture))).problem


@pytest.mark.parametrize(("key", "value"), [("d_in", 64), ("d_sae", 5), ("d_out", D + 1)])
def test_sizes_that_contradict_the_tensors_are_refused(tmp_path, key, value):
    error = refused(write(tmp_path, config("transcoder", **{key: value}), state("transcoder")))
    assert f"{key} {value}" in error.problem


@pytest.mark.parametrize("change", ["missing", "short", "integer", "deep"])
@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name in ("gated", "jumprelu_skip_transcoder") for key in state(name)]
)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, architecture, key, change):
    tensors = state(architecture)
    if change == "missing":
        del tensors[key]
    else:
        old = tensors[key]
        tensors[key] = {"short": old[:-1].clone(), "integer": old.int(), "deep": old[None].clone()}[change]
    cfg = config(architecture, d_in=..., d_out=...)
    error = refused(write(tmp_path, cfg, tensors))
    assert "sae_weights.safetensors" in error.where
    # every other tensor is measured by W_enc, so one row less of it is one too many of the next
    assert key in error.problem or (key, change) == ("W_enc", "short")


@pytest.mark.parametrize("extra", ["log_threshold", "b_mag"])
def test_a_tensor_that_belongs_to_something_else_is_refused(tmp_path, extra):
    tensors = state("standard") | {extra: torch.ones(FEATURES)}
    assert extra in refused(write(tmp_path, config("standard"), tensors)).problem


def test_a_decoder_that_was_scaled_afterwards_is_refused(tmp_path):
    tensors = state("standard") | {"scaling_factor": torch.full((FEATURES,), 1.1)}
    assert "scaling_factor" in refused(write(tmp_path, config("standard"), tensors)).problem


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '"cfg"', "[" * 100_000, "\x00"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    root = write(tmp_path, {}, state("standard"))
    (root / "cfg.json").write_text(text)
    assert "cfg.json cannot be read" in refused(root).problem


def test_metadata_that_is_none_is_refused(tmp_path):
    error = refused(write(tmp_path, config("standard") | {"metadata": "none"}, state("standard")))
    assert "cfg.json: metadata " in error.problem


def test_weights_without_a_configuration_are_refused(tmp_path):
    root = write(tmp_path, {}, state("standard"))
    (root / "cfg.json").unlink()
    assert "cfg.json cannot be read" in refused(root).problem


def test_damaged_weights_are_refused(tmp_path):
    root = write(tmp_path, config("standard"), state("standard"))
    path = root / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "safetensors" in refused(root).problem


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_a_weight_that_is_no_number_is_refused(tmp_path, architecture):
    tensors = state(architecture)
    tensors["threshold" if architecture == "jumprelu" else "r_mag"][4] = torch.nan
    assert "NaN" in refused(write(tmp_path, config(architecture), tensors)).problem


def test_two_dictionaries_for_one_layer_are_refused(tmp_path):
    for width in (16, 32):
        write(tmp_path / f"width_{width}", config("standard"), state("standard", seed=width))
    error = refused(tmp_path)
    assert f"layer {LAYER}" in error.problem
    assert "width_16, width_32" in error.found


@pytest.mark.parametrize(
    "entries",
    [{"hook_name": "blocks.5.hook_mlp_out"}, {"hook_name_out": "blocks.6.hook_mlp_out"}, {"model_name": "gpt2-small"}],
    ids=str,
)
def test_folders_that_are_no_set_are_refused(tmp_path, entries):
    write(tmp_path / "a", config("transcoder"), state("transcoder"))
    write(tmp_path / "b", config("transcoder", layer=5, **entries), state("transcoder"))
    refused(tmp_path)


def test_a_normed_and_a_plain_hook_are_no_set(tmp_path):
    write(tmp_path / "a", config("transcoder", hook_name=NORMED), state("transcoder"))
    write(tmp_path / "b", config("transcoder", layer=5), state("transcoder"))
    assert "hook_name" in refused(tmp_path).problem


def test_folders_of_different_width_are_refused(tmp_path):
    write(tmp_path / "a", config("standard"), state("standard"))
    write(tmp_path / "b", config("standard", layer=5, d_in=24), state("standard", d=24))
    assert "different widths" in refused(tmp_path).problem
