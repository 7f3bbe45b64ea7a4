"""The quality report: sets whose every figure is known beforehand, sums by hand, and the slow way."""

import json
import math
from dataclasses import replace
from functools import reduce
from operator import add

import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from worlds import left_behind, random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import cli
from circuits.plots import quality_plot
from hooks import HookedModel, Site, Transcoder, UserError
from hooks.check import QualityReport, quality
from hooks.check.sums import site_sums
from hooks.demo.world import held_out_sentences
from hooks.errors import CheckpointError, OutputError, PromptError
from hooks.passes import site_quality, swap_effect
from hooks.sites import SiteSpec
from hooks.types import Edit

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w3 w3 w10 w11", "w12", "w5 w4 w3 w2 w1"]
WIDTH = 40
EVEN = {"rel": 1e-6, "abs": 1e-9}  # sums of the same fp32 numbers in another order


def made(layer: int, site: str = "resid_pre", **weights: torch.Tensor) -> Transcoder:
    """No norm, plain ReLU; what is not given is 0, and two features that are never active."""
    zeros = {"W_enc": (2, WIDTH), "b_enc": (2,), "W_dec": (2, WIDTH), "b_dec": (WIDTH,)}
    given = {name: weights.get(name, torch.zeros(shape)) for name, shape in zeros.items()}
    place = Site(site, layer)
    return Transcoder(
        layer=layer, read=place, write=place, **given, norm_weight=None, norm_bias=None, norm_eps=1e-5, k=None
    )


def hooked(coders: list[Transcoder], **options) -> HookedModel:
    return HookedModel.from_model(random_qwen2(**options), word_tokenizer(), coders)


def both_signs(layer: int, site: str = "resid_pre") -> Transcoder:
    """x = relu(x) − relu(−x): every entry is a feature of one sign or the other, and the reconstruction is exact."""
    signs = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    return made(layer, site, W_enc=signs, b_enc=torch.zeros(2 * WIDTH), W_dec=signs)


def streams(model: HookedModel, texts: list[str], site: Site) -> torch.Tensor:
    """What stands at a site at every token of every text, each run alone, in fp64."""
    seen = [model.host.capture(model.host.batch([text]), [site])[1][site][0] for text in texts]
    return torch.cat(seen).double()


def same(one: QualityReport, two: QualityReport, **tolerance: float) -> None:
    left, right = one.table, two.table
    assert left["swapped"].tolist() == right["swapped"].tolist()
    assert (one.tokens, one.predicted) == (two.tokens, two.predicted)
    pd.testing.assert_frame_equal(left, right, check_exact=False, rtol=tolerance["rel"], atol=tolerance["abs"])


# -- known beforehand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_out"])
def test_an_exact_reconstruction_loses_nothing(site):
    report = quality(hooked([both_signs(layer, site) for layer in range(4)]), TEXTS)
    for layer in report.layers:
        assert layer.fvu == layer.fvu_calm == layer.loss == 0
        assert layer.fvu_normed == 0
        assert layer.cosine == pytest.approx(1, abs=1e-12)
        assert layer.norm_ratio == pytest.approx(1, abs=1e-12)
        assert layer.l0 == WIDTH  # one of each pair, at every token
    for item in (*report.one.values(), report.together["all"]):
        assert item.delta_ce == pytest.approx(0, abs=1e-7)  # the same passes, but for an addition of zeros
        assert item.swapped.kl == pytest.approx(0, abs=1e-10)
        assert item.swapped.top1_agreement == 1
        assert item.ce_score == pytest.approx(1, abs=1e-6) or item.ablated.ce < report.clean_ce
        assert item.kl_score == pytest.approx(1, abs=1e-6)
        assert item.ablated.kl > 0.01, "the mean must hurt, or nothing was tested"


def test_a_skip_connection_is_part_of_the_reconstruction():
    report = quality(hooked([replace(made(layer), W_skip=torch.eye(WIDTH)) for layer in range(4)]), TEXTS)
    assert all((layer.fvu, layer.l0, layer.dead) == (0, 0, 2) for layer in report.layers)
    assert report.together["all"].swapped.kl == pytest.approx(0, abs=1e-10)


