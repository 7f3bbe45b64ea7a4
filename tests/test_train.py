"""Training transcoders: what is read; going on after a kill, to the same bytes; how good what comes out is."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.cli import main
from hooks import HookedModel
from hooks.check import Texts
from hooks.errors import ModelError, OutputError, PromptError, TrainingError, UserError
from hooks.host import Host
from hooks.sites import Site
from hooks.train import Recipe, train, training, written_by
from hooks.train import windows as windows_file
from hooks.train.activations import capture
from hooks.train.layer import TrainedLayer
from hooks.train.state import FILE, FOLDER
from hooks.train.windows import Windows, chunks, cut

TEXTS = [" ".join(f"w{(7 * n + k * k) % 61}" for k in range(40)) for n in range(60)]
SMALL = Recipe(d_features=48, k=8, tokens=4000, batch=64, chunk=512, context=16, dead_after=500, warm_up=5)
LONGER = dataclasses.replace(SMALL, tokens=20_000, learning_rate=5e-3)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# -- what is read ----------------------------------------------------------------------------------------------------


def test_windows_hold_one_text_each_and_some_texts_are_held_out(odd):
    windows = cut(odd.host, [*TEXTS, "", "  ", "w1 w2"], 16)
    assert windows.skipped == 3
    ids = {tuple(odd.host.tokenize(text)[start : start + 16]) for text in TEXTS for start in (0, 16, 32)}
    assert {*windows.trained, *windows.held_out} <= ids
    assert len(windows.trained) + len(windows.held_out) == 3 * len(TEXTS)
    held = {tuple(odd.host.tokenize(text)[:16]) for text in TEXTS[19::20]}
    assert held <= set(windows.held_out)
    assert cut(odd.host, TEXTS, 16).digest == cut(odd.host, list(TEXTS), 16).digest
    assert cut(odd.host, TEXTS, 16).digest != cut(odd.host, TEXTS[1:], 16).digest


def test_one_long_text_holds_its_end_out(odd):
    windows = cut(odd.host, [" ".join(["w1 w2 w3 w4"] * 100)], 16)
    assert len(windows.trained) == 24
    assert len(windows.held_out) == 1


@pytest.mark.parametrize("texts", [[], [""], ["w1 w2"], ["w1 w2 w3 w4 w5 w6 w7 w8 w9"]])
def test_a_text_that_is_too_short_is_refused(odd, texts):
    with pytest.raises(PromptError, match="too short to train on"):
        cut(odd.host, texts, 16)


@given(
    sizes=st.lists(st.integers(8, 16), min_size=1, max_size=30),
    tokens=st.integers(1, 2000),
    chunk=st.integers(16, 100),
    seed=st.integers(0, 9),
)
def test_chunks_read_the_text_in_a_new_order_each_time(sizes, tokens, chunk, seed):
    windows = Windows(tuple((n,) * size for n, size in enumerate(sizes)), (), 0)
    made = chunks(windows, tokens, chunk, seed)
    assert made == chunks(windows, tokens, chunk, seed)
    order = [number for part in made for number in part]
    total = sum(sizes[number] for number in order)
    assert tokens <= total < tokens + max(sizes)
    assert all(sum(sizes[number] for number in part) <= chunk for part in made)
    whole = len(order) // len(sizes)
    for reading in range(whole):
        assert sorted(order[reading * len(sizes) : (reading + 1) * len(sizes)]) == list(range(len(sizes)))


def test_captured_tokens_are_those_of_single_passes_without_sinks(sink):
    sites = [Site("resid_pre", 1), Site("mlp_out", 2)]
    windows = [sink.host.tokenize(text) for text in ("w1 w2 w3 w4 w5", "w7 w8", "w3 w1 w9 w10 w11 w12 w13")]
    found = capture(sink.host, windows, sites)
    plain = {site: [] for site in sites}
    for window in sorted(windows, key=len):
        _, seen = sink.host.capture(sink.host.batch([window]), sites)
        calm = torch.ones(len(window), dtype=torch.bool)
        for site in sites:
            norms = seen[site][0].norm(dim=-1)
            calm &= norms <= 10 * norms.median()
        for site in sites:
            plain[site].append(seen[site][0][calm])
    assert sum(map(len, plain[sites[0]])) < sum(map(len, windows)), "no sink among them"
    for site in sites:
        torch.testing.assert_close(found[site], torch.cat(plain[site]))


# -- training --------------------------------------------------------------------------------------------------------


def test_a_trained_set_explains_held_out_text_and_opens_as_any_other(odd, tmp_path):
    made = train(odd.host, TEXTS, tmp_path / "set", recipe=LONGER, layers=[0, 2], half=False)
    first, last = ({layer: curve[place]["fvu"] for layer, curve in made.curves.items()} for place in (0, -1))
    assert all(last[layer] < first[layer] for layer in last)
    assert all(figures.fvu < 0.3 for figures in made.figures.values())
    assert all(0 < figures.l0 <= SMALL.k for figures in made.figures.values())
    model = HookedModel.from_model(odd.host.model, odd.host.tokenizer, tmp_path / "set")
    assert model.store.layers == (0, 2)
    assert str(model.store.sites(2)[0]) == "resid_pre 2"
    windows = cut(odd.host, TEXTS, SMALL.context)
    for layer, figures in made.figures.items():
        x = capture(odd.host, windows.held_out, [Site("resid_pre", layer)])[Site("resid_pre", layer)]
        coder = model.store[layer]
        left = (x - coder.decode(coder.encode(x))).square().sum() / (x - x.mean(0)).square().sum()
        assert float(left) == pytest.approx(figures.fvu, rel=1e-4)
        torch.testing.assert_close(coder.W_dec.norm(dim=-1), torch.ones(SMALL.d_features))
    assert not (tmp_path / "set" / FOLDER).exists()


@pytest.mark.parametrize(("read", "write"), [("mlp_in", "mlp_out"), ("resid_mid", "resid_pre+1")])
def test_other_sites_are_trained_too(odd, tmp_path, read, write):
    recipe = dataclasses.replace(LONGER, read=read, write=write)
    made = train(odd.host, TEXTS, tmp_path / "set", recipe=recipe, half=False)
    assert set(made.figures) == ({0, 1, 2, 3} if write == "mlp_out" else {0, 1, 2})
    assert all(figures.fvu < 0.6 for figures in made.figures.values())


class Killed(BaseException):
    """As if the process ended here."""


@pytest.mark.parametrize("steps", [1, 4, 5, 9, 12])
def test_a_killed_training_goes_on_to_the_same_bytes(odd, tmp_path, monkeypatch, steps):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    options = {"recipe": SMALL, "layers": [0, 1], "half": False}
    train(odd.host, TEXTS, tmp_path / "whole", **options)
    plain, left = training._steps, [steps]

    def interrupted(*args, **rest):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return plain(*args, **rest)

    monkeypatch.setattr(training, "_steps", interrupted)
    with pytest.raises(Killed):
        train(odd.host, TEXTS, tmp_path / "parts", **options)
    assert (tmp_path / "parts" / FOLDER / FILE).exists() == (steps > 2)
    train(odd.host, TEXTS, tmp_path / "parts", **options)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_kill_while_the_state_is_written_leaves_the_state_before(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    options = {"recipe": SMALL, "layers": [0, 1], "half": False}
    train(odd.host, TEXTS, tmp_path / "whole", **options)
    plain, left = TrainedLayer.tensors, [6]

    def interrupted(self):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return plain(self)

    monkeypatch.setattr(TrainedLayer, "tensors", interrupted)
    with pytest.raises(Killed):
        train(odd.host, TEXTS, tmp_path / "parts", **options)
    train(odd.host, TEXTS, tmp_path / "parts", **options)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_layers_in_groups_are_the_same_layers(odd, tmp_path):
    said: list[str] = []
    train(odd.host, TEXTS, tmp_path / "one", recipe=SMALL, half=False)
    each = training._per_layer(odd.host, SMALL)
    train(odd.host, TEXTS, tmp_path / "more", recipe=SMALL, half=False, memory_gb=2.5 * each / 1e9, say=said.append)
    assert "in 2 groups" in said[0]
    one, more = files(tmp_path / "one"), files(tmp_path / "more")
    assert {n: data for n, data in one.items() if n.startswith("layer")} == {
        n: data for n, data in more.items() if n.startswith("layer")
    }


def test_dead_features_are_revived(odd, tmp_path):
    """Features that are too weak to be kept come back with the auxiliary loss, and do not without it."""
    dead = {}
    for auxiliary in (0.0, 1.0):
        recipe = dataclasses.replace(SMALL, auxiliary=auxiliary, dead_after=64, tokens=12_000, learning_rate=5e-3)
        plain = TrainedLayer.started

        def shut(layer, recipe, pair, plain=plain):
            trained = plain(layer, recipe, pair)
            with torch.no_grad():
                trained.W_enc[:24] *= 0.05
                trained.b_enc[:24] = -0.02
            return trained

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainedLayer, "started", staticmethod(shut))
            made = train(odd.host, TEXTS, tmp_path / str(auxiliary), recipe=recipe, layers=[1], half=False)
        dead[auxiliary] = made.figures[1].dead
    assert dead[1.0] < dead[0.0] / 2


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    plain, left = TrainedLayer.step, [20]

    def spoiled(self, pair, seen, *, half):
        left[0] -= 1
        return plain(self, (pair[0] * (float("nan") if left[0] == 0 else 1), pair[1]), seen, half=half)

    monkeypatch.setattr(TrainedLayer, "step", spoiled)
    with pytest.raises(TrainingError, match=r"the loss of layer \d is not a number"):
        train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, layers=[0, 1], half=False)
    assert (tmp_path / "set" / FOLDER / FILE).exists()
    monkeypatch.setattr(TrainedLayer, "step", plain)
    train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, layers=[0, 1], half=False)
    train(odd.host, TEXTS, tmp_path / "whole", recipe=SMALL, layers=[0, 1], half=False)
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_another_training_in_the_same_folder_is_refused(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "_write", lambda *args: {})
    train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, layers=[0], half=False)
    for texts, recipe in ((TEXTS[:-1], SMALL), (TEXTS, dataclasses.replace(SMALL, seed=1))):
        with pytest.raises(UserError, match="it is another one"):
            train(odd.host, texts, tmp_path / "set", recipe=recipe, layers=[0], half=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [9]}, "layer 9 cannot be trained"),
        ({"layers": []}, "no layer to train"),
        ({"memory_gb": 1e-6}, "does not hold one layer"),
    ],
)
def test_what_cannot_be_trained_is_refused(odd, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, half=False, **options)
    assert not (tmp_path / "set").exists()


def test_a_folder_with_a_set_is_refused(odd, tmp_path):
    train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, layers=[0], half=False)
    before = files(tmp_path / "set")
    with pytest.raises(UserError, match="holds a set already"):
        train(odd.host, TEXTS, tmp_path / "set", recipe=SMALL, layers=[0], half=False)
    assert files(tmp_path / "set") == before


def test_a_place_that_cannot_be_written_is_refused_before_any_work(odd, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        train(odd.host, TEXTS, tmp_path / "file" / "set", recipe=SMALL, half=False)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"k": 49}, "more features than there are"),
        ({"batch": 513}, "larger than a chunk"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"d_features": 0}, "d_features"),
        ({"tokens": 2.5}, "tokens"),
        ({"read": "nowhere"}, "nowhere"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **wrong)
    with pytest.raises(UserError, match="contradict"):
        Recipe.sized(40, d_features=3, expansion=2.0)
    with pytest.raises(UserError, match="expansion"):
        Recipe.sized(40, expansion=-1.0)


def test_the_default_is_the_published_form():
    recipe = Recipe.sized(5120)
    assert (recipe.d_features, recipe.k, recipe.read, recipe.write) == (12288, 1474, "resid_pre", "resid_pre")
    assert recipe.rate(0, 10_000) == recipe.learning_rate
    assert recipe.rate(recipe.tokens, 10_000) == 0
    assert recipe.rate(0, 0) < recipe.learning_rate / 50


def test_text_that_the_model_writes_is_the_same_for_a_seed(odd):
    one, two = (written_by(odd.host, 200, 16, 3) for _ in range(2))
    assert one == two != written_by(odd.host, 200, 16, 4)
    assert sum(map(len, one)) >= 200
    assert all(1 < len(row) <= 16 for row in one)


def test_the_command_trains_a_set_and_draws_how_it_went(tmp_path, capsys):
    words = ["train", "--tokens", "4000", "--chunk", "2048", "--layers", "2", "--features", "64", "--k", "8", "--json"]
    assert main([*words, "--out", str(tmp_path / "set"), "--plot", str(tmp_path / "a.png"), "--memory-gb", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in result["layers"]] == [2]
    assert result["curves"]["2"][-1]["fvu"] == result["layers"][0]["fvu"] < 0.9
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert main(["features", "fact: Dallas is in", "--transcoders", str(tmp_path / "set"), "--json"]) == 0
    assert {row["layer"] for row in json.loads(capsys.readouterr().out)["features"]} == {2}
    assert main([*words, "--out", str(tmp_path / "set")]) == 2
    assert "holds a set already" in capsys.readouterr().err


def test_texts_of_every_kind_of_file(tmp_path):
    texts = ["one text", "two\nlines, é"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one text\n\ntwo lines, é\n")
    assert Texts.of_file(tmp_path / "a.jsonl").texts == tuple(texts)
    assert Texts.of_file(tmp_path / "a.parquet").texts == tuple(texts)
    assert Texts.of_file(tmp_path / "a.txt").texts == ("one text", "two lines, é")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}', "line 2 of"),
        ("a.jsonl", b"[" * 100_000, "line 1 of"),
        ("a.jsonl", b"\xff\xfe", "cannot read the text"),
        ("a.parquet", b"PAR1 nonsense", "cannot read the column text"),
    ],
)
def test_files_that_hold_no_texts_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=words):
        Texts.of_file(tmp_path / name)
    for missing in ("b.jsonl", "b.parquet", "b.txt"):
        with pytest.raises(PromptError, match="cannot read the text"):
            Texts.of_file(tmp_path / missing)


def test_what_is_held_out_of_a_long_text_is_bounded(odd, monkeypatch):
    monkeypatch.setattr(windows_file, "HELD_OUT_TOKENS", 64)
    long = [" ".join(f"w{n % 60}" for n in range(1000))] * 20
    windows = cut(odd.host, long, 16)
    assert len(windows.held_out) == 4
    assert len(windows.trained) == 19 * 63
    assert len(cut(odd.host, long[:1] * 2, 16).held_out) == 4


def test_text_without_a_tokenizer_is_refused(odd, tmp_path):
    host = Host(odd.host.model, None)
    with pytest.raises(ModelError, match="no tokenizer"):
        train(host, TEXTS, tmp_path / "set", recipe=SMALL, half=False)
    ids = [odd.host.tokenize(text) for text in TEXTS]
    assert cut(host, ids, 16) == cut(odd.host, TEXTS, 16)
