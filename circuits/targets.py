"""Targets of a graph: linear functions of the logits or of the stream, each at one position.

The default is the metric of the whole project: logit(answer) − logit(best other token), both of the clean run. If there
are several targets, scores and influence are those of their weighted sum.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.shown import unique
from hooks.checkpoints import TranscoderStore
from hooks.errors import TargetError
from hooks.host import Host, Prompt
from hooks.readout import best_other, token_name
from hooks.sites import Site
from hooks.transcoder import Transcoder
from hooks.types import AddressLike, FeatureAddress, Positions
from hooks.whole import whole


@dataclass(frozen=True)
class Target:
    """sum_v coefficient_v · logit_v + mean · (mean logit), at one position.

    Attributes:
        name: for example `' Austin' − ' Sacramento'`.
        tokens, coefficients: the linear function.
        pos: the position whose next-token logits are used, counted from 0.
        mean: coefficient of the mean logit; −1 subtracts the mean from a single logit.
        weight: its weight in the sum of several targets.
    """

    site: ClassVar[None] = None  # computed from the logits

    name: str
    tokens: tuple[int, ...]
    coefficients: tuple[float, ...]
    pos: int
    mean: float = 0.0
    weight: float = 1.0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Target":
        """A target from the facts in a saved graph."""
        return cls(
            facts["name"],
            tuple(facts["tokens"]),
            tuple(facts["coefficients"]),
            facts["pos"],
            facts.get("mean", 0.0),
            facts.get("weight", 1.0),
        )

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "logits", **vars(self)}

    def value(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "*batch"]:
        """The target's value, differentiable, in fp32 or better."""
        return self.of_row(logits[..., self.pos, :])

    def of_row(self, row: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
        """The same from the logits at the target's position only."""
        wide = row if row.dtype.itemsize >= 4 else row.float()
        picked = wide[..., list(self.tokens)]
        value = (picked * picked.new_tensor(self.coefficients)).sum(-1)
        return value + self.mean * wide.mean(-1) if self.mean else value


@dataclass(frozen=True)
class Direction:
    """vector · x at one position of the residual stream.

    Attributes:
        vector: d_model numbers.
        site: its site: resid_pre, resid_mid or resid_post of a layer.
        pos: position; negative counts from the end of the prompt.
    """

    vector: tuple[float, ...]
    site: Site
    pos: int = -1
    name: str = "direction"
    weight: float = 1.0

    def __init__(
        self,
        vector: Sequence[float] | Float[Tensor, " d_model"],
        site: Site,
        pos: int = -1,
        name: str = "",
        weight: float = 1.0,
    ):
        numbers = vector.double().tolist() if isinstance(vector, Tensor) else [float(v) for v in vector]
        for key, value in (("vector", tuple(numbers)), ("site", site), ("pos", pos), ("weight", weight)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "name", name or f"direction at {site}" + ("" if pos == -1 else f" @{pos}"))
        object.__setattr__(self, "_row", torch.tensor(numbers, dtype=torch.float64))

    @property
    def row(self) -> Float[Tensor, " d_model"]:
        """The vector as a tensor, fp64."""
        return self._row  # type: ignore[attr-defined]

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        site = {"name": self.site.name, "layer": self.site.layer}
        return {"kind": "direction", **asdict(self), "vector": list(self.vector), "site": site}

    def value(self, stream: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch"]:
        """The target's value, differentiable, in fp32 or better."""
        return self.of_row(stream[..., self.pos, :])

    def of_row(self, row: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The same from the stream at the target's position alone."""
        wide = row if row.dtype.itemsize >= 4 else row.float()
        return wide @ self.row.to(wide)


@dataclass(frozen=True)
class Feature:
    """The pre-activation of a feature at one position: w_j · LayerNorm(x) + b_j.

    Attributes:
        address: such as `L3/99@8`. A negative position counts from the end of the prompt; without one it is the last.
    """

    address: FeatureAddress
    weight: float = 1.0
    transcoder: Transcoder | None = field(default=None, compare=False, repr=False)

    def __init__(
        self,
        address: AddressLike,
        weight: float = 1.0,
        transcoder: Transcoder | None = None,
    ):
        for key, value in (("address", FeatureAddress.of(address)), ("weight", weight), ("transcoder", transcoder)):
            object.__setattr__(self, key, value)

    @property
    def name(self) -> str:
        """Its address."""
        return str(self.address)

    @property
    def pos(self) -> int:
        """The position."""
        return int(self.address.positions.start or 0)

    @property
    def site(self) -> Site:
        """The read site of its transcoder."""
        assert self.transcoder is not None, "resolved targets know their transcoder"
        return self.transcoder.read

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {"kind": "feature", "name": self.name, "address": self.name, "pos": self.pos, "weight": self.weight}

    def value(self, stream: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch"]:
        """The target's value, differentiable, in fp32 or better."""
        return self.of_row(stream[..., self.pos, :])

    def of_row(self, row: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The same from the stream at the target's position alone."""
        assert self.transcoder is not None, "resolved targets know their transcoder"
        normed = self.transcoder.normed(row)
        weight, bias = (part[self.address.feature].to(normed.dtype) for part in (self._w, self.transcoder.b_enc))
        return normed @ weight + bias

    @property
    def _w(self) -> Float[Tensor, "feature d_model"]:
        assert self.transcoder is not None
        return self.transcoder.W_enc


AnyTarget = Target | Direction | Feature


@dataclass(frozen=True)
class Logit:
    """A named token: logit(token) − logit(against), at any position.

    Attributes:
        token: text or id; None is the model's own answer at this position.
        against: the other token; None is the clean run's best other one.
    """

    token: str | int | None = None
    against: str | int | None = None
    pos: int = -1


@dataclass(frozen=True)
class Mass:
    """The most likely next tokens up to a probability mass. Each is its logit minus the mean logit, weighted by its
    probability.

    circuit-tracer's default target: mass 0.95, at most 10 tokens.
    """

    mass: float = 0.95
    most: int = 10
    pos: int = -1


@dataclass(frozen=True)
class Answer:
    """An answer of one or several tokens. The prompt is continued with it, and each of its tokens is a target against
    the best other token at its position. The graph explains the sum of these targets.
    """

    text: str | tuple[int, ...]


TargetLike = str | int | AnyTarget | Logit | Mass | Answer | tuple[str | int, str | int]


def metric(targets: Sequence[AnyTarget], out: Float[Tensor, "*batch pos width"]) -> Float[Tensor, "*batch"]:
    """sum_n weight_n · target_n, from the logits or from the stream at the targets' site."""
    return torch.stack([target.weight * target.value(out) for target in targets]).sum(0)


def metric_name(targets: Sequence[AnyTarget]) -> str:
    """The metric in words."""
    if len(targets) == 1:
        return targets[0].name
    return " + ".join(target.name if target.weight == 1 else f"{target.weight:.3g} {target.name}" for target in targets)


def read_targets(facts: Sequence[Mapping[str, Any]], store: TranscoderStore) -> tuple[AnyTarget, ...]:
    """The targets of a saved graph."""
    return tuple(_read(target, store) for target in facts)


def _read(facts: Mapping[str, Any], store: TranscoderStore) -> AnyTarget:
    kind = facts.get("kind", "logits")
    if kind == "feature":
        address = FeatureAddress.of(facts["address"])
        return Feature(address, facts["weight"], store[address.layer])
    if kind == "direction":
        site = Site(facts["site"]["name"], facts["site"]["layer"])
        return Direction(facts["vector"], site, facts["pos"], facts["name"], facts["weight"])
    return Target.of(facts)


def whole_prompt(host: Host, prompt: Prompt, targets: object) -> list[int]:
    """The tokens of a trace: the prompt, followed by all tokens of an answer but the last.

    Raises:
        TargetError: an answer is given together with other targets, or is empty.
    """
    ids = host.tokenize(prompt)
    listed = _listed(targets)
    answers = [target for target in listed if isinstance(target, Answer)]
    if not answers:
        return ids
    if len(listed) > 1:
        raise TargetError("an Answer changes the prompt, so it must be the only target", found=f"{len(listed)} targets")
    return [*ids, *answer_tokens(host, answers[0])[:-1]]


def answer_tokens(host: Host, answer: Answer) -> list[int]:
    """Ids of an answer's tokens. A word without a leading space means the word with one.

    Raises:
        TargetError: it has no tokens, or some that the vocabulary lacks.
    """
    if not isinstance(answer.text, str):
        ids = [host.token_id(i) for i in answer.text]
    else:
        text = answer.text if answer.text[:1].isspace() else f" {answer.text}"
        ids = host.split(text) if answer.text.strip() else []
    if not ids or getattr(host.tokenizer, "unk_token_id", None) in ids:
        raise TargetError(f"the answer {answer.text!r} is not in the vocabulary", expected="text of known tokens")
    return ids


def resolve_targets(
    host: Host,
    logits: Float[Tensor, "pos vocab"],
    targets: TargetLike | Sequence[TargetLike] | None,
    *,
    store: TranscoderStore | None = None,
    counterfactual: Float[Tensor, "pos vocab"] | None = None,
) -> tuple[AnyTarget, ...]:
    """The user's targets → `Target`, `Direction` and `Feature` objects.

    Args:
        logits: of the clean run, to find the answer and the best other token.
        targets: None (the model's own answer), a token, a `Logit`, `Mass`, `Answer`, `Feature`,
            `Direction` or `Target`, or a list or tuple of these, explained in equal shares.
        store: needed for a `Feature`.
        counterfactual: logits of the other prompt of a pair; its answer is then what the answer is against.

    Raises:
        TargetError: a name is not one token, a position does not occur, a target is empty or given twice, or the
            targets have different sites.
    """
    listed = _listed(targets)
    if not listed:
        raise TargetError("no target given", expected="a token, a Logit, a Target, or None for the answer")
    found = _told_apart([one for target in listed for one in _resolve(host, logits, target, store, counterfactual)])
    places = {target.site.depth if target.site else None for target in found}
    if len(places) > 1:
        raise TargetError(
            "targets that are read at different places cannot share a graph",
            expected="logits only, or features and directions of one site",
            found=", ".join(f"{target.name} at {target.site or 'the logits'}" for target in found),
        )
    if len(listed) > 1:
        found = [replace(target, weight=target.weight / len(listed)) for target in found]
    return tuple(found)


def either(targets: Any, target: Any) -> Any:
    """The value of `targets=` or of `target=`, two names of one argument.

    Raises:
        TargetError: both are given.
    """
    if targets is not None and target is not None:
        raise TargetError("target= and targets= are one argument", expected="one of them")
    return target if targets is None else targets


def against_token(targets: Any, against: str | int | None) -> Any:
    """A token and the token it is measured against, as one target; without `against`, the targets unchanged.

    Raises:
        TargetError: `against` is given, and the target is neither one token nor the model's own answer.
    """
    if against is None:
        return targets
    if not (targets is None or _is_token(targets)):
        raise TargetError(
            "against= belongs to one token",
            expected="a token, or None for the model's own answer",
            found=type(targets).__name__,
            repair="name each pair as Logit(token, against)",
        )
    return Logit(targets, against)


def _listed(targets: Any) -> list[Any]:
    """The targets as a list: a list or a tuple gives several.

    Exception: a tuple of two tokens is the pair (answer, against), as in version 0.1, with a warning.
    """
    if not isinstance(targets, list | tuple):
        return [targets]
    if _is_pair(targets):
        return [_pair(targets)]
    return [_pair(target) if _is_pair(target) else target for target in targets]


def _is_pair(target: Any) -> bool:
    return isinstance(target, tuple) and len(target) == 2 and all(map(_is_token, target))


def _is_token(target: Any) -> bool:
    return isinstance(target, str | SupportsIndex)


def _pair(target: Any) -> Logit:
    warnings.warn(
        f"a tuple of two tokens will be two targets: for one against the other write Logit{target!r}, or against=",
        DeprecationWarning,
        stacklevel=2,
    )
    return Logit(*target)


def _told_apart(found: Sequence[AnyTarget]) -> list[AnyTarget]:
    """The targets with unique names: tokens with the same text get their ids into the name.

    Raises:
        TargetError: a target is given twice.
    """
    meant: list[Any] = []
    for target in found:
        plain: Any = replace(target, weight=1.0)
        plain = plain if isinstance(target, Feature) else replace(plain, name="-")
        if plain in meant:
            raise TargetError(f"the target {target.name} is given twice")
        meant.append(plain)
    names = [target.name for target in found]
    with_ids = [
        f"{target.name} (ids {', '.join(map(str, target.tokens))})"
        if isinstance(target, Target) and names.count(target.name) > 1
        else target.name
        for target in found
    ]
    return [
        target if target.name == name or isinstance(target, Feature) else replace(target, name=name)
        for target, name in zip(found, unique(with_ids), strict=True)
    ]


def _resolve(
    host: Host,
    logits: Float[Tensor, "pos vocab"],
    target: Any,
    store: TranscoderStore | None,
    counterfactual: Float[Tensor, "pos vocab"] | None,
) -> list[AnyTarget]:
    if isinstance(target, Direction) and len(target.vector) != host.d_model:
        raise TargetError(
            f"the target {target.name} has {len(target.vector)} numbers", expected=f"{host.d_model}, the stream's width"
        )
    if isinstance(target, Target | Direction):
        return [replace(target, pos=_position(target.pos, len(logits)))]
    if isinstance(target, Feature):
        return [_feature(target, len(logits), store)]
    if isinstance(target, Mass):
        return _by_mass(host, logits, target)
    if isinstance(target, Answer):
        ids = answer_tokens(host, target)
        first = len(logits) - len(ids)
        return [_difference(host, logits, id, None, first + n, numbered=len(ids) > 1) for n, id in enumerate(ids)]
    if isinstance(target, list | tuple):
        raise TargetError(
            "a target is no list", expected="tokens in one list, or Logit(token, against)", found=repr(target)[:80]
        )
    target = target if isinstance(target, Logit) else Logit(target)
    pos = _position(target.pos, len(logits))
    answer = int(logits[pos].argmax()) if target.token is None else host.token_id(target.token)
    other = None if target.against is None else host.token_id(target.against)
    if other is None and counterfactual is not None:
        rival = int(counterfactual[pos].argmax())
        other = None if rival == answer else rival
    return [_difference(host, logits, answer, other, pos, numbered=pos != len(logits) - 1)]


def _difference(
    host: Host, logits: Float[Tensor, "pos vocab"], answer: int, other: int | None, pos: int, *, numbered: bool
) -> Target:
    other = best_other(logits[pos], answer) if other is None else other
    if answer == other:
        raise TargetError("target and against are the same token", found=repr(host.string(answer)))
    own, rival = (token_name(host.string(token), token) for token in (answer, other))
    name = f"{own} − {rival}" + (f" @{pos}" if numbered else "")
    return Target(name, (answer, other), (1.0, -1.0), pos)


def _by_mass(host: Host, logits: Float[Tensor, "pos vocab"], target: Mass) -> list[AnyTarget]:
    if not (0 < target.mass <= 1 and whole(target.most, "most") >= 1):
        raise TargetError(f"mass {target.mass} of at most {target.most} tokens holds nothing", expected="0 < mass <= 1")
    pos = _position(target.pos, len(logits))
    ranked = host.top(logits[pos], target.most)
    place = "" if pos == len(logits) - 1 else f" @{pos}"
    before = [sum(item.prob for item in ranked[:n]) for n in range(len(ranked))]
    return [
        Target(f"{token_name(item.token, item.id)}{place}", (item.id,), (1.0,), pos, mean=-1.0, weight=item.prob)
        for item, mass in zip(ranked, before, strict=True)
        if mass < target.mass
    ]


def _feature(target: Feature, length: int, store: TranscoderStore | None) -> Feature:
    if store is None:
        raise TargetError(f"the target {target.name} needs transcoders", expected="a model that has some")
    address = target.address
    store.require(address.layer)
    if not 0 <= address.feature < store.d_features(address.layer):
        raise TargetError(
            f"feature {address.feature} does not exist in layer {address.layer}",
            expected=f"0 to {store.d_features(address.layer) - 1}",
        )
    if address.positions.kind not in ("all", "index"):
        raise TargetError(f"the target {target.name} is at several positions", expected="one, such as L3/99@8")
    start = -1 if address.positions.kind == "all" else address.positions.start
    pos = _position(int(start or 0), length)
    placed = FeatureAddress(address.layer, address.feature, Positions("index", pos))
    return Feature(placed, target.weight, store[address.layer])


def _position(pos: int, length: int) -> int:
    pos = whole(pos, "pos")
    found = pos + length if pos < 0 else pos
    if not 0 <= found < length:
        raise TargetError(f"position {pos} does not occur", expected=f"0 to {length - 1}")
    return found
