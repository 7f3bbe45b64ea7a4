"""`circuits check` against sets that are trained here, each under a convention of its own: the truth is known."""

import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from hooks import HookedModel
from hooks.check import Texts, calibrate, rows_of
from hooks.check.avoidable import avoidable_by_row, separation
from hooks.check.block_by_block import streams_by_layer
from hooks.check.fits import fits, options, sink_mask
from hooks.check.selection_rule import SelectionRule, selection
from hooks.check.texts import paragraphs
from hooks.checkpoints import Findings, TranscoderStore
from hooks.demo import TRANSCODERS
from hooks.demo.world import SentenceSource, training_sentences
from hooks.errors import CheckpointError, PromptError
from hooks.formats import Checkpoint, LayerSource, recognise
from hooks.host import Host, fingerprint
from hooks.sites import Site, SiteSpec

TEXTS = Texts.built_in(demo=True)


# -- sets of known conventions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What a set is trained on."""

    read: str
    write: str
    encoder: str
    layer: int

    def __str__(self) -> str:
        return f"{self.read}-{self.write}-{self.encoder}-L{self.layer}"

    @property
    def sites(self) -> tuple[Site, Site]:
        return SiteSpec.parse(self.read).at(self.layer), SiteSpec.parse(self.write).at(self.layer)


PAIRS = (
    ("resid_pre", "resid_pre", 2),  # same site
    ("resid_mid", "resid_mid", 1),
    ("resid_pre", "resid_post", 1),  # the next layer's input
    ("resid_mid", "resid_post", 3),
    ("mlp_in", "resid_post", 2),
    ("resid_pre", "mlp_out", 2),
    ("resid_mid", "mlp_out", 1),
    ("mlp_in", "mlp_out", 2),
    ("resid_pre", "mlp_out+1", 1),
    ("resid_mid", "mlp_out+1", 2),
    ("mlp_in", "mlp_out+1", 1),
    ("resid_pre", "mlp_out", 0),
    ("resid_mid", "mlp_out", 0),
)
TRUTHS = tuple(Truth(read, write, encoder, layer) for read, write, layer in PAIRS for encoder in ("trained", "card"))
DENSITIES = {"sparse": (154, 4), "dense": (154, 18)}  # features (2.4 d_model) and k (2.6 % and 12 %)
STEPS, ROWS, RATE = 300, 256, 3e-3


@dataclass(frozen=True)
class Trained:
    """A stack of published-form transcoders, one per truth."""

    truths: tuple[Truth, ...]
    parts: dict[str, Tensor]
    losses: list[float]
    k: int

    def write(self, root: Path, truth: Truth, *, metadata: bool = True) -> Path:
        """The folder of one truth, in the published layout."""
        index = self.truths.index(truth)
        own = {name: part[index] for name, part in self.parts.items()}
        d_features, d_model = own["W_enc"].shape
        state = {
            "enc.0.weight": own["gain"],
            "enc.0.bias": own["bias"],
            "enc.1.weight": own["W_enc"],
            "enc.1.bias": own["b_enc"],
            "dec.weight": own["W_dec"].T,
            "dec.bias": own["b_dec"],
        }
        facts = {"steps": STEPS, "final_l0_pct": 100 * self.k / d_features, "final_rec_loss": self.losses[index]}
        root.mkdir(parents=True, exist_ok=True)
        content = {
            "layer": truth.layer,
            "hidden_dim": d_model,
            "feature_dim": d_features,
            "state_dict": {f"_orig_mod.{key}": part.contiguous().bfloat16() for key, part in state.items()},
        } | ({"training_metadata": facts} if metadata else {})
        torch.save(content, root / f"transcoder_L{truth.layer}.pt")
        return root


