"""The whole story on the embedded model, step by step: question, features, ablation, swap, circuit, and its check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from circuits.demo.feature_swap import (
    FEATURES_PER_STATE,
    AblationResult,
    SiteStatistics,
    SwapResult,
    ablate_states,
    best_site,
    select,
    state_addresses,
    swap_plan,
    swap_states,
)
from circuits.demo.quality import TwoHop, reconstruction_quality, two_hop_accuracy
from circuits.demo.questions import STATE_NAMES, Exam
from circuits.export import export
from circuits.graph import FEATURE, Graph
from circuits.tracing import trace
from hooks.demo.world import HEADLINE_CITY, HEADLINE_PROMPT, OTHER_PROMPT, STATE_OF_CITY, STATES
from hooks.interventions.ablate import Ablate
from hooks.passes import SiteQuality
from hooks.readout import Effect, RankedToken

LABEL_PRECISION = 0.8
PICTURES = {"circuit.png": "png", "circuit.svg": "svg", "circuit.graphml": "graphml", "circuit.json": "json"}


@dataclass(frozen=True)
class Carrier:
    """One of the state's features at the chosen site, on the headline prompt."""

    address: str
    precision: float
    activation: float


@dataclass(frozen=True)
class Story:
    """Everything the demo shows, as figures."""

    prompt: str
    tokens: tuple[str, ...]
    top: tuple[RankedToken, ...]
    two_hop: TwoHop
    site: tuple[int, str]
    carriers: tuple[Carrier, ...]
    ablation_here: Effect
    top_ablated: tuple[RankedToken, ...]
    ablation: AblationResult
    moved: tuple[tuple[str, str, bool], ...]
    swap: SwapResult
    quality: tuple[SiteQuality, ...]
    swapped_accuracy: TwoHop
    graph: Graph
    files: tuple[Path, ...]

    @property
    def moved_share(self) -> float:
        """For the headline city: the share of the 49 other capitals to which its answer can be changed."""
        return sum(right for _, _, right in self.moved) / len(self.moved)


def tell(exam: Exam, out: Path, step: Callable[[str], None]) -> Story:
    """Measure the whole story and write the circuit's files.

    Args:
        out: the folder for the circuit in every format.
        step: called once per step with a text about it.
    """
    model, prompt = exam.model, HEADLINE_PROMPT
    step("two-hop questions")
    accuracy = two_hop_accuracy(exam)
    step("which features carry which state (on trained cities, other wordings)")
    selections = select(exam)
    chosen = best_site(selections)
    own = STATE_NAMES.index(STATE_OF_CITY[HEADLINE_CITY])
    pos = int(exam.test_questions().positions[chosen.place][own])
    addresses = state_addresses(chosen, own, pos)
    step("zeroing them")
    run = model.run(prompt, [Ablate(address) for address in addresses])
    ablation = ablate_states(exam, [chosen])
    step("swapping states, all ordered pairs, with controls")
    swap = swap_states(exam, [chosen])
    moved = _move_everywhere(exam, chosen, own, pos)
    step("quality of the transcoders")
    quality = reconstruction_quality(exam)
    swapped = two_hop_accuracy(exam, swap=model.store.layers[1:], error="zero")
    step("tracing and verifying the circuit")
    graph = trace(model, prompt, STATES[STATE_NAMES[own]].capital, counterfactual=OTHER_PROMPT)
    graph = label_states(graph, selections, exam)
    files = tuple(_write(graph, out / name, kind) for name, kind in PICTURES.items())
    return Story(
        prompt=prompt,
        tokens=run.batch.strings[0],
        top=tuple(run.top_before(5)),
        two_hop=accuracy,
        site=(chosen.layer, chosen.place),
        carriers=_carriers(exam, chosen, own, pos),
        ablation_here=run.effect(int(exam.answers[own])),
        top_ablated=tuple(run.top_after(5)),
        ablation=ablation,
        moved=moved,
        swap=swap,
        quality=quality,
        swapped_accuracy=swapped,
        graph=graph,
        files=files,
    )


def _write(graph: Graph, path: Path, kind: str) -> Path:
    export(graph, path, kind)
    return path


def _carriers(exam: Exam, chosen: SiteStatistics, own: int, pos: int) -> tuple[Carrier, ...]:
    acts = exam.model.record(HEADLINE_PROMPT, [chosen.layer]).layers[chosen.layer].acts
    dense = acts.dense(exam.model.store.d_features(chosen.layer))[0, pos]
    return tuple(
        Carrier(str(address), float(chosen.precision[own, address.feature]), float(dense[address.feature]))
        for address in state_addresses(chosen, own, pos)
    )


def _move_everywhere(exam: Exam, chosen: SiteStatistics, own: int, pos: int) -> tuple[tuple[str, str, bool], ...]:
    """For every other state: the answer once the headline city's state features are replaced by that state's."""
    others = [state for state in range(len(STATE_NAMES)) if state != own]
    plans = [swap_plan(chosen, own, state, pos) for state in others]
    logits = exam.model.run_many([HEADLINE_PROMPT] * len(others), plans)
    right = exam.correct(logits, torch.tensor(others)).bool().tolist()
    answers = [exam.model.host.string(token) for token in logits.argmax(-1).tolist()]
    return tuple((STATE_NAMES[state], answer, hit) for state, answer, hit in zip(others, answers, right, strict=True))


def label_states(graph: Graph, selections: Mapping[tuple[int, str], SiteStatistics], exam: Exam) -> Graph:
    """Name features that detect one state on the selection questions (average precision at least 0.8)."""
    last = len(graph.meta["tokens"]) - 1
    labels = {}
    for row in graph.index.rows(FEATURE):
        layer, pos, feature = (int(c[row]) for c in (graph.index.layer, graph.index.pos, graph.index.feature))
        selection = selections[layer, "final" if pos == last else "city"]
        precision, state = selection.precision[:, feature].max(0)
        if float(precision) >= LABEL_PRECISION:
            labels[graph.names[row]] = STATE_NAMES[int(state)]
    return graph.with_meta(labels=labels)


def state_layer_note(story: Story) -> str:
    """The site of the chosen features, in words."""
    layer, place = story.site
    where = "the last token" if place == "final" else "the city's last token"
    return f"layer {layer}, {where}: the {FEATURES_PER_STATE} features that grow most in each state's questions"
