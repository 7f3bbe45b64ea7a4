"""Sets with a layer missing, as published ones have (63 files for 64 layers): run, traced, and never shifted."""

from pathlib import Path

import pytest
import torch
from test_store import publish
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from hooks import Ablate, HookedModel
from hooks.checkpoints import TranscoderStore
from hooks.demo import TRANSCODERS
from hooks.errors import CheckpointError, UserError

PROMPT = "fact: the capital of the state containing Dallas is"
SITES = {"read": "resid_pre", "write": "resid_pre"}
WHOLE = TranscoderStore.open(TRANSCODERS["demo"])
ALL = WHOLE.layers


@pytest.fixture(params=[ALL[0], ALL[len(ALL) // 2], ALL[-1]], ids=["first", "middle", "last"])
def missing(request) -> int:
    return request.param


@pytest.fixture
def model(missing, tmp_path) -> HookedModel:
    """The demo model with its own transcoders in the published layout, but for one."""
    kept = [WHOLE[layer] for layer in ALL if layer != missing]
    return HookedModel.load("demo", publish(tmp_path / "set", kept), k=kept[0].k, **SITES)


def test_every_layer_keeps_its_own_number(model, missing):
    assert model.store.layers == tuple(layer for layer in ALL if layer != missing)
    assert missing not in model.store
    for layer in model.store.layers:
        transcoder = model.store[layer]
        assert (transcoder.layer, transcoder.read.layer, transcoder.write.layer) == (layer, layer, layer)
        assert torch.equal(transcoder.W_enc, WHOLE[layer].W_enc)
        assert torch.equal(transcoder.W_dec, WHOLE[layer].W_dec)


def test_the_missing_layer_is_named(model, missing, tmp_path):
    for ask in (
        lambda: model.store[missing],
        lambda: model.run(PROMPT, swap=[missing]),
        lambda: model.features(PROMPT, layers=[missing]),
        lambda: model.run(PROMPT, [Ablate(f"L{missing}/3")]),
        lambda: TranscoderStore.open(tmp_path / "set", layers=[missing], **SITES),
        lambda: model.store.decoder_rows(missing, [0]),
    ):
        with pytest.raises(UserError, match=rf"layer {missing}\b"):
            ask()


def test_a_run_equals_one_that_leaves_the_layer_out(model, missing, demo):
    chosen = [layer for layer in ALL if layer != missing]
    assert torch.equal(model.run(PROMPT).logits, demo.run(PROMPT).logits)
    swapped = model.run(PROMPT, swap="all", error="zero")
    assert torch.equal(swapped.logits, demo.run(PROMPT, swap=chosen, error="zero").logits)
    assert not torch.equal(swapped.logits, demo.run(PROMPT, swap="all", error="zero").logits)
    assert [site.layer for site in model.swap(PROMPT).layers] == chosen
    table = model.features(PROMPT, 99)
    expected = demo.features(PROMPT, 99, layers=chosen)
    assert table[["layer", "pos", "feature"]].equals(expected[["layer", "pos", "feature"]])


def test_ablations_have_the_effect_they_have_in_the_whole_set(model, missing, demo):
    strongest = model.features(PROMPT, 1)
    for row in strongest[strongest.pos == strongest.pos.max()].itertuples():
        plan = [Ablate(f"L{row.layer}/{row.feature}@{row.pos}")]
        one, two = model.run(PROMPT, plan), demo.run(PROMPT, plan)
        assert torch.equal(one.logits, two.logits)
        assert not torch.equal(one.logits, one.baseline)


def test_a_graph_is_that_of_the_chosen_layers(model, missing, demo):
    chosen = [layer for layer in ALL if layer != missing]
    one = trace(model, PROMPT, max_nodes=12, sample=4)
    part = HookedModel.from_model(
        demo.host.model, demo.host.tokenizer, [WHOLE[layer] for layer in chosen]
    )  # the same layers in memory
    two = trace(part, PROMPT, max_nodes=12, sample=4)
    assert one.n_nodes == two.n_nodes > 0
    nodes, expected = one.nodes_frame(), two.nodes_frame()
    columns = ["layer", "pos", "feature"]
    assert nodes[columns].equals(expected[columns])
    features = nodes[nodes.feature >= 0]
    assert set(features.layer) <= set(chosen)
    assert missing not in set(features.layer)
    left, right = one.edges_frame(), two.edges_frame()
    assert torch.allclose(torch.tensor(list(left.weight)), torch.tensor(list(right.weight)))


@pytest.mark.parametrize("missing", [0, 13, 26], ids=["first", "middle", "last"])
def test_a_set_of_another_models_shape(tmp_path, missing):
    """27 layers of a sibling, small: no number of layers, width or dictionary size is built in."""
    numbers = [layer for layer in range(27) if layer != missing]
    made = [random_transcoder(layer, 56, 128, 15, dtype=torch.bfloat16) for layer in numbers]
    root = publish(tmp_path, made)
    network = random_qwen2(layers=28, d_model=56, dtype=torch.bfloat16)
    model = HookedModel.from_model(network, word_tokenizer(), root, budget_bytes=3 * made[0].nbytes, **SITES)
    assert model.store.layers == tuple(numbers)
    assert model.store.k(numbers[-1]) == int(0.12 * 128)
    report = model.swap("w1 w2 w3", layers=numbers)
    assert [site.layer for site in report.layers] == numbers
    for before in (made[0], made[13], made[-1]):
        assert torch.equal(model.store[before.layer].W_dec, before.W_dec)
    with pytest.raises(CheckpointError, match=f"layer {missing} has no transcoder"):
        model.store[missing]


def test_a_set_of_the_siblings_true_shape(tmp_path):
    """3,584 wide, 8,192 features; files of full length whose tensors were never written, so that they take no room."""
    hollow = random_transcoder(0, 1, 1, 1)
    shapes = {"W_enc": (8192, 3584), "b_enc": (8192,), "W_dec": (8192, 3584)}
    vectors = ("b_dec", "norm_weight", "norm_bias")
    parts = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    parts |= {name: torch.empty(3584, dtype=torch.bfloat16) for name in vectors}
    with torch.serialization.skip_data():
        for layer in range(27):
            publish(tmp_path, [type(hollow)(**{**vars(hollow), **parts, "layer": layer, "k": 983})])
    store = TranscoderStore.open(tmp_path, budget_bytes=1, **SITES)
    assert store.layers == tuple(range(27))
    assert {(store.d_model(n), store.d_features(n), store.k(n)) for n in store.layers} == {(3584, 8192, 983)}
    last = store[26]
    assert last.nbytes == 2 * (2 * 8192 * 3584 + 8192 + 3 * 3584)
    assert last.encode(torch.ones(2, 3584)).values.shape == (2, 983)


def test_files_written_by_a_test_are_the_demo_set(model, missing, tmp_path):
    files = {path.name for path in Path(tmp_path / "set").iterdir()}
    assert files == {f"transcoder_L{layer}.pt" for layer in ALL if layer != missing}