def keep_top(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def train(truths: tuple[Truth, ...], seen: dict[Site, Tensor], d_features: int, k: int) -> Trained:
    """One transcoder per truth, all at once: squared error, Adam, linear decay."""
    torch.manual_seed(0)
    x, y = (torch.stack([seen[truth.sites[end]] for truth in truths]) for end in (0, 1))
    count, n_tokens, d_model = x.shape
    card = torch.tensor([truth.encoder == "card" for truth in truths])[:, None, None]
    mean = y.mean(1, keepdim=True)
    spread = (y - mean).square().sum(-1).mean(1)
    start = nn.functional.normalize(torch.randn(count, d_features, d_model), dim=-1)
    parts = {
        "W_enc": start.clone(),
        "b_enc": torch.zeros(count, 1, d_features),
        "gain": torch.ones(count, 1, d_model),
        "bias": torch.where(card, -x.mean(1, keepdim=True), 0.0),
        "W_dec": start * (spread / d_model).sqrt()[:, None, None] / 2,
        "b_dec": mean.clone(),
    }
    weights = {name: nn.Parameter(part) for name, part in parts.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / STEPS))
        rows = torch.randint(0, n_tokens, (ROWS,))
        own, aim = x[:, rows], y[:, rows]
        normed = nn.functional.layer_norm(own, (d_model,)) * weights["gain"]
        given = torch.where(card, own, normed) + weights["bias"]
        acts = keep_top(torch.baddbmm(weights["b_enc"], given, weights["W_enc"].mT), k)
        error = (aim - torch.baddbmm(weights["b_dec"], acts, weights["W_dec"])).square()
        optimizer.zero_grad()
        (error.sum(-1).mean(1) / spread).sum().backward()
        optimizer.step()
    done = {name: weight.detach().squeeze(1) for name, weight in weights.items()}
    return Trained(truths, done, error.detach().mean((1, 2)).tolist(), k)


@pytest.fixture(scope="module")
def host(demo: HookedModel) -> Host:
    return demo.host


@pytest.fixture(scope="module")
def seen(host: Host) -> dict[Site, Tensor]:
    """Every site of the demo model on sentences that no check here uses."""
    source = SentenceSource(0, Random("training of the test sets"))
    batch = host.batch([sentence.text for sentence in islice(source, 3000)])
    names = ("resid_pre", "resid_mid", "mlp_in", "mlp_out", "resid_post")
    sites = [Site(name, layer) for layer in range(host.n_layers) for name in names]
    return {site: x[batch.mask] for site, x in host.capture(batch, sites)[1].items()}


@pytest.fixture(scope="module")
def dense(seen: dict[Site, Tensor]) -> Trained:
    return train(TRUTHS, seen, *DENSITIES["dense"])


@pytest.fixture(scope="module")
def sparse(seen: dict[Site, Tensor]) -> Trained:
    return train(TRUTHS, seen, *DENSITIES["sparse"])


def check(host: Host, root: Path, tokens: int = 2048, **options) -> Findings:
    return calibrate(host, recognise(root), TEXTS, tokens=tokens, **options).findings


def convention(found: Findings) -> tuple[str, str, str]:
    return found.best.read, found.best.write, found.best.encoder


# -- the convention is found -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "density"),
    [*((truth, "dense") for truth in TRUTHS), *((truth, "sparse") for truth in TRUTHS[::3])],
    ids=lambda value: str(value),
)
def test_the_convention_is_found(truth: Truth, density: str, request, host: Host, tmp_path: Path) -> None:
    stack: Trained = request.getfixturevalue(density)
    found = check(host, stack.write(tmp_path, truth))
    assert convention(found) == (truth.read, truth.write, truth.encoder), found.ranking
    assert found.verdict == "clear", "\n".join(map(repr, found.ranking))
    assert not found.other_model, found.notes
    # TopK is what it was trained with: it may be left open, but not be named otherwise
    assert found.selection.activation in ("topk", None)
    assert found.selection.k in (stack.k, None)
    assert found.selection.source in ("metadata", "undetermined")


EASY = Truth("resid_mid", "mlp_out+1", "trained", 2)
HARD = Truth("resid_pre", "mlp_out", "card", 0)


@pytest.mark.slow
def test_the_error_alone_would_name_an_easier_target(sparse: Trained, host: Host, tmp_path: Path) -> None:
    found = check(host, sparse.write(tmp_path, HARD))
    assert convention(found) == (HARD.read, HARD.write, HARD.encoder)
    assert found.margin < 0, "the smallest FVU belongs to another candidate"
    assert min(c.separation for c in found.ranking[1:] if c.separation is not None) > 3


