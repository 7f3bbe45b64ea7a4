"""Rules: the factored exact rule is autograd; conserving rules conserve for any selection; remainders are said."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from worlds import WORDS, random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from circuits.attribution import RULES
from circuits.graph import BIAS, FEATURE, TARGET
from hooks import HookedModel, Site, UserError

WHOLE = {"node_threshold": 1.0, "edge_threshold": 1.0, "sample": 0}
TEXT = "w1 w2 w3 w4 w5"
CONSERVING = [name for name, rule in RULES.items() if rule.CONSERVES]


def edges_of(model, prompt, rule, **options):
    graph = trace(model, prompt, rule=rule, **WHOLE, **options)
    return graph, graph.edges_frame().set_index(["source", "target"])["weight"].sort_index()


def same_edges(model, prompt, **options):
    (_, slow), (_, fast) = (edges_of(model, prompt, rule, **options) for rule in ("autograd", "exact"))
    both = slow.index.intersection(fast.index)  # a node of pure rounding may be zero on one side
    scale = slow.abs().max()
    assert slow.drop(both).abs().max() < 1e-6 * scale or len(both) == len(slow)
    assert fast.drop(both).abs().max() < 1e-6 * scale or len(both) == len(fast)
    np.testing.assert_allclose(fast[both], slow[both], rtol=1e-3, atol=2e-6 * scale)


@pytest.mark.parametrize("max_nodes", [10_000, 30])
def test_the_factored_exact_rule_is_autograd(model, prompt, max_nodes):
    same_edges(model, prompt, max_nodes=max_nodes)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_also_on_other_architectures(family):
    config, make = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    torch.manual_seed(1)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15}
    model = make(config(**sizes, **heads, max_position_embeddings=64)).eval()
    hooked = HookedModel.from_model(model, word_tokenizer(), [random_transcoder(n, 40) for n in range(3)])
    same_edges(hooked, TEXT)


def test_also_where_tokens_reach_the_first_cut_through_blocks_and_cuts_sit_behind_blocks():
    coders = [random_transcoder(n, 40, read=Site("resid_post", n), write=Site("resid_post", n)) for n in (0, 2)]
    same_edges(HookedModel.from_model(random_qwen2(), word_tokenizer(), coders), TEXT)


@pytest.mark.parametrize("rule", CONSERVING)
@pytest.mark.parametrize("max_nodes", [10_000, 25, 1])
def test_conserving_rules_conserve_for_any_selection(model, prompt, rule, max_nodes):
    """Position 0, errors, rests, decoder and value biases included; every edge is computed on its own."""
    graph, _ = edges_of(model, prompt, rule, max_nodes=max_nodes)
    assert graph.meta["conservation"]["max_rel_error"] <= 1e-5


@pytest.mark.parametrize("rule", CONSERVING)
def test_under_a_conserving_rule_the_edges_into_the_target_are_its_value(odd, rule):
    graph, _ = edges_of(odd, TEXT, rule)
    (row,) = graph.index.rows(TARGET)
    assert graph.weight[graph.target == row].sum() == pytest.approx(graph.activation[row], rel=1e-4)


def test_value_biases_are_edges_of_their_own(odd):
    """Without them the affine rule would not add up: the random model has large QKV biases."""
    graph, _ = edges_of(odd, TEXT, "affine")
    bias = graph.index.kind[graph.source] == BIAS
    into_feature = graph.index.kind[graph.target] == FEATURE
    assert np.abs(graph.weight[bias & into_feature]).max() > 1e-2


def test_conservation_holds_from_tokens_through_blocks():
    coders = [random_transcoder(n, 40, dtype=torch.float64) for n in (1, 3)]
    model = HookedModel.from_model(random_qwen2(dtype=torch.float64), word_tokenizer(), coders)
    for rule in CONSERVING:
        graph, _ = edges_of(model, TEXT, rule)
        assert graph.meta["conservation"]["max_rel_error"] <= 1e-6  # transformers' norms run in fp32


def test_what_does_not_conserve_says_how_much_it_leaves_over(model, prompt):
    for rule in set(RULES) - set(CONSERVING):
        graph, _ = edges_of(model, prompt, rule)
        assert 0 < graph.meta["remainder_share"] < 1
        assert "conservation" not in graph.meta


def test_a_model_the_algebra_does_not_know_is_refused_or_differentiated():
    model = random_qwen2()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    hooked = HookedModel.from_model(model, word_tokenizer(), [random_transcoder(n, 40) for n in (0, 1)])
    with pytest.raises(UserError, match="what a block computes"):
        trace(hooked, TEXT, rule="affine")
    assert trace(hooked, TEXT, rule="exact", sample=20).n_edges > 0


def test_a_planted_sink_with_a_large_key_bias_stays_exact(sink):
    """First token 100 times the usual norm: cancellation behind the norms must not spoil the products."""
    same_edges(sink, TEXT)
    for rule in CONSERVING:
        graph, _ = edges_of(sink, TEXT, rule)
        assert graph.meta["conservation"]["max_rel_error"] <= 1e-5
    assert edges_of(sink, TEXT, "exact")[0].meta["sinks"] == [0]