def test_a_constant_far_larger_than_what_varies_costs_no_digits():
    """As a massive channel does: x = 100,000 + noise, reconstructed as 100,000, in three batches."""
    generator = torch.Generator().manual_seed(0)
    x = 1e5 + torch.randn(60, WIDTH, generator=generator)
    coder = made(0, b_dec=torch.full((WIDTH,), 1e5))
    parts = [site_sums(coder, part, part, x.double().mean(0), math.inf, 1e-6) for part in x.split(25)]
    noise = x.double() - 1e5
    expected = float(noise.square().sum() / (noise - noise.mean(0)).square().sum())
    assert reduce(add, parts).all.fvu == pytest.approx(expected, rel=1e-9)


def test_a_set_that_says_nothing_but_the_mean_is_the_mean_ablation():
    model = random_qwen2()
    plain = HookedModel.from_model(model, word_tokenizer(), [made(0)])
    means = [streams(plain, TEXTS, Site("resid_pre", layer)).mean(0).float() for layer in range(4)]
    hurt = HookedModel.from_model(model, word_tokenizer(), [made(n, b_dec=mean) for n, mean in enumerate(means)])
    report = quality(hurt, TEXTS)
    for layer in report.layers:
        assert layer.fvu == pytest.approx(1, abs=1e-7)  # x − x̂ is fp32
        assert (layer.l0, layer.dead, layer.always_on, layer.features) == (0, 2, 0, 2)
    for item in (*report.one.values(), report.together["all"]):
        assert item.swapped.ce == pytest.approx(item.ablated.ce, abs=1e-6)  # b_dec is the mean rounded to fp32
        assert item.swapped.kl == pytest.approx(item.ablated.kl, abs=1e-6)
        assert item.kl_score == pytest.approx(0, abs=1e-5)
        if item.ce_score is not None:
            assert item.ce_score == pytest.approx(0, abs=1e-5)


def test_scores_are_undefined_where_ablation_costs_nothing():
    """A write site that is the same at every token is its own mean: nothing is lost, and nothing can be recovered."""
    report = quality(hooked([made(0)]), ["w7 w7 w7 w7"])
    assert report.layers[0].fvu is None
    assert report.one[0].kl_score is None
    assert report.one[0].ce_score is None


def test_dead_and_always_on_features_are_counted_over_the_real_tokens():
    model = random_qwen2()
    own = model.model.embed_tokens.weight[word_tokenizer()("w2").input_ids[0]].detach()
    rows = torch.stack([own, torch.zeros(WIDTH), torch.zeros(WIDTH), torch.zeros(WIDTH), -own])
    # at w2 alone, always, never, never, everywhere but at w2; w2 pads the second row, where it must not be counted
    most = 0.95 * float(own @ own)
    coder = made(0, W_enc=rows, b_enc=torch.tensor([-most, 1.0, -1.0, 0.0, most]), W_dec=torch.zeros(5, WIDTH))
    report = quality(HookedModel.from_model(model, word_tokenizer(), [coder]), ["w1 w3 w4 w5 w6 w7", "w1 w2"])
    layer = report.layers[0]
    assert report.tokens == 8
    assert layer.l0 == (1 + 8 + 7) / 8
    assert (layer.dead, layer.always_on, layer.features) == (2, 1, 5)
    only = quality(HookedModel.from_model(model, word_tokenizer(), [coder]), ["w2 w2"]).layers[0]
    assert (only.l0, only.dead, only.always_on) == (2, 3, 2)


