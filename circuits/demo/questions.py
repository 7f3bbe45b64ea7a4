"""Questions for the demo model: city, wording, the answer's token, and the city's position."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.demo import WEIGHTS
from hooks.demo.world import (
    CITIES,
    STATE_OF_CITY,
    STATES,
    TEST_TEMPLATE,
    TWO_HOP_TEMPLATES,
    held_out_cities,
    selection_templates,
    trained_cities,
)
from hooks.model import HookedModel

STATE_NAMES = tuple(STATES)
POSITIONS = ("city", "final")


@dataclass(frozen=True)
class Questions:
    """Capital questions for some cities, in some wordings, in one order.

    Attributes:
        prompts: the texts.
        states: index of each prompt's state in `STATE_NAMES`.
        positions: "city" → position of the city's last token; "final" → of the prompt's last token.
    """

    prompts: tuple[str, ...]
    states: Int[Tensor, " prompt"]
    positions: dict[str, Int[Tensor, " prompt"]]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Exam:
    """The demo model with the split it was trained on."""

    model: HookedModel
    seed: int

    @classmethod
    def of(cls, model: HookedModel, weights: Path = WEIGHTS) -> "Exam":
        """Read the split's seed from `world.json` beside the weights."""
        return cls(model, int(json.loads((weights / "world.json").read_text(encoding="utf-8"))["seed"]))

    @property
    def trained(self) -> tuple[str, ...]:
        """Cities whose capital question was trained."""
        return trained_cities(self.seed)

    @property
    def held_out(self) -> tuple[str, ...]:
        """One city per state, in the order of `STATE_NAMES`, whose capital question never was."""
        held = held_out_cities(self.seed)
        return tuple(held[state] for state in STATE_NAMES)

    @property
    def answers(self) -> Int[Tensor, " state"]:
        """The first token of each state's capital."""
        tokenize = self.model.host.tokenize
        return torch.tensor([tokenize(STATES[state].capital)[0] for state in STATE_NAMES])

    def ask(self, cities: tuple[str, ...], templates: tuple[str, ...]) -> Questions:
        """Every city in every wording, wording by wording."""
        tokenize = self.model.host.tokenize
        prompts, at_city, at_end = [], [], []
        for template in templates:
            before = template.split("{c}")[0]
            for city in cities:
                prompts.append(template.format(c=city))
                at_city.append(len(tokenize(before + city)) - 1)
                at_end.append(len(tokenize(prompts[-1])) - 1)
        states = [STATE_NAMES.index(STATE_OF_CITY[city]) for city in cities] * len(templates)
        positions = {"city": torch.tensor(at_city), "final": torch.tensor(at_end)}
        return Questions(tuple(prompts), torch.tensor(states), positions)

    def selection_questions(self) -> Questions:
        """The questions on which features are chosen: trained cities, every wording but the test one."""
        return self.ask(self.trained, selection_templates())

    def test_questions(self) -> Questions:
        """The questions on which they are tested: held-out cities, a wording that `capital` was never trained with."""
        return self.ask(self.held_out, (TEST_TEMPLATE,))

    def all_questions(self) -> Questions:
        """Every city, every wording."""
        return self.ask(CITIES, TWO_HOP_TEMPLATES["capital"])

    def correct(
        self, logits: Float[Tensor, "prompt vocab"], states: Int[Tensor, " prompt"]
    ) -> Float[Tensor, " prompt"]:
        """1 where the capital of the given state is the most likely next token."""
        return (logits.argmax(-1) == self.answers[states]).float()
