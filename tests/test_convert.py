"""A set in one format → another: features to the bit, every fact kept with its source, nothing half written."""

import json
from pathlib import Path

import pytest
import torch
from test_formats import FEATURES, D, state_dict, wrapped
from test_formats import write as write_layer
from worlds import random_transcoder

from hooks.checkpoints import TranscoderStore, convert
from hooks.demo import TRANSCODERS
from hooks.errors import CheckpointError, OutputError
from hooks.files import sha256
from hooks.formats import native, recognise
from hooks.sites import SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder


def published(root: Path, layers: tuple[int, ...] = (0, 1, 3), **options) -> Path:
    for layer in layers:
        write_layer(root, layer, wrapped(layer, state_dict(layer, **options)))
    return root


def assert_same(one: Transcoder, other: Transcoder) -> None:
    for name in WEIGHTS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name
    x = torch.randn(7, one.d_model, generator=torch.Generator().manual_seed(0))
    acts, again = one.encode(x), other.encode(x)
    assert torch.equal(acts.indices, again.indices)
    assert torch.equal(acts.values, again.values)
    assert torch.equal(one.reconstruct(acts, x), other.reconstruct(again, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_published_set_keeps_its_features_to_the_bit(tmp_path, dtype):
    source = published(tmp_path / "src", dtype=dtype)
    done = convert(source, tmp_path / "dst", read="resid_pre", write="resid_pre")
    assert done.layers == (0, 1, 3)
    before = TranscoderStore.open(source, read="resid_pre", write="resid_pre")
    after = TranscoderStore.open(tmp_path / "dst")
    assert after.layers == (0, 1, 3)
    for layer in after.layers:
        assert_same(before[layer], after[layer])


def test_the_manifest_says_where_everything_comes_from(tmp_path):
    source = published(tmp_path / "src")
    convert(source, tmp_path / "dst", base_model="some/model", origin={"repo": "a/b", "revision": "0" * 40})
    manifest = json.loads((tmp_path / "dst" / native.MANIFEST).read_text())
    assert manifest["base_model"] == "some/model"
    assert manifest["sites_source"] == "unknown"
    assert "read" not in manifest
    assert manifest["encoder_source"] == "assumed"
    assert manifest["activation_source"] == "metadata"
    assert manifest["dtype"] == "float32"
    assert manifest["layers"]["0"]["metadata"]["final_rec_loss"] == 0.1
    came = manifest["source"]
    assert came["format"] == "published"
    assert came["revision"] == "0" * 40
    assert came["files"] == {path.name: sha256(path) for path in source.iterdir()}
    checkpoint = recognise(tmp_path / "dst")
    assert checkpoint.facts()["read"] == (None, "unknown")
    assert checkpoint.facts()["input_norm"] == ("layernorm", "assumed")
    assert checkpoint.facts()["k"] == (str(int(FEATURES * 0.12)), "metadata")
    assert checkpoint.revision == "0" * 40


def test_unknown_sites_are_still_assumed_aloud_after_a_conversion(tmp_path, caplog):
    convert(published(tmp_path / "src"), tmp_path / "dst")
    assert "assuming" not in caplog.text
    TranscoderStore.open(tmp_path / "dst")
    assert "do not say what the transcoders read and write" in caplog.text


def test_the_encoder_on_the_card(tmp_path):
    """The card: relu(W (x + ln_bias) + b), then the k largest; decoded as ever."""
    source = published(tmp_path / "src", (2,))
    convert(source, tmp_path / "dst", encoder="card", read="resid_pre", write="resid_pre")
    coder = TranscoderStore.open(tmp_path / "dst")[2]
    weights = {key.removeprefix("_orig_mod."): value.double() for key, value in state_dict(2).items()}
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    pre = (x.double() + weights["enc.0.bias"]) @ weights["enc.1.weight"].T + weights["enc.1.bias"]
    kept = pre.relu().topk(12, dim=-1)
    expected = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    dense = coder.encode(x).dense(FEATURES)
    torch.testing.assert_close(dense.double(), expected, atol=1e-5, rtol=1e-5)  # fp32 sums of 20 products
    assert recognise(tmp_path / "dst").facts()["input_norm"] == ("none", "given")


def test_one_of_several_decoders(tmp_path):
    source = published(tmp_path / "src", (2,), targets=3)
    convert(source, tmp_path / "dst", decoder=1, read="resid_pre", write="mlp_out+2")
    coder = TranscoderStore.open(tmp_path / "dst")[2]
    assert torch.equal(coder.W_dec, state_dict(2, targets=3)["_orig_mod.dec.weight"][D : 2 * D].T)
    assert json.loads((tmp_path / "dst" / native.MANIFEST).read_text())["source"]["decoder"] == 1


def test_a_native_set_is_copied_to_the_bit(tmp_path):
    convert(TRANSCODERS["demo"], tmp_path / "dst")
    before, after = TranscoderStore.open(TRANSCODERS["demo"]), TranscoderStore.open(tmp_path / "dst")
    assert after.convention == before.convention
    for layer in before.layers:
        assert_same(before[layer], after[layer])


def test_layers_and_precision_can_be_chosen(tmp_path):
    done = convert(TRANSCODERS["demo"], tmp_path / "dst", layers=[2, 1], dtype=torch.bfloat16)
    assert done.layers == (1, 2)
    store = TranscoderStore.open(tmp_path / "dst")
    assert store[1].W_enc.dtype == torch.bfloat16
    assert torch.equal(store[1].W_enc, TranscoderStore.open(TRANSCODERS["demo"])[1].W_enc.bfloat16())


def test_layers_of_different_sizes(tmp_path):
    sites = {"read": SiteSpec("resid_pre"), "write": SiteSpec("resid_pre")}
    for layer, size in ((0, 40), (1, 60)):
        write_layer(tmp_path / "src", layer, wrapped(layer, state_dict(layer, f=size)))
    convert(tmp_path / "src", tmp_path / "dst", **{end: str(site) for end, site in sites.items()})
    store = TranscoderStore.open(tmp_path / "dst")
    assert [store.d_features(layer) for layer in store.layers] == [40, 60]
    assert [store.k(layer) for layer in store.layers] == [4, 7]
    for layer in store.layers:
        assert_same(TranscoderStore.open(tmp_path / "src", **sites)[layer], store[layer])


def test_a_target_that_exists_is_left_alone(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert(TRANSCODERS["demo"], tmp_path / "dst")
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["mine.txt"]


def test_a_damaged_layer_leaves_nothing_behind(tmp_path):
    source = published(tmp_path / "src", (0, 1))
    state = state_dict(1)
    state["_orig_mod.enc.1.bias"][3] = float("nan")
    write_layer(source, 1, wrapped(1, state))
    with pytest.raises(CheckpointError, match=r"transcoder_L1\.pt"):
        convert(source, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("hooks.files.output.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="would not fit"):
        convert(TRANSCODERS["demo"], tmp_path / "dst")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "pickle"}, "cannot write the format"),
        ({"encoder": "cards"}, "unknown encoder"),
        ({"layers": [9]}, "no transcoder for layer 9"),
        ({"decoder": 1}, "there is no decoder 1"),
        ({"base_model": "other"}, "contradicts the files"),
        ({"read": "mlp_in"}, "contradicts the files"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, options, message):
    native.save(
        tmp_path / "src",
        [random_transcoder(0, 8)],
        read=SiteSpec("resid_pre"),
        write=SiteSpec("resid_pre"),
        base_model="one",
    )
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()