def test_sinks_are_left_out_where_that_is_said(sink):
    """Tokens of 100 times the usual norm are nearly all of the variance: both values, by hand."""
    texts = ["w2 w3 w1 w4 w5 w6", "w7 w8 w9 w10", "w3 w1 w2 w11 w12"]
    report = quality(sink, texts)
    for layer in report.layers:
        x = streams(sink, texts, Site("resid_pre", layer.layer))
        x_hat = slow_reconstruction(sink.store[layer.layer], x)
        big = x.norm(dim=-1) > 10 * x.norm(dim=-1).median()
        assert layer.sinks == int(big.sum())
        assert layer.fvu == pytest.approx(slow_fvu(x, x_hat), rel=1e-4)
        assert layer.fvu_calm == pytest.approx(slow_fvu(x[~big], x_hat[~big]), rel=1e-4)
        assert layer.loss == pytest.approx(float((x - x_hat).square().mean()), rel=1e-4)
    first = report.layers[0]
    assert first.sinks == 2
    assert not math.isclose(first.fvu, first.fvu_calm, rel_tol=0.1)


def test_eight_sites_are_spread_evenly_from_the_first_to_the_last():
    model = hooked([random_transcoder(layer, WIDTH) for layer in range(12)], layers=12)
    report = quality(model, ["w1 w2 w3"])
    assert list(report.together) == ["8 evenly spaced", "all"]
    assert report.together["8 evenly spaced"].layers == (0, 2, 3, 5, 6, 8, 9, 11)
    assert report.together["all"].layers == tuple(range(12))
    eight = quality(model, ["w1 w2 w3"], layers=range(8))
    assert list(eight.together) == ["all"]
    assert report.together["8 evenly spaced"].swapped != report.together["all"].swapped


# -- the slow way ----------------------------------------------------------------------------------------------------


