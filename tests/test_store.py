"""The store reads what is asked for, keeps what fits, and says where its knowledge comes from."""

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Clamp, HookedModel
from hooks.checkpoints import TranscoderStore
from hooks.checkpoints.store import Convention
from hooks.errors import CheckpointError, UserError
from hooks.formats import native
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

RESID, MLP_IN, MLP_OUT = SiteSpec("resid_pre"), SiteSpec("mlp_in"), SiteSpec("mlp_out")
WIDTH = 40  # of the random model in worlds.py
PROMPT = "w1 w2 w3 w4 w5 w6"


def publish(root: Path, coders: list[Transcoder]) -> Path:
    """Write transcoders in the published layout."""
    root.mkdir(exist_ok=True)
    for t in coders:
        state = {
            "_orig_mod.enc.0.weight": t.norm_weight,
            "_orig_mod.enc.0.bias": t.norm_bias,
            "_orig_mod.enc.1.weight": t.W_enc,
            "_orig_mod.enc.1.bias": t.b_enc,
            "_orig_mod.dec.weight": t.W_dec.T.contiguous(),
            "_orig_mod.dec.bias": t.b_dec,
        }
        content = {
            "layer": t.layer,
            "hidden_dim": t.d_model,
            "feature_dim": t.d_features,
            "state_dict": state,
        }
        content["training_metadata"] = {"steps": 5000, "final_l0_pct": 12.0}
        torch.save(content, root / f"transcoder_L{t.layer}.pt")
    return root


def save_native(root: Path, coders: list[Transcoder], read: SiteSpec = RESID, write: SiteSpec = RESID) -> Path:
    placed = [dataclasses.replace(t, read=read.at(t.layer), write=write.at(t.layer)) for t in coders]
    native.save(root, placed, read=read, write=write)
    return root


def coders(*layers: int, d_model: int = WIDTH, seed: int = 0, **options) -> list[Transcoder]:
    return [random_transcoder(layer, d_model, seed=seed, **options) for layer in layers]


# -- what is read, and what stays ----------------------------------------------------------------------------


def test_layers_are_read_when_first_asked_for_and_kept(tmp_path):
    root = publish(tmp_path / "set", coders(0, 2, seed=1))
    store = TranscoderStore.open(root, read="resid_pre", write="resid_pre")
    publish(root, coders(0, 2, seed=2))  # changed behind its back: only what was not read yet can see it
    first = store[0]
    assert torch.equal(first.W_enc, coders(0, seed=2)[0].W_enc)
    publish(root, coders(0, 2, seed=3))
    assert store[0] is first
    assert torch.equal(first.W_enc, coders(0, seed=2)[0].W_enc)
    assert torch.equal(store[2].W_enc, coders(2, seed=3)[0].W_enc)


def test_sizes_are_known_before_any_layer_is_read(tmp_path):
    store = TranscoderStore.open(save_native(tmp_path, coders(3, 0, d_features=64, k=7)))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert store.layers == (0, 3)
    assert (store.d_model(3), store.d_features(3), store.k(3), store.k_source(3)) == (WIDTH, 64, 7, "stored")
    assert len(store) == 2
    assert 3 in store
    assert 1 not in store
    with pytest.raises(CheckpointError, match=r"layer_03\.safetensors"):
        store[3]


def test_iterating_gives_every_layer_in_order(tmp_path):
    store = TranscoderStore.open(save_native(tmp_path, coders(11, 2, 0)))
    assert [transcoder.layer for transcoder in store] == [0, 2, 11]


@pytest.mark.parametrize("layers", [[0], [5, 2], (2,)])
def test_a_subset_of_layers(tmp_path, layers):
    root = save_native(tmp_path, coders(0, 2, 5))
    store = TranscoderStore.open(root, layers=layers)
    assert store.layers == tuple(sorted(layers))
    outside = ({0, 2, 5} - set(layers)).pop()
    with pytest.raises(CheckpointError, match=f"layer {outside} has no transcoder"):
        store[outside]


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    root = save_native(tmp_path, coders(0, 1, 2, 5))
    with pytest.raises(CheckpointError, match="no transcoder for layer 4") as caught:
        TranscoderStore.open(root, layers=[0, 4])
    assert caught.value.expected == "layers among 0-2, 5"
    with pytest.raises(CheckpointError, match="layer 9 has no transcoder") as caught:
        TranscoderStore.open(root)[9]
    assert "0-2, 5" in caught.value.expected


