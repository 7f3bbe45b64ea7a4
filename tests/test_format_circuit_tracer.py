"""circuit-tracer sets: opened they compute what circuit-tracer computes; written, they open again bit for bit."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from worlds import random_transcoder

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError, UserError
from hooks.files import safetensors_shapes
from hooks.formats import circuit_tracer, native, recognise
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

D, FEATURES, K = 20, 100, 7
RAW, NORMED = "hook_resid_mid", "ln2.hook_normalized"
THRESHOLD = "activation_function.threshold"
VARIANTS = {  # name -> (entries of the configuration, tensors beside the four)
    "relu": ({"activation": "relu"}, ()),
    "unnamed relu": ({}, ()),
    "jumprelu": ({"activation": "jumprelu"}, (THRESHOLD,)),
    "unnamed jumprelu": ({}, (THRESHOLD,)),
    "topk": ({"activation": "topk", "k": K}, ()),
    "relu, skip": ({"activation": "relu"}, ("W_skip",)),
    "jumprelu, skip": ({}, (THRESHOLD, "W_skip")),
    "topk, skip": ({"activation": "topk", "k": K}, ("W_skip",)),
}


def state(
    seed: int, extra: tuple[str, ...] = (), d: int = D, f: int = FEATURES, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One layer's file: both matrices have a feature per row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (f, d), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), THRESHOLD: (f,), "W_skip": (d, d)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors[THRESHOLD] = 3 * tensors[THRESHOLD].abs()
    return {
        key: tensor.to(dtype) for key, tensor in tensors.items() if key in (*shapes, *extra) and key in KEYS + extra
    }


KEYS = ("W_enc", "b_enc", "W_dec", "b_dec")


def config(**entries: Any) -> dict[str, Any]:
    known = {
        "model_name": "Qwen/Qwen3-0.6B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "somebody/transcoders",
    }
    return {key: value for key, value in (known | entries).items() if value is not ...}


def write(root: Path, states: dict[int, dict[str, Tensor]], **entries: Any) -> Path:
    root.mkdir(exist_ok=True)
    for layer, tensors in states.items():
        save_file(tensors, root / f"layer_{layer}.safetensors")
    (root / "config.yaml").write_text(yaml.safe_dump(config(**entries)))
    return root


def formula(x: Tensor, tensors: dict[str, Tensor], k: int | None, hook: str = RAW) -> tuple[Tensor, Tensor]:
    """Features and reconstruction, all features at once, as circuit-tracer has them."""
    t = {key: tensor.double() for key, tensor in tensors.items()}
    x = x.double()
    if hook == NORMED:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    pre = x @ t["W_enc"].T + t["b_enc"]
    if k is not None:
        features = pre * torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, 1)
        assert (features >= 0).all(), "a fixture on which the two meanings of TopK differ"
    elif THRESHOLD in t:
        features = pre * (pre > t[THRESHOLD])
    else:
        features = pre.clamp_min(0)
    skipped = x @ t["W_skip"].T if "W_skip" in t else 0
    return features, features @ t["W_dec"] + t["b_dec"] + skipped


def inputs(seed: int = 9) -> Tensor:
    return 3 * torch.randn(2, 7, D, generator=torch.Generator().manual_seed(seed)) + 0.4


def assert_same(one: Transcoder, other: Transcoder) -> None:
    """Bit for bit: every weight, every feature, every reconstruction."""
    for name in WEIGHTS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
    for name in ("k", "groups", "norm_centred", "norm_eps"):
        assert getattr(one, name) == getattr(other, name), name
    x = inputs()
    acts = one.encode(x)
    assert torch.equal(acts.dense(FEATURES), other.encode(x).dense(FEATURES))
    assert torch.equal(one.reconstruct(acts, x), other.reconstruct(other.encode(x), x))


# -- what is opened ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [RAW, NORMED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_set_computes_what_circuit_tracer_computes(tmp_path, variant, hook):
    entries, extra = VARIANTS[variant]
    states = {layer: state(layer, extra) for layer in range(3)}
    root = write(tmp_path / "set", states, feature_input_hook=hook, **entries)
    store = TranscoderStore.open(root, dtype=torch.float64)
    assert store.layers == (0, 1, 2)
    x = inputs()
    for layer, tensors in states.items():
        features, reconstruction = formula(x, tensors, entries.get("k"), hook)
        acts = store[layer].encode(x)
        # fp64 on both sides; sums of 20 and 100 terms in different orders
        torch.testing.assert_close(acts.dense(FEATURES), features, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(store[layer].reconstruct(acts, x), reconstruction, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hook", [RAW, NORMED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_to_native_nothing_changes(tmp_path, variant, hook, dtype):
    entries, extra = VARIANTS[variant]
    root = write(tmp_path / "set", {0: state(0, extra, dtype=dtype)}, feature_input_hook=hook, **entries)
    store = TranscoderStore.open(root)
    assert all(part.dtype == dtype for name in WEIGHTS if (part := getattr(store[0], name)) is not None)
    convention = store.convention
    native.save(tmp_path / "native", store, read=convention.read, write=convention.write, base_model="m")
    assert_same(store[0], TranscoderStore.open(tmp_path / "native")[0])


def test_the_configuration_says_what_it_says(tmp_path):
    found = recognise(write(tmp_path / "set", {0: state(0, (THRESHOLD,))}))
    assert found.format == "circuit_tracer"
    assert (found.read, found.write) == (SiteSpec("mlp_in"), SiteSpec("mlp_out"))
    assert found.facts() == {
        "base_model": ("Qwen/Qwen3-0.6B", "stored"),
        "read": ("mlp_in", "stored"),
        "write": ("mlp_out", "stored"),
        "input_norm": ("none", "stored"),
        "activation": ("jumprelu", "stored"),
        "k": (None, "stored"),
    }
    assert found.notes == found.selection_notes == ()


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_resid_mid", "resid_mid"),
        ("mlp.hook_in", "mlp_in"),
        ("hook_resid_pre", "resid_pre"),
        ("hook_mlp_out", "mlp_out"),
        ("mlp.hook_out", "mlp_out"),
    ],
)
def test_hooks_are_sites(tmp_path, hook, site):
    found = recognise(write(tmp_path / "set", {0: state(0)}, feature_input_hook=hook))
    assert found.read == SiteSpec(site)


def test_a_normed_hook_is_said_to_be_assumed(tmp_path, caplog):
    root = write(tmp_path / "set", {0: state(0)}, feature_input_hook=NORMED, activation="relu")
    with caplog.at_level(logging.WARNING, "hooks"):
        store = TranscoderStore.open(root)
    assert "eps 1e-06 is assumed" in caplog.text
    assert recognise(root).facts()["input_norm"] == ("rms", "assumed")
    assert (store[0].read, store[0].norm_centred, store[0].norm_eps) == (Site("resid_mid", 0), False, 1e-6)


def test_an_unnamed_activation_without_thresholds_is_assumed_to_be_relu(tmp_path):
    root = write(tmp_path / "set", {0: state(0)})
    assert recognise(root).facts()["activation"] == ("relu", "assumed")
    assert any("ReLU is assumed" in note for note in recognise(root).selection_notes)
    assert TranscoderStore.open(root, k=5)[0].k == 5


def test_topk_keeps_positive_features_only_and_says_so(tmp_path):
    tensors = state(0)
    tensors["b_enc"] -= 100  # nothing is positive
    root = write(tmp_path / "set", {0: tensors}, activation="topk", k=K)
    assert any("circuit-tracer keeps negative ones" in note for note in recognise(root).selection_notes)
    assert not TranscoderStore.open(root)[0].encode(inputs()).dense(FEATURES).any()


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_layer_is_named_and_never_shifted(tmp_path, missing):
    states = {layer: state(layer) for layer in range(4) if layer != missing}
    root = write(tmp_path / "set", states, activation="relu", transcoders=[f"hf://a/b/{n}" for n in range(4)])
    found = recognise(root)
    assert any(f"layer {missing}" in note for note in found.notes)
    store = TranscoderStore.open(root)
    assert store.layers == tuple(states)
    for layer, tensors in states.items():
        assert torch.equal(store[layer].W_enc, tensors["W_enc"])
        assert store[layer].write == Site("mlp_out", layer)


def test_layers_of_different_size_open(tmp_path):
    store = TranscoderStore.open(write(tmp_path / "set", {0: state(0), 1: state(1, f=60)}, activation="relu"))
    assert (store.d_features(0), store.d_features(1)) == (FEATURES, 60)
    assert store[1].encode(inputs()).dense(60).shape[-1] == 60


def test_unknown_entries_are_said_aloud(tmp_path, caplog):
    root = write(tmp_path / "set", {0: state(0)}, activation="relu", output_scale=3.0)
    with caplog.at_level(logging.WARNING, "hooks"):
        TranscoderStore.open(root)
    assert "entries that are not read: output_scale" in caplog.text


def test_layer_files_without_a_configuration_are_nothing(tmp_path):
    root = write(tmp_path / "set", {0: state(0)})
    (root / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="no transcoders found"):
        recognise(root)


def test_a_config_yaml_of_something_else_is_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 0.1\n")
    with pytest.raises(CheckpointError, match="no transcoders found"):
        recognise(tmp_path)


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(root: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        list(TranscoderStore.open(root))
    assert str(root) in caught.value.where
    assert all((caught.value.expected, caught.value.found, caught.value.repair))
    return caught.value


def test_cross_layer_transcoders_are_refused_by_name(tmp_path):
    error = refused(write(tmp_path / "set", {0: state(0)}, model_kind="cross_layer_transcoder"))
    assert "cross-layer" in error.problem
    assert "one decoder" in error.expected


def test_files_that_are_only_listed_are_not_fetched(tmp_path):
    error = refused(write(tmp_path / "set", {}, transcoders=["hf://google/x/layer_0/params.npz"]))
    assert "elsewhere" in error.problem
    assert "download" in error.repair


def test_a_configuration_without_layers_is_refused(tmp_path):
    assert "no layer files" in refused(write(tmp_path / "set", {})).problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_kind", "sae"),
        ("model_kind", ...),
        ("model_name", ["a", "b"]),
        ("feature_input_hook", ...),
        ("feature_input_hook", 5),
        ("feature_input_hook", ["mlp.hook_in"]),
        ("feature_input_hook", "attn.hook_z"),
        ("feature_input_hook", "blocks.3.hook_resid_mid"),
        ("feature_output_hook", NORMED),
        ("feature_output_hook", {"a": 1}),
        ("activation", "tanh"),
        ("activation", ["relu"]),
        ("activation", True),
        ("k", 5),  # without activation: topk
    ],
)
def test_an_entry_of_no_use_is_named(tmp_path, key, value):
    assert f"config.yaml: {key} " in refused(write(tmp_path / "set", {0: state(0)}, **{key: value})).problem


@pytest.mark.parametrize("k", [..., 0, -3, 2.5, "64", True, [7], FEATURES + 1])
def test_topk_needs_a_usable_k(tmp_path, k):
    assert ": k " in refused(write(tmp_path / "set", {0: state(0)}, activation="topk", k=k)).problem


@pytest.mark.parametrize(("activation", "extra"), [("jumprelu", ()), ("relu", (THRESHOLD,)), ("topk", (THRESHOLD,))])
def test_an_activation_that_contradicts_the_tensors_is_refused(tmp_path, activation, extra):
    k = K if activation == "topk" else ...
    error = refused(write(tmp_path / "set", {0: state(0, extra)}, activation=activation, k=k))
    assert "thresholds" in error.problem
    assert activation in error.problem


@pytest.mark.parametrize("value", [-0.001, float("nan")])
def test_a_threshold_that_is_negative_or_no_number_is_refused(tmp_path, value):
    tensors = state(0, (THRESHOLD,))
    tensors[THRESHOLD][3] = value
    with pytest.raises(CheckpointError, match="a threshold of JumpReLU is negative or no number"):
        recognise(write(tmp_path / "set", {0: tensors}))


@pytest.mark.parametrize(
    ("key", "change"),
    [(key, "missing") for key in KEYS]
    + [(key, change) for key in (*KEYS, THRESHOLD, "W_skip") for change in ("short", "integer", "deep")],
)
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, key, change):
    tensors = state(0, (THRESHOLD, "W_skip"))
    if change == "missing":
        del tensors[key]
    else:
        old = tensors[key]
        tensors[key] = {"short": old[:-1].clone(), "integer": old.int(), "deep": old[None].clone()}[change]
    error = refused(write(tmp_path / "set", {0: tensors}))
    assert "layer_0.safetensors" in error.where
    # every other tensor is measured by W_enc, so one row less of it is one too many of the next
    assert key in error.problem or (key, change) == ("W_enc", "short")


def test_a_tensor_that_nothing_explains_is_refused(tmp_path):
    assert "mystery" in refused(write(tmp_path / "set", {0: state(0) | {"mystery": torch.ones(3)}})).problem


def test_two_files_for_one_layer_are_refused(tmp_path):
    root = write(tmp_path / "set", {1: state(1)})
    save_file(state(2), root / "layer_01.safetensors")
    with pytest.raises(CheckpointError, match="two files for layer 1"):
        recognise(root)


def deep(text: str, depth: int = 20_000) -> str:
    return "model_kind: " + text * depth


@pytest.mark.parametrize(
    "text",
    [
        "model_kind: !!python/object/apply:os.system ['touch canary']",
        "!!python/object/new:pathlib.Path [canary]",
        "model_kind: !mine {a: 1}",
        "model_kind: [1, 2",
        "model_kind: 2001-99-99",
        "? [a, b]\n: {c: 1}",
        "- model_kind",
        "just text",
        "7",
        "",
        "{1: 2}",
        deep("["),
        "model_kind: transcoder_set\n" + "#" * (1 << 20),
        "\x00\x01",
    ],
    ids=lambda text: text[:24],
)
def test_yaml_that_is_no_plain_configuration_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "set", {0: state(0)})
    (root / "config.yaml").write_text(text)
    refused(root)
    assert not list(tmp_path.rglob("canary"))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    root = write(tmp_path / "set", {0: state(0)})
    (root / "config.yaml").write_bytes(b"model_kind: \xff\xfe")
    assert "cannot be read" in refused(root).problem


def test_yaml_that_unfolds_to_gigabytes_is_refused_in_a_line(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    root = write(tmp_path / "set", {0: state(0)})
    (root / "config.yaml").write_text("\n".join([*lines, "model_kind: *a11"]))
    assert len(str(refused(root))) < 2000


# -- what is written -----------------------------------------------------------------------------------------------


def sayable(layer: int, variant: str = "topk", hook: str = RAW, dtype: torch.dtype = torch.float32) -> Transcoder:
    """A transcoder that the layout can hold."""
    site = Site({"mlp.hook_in": "mlp_in"}.get(hook, "resid_mid"), layer)
    coder = random_transcoder(layer, D, FEATURES, K, read=site, write=Site("mlp_out", layer), dtype=dtype)
    coder = replace(coder, norm_weight=None, norm_bias=None, norm_eps=1e-6)
    if hook == NORMED:
        coder = replace(coder, norm_weight=torch.ones(D, dtype=dtype), norm_centred=False)
    extra = state(layer, (THRESHOLD, "W_skip"), dtype=dtype)
    if "topk" not in variant:
        coder = replace(coder, k=None, threshold=extra[THRESHOLD] if "jumprelu" in variant else None)
    return replace(coder, W_skip=extra["W_skip"]) if "skip" in variant else coder


MID, OUT = SiteSpec("resid_mid"), SiteSpec("mlp_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hook", [RAW, NORMED, "mlp.hook_in"])
@pytest.mark.parametrize("variant", ["topk", "relu", "jumprelu", "topk, skip", "relu, skip", "jumprelu, skip"])
def test_a_set_that_the_layout_can_say_returns_bit_for_bit(tmp_path, variant, hook, dtype):
    coders = [sayable(layer, variant, hook, dtype) for layer in range(2)]
    read = SiteSpec(coders[0].read.name)
    circuit_tracer.save(tmp_path, iter(coders), read=read, write=OUT, base_model="Qwen/Qwen3-0.6B")
    entries = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert entries["feature_input_hook"] == hook
    assert entries["feature_output_hook"] == "hook_mlp_out"
    assert entries["model_kind"] == "transcoder_set"
    assert entries["model_name"] == "Qwen/Qwen3-0.6B"
    assert (entries["activation"], entries.get("k")) == (variant.split(",")[0], K if "topk" in variant else None)
    store = TranscoderStore.open(tmp_path)
    assert (store.convention.read, store.convention.write) == (read, OUT)
    for coder in coders:
        assert_same(coder, replace(store[coder.layer], norm_centred=coder.norm_centred))


def test_the_files_have_circuit_tracers_names_and_shapes(tmp_path):
    circuit_tracer.save(tmp_path, [sayable(0, "jumprelu, skip")], read=MID, write=OUT)
    assert safetensors_shapes(tmp_path / "layer_0.safetensors") == {
        "W_enc": (FEATURES, D),
        "b_enc": (FEATURES,),
        "W_dec": (FEATURES, D),
        "b_dec": (D,),
        THRESHOLD: (FEATURES,),
        "W_skip": (D, D),
    }


def test_where_a_written_set_comes_from_is_kept_beside_it(tmp_path):
    circuit_tracer.save(
        tmp_path, [sayable(0)], read=MID, write=OUT, sites_source="assumed", metadata={0: {"steps": 5}}, revision="abc"
    )
    kept = json.loads((tmp_path / "conversion.json").read_text())
    assert (kept["sites_source"], kept["revision"]) == ("assumed", "abc")
    assert kept["layers"]["layer_0.safetensors"]["metadata"] == {"steps": 5}
    assert len(kept["layers"]["layer_0.safetensors"]["sha256"]) == 64


def test_only_one_layer_is_held_at_a_time(tmp_path):
    """Each file is on disk before the next transcoder is asked for, and the configuration comes last."""

    def one_by_one() -> Iterator[Transcoder]:
        for layer in range(3):
            assert sorted(path.name for path in tmp_path.iterdir()) == [f"layer_{n}.safetensors" for n in range(layer)]
            yield sayable(layer)

    circuit_tracer.save(tmp_path, one_by_one(), read=MID, write=OUT)
    assert (tmp_path / "config.yaml").is_file()


def moved(coder: Transcoder, **sites: Site) -> Transcoder:
    return replace(coder, **sites)


UNSAYABLE = {
    "an input LayerNorm": [replace(sayable(0), norm_weight=torch.ones(D))],
    "this input RMSNorm": [replace(sayable(0, hook=NORMED), norm_weight=torch.full((D,), 1.5))],
    "a shift of the input": [replace(sayable(0), shift=torch.ones(D))],
    "GroupMax": [replace(sayable(0, "relu"), groups=10)],
    "a missing layer": [sayable(0), sayable(2)],
    "different numbers of features": [
        sayable(0),
        random_transcoder(1, D, 50, K, read=Site("resid_mid", 1), write=Site("mlp_out", 1)),
    ],
    "different activations": [sayable(0), replace(sayable(1), k=K + 1)],
    "a skip connection in some layers only": [sayable(0), sayable(1, "topk, skip")],
    "a norm in some layers only": [sayable(0), sayable(1, hook=NORMED)],
}


@pytest.mark.parametrize("field", UNSAYABLE)
def test_what_the_layout_cannot_say_is_refused_by_name(tmp_path, field):
    coders = [
        replace(coder, norm_weight=None, norm_bias=None) if field == "different numbers of features" else coder
        for coder in UNSAYABLE[field]
    ]
    with pytest.raises(CheckpointError, match=f"no field for {field}") as caught:
        circuit_tracer.save(tmp_path, coders, read=MID, write=OUT)
    assert "native" in caught.value.repair
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("change", [{"norm_bias": torch.ones(D)}, {"norm_eps": 1e-5}])
def test_a_norm_with_a_bias_or_another_eps_is_refused(tmp_path, change):
    with pytest.raises(CheckpointError, match="no field for this input RMSNorm"):
        circuit_tracer.save(tmp_path, [replace(sayable(0, hook=NORMED), **change)], read=MID, write=OUT)


def test_a_norm_elsewhere_is_refused(tmp_path):
    coder = moved(sayable(0, hook=NORMED), read=Site("resid_pre", 0))
    with pytest.raises(CheckpointError, match="no field for this input RMSNorm"):
        circuit_tracer.save(tmp_path, [coder], read=SiteSpec("resid_pre"), write=OUT)


@pytest.mark.parametrize(("read", "write"), [(None, OUT), (MID, None), (None, None)])
def test_unknown_sites_are_refused(tmp_path, read, write):
    with pytest.raises(CheckpointError, match="no field for unknown sites"):
        circuit_tracer.save(tmp_path, [sayable(0)], read=read, write=write)


def test_a_write_site_in_the_next_layer_is_refused(tmp_path):
    coder = moved(sayable(0), write=Site("mlp_out", 1))
    with pytest.raises(CheckpointError, match="no field for sites in another layer"):
        circuit_tracer.save(tmp_path, [coder], read=MID, write=SiteSpec("mlp_out", 1))


def test_other_sites_than_stated_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="layer 0 reads resid_mid 0 and writes mlp_out 0"):
        circuit_tracer.save(tmp_path, [sayable(0)], read=SiteSpec("mlp_in"), write=OUT)


def test_no_transcoders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no transcoders given"):
        circuit_tracer.save(tmp_path, [], read=MID, write=OUT)


def test_undecided_sites_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no field for undecided sites"):
        circuit_tracer.save(tmp_path, [sayable(0)], read=MID, write=OUT, sites_source="undecided")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("known", ["assumed", "given", "calibrated"])
def test_how_facts_are_known_is_read_back(tmp_path, known):
    sources = dict.fromkeys(("sites_source", "encoder_source", "activation_source"), known)
    circuit_tracer.save(tmp_path, [sayable(0)], read=MID, write=OUT, **sources)
    found = recognise(tmp_path)
    assert (found.sites_source, found.encoder_source, found.layers[0].k_source) == (known, known, known)
    (tmp_path / "conversion.json").unlink()
    found = recognise(tmp_path)
    assert (found.sites_source, found.encoder_source, found.layers[0].k_source) == ("stored", "stored", "stored")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sites_source": "sure"}', '{"encoder_source": []}', '{"sites_source": null}']
)
def test_a_damaged_conversion_is_refused(tmp_path, text):
    circuit_tracer.save(tmp_path, [sayable(0)], read=MID, write=OUT)
    (tmp_path / "conversion.json").write_text(text)
    assert refused(tmp_path).where == str(tmp_path / "conversion.json")


def test_a_written_topk_set_says_what_circuit_tracer_does_differently(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    circuit_tracer.save(tmp_path / "relu", [sayable(0, "relu")], read=MID, write=OUT)
    assert "negative" not in caplog.text
    circuit_tracer.save(tmp_path / "topk", [sayable(0)], read=MID, write=OUT)
    assert "circuit-tracer keeps negative ones too" in caplog.text


# -- what circuit-tracer itself writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [{"activation": "topk", "k": K}, {"activation": "topk"}, {}], ids=str)
def test_the_k_beside_the_weights_is_read(tmp_path, entries):
    """`SingleLayerTranscoder.to_safetensors` of a TopK transcoder puts a scalar there."""
    states = {layer: state(layer) | {"k": torch.tensor(K)} for layer in (0, 1)}
    store = TranscoderStore.open(write(tmp_path / "set", states, **entries))
    assert [(store.k(layer), store.k_source(layer)) for layer in store.layers] == [(K, "stored")] * 2
    assert len(store[0].encode(inputs()).indices[0, 0]) == K


@pytest.mark.parametrize(
    ("entries", "k"),
    [
        ({"activation": "topk", "k": K + 1}, torch.tensor(K)),
        ({"activation": "relu"}, torch.tensor(K)),
        ({}, torch.tensor(0)),
        ({}, torch.tensor(-3)),
        ({}, torch.tensor(True)),
        ({}, torch.tensor(float(K))),
        ({}, torch.tensor(FEATURES + 1)),
        ({}, torch.tensor([K])),
    ],
    ids=str,
)
def test_a_k_that_contradicts_or_is_none_is_refused(tmp_path, entries, k):
    root = write(tmp_path / "set", {0: state(0) | {"k": k}}, **entries)
    with pytest.raises(CheckpointError, match=r"k cannot be used|k has the wrong shape"):
        TranscoderStore.open(root)


def test_a_configuration_of_version_0_1_is_opened_and_said(tmp_path, caplog):
    listed = [{"id": "a", "layer": n, "filepath": f"hf://x/y/layer_{n}.safetensors"} for n in range(3)]
    root = write(tmp_path / "set", {0: state(0), 2: state(2)}, model_kind=..., transcoders=listed)
    store = TranscoderStore.open(root)
    assert (store.layers, store.convention.read.name, store.convention.write.name) == ((0, 2), "mlp_in", "mlp_out")
    assert "circuit-tracer 0.1" in caplog.text
    assert "no file for layer 1" in caplog.text
    with pytest.raises(CheckpointError, match="model_kind cannot be used"):
        TranscoderStore.open(write(tmp_path / "other", {0: state(0)}, model_kind=..., transcoders=["hf://x/y"]))


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "a: &x 1",
        "k: 1\nk: 2",
        "[" * 100,
        'a: "\\ud800"',
        "a: b" + " " * (1 << 20),
        "a: [" + "1," * 30_000 + "]",
        "".join(f"{chr(97 + n)}: &{chr(97 + n)} [{', '.join(['*' + chr(96 + n)] * 9)}]\n" for n in range(1, 20)),
    ],
    ids=["an alias", "an anchor", "a key twice", "depth", "half a character", "a megabyte", "many values", "laughs"],
)
def test_hostile_yaml_is_refused_before_it_is_made_into_anything(tmp_path, text):
    root = write(tmp_path / "set", {0: state(0)})
    (root / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read"):
        TranscoderStore.open(root)
