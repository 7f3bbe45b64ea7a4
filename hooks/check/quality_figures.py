"""How good a set of transcoders is on a model and a text: how well each one reconstructs, and what swapping it costs.

batches of prompts ─1→ each site's mean and its sinks ─2→ reconstructions, features; swapped and mean-ablated passes

All results are sums over tokens in fp64. Their memory does not grow with the text, except for one norm per token and
layer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from hooks.check.quality_report import LayerQuality, Prediction, QualityReport, Replacement
from hooks.check.sums import SiteSums, site_sums
from hooks.checkpoints import TranscoderStore
from hooks.errors import PromptError, UserError
from hooks.host import Batch, Host, Prompt
from hooks.model import HookedModel
from hooks.passes import sink_norm
from hooks.types import Edit, Pass
from hooks.whole import whole, wholes

TOKENS_AT_ONCE = 2048
FEW = 8  # sites that are swapped together, besides one site and all sites
_LOGITS_AT_ONCE = 1 << 26  # 256 MB of fp32
_WIDE_AT_ONCE = 1 << 22  # the same in fp64, where several such tensors exist at a time


def quality(
    model: HookedModel,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: bool = False,
) -> QualityReport:
    """Measure a set on some prompts; each is a separate text.

    Args:
        layers: layers to measure; all that have a transcoder by default.
        tokens_at_once: tokens per batch, padding included; a longer prompt is a batch of its own.

    Memory: per batch, tokens × (4 d_model + a layer's features); per layer, one count per feature and a norm per token
    of the text.

    Raises:
        UserError: no prompt has a second token, a prompt is unusable, or a layer has no transcoder.
    """
    tokens_at_once = whole(tokens_at_once, "tokens_at_once")
    if tokens_at_once < 1:
        raise UserError(f"{tokens_at_once} tokens at once is no batch", expected="1 or more")
    chosen = model.store.layers if layers is None else tuple(sorted(set(wholes(layers, "layers"))))
    for layer in chosen:
        model.store.require(layer)
    batches = _batches(model.host, [prompts] if isinstance(prompts, str) else prompts, tokens_at_once)
    groups = {(layer,) for layer in chosen} | set(_together(chosen).values())
    passes = len(batches) * (2 + 2 * len(groups))
    with tqdm(total=passes, desc="quality", unit="pass", disable=not progress, leave=False, smoothing=0) as bar:
        scales = _survey(model, _ticking(batches, bar), chosen)
        found = reduce(add, (_measure(model, batch, scales, sorted(groups), bar) for batch in batches))
    return _report(model, batches, _together(chosen), found)


def _batches(host: Host, prompts: Sequence[Prompt], tokens_at_once: int) -> list[Batch]:
    """Batches of prompts of similar length, so that there is little padding."""
    rows = sorted((host.tokenize(prompt) for prompt in prompts), key=len)
    if not rows or len(rows[-1]) < 2:
        raise PromptError("there is no next token to predict", expected="prompts of two tokens or more")
    parts: list[list[list[int]]] = [[]]
    for row in rows:
        if parts[-1] and (len(parts[-1]) + 1) * len(row) > tokens_at_once:
            parts.append([])
        parts[-1].append(row)
    return [host.batch(part) for part in parts]


def _together(layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Groups of sites that are replaced together, by name."""
    places = [round(i * (len(layers) - 1) / (FEW - 1)) for i in range(FEW)]
    few = {f"{FEW} evenly spaced": tuple(layers[place] for place in places)} if len(layers) > FEW else {}
    return few | {"all": layers}


def _ticking(batches: Sequence[Batch], bar: Any) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.update()


# -- first pass: mean and sinks of each site ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """A write site's mean over the text, and the norm above which a token is a sink."""

    mean: Float[Tensor, " d_model"]
    sink_norm: float


def _survey(model: HookedModel, batches: Iterable[Batch], layers: tuple[int, ...]) -> dict[int, _Scale]:
    totals: dict[int, Tensor] = {}
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in batches:
        real = batch.mask.flatten()
        model.host.forward_hidden(batch, [_surveying(model.store, layer, real, totals, norms) for layer in layers])
    every = {layer: torch.cat(parts) for layer, parts in norms.items()}
    return {n: _Scale(totals[n] / len(every[n]), sink_norm(every[n])) for n in layers}


def _surveying(
    store: TranscoderStore,
    layer: int,
    real: Bool[Tensor, " token"],
    totals: dict[int, Tensor],
    norms: dict[int, list[Tensor]],
) -> Edit:
    def look(x: Tensor, at: Pass) -> Tensor:
        here = _real_tokens(x, real).double()
        totals[layer] = totals.get(layer, 0) + here.sum(0)
        norms[layer].append(here.norm(dim=-1).cpu())
        return x

    return Edit(store.sites(layer)[1], look)


def _real_tokens(x: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, " token"]) -> Float[Tensor, "kept d_model"]:
    return x.flatten(0, 1)[real.to(x.device)]