def test_no_layers_at_all_are_refused(tmp_path):
    root = save_native(tmp_path, coders(0))
    with pytest.raises(UserError):
        TranscoderStore.open(root, layers=[])


SIX = {"W_enc", "b_enc", "W_dec", "b_dec", "norm_weight", "norm_bias"}


def weights(transcoder: Transcoder) -> dict[str, torch.Tensor]:
    """The tensors a transcoder has."""
    return {name: weight for name in WEIGHTS if (weight := getattr(transcoder, name)) is not None}


LAYERS = (0, 2, 5, 7)
LAYER_BYTES = random_transcoder(0, WIDTH).nbytes


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Path:
    return save_native(tmp_path_factory.mktemp("four"), coders(*LAYERS))


@settings(max_examples=40, deadline=None)
@given(room=st.integers(1, 4), asked=st.lists(st.sampled_from(LAYERS), max_size=14))
def test_the_budget_drops_what_was_used_longest_ago(four_layers, room, asked):
    store = TranscoderStore.open(four_layers, budget_bytes=room * LAYER_BYTES + 1, prefetch=False)
    resident: dict[int, Transcoder] = {}  # least recently used first
    for layer in asked:
        expected = resident.pop(layer, None)
        found = store[layer]
        assert found.layer == layer
        assert expected is None or found is expected  # a resident layer is not read again
        assert all(found is not other for other in resident.values())
        resident[layer] = found
        while len(resident) > room:
            resident.pop(next(iter(resident)))
    for layer, transcoder in reversed(list(resident.items())):  # most recent first: nothing is dropped while looking
        assert store[layer] is transcoder


def test_a_dropped_layer_is_read_again_and_equal(four_layers):
    store = TranscoderStore.open(four_layers, budget_bytes=2 * LAYER_BYTES, prefetch=False)
    before = {layer: store[layer] for layer in (0, 2, 5)}
    assert store[2] is before[2]
    again = store[0]
    assert again is not before[0]
    assert weights(again).keys() == weights(before[0]).keys() == SIX
    assert all(torch.equal(weight, weights(before[0])[name]) for name, weight in weights(again).items())
    assert store[5] is not before[5]  # 5 was the one used longest ago when 0 came back


@pytest.mark.parametrize("budget", [0, 1, LAYER_BYTES - 1])
def test_a_budget_below_one_layer_still_serves_one(four_layers, budget):
    store = TranscoderStore.open(four_layers, budget_bytes=budget)
    assert [transcoder.layer for transcoder in store] == list(LAYERS)
    last = store[7]
    assert store[7] is last


def test_without_a_budget_everything_stays(four_layers):
    store = TranscoderStore.open(four_layers)
    before = list(store)
    assert all(store[t.layer] is t for t in before)


