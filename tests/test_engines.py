"""Both engines give the same tokens; the static one is taken where it applies, and refuses the rest."""

import json
from typing import Any

import pytest
import torch
from worlds import left_behind, random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits.cli import main
from hooks import Add, Clamp, HookedModel, Sampling, Scale, Site, Steer, UserError
from hooks.errors import AddressError, ModelError, PromptError
from hooks.generation import GenerateOptions, engines
from hooks.types import Edit

HOT = Sampling(temperature=1.0, seed=3)  # the demo would end at once if greedy
PLAN = [Clamp("L1/7@-1:", 3.0), Scale("L0/5", 2.0), Add("L3/9@new", 1.0, when_inactive="skip")]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steered": {"interventions": PLAN},
    "swapped": {"swap": "all", "error": "zero"},
    "swapped in part, and steered": {"swap": [1, 3], "error": "zero", "interventions": PLAN},
    "swapped in name": {"swap": "all", "interventions": PLAN},
    "warped": {"sampling": Sampling(0.7, top_k=9, top_p=0.9, seed=1, repetition_penalty=1.2), "interventions": PLAN},
}


@pytest.fixture(scope="module")
def start(model, prompt):
    return "after two comes three after" if prompt.startswith("fact") else prompt


@pytest.fixture
def static_only(monkeypatch):
    """The dynamic engine is broken."""

    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("the dynamic engine ran")

    monkeypatch.setattr(engines, "generate", stop)
    monkeypatch.setattr("hooks.generation.session.Session.stream", stop)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_dynamic_engine(model, start, way, request):
    asked = {"max_new_tokens": 7, "sampling": HOT} | WAYS[way]
    expected = model.generate(start, engine="dynamic", **asked)
    request.getfixturevalue("static_only")
    found = model.generate(start, engine="static", **asked)
    same = ("prompt", "ids", "text", "reason")
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    streamed = list(model.stream(start, engine="static", **asked))
    assert tuple(token.id for token in streamed) == expected.ids
    assert "".join(token.text for token in streamed) == expected.text
    assert [token.pos for token in streamed] == list(range(len(expected.prompt), len(expected.prompt + expected.ids)))
    assert [token.reason for token in streamed] == [None] * (len(streamed) - 1) + [expected.reason]
    assert [token.logprob for token in streamed] == pytest.approx(expected.logprobs.tolist(), abs=1e-3)


def test_greedy_from_a_list_of_one_prompt(odd):
    (found,) = odd.generate(["w1 w2 w3"], PLAN, max_new_tokens=5, engine="static")
    assert found.ids == odd.generate("w1 w2 w3", PLAN, max_new_tokens=5).ids


def test_stop_strings_and_the_end_token(demo):
    prompt = "fact: the capital of the state containing Dallas is"
    for stop, reason in (((), "end"), ("Austin", "stop")):
        found = demo.generate(prompt, max_new_tokens=20, stop=stop, engine="static")
        assert found.reason == reason
        assert found.text == demo.generate(prompt, max_new_tokens=20, stop=stop).text


@pytest.mark.usefixtures("static_only")
def test_steering_experiments_take_the_engine(odd):
    odd.steer("w1 w2 w3", PLAN, max_new_tokens=4, engine="static")
    odd.dose("w1 w2 w3", [Steer("L1/7")], "0,4", max_new_tokens=4, engine="static")
    with pytest.raises(AssertionError, match="the dynamic engine ran"):
        odd.dose("w1 w2 w3", [Steer("L1/7")], "0,4", max_new_tokens=4)


def test_steering_experiments_say_the_same(odd):
    same = [odd.steer("w1 w2 w3", PLAN, max_new_tokens=4, sampling=HOT, engine=e) for e in ("static", "dynamic")]
    assert same[0].steered.ids == same[1].steered.ids
    assert same[0].baseline.ids == same[1].baseline.ids
    assert same[0].cost == pytest.approx(same[1].cost, abs=1e-4)
    grids = [odd.dose("w1 w2 w3", [Steer("L1/7")], "0,4,9", max_new_tokens=4, engine=e) for e in ("static", "dynamic")]
    assert [dose.scored.ids for dose in grids[0].doses] == [dose.scored.ids for dose in grids[1].doses]


def test_a_stream_that_is_left_leaves_nothing_attached(odd):
    stream = odd.stream("w1 w2 w3", PLAN, max_new_tokens=6, engine="static")
    assert next(stream).reason is None
    assert not left_behind(odd.host.model)


# -- which engine ------------------------------------------------------------------------------------------------------


def engine(model: HookedModel, prompts: list[str], behind: Any = (), **asked: Any) -> str:
    batch = model.host.batch(prompts)
    return engines.engine_for(model, batch, [PLAN] * len(prompts), GenerateOptions(**asked), behind)


