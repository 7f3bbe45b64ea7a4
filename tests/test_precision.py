"""Effects on a half-precision model are those of its weights, not of its rounding."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from hooks import Ablate, Clamp, HookedModel, UserError
from hooks.errors import ModelError
from hooks.kernels import products as kernels

TEXT = "w1 w2 w3 w4 w5"
HALF = [torch.bfloat16, torch.float16]


def hooked(hf, precision: str | None = None) -> HookedModel:
    coders = [random_transcoder(layer, 40) for layer in range(4)]
    return HookedModel.from_model(hf, word_tokenizer(), coders, precision=precision)


def half(dtype: torch.dtype):
    return random_qwen2(tied=False).to(dtype)


def spread(model: HookedModel, count: int = 300) -> list[Ablate]:
    """Active features of every layer and position, evenly taken."""
    names = model.sweep(TEXT).table["name"]
    return [Ablate(name) for name in names[:: max(1, len(names) // count)]]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALF)
def test_exact_effects_are_those_of_a_wide_copy_of_the_weights(dtype, wide):
    hf = half(dtype)
    truth, model = hooked(copy.deepcopy(hf).to(wide)), hooked(hf)
    features = spread(truth)
    expected, found = (m.sweep(TEXT, features).table["delta"].to_numpy() for m in (truth, model))
    assert np.corrcoef(expected, found)[0, 1] > 0.9999
    assert abs(found - expected).max() < 0.01 * np.sqrt((expected**2).mean())
    native = hooked(hf, "native").sweep(TEXT, features).table["delta"].to_numpy()
    assert abs(native - expected).max() > 30 * abs(found - expected).max()


@pytest.mark.parametrize("dtype", HALF)
def test_graphs_and_their_verification_are_those_of_a_wide_copy(dtype):
    hf = half(dtype)
    truth, model = hooked(copy.deepcopy(hf).float()), hooked(hf)
    graphs = [trace(m, TEXT, max_nodes=60, sample=40, progress=False) for m in (truth, model)]
    expected, found = (graph.meta["verification"] for graph in graphs)
    assert abs(expected["node_spearman"] - found["node_spearman"]) < 0.005
    assert abs(expected["edge_spearman"] - found["edge_spearman"]) < 0.005
    assert [graph.meta["precision"] for graph in graphs] == ["float32", "exact"]


@pytest.mark.parametrize("hold", ["nothing", ("attention", "norms", "gates")])
def test_runs_records_effects_and_held_parts_compute_exactly(hold):
    hf = half(torch.bfloat16)
    truth, model = hooked(copy.deepcopy(hf).float()), hooked(hf)
    plan = [Ablate("L1/3"), Clamp("L2/5@1", 3.0)]
    runs = [m.run(TEXT, plan, hold=hold) for m in (truth, model)]
    torch.testing.assert_close(runs[1].logits, runs[0].logits, rtol=1e-4, atol=1e-4)
    assert [run.precision for run in runs] == ["float32", "exact"]
    records = [m.record(TEXT).layers[3].read for m in (truth, model)]
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-4)
    totals = [m.effects(TEXT, plan, "w3").total for m in (truth, model)]
    assert totals[1] == pytest.approx(totals[0], abs=1e-3)


def test_the_model_is_afterwards_what_it_was():
    model = hooked(half(torch.bfloat16))
    ids = torch.tensor([model.host.tokenize(TEXT)])
    plain = model.host.model(input_ids=ids).logits
    model.run(TEXT, [Ablate("L1/3")])
    assert not model.host.exact
    assert not any("forward" in vars(module) for module in model.host.model.modules())
    after = model.host.model(input_ids=ids).logits
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, plain)


class Largest(TorchDispatchMode):
    """The most numbers that any new fp32 tensor has had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor) and part.dtype == torch.float32:
                self.numbers = max(self.numbers, part.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("gradients", [False, True])
def test_no_copy_of_a_weight_is_ever_made(monkeypatch, gradients):
    """The MLP's matrices have 160,000 numbers; the largest activations, of several copies of two tokens, fewer."""
    monkeypatch.setattr(kernels, "CAST_TILE", 8000)
    model = hooked(random_qwen2(d_ff=4000).bfloat16())
    with Largest() as largest:
        if gradients:
            trace(model, "w1 w2", max_nodes=6, rule="autograd", sample=0, progress=False)
        else:
            model.run("w1 w2", [Ablate("L1/3")]).effect()
    assert 8000 <= largest.numbers < 4000 * 40


def test_generation_is_the_models_own_unless_asked():
    hf = half(torch.bfloat16)
    truth, model = hooked(copy.deepcopy(hf).float()), hooked(hf)
    ids = torch.tensor([model.host.tokenize(TEXT)])
    theirs = hf.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(model.generate(TEXT, max_new_tokens=8).ids) == theirs
    exact = model.generate(TEXT, [Clamp("L1/3", 2.0)], max_new_tokens=8, precision="exact")
    wide = truth.generate(TEXT, [Clamp("L1/3", 2.0)], max_new_tokens=8)
    assert exact.ids == wide.ids
    torch.testing.assert_close(exact.logits, wide.logits, rtol=1e-4, atol=1e-4)
    streamed = list(model.stream(TEXT, [Clamp("L1/3", 2.0)], max_new_tokens=8, precision="exact"))
    assert tuple(token.id for token in streamed) == exact.ids


@pytest.mark.parametrize("precision", ["exact", "native"])
def test_errors_are_the_same_in_both(precision):
    model = hooked(half(torch.bfloat16), precision)
    for plan, words in (([Ablate("L9/3")], "layer 9"), ([Ablate("L1/3@99")], "99")):
        with pytest.raises(UserError, match=words):
            model.run(TEXT, plan)


def test_rounding_is_native_minus_exact():
    hf = half(torch.bfloat16)
    found = hooked(hf).rounding(TEXT)
    native, exact = (hooked(hf, name).run(TEXT).baseline[-1].double() for name in ("native", "exact"))
    assert found.largest == float((native - exact).abs().max()) > 0
    assert found.same_answer == (int(native.argmax()) == int(exact.argmax()))
    wide = hooked(random_qwen2()).rounding(TEXT)
    assert (wide.largest, wide.rms, wide.same_answer) == (0.0, 0.0, True)


def test_weights_that_are_not_known_are_measured_natively_and_that_is_said(caplog):
    torch.manual_seed(0)
    small = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=64, moe_intermediate_size=16, max_position_embeddings=64, **small, **more)
    hf = Qwen3MoeForCausalLM(config).eval().bfloat16()
    coders = [random_transcoder(layer, 40) for layer in range(2)]
    with caplog.at_level(logging.WARNING, "hooks"):
        model = HookedModel.from_model(hf, word_tokenizer(), coders)
    assert model.precision == "native"
    assert "exact arithmetic does not know" in caplog.text
    assert model.run(TEXT, [Ablate("L1/3")]).precision == "native"
    with pytest.raises(ModelError, match="exact arithmetic does not know"):
        HookedModel.from_model(hf, word_tokenizer(), coders, precision="exact").run(TEXT)
    with pytest.raises(UserError, match="unknown precision"):
        hooked(random_qwen2(), "double")