# -- dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packing", ["native", "published", "in memory"])
def test_another_precision_is_the_rounded_weights(tmp_path, packing, dtype):
    original = coders(0)
    if packing == "in memory":
        store = TranscoderStore({0: original[0]}, Convention(RESID, RESID, "given"), dtype=dtype, name="in memory")
    else:
        root = (save_native if packing == "native" else publish)(tmp_path, original)
        store = TranscoderStore.open(root, dtype=dtype, read="resid_pre", write="resid_pre")
    assert weights(store[0]).keys() == SIX
    for name, weight in weights(store[0]).items():
        assert torch.equal(weight, getattr(original[0], name).to(dtype))
    acts = store[0].encode(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert acts.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_half_precision_takes_half_of_the_budget(four_layers):
    full, half = TranscoderStore.open(four_layers), TranscoderStore.open(four_layers, dtype=torch.bfloat16)
    assert full[0].nbytes == LAYER_BYTES == 2 * half[0].nbytes


# -- conventions ---------------------------------------------------------------------------------------------


def said(caplog) -> str:
    assert all((r.name, r.levelname) == ("hooks", "WARNING") for r in caplog.records)
    return caplog.text


def test_stored_sites_are_used_silently(tmp_path, caplog):
    store = TranscoderStore.open(save_native(tmp_path, coders(0, 4), MLP_IN, SiteSpec("mlp_out", 1)))
    assert store.convention == Convention(MLP_IN, SiteSpec("mlp_out", 1), "stored")
    assert (store[4].read, store[4].write) == (Site("mlp_in", 4), Site("mlp_out", 5))
    assert not store.convention.same_site
    assert not said(caplog)


@pytest.mark.parametrize("given_sites", [{"read": "mlp_in"}, {"write": MLP_OUT}, {"read": MLP_IN, "write": "mlp_out"}])
def test_repeating_what_is_stored_is_fine(tmp_path, given_sites, caplog):
    store = TranscoderStore.open(save_native(tmp_path, coders(0), MLP_IN, MLP_OUT), **given_sites)
    assert store.convention == Convention(MLP_IN, MLP_OUT, "stored")
    assert not said(caplog)


@pytest.mark.parametrize("name", ["read", "write"])
def test_contradicting_what_is_stored_is_refused(tmp_path, name):
    root = save_native(tmp_path, coders(0), MLP_IN, MLP_OUT)
    with pytest.raises(CheckpointError, match=f"--{name} resid_mid contradicts the files") as caught:
        TranscoderStore.open(root, **{name: "resid_mid"})
    assert {"read": "mlp_in", "write": "mlp_out"}[name] in caught.value.expected
    assert caught.value.repair


def test_an_offset_makes_another_site(tmp_path):
    root = save_native(tmp_path, coders(0), MLP_IN, MLP_OUT)
    with pytest.raises(CheckpointError, match=r"mlp_out\+1 contradicts"):
        TranscoderStore.open(root, write="mlp_out+1")


@pytest.mark.parametrize("as_text", [True, False])
def test_given_sites_are_used_silently(tmp_path, as_text, caplog):
    read, write = ("resid_pre", "mlp_out+1") if as_text else (RESID, SiteSpec("mlp_out", 1))
    store = TranscoderStore.open(publish(tmp_path, coders(0)), read=read, write=write)
    assert store.convention == Convention(RESID, SiteSpec("mlp_out", 1), "given")
    assert not said(caplog)


@pytest.mark.parametrize(
    ("sites", "read", "write"),
    [
        ({}, "resid_pre", "resid_pre"),
        ({"read": "resid_mid"}, "resid_mid", "resid_mid"),
        ({"write": "mlp_out"}, "resid_pre", "mlp_out"),
    ],
    ids=str,
)
def test_what_is_not_known_is_assumed_and_said(tmp_path, sites, read, write, caplog):
    root = publish(tmp_path, coders(0))
    with caplog.at_level(logging.WARNING, "hooks"):
        store = TranscoderStore.open(root, **sites)
    assert store.convention == Convention(SiteSpec(read), SiteSpec(write), "assumed")
    assert f"--read {read} --write {write}" in said(caplog)  # what to type to settle it
    assert str(root) in caplog.text


@pytest.mark.parametrize("text", ["", "resid", "resid_pre-1", "resid_pre+", "blocks.0.hook_resid_pre", "mlp_out+1.5"])
def test_an_unknown_site_is_refused_with_the_known_ones(tmp_path, text):
    root = publish(tmp_path, coders(0))
    for name in ("read", "write"):
        with pytest.raises(UserError, match="unknown site") as caught:
            TranscoderStore.open(root, **{name: text})
        assert "resid_mid, mlp_in, mlp_out" in caught.value.expected


def test_transcoders_in_memory_bring_their_own_convention():
    shifted = [random_transcoder(n, 8, read=Site("mlp_in", n), write=Site("mlp_out", n + 1)) for n in (0, 3)]
    store = TranscoderStore.of(shifted)
    assert store.convention == Convention(MLP_IN, SiteSpec("mlp_out", 1), "given")
    assert (store[3].read, store[3].write) == (shifted[1].read, shifted[1].write)
    assert store.k_source(3) == "given"


def test_transcoders_of_several_conventions_are_refused():
    mixed = [random_transcoder(0, 8), random_transcoder(1, 8, read=Site("resid_mid", 1))]
    with pytest.raises(CheckpointError, match="several conventions") as caught:
        TranscoderStore.of(mixed)
    assert "resid_mid -> resid_pre" in caught.value.found
    with pytest.raises(CheckpointError, match="no transcoders given"):
        TranscoderStore.of([])


def test_two_transcoders_for_one_layer_are_refused():
    with pytest.raises(CheckpointError):
        TranscoderStore.of([random_transcoder(0, 8, seed=1), random_transcoder(0, 8, seed=2)])


# -- together with a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A random model with its tokenizer, as a folder."""
    root = tmp_path_factory.mktemp("model")
    random_qwen2().save_pretrained(root)
    word_tokenizer().save_pretrained(root)
    return root


def in_memory(transcoders) -> HookedModel:
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), transcoders)


