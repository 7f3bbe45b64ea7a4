"""How a set selects features: from its files, from its L0, and the FVU for several k.

The FVU does not decide k: at a high density it still falls beyond the k of training. But the number of active features
can be compared with the files: if the metadata state an L0, and plain ReLU makes several times as many features active,
the set was not trained with plain ReLU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.check.avoidable import avoidable_by_row
from hooks.check.fits import SiteTarget
from hooks.checkpoints import CurvePoint, Selection
from hooks.formats import Checkpoint, LayerSource
from hooks.transcoder import Transcoder

_SHARES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.25)  # shares of the dictionary that are tried if the files state no k
_DENSEST = 0.25  # the share at which the search starts if ReLU fits best so far
_MULTIPLES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # of k, in the curve
_UNSAID = "the files do not say it; measured with the rule under which the decoder leaves least to improve"
_ALIKE, _UNLIKE = 2.0, 4.0  # a measured L0 within, and beyond, this factor of the stated one


@dataclass(frozen=True)
class SelectionRule:
    """A way to select features: as described, TopK of a share of the dictionary, or plain ReLU."""

    kind: str = "described"
    share: float | None = None

    def apply(self, source: LayerSource) -> LayerSource:
        """A layer with this rule."""
        if self.kind == "described":
            return source
        if self.kind == "relu":
            return replace(source, activation="relu", k=None)
        assert self.share is not None
        return replace(source, activation="topk", k=_k(self.share, source.d_features))

    def on(self, transcoder: Transcoder) -> Transcoder:
        """A transcoder as its files describe it, with this rule."""
        if self.kind == "described":
            return transcoder
        return replace(transcoder, k=None if self.share is None else _k(self.share, transcoder.d_features))

    def words(self, source: LayerSource) -> str:
        """The rule in words, for one layer."""
        own = self.apply(source)
        size = own.k or own.groups
        return own.activation if size is None else f"{own.activation}, {size}"


def rules(checkpoint: Checkpoint) -> list[SelectionRule]:
    """The rules that the files leave possible. The sites are measured with the one that fits best."""
    source = checkpoint.layers[0]
    if source.activation in ("jumprelu", "groupmax") or source.k_source not in ("metadata", "assumed", "unknown"):
        return [SelectionRule()]
    if source.k_source == "metadata":
        stated = stated_share(checkpoint)
        if stated and _far_below(source, stated):  # TopK of fewer features, or of none
            return [SelectionRule(), SelectionRule("topk", stated), SelectionRule("relu")]
        return [SelectionRule(), *([SelectionRule("topk", stated)] if stated and source.activation == "relu" else [])]
    return [*(SelectionRule("topk", share) for share in _SHARES), SelectionRule("relu")]


def _far_below(source: LayerSource, stated: float) -> bool:
    """Whether the stated L0 is far below k. The ReLU after TopK hardly removes so many features."""
    return source.k is not None and stated * source.d_features * _ALIKE < source.k


def finer(rule: SelectionRule) -> list[SelectionRule]:
    """Rules with shares around this rule's own, in steps of a fifth, and ReLU."""
    share = _DENSEST if rule.share is None else rule.share
    steps = [share * 1.2**step for step in range(-5, 6)]
    return [*(SelectionRule("topk", step) for step in steps if step < 1), SelectionRule("relu")]


def stated_share(checkpoint: Checkpoint) -> float | None:
    """The share of active features in the training metadata, `final_l0_pct`, over the layers."""
    stated = [source.metadata.get("final_l0_pct") for source in checkpoint.layers]
    numbers = [float(pct) for pct in stated if isinstance(pct, int | float) and not isinstance(pct, bool)]
    return mean(numbers) / 100 if numbers else None


def _k(share: float, d_features: int) -> int:
    return min(d_features, max(1, int(share * d_features + 1e-6)))


Curve = list[tuple[int | None, float, float]]
"""k (None: ReLU), FVU, L0."""


