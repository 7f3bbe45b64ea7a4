"""Reading logits: a token's logit, probability and rank, the top tokens, and the default metric.

The default metric is logit(target) − logit(other token). The user names the other token; by default it is the best
other token of the *clean* run. It stays the same afterwards, so before and after are values of the same metric.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from hooks.renamed import deprecated


@dataclass(frozen=True)
class Standing:
    """Logit, probability and rank of one token in one distribution. `rank` 1 is the most likely."""

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
        target_text, against_text: the two tokens as text.
    """

    target: int
    against: int
    baseline: Standing
    edited: Standing
    metric_before: float
    metric_after: float
    target_text: str = field(default="", compare=False)
    against_text: str = field(default="", compare=False)

    @property
    def delta_logit(self) -> float:
        """Change of the target's plain logit."""
        return self.edited.logit - self.baseline.logit

    @property
    def delta_prob(self) -> float:
        """Change of the target's probability."""
        return self.edited.prob - self.baseline.prob

    @property
    def delta(self) -> float:
        """Change of the metric, logit(target) − logit(against): negative where what was removed supports the target."""
        return self.metric_after - self.metric_before

    @property
    def delta_metric(self) -> float:
        """The earlier name of `delta`."""
        deprecated("delta_metric", "delta")
        return self.delta

    @property
    def name(self) -> str:
        """The metric in words; a token without text is named by its id."""
        return " − ".join(
            token_name(text, token)
            for text, token in ((self.target_text, self.target), (self.against_text, self.against))
        )

    def __repr__(self) -> str:
        """One line: the metric, then the target's logit, probability and rank, each before and after."""
        a, b = self.baseline, self.edited
        return (
            f"Effect({self.name}: {self.metric_before:.4g} → {self.metric_after:.4g} ({self.delta:+.4g}); logit "
            f"{a.logit:.4g} → {b.logit:.4g}, probability {a.prob:.3g} → {b.prob:.3g}, rank {a.rank} → {b.rank})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the same as a table."""
        rows = (("plain", self.baseline, self.metric_before), ("edited", self.edited, self.metric_after))
        head = "".join(f"<th>{html.escape(word)}</th>" for word in ("", "logit", "probability", "rank", self.name))
        body = "".join(
            f"<tr><th>{word}</th><td>{at.logit:.4g}</td><td>{at.prob:.3g}</td><td>{at.rank}</td><td>{metric:.4g}</td></tr>"
            for word, at, metric in rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


def token_name(text: str, token: int) -> str:
    """A token in words: its text in quotes, and its id where the text alone does not say which token it is."""
    return repr(text) if text and "\ufffd" not in text else f"{text!r} #{token}"


def standing(logits: Float[Tensor, " vocab"], token: int) -> Standing:
    """Logit, probability and rank of one token."""
    wide = logits.double()
    return Standing(float(wide[token]), float(wide.softmax(-1)[token]), int((wide > wide[token]).sum()) + 1)


def best_other(logits: Float[Tensor, " vocab"], target: int) -> int:
    """The most likely token that is not the target."""
    first, second = logits.topk(2).indices.tolist()
    return second if first == target else first


def effect(
    before: Float[Tensor, " vocab"],
    after: Float[Tensor, " vocab"],
    target: int,
    against: int | None = None,
    *,
    string: Callable[[int], str] = lambda token: "",
) -> Effect:
    """Compare two distributions at one target. `string` gives a token's text."""
    other = best_other(before, target) if against is None else against
    first, last = (float(row[target].double() - row[other].double()) for row in (before, after))
    return Effect(
        target, other, standing(before, target), standing(after, target), first, last, string(target), string(other)
    )


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
