"""Sites are replaced at the tokens that are named and at no other, and every mean is over the tokens that it says."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits.cli import main
from hooks import Ablate, Clamp, HookedModel, Scale, Site, UserError
from hooks.errors import AddressError
from hooks.passes import Where, is_sink
from hooks.passes.recording import sink_tokens
from hooks.types import Positions, SparseActs

FACT = "fact: the capital of the state containing Dallas is"
WORDS = ["w1 w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12"]
PLACES = st.one_of(
    st.sampled_from(["all", "prompt", ":", "1:", "-1", ":2"]),
    st.integers(-6, 5),
    st.sets(st.integers(0, 5), min_size=1),
    st.tuples(st.integers(0, 4)).map(lambda start: slice(start[0], None)),
)
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def stream(model: HookedModel, prompt: str, site: Site, **options) -> torch.Tensor:
    batch = model.host.batch([prompt])
    seen = {}
    edits = model.edits(batch, [[]], **options) if options else []
    from_here = [*edits, type(edits[0])(site, lambda x, at: seen.setdefault("x", x))] if edits else []
    if not edits:
        return model.host.capture(batch, [site])[1][site][0]
    model.host.forward(batch, from_here)
    return seen["x"][0]


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["live", "zero", "frozen"])
def test_all_positions_are_no_positions(model, prompt, error):
    whole = model.run(prompt, swap="all", error=error).logits
    for places in ("all", "prompt", slice(None), ":"):
        assert torch.equal(model.run(prompt, swap="all", error=error, positions=places).logits, whole)


@FEW
@given(PLACES)
def test_a_live_error_changes_nothing_wherever_it_is(odd, places):
    run = odd.run(WORDS[0], swap="all", error="live", positions=places)
    assert torch.equal(run.logits, run.baseline)


@FEW
@given(PLACES, st.sampled_from([0, 1, 3]))
def test_only_the_named_tokens_of_the_site_change(odd, places, layer):
    """There they are the reconstruction, elsewhere they keep their bits, and what comes before is the clean run's."""
    write = odd.store.sites(layer)[1]
    record = odd.record(WORDS[0]).layers[layer]
    here = Positions.of(places).mask(0, 6, 6)
    now = stream(odd, WORDS[0], write, swap=[layer], error="zero", positions=places)
    assert torch.equal(now[~here], record.target[0, ~here])
    close(now[here], record.reconstruction[0, here].to(now.dtype))
    run = odd.run(WORDS[0], swap=[layer], error="zero", positions=places)
    first = int(here.nonzero()[0])
    assert torch.equal(run.logits[:first], run.baseline[:first])


@FEW
@given(st.sampled_from(["all", "1:", "-1", ":1", "{0,-1}"]), st.sampled_from([(), "sinks", "special"]))
def test_a_row_of_a_batch_is_what_it_is_alone(odd, places, skip):
    """Positions count the row's own tokens, padded on the right in run_many and on the left in generate."""
    setting = {"swap": "all", "error": "zero", "positions": places, "skip": skip}
    together = odd.run_many(WORDS, **setting)
    texts = odd.generate(WORDS, max_new_tokens=3, **setting)
    for row, prompt in enumerate(WORDS):
        close(together[row], odd.run(prompt, **setting).logits[-1])
        alone = odd.generate(prompt, max_new_tokens=3, **setting)
        close(texts[row].logits, alone.logits)


@pytest.mark.parametrize("places", ["all", "prompt", "new", "2:", "-1:", 7, {0, 6, 7}])
def test_with_a_cache_or_without_one_the_tokens_are_the_same(odd, places):
    setting = {"swap": "all", "error": "zero", "positions": places, "max_new_tokens": 4}
    cached, plain = (odd.generate(WORDS[0], use_cache=cache, **setting) for cache in (True, False))
    close(cached.logits, plain.logits)
    session = odd.session(WORDS[0], swap="all", error="zero", positions=places, new_tokens=4).generate(4)
    close(session.logits, cached.logits)
    unswapped = odd.generate(WORDS[0], max_new_tokens=4).logits
    assert torch.equal(cached.logits[0], unswapped[0]) == (places in ("new", 7))  # the first is read from the prompt


def test_an_edit_at_a_token_that_is_not_replaced_is_in_delta_form(odd):
    feature = int(odd.record(WORDS[0]).layers[1].acts.indices[0, 4, 0])
    plan = [Clamp((1, 4, feature), 3.0)]
    spared = odd.run(WORDS[0], plan, swap=[1], error="zero", positions=0)
    alone = odd.run(WORDS[0], swap=[1], error="zero", positions=0)
    assert torch.equal(spared.logits[:4], alone.logits[:4])
    now = stream(odd, WORDS[0], odd.store.sites(1)[1], swap=[1], error="zero", positions=0)
    batch, seen = odd.host.batch([WORDS[0]]), {}
    site = odd.store.sites(1)[1]
    edits = odd.edits(batch, plan, swap=[1], error="zero", positions=0)
    odd.host.forward(batch, [*edits, type(edits[0])(site, lambda x, at: seen.setdefault("x", x))])
    a = float(odd.record(WORDS[0]).layers[1].acts.values[0, 4, 0])
    close(seen["x"][0, 4] - now[4], (3.0 - a) * odd.store[1].W_dec[feature])


