"""Attention that does not reach the whole prompt, or is of another kind: sweeps give what runs give, or say how."""

import pytest
import torch
import transformers
from worlds import WORDS, random_transcoder, word_tokenizer

from hooks import Ablate, HookedModel, Site
from hooks.effects import staggered as rows_of_a_prompt
from hooks.errors import ModelError
from hooks.host import tap
from stress import sweeps

IDS = list(range(3, 11))


@pytest.mark.parametrize("number", [1, 3, 4, 5, 7, 8, 9, 11, 12, 14])
def test_random_models(number):
    made = sweeps.case(number)
    found = sweeps.check(made)
    assert found["largest"] <= sweeps.EXACT
    assert found["way"] == ("whole" if made.family == "Qwen3_5" else "suffix")


def qwen2(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes | options)).eval()


WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def hooked(network: torch.nn.Module) -> HookedModel:
    return HookedModel.from_model(network, word_tokenizer(), [random_transcoder(n, 40) for n in range(3)])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks_alone_attend_as_in_the_model(attention):
    """Block 0 sees everything, the others three tokens; so `calibrate` and `ose` see what the model does."""
    model = hooked(qwen2(attn_implementation=attention, **WINDOW))
    batch, sites = model.host.batch([IDS]), [Site("resid_pre", 0), Site("resid_post", 2)]
    _, seen = model.host.capture(batch, sites)
    torch.testing.assert_close(model.host.through_blocks(seen[sites[0]], 0, 3), seen[sites[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_held_patterns_are_those_of_the_window(attention):
    model = hooked(qwen2(attn_implementation=attention, **WINDOW))
    plain, held = model.run(IDS), model.run(IDS, hold="attention")
    torch.testing.assert_close(held.logits, plain.logits, rtol=0, atol=1e-5)


def test_a_block_that_computes_something_else_on_rows_is_noticed(monkeypatch, caplog):
    """The check stands between a kind of attention that nobody thought of and a wrong number: without its mask a
    windowed block is such a kind."""
    model = hooked(qwen2(**WINDOW))
    groups = [[Ablate(f"L{layer}/{feature}")] for layer in range(3) for feature in range(20)]
    right = model.sweep(IDS, groups)
    assert (right.way, caplog.text) == ("suffix", "")
    shared = rows_of_a_prompt._shared_attention
    monkeypatch.setattr(rows_of_a_prompt, "_shared_attention", lambda *args: shared(*args[:4]))
    found = model.sweep(IDS, groups)
    assert found.way == "whole"
    assert "block 1 adds something else to rows" in caplog.text
    torch.testing.assert_close(
        torch.tensor(found.table["delta"]), torch.tensor(right.table["delta"]), rtol=0, atol=1e-4
    )
    assert found.table["resolved"].tolist() == right.table["resolved"].tolist()


def test_a_mask_that_does_more_than_leave_keys_out_is_not_shared(caplog):
    """A bias on scores, as ALiBi has."""
    model = hooked(qwen2(attn_implementation="eager"))
    for layer in model.host.layers:
        layer.register_forward_pre_hook(biased, with_kwargs=True)
    found = model.sweep(IDS, [[Ablate(f"L0/{feature}")] for feature in range(40)])
    assert found.way == "whole"
    assert "mask does more" in caplog.text
    alone = [model.run(IDS, [Ablate(f"L0/{feature}")]).effect().delta for feature in range(40)]
    torch.testing.assert_close(torch.tensor(found.table["delta"]), torch.tensor(alone).double(), rtol=0, atol=1e-4)


def biased(module, args, kwargs):
    mask = kwargs["attention_mask"]
    back = torch.arange(mask.shape[-1])
    return args, kwargs | {"attention_mask": mask - 0.3 * (back[:, None] - back).clamp(min=0)}


# -- other kinds of models -------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None,
}  # fmt: skip


def hybrid() -> torch.nn.Module:
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    config = transformers.Qwen3_5TextConfig(**SMALL, **heads, **widths, layer_types=kinds)
    return transformers.Qwen3_5ForCausalLM(config).eval()


def experts() -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **options)).eval()


@pytest.mark.parametrize("make", [hybrid, experts])
def test_hybrids_and_experts_from_end_to_end(make):
    network = make()
    model = hooked(network)
    plain = network(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(model.run(IDS).logits, plain, rtol=0, atol=1e-5)
    feature = model.features(IDS, top=1).iloc[-1]
    address = f"L{feature.layer}/{feature.feature}"
    ablated = model.run(IDS, [Ablate(address)])
    assert not torch.equal(ablated.logits, plain)
    assert model.swap(IDS, error="live").effect.kl == pytest.approx(0, abs=1e-6)
    assert model.swap(IDS).effect.kl > 0
    # unsteered as transformers, and steered as without a cache, alone and in a batch of two lengths
    theirs = network.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, len(IDS) :]
    assert model.generate(IDS, max_new_tokens=6).ids == tuple(theirs.tolist())
    steered = [Ablate(address)]
    whole = [model.generate(ids, steered, max_new_tokens=6, use_cache=False) for ids in (IDS, IDS[:3])]
    both = model.generate([IDS, IDS[:3]], steered, max_new_tokens=6)
    assert [one.ids for one in both] == [one.ids for one in whole]
    torch.testing.assert_close(both[1].logits, whole[1].logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [hybrid, experts])
def test_a_session_goes_back_to_where_interventions_differ(make):
    """The cache of linear attention is one state for all tokens: going back reads them again."""
    model = hooked(make())
    session = model.session(IDS, [Ablate("L0/3")], new_tokens=12)
    list(session.stream(3))
    session.set([Ablate("L1/4@2:")])
    went_on = session.generate(3)
    alone = model.generate(went_on.prompt, [Ablate("L1/4@2:")], max_new_tokens=3, use_cache=False)
    assert went_on.ids == alone.ids
    torch.testing.assert_close(went_on.logits, alone.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [hybrid, experts])
def test_no_plan_is_better_than_one_that_leaves_weights_out(make):
    model = hooked(make())
    with pytest.raises(ModelError, match="not planned for models of this kind"):
        model.request(IDS)

    def no_room(*_):
        raise MemoryError

    handle = model.host.layers[0].register_forward_pre_hook(no_room)
    with pytest.raises(ModelError, match="memory ran out while running features"):
        model.run(IDS)
    handle.remove()


def test_the_sites_of_linear_attention():
    """attn_out is what the block's mixer adds, whichever it is."""
    network = hybrid()
    model = hooked(network)
    seen, batch = {}, model.host.batch([IDS])
    names = ("resid_pre", "attn_out", "resid_mid")
    model.host.forward(batch, [tap(Site(name, 0), seen) for name in names])
    pre, out, mid = (seen[Site(name, 0)] for name in names)
    assert torch.equal(pre + out, mid)
    assert model.effects(IDS, [Ablate("L0/3")], receivers=["attn_out 0"]).through
