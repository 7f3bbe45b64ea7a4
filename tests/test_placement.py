"""Layers on two devices, each transcoder beside its layer: nothing mixes devices, and no number changes."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from test_store import save_native
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from two_devices import Judged, playing, spread
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import Answer, Direction, Feature, Graph, Mass, Pair, decompose, faithfulness, make_cases, trace, verify
from circuits.faithfulness import rank
from circuits.faithfulness.rankings import RANKINGS
from hooks import Ablate, Clamp, HookedModel, Scale
from hooks.check import Texts, calibrate, quality
from hooks.formats import recognise
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS

LAYERS = (0, 1, 2, 3)  # the second device begins with layer 2
PROMPT = "w1 w2 w3 w4 w5 w6"
SITES = {
    "same-site": ("resid_pre", "resid_pre", 0),
    "gap": ("resid_pre", "resid_pre", 0),  # none where the second device begins
    "mlp": ("mlp_in", "mlp_out", 0),
    "resid_mid": ("resid_mid", "mlp_out", 0),
    "next layer": ("resid_pre", "mlp_out", 1),  # layer 1 reads on one device and writes on the other
    "block": ("resid_pre", "resid_post", 0),  # and here, too: what it writes goes on in layer 2
}


def device_of(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2:
        return f"cuda:{int(parts[2]) // 2}"
    return "cuda:1" if name in ("model.norm", "lm_head") else "cuda:0"


def coders(convention: str):
    read, write, offset = SITES[convention]
    layers = [layer for layer in LAYERS if layer + offset < 4 and (convention, layer) != ("gap", 2)]
    return [random_transcoder(n, 40, read=Site(read, n), write=Site(write, n + offset)) for n in layers]


@pytest.fixture(params=SITES)
def convention(request) -> str:
    return request.param


@cache
def in_one_place(convention: str) -> HookedModel:
    return HookedModel.from_model(random_qwen2(tied=False), word_tokenizer(), coders(convention))


@cache
def in_two(convention: str, machine: Judged) -> HookedModel:
    network = spread(random_qwen2(tied=False), machine, device_of)
    return HookedModel.from_model(network, word_tokenizer(), coders(convention))


@pytest.fixture
def alone(convention) -> HookedModel:
    return in_one_place(convention)


@pytest.fixture(scope="module")
def played() -> Judged:
    return Judged()


@pytest.fixture
def machine(played) -> Iterator[Judged]:
    with ExitStack() as stack:
        yield playing(stack, played)


@pytest.fixture
def both(convention, machine) -> HookedModel:
    return in_two(convention, machine)


def few(*conventions: str):
    """Some conventions alone: every operation is judged here, which takes its time."""
    return pytest.mark.parametrize("convention", conventions)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, FakeTensor) else tensor


def test_the_played_machine_refuses_mixed_devices_and_computes(machine):
    one, two = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    for other in (two, torch.ones(3)):
        with pytest.raises(RuntimeError, match="same device"):
            one + other
    assert (one + two.to("cuda:0")).tolist() == [2, 2, 2]
    assert (one + 1).device == torch.device("cuda:0")
    assert (one * torch.tensor(3.0)).cpu().tolist() == [3, 3, 3]  # a number may come from the CPU
    assert one[torch.tensor([0, 2])].shape == (2,)  # and so may an index
    assert type(one.cpu()) is torch.Tensor
    with pytest.raises(RuntimeError):
        one.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        one[two > 0]  # a shape that depends on numbers
    with pytest.raises(RuntimeError, match="same device"):
        torch.arange(3.0).to("cuda:0")[torch.tensor([0, 2]).to("cuda:1")]
    x = torch.arange(24.0).view(2, 3, 4)
    y = x.to("cuda:1")
    for key in (1, (0, slice(1, 3)), (..., 2), (None, 1), (slice(None), [0, 2]), (..., None), x > 5, (0, x[0] > 2)):
        assert torch.equal(y[key].cpu(), x[key])
    x[:, 1], y[:, 1] = 7.0, 7.0
    assert torch.equal(y.cpu(), x)


def test_each_transcoder_sits_with_its_layer(both):
    assert [both.store[layer].device.index for layer in both.store.layers] == [
        layer // 2 for layer in both.store.layers
    ]
    for layer in both.store.layers:
        parts = [part for name in WEIGHTS if (part := getattr(both.store[layer], name)) is not None]
        assert {part.device for part in parts} == {both.host.device_of(layer)}


def test_encoding_takes_streams_from_anywhere(both, alone):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for layer in both.store.layers:
        for device in ("cpu", "cuda:0", "cuda:1"):
            acts = both.store[layer].encode(x.to(device))
            assert acts.values.device == both.host.device_of(layer)
            expected = alone.store[layer].encode(x)
            assert torch.equal(acts.indices.cpu(), expected.indices)
            torch.testing.assert_close(acts.values.cpu(), expected.values)
            torch.testing.assert_close(both.store[layer].decode(acts).cpu(), alone.store[layer].decode(expected))


@pytest.mark.parametrize("error", ["zero", "live", "frozen"])
@pytest.mark.parametrize("swap", [None, "all"])
def test_runs_with_interventions_and_swaps_are_the_same(both, alone, swap, error):
    if swap is None and error != "zero":
        pytest.skip("there is no error without a swap")
    top = alone.features(PROMPT, 2)
    addresses = [f"L{row.layer}/{row.feature}@{row.pos}" for row in top.itertuples() if row.pos > 2]
    free = next(n for n in range(96) if not any(f"/{n}@" in address for address in addresses))
    plan = [Ablate(addresses[0]), Scale(addresses[-1], 2.0), Clamp(f"L{alone.store.layers[-1]}/{free}", 6.0)]
    options = {"swap": swap, "error": error} if swap else {}
    one, two = alone.run(PROMPT, plan, **options), both.run(PROMPT, plan, **options)
    assert not torch.equal(one.logits, one.baseline)
    torch.testing.assert_close(plain(two.baseline), one.baseline)
    torch.testing.assert_close(plain(two.logits), one.logits)


def test_features_swap_reports_and_caches_are_the_same(both, alone):
    columns = ["layer", "pos", "feature"]
    one, two = alone.features(PROMPT, 9), both.features(PROMPT, 9)
    pd.testing.assert_frame_equal(one[columns], two[columns])
    reports = [model.swap(PROMPT) for model in (alone, both)]
    assert reports[1].effect.kl == pytest.approx(reports[0].effect.kl, rel=1e-4)
    for here, there in zip(*(report.layers for report in reports), strict=True):
        assert there.fvu == pytest.approx(here.fvu, rel=1e-4)
    batch = [model.record([PROMPT, "w7 w8"]) for model in (alone, both)]
    for layer in alone.store.layers:
        torch.testing.assert_close(plain(batch[1].layers[layer].error).cpu(), batch[0].layers[layer].error)


def test_generation_is_the_same(both, alone):
    plan = [Clamp(f"L{alone.store.layers[0]}/5@new", 6.0), Clamp(f"L{alone.store.layers[-1]}/7", 4.0)]
    made = [model.generate(PROMPT, plan, max_new_tokens=4) for model in (alone, both)]
    assert made[0].ids == made[1].ids


def test_sweeps_are_the_same(both, alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    groups = [[Ablate(f"L{row.layer}/{row.feature}@{row.pos}")] for row in alone.features(PROMPT, 2).itertuples()]
    one, two = (model.sweep(PROMPT, groups).table["delta"] for model in (alone, both))
    assert one.abs().max() > 0
    assert torch.allclose(torch.tensor(list(two)), torch.tensor(list(one)), atol=1e-4)


@few("gap")
def test_checks_qualities_and_effects_are_the_same(both, alone, tmp_path):
    texts = [" ".join(f"w{(3 * n + k) % 60}" for n in range(40)) for k in range(6)]
    folder = recognise(save_native(tmp_path, list(alone.store)))
    one, two = (calibrate(model.host, folder, Texts("made", tuple(texts)), tokens=200) for model in (alone, both))
    assert str(two.findings.best) == str(one.findings.best)
    one, two = (quality(model, texts[:2]).layers for model in (alone, both))
    for here, there in zip(one, two, strict=True):
        assert (there.fvu, there.loss) == pytest.approx((here.fvu, here.loss), rel=1e-3)
    row = alone.features(PROMPT, 3).query("pos > 0").iloc[-1]
    one, two = (model.effects(PROMPT, [Ablate(f"L{row.layer}/{row.feature}@{row.pos}")]) for model in (alone, both))
    assert (two.total, two.direct) == pytest.approx((one.total, one.direct), abs=1e-4)


# -- graphs ----------------------------------------------------------------------------------------------------------

OTHER = "w9 w2 w3 w4 w5 w6"


def same_graph(one: Graph, two: Graph) -> None:
    """To rounding: an edge that one of them lacks counts as zero. Measured edges (ose) may be rounding alone; nodes
    that lead on by such edges are left out."""
    common = set(one.names) & set(two.names)
    assert common == set(one.names) == set(two.names) or one.meta["rule"] == "ose"
    assert len(common) > 0.7 * max(len(one.names), len(two.names))
    here, there = ({key: w for key, w in edges(graph).items() if common.issuperset(key)} for graph in (one, two))
    scale = max(map(abs, here.values()))
    assert scale > 0
    assert max(abs(here.get(edge, 0) - there.get(edge, 0)) for edge in here.keys() | there.keys()) < 1e-4 * scale
    scores = [dict(zip(graph.names, graph.score, strict=True)) for graph in (one, two)]
    assert max(abs(scores[0][name] - scores[1][name]) for name in common) < 1e-4 * max(map(abs, scores[0].values()))


def edges(graph: Graph) -> dict[tuple[str, str], float]:
    columns = zip(graph.source, graph.target, graph.weight, strict=True)
    return {(graph.names[source], graph.names[target]): weight for source, target, weight in columns}


def test_complete_graphs_are_the_same(both, alone):
    complete_graphs_are_the_same(both, alone, "exact")


@few("block")
@pytest.mark.parametrize("rule", ["affine", "relp", "half", "ose", "ig"])
def test_complete_graphs_by_other_rules_are_the_same(both, alone, rule):
    complete_graphs_are_the_same(both, alone, rule)


def complete_graphs_are_the_same(both, alone, rule):
    whole = {"max_nodes": None, "sample": 0, "node_threshold": 1.0, "edge_threshold": 1.0, "max_in_edges": 10_000}
    same_graph(*(trace(model, PROMPT, rule=rule, **whole) for model in (alone, both)))


@few("next layer")
@pytest.mark.parametrize("order", ["total", "ose", "influence"])
def test_the_same_features_are_selected(both, alone, order):
    options = {"max_nodes": 20, "select_by": order, "sample": 0}
    same_graph(*(trace(model, PROMPT, **options) for model in (alone, both)))


@pytest.mark.parametrize(
    ("convention", "what"),
    [("mlp", "features 2"), ("mlp", "pair"), ("mlp", "direction 1")]
    + [("same-site", what) for what in ("features 1", "features 3", "direction 2", "both", "answer", "mass")],
)
def test_whatever_is_explained(both, alone, what):
    layer = int(what[-1]) if what[-1].isdigit() else 3
    vector = [0.1 * n for n in range(40)]
    site = alone.store.sites(alone.store.layers[-1])[0]
    targets = {
        f"features {layer}": [Feature(f"L{layer}/5@4"), Feature(f"L{layer}/9@2")],
        f"direction {layer}": [Direction(vector, Site("resid_post", layer), pos) for pos in (2, 5)],
        "both": [Direction(vector, site, 2), Feature(f"L{site.layer}/5@4"), Direction(vector, site, 5)],
        "answer": Answer("w3 w4"),
        "mass": Mass(),
        "pair": None,
    }
    options = {"max_nodes": 30, "sample": 0, "counterfactual": OTHER if what == "pair" else None}
    same_graph(*(trace(model, PROMPT, targets[what], **options) for model in (alone, both)))


@few("same-site", "next layer")
def test_graphs_are_verified_taken_apart_and_evaluated(both, alone, convention):
    options = {"max_nodes": 40, "sample": 0, "node_threshold": 1.0, "edge_threshold": 1.0}
    graphs = [trace(model, PROMPT, **options) for model in (alone, both)]
    crossed = {tuple(name.split("/")[0] for name in edge) for edge in edges(graphs[0])}
    assert ("L1", "L2") in crossed or convention == "next layer"  # from one device to the other
    one, two = (verify(model, graph, n=120) for model, graph in zip((alone, both), graphs, strict=True))
    for table, columns in (("nodes", ["score", "effect", "doubled"]), ("edges", ["weight", "effect"])):
        here, there = (getattr(found, table)[columns].to_numpy() for found in (one, two))
        np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * np.abs(here).max())
    if convention == "same-site":
        here, there = (decompose(model, graph, top=1000) for model, graph in zip((alone, both), graphs, strict=True))
        assert np.abs(there["weight"] - here["weight"]).max() < 1e-4 * np.abs(here["weight"]).max()
    chosen = {name: rule for name, rule in RANKINGS.items() if name != "ig"}  # autograd cannot be played
    curves = []
    for model in (alone, both):
        cases = make_cases(model, [Pair(PROMPT, OTHER)])
        curves.append(faithfulness(model, cases, rank(model, cases, chosen)))
    for here, there in zip(*curves, strict=True):
        np.testing.assert_allclose(there.values, here.values, rtol=0, atol=1e-2)


def test_layers_move_when_they_are_placed_elsewhere(tmp_path, machine):
    """From files: loaded on one device, then on the other, then back on the CPU. (Threads are not played.)"""
    from hooks.checkpoints import TranscoderStore

    made = [random_transcoder(layer, 40) for layer in LAYERS]
    store = TranscoderStore.open(save_native(tmp_path, made), budget_bytes=2 * made[0].nbytes, prefetch=False)
    x = torch.randn(5, 40)
    for device in ("cuda:0", "cuda:1", "cpu"):
        for layer in LAYERS:
            store.place(layer, torch.device(device))
        for expected in made:
            found = store[expected.layer]
            assert found.device == torch.device(device)
            assert store.decoder_rows(expected.layer, [3]).device == torch.device(device)
            torch.testing.assert_close(found.encode(x).values.cpu(), expected.encode(x).values)


def test_shapes_and_devices_under_torchs_own_mode():
    """Without numbers: the pure functions of a transcoder on cuda:1, given streams from cuda:0."""
    coder = dataclasses.replace(random_transcoder(0, 40), read=Site("resid_pre", 0))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        weights = {name: mode.from_tensor(w) for name in WEIGHTS if (w := getattr(coder, name)) is not None}
        there = dataclasses.replace(coder, **weights).to("cuda:1")
        x = torch.randn(5, 40, device="cuda:0")
        pre = there.preactivations(x)
        assert (pre.device, pre.shape) == (torch.device("cuda:1"), (5, 96))
        with pytest.raises(RuntimeError, match="same device"):
            x @ there.W_enc.T
    assert SiteSpec("resid_pre").at(0) == coder.read