# -- special tokens and sinks ------------------------------------------------------------------------------------------


def with_special() -> HookedModel:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w1", "additional_special_tokens": ["w4"]})
    coders = [random_transcoder(layer, 40) for layer in (0, 1)]
    return HookedModel.from_model(random_qwen2(), tokenizer, coders)


def test_special_tokens_are_those_of_the_tokenizer():
    model = with_special()
    skipped = model.swap("w1 w2 w3 w4 w5", skip="special")
    named = model.swap("w1 w2 w3 w4 w5", positions={1, 2, 4})
    assert skipped.positions == named.positions == (1, 2, 4)
    assert skipped.measured == named.measured == (1, 2, 3, 4)
    assert torch.equal(skipped.run.logits, named.run.logits)
    assert skipped.layers == named.layers
    both = model.swap("w1 w2 w3 w4 w5", positions="2:", skip=["special"])
    assert both.positions == (2, 4)
    with pytest.raises(UserError, match="no token is left"):
        model.run("w1 w2", swap="all", error="zero", positions=0, skip="special")


def test_sinks_are_what_the_one_rule_says(sink):
    batch = sink.host.batch(["w1 w2 w3 w4 w5 w6", "w2 w3 w4 w1"])
    found = sink_tokens(sink.host, batch)
    assert found.nonzero().tolist() == [[0, 0], [1, 3]]
    swapped = sink.swap("w1 w2 w3 w4 w5 w6", skip="sinks")
    assert swapped.positions == (1, 2, 3, 4, 5)
    assert torch.equal(
        swapped.run.logits, sink.run("w1 w2 w3 w4 w5 w6", swap="all", error="zero", positions="1:").logits
    )


@given(st.lists(st.floats(0.125, 8, width=16), min_size=3, max_size=9).filter(lambda n: len(n) % 2))
def test_a_sink_is_ten_times_the_median(norms):
    middle = sorted(norms)[len(norms) // 2]
    assert is_sink(torch.tensor(norms)).tolist() == [norm > 10 * middle for norm in norms]


# -- what is measured --------------------------------------------------------------------------------------------------


def test_quality_is_over_the_replaced_tokens_and_effects_over_what_they_can_reach(model, prompt):
    report = model.swap(prompt, positions={2, -1})
    length = report.run.batch.lengths[0]
    assert report.positions == (2, length - 1)
    assert report.measured == tuple(range(2, length))
    before, after = (x[2:].double().log_softmax(-1) for x in (report.run.baseline, report.run.logits))
    assert report.effect.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), abs=1e-5)
    for site in report.layers:
        record = model.record(prompt).layers[site.layer]
        target, error = record.target[0, [2, -1]].double(), record.error[0, [2, -1]].double()
        assert site.loss == pytest.approx(float(error.square().mean()), rel=1e-4)
        spread = (target - target.mean(0)).square().sum()
        assert site.fvu == pytest.approx(float(error.square().sum() / spread), rel=1e-4)
        assert site.l0 == float((record.acts.values[0, [2, -1]] > 0).sum(-1).double().mean())


def test_l0_counts_no_padding():
    """Plain ReLU: tokens differ in how many features they have, and padding would count the last token again."""
    coders = [random_transcoder(layer, 40, k=None) for layer in (0, 1)]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    batch = model.record(WORDS)
    for layer in (0, 1):
        alone = [(model.record(prompt).layers[layer].acts.values > 0).sum(-1).double().flatten() for prompt in WORDS]
        acts = batch.layers[layer].acts
        assert acts.l0 == pytest.approx(float(torch.cat(alone).mean()), abs=1e-12)
        assert acts.l0 != SparseActs(acts.values, acts.indices).l0  # what it was with padding
        stacked = model.feature_cache(WORDS, layers=[layer]).stack("transcoder_acts")
        assert stacked.l0 == acts.l0


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "text"),
    [
        ({"positions": "1:"}, UserError, "no site is replaced"),
        ({"skip": "sinks"}, UserError, "no site is replaced"),
        ({"swap": "all", "positions": 99}, AddressError, "does not occur"),
        ({"swap": "all", "positions": "new"}, AddressError, "generates none"),
        ({"swap": "all", "positions": "some"}, AddressError, "cannot read the position"),
        ({"swap": "all", "positions": 1.5}, AddressError, "not a whole number"),
        ({"swap": "all", "skip": "bos"}, UserError, "cannot skip 'bos'"),
    ],
)
def test_places_that_mean_nothing_are_refused(odd, setting, error, text):
    for call in (odd.run, lambda prompt, **more: odd.run_many([prompt], **more)):
        with pytest.raises(error, match=text):
            call(WORDS[0], **setting)


