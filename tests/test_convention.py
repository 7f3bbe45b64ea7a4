"""What a check found is used where the files do not say it, and never against what the caller says."""

import logging
from pathlib import Path

import pytest
from test_formats import D, state_dict, wrapped
from test_formats import write as write_layer
from worlds import random_qwen2, random_transcoder, word_tokenizer

from circuits import trace
from hooks import HookedModel, Site, UserError
from hooks.checkpoints import (
    Candidate,
    DecoderFinding,
    Findings,
    LayerFinding,
    Selection,
    TranscoderStore,
    convert,
    findings,
)
from hooks.errors import CheckpointError
from hooks.formats import native
from hooks.sites import SiteSpec

BEST = Candidate(read="mlp_in", write="mlp_out+1", encoder="trained", fvu=0.1)
CARD = Candidate(read="resid_pre", write="resid_pre", encoder="card", fvu=0.1)


def found(best: Candidate = BEST, verdict: str = "clear", decoders: tuple[DecoderFinding, ...] = ()) -> Findings:
    layer = {"layer": 0, "fvu": 0.1, "fvu_without_sinks": 0.1, "fvu_normed": 0.1, "loss": 0.1, "l0": 3, "winner": "x"}
    one = LayerFinding(**layer, read=best.read, write=best.write, encoder=best.encoder, ok=True)
    selection = Selection(activation="topk", k=3, source="metadata", measured_with="TopK", reason="a test")
    return Findings(
        verdict=verdict,
        best=best,
        margin=0.3,
        ranking=(best,),
        layers=(one,),
        selection=selection,
        decoders=decoders,
        tokens=100,
        sinks=0,
        text="a test",
        model="a test",
        fingerprint="0",
        date="2024-01-01",
        program="a test",
        other_model=False,
    )


@pytest.fixture
def root(tmp_path) -> Path:
    for layer in (0, 1):
        write_layer(tmp_path / "set", layer, wrapped(layer, state_dict(layer, targets=2)))
    return tmp_path / "set"


def test_measured_sites_are_used_and_called_measured(root, caplog):
    findings.save_findings(root, found())
    store = TranscoderStore.open(root)
    assert store.convention.source == "calibrated"
    assert store.sites(1) == (Site("mlp_in", 1), Site("mlp_out", 2))
    assert "assuming" not in caplog.text


def test_what_the_caller_says_goes_before_the_measurement(root):
    findings.save_findings(root, found(CARD))
    store = TranscoderStore.open(root, read="mlp_in", write="mlp_out", encoder="trained", decoder=1)
    assert store.convention.source == "given"
    assert store.sites(0) == (Site("mlp_in", 0), Site("mlp_out", 0))
    assert store[0].norm_weight is not None
    assert (store[0].W_dec == state_dict(0, targets=2)["_orig_mod.dec.weight"][D:].T).all()


def test_the_measured_encoder_and_decoder_are_used(root):
    findings.save_findings(root, found(CARD.model_copy(update={"decoder": 1})))
    coder = TranscoderStore.open(root)[0]
    assert coder.norm_weight is None
    assert (coder.shift == -state_dict(0, targets=2)["_orig_mod.enc.0.bias"]).all()
    assert (coder.W_dec == state_dict(0, targets=2)["_orig_mod.dec.weight"][D:].T).all()


def test_another_decoder_has_its_own_sites(root):
    other = DecoderFinding(best=BEST.model_copy(update={"write": "mlp_out+2", "decoder": 1}), verdict="clear", margin=1)
    findings.save_findings(root, found(decoders=(DecoderFinding(best=BEST, verdict="clear", margin=1), other)))
    assert TranscoderStore.open(root).convention.write == SiteSpec("mlp_out", 1)
    assert TranscoderStore.open(root, decoder=1).convention.write == SiteSpec("mlp_out", 2)


@pytest.mark.parametrize("verdict", ["too close", "none is good"])
def test_an_open_verdict_stays_an_assumption_and_no_graph_is_built_on_it(tmp_path, verdict, caplog):
    for layer in (0, 1):
        write_layer(tmp_path / "set", layer, wrapped(layer, state_dict(layer, d=40, f=96)))
    findings.save_findings(tmp_path / "set", found(CARD, verdict))
    model = random_qwen2()
    with caplog.at_level(logging.WARNING):
        hooked = HookedModel.from_model(model, word_tokenizer(), tmp_path / "set")
    assert "a check did not settle it" in caplog.text
    assert hooked.store.convention.source == "undecided"
    assert hooked.store[0].norm_weight is not None
    with pytest.raises(UserError, match="did not settle"):
        trace(hooked, "w1 w2 w3")
    chosen = HookedModel.from_model(model, word_tokenizer(), tmp_path / "set", read="resid_pre", write="resid_pre")
    assert trace(chosen, "w1 w2 w3", sample=0, max_nodes=10).n_nodes > 0


