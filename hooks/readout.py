"""Reading logits: a token's logit, probability and rank, the top tokens, and the default metric.

The default metric everywhere is logit(target) − logit(best other token). The other token is named by the user or is
the best one of the *clean* run; it is then held fixed, so before and after are measured on the same axis.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Standing:
    """How one token stands in one distribution. `rank` 1 is the most likely."""

    logit: float
    prob: float
    rank: int


@dataclass(frozen=True)
class RankedToken:
    """One of the most likely tokens."""

    token: str
    id: int
    logit: float
    prob: float


@dataclass(frozen=True)
class Effect:
    """What a run did to one target.

    Attributes:
        target, against: token ids of the metric logit(target) − logit(against).
        baseline, edited: the target's standing before and after.
        metric_before, metric_after: the metric.
    """

    target: int
    against: int
    baseline: Standing
    edited: Standing
    metric_before: float
    metric_after: float

    @property
    def delta_logit(self) -> float:
        """Change of the target's plain logit."""
        return self.edited.logit - self.baseline.logit

    @property
    def delta_prob(self) -> float:
        """Change of the target's probability."""
        return self.edited.prob - self.baseline.prob

    @property
    def delta_metric(self) -> float:
        """Change of logit(target) − logit(against)."""
        return self.metric_after - self.metric_before


def standing(logits: Float[Tensor, " vocab"], token: int) -> Standing:
    """Logit, probability and rank of one token."""
    wide = logits.double()
    return Standing(float(wide[token]), float(wide.softmax(-1)[token]), int((wide > wide[token]).sum()) + 1)


def best_other(logits: Float[Tensor, " vocab"], target: int) -> int:
    """The most likely token that is not the target."""
    first, second = logits.topk(2).indices.tolist()
    return second if first == target else first


def effect(
    before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], target: int, against: int | None = None
) -> Effect:
    """Compare two distributions at one target."""
    other = best_other(before, target) if against is None else against
    metric = [float(row[target].double() - row[other].double()) for row in (before, after)]
    return Effect(target, other, standing(before, target), standing(after, target), *metric)


@dataclass(frozen=True)
class Rounding:
    """What a model's own rounding does to the logits of one prompt: native minus exact, over the vocabulary.

    Attributes:
        largest, rms: in logits.
        kl: of the exact distribution from the native one, in nats.
        same_answer: whether both have the same most likely token.
    """

    largest: float
    rms: float
    kl: float
    same_answer: bool


def rounding(native: Float[Tensor, " vocab"], exact: Float[Tensor, " vocab"]) -> Rounding:
    """Compare the logits of one prompt in two precisions."""
    served, measured = native.double(), exact.double().to(native.device)
    miss = served - measured
    log_served, log_measured = served.log_softmax(-1), measured.log_softmax(-1)
    kl = float((log_measured.exp() * (log_measured - log_served)).sum())
    same = int(served.argmax()) == int(measured.argmax())
    return Rounding(float(miss.abs().max()), float(miss.square().mean().sqrt()), kl, same)