BEYOND: dict[str, dict[str, Any]] = {
    "2 prompts": {"prompts": ["w1 w2", "w3"]},
    "mask='live'": {"mask": "live"},
    "positions= or skip=": {"swap": "all", "error": "zero", "skip": "sinks"},
    "observe=": {"observe": [1]},
    "use_cache=False": {"use_cache": False},
    "lens_hooks=": {"behind": [Edit(Site("resid_pre", 1), lambda x, at: x)]},
}


def test_on_a_cpu_the_default_is_dynamic(odd):
    assert engine(odd, ["w1 w2"]) == "dynamic"
    assert engine(odd, ["w1 w2"], engine="static") == "static"


def test_where_graphs_pay_the_default_is_static_unless_more_is_asked_for(odd, monkeypatch):
    monkeypatch.setattr(engines, "_pays", lambda *_: True)
    assert engine(odd, ["w1 w2"]) == "static"
    assert engine(odd, ["w1 w2"], engine="dynamic") == "dynamic"
    for asked in BEYOND.values():
        assert engine(odd, **({"prompts": ["w1 w2"]} | asked)) == "dynamic"


@pytest.mark.parametrize("named", BEYOND)
def test_what_the_static_engine_does_not_do_is_refused_by_name(odd, named):
    with pytest.raises(UserError, match="the static engine does not do") as refused:
        engine(odd, **({"prompts": ["w1 w2"], "engine": "static"} | BEYOND[named]))
    assert named in str(refused.value)


def test_exact_arithmetic_is_refused_where_it_is_another(odd):
    half = random_hooked(dtype=torch.bfloat16)
    with pytest.raises(UserError, match="precision='exact'"):
        half.generate("w1 w2", max_new_tokens=3, precision="exact", engine="static")
    found = odd.generate("w1 w2", max_new_tokens=3, precision="exact", engine="static")
    assert found.ids == odd.generate("w1 w2", max_new_tokens=3).ids


def test_a_byte_budget_decides_the_default_and_not_the_choice(monkeypatch):
    model = random_hooked()
    model.store.budget_bytes = model.store.bytes_of(0)
    assert engine(model, ["w1 w2"], engine="static") == "static"
    monkeypatch.setattr(engines, "_pays", lambda *_: True)
    assert engine(model, ["w1 w2"]) == "dynamic"


def test_quantised_models_and_other_attentions_are_not_captured_by_default(monkeypatch):
    monkeypatch.setattr(engines, "_pays", lambda *_: True)
    model = random_hooked()
    config = model.host.model.config
    config.quantization_config = {"load_in_8bit": True}
    assert engine(model, ["w1 w2"]) == "dynamic"
    del config.quantization_config
    assert engine(model, ["w1 w2"]) == "static"
    config._attn_implementation = "flex_attention"
    assert engine(model, ["w1 w2"]) == "dynamic"


def test_sliding_windows_are_refused_and_never_the_default(monkeypatch):
    hooked = HookedModel.from_model(random_qwen2(), word_tokenizer(), [random_transcoder(n, 40) for n in (0, 1, 3)])
    hooked.host.model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ModelError, match="whole context"):
        hooked.generate("w1 w2", max_new_tokens=3, engine="static")
    monkeypatch.setattr(engines, "_pays", lambda *_: True)
    assert engine(hooked, ["w1 w2"]) == "dynamic"


def test_mistakes_are_those_of_the_dynamic_engine(odd):
    with pytest.raises(UserError, match="unknown engine 'fast'"):
        odd.generate("w1 w2", engine="fast")
    with pytest.raises(AddressError, match="no feature"):
        odd.generate("w1 w2", [Clamp("L1/99999", 1.0)], engine="static")
    with pytest.raises(PromptError, match="do not fit"):
        odd.generate("w1 w2", max_new_tokens=10_000, engine="static")
    with pytest.raises(UserError, match="cannot generate 0"):
        odd.stream("w1 w2", max_new_tokens=0, engine="static")
    with pytest.raises(UserError, match="2 samplings for 1 prompts"):
        odd.generate("w1 w2", sampling=[HOT, HOT], engine="static")


def test_on_the_command_line(capsys, request):
    line = ["steer", "after two comes three after", "--set", "L3/383=8", "--max-new-tokens", "4", "--json"]
    line += ["--temperature", "1", "--seed", "3"]
    assert main([*line, "--engine", "dynamic"]) == 0
    expected = json.loads(capsys.readouterr().out)
    request.getfixturevalue("static_only")
    assert main([*line, "--engine", "static"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steered"]["ids"] == expected["steered"]["ids"]
    assert found["baseline"]["ids"] == expected["baseline"]["ids"]
    assert main([*line, "--engine", "static", "--mask", "live"]) == 2
    assert "does not do what is asked for" in capsys.readouterr().err