@pytest.mark.slow
@pytest.mark.parametrize("density", DENSITIES)
def test_without_metadata_the_selection_stays_open(density: str, request, host: Host, tmp_path: Path) -> None:
    root = request.getfixturevalue(density).write(tmp_path, EASY, metadata=False)
    found = check(host, root)
    assert convention(found) == (EASY.read, EASY.write, EASY.encoder)
    assert (found.selection.activation, found.selection.k, found.selection.source) == (None, None, "undetermined")
    # what it was measured with is the k of training, although at 12 % the FVU falls on behind it
    assert found.selection.measured_with == f"topk, {DENSITIES[density][1]}"
    ks = [point.k for point in found.selection.curve]
    assert ks[-1] is None
    assert ks[:-1] == sorted(set(ks[:-1]))
    assert len(ks) > 5


@pytest.mark.slow
def test_layers_of_a_set_are_judged_together(dense: Trained, host: Host, tmp_path: Path) -> None:
    same = [
        truth for truth in TRUTHS if (truth.read, truth.write, truth.encoder) == ("resid_mid", "mlp_out", "trained")
    ]
    for truth in same:
        dense.write(tmp_path, truth)
    found = check(host, tmp_path)
    assert [layer.layer for layer in found.layers] == sorted(truth.layer for truth in same)
    assert convention(found) == ("resid_mid", "mlp_out", "trained")
    assert found.verdict == "clear"
    assert all(layer.ok for layer in found.layers)
    alone = check(host, tmp_path, layers=[1])
    assert [layer.layer for layer in alone.layers] == [1]


def test_the_embedded_sets_are_what_they_say(host: Host, demo: HookedModel) -> None:
    for name in ("demo", "demo-dense"):
        found = check(host, TRANSCODERS[name])
        assert convention(found) == ("resid_pre", "resid_pre", "trained")
        assert (found.verdict, found.other_model, found.notes) == ("clear", False, ())
        assert found.selection.source == "stored"
        assert max(layer.avoidable / layer.fvu for layer in found.layers) < 0.2


@pytest.mark.slow
def test_every_decoder_has_its_own_target(dense: Trained, seen: dict[Site, Tensor], host: Host, tmp_path: Path) -> None:
    """A second decoder, by least squares on the same features, for the MLP two blocks on."""
    truth = Truth("mlp_in", "mlp_out+1", "trained", 1)
    file = dense.write(tmp_path, truth) / "transcoder_L1.pt"
    weight, bias = refitted(tmp_path, truth, seen, seen[Site("mlp_out", 3)])
    content = torch.load(file, weights_only=True)
    state = content["state_dict"]
    state["_orig_mod.dec.weight"] = torch.cat([state["_orig_mod.dec.weight"], weight])
    state["_orig_mod.dec.bias"] = torch.cat([state["_orig_mod.dec.bias"], bias])
    torch.save(content, file)
    found = check(host, tmp_path)
    assert [(d.best.write, d.verdict) for d in found.decoders] == [("mlp_out+1", "clear"), ("mlp_out+2", "clear")]
    second = check(host, tmp_path, decoder=1)
    assert (second.best.decoder, second.best.write, second.decoders) == (1, "mlp_out+2", ())


