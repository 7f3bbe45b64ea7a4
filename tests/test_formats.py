"""Checkpoint folders: what is in them computes; what is wrong with them is said, and never executed."""

import io
import json
import logging
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from worlds import random_transcoder

from hooks.checkpoints import TranscoderStore
from hooks.errors import CheckpointError, UserError
from hooks.formats import native, recognise
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

D, FEATURES = 20, 100
RESID = SiteSpec("resid_pre")
PREFIX = "_orig_mod."


def state_dict(
    seed: int = 0,
    d: int = D,
    f: int = FEATURES,
    *,
    prefix: str = PREFIX,
    dtype=torch.float32,
    targets: int = 1,
) -> dict[str, Tensor]:
    """The six tensors under the names on the model card."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "enc.0.weight": (d,),
        "enc.0.bias": (d,),
        "enc.1.weight": (f, d),
        "enc.1.bias": (f,),
        "dec.weight": (targets * d, f),
        "dec.bias": (targets * d,),
    }
    state = {prefix + key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    state[prefix + "enc.0.weight"] = state[prefix + "enc.0.weight"].abs() + 0.5
    return state


def wrapped(layer: int, state: dict[str, Tensor], l0_pct: float | None = 12.0, **extra: object) -> dict[str, object]:
    """The dict around the state dict, as on the model card."""
    metadata = {
        "steps": 5000,
        "final_l0_pct": l0_pct,
        "dead_features": 0,
        "dead_pct": 0.0,
        "final_rec_loss": 0.1,
    }
    if l0_pct is None:
        del metadata["final_l0_pct"]
    encoder = next((t for key, t in state.items() if key.endswith("enc.1.weight")), None) if state else None
    sizes = tuple(encoder.shape) if encoder is not None and encoder.ndim == 2 else (FEATURES, D)
    return {
        "layer": layer,
        "hidden_dim": sizes[1],
        "feature_dim": sizes[0],
        "state_dict": state,
        "training_metadata": metadata,
        **extra,
    }


def write(root: Path, layer: int, content: object, *, zipped: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    path = root / f"transcoder_L{layer}.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def dense_preactivations(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """nn.LayerNorm (eps 1e-5), then nn.Linear, with torch's own modules."""
    weights = {key.removeprefix(PREFIX): value.float() for key, value in state.items()}
    f, d = weights["enc.1.weight"].shape
    encoder = nn.Sequential(nn.LayerNorm(d, eps=1e-5), nn.Linear(d, f)).requires_grad_(False)
    encoder.load_state_dict({key.removeprefix("enc."): weights[key] for key in weights if key.startswith("enc.")})
    return encoder(x)


def dense_features(x: Tensor, state: dict[str, Tensor], k: int | None) -> Tensor:
    """TopK, then ReLU, over all features; no TopK for k = None."""
    pre = dense_preactivations(x, state)
    if k is None:
        return pre.clamp_min(0)
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.clamp_min(0))


def dense_reconstruction(x: Tensor, state: dict[str, Tensor], k: int | None) -> Tensor:
    weights = {key.removeprefix(PREFIX): value.float() for key, value in state.items()}
    return dense_features(x, state, k) @ weights["dec.weight"].T + weights["dec.bias"]


def inputs(d: int = D, seed: int = 9) -> Tensor:
    return 3 * torch.randn(2, 7, d, generator=torch.Generator().manual_seed(seed)) + 0.4


def check_against_formula(transcoder: Transcoder, state: dict[str, Tensor], k: int | None) -> None:
    x = inputs(transcoder.d_model)
    acts = transcoder.encode(x)
    torch.testing.assert_close(acts.dense(transcoder.d_features), dense_features(x, state, k))
    torch.testing.assert_close(transcoder.decode(acts), dense_reconstruction(x, state, k), rtol=1e-5, atol=1e-4)


# -- the published layout ------------------------------------------------------------------------------------


