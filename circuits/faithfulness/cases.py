"""Prompt pairs, recorded and prepared for cuts: the active features, and the value that each is ablated to.

pairs → recordings at the chosen layers → metric, ablation values, universe of features
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.targets import Target, TargetLike, resolve_targets
from hooks.errors import AddressError, PromptError, TargetError, UserError
from hooks.host import Prompt
from hooks.model import HookedModel
from hooks.passes import Recording, check_same_length
from hooks.whole import whole, wholes

Ablation = Literal["zero", "mean", "resample", "counterfactual"]
"""The value to which a feature outside the circuit is set.

`zero`; `mean`: its mean over all tokens of a list of prompts, the same at every position; `resample`: its value at the
same position of another prompt of the list, drawn at random; `counterfactual`: its value at the same position of the
pair's other prompt.
"""

Ranking = Mapping[int, Float[Tensor, "pos feature"]]
"""A number for every feature of a prompt, per layer."""

ROWS = 64  # prompts per pass


@dataclass(frozen=True)
class Pair:
    """A prompt, and the prompt it is compared with.

    Attributes:
        target: the metric m, a difference of logits as in `trace`. None is logit(answer) − logit(the counterfactual's
            answer), or − logit(best other token) if both answers are the same; of the plain model at the last token.
    """

    prompt: Prompt
    counterfactual: Prompt | None = None
    target: TargetLike | None = None


@dataclass(frozen=True)
class Case:
    """A pair, recorded and prepared for cuts.

    Attributes:
        clean: the prompt's recording, one row, at the layers that are cut.
        counterfactual: the other prompt's recording.
        towards: the recording whose activations are the ablation values, if they come from one prompt.
        ablated: the ablation value of every feature.
    """

    clean: Recording
    counterfactual: Recording | None
    towards: Recording | None
    target: Target
    ablated: Ranking

    def acts(self, layer: int) -> Float[Tensor, "pos feature"]:
        """The clean activations of one layer."""
        return self._dense(self.clean, layer)

    def _dense(self, recording: Recording, layer: int) -> Float[Tensor, "pos feature"]:
        return recording.layers[layer].acts.dense(self.ablated[layer].shape[-1])[0]

    @cached_property
    def universe(self) -> Mapping[int, Bool[Tensor, "pos feature"]]:
        """The features that a circuit can have: those active in the clean run, in the counterfactual, or in the
        ablation values. Under `mean` this is most of the dictionary at every position.
        """
        out = {}
        for layer, ablated in self.ablated.items():
            out[layer] = (self.acts(layer) > 0) | (ablated > 0)
            if self.counterfactual is not None:
                out[layer] = out[layer] | (self._dense(self.counterfactual, layer) > 0)
        return out

    @cached_property
    def items(self) -> Int[Tensor, "item 3"]:
        """(layer, pos, feature) of the universe, in the order of a circuit's mask."""
        found = [(layer, mask.nonzero().cpu()) for layer, mask in self.universe.items()]
        return torch.cat([torch.cat([torch.full_like(at[:, :1], layer), at], dim=1) for layer, at in found])

    @property
    def size(self) -> int:
        """The number of features in the universe."""
        return len(self.items)

    def circuit(self, features: Iterable[tuple[int, int, int]]) -> Bool[Tensor, " item"]:
        """The mask of a circuit given as (layer, pos, feature), for example the features of a graph.

        Raises:
            AddressError: one of them is not in the universe.
        """
        place = {tuple(item): number for number, item in enumerate(self.items.tolist())}
        mask = torch.zeros(self.size, dtype=torch.bool)
        for layer, pos, feature in features:
            if (layer, pos, feature) not in place:
                raise AddressError(
                    f"L{layer}/{feature}@{pos} is not active in this case",
                    expected="a feature that one of its prompts has at that token, at a layer that is cut",
                )
            mask[place[layer, pos, feature]] = True
        return mask

    @property
    def metric(self) -> float:
        """m(M): the target's value in the plain model."""
        return float(self.target.value(self.clean.logits)[0].double())


