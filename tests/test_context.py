"""How many tokens a model may be given, and models that no prompt fits at all."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from worlds import WORDS, random_transcoder, word_tokenizer

from hooks import HookedModel, UserError
from hooks.errors import ModelError, PromptError
from hooks.host.context import NO_LIMIT, context_of

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def rotated(parameters: object, limit: int | None = 32768) -> SimpleNamespace:
    named = {} if limit is None else {"max_position_embeddings": limit}
    return SimpleNamespace(rope_parameters=parameters, **named)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (rotated({"rope_type": "default", "rope_theta": 1e6}), 32768),
        (rotated({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}), 131072),  # Qwen2.5
        (rotated({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072), 131072),
        (rotated({"rope_type": "dynamic", "factor": 2.0}, 2048), 4096),
        (rotated({"rope_type": "linear", "factor": 2.0}, 2048), 4096),
        (rotated({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 131072), 131072),
        (rotated({"rope_type": "a new kind", "factor": 9.0}, 2048), 2048),
        (rotated({"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": None}, 1024), 8192),
        (SimpleNamespace(max_position_embeddings=2048, rope_scaling={"type": "linear", "factor": 2.0}), 4096),
        (SimpleNamespace(max_position_embeddings=2048, rope_scaling=None), 2048),
        (rotated(None, None), NO_LIMIT),
    ],
)
def test_what_configs_say(config, expected):
    assert context_of(config) == expected
    assert context_of(config, 7) == 7


@given(st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.text()))
def test_what_is_no_number_of_tokens(given):
    with pytest.raises(UserError, match="context = "):
        context_of(rotated(None), given)


def small(kind=transformers.Qwen2ForCausalLM, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None, "pad_token_id": 0}
    return kind(transformers.Qwen2Config(**sizes | heads | {"max_position_embeddings": 16} | options)).eval()


def hooked(network: torch.nn.Module, **options) -> HookedModel:
    return HookedModel.from_model(network, word_tokenizer(), [random_transcoder(n, 24) for n in range(2)], **options)


def test_a_stretched_rotation_is_used_to_its_end():
    network, ids = small(rope_parameters=YARN), list(range(3, 63))
    model = hooked(network)
    theirs = network(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.run(ids).logits, theirs, rtol=0, atol=1e-5)
    assert len(model.generate(ids, max_new_tokens=4).ids) == 4
    with pytest.raises(PromptError, match=r"at most 64 together(.|\n)*--context N"):
        model.generate(ids, max_new_tokens=5)
    with pytest.raises(PromptError, match=r"at most 64(.|\n)*--context N"):
        model.run([*ids, *ids])


def test_the_user_may_say_how_far_a_model_reads():
    network, ids = small(), list(range(3, 27))
    with pytest.raises(PromptError, match=r"at most 16(.|\n)*context=N"):
        hooked(network).run(ids)
    theirs = network(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(hooked(network, context=24).run(ids).logits, theirs, rtol=0, atol=1e-5)
    assert HookedModel.load("demo", context=9).host.max_positions == 9


def test_a_model_that_predicts_no_token_is_refused():
    with pytest.raises(ModelError, match="Qwen2ForSequenceClassification has no unembedding"):
        hooked(small(transformers.Qwen2ForSequenceClassification))


class PeftModel(torch.nn.Module):
    """As peft has it: a wrapper whose attributes are those of what is inside."""

    def __init__(self, inside: torch.nn.Module):
        super().__init__()
        self.base_model = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class PeftModelForCausalLM(PeftModel):
    pass


def test_adapters_are_to_be_merged_first():
    with pytest.raises(ModelError, match=r"a wrapper around a model with adapters(.|\n)*merge_and_unload\(\)"):
        hooked(PeftModelForCausalLM(small()))