# -- second pass: sums per site and per group of replaced sites -----------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """Sums over tokens: cross-entropy, KL, and the number of tokens whose most likely next token is unchanged."""

    ce: float
    kl: float
    same: int

    def __add__(self, other: "_Scores") -> "_Scores":
        return _Scores(self.ce + other.ce, self.kl + other.kl, self.same + other.same)


@dataclass(frozen=True)
class _Found:
    """Sums over some batches. Scores are by the tuple of replaced layers; the empty tuple is the plain model."""

    sites: dict[int, SiteSums]
    swapped: dict[tuple[int, ...], _Scores]
    ablated: dict[tuple[int, ...], _Scores]

    def __add__(self, other: "_Found") -> "_Found":
        def sums(one: dict[Any, Any], two: dict[Any, Any]) -> dict[Any, Any]:
            return {key: one[key] + two[key] for key in one}

        return _Found(
            sums(self.sites, other.sites), sums(self.swapped, other.swapped), sums(self.ablated, other.ablated)
        )


def _measure(
    model: HookedModel, batch: Batch, scales: Mapping[int, _Scale], groups: Sequence[tuple[int, ...]], bar: Any
) -> _Found:
    host, sites, real = model.host, dict[int, SiteSums](), batch.mask.flatten()
    following = torch.cat([batch.ids[:, 1:], batch.ids[:, :1]], dim=1)
    following[torch.arange(len(batch.lengths)), batch.last] = -1  # the last token has no known next token
    following = following.flatten()[real]

    def hidden(edits: Sequence[Edit]) -> Float[Tensor, "token d_model"]:
        out = _real_tokens(host.forward_hidden(batch, edits), real)
        bar.update()
        return out

    clean = hidden([edit for layer, scale in scales.items() for edit in _looking(model, layer, scale, real, sites)])
    found = _Found(sites, {(): _scores(host, clean, clean, following)}, {})
    for group in groups:
        edits = model.edits(batch, [()] * len(batch.lengths), swap=group, error="zero")
        found.swapped[group] = _scores(host, clean, hidden(edits), following)
        held = [_at_mean(model.store, layer, scales[layer]) for layer in group]
        found.ablated[group] = _scores(host, clean, hidden(held), following)
    return found


def _looking(
    model: HookedModel, layer: int, scale: _Scale, real: Bool[Tensor, " token"], found: dict[int, SiteSums]
) -> list[Edit]:
    """Edits that change nothing: they encode the layer and add up its sums when the pass reaches its write site."""
    eps = float(getattr(model.host.model.config, "rms_norm_eps", 1e-6))

    def read(x: Tensor, at: Pass) -> Tensor:
        at.memo["read", layer] = _real_tokens(x, real)
        return x

    def write(x: Tensor, at: Pass) -> Tensor:
        given, target = at.memo.pop(("read", layer)), _real_tokens(x, real)
        found[layer] = site_sums(model.store[layer], given, target, scale.mean, scale.sink_norm, eps)
        return x

    read_site, write_site = model.store.sites(layer)
    return [Edit(read_site, read), Edit(write_site, write)]


