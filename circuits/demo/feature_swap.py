"""The features that represent a state: chosen on one set of questions, tested by intervention on another.

Chosen on trained cities in every wording but the test one: per state the features of one site whose contribution grows
most in that state's questions, (mean activation in the state − mean over all states) · |d|, and their mean activation
there. Tested on held-out cities in the test wording, which the model itself was never trained to answer capitals in:
zero the source state's features, set the target state's features to their means (factor 1, error kept), over all
ordered pairs. The site is the one where the chosen features detect their state best on the first set (average
precision); nothing is tuned on the second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.demo.quality import ordered_pairs
from circuits.demo.questions import POSITIONS, STATE_NAMES, Exam, Questions
from hooks.interventions.ablate import Ablate
from hooks.interventions.clamp import Clamp
from hooks.types import FeatureAddress, Positions

FEATURES_PER_STATE = 4
ROWS = 256


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of the features of one site on the selection questions, by state.

    Attributes:
        precision: average precision of each feature as a detector of each state.
        mean: mean activation of each feature over a state's questions, inactive ones included.
        norms: decoder norms.
    """

    layer: int
    place: str
    precision: Float[Tensor, "state feature"]
    mean: Float[Tensor, "state feature"]
    norms: Float[Tensor, " feature"]

    def best(self, state: int, n: int = FEATURES_PER_STATE) -> list[int]:
        """The n features that represent a state: those whose contribution to the stream grows most in its questions."""
        growth = (self.mean[state] - self.mean.mean(0)) * self.norms
        return growth.sort(descending=True, stable=True).indices[:n].tolist()

    def most_selective(self, state: int, n: int = FEATURES_PER_STATE) -> list[int]:
        """The n features that detect a state best, by average precision."""
        return self.precision[state].sort(descending=True, stable=True).indices[:n].tolist()

    @property
    def quality(self) -> float:
        """Mean, over all states, of the best precision among the chosen features."""
        chosen = [self.precision[state][self.best(state)].max() for state in range(len(self.precision))]
        return float(torch.stack(chosen).mean())


@dataclass(frozen=True)
class SwapResult:
    """Share of all ordered pairs whose most likely token became the other state's capital.

    Attributes:
        success: with the target state's features.
        third_state: with a third state's features instead (matched in number; decoder norms are equal per site).
        third_lands: how often the answer then was the *third* capital: the edit works, and the features decide which
            capital it gives.
        random: random active features zeroed, random features set with the same total decoder norm.
    """

    success: float
    third_state: float
    third_lands: float
    random: float
    pairs: int


@dataclass(frozen=True)
class AblationResult:
    """Mean change of logits when a state's features are zeroed: its own capital, and the other capitals."""

    answer: float
    others: float


def select(exam: Exam) -> dict[tuple[int, str], SiteStatistics]:
    """Average precision and mean activation of every feature at every site, city token and last token."""
    questions = exam.selection_questions()
    acts = _activations(exam, questions)
    states = torch.nn.functional.one_hot(questions.states, len(STATE_NAMES)).bool()
    out = {}
    for (layer, place), values in acts.items():
        counts = states.to(values.dtype)
        mean = (counts.T @ values) / reduce(counts, "prompt state -> state 1", "sum")
        norms = exam.model.store[layer].W_dec.norm(dim=-1)
        out[layer, place] = SiteStatistics(layer, place, average_precision(values, states), mean, norms)
    return out


def every_site(selections: Mapping[tuple[int, str], SiteStatistics]) -> list[SiteStatistics]:
    """All sites but the embedding, city and last token: for the swap with two features at each."""
    return [selection for (layer, _), selection in selections.items() if layer > 0]


def best_site(selections: Mapping[tuple[int, str], SiteStatistics]) -> SiteStatistics:
    """The site where the chosen features detect their state best."""
    return max(selections.values(), key=lambda selection: selection.quality)


def _activations(exam: Exam, questions: Questions) -> dict[tuple[int, str], Float[Tensor, "prompt feature"]]:
    rows: dict[tuple[int, str], list[Tensor]] = {}
    for start in range(0, len(questions), ROWS):
        recording = exam.model.record(list(questions.prompts[start : start + ROWS]))
        for layer, record in recording.layers.items():
            dense = record.acts.dense(exam.model.store.d_features(layer))
            for place in POSITIONS:
                pos = questions.positions[place][start : start + ROWS]
                rows.setdefault((layer, place), []).append(dense[torch.arange(len(pos)), pos])
    return {key: torch.cat(parts) for key, parts in rows.items()}


def average_precision(
    values: Float[Tensor, "prompt feature"], labels: Bool[Tensor, "prompt label"]
) -> Float[Tensor, "label feature"]:
    """Average precision of each feature's activation as a detector of each label.

    A prompt where the feature is inactive is never retrieved, so a label's inactive prompts count as missed.
    """
    order = values.sort(dim=0, descending=True, stable=True).indices
    retrieved = values.gather(0, order) > 0
    rank = rearrange(torch.arange(1, len(values) + 1), "prompt -> prompt 1")
    out = []
    for label in labels.T:
        hit = label[order] & retrieved
        precision = hit.cumsum(0) / rank
        out.append((precision * hit).sum(0) / label.sum())
    return torch.stack(out)


