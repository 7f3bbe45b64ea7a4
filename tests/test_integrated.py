"""Integrated gradients: by hand step by step, complete in the limit, and grad × activation when there is one step."""

import pytest
import torch
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import Target, score_features
from circuits.attribution import integrated_scores
from hooks import HookedModel, Site, UserError
from hooks.errors import PromptError
from hooks.types import Edit

PROMPT, OTHER = "w1 w2 w3 w4 w5", "w1 w9 w3 w8 w5"
TARGET = Target("w7 − w20", (9, 22), (1.0, -1.0), 4)


def writing(write: str) -> HookedModel:
    """Two layers that read the stream and write somewhere else."""
    layers = (1, 3)
    coders = [
        random_transcoder(n, 40, read=Site("resid_mid", n), write=Site(write, n), dtype=torch.float64) for n in layers
    ]
    return HookedModel.from_model(random_qwen2(dtype=torch.float64), word_tokenizer(), coders)


@pytest.fixture(scope="module", params=["resid_pre", "resid_mid", "mlp_out"])
def exact(request) -> HookedModel:
    """fp64, so that what is left of a law is the law's own; transformers' norms still round in fp32."""
    return random_hooked(dtype=torch.float64) if request.param == "resid_pre" else writing(request.param)


def by_hand(model, recording, baseline, layer, steps):
    """The definition, one point at a time: dense decode, gradients for activations and errors themselves."""
    transcoder, record = model.store[layer], recording.layers[layer]
    size = transcoder.d_features
    ends = [(record.acts.dense(size)[0], record.error[0])]
    if baseline is None:
        ends.append(tuple(torch.zeros_like(part) for part in ends[0]))
    else:
        ends.append((baseline.layers[layer].acts.dense(size)[0], baseline.layers[layer].error[0]))
    (acts, error), (acts_end, error_end) = ends
    slopes = [torch.zeros_like(acts), torch.zeros_like(error)]
    for step in range(steps):
        alpha = step / steps
        leaves = [
            ((1 - alpha) * start + alpha * end).requires_grad_()
            for start, end in ((acts, acts_end), (error, error_end))
        ]

        def put(x, at, leaves=leaves):
            return (leaves[0] @ transcoder.W_dec + transcoder.b_dec + leaves[1])[None].to(x)

        logits = model.host.forward_with_gradients(recording.batch, [Edit(transcoder.write, put)])
        for total, gradient in zip(slopes, torch.autograd.grad(TARGET.value(logits)[0], leaves), strict=True):
            total += gradient / steps
    return (acts - acts_end) * slopes[0], ((error - error_end) * slopes[1]).sum(-1)


@pytest.mark.parametrize("other", [OTHER, None])
def test_scores_are_the_definition(exact, other):
    recording = exact.record(PROMPT)
    baseline = None if other is None else exact.record(other)
    scores = integrated_scores(exact, recording, TARGET, baseline, steps=4)
    for layer in recording.layers:
        features, errors = by_hand(exact, recording, baseline, layer, 4)
        scale = float(features.abs().max())
        torch.testing.assert_close(scores.features[layer], features, rtol=1e-5, atol=1e-6 * scale)
        torch.testing.assert_close(scores.errors[layer], errors, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("other", [OTHER, None])
def test_the_scores_of_a_site_sum_to_what_the_site_is_worth(exact, other):
    """Left ends of equal pieces: the gap halves when the pieces do, and goes to nothing."""
    recording = exact.record(PROMPT)
    baseline = None if other is None else exact.record(other)
    coarse, fine = (integrated_scores(exact, recording, TARGET, baseline, steps) for steps in (512, 1024))
    for layer in recording.layers:
        transcoder = exact.store[layer]
        end = transcoder.b_dec.expand(5, -1) if baseline is None else baseline.layers[layer].target[0]
        replaced = exact.host.forward(recording.batch, [Edit(transcoder.write, lambda x, at, end=end: end[None].to(x))])
        worth = float(TARGET.value(recording.logits)[0] - TARGET.value(replaced)[0])
        gaps = [scores.total(layer) - worth for scores in (coarse, fine)]
        size = float(fine.features[layer].abs().sum() + fine.errors[layer].abs().sum())
        assert abs(gaps[1]) < 0.005 * size
        assert gaps[1] == pytest.approx(gaps[0] / 2, abs=1e-4 * size)


def test_one_step_from_nothing_is_grad_times_activation(model, prompt):
    recording = model.record(prompt)
    target = Target("", (3, 4), (1.0, -1.0), recording.batch.lengths[0] - 1)
    scores = integrated_scores(model, recording, target, None, steps=1)
    plain = score_features(model, recording, target)
    for layer, scored in plain.layers.items():
        torch.testing.assert_close(
            scores.features[layer][scored.pos, scored.feature], scored.score, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("other", [OTHER, None])
def test_rule_ig_scores_the_same_features_alike(odd, other):
    recording = odd.record(PROMPT)
    baseline = None if other is None else odd.record(other)
    scores = integrated_scores(odd, recording, TARGET, baseline)
    for layer, scored in score_features(odd, recording, TARGET, rule="ig", counterfactual=baseline).layers.items():
        ours = scores.features[layer]
        torch.testing.assert_close(ours[scored.pos, scored.feature], scored.score, rtol=1e-3, atol=1e-5)
        assert int((ours != 0).sum()) <= len(scored.pos)


def test_what_is_active_in_neither_prompt_scores_nothing(exact):
    recording, baseline = exact.record(PROMPT), exact.record(OTHER)
    scores = integrated_scores(exact, recording, TARGET, baseline)
    for layer, values in scores.features.items():
        acts, others = (r.layers[layer].acts.dense(values.shape[-1])[0] for r in (recording, baseline))
        active = (acts > 0) | (others > 0)
        assert values.shape == active.shape
        assert (values[~active] == 0).all()
        assert (values[(acts == 0) & (others > 0)] != 0).any(), "what only the other prompt has is scored too"


def test_the_same_prompt_as_baseline_leaves_nothing(exact):
    recording = exact.record(PROMPT)
    scores = integrated_scores(exact, recording, TARGET, recording)
    assert all((values == 0).all() for part in (scores.features, scores.errors) for values in part.values())


def test_bad_input_is_refused(exact):
    recording = exact.record(PROMPT)
    with pytest.raises(PromptError, match="must have the same number of tokens"):
        integrated_scores(exact, recording, TARGET, exact.record("w1 w2 w3 w4"))
    with pytest.raises(UserError, match="cannot integrate in 0 steps"):
        integrated_scores(exact, recording, TARGET, None, steps=0)
