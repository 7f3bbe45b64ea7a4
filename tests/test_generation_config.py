"""A model's own generation_config: unsteered, we say what transformers say; what cannot be said is refused by name."""

import math

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig
from worlds import random_hooked

from hooks import Clamp, Sampling, Steer, UserError
from hooks.errors import ModelError
from hooks.generation.fast import FastDecoder
from hooks.generation.generation_config import HONOURED, REFUSED, REPLACED, SAMPLING, WITHOUT_EFFECT, Processing
from hooks.host.host import Attached
from stress import generation as stress

SEEDS = (2, 4, 9, 14)


@pytest.fixture
def model():
    """Its own for every test: generation_config is changed in place."""
    return random_hooked(missing=None)


def config_of(model) -> GenerationConfig:
    return model.host.model.generation_config


def theirs(model, prompt: str, new: int, **options) -> list[int]:
    ids = torch.tensor([model.host.tokenize(prompt)])
    out = model.host.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_configs_on_random_models(seed):
    """`stress/generation.py` runs hundreds."""
    assert stress.check(seed) == []


def test_a_penalty_changes_greedy_text_and_is_read_anew_for_every_text(model):
    plain = model.generate("w1 w2 w3", max_new_tokens=8)
    config_of(model).repetition_penalty = 5.0
    config_of(model).eos_token_id = None
    penalised = model.generate("w1 w2 w3", max_new_tokens=8)
    assert penalised.ids != plain.ids
    assert len({*penalised.prompt, *penalised.ids}) == len(penalised.prompt + penalised.ids)
    assert list(penalised.ids) == theirs(model, "w1 w2 w3", 8, do_sample=False)