def swap_states(
    exam: Exam, chosen: Sequence[SiteStatistics], n: int = FEATURES_PER_STATE, *, seed: int = 0
) -> SwapResult:
    """Swap every held-out city's state for every other one, with both controls.

    Args:
        chosen: the sites that are edited, all in one run.
        n: features per state and site.
        seed: of the controls.
    """
    source, target = ordered_pairs()
    generator = torch.Generator().manual_seed(seed)
    third = _third_states(source, target, generator)
    test = exam.test_questions()
    active = {key: values > 0 for key, values in _activations(exam, test).items()}
    plans: dict[str, list[list[object]]] = {"success": [], "third_state": [], "random": []}
    for own, wanted, other in zip(source.tolist(), target.tolist(), third.tolist(), strict=True):
        rows: dict[str, list[object]] = {name: [] for name in plans}
        for site in chosen:
            pos = int(test.positions[site.place][own])
            rows["success"] += swap_plan(site, own, wanted, pos, n)
            rows["third_state"] += swap_plan(site, own, other, pos, n)
            rows["random"] += _random_plan(site, active[site.layer, site.place][own], wanted, pos, n, generator)
        for name, row in rows.items():
            plans[name].append(row)
    prompts = [test.prompts[own] for own in source.tolist()]
    logits = {name: exam.model.run_many(prompts, plan) for name, plan in plans.items()}
    rates = {name: float(exam.correct(rows, target).mean()) for name, rows in logits.items()}
    lands = float(exam.correct(logits["third_state"], third).mean())
    return SwapResult(**rates, third_lands=lands, pairs=len(source))


def swap_plan(selection: SiteStatistics, own: int, wanted: int, pos: int, n: int = FEATURES_PER_STATE) -> list[object]:
    """Zero one state's features, set another's to their means; a feature of both is set."""
    setting = selection.best(wanted, n)
    zero = [feature for feature in selection.best(own, n) if feature not in setting]
    values = selection.mean[wanted]
    return [
        *(Ablate(_address(selection, feature, pos)) for feature in zero),
        *(Clamp(_address(selection, feature, pos), float(values[feature])) for feature in setting),
    ]


def state_addresses(
    selection: SiteStatistics, state: int, pos: int, n: int = FEATURES_PER_STATE
) -> list[FeatureAddress]:
    """The features that represent a state, at one position."""
    return [_address(selection, feature, pos) for feature in selection.best(state, n)]


def ablate_states(
    exam: Exam, chosen: Sequence[SiteStatistics], n: int = FEATURES_PER_STATE, *, shift: int = 0
) -> AblationResult:
    """Zero each held-out city's state features; its answer against the 49 other capitals.

    Args:
        shift: zero the features of the state that many places further in the alphabet instead, as a control.
    """
    test = exam.test_questions()
    plans = []
    for state in range(len(STATE_NAMES)):
        zeroed = (state + shift) % len(STATE_NAMES)
        places = [(site, int(test.positions[site.place][state])) for site in chosen]
        plans.append([Ablate(a) for site, pos in places for a in state_addresses(site, zeroed, pos, n)])
    change = exam.model.run_many(test.prompts, plans) - exam.model.run_many(test.prompts)
    capitals = change[:, exam.answers]
    own = capitals.diagonal()
    others = (capitals.sum(1) - own) / (len(STATE_NAMES) - 1)
    return AblationResult(float(own.mean()), float(others.mean()))


def _random_plan(
    selection: SiteStatistics,
    active: Bool[Tensor, " feature"],
    wanted: int,
    pos: int,
    n: int,
    generator: torch.Generator,
) -> list[object]:
    """The same number of random features with the same decoder norm: active ones are zeroed, and features that are
    alive at the site are set."""
    candidates = active.nonzero()[:, 0]
    zero = candidates[torch.randperm(len(candidates), generator=generator)[:n]]
    alive = (selection.mean.sum(0) > 0).nonzero()[:, 0]
    alive = alive[~torch.isin(alive, zero)]
    setting = alive[torch.randperm(len(alive), generator=generator)[:n]]
    model_features = selection.best(wanted, n)
    sizes = selection.mean[wanted][model_features] * selection.norms[model_features]
    return [
        *(Ablate(_address(selection, feature, pos)) for feature in zero.tolist()),
        *(
            Clamp(_address(selection, feature, pos), float(size / selection.norms[feature]))
            for feature, size in zip(setting.tolist(), sizes, strict=False)
        ),
    ]


def _third_states(
    source: Int[Tensor, " pair"], target: Int[Tensor, " pair"], generator: torch.Generator
) -> Int[Tensor, " pair"]:
    out = []
    for own, wanted in zip(source.tolist(), target.tolist(), strict=True):
        rest = [state for state in range(len(STATE_NAMES)) if state not in (own, wanted)]
        out.append(rest[int(torch.randint(len(rest), (1,), generator=generator))])
    return torch.tensor(out)


def _address(selection: SiteStatistics, feature: int, pos: int) -> FeatureAddress:
    return FeatureAddress(selection.layer, int(feature), Positions("index", pos))