def test_a_skip_is_read_at_once():
    with pytest.raises(UserError, match="special or sinks"):
        Where(skip=("special", "pad"))


# -- hooks for a bridge, and the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("places", [{"positions": "1:"}, {"positions": "{0,-1}"}, {"skip": "sinks"}])
def test_a_bridge_replaces_the_same_tokens(odd, places):
    pytest.importorskip("transformer_lens")
    setting = {"swap": "all", "error": "zero", **places}
    ids = odd.host.batch([WORDS[0]]).ids
    logits = odd.bridge.run_with_hooks(ids, fwd_hooks=odd.fwd_hooks(**setting))
    torch.testing.assert_close(logits[0], odd.run(WORDS[0], **setting).logits, rtol=1e-3, atol=1e-3)


def said(capsys, *args: str) -> tuple[dict, str]:
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_command_line_says_where_it_replaced_and_measured(demo, capsys):
    found, _ = said(capsys, "swap", FACT, "--positions", "1:", "--skip-special", "--skip-sinks")
    expected = demo.swap(FACT, positions="1:", skip=("special", "sinks"))
    assert found["positions"] == found["measured"] == list(expected.positions) == list(range(1, 10))
    assert found["kl"] == pytest.approx(expected.effect.kl)
    assert main(["swap", FACT, "--positions", "1:"]) == 0
    assert "swapped at all positions but 0, error zero" in capsys.readouterr().out
    assert main(["swap", FACT, "--positions={0,3}"]) == 0
    assert "swapped at positions 0, 3, error zero" in capsys.readouterr().out
    assert main(["ablate", FACT, "--feature", "L1/0", "--positions", "1:"]) == 2
    assert "no site is replaced" in capsys.readouterr().err


# -- inactive features -------------------------------------------------------------------------------------------------


def silent_and_loud(demo: HookedModel) -> tuple[str, str]:
    acts = demo.record(FACT).layers[2].acts
    silent = next(f for f in range(demo.store.d_features(2)) if f not in set(acts.indices.flatten().tolist()))
    return f"L2/{silent}", f"L2/{int(acts.indices[0, -1, acts.values[0, -1].argmax()])}"


def test_a_run_knows_which_of_its_features_are_inactive(demo):
    silent, loud = silent_and_loud(demo)
    pos = next(p for p in range(10) if loud not in {str(a) for a in _active(demo, p)})
    plan = [Ablate(loud + "@-1"), Ablate(silent), Scale(f"{loud}@{pos}", 2.0)]
    assert list(map(str, demo.run(FACT, plan).inactive)) == [silent, f"{loud}@{pos}"]
    assert demo.inactive(FACT, Ablate(loud)) == ()
    assert demo.inactive(FACT, Clamp(silent + "@new", 2.0)) == ()  # nothing is known of tokens to come
    assert demo.run(FACT).inactive == ()


def _active(demo: HookedModel, pos: int) -> list[str]:
    acts = demo.record(FACT).layers[2].acts
    return [f"L2/{f}" for f in acts.indices[0, pos][acts.values[0, pos] > 0].tolist()]


def test_ablate_steer_and_trace_say_that_a_feature_is_inactive(demo, capsys, tmp_path):
    silent, loud = silent_and_loud(demo)
    found, err = said(capsys, "ablate", FACT, "--feature", silent, loud)
    assert found["inactive"] == [silent]
    assert err.count("inactive") == 1
    assert f"{silent} is inactive on this prompt" in err
    found, err = said(capsys, "steer", FACT, "--set", f"{silent}=2", f"{loud}=2", "--max-new-tokens", "1")
    assert found["inactive"] == [silent]
    assert f"{silent} is inactive" in err
    found, err = said(capsys, "steer", FACT, "--set", silent, "--strengths", "0,1", "--max-new-tokens", "1")
    assert found["inactive"] == [silent]
    out = tmp_path / "graph.safetensors"
    found, err = said(capsys, "trace", FACT, "--explain", f"{silent}@-1", "--sample", "0", "--out", str(out))
    assert found["inactive"] == [f"{silent}@9"]
    assert f"{silent}@9 is inactive" in err
    found, err = said(capsys, "ablate", FACT, "--feature", loud)
    assert found["inactive"] == []
    assert "inactive" not in err
