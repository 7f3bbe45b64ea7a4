"""Every benchmark of the attribution runs on a tiny shape and prints one JSON object with what it promises."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a script as its command line would; stdout must be one JSON object."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def call(name: str, *arguments: str) -> dict[str, Any]:
        importlib.import_module(name).main(["--tiny", "--json", *arguments])
        out, err = capfd.readouterr()
        assert err  # progress
        assert len(out.splitlines()) == 1
        return json.loads(out)

    yield call
    torch.set_num_threads(threads)


def test_edges_are_equal_to_those_of_plain_autograd(run):
    found = run("edges", "--repeats", "1", "--threads", "1")
    for rule in ("exact", "affine"):
        names = {
            "ratio",
            "ratio_with_forward",
            "ours_s",
            "ours_cold_s",
            "ours_forward_s",
            "alternative_s",
            "products_s",
        }
        assert names <= set(found[rule])
        assert found[rule]["ratio"] == pytest.approx(found[rule]["alternative_s"] / found[rule]["ours_s"])
    assert found["equal"]["max_rel_diff"] < 1e-5  # fp32 on a tiny block
    assert set(found["flat"]["vjp"]) == set(found["flat"]["rows"]) == set(found["flat"]["products"]) == {"4", "8"}
    assert found["machine"]["torch"] == torch.__version__


def test_both_forms_of_plain_autograd_give_the_same_gradients(run):
    from _plain_block import Form, PlainBlock, differentiated
    from _worlds import random_model
    from edges import TINY, ours, prepared

    model = random_model(TINY.shape)
    for rule in ("exact", "affine"):
        case = prepared(model, TINY, rule, tokens=TINY.tokens, seed=1)
        block = PlainBlock.of(case, *TINY.spread(TINY.tokens))
        with differentiated(block.layer, rule):
            for way in ("batched products", "copies"):
                edges = block.edges(Form(way, 3), block.forward())
                torch.testing.assert_close(edges, ours(case, rule)[:, : edges.shape[1]], rtol=1e-3, atol=1e-5)
        assert not vars(block.layer.mlp.act_fn).get("forward")  # the layer is as it was


PHASES = {"record", "score", "select", "lay out", "edges", "keep", "prune"}


def test_whole_graphs_of_peer_shape(run):
    """In a process of its own, as always."""
    found = run("peer_shape", "--repeats", "1", "--threads", "1")
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    assert found["autograd_ratio"] > 0
    (case,) = found["cases"]
    assert case["nodes"] == 20
    assert case["edges"] > case["nodes"]
    assert set(case["phases"]) == PHASES


def test_a_case_of_the_mlp_convention(run):
    from peer_shape import TINY, Case, measure

    found = measure(Case(TINY, 5, "mlp", None), repeats=1, threads=1)
    assert found["nodes"] == found["of_active"] == 2 * 5 * TINY.k
    assert set(found["phases"]) == PHASES
    assert "autograd_seconds" not in found


def test_growth_of_graphs(run):
    found = run("graph", "--repeats", "1", "--threads", "1")
    for axis in ("nodes", "tokens", "layers"):
        assert len(found[axis]["seconds"]) == 2
        assert set(found[axis]["exponents"]) == {"record_score", "select", "edges", "prune", "whole"}


def test_an_exponent_is_the_power(run):
    from _measure import exponent

    assert exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)


@pytest.mark.parametrize("convention", ["same-site", "mlp"])
def test_the_gpu_benchmark_on_a_small_shape(run, tmp_path, convention):
    kept = tmp_path / "cases.json"
    found = run("gpu_graph", "--convention", convention, "--out", str(kept))
    assert len(found["cases"]) == 4
    assert found["left_out"] == []
    for case in found["cases"]:
        assert case["peak_bytes"] >= 0
        assert (
            0 < case["floors"]["whole"] == pytest.approx(sum(case["floors"][n] for n in ("record", "score", "edges")))
        )
        assert case["share_of_floor"]["whole"] == pytest.approx(case["floors"]["whole"] / case["seconds"])
    assert json.loads(kept.read_text())["cases"] == found["cases"]


def test_without_time_cases_are_listed_as_left_out(run):
    found = run("gpu_graph", "--limit", "0")
    assert found["cases"] == []
    assert len(found["left_out"]) == 4


def test_kernels_against_the_dense_way(run):
    found = run("kernel_speed", "--repeats", "1", "--threads", "1")
    assert found["bandwidth_gb_per_s"] > 0
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):  # bf16: 8 bits, and ties at the threshold
        for tokens in ("1", "32"):
            case = found[precision][tokens]
            seconds = case["seconds"]
            assert case["ratio"] == pytest.approx(seconds["dense_whole"] / seconds["ours_whole"])
            assert set(case["gb_per_s"]) == set(case["share_of_floor"]) == {"encode", "decode", "whole"}
            assert case["rel_diff"] < tolerance


def test_bytes_that_kernels_must_read_by_hand(run):
    from _worlds import random_model
    from kernel_speed import TINY, least_bytes

    from hooks import SparseActs

    (coder, *_) = random_model(TINY).store
    acts = SparseActs(torch.ones(2, 2), torch.tensor([[0, 5], [5, 9]]))  # three different rows
    assert least_bytes(coder, acts) == {"encode": 4 * 96 * 40, "decode": 4 * 3 * 40, "whole": 4 * 99 * 40}


def test_steered_decoding_on_a_small_shape(run):
    found = run("gpu_steer", "--tokens", "2")
    assert set(found["decode"]) == {"plain", "steered", "observed", "replaced"}
    for case in found["decode"].values():
        assert case["share_of_floor"] == pytest.approx(case["floor_seconds"] / case["seconds_per_token"])
    floors = [found["decode"][mode]["floor_seconds"] for mode in ("plain", "steered", "replaced")]
    assert floors == sorted(floors)
    assert found["sweep"]["ablations"] == 10
    assert found["encode"]["sites"] == 2
    assert found["load"]["bytes"] > 2 * 4 * 96 * 40
    assert found["eager"]["plain_tokens_per_s"] > 0


def test_steered_generation_against_the_plain_library(run):
    found = run("steer", "--repeats", "1", "--threads", "1")
    seconds = found["seconds_per_token"]
    modes = {"transformers", "steered_0", "steered_1", "steered_5", "steered_all", "observed", "replaced"}
    assert set(found["ratio_to_transformers"]) == modes <= set(seconds)
    assert found["one_layer_overhead"] == pytest.approx(seconds["steered_1"] / seconds["transformers"] - 1)
    assert found["one_layer_overhead_over_ours"] == pytest.approx(seconds["steered_1"] / seconds["steered_0"] - 1)
    assert found["tokens_per_s"] == pytest.approx({name: 1 / each for name, each in seconds.items()})
    assert found["no_hooks_without_interventions"] is True
    assert found["hooks_with_one_layer"] == 1  # reads and writes the same site


def test_hooks_during_a_pass_are_seen_wherever_they_are(run):
    from _worlds import random_model, random_prompt
    from steer import TINY, hooks_during
    from torch.nn.modules.module import register_module_forward_hook

    model = random_model(TINY.shape)
    prompt = random_prompt(TINY.shape, TINY.prompt)
    plain = model.host.model
    for attach in (
        plain.lm_head.register_forward_hook,
        plain.model.layers[-1].mlp.register_forward_pre_hook,
        register_module_forward_hook,
    ):
        handle = attach(lambda *_: None)
        assert hooks_during(model, lambda: model.generate(prompt, max_new_tokens=1)) == 1
        handle.remove()
    assert hooks_during(model, lambda: model.generate(prompt, max_new_tokens=1)) == 0
    assert "forward" not in vars(model.host.decoder.norm)


def test_a_thousand_ablations_equal_both_loops(run):
    found = run("sweep", "--repeats", "1", "--threads", "1")
    for name in ("last_position", "uniform", "demo"):
        case = found[name]
        assert case["features"] == 12
        assert case["max_difference"] < 1e-4  # fp32 logits
        assert case["ratio"] == pytest.approx(case["loop_s"] / case["ours_s"])
        assert case["batched_rows"] in (32, 64, 128)
    assert found["last_position_ratio"] == found["last_position"]["ratio"]
    assert found["uniform_ratio"] == found["uniform"]["ratio"]


def test_the_memory_plan_against_what_was_allocated(run):
    """At a tiny shape the weights are most of it, and they are known to the byte."""
    found = run("plan", "--threads", "1")
    assert [case["case"].split(",")[0] for case in found["cases"]] == [
        "features", "features", "generate", "sweep", "trace", "trace",
    ]  # fmt: skip
    for case in found["cases"]:
        estimate, allocated = case["estimate"], case["allocated"]
        assert case["ratio_weights"] == pytest.approx(estimate["weights"] / allocated["weights"])
        assert case["ratio_weights"] == pytest.approx(1, rel=0.01)
        assert case["ratio_work"] == pytest.approx(estimate["work"] / allocated["work"])
        assert max(case["steps"].values()) == estimate["work"]
    assert found["worst"] == pytest.approx(max(abs(case["ratio_whole"] - 1) for case in found["cases"]))


def test_loading_transcoders(run):
    """Each case in a process of its own. Small sizes: the shares of memory mean nothing, the bytes do."""
    found = run("store", "--threads", "1")
    layer = 2 * (2 * 64 * 256 + 256 + 3 * 64)  # bf16
    assert found["load_encode"]["layer_bytes"] == found["load_encode_native"]["layer_bytes"] == layer
    assert found["open_native"]["layers"] == 5
    for name in ("five_in_turn", "five_in_turn_without_prefetch"):
        assert 2 * layer < found[name]["resident_bytes"] <= found[name]["budget_bytes"] == 200_000
    rows = 10 * 2 * 64
    assert rows < found["rows_native"]["bytes_read"] < rows + (1 << 14)  # beside them a header
    assert found["rows_published"]["extra_bytes"] > 0
    assert found["open_sibling"]["layers"] == found["load_sibling"]["layers"] == 27
    assert found["load_sibling"]["layer_bytes"] == 2 * (2 * 48 * 64 + 64 + 3 * 48)
    assert all(case["seconds"] > 0 for name, case in found.items() if name.startswith(("open", "rows")))