def _at_mean(store: TranscoderStore, layer: int, scale: _Scale) -> Edit:
    return Edit(store.sites(layer)[1], lambda x, at: scale.mean.to(x).expand_as(x))


def _scores(
    host: Host,
    clean: Float[Tensor, "token d_model"],
    other: Float[Tensor, "token d_model"],
    following: Int[Tensor, " token"],
) -> _Scores:
    """Sums over tokens, from the streams after the final norm; logits are computed for a few tokens at a time."""
    total = _Scores(0.0, 0.0, 0)
    rows, wide = (max(1, size // host.d_vocab) for size in (_LOGITS_AT_ONCE, _WIDE_AT_ONCE))
    for parts in zip(clean.split(rows), other.split(rows), following.split(rows), strict=True):
        before, after = (host.unembed(part) for part in parts[:2])
        for logits in zip(before.split(wide), after.split(wide), parts[2].split(wide), strict=True):
            total += _compared(*logits)
    return total


def _compared(
    before: Float[Tensor, "token vocab"], after: Float[Tensor, "token vocab"], following: Int[Tensor, " token"]
) -> _Scores:
    clean, other = (logits.double().log_softmax(-1) for logits in (before, after))
    known = (following >= 0).nonzero()[:, 0].to(other.device)
    ce = -other[known, following.to(other.device)[known]].sum()
    kl = (clean.exp() * (clean - other)).sum()
    return _Scores(float(ce), float(kl), int((before.argmax(-1) == after.argmax(-1)).sum()))


# -- the report -------------------------------------------------------------------------------------------------------


def _report(
    model: HookedModel, batches: Sequence[Batch], together: Mapping[str, tuple[int, ...]], found: _Found
) -> QualityReport:
    tokens = sum(sum(batch.lengths) for batch in batches)
    predicted = tokens - sum(len(batch.lengths) for batch in batches)
    clean_ce, layers = found.swapped[()].ce / predicted, sorted(found.sites)

    def prediction(scores: _Scores) -> Prediction:
        return Prediction(scores.ce / predicted, scores.kl / tokens, scores.same / tokens)

    def replacement(group: tuple[int, ...]) -> Replacement:
        return Replacement(group, prediction(found.swapped[group]), prediction(found.ablated[group]), clean_ce)

    return QualityReport(
        model=model.name,
        transcoders=model.store.name,
        tokens=tokens,
        predicted=predicted,
        clean_ce=clean_ce,
        layers=tuple(_layer_quality(model.store, layer, found.sites[layer]) for layer in layers),
        one={layer: replacement((layer,)) for layer in layers},
        together={name: replacement(group) for name, group in together.items()},
    )


def _layer_quality(store: TranscoderStore, layer: int, sums: SiteSums) -> LayerQuality:
    tokens, width = sums.all.count, len(sums.all.total)
    stored = store.metadata(layer).get("final_rec_loss")
    return LayerQuality(
        layer=layer,
        fvu=sums.all.fvu,
        fvu_calm=sums.calm.fvu,
        fvu_normed=sums.normed.fvu,
        cosine=sums.cosine / tokens,
        norm_ratio=sums.ratio / sums.sized if sums.sized else None,
        l0=int(sums.fired.sum()) / tokens,
        dead=int((sums.fired == 0).sum()),
        always_on=int((sums.fired == tokens).sum()),
        features=len(sums.fired),
        loss=sums.all.error / (tokens * width),
        stored_loss=float(stored) if isinstance(stored, int | float) and math.isfinite(stored) else None,
        sinks=tokens - sums.calm.count,
    )