def test_a_conversion_takes_the_measurement_along(root, tmp_path):
    findings.save_findings(root, found(CARD))
    convert(root, tmp_path / "dst")
    manifest = native.read_manifest(tmp_path / "dst")
    assert (manifest.read, manifest.write, manifest.sites_source) == ("resid_pre", "resid_pre", "calibrated")
    assert (manifest.input_norm.kind, manifest.encoder_source) == ("none", "calibrated")
    assert findings.read_findings(tmp_path / "dst") == findings.read_findings(root)
    assert TranscoderStore.open(tmp_path / "dst").convention.source == "calibrated"


def test_stored_sites_are_not_overruled(tmp_path):
    sites = {"read": SiteSpec("resid_pre"), "write": SiteSpec("resid_pre")}
    native.save(tmp_path, [random_transcoder(0, 8)], **sites)
    findings.save_findings(tmp_path, found())
    assert TranscoderStore.open(tmp_path).convention.source == "stored"
    assert TranscoderStore.open(tmp_path).convention.read == SiteSpec("resid_pre")


def test_stored_sites_that_a_check_doubts_are_used_and_the_doubt_is_said(tmp_path, caplog):
    sites = {"read": SiteSpec("resid_pre"), "write": SiteSpec("resid_pre")}
    native.save(tmp_path, [random_transcoder(0, 8)], **sites)
    findings.save_findings(tmp_path, found(CARD, "none is good"))
    assert TranscoderStore.open(tmp_path).convention.source == "stored"
    assert "an earlier check did not find" in caplog.text


def test_findings_that_cannot_be_read_are_said(root):
    findings.save_findings(root, found())
    (root / findings.FILE).write_text('{"verdict": "clear"}')
    with pytest.raises(CheckpointError, match="findings of an earlier check"):
        TranscoderStore.open(root)


def test_another_models_findings_are_not_built_on(root):
    findings.save_findings(root, found(CARD).model_copy(update={"other_model": True}))
    for decoder in (None, 0):
        store = TranscoderStore.open(root, decoder=decoder)
        assert store.convention.source == "undecided"
        assert store[0].norm_weight is not None


def test_what_was_not_measured_is_not_taken_from_another_decoder(root, tmp_path):
    findings.save_findings(root, found())
    assert TranscoderStore.open(root, decoder=1).convention.source == "assumed"
    convert(root, tmp_path / "dst", decoder=1)
    assert findings.read_findings(tmp_path / "dst") is None


def test_a_conversion_keeps_the_findings_of_its_decoder_alone(root, tmp_path):
    other = DecoderFinding(best=BEST.model_copy(update={"write": "mlp_out", "decoder": 1}), verdict="clear", margin=1)
    findings.save_findings(root, found(decoders=(DecoderFinding(best=BEST, verdict="clear", margin=1), other)))
    for decoder, write in ((0, "mlp_out+1"), (1, "mlp_out")):
        convert(root, tmp_path / str(decoder), decoder=decoder)
        store = TranscoderStore.open(tmp_path / str(decoder))
        assert (str(store.convention.write), store.convention.source) == (write, "calibrated")


def test_an_encoder_that_was_given_stays(root, tmp_path):
    findings.save_findings(root, found(CARD))
    convert(root, tmp_path / "dst", encoder="trained")
    assert TranscoderStore.open(tmp_path / "dst")[0].norm_weight is not None


def test_sites_given_after_an_open_verdict_are_given(tmp_path):
    """Also where they are what the format's own program assumes."""
    sites = {"read": SiteSpec("resid_pre"), "write": SiteSpec("resid_pre")}
    native.save(tmp_path, [random_transcoder(0, 8)], **sites, sites_source="assumed")
    findings.save_findings(tmp_path, found(CARD, "too close"))
    assert TranscoderStore.open(tmp_path).convention.source == "undecided"
    assert TranscoderStore.open(tmp_path, **sites).convention.source == "given"
    assert TranscoderStore.open(tmp_path, read="resid_pre").convention.source == "undecided"


def test_half_known_sites_are_unknown_in_a_conversion(root, tmp_path):
    done = convert(root, tmp_path / "dst", read="mlp_in")
    manifest = native.read_manifest(tmp_path / "dst")
    assert (manifest.read, manifest.write, manifest.sites_source) == ("mlp_in", None, "unknown")
    assert done.facts["read"] == ("mlp_in", "unknown")
    both = convert(root, tmp_path / "both", read="mlp_in", write="mlp_out", base_model="a/b")
    assert both.facts["write"] == ("mlp_out", "given")
    assert both.facts["base_model"] == ("a/b", "stored")
