"""A base model with int8 weights is run, steered, swept and decoded like any other; transcoders stay as they are."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from worlds import random_qwen2, random_transcoder, word_tokenizer

from hooks import Ablate, Clamp, HookedModel
from hooks.generation.fast import FastDecoder
from hooks.host.host import stored_tensors
from hooks.types import Edit

pytest.importorskip("bitsandbytes")

PROMPT = "w1 w2 w3 w4"


def hooked(model: nn.Module) -> HookedModel:
    return HookedModel.from_model(model, word_tokenizer(), [random_transcoder(layer, 40) for layer in (0, 1, 3)])


def int8_model(folder, dtype=torch.float32) -> nn.Module:
    """Threshold 0: a row's outliers are not taken out, so a row does not depend on the others of its batch."""
    random_qwen2(dtype=dtype, tied=False).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> HookedModel:
    return hooked(int8_model(tmp_path_factory.mktemp("int8")))


@pytest.fixture(scope="module")
def plain() -> HookedModel:
    return hooked(random_qwen2(tied=False))


def strongest(model: HookedModel, layer: int) -> int:
    acts = model.record(PROMPT).layers[layer].acts
    return int(acts.indices[0, -1, acts.values[0, -1].argmax()])


def test_the_base_really_is_int8_and_near_its_original(int8, plain):
    weight = int8.host.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.int8
    found, expected = int8.run(PROMPT).logits, plain.run(PROMPT).logits
    assert not torch.equal(found, expected)
    # 7 bits for weights and activations: about 1 % of a logit per product, four blocks of a few products
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_an_empty_edit_and_an_edit_elsewhere_change_no_bit(int8):
    run = int8.run(PROMPT, [Clamp("L1/7@2", 9.0)])
    assert torch.equal(run.logits[:2], run.baseline[:2])
    assert not torch.allclose(run.logits[2:], run.baseline[2:], atol=0.1)
    assert torch.equal(int8.run(PROMPT, swap="all").logits, run.baseline)


def test_an_ablation_takes_the_decoder_row_away(int8):
    """What stands in front of the next block differs by −a · d, whatever the base's precision."""
    feature = strongest(int8, 1)
    site = int8.store.convention.write.at(1)
    edits = int8.edits(int8.host.batch([PROMPT]), [[Ablate(f"L1/{feature}@-1")]])
    seen = []
    for plan in ([], edits):
        batch = int8.host.batch([PROMPT])
        int8.host.forward(batch, [*plan, Edit(site, lambda x, at: seen.append(x) or x)])
    record = int8.record(PROMPT).layers[1].acts
    a = record.dense(96)[0, -1, feature]
    torch.testing.assert_close(seen[1][0, -1] - seen[0][0, -1], -a * int8.store[1].W_dec[feature], rtol=1e-4, atol=1e-5)


def test_steered_generation_with_and_without_cache_and_the_fast_decoder(int8):
    plan = [Clamp("L1/7", 9.0)]
    expected = int8.generate(PROMPT, plan, max_new_tokens=5)
    uncached = int8.generate(PROMPT, plan, max_new_tokens=5, use_cache=False)
    fast = FastDecoder(int8, max_length=20)
    fast.set(plan)
    fast.prefill(PROMPT)
    found = fast.generate(5)
    assert found.ids == expected.ids == uncached.ids
    # an activation next to a rounding step of int8 may fall to either side: one step in 127 of a product
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0.05)


def test_a_sweep_is_the_effect_of_single_runs(int8):
    acts = int8.record(PROMPT).layers[1].acts
    groups = [[Ablate(f"L1/{int(feature)}@-1")] for feature in acts.indices[0, -1][:5]]
    table = int8.sweep(PROMPT, groups, metrics=("delta_logit",)).table
    runs = [int8.run(PROMPT, group).effect().delta_logit for group in groups]
    assert table["delta_logit"].tolist() == pytest.approx(runs, abs=0.05)  # as above
    assert max(map(abs, runs)) > 0.2


def test_the_unembedding_of_a_half_precision_base_is_multiplied_in_fp32(tmp_path):
    """Quantisation leaves it alone; logits in bf16 would swallow effects."""
    model = hooked(int8_model(tmp_path, torch.bfloat16))
    assert model.run(PROMPT).logits.dtype == torch.float32


def test_the_fingerprint_tells_an_int8_base_from_its_original(int8, plain, tmp_path):
    assert int8.fingerprint == hooked(int8_model(tmp_path)).fingerprint
    assert int8.fingerprint != plain.fingerprint


def test_weights_that_are_several_tensors_in_one_are_read_part_by_part():
    """As torchao's are: integers and scales behind a tensor that is neither."""
    model = random_qwen2(tied=False, dtype=torch.bfloat16)
    rows = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(rows, 2 * rows), requires_grad=False)
    first, second = stored_tensors(model.lm_head.weight.detach())
    assert torch.equal(second, 2 * first)
    assert stored_tensors(rows)[0] is rows
    model = hooked(model)
    assert len(model.fingerprint) == 16
    # no matrix that could be multiplied in fp32: the module is called as it is
    assert type(model.host.unembed(torch.ones(1, 40, dtype=torch.bfloat16))) is TwoTensor