def slow_fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def slow_features(coder: Transcoder, x: torch.Tensor) -> torch.Tensor:
    norm = F.layer_norm(x, x.shape[-1:], coder.norm_weight.double(), coder.norm_bias.double(), coder.norm_eps)
    pre = norm @ coder.W_enc.double().T + coder.b_enc.double()
    top = pre.topk(coder.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def slow_reconstruction(coder: Transcoder, x: torch.Tensor) -> torch.Tensor:
    return slow_features(coder, x) @ coder.W_dec.double() + coder.b_dec.double()


def rms_unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [sentence.text for sentence in held_out_sentences(3, 12)]


@pytest.fixture(params=["demo", "odd"])
def case(request, texts) -> tuple[HookedModel, list[str]]:
    return request.getfixturevalue(request.param), texts if request.param == "demo" else TEXTS


def test_reconstructions_are_those_of_dense_algebra_text_by_text(case):
    model, texts = case
    report = quality(model, texts)
    eps = model.host.model.config.rms_norm_eps
    for layer in report.layers:
        x, coder = streams(model, texts, Site("resid_pre", layer.layer)), model.store[layer.layer]
        acts, x_hat = slow_features(coder, x), slow_reconstruction(coder, x)
        assert report.tokens == len(x)
        # fp32 passes and reconstructions against fp64 ones
        assert layer.fvu == pytest.approx(slow_fvu(x, x_hat), rel=1e-4)
        assert layer.fvu_normed == pytest.approx(slow_fvu(rms_unit(x, eps), rms_unit(x_hat, eps)), rel=1e-4)
        assert layer.cosine == pytest.approx(float(F.cosine_similarity(x, x_hat, dim=-1).mean()), abs=1e-5)
        assert layer.norm_ratio == pytest.approx(float((x_hat.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-5)
        assert layer.loss == pytest.approx(float((x - x_hat).square().mean()), rel=1e-4)
        assert layer.l0 == float((acts > 0).sum(-1).double().mean())
        assert layer.dead == int((acts > 0).any(0).logical_not().sum())
        assert layer.always_on == int((acts > 0).all(0).sum())


def test_predictions_are_those_of_single_runs_with_edits_by_hand(case):
    model, texts = case
    report = quality(model, texts)
    groups = {**report.one, **report.together}
    for item in groups.values():
        means = {layer: streams(model, texts, Site("resid_pre", layer)).mean(0) for layer in item.layers}

        def swapped(layer):
            return lambda x, at: slow_reconstruction(model.store[layer], x.double()).float()

        def ablated(layer, means=means):
            return lambda x, at: means[layer].expand_as(x).float()

        for make, found in ((swapped, item.swapped), (ablated, item.ablated)):
            edits = [Edit(Site("resid_pre", layer), make(layer)) for layer in item.layers]
            ce, kl, agree, clean_ce = by_hand(model, texts, edits)
            assert found.ce == pytest.approx(ce, abs=2e-4)
            assert found.kl == pytest.approx(kl, abs=2e-4)
            assert found.top1_agreement == pytest.approx(agree, abs=1e-12)
            assert item.clean_ce == report.clean_ce == pytest.approx(clean_ce, abs=1e-5)
        lost = item.ablated.ce - report.clean_ce
        assert item.delta_ce == item.swapped.ce - report.clean_ce
        if lost > 0:
            assert item.ce_score == pytest.approx(1 - item.delta_ce / lost)
        assert item.kl_score == pytest.approx(1 - item.swapped.kl / item.ablated.kl)


def by_hand(model: HookedModel, texts: list[str], edits: list[Edit]) -> tuple[float, float, float, float]:
    ce, kl, agree, clean_ce = [], [], [], []
    for text in texts:
        batch = model.host.batch([text])
        before, after = model.host.forward(batch)[0].double(), model.host.forward(batch, edits)[0].double()
        if len(after) > 1:
            ce.append(F.cross_entropy(after[:-1], batch.ids[0, 1:], reduction="none"))
            clean_ce.append(F.cross_entropy(before[:-1], batch.ids[0, 1:], reduction="none"))
        log = before.log_softmax(-1), after.log_softmax(-1)
        kl.append(F.kl_div(log[1], log[0], log_target=True, reduction="none").sum(-1))
        agree.append((before.argmax(-1) == after.argmax(-1)).double())
    return tuple(float(torch.cat(part).mean()) for part in (ce, kl, agree, clean_ce))


def test_one_prompt_is_what_swap_says(demo):
    prompt = "fact: the capital of the state containing Dallas is"
    report = quality(demo, [prompt])
    recording = demo.record(prompt)
    for layer in report.layers:
        expected = site_quality(recording, layer.layer)
        assert layer.fvu == pytest.approx(expected.fvu, rel=1e-4)
        assert layer.loss == pytest.approx(expected.loss, rel=1e-4)
        assert layer.l0 == expected.l0
    for item in (*report.one.values(), report.together["all"]):
        run = demo.run(prompt, swap=item.layers, error="zero")
        effect = swap_effect(run.baseline[None], run.logits[None], run.batch.mask)
        assert item.swapped.kl == pytest.approx(effect.kl, rel=1e-3, abs=1e-6)
        assert item.swapped.top1_agreement == pytest.approx(effect.top1_agreement)


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [1, 7, 40])
def test_any_batches_give_what_one_gives(case, tokens_at_once):
    model, texts = case
    # another shape of a batch rounds otherwise; what is counted stays
    same(quality(model, texts, tokens_at_once=tokens_at_once), quality(model, texts), rel=2e-4, abs=2e-5)


def test_the_order_of_the_texts_is_nothing(odd):
    same(quality(odd, TEXTS[::-1]), quality(odd, TEXTS), **EVEN)


def test_a_text_twice_counts_twice(odd):
    """Means are the same, sums are not: a token too many would show in both."""
    twice, once = quality(odd, [*TEXTS, *TEXTS]), quality(odd, TEXTS)
    assert (twice.tokens, twice.predicted) == (2 * once.tokens, 2 * once.predicted) == (38, 28)
    pd.testing.assert_frame_equal(twice.table.drop(columns="sinks"), once.table.drop(columns="sinks"), rtol=2e-4)


def test_nothing_stays_attached_and_the_model_is_as_it_was(odd):
    before = odd.run(TEXTS[0]).baseline
    quality(odd, TEXTS)
    assert not left_behind(odd.host.model)
    assert torch.equal(odd.run(TEXTS[0]).baseline, before)


def test_only_the_layers_asked_for(odd):
    some, every = quality(odd, TEXTS, layers=[3, 1]), quality(odd, TEXTS)
    assert [layer.layer for layer in some.layers] == [1, 3]
    assert some.layers == tuple(layer for layer in every.layers if layer.layer in (1, 3))
    assert some.one == {layer: every.one[layer] for layer in (1, 3)}
    assert some.together["all"].layers == (1, 3)


def test_half_precision_runs_through():
    """bf16 weights and streams: the sums are those of what is stored, and every figure is finite."""
    report = quality(random_hooked(dtype=torch.bfloat16), TEXTS)
    assert report.table.drop(columns=["swapped", "stored_loss"]).notna().all(axis=None)
    exact = quality(hooked([replaced_dtype(both_signs(n)) for n in range(4)], dtype=torch.bfloat16), TEXTS)
    assert all(layer.fvu == 0 for layer in exact.layers)
    assert exact.together["all"].swapped.kl == 0


def replaced_dtype(coder: Transcoder) -> Transcoder:
    return coder.to("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("read", "write"), [("resid_pre", "resid_pre+1"), ("mlp_in", "mlp_out"), ("resid_mid", "mlp_out+1")]
)
def test_other_conventions_are_measured_where_they_write(read, write):
    spec = SiteSpec.parse(write)
    coders = [random_transcoder(n, WIDTH, read=Site(read, n), write=spec.at(n)) for n in range(3)]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    report = quality(model, TEXTS)
    for layer, coder in zip(report.layers, coders, strict=True):
        x, given = streams(model, TEXTS, coder.write), streams(model, TEXTS, coder.read)
        assert layer.fvu == pytest.approx(slow_fvu(x, slow_reconstruction(coder, given)), rel=1e-4)
        mean = x.mean(0).float()
        ce, kl, _, _ = by_hand(model, TEXTS, [Edit(coder.write, lambda x, at, mean=mean: mean.expand_as(x))])
        assert report.one[layer.layer].ablated.ce == pytest.approx(ce, abs=2e-4)
        assert report.one[layer.layer].ablated.kl == pytest.approx(kl, abs=2e-4)


# -- what the files say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "shown"), [(0.125, 0.125), (None, None), ("?", None), (math.nan, None)])
def test_the_stored_loss_stands_beside_the_measured_one(tmp_path, stored, shown):
    for layer in range(2):
        generator = torch.Generator().manual_seed(layer)
        state = {
            "enc.0.weight": torch.ones(WIDTH),
            "enc.0.bias": torch.zeros(WIDTH),
            "enc.1.weight": torch.randn(50, WIDTH, generator=generator),
            "enc.1.bias": torch.zeros(50),
            "dec.weight": torch.randn(WIDTH, 50, generator=generator),
            "dec.bias": torch.zeros(WIDTH),
        }
        metadata = {"final_l0_pct": 12.0} | ({} if stored is None else {"final_rec_loss": stored})
        content = {"layer": layer, "hidden_dim": WIDTH, "feature_dim": 50, "state_dict": state}
        torch.save(content | {"training_metadata": metadata}, tmp_path / f"transcoder_L{layer}.pt")
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), str(tmp_path), read="resid_pre", write="resid_pre")
    report = quality(model, TEXTS)
    assert [layer.stored_loss for layer in report.layers] == [shown, shown]
    assert all(layer.loss > 0 for layer in report.layers)