@pytest.mark.parametrize("packing", ["native", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_equals_the_same_model_in_memory(tmp_path, saved, packing, dtype):
    chosen = coders(0, 1, 3, dtype=dtype)  # d_features 96: 12 % is k = 11, as in worlds.py
    root = (save_native if packing == "native" else publish)(tmp_path / "set", chosen)
    loaded = HookedModel.load(saved, root, read="resid_pre", write="resid_pre")
    memory = in_memory(chosen)
    pd.testing.assert_frame_equal(loaded.features(PROMPT, 20), memory.features(PROMPT, 20))
    strongest = memory.features(PROMPT, 1, [1]).iloc[2]
    address = f"L1/{strongest.feature}@{strongest.pos}"
    for plan in ([], [Ablate(address)], [Clamp("L3/5", 6.0)]):
        one, two = loaded.run(PROMPT, plan), memory.run(PROMPT, plan)
        assert torch.equal(one.baseline, two.baseline)
        assert torch.equal(one.logits, two.logits)
        assert torch.equal(one.logits, one.baseline) == (not plan)


@pytest.mark.parametrize("as_text", [True, False])
def test_names_are_paths_or_text(tmp_path, saved, as_text, monkeypatch):
    root = save_native(tmp_path / "set", coders(0))
    monkeypatch.chdir(tmp_path)
    kind = str if as_text else Path
    assert HookedModel.load(kind(saved), kind("set")).store.layers == (0,)
    assert HookedModel.load(kind(saved), kind(root)).store.layers == (0,)


def test_options_reach_the_store(tmp_path, saved):
    root = publish(tmp_path / "set", coders(0, 1, 3))
    model = HookedModel.load(
        saved, root, read="resid_mid", write="mlp_out", k=4, layers=[3, 1], budget_bytes=1, dtype="bfloat16"
    )
    assert model.store.layers == (1, 3)
    assert {model.store.k(layer) for layer in (1, 3)} == {4}
    assert model.store.convention == Convention(SiteSpec("resid_mid"), MLP_OUT, "given")
    assert model.host.model.dtype == torch.bfloat16  # of the language model; the transcoders keep theirs
    assert model.store[3].W_enc.dtype == torch.float32
    assert (model.features(PROMPT, 99).groupby(["layer", "pos"]).size() <= 4).all()


def test_a_small_budget_changes_no_result(tmp_path, saved):
    root = save_native(tmp_path / "set", coders(0, 1, 3))
    plan = [Clamp("L0/5", 6.0), Ablate("L1/7"), Clamp("L3/5@-1", 2.0)]
    runs = [HookedModel.load(saved, root, budget_bytes=b).run(PROMPT, plan, swap="all") for b in (None, 1)]
    assert torch.equal(runs[0].logits, runs[1].logits)


def test_layers_without_a_transcoder_are_not_replaced():
    chosen = coders(0, 3)
    model = in_memory(chosen)
    assert model.swap(PROMPT).effect.kl > 0
    report = model.swap(PROMPT)
    assert [site.layer for site in report.layers] == [0, 3]
    assert torch.equal(report.run.logits, model.run(PROMPT, swap=[0, 3], error="zero").logits)
    with pytest.raises(CheckpointError, match="layer 2 has no transcoder"):
        model.run(PROMPT, swap=[2])
    assert set(model.features(PROMPT).layer) <= {0, 3}


def test_one_replaced_layer_is_replaced_by_its_reconstruction():
    """Against a hand-made pass: decode(encode(x)) put in place of the input of block 3."""
    model = in_memory(coders(0, 3))
    transcoder, network = model.store[3], random_qwen2()
    ids = model.host.batch([PROMPT]).ids

    def reconstruct(_, args):
        return (transcoder.decode(transcoder.encode(args[0])), *args[1:])

    handle = network.model.layers[3].register_forward_pre_hook(reconstruct)
    with torch.no_grad():
        expected = network(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    torch.testing.assert_close(model.run(PROMPT, swap=[3], error="zero").logits, expected)


@pytest.mark.parametrize("packing", ["native", "published", "in memory"])
def test_transcoders_of_another_width_do_not_fit(tmp_path, saved, packing):
    wrong = coders(0, 1, d_model=WIDTH + 8)
    source = wrong
    if packing != "in memory":
        source = str((save_native if packing == "native" else publish)(tmp_path / "set", wrong))
    with pytest.raises(CheckpointError, match="do not fit the model") as caught:
        HookedModel.load(saved, source)
    assert f"width {WIDTH}," in caught.value.expected
    assert f"width {WIDTH + 8}" in caught.value.found


def test_every_layers_width_is_checked():
    mixed = [*coders(0), *coders(1, d_model=WIDTH + 8)]
    with pytest.raises(CheckpointError, match="do not fit"):
        in_memory(mixed)


@pytest.mark.parametrize("packing", ["native", "in memory"])
def test_a_layer_beyond_the_model_is_refused(tmp_path, saved, packing):
    chosen = coders(0, 9)
    source = chosen if packing == "in memory" else str(save_native(tmp_path / "set", chosen))
    with pytest.raises(CheckpointError, match="resid_pre 9 does not exist") as caught:
        HookedModel.load(saved, source)
    assert "0 to 3" in caught.value.expected
    assert "9" in caught.value.found


def test_a_write_site_beyond_the_model_is_refused(tmp_path, saved):
    root = publish(tmp_path / "set", coders(0, 3))
    with pytest.raises(CheckpointError, match="mlp_out 4 does not exist") as caught:
        HookedModel.load(saved, root, read="mlp_in", write="mlp_out+1")
    assert "--read/--write" in caught.value.repair
    ok = HookedModel.load(saved, root, read="mlp_in", write="mlp_out+1", layers=[0])
    assert ok.store[0].write == Site("mlp_out", 1)


def test_a_model_other_than_the_demo_needs_transcoders(saved):
    with pytest.raises(CheckpointError, match="no transcoders given") as caught:
        HookedModel.load(saved)
    assert "--transcoders" in caught.value.repair


@pytest.mark.parametrize("options", [{"k": 3}, {"layers": [0]}, {"read": "mlp_in"}, {"budget_bytes": 1}], ids=str)
def test_options_are_honoured_or_refused_for_transcoders_in_memory(saved, options):
    try:
        store = HookedModel.load(saved, coders(0, 1), **options).store
    except UserError:
        return
    assert store.k(0) == options.get("k", 11)
    assert list(store.layers) == options.get("layers", [0, 1])
    assert str(store.convention.read) == options.get("read", "resid_pre")
    assert store.budget_bytes == options.get("budget_bytes")


def copied(saved: Path, root: Path) -> Path:
    return Path(shutil.copytree(saved, root / "copy"))


def test_a_folder_without_weights_is_no_model(tmp_path, saved):
    root = copied(saved, tmp_path)
    (root / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        HookedModel.load(root, coders(0))
    (root / "config.json").unlink()
    with pytest.raises(UserError, match="holds no model") as caught:
        HookedModel.load(root, coders(0))
    assert "config.json" in caught.value.expected
    assert "tokenizer.json" in caught.value.found


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_damaged_weights_are_a_user_error(tmp_path, saved, keep):
    path = copied(saved, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError):
        HookedModel.load(path.parent, coders(0))


def change_config(root: Path, **changes: object) -> Path:
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return root


def test_missing_weights_are_a_user_error(tmp_path, saved):
    root = change_config(copied(saved, tmp_path), num_hidden_layers=6, layer_types=["full_attention"] * 6)
    with pytest.raises(UserError):
        HookedModel.load(root, coders(0))


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"vocab_size": "many"}], ids=str)
def test_a_config_that_contradicts_itself_or_the_weights_is_a_user_error(tmp_path, saved, changes):
    root = change_config(copied(saved, tmp_path), **changes)
    with pytest.raises(UserError):
        HookedModel.load(root, coders(0, d_model=changes.get("hidden_size", WIDTH)))


def test_a_missing_tokenizer_is_a_user_error(tmp_path, saved):
    root = copied(saved, tmp_path)
    for file in root.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError):
        HookedModel.load(root, coders(0))