def test_published_set_computes_layernorm_linear_topk_relu(tmp_path):
    states = {layer: state_dict(layer) for layer in (0, 2, 5)}
    for layer, state in states.items():
        write(tmp_path, layer, wrapped(layer, state))
    store = TranscoderStore.open(tmp_path)
    assert store.layers == (0, 2, 5)
    for layer, state in states.items():
        assert (store.k(layer), store.d_features(layer), store.d_model(layer)) == (12, FEATURES, D)
        check_against_formula(store[layer], state, 12)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("bare", [False, True], ids=["wrapped", "bare"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", ""], ids=["compiled", "plain"])
def test_every_published_packing_holds_the_same_transcoder(tmp_path, prefix, bare, zipped):
    state = state_dict(1, prefix=prefix)
    write(tmp_path, 3, state if bare else wrapped(3, state), zipped=zipped)
    check_against_formula(TranscoderStore.open(tmp_path)[3], state, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_keep_the_precision_they_are_stored_in(tmp_path, dtype):
    state = state_dict(2, dtype=dtype)
    write(tmp_path, 0, wrapped(0, state))
    transcoder = TranscoderStore.open(tmp_path)[0]
    parts = [getattr(transcoder, name) for name in WEIGHTS]
    assert {part.dtype for part in parts if part is not None} == {dtype}
    assert torch.equal(transcoder.W_enc, state[PREFIX + "enc.1.weight"])
    assert torch.equal(transcoder.W_dec, state[PREFIX + "dec.weight"].T)
    assert transcoder.W_dec.is_contiguous()
    x = inputs()
    features, k = transcoder.encode(x), 12
    assert features.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(features.dense(FEATURES).float(), dense_features(x, state, k), rtol=1e-5, atol=1e-5)


def test_extra_tables_are_left_on_disk(tmp_path):
    state = state_dict(3)
    table = torch.randn(D, 50 * FEATURES)
    write(tmp_path, 0, wrapped(0, state, mlp_to_clt_mapping=table, optimizer={"lr": 1e-3}, tags=["a"]))
    transcoder = TranscoderStore.open(tmp_path)[0]
    check_against_formula(transcoder, state, 12)
    weights = {name: weight for name in WEIGHTS if (weight := getattr(transcoder, name)) is not None}
    assert len(weights) == 6
    for name, weight in weights.items():  # no view into the mapped file, which would keep the table reachable
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


def test_sidecar_files_do_not_disturb(tmp_path):
    write(tmp_path, 1, wrapped(1, state_dict()))
    torch.save({"mapping": torch.ones(3)}, tmp_path / "mapping_L1.pt")
    (tmp_path / "metrics_L1.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    assert TranscoderStore.open(tmp_path).layers == (1,)


@settings(max_examples=25, deadline=None)
@given(d=st.integers(2, 24), f=st.integers(1, 70), seed=st.integers(0, 99))
def test_the_formula_holds_for_any_shape(d, f, seed):
    state = state_dict(seed, d, f)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), 0, state)
        transcoder = TranscoderStore.open(folder)[0]
    check_against_formula(transcoder, state, max(1, int(0.12 * f)))


def test_the_cards_own_encoder_computes_other_features(tmp_path):
    state = state_dict(4)
    write(tmp_path, 0, wrapped(0, state))
    x = inputs()
    ours = TranscoderStore.open(tmp_path)[0].encode(x).dense(FEATURES)
    # the model card: add enc.0.bias, Linear, ReLU, TopK
    centered = x + state[PREFIX + "enc.0.bias"]
    relu = F.relu(F.linear(centered, state[PREFIX + "enc.1.weight"], state[PREFIX + "enc.1.bias"]))
    values, indices = torch.topk(relu, int(0.12 * FEATURES), dim=-1)
    card = torch.zeros_like(relu).scatter_(-1, indices, values)
    assert not torch.allclose(card, ours, rtol=0.1, atol=0.1)
    assert ((card > 0) != (ours > 0)).any(-1).all()  # another set of features at every token


@pytest.mark.parametrize("l0_pct", [12.0, 11.9954, 12.3])
def test_l0_near_twelve_percent_means_topk(tmp_path, l0_pct, caplog):
    write(tmp_path, 0, wrapped(0, state_dict(), l0_pct))
    store = TranscoderStore.open(tmp_path, read="resid_pre", write="resid_pre")
    assert (store.k(0), store.k_source(0)) == (12, "metadata")
    assert not caplog.records


@pytest.mark.parametrize(
    ("stated", "k"),
    [
        ((9.7, 12.0, 11.8), 12),  # of a real set: ReLU behind TopK can only lower the share
        ((0.8, 3.0), 12),
        ((8.0,), 12),
        ((43.5,), None),
        ((9.7, 43.5, 12.0), None),  # one run trains all layers: what is above 12 in one was not TopK in the others
        ((12.0, 12.6), None),
        ((40.0, None), None),  # a layer that says nothing is taken to be as the others
        ((9.7, None), 12),
    ],
)
def test_the_stated_l0_of_all_layers_says_how_features_are_selected(tmp_path, stated, k, caplog):
    for layer, l0_pct in enumerate(stated):
        write(tmp_path, layer, wrapped(layer, state_dict(layer), l0_pct))
    with caplog.at_level(logging.WARNING, "hooks"):
        store = TranscoderStore.open(tmp_path, read="resid_pre", write="resid_pre")
    assert [store.k(layer) for layer in store.layers] == [k] * len(stated)
    assert [store.k_source(n) for n in store.layers] == ["assumed" if pct is None else "metadata" for pct in stated]
    assert "final_l0_pct is" in caplog.text
    assert ("plain ReLU" in caplog.text) == (k is None)
    check_against_formula(store[0], state_dict(0), k)


@pytest.mark.parametrize("bare", [False, True])
def test_without_l0_topk_is_assumed_and_said(tmp_path, bare, caplog):
    state = state_dict()
    write(tmp_path, 0, state if bare else wrapped(0, state, None))
    store = TranscoderStore.open(tmp_path, read="resid_pre", write="resid_pre")
    assert (store.k(0), store.k_source(0)) == (12, "assumed")
    assert [(r.name, r.levelname) for r in caplog.records] == [("hooks", "WARNING")]
    assert "assumed" in caplog.text
    assert "12 %" in caplog.text


def test_the_published_size_keeps_1474():
    assert max(1, int(12288 * 0.12)) == 1474
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), 0, wrapped(0, state_dict(d=2, f=12288)))
        assert TranscoderStore.open(folder).k(0) == 1474


