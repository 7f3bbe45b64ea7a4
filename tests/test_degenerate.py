"""Sets without an active feature, streams of zeros, modes without gradients: an answer or one sentence."""

import json
from dataclasses import replace

import pytest
import torch
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import Feature, trace
from circuits.attribution import RULES
from circuits.cli import main
from circuits.tracing import prepare
from hooks import HookedModel, UserError

TEXT = "w1 w2 w3 w4"
FACT = "fact: the capital of"


def silent() -> HookedModel:
    """Plain ReLU with biases far below zero."""
    coders = [random_transcoder(layer, 40, k=None) for layer in range(4)]
    coders = [replace(coder, b_enc=coder.b_enc - 1e6) for coder in coders]
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


@pytest.mark.parametrize("build", [trace, prepare])
def test_without_an_active_feature_there_is_no_graph(build):
    with pytest.raises(UserError, match="no feature is active on this prompt"):
        build(silent(), TEXT)


def test_a_prompt_without_features_is_an_empty_table():
    assert silent().features(TEXT).empty


def test_a_stream_of_zeros_has_no_share_that_a_feature_writes(capsys, monkeypatch):
    """Strength is |a d| / |x|: undefined there, null in JSON, never inf. Some are active: the encoder has biases."""
    model = random_hooked()
    model.host.model.get_input_embeddings().weight.data[model.host.token_id("w2")] = 0
    monkeypatch.setattr("circuits.commands.features.load", lambda args, layers: model)
    assert main(["features", TEXT, "--layers", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["features"]
    empty = [row for row in rows if row["pos"] == 1]
    assert empty
    assert all(row["strength"] is None and row["activation"] > 0 for row in empty)
    assert all(row["strength"] > 0 for row in rows if row["pos"] != 1)
    table = model.features(TEXT, layers=[0])
    assert table["strength"].isna().tolist() == [row["strength"] is None for row in rows]


@pytest.mark.parametrize("size", ["inf", "nan", "-inf", "0", "-1", "1e400"])
def test_a_budget_is_an_amount_of_memory(size, capsys):
    assert main(["features", FACT, f"--budget-gb={size}"]) == 2
    assert "holds nothing" in capsys.readouterr().err


def test_a_layer_of_five_thousand_digits_is_refused_in_one_line(capsys):
    assert main(["ablate", FACT, "--feature", f"L{'9' * 5000}/1"]) == 2
    err = capsys.readouterr().err
    assert "is beyond any model" in err
    assert len(err) < 300


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_graph_does_not_depend_on_the_callers_mode(odd, mode, rule):
    options = {"max_nodes": 12, "rule": rule, "sample": 0}
    expected = trace(odd, TEXT, Feature("L3/7"), **options)
    with mode():
        found = trace(odd, TEXT, Feature("L3/7"), **options)
        rows = list(RULES[rule].edge_rows(prepare(odd, TEXT, Feature("L3/7"), max_nodes=12, rule=rule)))
    assert rows
    assert found.nodes_frame().equals(expected.nodes_frame())
    assert found.edges_frame().equals(expected.edges_frame())
