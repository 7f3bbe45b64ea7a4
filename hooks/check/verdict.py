"""Fits at many layers → one answer: the candidates in order, and whether the first one may be used."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.check.avoidable import separation
from hooks.check.fits import Fit, Option
from hooks.checkpoints import Candidate, LayerFinding, Verdict
from hooks.formats import Checkpoint

CLOSE = 0.05  # FVU: between candidates closer than this to the best one, the avoidable error decides
GOOD = 0.5  # FVU above which a candidate does not fit. Sets on their own model are far below, on another one near 1
APART = 3.0  # standard errors between two avoidable errors
AGREES = 1.5  # standard errors above which a difference of avoidable errors counts as evidence
_LOSS_RATIO = 3.0  # measured loss / stated loss; a change of text explains smaller ratios
_AVOIDABLE_SHARE = 1 / 3  # of the error; sets on their own model have a tenth or less
_FEW, _TOO_FEW = 1000, 256  # tokens
_MOST_CONTENDERS = 8


@dataclass(frozen=True)
class CandidateRanking:
    """Candidates with their FVU without sinks, as the median over `layers`: the layers that have all candidates.

    Attributes:
        scores: ascending.
        update: the same median with the block's update as the target, for the best encoder and read site. The update is
            no site.
    """

    scores: Mapping[Option, float]
    layers: tuple[int, ...]
    update: float | None

    @property
    def contenders(self) -> list[Option]:
        """The best candidate, and those so close to it that the FVU cannot decide. If none is good, only the best."""
        return self._near[:_MOST_CONTENDERS]

    @property
    def crowded(self) -> bool:
        """Whether more candidates are that close than are compared."""
        return len(self._near) > _MOST_CONTENDERS

    @property
    def _near(self) -> list[Option]:
        best = min(self.scores.values())
        if best >= GOOD:
            return [next(iter(self.scores))]
        return [option for option, score in self.scores.items() if score < best + CLOSE]


def rank(fits: Sequence[Fit]) -> CandidateRanking | None:
    """The candidates of one decoder over the layers; None where nothing could be measured."""
    at: dict[int, dict[Option, float]] = defaultdict(dict)
    for fit in fits:
        if fit.calm is not None:
            at[fit.layer][fit.option] = fit.calm
    if not at:
        return None
    most = max(map(len, at.values()))  # layers near the last block lack the sites of later blocks
    layers = tuple(sorted(layer for layer, found in at.items() if len(found) == most))
    common = set.intersection(*(set(at[layer]) for layer in layers))
    scores = {option: median(at[layer][option] for layer in layers) for option in common}
    order = sorted(scores, key=lambda option: (scores[option], str(option)))
    updates = [scores[option] for option in order if option.write is None]
    sites = {option: scores[option] for option in order if option.write is not None}
    return CandidateRanking(sites, layers, min(updates, default=None)) if sites else None


@dataclass(frozen=True)
class Evidence:
    """Errors of one contender per row of the text, in units of FVU, as the mean over layers. The sum over the rows of
    `error` is its FVU; the sum over the rows of `avoidable` is its avoidable error."""

    error: Float[Tensor, " row"]
    avoidable: Float[Tensor, " row"]

    @classmethod
    def mean(cls, parts: Sequence["Evidence"]) -> "Evidence":
        """The mean over layers."""
        return cls(*(torch.stack([getattr(part, name) for part in parts]).mean(0) for name in ("error", "avoidable")))

    def against(self, other: "Evidence", *, same_target: bool) -> float:
        """How many standard errors this one is better than another.

        The avoidable error is compared first. The error itself is measured more precisely by the same rows. If both
        have the same target, it is used too, unless the avoidable error contradicts it. If they have different
        targets, one may be easier to reconstruct, so the error is used only where the avoidable error agrees with it
        (`AGREES`).
        """
        avoidable = separation(self.avoidable, other.avoidable)
        agrees = avoidable >= (0 if same_target else AGREES)
        return max(avoidable, separation(self.error, other.error)) if agrees else avoidable


@dataclass(frozen=True)
class Decision:
    """The candidates in order, the winner first, and the verdict."""

    best: Option
    verdict: Verdict
    margin: float | None
    candidates: tuple[Candidate, ...]


def decide(ranking: CandidateRanking, evidence: Mapping[Option, Evidence], tokens: int, shown: int = 6) -> Decision:
    """Choose the winner: the contender with the least avoidable error; among equals, the one with the least FVU.

    The verdict is clear if the winner explains more than half of the variance, is `APART` standard errors better than
    all other contenders, no contender was left out, and there were enough tokens.

    Args:
        evidence: of each contender.
        tokens: how many were measured, without sinks.
        shown: how many candidates are listed.
    """
    order = sorted(ranking.contenders, key=lambda option: float(evidence[option].avoidable.sum()))
    best = order[0]
    apart = {
        option: evidence[best].against(evidence[option], same_target=option.write == best.write) for option in order[1:]
    }
    told = all(value >= APART for value in apart.values()) and not ranking.crowded and tokens >= _TOO_FEW
    verdict: Verdict = "clear" if told else "too close"
    if ranking.scores[best] >= GOOD:
        verdict = "none is good"
    others = [option for option in ranking.scores if option != best]
    ordered = [best, *sorted(others, key=lambda option: (option not in apart, ranking.scores[option]))][:shown]
    return Decision(
        best,
        verdict,
        ranking.scores[others[0]] - ranking.scores[best] if others else None,
        tuple(_candidate(option, ranking, evidence.get(option), apart.get(option)) for option in ordered),
    )


def _candidate(option: Option, ranking: CandidateRanking, evidence: Evidence | None, apart: float | None) -> Candidate:
    return Candidate(
        read=str(option.read),
        write=str(option.write),
        encoder=option.encoder,
        decoder=option.decoder,
        fvu=ranking.scores[option],
        avoidable=None if evidence is None else float(evidence.avoidable.sum()),
        separation=apart,
    )


def layer_findings(
    fits: Sequence[Fit], best: Option, checkpoint: Checkpoint, avoidable: Mapping[int, float]
) -> tuple[LayerFinding, ...]:
    """Every layer that has the set's best candidate."""
    stated = {source.layer: source.metadata.get("final_rec_loss") for source in checkpoint.layers}
    out = []
    for fit in sorted((fit for fit in fits if fit.option == best), key=lambda fit: fit.layer):
        rivals = [f for f in fits if f.layer == fit.layer and f.calm is not None and f.option.write is not None]
        own = min(rivals, key=lambda f: (f.calm, str(f.option)), default=fit)
        loss = stated.get(fit.layer)
        out.append(
            LayerFinding(
                layer=fit.layer,
                read=str(best.read),
                write=str(best.write),
                encoder=best.encoder,
                fvu=fit.fvu,
                fvu_without_sinks=fit.calm,
                fvu_normed=fit.normed,
                loss=fit.loss,
                stored_loss=float(loss) if isinstance(loss, int | float) and loss > 0 else None,
                l0=fit.l0,
                avoidable=avoidable.get(fit.layer),
                winner=str(own.option),
                ok=fit.calm is not None and fit.calm < GOOD and fit.calm < (own.calm or 0.0) + CLOSE,
            )
        )
    return tuple(out)