def refitted(root: Path, truth: Truth, seen: dict[Site, Tensor], aim: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder for another target, by least squares on a set's own features; weight and bias as stored."""
    coder = TranscoderStore.open(root, read=truth.read, write=truth.write)[truth.layer]
    acts = coder.encode(seen[truth.sites[0]]).dense(coder.d_features)
    fitted = torch.linalg.lstsq(torch.cat([acts, torch.ones(len(acts), 1)], dim=1), aim).solution.bfloat16()
    return fitted[:-1].T.contiguous(), fitted[-1].clone()


@pytest.mark.slow
def test_a_set_that_writes_the_blocks_update_is_recognised(
    dense: Trained, seen: dict[Site, Tensor], host: Host, tmp_path: Path
) -> None:
    truth = Truth("resid_pre", "resid_post", "trained", 1)
    file = dense.write(tmp_path, truth) / "transcoder_L1.pt"
    update = seen[Site("resid_post", 1)] - seen[Site("resid_pre", 1)]
    weight, bias = refitted(tmp_path, truth, seen, update)
    content = torch.load(file, weights_only=True)
    content["state_dict"] |= {"_orig_mod.dec.weight": weight, "_orig_mod.dec.bias": bias}
    torch.save(content, file)
    assert any("resid_post - resid_pre, is reconstructed better" in note for note in check(host, tmp_path).notes)


# -- the wrong model is called out -----------------------------------------------------------------------------------


def other_model(host: Host, how: str) -> Host:
    torch.manual_seed(5)
    model = copy.deepcopy(host.model)
    if how == "untrained":
        return Host(type(model)(model.config), host.tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.5 * parameter.data.std() * torch.randn_like(parameter)
    return Host(model, host.tokenizer)


@pytest.mark.parametrize("name", ["demo", "demo-dense"])
@pytest.mark.parametrize("how", ["untrained", "perturbed"])
def test_another_model_is_called_out(how: str, name: str, host: Host) -> None:
    found = check(other_model(host, how), TRANSCODERS[name], tokens=1024)
    assert found.other_model
    assert "another model" in found.notes[0]
    if how == "untrained":
        assert found.verdict == "none is good"
        assert found.best.fvu > 0.5


@pytest.mark.slow
def test_a_loss_far_from_the_stored_one_is_called_out(dense: Trained, host: Host, tmp_path: Path) -> None:
    root = dense.write(tmp_path, EASY)
    [layer] = check(host, root).layers
    assert layer.loss == pytest.approx(layer.stored_loss, rel=0.5)  # other sentences, a last batch of 256 tokens
    file = root / "transcoder_L2.pt"
    content = torch.load(file, weights_only=True)
    content["training_metadata"]["final_rec_loss"] /= 10
    torch.save(content, file)
    found = check(host, root)
    assert found.other_model
    assert any("final_rec_loss" in note for note in found.notes)


def test_what_cannot_fit_is_refused_at_once(host: Host, odd: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit the model"):
        check(odd.host, TRANSCODERS["demo"])
    small = copy.deepcopy(host.model)
    small.model.layers = small.model.layers[:3]
    small.config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match="layers that the model lacks"):
        check(Host(small, host.tokenizer), TRANSCODERS["demo"])
    with pytest.raises(CheckpointError, match="no transcoder for layer 7"):
        check(host, TRANSCODERS["demo"], layers=[0, 7])
    with pytest.raises(CheckpointError, match="no encoder mine"):
        check(host, TRANSCODERS["demo"], encoder="mine")
    with pytest.raises(CheckpointError, match="no decoder 1"):
        check(host, TRANSCODERS["demo"], decoder=1)
    with pytest.raises(CheckpointError, match="no candidate reads resid_post"):
        check(host, TRANSCODERS["demo"], read=SiteSpec("resid_post"), write=SiteSpec("resid_mid"))
    with pytest.raises(PromptError, match="empty"):
        calibrate(host, recognise(TRANSCODERS["demo"]), Texts("nothing", ()))


def test_candidates_can_be_narrowed(host: Host) -> None:
    found = calibrate(
        host, recognise(TRANSCODERS["demo"]), TEXTS, tokens=256, read=SiteSpec("resid_mid"), layers=[1, 2]
    )
    assert {str(fit.option.read) for fit in found.fits} == {"resid_mid"}
    assert {fit.layer for fit in found.fits} == {1, 2}
    assert any("256 tokens are few" in note for note in found.findings.notes)
    assert not any("fits better" in note for note in found.findings.notes)  # what is stored was not tried


# -- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["demo", "odd"])
def test_a_walk_sees_what_a_pass_sees(which: str, request) -> None:
    host: Host = request.getfixturevalue(which).host
    texts = ["w1 w2 w3 w4", "w5 w6", "w7"] if which == "odd" else ["fact: Dallas is in", "one dog and two"]
    rows = rows_of(host, texts, 1000)
    assert rows.n_tokens == sum(len(host.tokenize(text)) for text in texts)
    [batch] = rows.batches
    whole = [Site(name, n) for n in range(host.n_layers) for name in ("attn_out", "resid_mid", "mlp_in", "mlp_out")]
    whole += [Site(name, n) for n in range(host.n_layers) for name in ("resid_pre", "resid_post")]
    truth = host.capture(batch, whole)[1]
    visited = []
    for layer, streams in streams_by_layer(host, rows, [0, 2, host.n_layers - 1], ahead=1):
        visited.append(layer)
        ends = min(layer + 1, host.n_layers - 1)
        names = ("attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
        inside = {Site(name, n) for name in names for n in range(layer, ends + 1)}
        assert set(streams) == inside | {Site("resid_pre", layer)}
        for site, x in streams.items():
            torch.testing.assert_close(x, truth[site][batch.mask], rtol=1e-5, atol=1e-5)
    assert visited == [0, 2, host.n_layers - 1]


def test_rows_are_cut_and_thinned_out(host: Host) -> None:
    long = [1, 2, 3] * 100
    rows = rows_of(host, [long, [4, 5]], 301)
    assert sorted(length for batch in rows.batches for length in batch.lengths) == [1, 44, 128, 128]
    assert rows.row.tolist() == sorted(rows.row.tolist())
    assert len(rows.row) == rows.n_tokens == 301
    assert 0 < rows.head(100).n_tokens < 200
    assert rows.head(10**6).n_tokens == 301


def test_fvus_are_those_of_the_formula(odd: HookedModel) -> None:
    """Dense and in fp64: all tokens, without sinks, in norm space."""
    rows = rows_of(odd.host, ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w9 w11 w12 w13"], 100)
    coder, [(_, streams)] = odd.store[1], streams_by_layer(odd.host, rows, [1], ahead=1)
    sinks = torch.zeros(rows.n_tokens, dtype=torch.bool)
    sinks[3] = True
    wanted = tuple(options(("trained",), 1))
    found = {fit.option: fit for fit in fits({"trained": [coder]}, streams, 1, sinks, wanted)}
    for option, fit in found.items():
        x = streams[option.read.at(1)].double()
        normed = nn.functional.layer_norm(x, x.shape[-1:], coder.norm_weight.double(), coder.norm_bias.double(), 1e-5)
        acts = keep_top(normed @ coder.W_enc.T.double() + coder.b_enc, coder.k)
        guess = acts @ coder.W_dec.double() + coder.b_dec
        pre, post = (streams[Site(name, 1)].double() for name in ("resid_pre", "resid_post"))
        aim = post - pre if option.write is None else streams[option.write.at(1)].double()
        assert fit.fvu == pytest.approx(fvu(aim, guess), rel=1e-4)
        assert fit.calm == pytest.approx(fvu(aim[~sinks], guess[~sinks]), rel=1e-4)
        unit, unit_guess = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (aim, guess))
        assert fit.normed == pytest.approx(fvu(unit, unit_guess), rel=1e-4)
        assert fit.loss == pytest.approx(float((aim - guess)[~sinks].square().mean()), rel=1e-4)
        assert fit.l0 == pytest.approx(float((acts > 0).sum(-1).double().mean()))
    reads = {option.read.name for option in found}
    assert reads == {"resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"}
    assert SiteSpec("mlp_out", 1) in {option.write for option in found}


def fvu(x: Tensor, guess: Tensor) -> float:
    return float((x - guess).square().sum() / (x - x.mean(0)).square().sum())


def test_sinks_are_told_by_the_length_of_their_stream(sink: HookedModel) -> None:
    rows = rows_of(sink.host, ["w2 w1 w3 w4 w5 w6 w7", "w8 w9 w10 w1"], 100)
    [(_, streams)] = streams_by_layer(sink.host, rows, [0], ahead=1)
    ids = torch.cat([row[:n] for batch in rows.batches for row, n in zip(batch.ids, batch.lengths, strict=True)])
    assert torch.equal(sink_mask(streams), ids == sink.host.tokenize("w1")[0])


def test_options_write_at_or_behind_what_they_read() -> None:
    every = list(options(("trained", "card"), 2))
    assert len(set(every)) == len(every)
    for option in every:
        if option.write:
            assert option.write.at(0).depth >= option.read.at(0).depth
            assert option.write.offset <= option.decoder + 1
    assert {option.write.offset for option in every if option.write and option.decoder == 1} == {0, 1, 2}


@pytest.mark.parametrize(("tokens", "features"), [(400, 30), (100, 200)], ids=["primal", "dual"])
def test_an_avoidable_error_is_what_a_refit_takes_off(tokens: int, features: int) -> None:
    torch.manual_seed(0)
    acts = torch.randn(tokens, 5) @ torch.randn(5, features)  # five directions: either half of the rows shows them all
    row, noise = torch.arange(tokens) // 2, torch.randn(tokens, 8)
    linear = acts @ torch.randn(features, 8) / features
    spread = float(linear.square().sum())
    gone = avoidable_by_row(acts, linear, row, tokens // 2, spread)
    assert float(gone.sum()) == pytest.approx(1.0, abs=0.05)  # the ridge keeps a little
    assert len(gone) == tokens // 2
    kept = avoidable_by_row(acts, noise, row, tokens // 2, float(noise.square().sum()))
    assert abs(float(kept.sum())) < 0.1  # noise is independent of any feature
    assert separation(kept, kept) == 0.0
    assert separation(torch.zeros(100), torch.randn(100).abs()) > 5


@pytest.mark.parametrize(
    ("described", "stated", "by_relu", "named"),
    [
        ("topk", 12.0, 0.45, ("topk", 1474, "metadata")),  # ReLU would make far more active
        ("topk", 12.0, 0.14, (None, None, "undetermined")),  # either rule fits what is stated
        ("relu", 5.0, 0.06, ("relu", None, "metadata")),
        ("relu", 5.0, 0.45, ("topk", None, "metadata")),  # k only to the rounding of what is stated
        ("relu", 5.0, 0.15, (None, None, "undetermined")),
        ("topk", None, 0.45, (None, None, "undetermined")),
        ("topk", 9.7, 0.45, ("topk", 1474, "metadata")),  # ReLU behind TopK cut some off
        ("topk", 2.6, 0.45, ("topk", None, "metadata")),  # far fewer than 12 %: another k
        ("topk", 2.6, 0.03, (None, None, "undetermined")),
    ],
)
def test_what_a_stated_l0_says(described: str, stated: float | None, by_relu: float, named: tuple) -> None:
    k = 1474 if described == "topk" else None
    origin = "assumed" if stated is None else "metadata"
    metadata = {} if stated is None else {"final_l0_pct": stated}
    source = LayerSource(0, 64, 12288, {}, k, origin, metadata, activation=described)
    checkpoint = Checkpoint(Path("set"), "published", (source,), None, None)
    curves = [(12288, [(1474, 0.1, 1474.0), (None, 0.05, by_relu * 12288)])]
    found = selection(checkpoint, SelectionRule(), curves, good=True)
    assert (found.activation, found.k, found.source) == named
    assert [(point.k, point.fvu) for point in found.curve] == [(1474, 0.1), (None, 0.05)]
    assert selection(checkpoint, SelectionRule(), curves, good=False).activation is None
    stored = Checkpoint(Path("set"), "native", (replace(source, k_source="stored"),), None, None)
    known = selection(stored, SelectionRule(), curves, good=False)
    assert (known.activation, known.k, known.source) == (described, k, "stored")


def test_texts_are_paragraphs_or_lines() -> None:
    assert paragraphs("one\ntwo\n\nthree\n") == ("one two", "three")
    assert paragraphs("one\ntwo\n") == ("one", "two")
    assert paragraphs(" \n\n") == ()
    built_in = Texts.built_in(demo=False)
    assert sum(len(text.split()) for text in built_in.texts) > 3500
    assert not set(TEXTS.texts[:50]) <= {sentence.text for sentence in training_sentences(0, 50)}


def test_a_fingerprint_is_the_models_own(host: Host) -> None:
    assert fingerprint(host.tails()) == fingerprint(Host(copy.deepcopy(host.model).bfloat16(), host.tokenizer).tails())
    assert fingerprint(host.tails()) != fingerprint(other_model(host, "perturbed").tails())