def test_a_norm_eps_of_the_set_is_used():
    store = TranscoderStore.of([dataclasses.replace(random_transcoder(0, 8), norm_eps=1e-2)])
    assert store[0].norm_eps == 1e-2
    with tempfile.TemporaryDirectory() as folder:
        save_native(Path(folder), [dataclasses.replace(random_transcoder(0, 8), norm_eps=1e-2)])
        assert TranscoderStore.open(folder)[0].norm_eps == 1e-2


@pytest.mark.parametrize(
    ("read", "write"), [("mlp_out", "mlp_in"), ("mlp_in", "resid_pre"), ("resid_post", "resid_mid")]
)
def test_a_write_site_before_the_read_site_is_refused(tmp_path, saved, read, write):
    root = publish(tmp_path / "set", coders(0, 1))
    with pytest.raises(CheckpointError, match="before it reads"):
        HookedModel.load(saved, root, read=read, write=write)


def test_an_mlp_read_site_alone_assumes_the_mlps_output(tmp_path, caplog):
    store = TranscoderStore.open(publish(tmp_path / "set", coders(0)), read="mlp_in")
    assert str(store.convention.write) == "mlp_out"
    assert store.convention.source == "assumed"


def test_planning_and_live_swaps_load_nothing(tmp_path, saved):
    root = publish(tmp_path / "set", coders(0, 1, 3))
    model = HookedModel.load(saved, root, read="resid_pre", write="resid_pre")
    assert not model.store._resident
    model.run(PROMPT, swap="all", error="live")
    assert not model.store._resident
    model.run(PROMPT, [Ablate("L1/3@-1")])
    assert list(model.store._resident) == [1]


def test_a_budget_holds_while_all_sites_are_swapped(tmp_path, saved):
    root = publish(tmp_path / "set", coders(0, 1, 3))
    one = TranscoderStore.open(root, read="resid_pre", write="resid_pre")[0].nbytes
    sites = {"read": "resid_pre", "write": "resid_pre"}
    tight = HookedModel.load(saved, root, budget_bytes=one, **sites)
    roomy = HookedModel.load(saved, root, **sites)
    swapped = tight.run(PROMPT, swap="all", error="zero")
    assert torch.equal(swapped.logits, roomy.run(PROMPT, swap="all", error="zero").logits)
    assert len(tight.store._resident) == 1
