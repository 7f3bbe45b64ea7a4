"""TransformerLens: a bridge on a twin that shares every tensor; our edits as its hooks; the plain model untouched."""

import pytest
import torch
from test_interventions import KINDS, inactive, strongest
from worlds import random_qwen2, random_transcoder, word_tokenizer

from hooks import HookedModel, Site, UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformer-lens's own imports


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", ["@-1", "@0", ""])
def test_our_edits_as_bridge_hooks_equal_our_run(model, prompt, kind, position):
    feature, _ = strongest(model, prompt, 1, -1)
    plan = [
        KINDS[kind][0](f"L1/{feature}{position}"),
        KINDS[kind][0](f"L0/{inactive(model, prompt, 0, 0)}{position}"),
    ]
    tokens = model.host.batch([prompt]).ids
    bridged = model.bridge.run_with_hooks(tokens, fwd_hooks=model.fwd_hooks(plan))
    torch.testing.assert_close(bridged[0], model.run(prompt, plan).logits, rtol=1e-4, atol=1e-4)


def test_two_site_sets_pass_their_features_from_hook_to_hook():
    coders = [random_transcoder(n, 40, read=Site("mlp_in", n), write=Site("mlp_out", n)) for n in (0, 1)]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    plan = [KINDS["clamp"][0]("L1/5@-1"), KINDS["add"][0]("L0/6")]
    tokens = model.host.batch(["w1 w2 w3"]).ids
    bridged = model.bridge.run_with_hooks(tokens, fwd_hooks=model.fwd_hooks(plan))
    torch.testing.assert_close(bridged[0], model.run("w1 w2 w3", plan).logits, rtol=1e-4, atol=1e-4)


def test_resid_mid_is_refused_where_it_would_silently_edit_a_branch():
    coders = [random_transcoder(1, 40, read=Site("resid_mid", 1), write=Site("resid_mid", 1))]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    with pytest.raises(UserError, match="resid_mid"):
        model.fwd_hooks([KINDS["ablate"][0]("L1/5")])


def test_the_twin_shares_every_tensor_and_the_plain_model_stays_plain(odd):
    plain = odd.host.model
    before = {name: type(module) for name, module in plain.named_modules()}
    logits = odd.run("w1 w2 w3").baseline
    bridge = odd.bridge
    shared = {p.data_ptr() for p in plain.parameters()}
    assert {p.data_ptr() for p in bridge.parameters() if p.numel() and p.abs().sum()} <= shared
    assert {name: type(module) for name, module in plain.named_modules()} == before
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(odd.run("w1 w2 w3").baseline, logits)


def test_run_with_cache_sees_the_edited_residual(model, prompt):
    feature, _ = strongest(model, prompt, 1, -1)
    tokens = model.host.batch([prompt]).ids
    name = Site("resid_post", 1).lens_name
    clean = model.bridge.run_with_cache(tokens, names_filter=[name])[1][name]
    with model.bridge.hooks(fwd_hooks=model.fwd_hooks([KINDS["ablate"][0](f"L1/{feature}@-1")])):
        edited = model.bridge.run_with_cache(tokens, names_filter=[name])[1][name]
    assert torch.allclose(clean[0, :-1], edited[0, :-1], atol=1e-5)
    assert not torch.allclose(clean[0, -1], edited[0, -1], atol=1e-3)