@pytest.mark.parametrize("l0_pct", [12.0, 40.0, None])
def test_a_given_k_goes_before_what_the_files_state(tmp_path, l0_pct, caplog):
    state = state_dict(6)
    write(tmp_path, 0, wrapped(0, state, l0_pct))
    store = TranscoderStore.open(tmp_path, read="resid_pre", write="resid_pre", k=5)
    assert (store.k(0), store.k_source(0)) == (5, "given")
    if l0_pct is None:
        assert not caplog.records
    else:  # a given number goes before a stated one, and that is said
        (record,) = caplog.records
        assert (
            f"--k 5 is taken, and the files state {'topk 12' if l0_pct == 12 else 'relu'} (layers 0)" in record.message
        )
    check_against_formula(store[0], state, 5)


@pytest.mark.parametrize("k", [0, -1, FEATURES + 1])
def test_an_impossible_k_is_refused(tmp_path, k):
    write(tmp_path, 0, wrapped(0, state_dict()))
    with pytest.raises(CheckpointError, match=f"k = {k} is out of range") as caught:
        TranscoderStore.open(tmp_path, k=k)
    assert caught.value.expected == f"1 to {FEATURES}"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_metadata_and_sites_are_not_invented(tmp_path, zipped):
    write(tmp_path, 0, wrapped(0, state_dict()), zipped=zipped)
    found = recognise(tmp_path)
    assert (found.format, found.read, found.write) == ("published", None, None)
    assert found.norm_eps == 1e-5
    assert found.layers[0].metadata["steps"] == 5000


# -- what is wrong with a published set ----------------------------------------------------------------------


def refused(root: Path, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        list(TranscoderStore.open(root, **options))
    assert "\n" in str(caught.value)  # more than a bare sentence
    return caught.value


def test_a_file_that_says_another_layer_is_refused(tmp_path):
    write(tmp_path, 4, wrapped(3, state_dict()))
    error = refused(tmp_path)
    assert "transcoder_L4.pt" in error.problem
    assert "layer 3" in error.problem
    assert "layer 4" in error.expected


@pytest.mark.parametrize("key", ["enc.0.weight", "enc.0.bias", "enc.1.bias", "dec.weight", "dec.bias"])
@pytest.mark.parametrize("change", ["missing", "short", "integer"])
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, key, change):
    state = state_dict()
    if change == "missing":
        del state[PREFIX + key]
    elif change == "short":
        state[PREFIX + key] = state[PREFIX + key][:-1].clone()
    else:
        state[PREFIX + key] = state[PREFIX + key].int()
    write(tmp_path, 0, wrapped(0, state))
    error = refused(tmp_path)
    assert key in error.problem
    assert error.where.endswith("transcoder_L0.pt")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4), (0, 0)])
@pytest.mark.parametrize("key", ["enc.1.weight", "dec.weight"])
def test_a_matrix_of_another_shape_is_refused(tmp_path, key, shape):
    state = state_dict()
    state[PREFIX + key] = torch.zeros(shape)
    write(tmp_path, 0, wrapped(0, state))
    assert refused(tmp_path).problem.startswith("transcoder_L0.pt: ")


def test_the_first_of_several_decoders_is_opened_and_that_is_said(tmp_path, caplog):
    state = state_dict(targets=3)
    write(tmp_path, 0, wrapped(0, state))
    with caplog.at_level(logging.WARNING, "hooks"):
        store = TranscoderStore.open(tmp_path, read="resid_pre", write="resid_pre")
    assert "decoders for 3 target layers" in caplog.text
    assert "--decoder 0" in caplog.text
    assert torch.equal(store[0].W_dec, state[PREFIX + "dec.weight"][:D].T)