def make_cases(
    model: HookedModel,
    pairs: Sequence[Pair],
    *,
    sites: str | int | Sequence[int] = "all",
    ablation: Ablation = "counterfactual",
    prompts: Sequence[Prompt] = (),
    seed: int = 0,
) -> tuple[Case, ...]:
    """Record every pair, and compute the value to which each feature is ablated.

    Args:
        sites: the layers that are cut: one, a list, or "all" that have a transcoder.
        prompts: the prompts that `mean` averages over and `resample` draws from.
        seed: random seed of `resample`.

    Raises:
        PromptError: there are no pairs, or the two prompts of a pair differ in length.
        TargetError: a target is not one difference of logits.
        UserError: the ablation is unknown or lacks its prompts, or a layer has no transcoder.
    """
    check_ablation(ablation, pairs, prompts)
    seed = whole(seed, "seed", least=-(1 << 63), most=(1 << 63) - 1)
    layers = _layers(model, sites)
    zeros = {layer: model.store[layer].b_enc.new_zeros(model.store.d_features(layer)) for layer in layers}
    fill = _means(model, prompts, zeros) if ablation == "mean" else zeros
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for pair in pairs:
        clean = model.record([pair.prompt], layers)
        other = None if pair.counterfactual is None else model.record([pair.counterfactual], layers)
        if other is not None:
            check_same_length(clean, other)
        towards = other if ablation == "counterfactual" else None
        if ablation == "resample":
            towards = model.record([_another(model, clean, prompts, generator)], layers)
        target = _target(model, pair, clean, other)
        cases.append(Case(clean, other, towards, target, _values(clean, towards, fill)))
    return tuple(cases)


def check_ablation(ablation: str, pairs: Sequence[Pair], prompts: Sequence[Prompt]) -> None:
    """Refuse an unknown ablation, and one whose prompts are missing.

    Raises:
        PromptError: there are no pairs.
        UserError: the ablation is unknown, or lacks prompts.
    """
    if ablation not in get_args(Ablation):
        raise UserError(f"unknown ablation {ablation!r}", expected=", ".join(get_args(Ablation)))
    if not pairs:
        raise PromptError("no prompts given", expected="at least one pair")
    if ablation in ("mean", "resample") and not prompts:
        raise UserError(f"ablation {ablation!r} needs prompts", repair="pass prompts=[…] to take the values from")
    if ablation == "counterfactual" and any(pair.counterfactual is None for pair in pairs):
        raise UserError("ablation 'counterfactual' needs a counterfactual in every pair", repair="or ablation='zero'")


def _layers(model: HookedModel, sites: str | int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(sites, str):
        if sites != "all":
            raise UserError(f"unknown layers {sites!r}", expected='"all", a layer number or a list of them')
        return model.store.layers
    layers = wholes(sites, "sites")
    if not layers:
        raise UserError("no layer to cut", expected="at least one with a transcoder")
    for layer in layers:
        model.store.require(layer)
    return tuple(sorted(set(layers)))


def _values(clean: Recording, towards: Recording | None, fill: Mapping[int, Float[Tensor, " feature"]]) -> Ranking:
    """The ablation value of every feature at every position."""
    if towards is not None:
        return {layer: towards.layers[layer].acts.dense(len(values))[0] for layer, values in fill.items()}
    length = clean.batch.lengths[0]
    kinds = {layer: record.acts.values.dtype for layer, record in clean.layers.items()}
    return {layer: repeat(values.to(kinds[layer]), "f -> pos f", pos=length) for layer, values in fill.items()}


def _means(
    model: HookedModel, prompts: Sequence[Prompt], zeros: Mapping[int, Float[Tensor, " feature"]]
) -> dict[int, Float[Tensor, " feature"]]:
    """Mean activation of every feature over all real tokens of the prompts."""
    sums, tokens = {layer: values.double() for layer, values in zeros.items()}, 0
    for start in range(0, len(prompts), ROWS):
        recording = model.record(list(prompts[start : start + ROWS]), tuple(zeros))
        tokens += sum(recording.batch.lengths)
        for layer, record in recording.layers.items():
            real = recording.batch.mask.to(record.acts.values.device)
            values, indices = record.acts.values[real].double(), record.acts.indices[real]
            sums[layer] = sums[layer].index_add(0, indices.flatten(), values.flatten())
    return {layer: total / tokens for layer, total in sums.items()}


def _another(
    model: HookedModel, clean: Recording, prompts: Sequence[Prompt], generator: torch.Generator
) -> Sequence[int]:
    """A random other prompt of the list with the same length."""
    own = clean.batch.ids[0].tolist()
    others = [ids for ids in map(model.host.tokenize, prompts) if len(ids) == len(own) and ids != own]
    if not others:
        raise PromptError(
            "no prompt to resample from",
            expected=f"another prompt of {len(own)} tokens in prompts=[…]",
            where=model.host.text(own),
        )
    return others[int(torch.randint(len(others), (1,), generator=generator))]


def _target(model: HookedModel, pair: Pair, clean: Recording, other: Recording | None) -> Target:
    """The metric of a pair: by default its answer against the other prompt's answer, as in `trace`."""
    against = None if other is None else other.logits[0]
    found = resolve_targets(model.host, clean.logits[0], pair.target, counterfactual=against)
    if len(found) != 1 or not isinstance(found[0], Target):
        raise TargetError(
            "a circuit is measured on one difference of logits",
            expected="None, a token, a Logit or a Target",
            found=", ".join(target.name for target in found),
        )
    return found[0]