# -- tables and pictures ---------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_layer_and_per_group(odd, tmp_path):
    report = quality(odd, TEXTS)
    table = report.table
    assert table["swapped"].tolist() == ["L0", "L1", "L3", "all"]
    rows, every = table.iloc[:3], table.iloc[3]
    assert every["fvu"] == pytest.approx(rows["fvu"].mean())
    assert (every["dead"], every["features"]) == (rows["dead"].sum(), 3 * 96)
    assert every["delta_ce"] == report.together["all"].delta_ce
    report.save(tmp_path / "q.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "q.csv"), table, check_dtype=False)
    report.save(tmp_path / "q.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "q.parquet"), table)
    report.save(tmp_path / "q.json")
    kept = json.loads((tmp_path / "q.json").read_text())
    assert kept == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert kept["layers"][1]["swap"]["swapped"]["kl"] == report.one[1].swapped.kl
    assert kept["together"]["all"]["layers"] == [0, 1, 3]


def test_the_picture_is_drawn_from_the_report(odd, tmp_path):
    report = quality(odd, TEXTS)
    for name in ("a.svg", "b.svg", "c.png"):
        quality_plot(report, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    dead = sum(layer.dead for layer in report.layers)
    cost = f"{report.together['all'].delta_ce:+.3g}".replace("-", "−")
    for shown in ("19 tokens", f"of 288 features {dead} never active here", f"all sites together {cost}"):
        assert shown in text


# -- the command line ------------------------------------------------------------------------------------------------


def asked(*words: str) -> dict:
    args = cli.build_parser().parse_args(["check", "--quality", *words])
    return cli.run(args)


def test_the_command_measures_a_file_and_writes_all_of_it(demo, tmp_path, capsys):
    texts = ["fact: the capital of the state containing Dallas is Austin", "fact: the capital of the state"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    files = ["--out", str(tmp_path / "q.json"), "--plot", str(tmp_path / "q.png")]
    found = asked("--text", str(tmp_path / "text.txt"), *files)
    shown = capsys.readouterr().out
    report = quality(demo, texts)
    assert found == {"text": "text.txt", **report.to_dict()}
    assert json.loads((tmp_path / "q.json").read_text()) == report.to_dict()
    assert (tmp_path / "q.png").stat().st_size > 10_000
    assert f"reconstruction on {report.tokens} tokens" in shown
    assert all(f"L{layer} " in shown for layer in demo.store.layers)
    assert "stored_loss" not in shown, "the demo's files state none"
    few = asked("--text", str(tmp_path / "text.txt"), "--tokens", "6", "--layers", "3,1", "--json")
    assert few["tokens"] == 6
    assert few["together"]["all"]["layers"] == [layer["layer"] for layer in few["layers"]] == [1, 3]
    assert capsys.readouterr().out == ""


def test_the_command_has_a_text_of_its_own(capsys):
    assert asked("--tokens", "300", "--json")["tokens"] == 300


@pytest.mark.parametrize("words", [("--out", "q.txt"), ("--plot", "q.pdf"), ("--out", "/proc/none/q.json")])
def test_files_are_looked_at_before_the_model_is_loaded(words):
    with pytest.raises(OutputError):
        asked(*words, "--model", "there/is-none")


def test_quality_finds_no_sites_to_save():
    with pytest.raises(UserError, match="--save has no meaning for --quality"):
        asked("--save")


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "error", "text"),
    [
        ([], {}, PromptError, "no next token"),
        (["w1", "w2"], {}, PromptError, "no next token"),
        (["w1 w2", ""], {}, PromptError, "the prompt is empty"),
        (["w1 w2"], {"tokens_at_once": 0}, UserError, "0 tokens at once"),
        (["w1 w2"], {"layers": [2]}, CheckpointError, "layer 2 has no transcoder"),
    ],
)
def test_what_cannot_be_measured_is_refused(odd, prompts, options, error, text):
    with pytest.raises(error, match=text):
        quality(odd, prompts, **options)


def test_other_suffixes_are_refused(odd, tmp_path):
    report = quality(odd, ["w1 w2"])
    with pytest.raises(OutputError, match=r"unknown table format '\.txt'"):
        report.save(tmp_path / "q.txt")
    with pytest.raises(OutputError, match="unknown picture format"):
        quality_plot(report, tmp_path / "q.txt")
    assert not list(tmp_path.iterdir())
