"""Parts of edges sum to the edge, and each part is what its name says: measured by cutting that path in the block."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from worlds import WORDS, random_qwen2, random_transcoder, word_tokenizer

from circuits import decompose, trace
from circuits.attribution import RULES
from hooks import HookedModel, Site, UserError

TEXT = "w1 w2 w3 w4 w5"
WHOLE = {"node_threshold": 1.0, "edge_threshold": 1.0, "sample": 0}
BY_HEADS = [name for name, rule in RULES.items() if hasattr(rule, "RULE") and name != "ig"]


def sums_up(model, prompt, rule, tolerance=2e-6, **options):
    graph = trace(model, prompt, rule=rule, **WHOLE, **options)
    parts = decompose(model, graph, top=400)
    edges = graph.edges_frame().set_index(["source", "target"])["weight"]
    total = parts.groupby(["source", "target"])["weight"].sum()
    assert len(total) > 50
    scale = edges.abs().max()
    assert (total - edges[total.index]).abs().max() <= tolerance * scale
    return graph, parts


@pytest.mark.parametrize("rule", BY_HEADS)
def test_the_parts_of_an_edge_sum_to_it(model, prompt, rule):
    _, parts = sums_up(model, prompt, rule)
    assert set(parts["part"]) <= {"direct", "mlp", "ov", "key", "query"}
    if RULES[rule].RULE.attention == "frozen":
        assert not parts["part"].isin(["key", "query"]).any()


def test_head_norms_are_part_of_it():
    torch.manual_seed(1)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, max_position_embeddings=64)).eval()
    model = HookedModel.from_model(qwen3, word_tokenizer(), [random_transcoder(n, 40) for n in range(3)])
    sums_up(model, TEXT, "exact")


def test_a_sink_and_a_pair_and_reads_inside_a_block_too(sink):
    sums_up(sink, TEXT, "exact")
    sums_up(sink, TEXT, "affine", counterfactual="w1 w9 w3 w4 w5")
    coders = [random_transcoder(n, 40, read=Site("resid_mid", n), write=Site("resid_post", n)) for n in range(4)]
    sums_up(HookedModel.from_model(random_qwen2(), word_tokenizer(), coders), TEXT, "exact")


def test_edges_across_positions_run_through_heads_alone(odd):
    graph, parts = sums_up(odd, TEXT, "exact")
    place = dict(zip(graph.names, graph.index.pos, strict=True))
    across = parts[parts["source"].map(place) != parts["target"].map(place)]
    assert len(across)
    assert set(across["part"]) <= {"ov", "key"}
    assert set(parts[parts["part"].isin(["direct", "mlp"])]["head"]) == {-1}


def test_a_head_that_writes_nothing_has_no_part(demo):
    """Zero one head's rows of W_O: its three parts vanish, and the rest still sums to the edge."""
    import copy

    silent = copy.deepcopy(demo.host.model)
    d_head, head = silent.model.layers[0].self_attn.head_dim, 1
    with torch.no_grad():
        for layer in silent.model.layers:
            layer.self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head] = 0
    model = HookedModel.from_model(silent, demo.host.tokenizer, demo.store)
    _, parts = sums_up(model, "fact: the capital of the state containing Dallas is", "exact")
    assert head not in set(parts["head"])
    assert {0, 2, 3} <= set(parts["head"])


def test_what_has_no_heads_is_refused(odd):
    graph = trace(odd, TEXT, rule="ose", max_nodes=20, **WHOLE)
    with pytest.raises(UserError, match="no parts by heads"):
        decompose(odd, graph)
    graph = trace(odd, TEXT, **WHOLE)
    rest = next(n for n, row in enumerate(graph.source) if graph.names[row].startswith("token"))
    with pytest.raises(UserError, match="cannot be split by heads"):
        decompose(odd, graph, [rest])