def curve_at(
    transcoder: Transcoder, x: Float[Tensor, "token d_model"], aim: SiteTarget, sinks: Bool[Tensor, " token"]
) -> Curve:
    """The FVU without sinks for several k around the transcoder's own, and for ReLU; empty for other gates."""
    if transcoder.activation not in ("topk", "relu"):
        return []
    size = transcoder.d_features
    base = transcoder.k or max(1, size // 8)
    ks = sorted({min(size, max(1, round(base * multiple))) for multiple in _MULTIPLES})
    pre, out = transcoder.preactivations(x), Curve()
    calm, spread = ~sinks.to(pre.device), float(aim.spread[1])
    for k in (*ks, None):
        own = replace(transcoder, k=k)
        acts = own.select(pre)
        error = (aim.x.to(pre) - own.reconstruct(acts, x))[calm]
        fvu = float(error.square().sum(dtype=torch.float64)) / spread if spread > 0 else float("nan")
        out.append((k, fvu, float((acts.values > 0).sum(-1).float().mean())))
    return out


def fit_by_rule(
    transcoder: Transcoder,
    x: Float[Tensor, "token d_model"],
    aim: SiteTarget,
    sinks: Bool[Tensor, " token"],
    row: Int[Tensor, " token"],
    tried: Sequence[SelectionRule],
) -> list[tuple[float, float]]:
    """FVU without sinks and avoidable error under several rules.

    A trained decoder is the best one for the features it was trained with; with the features of another rule it could
    be improved. So the sites are measured with the rule under which the decoder can be improved least. That rule is
    not a finding.
    """
    pre, out = transcoder.preactivations(x), []
    calm, spread, rows = ~sinks.to(pre.device), float(aim.spread[1]), int(row.max()) + 1
    for rule in tried:
        own = rule.on(transcoder)
        acts = own.select(pre)
        error = (aim.x.to(pre) - own.reconstruct(acts, x))[calm]
        features = acts.dense(own.d_features)[calm]
        gone = avoidable_by_row(features, error, row[~sinks], rows, spread)
        out.append((float(error.square().sum(dtype=torch.float64)) / spread, float(gone.sum())))
    return out


def selection(
    checkpoint: Checkpoint, rule: SelectionRule, curves: Sequence[tuple[int, Curve]], good: bool
) -> Selection:
    """The finding about the selection rule.

    Args:
        rule: the rule with which the sites were measured.
        curves: per layer, the size of its dictionary and its curve at the set's best candidate.
        good: whether that candidate fits; if not, an L0 measured there means nothing.
    """
    source, stated = checkpoint.layers[0], stated_share(checkpoint)
    by_relu = [l0 / size for size, curve in curves for k, _, l0 in curve if k is None]
    undetermined = Selection(
        activation=None,
        k=None,
        source="undetermined",
        measured_with=rule.words(source),
        reason="no candidate fits, so nothing measured says it" if stated else _UNSAID,
        curve=_medians(curves),
    )
    if source.k_source not in ("metadata", "assumed", "unknown"):
        origin, reason = ("given", "given with --k") if source.k_source == "given" else ("stored", "the files say it")
        known = {"activation": source.activation, "k": source.k or source.groups, "source": origin, "reason": reason}
        return undetermined.model_copy(update=known)
    if not stated or not by_relu or not good:
        return undetermined
    return undetermined.model_copy(update=_by_l0(source, stated, median(by_relu)))


def _by_l0(source: LayerSource, stated: float, by_relu: float) -> dict[str, object]:
    """The conclusion from comparing the stated L0 with the L0 of plain ReLU."""
    said = f"the metadata state an L0 of {stated:.1%}; plain ReLU makes {by_relu:.1%} active"
    factor = by_relu / stated
    if source.activation == "topk" and factor >= _ALIKE and not _far_below(source, stated):
        return {"activation": "topk", "k": source.k, "source": "metadata", "reason": said}
    if source.activation == "relu" and 1 / _ALIKE < factor < _ALIKE:
        return {"activation": "relu", "source": "metadata", "reason": said}
    if (source.activation == "relu" or _far_below(source, stated)) and factor > _UNLIKE:
        about = f"{said}, so it was TopK of about {round(stated * source.d_features)}"
        return {"activation": "topk", "source": "metadata", "reason": about}
    return {"reason": f"{said}: either is possible"}


def _medians(curves: Sequence[tuple[int, Curve]]) -> tuple[CurvePoint, ...]:
    """The median over layers of each point. Every layer's curve has the same multiples of k."""
    whole = [curve for _, curve in curves if curve and len(curve) == len(curves[0][1])]
    return tuple(
        CurvePoint(k=parts[0][0], fvu=median(part[1] for part in parts), l0=mean(part[2] for part in parts))
        for parts in zip(*whole, strict=True)
    )
