"""`circuits check` against sets that were trained here, each under a convention of its own, so that the truth is known."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn
from worlds import random_hooked, random_qwen2, word_tokenizer

from hooks import HookedModel
from hooks.calibrate import calibrate, fingerprint

from hooks.errors import CheckpointError, PromptError
from hooks.demo.world import SentenceSource
from hooks.findings import Findings
from hooks.formats import recognise
from hooks.host import Host
from hooks.refit import avoidable_by_row, separation
from hooks.site_fits import fits, options, rms_normed, sink_mask
from hooks.sites import Site, SiteSpec
from hooks.texts import Texts, paragraphs
from hooks.walk import rows_of, walk

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
def trained(seen: dict[Site, Tensor]) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def make(density: str) -> Trained:
        if density not in made:
            made[density] = train(TRUTHS, seen, *DENSITIES[density])
        return made[density]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_the_convention_is_found(truth: Truth, density: str, trained, host: Host, tmp_path: Path) -> None:
    stack = trained(density)
    found = calibrate(host, recognise(stack.write(tmp_path, truth)), TEXTS, tokens=2048)
    best = found.best
    assert (best.read, best.write, best.encoder) == (truth.read, truth.write, truth.encoder), found.ranking
    assert found.verdict == "clear", found.ranking
    assert found.selection.activation == "topk"
    assert found.selection.k in (stack.k, None)
    assert found.selection.source == "metadata"
    print(truth, density, found.margin, found.ranking[:3], found.notes)