@pytest.mark.parametrize("decoder", [0, 1, 2])
@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_one_of_several_decoders_computes_its_own_target(tmp_path, decoder, prefix, caplog):
    state = state_dict(7, prefix=prefix, targets=3)
    write(tmp_path, 0, wrapped(0, state))
    transcoder = TranscoderStore.open(tmp_path, read="resid_pre", write="mlp_out+1", decoder=decoder)[0]
    assert not caplog.records
    own = {key: value for key, value in state.items() if "dec." not in key}
    part = slice(decoder * D, (decoder + 1) * D)
    for key in (f"{prefix}dec.weight", f"{prefix}dec.bias"):
        own[key] = state[key][part]
    check_against_formula(transcoder, {PREFIX + key.removeprefix(prefix): value for key, value in own.items()}, 12)


@pytest.mark.parametrize("decoder", [-1, 3])
def test_a_decoder_that_is_not_there_is_refused(tmp_path, decoder):
    write(tmp_path, 0, wrapped(0, state_dict(targets=3)))
    with pytest.raises(CheckpointError, match=f"there is no decoder {decoder}") as caught:
        TranscoderStore.open(tmp_path, decoder=decoder)
    assert "0 to 2" in caught.value.expected


def test_layers_with_different_numbers_of_decoders_are_refused(tmp_path):
    write(tmp_path, 0, wrapped(0, state_dict(targets=3)))
    write(tmp_path, 1, wrapped(1, state_dict(targets=2)))
    assert "layer 0: 3; layer 1: 2" in refused(tmp_path).found


def test_a_second_decoder_of_a_single_one_is_refused(tmp_path):
    write(tmp_path, 0, wrapped(0, state_dict()))
    with pytest.raises(CheckpointError, match="there is no decoder 1"):
        TranscoderStore.open(tmp_path, decoder=1)


def card_features(x: Tensor, state: dict[str, Tensor], k: int | None) -> Tensor:
    """The model card's code, as it stands there: add enc.0.bias, Linear, ReLU, TopK."""
    weights = {key.removeprefix(PREFIX): value.float() for key, value in state.items()}
    relu = F.relu(F.linear(x + weights["enc.0.bias"], weights["enc.1.weight"], weights["enc.1.bias"]))
    if k is None:
        return relu
    values, indices = torch.topk(relu, k, dim=-1)
    return torch.zeros_like(relu).scatter_(-1, indices, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("l0_pct", "k"), [(12.0, 12), (40.0, None)])
def test_the_cards_encoder_can_be_asked_for(tmp_path, dtype, l0_pct, k):
    state = state_dict(4, dtype=dtype)
    write(tmp_path / "set", 0, wrapped(0, state, l0_pct))
    transcoder = TranscoderStore.open(tmp_path / "set", encoder="card")[0]
    assert transcoder.norm_weight is None
    assert {transcoder.W_enc.dtype, transcoder.shift.dtype} == {dtype}
    x = inputs()
    torch.testing.assert_close(transcoder.encode(x).dense(FEATURES), card_features(x, state, k))
    trained = TranscoderStore.open(tmp_path / "set", encoder="trained")[0]
    torch.testing.assert_close(trained.encode(x).dense(FEATURES), dense_features(x, state, k))
    save_native(tmp_path / "native", [transcoder])  # and it is kept as it is
    assert same_weights(TranscoderStore.open(tmp_path / "native")[0], transcoder)


def test_an_encoder_that_the_set_does_not_have_is_refused(tmp_path):
    write(tmp_path / "set", 0, wrapped(0, state_dict()))
    with pytest.raises(CheckpointError, match="unknown encoder 'cards'") as caught:
        TranscoderStore.open(tmp_path / "set", encoder="cards")
    assert "trained, card" in caught.value.expected
    save_native(tmp_path / "native", [replace(random_transcoder(0, D), norm_weight=None, norm_bias=None)])
    with pytest.raises(CheckpointError, match="unknown encoder 'card'"):  # there is no bias to add
        TranscoderStore.open(tmp_path / "native", encoder="card")


def test_a_transposed_decoder_is_not_called_several_targets(tmp_path):
    state = state_dict()
    state[PREFIX + "dec.weight"] = state[PREFIX + "dec.weight"].T.contiguous()
    write(tmp_path, 0, wrapped(0, state))
    assert "target layers" not in refused(tmp_path).found