def doubts(decision: Decision, ranking: CandidateRanking, layers: Sequence[LayerFinding]) -> tuple[str, ...]:
    """Signs that the set was trained on another model than this one."""
    out, best = [], decision.candidates[0]
    ratios = [layer.loss / layer.stored_loss for layer in layers if layer.stored_loss]
    shares = [
        layer.avoidable / layer.fvu_without_sinks for layer in layers if layer.avoidable and layer.fvu_without_sinks
    ]
    if decision.verdict == "none is good":
        out.append(
            f"no candidate explains half of the variance (FVU {best.fvu:.2f} at best): these transcoders were probably "
            "trained on another model"
        )
    elif shares and median(shares) > _AVOIDABLE_SHARE:
        out.append(
            f"a refit of the decoder would take off {median(shares):.0%} of the error, so the set was trained on other "
            "activations: of another model (base, instruct, another revision), of very different text, or at a site "
            "that was not tried"
        )
    if ratios and median(ratios) > _LOSS_RATIO:
        out.append(
            f"the loss is {median(ratios):.1f} times the stored final_rec_loss, so the set was trained on other "
            "activations: of another model (base, instruct, another revision) or of very different text"
        )
    return tuple(out)


def remarks(
    decision: Decision, ranking: CandidateRanking, layers: Sequence[LayerFinding], checkpoint: Checkpoint, tokens: int
) -> tuple[str, ...]:
    """Further remarks for the user of the findings."""
    out, best = [], decision.candidates[0]
    good = decision.verdict != "none is good"
    stored = (checkpoint.read or decision.best.read, checkpoint.write or decision.best.write)
    pairs = {(option.read, option.write) for option in ranking.scores}
    if good and stored in pairs and stored != (decision.best.read, decision.best.write):
        out.append(
            f"the files say {stored[0]} -> {stored[1]} ({checkpoint.sites_source}), and {best.read} -> {best.write} "
            "fits better"
        )
    if len(pairs) == 1:
        out.append("no other pair of sites was tried, so nothing says that this is the right one")
    if ranking.crowded:
        out.append(
            f"more than {_MOST_CONTENDERS} candidates are within {CLOSE} FVU of the best, and not all were compared"
        )
    if ranking.update is not None and ranking.update < best.fvu - CLOSE:
        out.append(
            f"the block's update, resid_post - resid_pre, is reconstructed better (FVU {ranking.update:.2f}): the set "
            "seems to write it, and it is no site here"
        )
    weak = [layer.layer for layer in layers if not layer.ok]
    if weak and good:
        out.append(f"it does not fit at layers {', '.join(map(str, weak))}")
    if tokens < _FEW:
        least = f", and no verdict is given on fewer than {_TOO_FEW}" if tokens < _TOO_FEW else ""
        out.append(f"{tokens} tokens are few; 4,000 give steadier figures{least}")
    return tuple(out)
