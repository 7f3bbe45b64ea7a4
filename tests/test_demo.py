"""The promises of the embedded model, on the shipped weights, by the protocols of `circuits/demo`."""

import json
import subprocess
import sys

import pytest
import torch

from circuits import trace
from circuits.demo import Exam
from circuits.demo.discovery import agreement, discovery_ranks
from circuits.demo.feature_swap import ablate_states, average_precision, best_site, select
from circuits.demo.quality import mean_swap_scan, reconstruction_quality, two_hop_accuracy
from circuits.demo.questions import STATE_NAMES
from circuits.demo.story import label_states
from hooks.demo import PROMPT, WEIGHTS
from hooks.demo.world import HEADLINE_PROMPT, STATE_OF_CITY, TEST_TEMPLATE, TWO_HOP_TEMPLATES
from hooks.files import sha256


@pytest.fixture(scope="module")
def exam(demo) -> Exam:
    return Exam.of(demo)


@pytest.fixture(scope="module")
def dense_exam(demo_dense) -> Exam:
    return Exam.of(demo_dense)


@pytest.fixture(scope="module")
def selections(exam):
    return select(exam)


@pytest.fixture(scope="module")
def scan(exam):
    return mean_swap_scan(exam)


def test_two_hops_are_answered_also_where_they_never_were_trained(exam, demo):
    accuracy = two_hop_accuracy(exam)
    assert accuracy.trained >= 0.99
    assert accuracy.held_out >= 0.95
    assert "Dallas" in exam.held_out
    assert demo.run(PROMPT).top_before(1)[0].token == " Austin"
    assert PROMPT == HEADLINE_PROMPT


def test_the_first_hop_is_computed_by_the_blocks(scan):
    assert max(share for (layer, _), share in scan.items() if layer >= 1) >= 0.9
    assert max(share for (layer, _), share in scan.items() if layer == 0) <= 0.15


def test_the_split_of_the_protocol_holds(exam):
    chosen, tested = exam.selection_questions(), exam.test_questions()
    assert len(tested) == 50
    assert not set(chosen.prompts) & set(tested.prompts)
    assert not set(exam.trained) & set(exam.held_out)
    assert all(
        prompt == TEST_TEMPLATE.format(c=city) for prompt, city in zip(tested.prompts, exam.held_out, strict=True)
    )
    assert [STATE_OF_CITY[city] for city in exam.held_out] == list(STATE_NAMES)
    tokens = exam.model.host.batch(tested.prompts).strings
    for row, city in enumerate(exam.held_out):
        assert tokens[row][int(tested.positions["city"][row])] == " " + city.split()[-1]
        assert int(tested.positions["final"][row]) == len(tokens[row]) - 1


SWAP_ALL = """
import dataclasses, json, sys, torch
from circuits.demo.feature_swap import best_site, select, swap_states
from circuits.demo import Exam
from hooks import HookedModel
torch.set_num_threads(1)
exam = Exam.of(HookedModel.load("demo"))
print(json.dumps(dataclasses.asdict(swap_states(exam, [best_site(select(exam))]))))
"""


def test_swapping_features_swaps_the_state_for_all_ordered_pairs():
    """In a process of its own, without shape checks: those of 70,000 interventions would take minutes."""
    done = subprocess.run([sys.executable, "-c", SWAP_ALL], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pairs"] == 50 * 49
    assert result["success"] >= 0.9
    assert result["third_state"] <= 0.02
    assert result["random"] <= 0.02


def test_zeroing_features_hits_the_answer_and_not_the_others(exam, selections):
    result = ablate_states(exam, [best_site(selections)])
    assert result.others - result.answer >= 5


def test_transcoders_explain_fresh_text(exam):
    assert max(site.fvu for site in reconstruction_quality(exam)) <= 0.06


def test_the_model_lives_through_swapping_all_sites_but_the_first(exam, demo):
    accuracy = two_hop_accuracy(exam, swap=demo.store.layers[1:], error="zero")
    assert (accuracy.trained * len(exam.trained) + accuracy.held_out * 50) / (len(exam.trained) + 50) >= 0.85


def test_the_tracer_finds_the_states_features_without_being_told(exam, selections, scan):
    site = max((s for s in scan if s[0] > 0), key=lambda s: scan[s])
    found = discovery_ranks(exam, selections, site)
    assert found.found >= 50
    assert found.by_score <= 0.05
    assert 0.35 < found.by_chance < 0.65


def test_scores_predict_real_ablations(exam, dense_exam):
    assert agreement(exam, edges=False).metric >= 0.88
    assert agreement(dense_exam, edges=False).metric >= 0.90


def test_the_dense_set_has_the_published_proportions(demo_dense):
    width = demo_dense.host.d_model
    for layer in demo_dense.store.layers:
        features = demo_dense.store.d_features(layer)
        assert features == round(2.4 * width)
        assert demo_dense.store.k(layer) == int(0.12 * features)


def test_the_weights_are_small_and_match_their_manifest():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in files)
    for manifest in WEIGHTS.rglob("manifest.json"):
        for entry in json.loads(manifest.read_text())["layers"].values():
            assert sha256(manifest.parent / entry["file"]) == entry["sha256"]


def test_the_model_has_every_part_of_the_real_block(demo):
    model = demo.host.model
    config = model.config
    assert config.model_type == "qwen2"
    assert not config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    attention = demo.host.layers[0].self_attn
    assert all(getattr(attention, name).bias.abs().sum() > 0 for name in ("q_proj", "k_proj", "v_proj"))
    assert all(layer in demo.store for layer in range(demo.host.n_layers))


def test_average_precision_by_hand():
    """Ranked: prompt 2 (yes), 0 (no), 1 (yes); prompt 3 (yes) is inactive, never retrieved: (1 + 2/3) / 3."""
    values = torch.tensor([[2.0], [1.0], [3.0], [0.0]])
    labels = torch.tensor([[False], [True], [True], [True]])
    assert float(average_precision(values, labels)) == pytest.approx((1 + 2 / 3) / 3)


def test_the_circuit_of_the_headline_names_texas(demo, exam, selections):
    graph = label_states(trace(demo, PROMPT, sample=0), selections, exam)
    assert "Texas" in graph.meta["labels"].values()
    assert len(TWO_HOP_TEMPLATES["capital"]) >= 5