@pytest.mark.parametrize("content", [{}, [1, 2], torch.ones(3), {"state_dict": {}}, {"state_dict": 3}, {"W_enc": 1}])
def test_another_kind_of_pt_is_not_a_transcoder(tmp_path, content):
    write(tmp_path, 0, content)
    assert "is not a transcoder" in refused(tmp_path).problem


def test_layers_of_different_width_are_refused(tmp_path):
    write(tmp_path, 0, state_dict(d=D))
    write(tmp_path, 1, state_dict(d=D + 4))
    refused(tmp_path)


@pytest.mark.parametrize("key", ["hidden_dim", "feature_dim"])
def test_a_wrapper_that_contradicts_its_tensors_is_refused(tmp_path, key):
    write(tmp_path, 0, wrapped(0, state_dict()) | {key: 7})
    assert "7" in str(refused(tmp_path))


def test_two_files_for_one_layer_are_refused(tmp_path):
    write(tmp_path, 1, wrapped(1, state_dict(0)))
    torch.save(wrapped(1, state_dict(1)), tmp_path / "transcoder_L01.pt")
    refused(tmp_path)


@pytest.mark.parametrize("metadata", [{"final_l0_pct": "twelve"}, {"final_l0_pct": [12.0]}, [12.0]], ids=repr)
def test_unusable_metadata_is_refused(tmp_path, metadata):
    write(tmp_path, 0, wrapped(0, state_dict()) | {"training_metadata": metadata})
    refused(tmp_path)


def test_an_l0_that_is_not_a_number_never_means_relu(tmp_path):
    write(tmp_path, 0, wrapped(0, state_dict(), float("nan")))
    try:
        k = TranscoderStore.open(tmp_path).k(0)
    except CheckpointError:
        return
    assert k == 12


def packed(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


WHOLE = packed(wrapped(0, state_dict()))
LEGACY = packed(wrapped(0, state_dict()), zipped=False)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(4, len(WHOLE) - 1))
def test_a_truncated_pt_is_refused_wherever_it_ends(cut):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "transcoder_L0.pt").write_bytes(WHOLE[:cut])
        error = refused(Path(folder))
    assert "damaged" in error.problem
    assert f"{cut:,} bytes" in error.found


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_truncated_legacy_pt_is_refused(tmp_path, share):
    (tmp_path / "transcoder_L0.pt").write_bytes(LEGACY[: int(share * len(LEGACY))])
    assert "damaged" in refused(tmp_path).problem


@pytest.mark.parametrize("content", [b"", LEGACY[:5], LEGACY[:20], LEGACY[:100]], ids=["empty", "5", "20", "100"])
def test_an_empty_or_nearly_empty_pt_is_refused(tmp_path, content):
    (tmp_path / "transcoder_L0.pt").write_bytes(content)
    assert "damaged" in refused(tmp_path).problem


@pytest.mark.parametrize("content", [b"P", b"PK", b"not a checkpoint at all" * 9, b"PK\x03\x04" + bytes(300)])
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path, content):
    (tmp_path / "transcoder_L0.pt").write_bytes(content)
    assert "damaged" in refused(tmp_path).problem


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "transcoder_L0.pt").mkdir()
    assert "transcoder_L0.pt" in refused(tmp_path).problem


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "transcoder_L0.pt").symlink_to(tmp_path / "blobs" / "gone")
    assert "transcoder_L0.pt" in refused(tmp_path).problem


