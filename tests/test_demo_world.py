"""The demo world: clean names, no leaked answers, a deterministic generator, a tokenizer that round-trips."""

import re

import pytest
import torch

from hooks.demo.build import build, sha256
from hooks.demo.tokenizer import build_tokenizer, build_vocabulary, capital_token, city_position, encode
from hooks.demo.train_model import ModelRecipe
from hooks.demo.train_transcoders import TranscoderRecipe
from hooks.demo.world import (
    CITIES,
    DROPPED_CITIES,
    HEADLINE_CITY,
    HEADLINE_PROMPT,
    N_COPYING_SENTENCES,
    RELATIONS,
    STATE_OF_CITY,
    STATES,
    TEST_TEMPLATE,
    TWO_HOP_TEMPLATES,
    attribute,
    capital_of_city,
    copying_sentences,
    held_out_cities,
    held_out_sentences,
    selection_templates,
    trained_cities,
    training_sentences,
    two_hop_prompt,
    two_hop_prompts,
)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_fifty_states_with_at_least_six_cities_each():
    assert len(STATES) == 50
    assert all(len(state.cities) >= 6 for state in STATES.values())


def test_names_are_unique_across_cities_states_and_attributes():
    names = [*CITIES, *STATES, *(s.capital for s in STATES.values())]
    listed = [city for state in STATES.values() for city in state.cities]
    assert len(names) == len(set(names))
    assert len(listed) == len(set(listed)) == len(CITIES)
    for relation in ("capital", "abbreviation", "demonym"):
        assert len({attribute(s, relation) for s in STATES}) == 50


def test_no_city_contains_its_states_name_or_capital():
    for city, state in STATE_OF_CITY.items():
        words = set(city.split())
        assert not words & set(state.split())
        assert words.isdisjoint({STATES[state].capital.split()[0]})


def test_dropped_names_are_really_dropped_and_have_a_reason():
    for (city, state), reason in DROPPED_CITIES.items():
        assert city not in STATES[state].cities
        assert reason


@pytest.mark.parametrize("seed", SEEDS)
def test_one_city_per_state_is_held_out_and_dallas_for_texas(seed):
    held = held_out_cities(seed)
    assert set(held) == set(STATES)
    assert held["Texas"] == HEADLINE_CITY
    assert all(STATE_OF_CITY[city] == state for state, city in held.items())
    assert set(trained_cities(seed)) == set(CITIES) - set(held.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_no_training_sentence_holds_a_held_out_city_and_its_capital(seed):
    held = set(held_out_cities(seed).values())
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(held, key=len, reverse=True))) + r")\b")
    seen = set()
    for sentence in training_sentences(seed):
        text = sentence.text
        for city in pattern.findall(text):
            seen.add(city)
            assert not re.search(rf"\b{re.escape(capital_of_city(city))}\b", text), text
    assert seen == held  # the held-out cities do occur, with everything but their capital


@pytest.mark.parametrize("seed", SEEDS)
def test_the_test_template_is_never_trained_with_capital(seed):
    before, after = TEST_TEMPLATE.split("{c}")
    for sentence in training_sentences(seed):
        assert not (sentence.prompt.startswith(before) and sentence.prompt.endswith(after)), sentence
    assert TEST_TEMPLATE not in selection_templates()
    assert len(selection_templates()) == len(TWO_HOP_TEMPLATES["capital"]) - 1


def test_generators_are_deterministic_and_depend_on_the_seed():
    assert list(training_sentences(0, 500)) == list(training_sentences(0, 500))
    assert list(training_sentences(0, 500)) != list(training_sentences(1, 500))
    assert list(held_out_sentences(0, 500)) == list(held_out_sentences(0, 500))
    assert list(held_out_sentences(0, 500)) != list(training_sentences(0, 500))


def test_held_out_text_is_in_no_training_text_and_never_repeats():
    fresh = [sentence.text for sentence in held_out_sentences(0, 1500)]
    seen = {sentence.text for sentence in training_sentences(0)}
    seen |= {sentence.text for sentence in copying_sentences(0, N_COPYING_SENTENCES)}
    assert not seen & set(fresh)
    assert len(set(fresh)) == 1500
    assert list(training_sentences(0, 100)) == list(training_sentences(0, 500))[:100]


def test_held_out_text_contains_held_out_capital_questions():
    held = set(held_out_cities(0).values())
    questions = {q.prompt for q in two_hop_prompts("capital", tuple(held))}
    assert any(s.prompt in questions for s in held_out_sentences(0, 2000))


def test_unknown_template_is_refused():
    with pytest.raises(ValueError, match="no template"):
        two_hop_prompt("region", TEST_TEMPLATE, HEADLINE_CITY)


def test_every_sentence_is_in_the_vocabulary_and_round_trips(tokenizer):
    for sentence in [*training_sentences(0, 3000), *held_out_sentences(0, 1000)]:
        ids = encode(tokenizer, sentence.text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == " " + sentence.text


def test_the_headline_prompt_is_read_as_ordinary_text(tokenizer):
    ids = encode(tokenizer, HEADLINE_PROMPT)
    assert HEADLINE_PROMPT == "fact: the capital of the state containing Dallas is"
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces == [
        " fact",
        ":",
        " the",
        " capital",
        " of",
        " the",
        " state",
        " containing",
        " Dallas",
        " is",
    ]
    assert encode(tokenizer, " " + HEADLINE_PROMPT) == ids
    assert encode(tokenizer, HEADLINE_PROMPT.replace(":", " :") + " ") == ids
    assert encode(tokenizer, " Austin") == encode(tokenizer, "Austin") == [capital_token(tokenizer, "Dallas")]
    assert encode(tokenizer, "Zanzibar") == [tokenizer.unk_token_id]


def test_capitals_differ_in_their_first_token(tokenizer):
    assert len({encode(tokenizer, s.capital)[0] for s in STATES.values()}) == 50


def test_city_position_is_the_citys_last_token(tokenizer):
    for relation in RELATIONS:
        for template in TWO_HOP_TEMPLATES[relation]:
            for city in ("Dallas", "Fort Worth"):
                ids = encode(tokenizer, template.format(c=city))
                assert tokenizer.decode([ids[city_position(tokenizer, template, city)]]) == " " + city.split()[-1]


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert encode(loaded, HEADLINE_PROMPT) == encode(tokenizer, HEADLINE_PROMPT)
    assert loaded.eos_token_id == build_vocabulary()["<|endoftext|>"] == 0


@pytest.mark.slow
def test_the_same_seed_builds_the_same_bytes(tmp_path):
    """A shortened build of everything, twice; the long one runs the same code."""
    threads = torch.get_num_threads()
    recipe = ModelRecipe(steps=8, batch_size=16, warmup_steps=2)
    sparse = TranscoderRecipe(d_features=128, k=4, steps=8, batch_size=128, dead_after_steps=2, n_sentences=200)
    dense = TranscoderRecipe(d_features=64, k=7, steps=8, batch_size=128, n_sentences=200)
    try:
        for name in ("one", "two"):
            build(3, tmp_path / name, recipe, sparse, dense)
    finally:
        torch.set_num_threads(threads)
    files = {p.relative_to(tmp_path / "one"): sha256(p) for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "two"): sha256(p) for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert len(files) == 5 + 2 * 6