def test_logits_stay_the_models_own(model):
    """Not what the token was chosen from: that of effects, log-probabilities and of a forward pass over the text."""
    config_of(model).repetition_penalty = 5.0
    said = model.generate("w1 w2 w3", [Clamp("L1/7@-1", 3.0)], max_new_tokens=6)
    whole = model.run([*said.prompt, *said.ids], [Clamp(f"L1/7@{len(said.prompt) - 1}", 3.0)])
    torch.testing.assert_close(said.logits, whole.logits[len(said.prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
    assert list(said.ids) != said.logits.argmax(-1).tolist()
    token = next(model.stream("w1 w2 w3", [Clamp("L1/7@-1", 3.0)], max_new_tokens=1))
    assert token.logprob == pytest.approx(float(said.logprobs[0]), abs=1e-5)


def test_both_texts_of_an_experiment_are_chosen_alike(model):
    config_of(model).no_repeat_ngram_size = 1
    config_of(model).eos_token_id = None
    found = model.steer("w1 w2 w3", [Clamp("L1/7@-1", 9.0)], max_new_tokens=8)
    for scored in (found.baseline, found.steered):
        assert len(set(scored.ids)) == 8
    assert list(found.baseline.ids) == theirs(model, "w1 w2 w3", 8, do_sample=False)
    dose = model.dose("w1 w2 w3", [Steer("L1/7@-1")], "0,9", max_new_tokens=4)
    assert all(len(set(one.scored.ids)) == 4 for one in dose.doses)


@pytest.mark.parametrize("ends", [0, [0, 5], torch.tensor([0]), None])
def test_the_end_token_is_the_configs_zero_included(model, ends):
    """0 is a token like any other, and not "nothing said"."""
    with torch.no_grad():
        behind = model.host.forward_hidden(model.host.batch(["w1 w2 w3"]))[0, -1]
        head = model.host.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
        head.weight[0] = 9 * behind / behind.norm()
    model.host.model.config.eos_token_id = 9
    config_of(model).eos_token_id = ends
    config_of(model).pad_token_id = 1
    said = model.generate("w1 w2 w3", max_new_tokens=4)
    assert said.ids[0] == 0
    assert (said.ids == (0,), said.reason) == ((True, "end") if ends is not None else (False, "length"))
    assert list(said.ids) == theirs(model, "w1 w2 w3", 4, do_sample=False)


def test_stop_strings_of_the_config_end_the_text_as_transformers_do():
    case = stress.random_case(5)
    config, prompt = case.hf.generation_config, list(case.prompts[0])
    config.eos_token_id, free = None, case.model.generate(prompt, max_new_tokens=6)
    config.stop_strings = case.model.host.string(free.ids[2])
    said = case.model.generate(prompt, max_new_tokens=6)
    assert list(said.ids) == stress.theirs(case, prompt)
    assert said.reason == "stop"
    assert config.stop_strings not in said.text
    assert len(said.ids) <= 3


# -- refused -------------------------------------------------------------------------------------------------------

ASKING = {
    "num_beams": 3, "num_beam_groups": 2, "num_return_sequences": 2, "penalty_alpha": 0.6, "dola_layers": "high",
    "constraints": [1], "force_words_ids": [[5]], "prompt_lookup_num_tokens": 2, "assistant_early_exit": 1,
    "use_mtp": True, "speculation_type": "dflash", "is_assistant": True, "token_healing": True,
    "guidance_scale": 1.5, "max_time": 1.0, "cache_implementation": "quantized",
    "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("way", ["generate", "batch", "stream", "session", "decoder", "steer", "sampling"])
def test_another_kind_of_decoding_is_refused_by_name_before_the_model_runs(model, monkeypatch, name, way):
    decoder = FastDecoder(model, max_length=16)
    decoder.prefill("w1 w2")
    setattr(config_of(model), name, ASKING[name])
    monkeypatch.setattr(Attached, "step", lambda *_: pytest.fail("the model ran"))
    ways = {
        "generate": lambda: model.generate("w1"),
        "batch": lambda: model.generate(["w1", "w2 w3"]),
        "stream": lambda: model.stream("w1"),
        "session": lambda: model.session("w1"),
        "decoder": lambda: decoder.generate(2),
        "steer": lambda: model.steer("w1", [Clamp("L1/7", 1.0)]),
        "sampling": lambda: Sampling.of(model),
    }
    with pytest.raises(ModelError, match=f"generation_config sets {name}, which is not supported"):
        ways[way]()


def test_every_field_of_transformers_has_its_place():
    """A field that a new release brings is refused where it is set, until someone has looked at it."""
    known = {*REFUSED, *HONOURED, *SAMPLING, *REPLACED, *WITHOUT_EFFECT}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= known
    assert set(ASKING) >= set(REFUSED)


def test_an_unknown_field_of_transformers_is_refused_and_a_private_one_is_not(model, monkeypatch):
    config_of(model).chat_format = "chatml"  # published configurations carry such; transformers do not look at it
    model.generate("w1", max_new_tokens=1)
    monkeypatch.setattr("hooks.generation.generation_config.WITHOUT_EFFECT", WITHOUT_EFFECT - {"prefill_chunk_size"})
    config_of(model).prefill_chunk_size = 4
    with pytest.raises(ModelError, match="sets prefill_chunk_size"):
        model.generate("w1", max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", -1.0), ("bad_words_ids", []), ("no_repeat_ngram_size", 1.5), ("sequence_bias", [[5, 1.0]]),
     ("stop_strings", ["\N{SNOWMAN}"]), ("forced_eos_token_id", -7)],
)  # fmt: skip
def test_values_that_transformers_refuse_are_refused_in_words(model, name, value):
    setattr(config_of(model), name, value)
    with pytest.raises(ModelError, match="transformers cannot use the model's generation_config"):
        model.generate("w1 w2", max_new_tokens=2)


def test_a_config_that_leaves_no_token_is_refused(model):
    """transformers take token 0 then."""
    config_of(model).suppress_tokens = list(range(model.host.d_vocab))
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(ModelError, match="no token is left to choose from behind 0 new tokens"):
            model.generate("w1", max_new_tokens=2, sampling=sampling)


# -- sampling ------------------------------------------------------------------------------------------------------


def test_what_a_model_says_about_sampling_is_taken_when_asked_for(model):
    """The settings that Qwen2.5-Instruct is published with."""
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    for name, value in said.items():
        setattr(config_of(model), name, value)
    own = Sampling.of(model, seed=3)
    assert own == Sampling(temperature=0.7, top_p=0.8, seed=3, top_k=20)
    assert own == Sampling.of(model.host.model, seed=3)
    config_of(model).do_sample = False
    assert Sampling.of(model) == Sampling()
    assert list(model.generate("w1 w2", max_new_tokens=6).ids) == theirs(model, "w1 w2", 6, do_sample=False)
    config_of(model).do_sample, config_of(model).top_k = True, None
    assert Sampling.of(model).top_k == 50  # what transformers take where nothing is said
    config_of(model).typical_p = 0.5
    with pytest.raises(ModelError, match="samples by typical_p"):
        Sampling.of(model)


def test_a_penalty_of_the_sampling_stands_in_for_the_configs(model):
    config_of(model).eos_token_id = None
    for own in (1.3, 5.0):
        config_of(model).repetition_penalty = 2.0
        mine = model.generate("w1 w2 w3", max_new_tokens=8, sampling=Sampling(repetition_penalty=own))
        assert list(mine.ids) == theirs(model, "w1 w2 w3", 8, do_sample=False, repetition_penalty=own)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [(Sampling(1.0, top_k=1), {2}), (Sampling(1.0, top_k=3), {2, 0, 3}), (Sampling(1.0, top_k=99), {0, 1, 2, 3}),
     (Sampling(1.0, min_p=0.31), {2, 0}), (Sampling(1.0, min_p=0.29), {2, 0, 3}),
     (Sampling(1.0, min_p=1.0), {2}), (Sampling(1.0, 0.6, top_k=3), {2, 0})],
)  # fmt: skip
def test_top_k_and_min_p_keep_what_they_say(sampling, allowed):
    probs = torch.tensor([0.3, 0.05, 0.5, 0.15])
    scores = sampling.warpers()(torch.zeros(1, 1, dtype=torch.int64), probs.log()[None])[0]
    assert set(scores.isfinite().nonzero()[:, 0].tolist()) == allowed
    drawn = {sampling.pick(scores, torch.Generator().manual_seed(seed)) for seed in range(300)}
    assert drawn == allowed


def test_random_numbers_belong_to_tokens_whatever_else_is_left_out(model):
    """Leaving out tokens that were not drawn changes no draw."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for seed in range(20):
        drawn = []
        for sampling in (Sampling(1.0), Sampling(1.0, top_k=60), Sampling(1.0, min_p=1e-3)):
            scores = sampling.warpers()(ids, logits[None])[0]
            drawn.append(sampling.pick(scores, torch.Generator().manual_seed(seed)))
        kept = set(torch.topk(logits, 60).indices.tolist())
        assert drawn[0] == drawn[2] or drawn[0] not in kept
        assert drawn[0] == drawn[1] or drawn[0] not in kept


@pytest.mark.parametrize(
    "values",
    [{"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"repetition_penalty": 0.0},
     {"repetition_penalty": -1.0}, {"repetition_penalty": math.inf}],
)  # fmt: skip
def test_what_no_sampling_can_mean_is_refused(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}"):
        Sampling(1.0, **values)


def test_watermarks_without_a_state_are_transformers_own(model):
    config_of(model).watermarking_config = WatermarkingConfig(bias=8.0)
    assert list(model.generate("w1 w2", max_new_tokens=6).ids) == theirs(model, "w1 w2", 6, do_sample=False)


def test_without_a_generation_config_logits_are_taken_as_they_are(model):
    """A module that is no generator of transformers has none."""
    model.host.model.generation_config = None
    scores = torch.randn(64)
    model.host.model.__class__ = type("Bare", (torch.nn.Module,), {})
    assert torch.equal(Processing(model.host, [1], 1, LogitsProcessorList()).scores([], scores), scores)