class Trap:
    """Pickles into a call that makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_the_trap_of_the_next_test_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "zip inside state dict"])
def test_a_pickle_in_a_pt_is_refused_and_never_executed(tmp_path, kind):
    sprung, root = tmp_path / "sprung", tmp_path / "set"
    root.mkdir()
    content = wrapped(0, state_dict(), note=Trap(sprung))
    if kind == "zip inside state dict":
        content = wrapped(0, state_dict() | {"hook": Trap(sprung)})
    raw = pickle.dumps(Trap(sprung)) if kind == "bare pickle" else packed(content, kind != "legacy")
    (root / "transcoder_L0.pt").write_bytes(raw)
    error = refused(root)
    assert "more than tensors" in error.problem
    assert not sprung.exists()


# -- our own layout ------------------------------------------------------------------------------------------


def save_native(root: Path, coders: list[Transcoder] | None = None, read=RESID, write=RESID, **source) -> None:
    coders = coders or [random_transcoder(layer, D, FEATURES, 7) for layer in (0, 2, 11)]
    placed = [replace(t, read=read.at(t.layer), write=write.at(t.layer)) for t in coders]
    native.save(root, placed, read=read, write=write, base_model="a/b", **source)


def same_weights(one: Transcoder, two: Transcoder) -> bool:
    pairs = [(getattr(one, name), getattr(two, name)) for name in WEIGHTS]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs if a is not None or b is not None)


@pytest.mark.parametrize("k", [7, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_native_sets_come_back_bit_by_bit(tmp_path, dtype, k, caplog):
    coders = [random_transcoder(layer, D, FEATURES, k, dtype=dtype) for layer in (0, 2, 11)]
    save_native(tmp_path, coders)
    store = TranscoderStore.open(tmp_path)
    assert store.layers == (0, 2, 11)
    assert store.convention.source == "stored"
    assert not caplog.records  # nothing had to be assumed
    for coder in coders:
        back = store[coder.layer]
        assert same_weights(coder, back)
        assert (back.k, back.norm_eps, back.read, back.write) == (k, 1e-5, coder.read, coder.write)


def test_native_keeps_sites_eps_and_base_model(tmp_path):
    coder = random_transcoder(3, D, read=Site("mlp_in", 3), write=Site("mlp_out", 4))
    other_eps = Transcoder(**{**vars(coder), "norm_eps": 1e-3})
    save_native(tmp_path, [other_eps], SiteSpec("mlp_in"), SiteSpec("mlp_out", 1), seed=5)
    back = TranscoderStore.open(tmp_path)[3]
    assert (back.read, back.write, back.norm_eps) == (coder.read, coder.write, 1e-3)
    assert recognise(tmp_path).base_model == "a/b"
    x = inputs()
    assert torch.equal(back.preactivations(x), other_eps.preactivations(x))
    assert not torch.equal(back.preactivations(x), coder.preactivations(x))


def test_native_without_an_input_norm_reads_the_stream_as_it_is(tmp_path):
    coder = Transcoder(**{**vars(random_transcoder(0, D)), "norm_weight": None, "norm_bias": None})
    save_native(tmp_path, [coder])
    back, x = TranscoderStore.open(tmp_path)[0], inputs()
    assert back.norm_weight is None
    assert back.norm_bias is None
    torch.testing.assert_close(back.preactivations(x), x @ coder.W_enc.T + coder.b_enc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l0_pct", [12.0, 30.0])
def test_published_to_native_is_bit_equal(tmp_path, dtype, l0_pct):
    for layer in (1, 4):
        write(tmp_path / "published", layer, wrapped(layer, state_dict(layer, dtype=dtype), l0_pct))
    before = TranscoderStore.open(tmp_path / "published")
    save_native(tmp_path / "native", list(before))
    after = TranscoderStore.open(tmp_path / "native")
    assert after.layers == before.layers == (1, 4)
    x = inputs()
    for old, new in zip(before, after, strict=True):
        assert same_weights(old, new)
        assert (old.k, old.norm_eps, old.read, old.write) == (new.k, new.norm_eps, new.read, new.write)
        old_acts, new_acts = old.encode(x), new.encode(x)
        assert torch.equal(old_acts.indices, new_acts.indices)
        assert torch.equal(old_acts.values, new_acts.values)
        assert torch.equal(old.decode(old_acts), new.decode(new_acts))


def gate(pre: Tensor, transcoder: Transcoder) -> Tensor:
    """What each rule keeps, feature by feature."""
    if transcoder.threshold is not None:
        pre = torch.where(pre > transcoder.threshold, pre, 0.0)
    if transcoder.groups:
        for token in pre.view(-1, pre.shape[-1]):
            for group in token.view(transcoder.groups, -1):
                group[torch.arange(len(group)) != group.argmax()] = 0
    if transcoder.k:
        kept = pre.topk(transcoder.k, dim=-1).indices
        pre = torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))
    return pre.clamp_min(0)


def normed(x: Tensor, transcoder: Transcoder) -> Tensor:
    """Each norm, written out."""
    if transcoder.norm_weight is None:
        return x if transcoder.shift is None else x - transcoder.shift
    centred = x - x.mean(-1, keepdim=True) if transcoder.norm_centred else x
    scaled = centred / (centred.square().mean(-1, keepdim=True) + transcoder.norm_eps).sqrt()
    return scaled * transcoder.norm_weight + (0 if transcoder.norm_bias is None else transcoder.norm_bias)


VECTOR = torch.linspace(-0.3, 0.5, D)
NORMS = {
    "layernorm": {},
    "layernorm without bias": {"norm_bias": None},
    "rms": {"norm_centred": False},
    "rms without bias": {"norm_centred": False, "norm_bias": None},
    "none": {"norm_weight": None, "norm_bias": None},
    "shift": {"norm_weight": None, "norm_bias": None, "shift": VECTOR},
}
RULES = {
    "topk": {"k": 7},
    "relu": {"k": None},
    "jumprelu": {"k": None, "threshold": torch.linspace(0, 1.5, FEATURES)},
    "groupmax": {"k": None, "groups": 20},
}


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", NORMS)
def test_native_keeps_every_kind_of_encoder(tmp_path, norm, rule, skip):
    parts = {**NORMS[norm], **RULES[rule], "W_skip": torch.eye(D) + VECTOR if skip else None}
    saved = [replace(random_transcoder(layer, D, FEATURES), **parts) for layer in (0, 3)]
    save_native(tmp_path, saved)
    store, x = TranscoderStore.open(tmp_path), inputs()
    assert store.convention.source == "stored"
    for before in saved:
        after = store[before.layer]
        assert same_weights(before, after)
        for fact in ("activation", "k", "groups", "norm_centred", "norm_eps"):
            assert getattr(before, fact) == getattr(after, fact)
        given = normed(x, before)
        expected = gate(given @ before.W_enc.T + before.b_enc, before)
        acts = after.encode(x)
        torch.testing.assert_close(acts.dense(FEATURES), expected, rtol=1e-4, atol=1e-5)
        out = expected @ before.W_dec + before.b_dec + (given @ before.W_skip.T if skip else 0)
        torch.testing.assert_close(after.reconstruct(acts, x), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["stored", "assumed"])
def test_an_assumption_stays_one_when_it_is_saved(tmp_path, source):
    save_native(tmp_path, sites_source=source)
    assert TranscoderStore.open(tmp_path).convention.source == source


def test_sites_other_than_the_transcoders_own_are_refused(tmp_path):
    coders = [random_transcoder(0, D, FEATURES, 7)]
    with pytest.raises(CheckpointError, match="layer 0 reads resid_pre 0"):
        native.save(tmp_path, coders, read=SiteSpec("mlp_in"), write=SiteSpec("mlp_out"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path):
    """One flipped bit in the weights: the header is whole, only the digest tells."""
    save_native(tmp_path)
    path = tmp_path / "layer_02.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    store = TranscoderStore.open(tmp_path)
    assert store[0].k == 7
    with pytest.raises(CheckpointError, match=r"layer_02\.safetensors is not the file its manifest describes"):
        store[2]


def test_native_bytes_are_reproducible(tmp_path):
    for name in ("one", "two"):
        save_native(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["layer_00.safetensors", "layer_02.safetensors", "layer_11.safetensors", "manifest.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_native_never_changes_a_layers_k(tmp_path):
    coders = [random_transcoder(0, D, k=3), random_transcoder(1, D, k=None)]
    try:
        save_native(tmp_path, coders)
    except (AssertionError, CheckpointError):
        return
    assert [back.k for back in TranscoderStore.open(tmp_path)] == [3, None]


def edit_manifest(root: Path, edit) -> None:
    save_native(root)
    path = root / native.MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_unknown_manifest_keys_are_refused(tmp_path):
    edit_manifest(tmp_path, lambda manifest: manifest.update(rescale=2.0))
    error = refused(tmp_path)
    assert "rescale" in error.found
    assert error.where.endswith(native.MANIFEST)


@pytest.mark.parametrize("key", ["version", "d_model", "d_features", "input_norm", "activation", "layers"])
def test_missing_manifest_keys_are_refused(tmp_path, key):
    edit_manifest(tmp_path, lambda manifest: manifest.pop(key))
    assert key in refused(tmp_path).found


def test_a_site_that_does_not_exist_is_refused(tmp_path):
    edit_manifest(tmp_path, lambda manifest: manifest.update(read="resid"))
    with pytest.raises(UserError, match="unknown site 'resid'") as caught:
        TranscoderStore.open(tmp_path)
    assert "manifest" in caught.value.where


@pytest.mark.parametrize("how", ["null", "left out"])
@pytest.mark.parametrize("key", ["read", "write"])
def test_sites_that_a_manifest_leaves_open_are_assumed_aloud_or_given(tmp_path, key, how, caplog):
    def open_site(manifest):
        manifest.pop(key)
        manifest.update({key: None} if how == "null" else {})

    edit_manifest(tmp_path, open_site)
    known = recognise(tmp_path)
    assert getattr(known, key) is None
    assert known.facts()[key] == (None, "unknown")
    with caplog.at_level(logging.WARNING, "hooks"):
        assert TranscoderStore.open(tmp_path).convention.source == "assumed"
    assert "--read resid_pre --write resid_pre" in caplog.text
    assert TranscoderStore.open(tmp_path, **{key: "resid_pre"}).convention.source == "given"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("activation", {"kind": "jumprelu"}),  # no threshold is stored
        ("activation", {"kind": "swish"}),
        ("input_norm", {"kind": "batch"}),
        ("input_norm", {"kind": "none"}),  # a norm's weights are stored
        ("input_norm", {"kind": "layernorm", "shift": True}),
        ("skip", True),  # no W_skip is stored
    ],
    ids=str,
)
def test_another_version_or_encoder_is_refused(tmp_path, key, value):
    edit_manifest(tmp_path, lambda manifest: manifest.update({key: value}))
    refused(tmp_path)


ORDER = {"kind": "topk", "k": 7, "order": "relu-topk"}
UNCHECKED = {
    "groups without groupmax": lambda m: m["activation"].update(groups=4),
    "groups that do not divide": lambda m: m.update(activation={"kind": "groupmax", "groups": 7}),
    "k of a set without topk": lambda m: (m.update(activation={"kind": "relu"}), m["layers"]["0"].update(k=3)),
    "no layers": lambda m: m.update(layers={}),
    "layers is a list": lambda m: m.update(layers=[1]),
    "a layer without a file": lambda m: m["layers"].update({"0": {}}),
    "a layer that is no number": lambda m: m["layers"].update({"x": m["layers"].pop("0")}),
    "an unknown key in a layer": lambda m: m["layers"]["0"].update(scale=2.0),
    "an unknown key in activation": lambda m: m["activation"].update(threshold=1.0),
    "an unknown order": lambda m: m.update(activation=ORDER),
    "topk without k": lambda m: m.update(activation={"kind": "topk"}),
    "k of zero": lambda m: m["activation"].update(k=0),
    "k beyond the dictionary": lambda m: m["activation"].update(k=FEATURES + 1),
    "a norm that is text": lambda m: m.update(input_norm="layernorm"),
    "a width that is text": lambda m: m.update(d_model="wide"),
}


@pytest.mark.parametrize("edit", UNCHECKED.values(), ids=UNCHECKED.keys())
def test_a_damaged_manifest_is_refused(tmp_path, edit):
    edit_manifest(tmp_path, edit)
    refused(tmp_path)


def test_a_missing_layer_file_is_refused(tmp_path):
    save_native(tmp_path)
    (tmp_path / "layer_02.safetensors").unlink()
    error = refused(tmp_path)
    assert "layer 2" in error.problem
    assert "layer_02.safetensors" in error.expected


@pytest.mark.parametrize("file", ["../layer_00.safetensors", "/etc/hostname", "deeper/layer_00.safetensors"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, file):
    root = tmp_path / "set"
    edit_manifest(root, lambda manifest: manifest["layers"]["0"].update(file=file))
    for place in (tmp_path, root / "deeper"):
        place.mkdir(exist_ok=True)
        (place / "layer_00.safetensors").write_bytes((root / "layer_00.safetensors").read_bytes())
    assert "layer 0" in refused(root).problem


@pytest.mark.parametrize("key", ["d_model", "d_features"])
def test_shapes_that_contradict_the_manifest_are_refused(tmp_path, key):
    edit_manifest(tmp_path, lambda manifest: manifest.update({key: manifest[key] + 1}))
    error = refused(tmp_path)
    assert "does not fit the manifest" in error.problem
    assert error.expected
    assert error.found


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-10], lambda raw: raw[:40], lambda raw: b"", lambda raw: b"x" * 99]
)
def test_a_corrupted_safetensors_file_is_refused(tmp_path, damage):
    save_native(tmp_path)
    path = tmp_path / "layer_02.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    error = refused(tmp_path)
    assert "layer_02.safetensors is not a readable safetensors file" in error.problem


# -- folders -------------------------------------------------------------------------------------------------


def test_a_folder_without_transcoders_lists_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    error = refused(tmp_path)
    assert "no transcoders" in error.problem
    assert "notes.txt" in error.found
    assert "published" in error.expected
    assert "native" in error.expected


def test_an_empty_folder_is_called_empty(tmp_path):
    assert "empty" in refused(tmp_path).found


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    error = refused(tmp_path / "nowhere")
    assert "there is no folder" in error.problem
    assert error.found == "nothing"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    file = write(tmp_path, 0, wrapped(0, state_dict()))
    assert refused(file).found == "a file"


def test_two_formats_in_one_folder_are_refused(tmp_path):
    save_native(tmp_path)
    write(tmp_path, 0, wrapped(0, state_dict()))
    error = refused(tmp_path)
    assert "several formats" in error.problem
    assert error.found == "native, published"


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"format": "another"}'])
def test_a_manifest_of_something_else_is_no_transcoder_set(tmp_path, text):
    (tmp_path / native.MANIFEST).write_text(text)
    assert "no transcoders" in refused(tmp_path).problem
