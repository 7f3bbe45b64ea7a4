"""Direct and total effects of an edit, and effects along named paths.

A block adds the outputs of two modules to the stream: attention and MLP. So a change of the stream reaches later layers
along the skip connection, and through any set of modules, one after the other. If a module's output is held at its
clean value, no effect passes through the module. Holding modules closes paths; holding all of them leaves only the skip
connection.

parts held (`hooks.host.hold`) → one batch: the unedited prompt first, then one row per question → differences from it

In a row where a module is closed, its output is replaced by that of the unedited row of the same pass. So no clean
value has to be stored, and rounding that depends on the shape of the batch cancels.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import AddressError, InterventionError, TargetError, UserError
from hooks.host import ENTRY, Batch, HoldLike, Host, check_hold, check_layer, module, modules, parts_held, tap
from hooks.interventions import FeatureIntervention
from hooks.interventions.ablate import Ablate
from hooks.interventions.clamp import Clamp
from hooks.kernels import gather_features
from hooks.passes import Interventions, as_interventions, listed, make_edits, make_plan
from hooks.readout import Effect, effect
from hooks.renamed import deprecated
from hooks.sites import Site
from hooks.types import AddressLike, Edit, FeatureAddress
from hooks.whole import whole

ROWS = 64  # copies of the prompt per pass

Through = str | Sequence[str | Site]  # "all", "direct", or modules
Paths = Literal["all", "direct"] | tuple[Site, ...]


# -- direct, total, and through one module --------------------------------------------------------------------------


@dataclass(frozen=True)
class Effects:
    """Changes of logit(target) − logit(against) caused by an edit, by paths.

    Attributes:
        total: everything after the edit is live, except what `hold` names.
        direct: every module's output is held, so the edit reaches the logits along the skip connection only. 0 for an
            edit at another token than the logits, and for one inside an MLP (at mlp_in).
        through: for each receiver, how much the effect changes if this one module is live too: all paths through it and
            through no other module.
    """

    target: int
    against: int
    total: float
    direct: float
    through: Mapping[Site, float]

    @property
    def indirect(self) -> float:
        """total − direct: the effect through modules."""
        return self.total - self.direct

    @property
    def remainder(self) -> float:
        """indirect − Σ through: paths through two modules or more, and through modules that are no receivers. Unless
        attention, norms and gates are held, it also has the interactions between modules."""
        return self.indirect - sum(self.through.values())


def effects(
    host: Host,
    store: TranscoderStore,
    batch: Batch,
    interventions: Interventions,
    target: Any = None,
    against: Any = None,
    *,
    pos: int = -1,
    hold: HoldLike = "nothing",
    receivers: str | Sequence[str | Site] = (),
) -> Effects:
    """Total and direct effect of an edit on one difference of logits, and the effects through single modules.

    This is the controlled direct effect of mediation analysis (Pearl 2001, "Direct and indirect effects"). The
    mediators are all module outputs, and they are held at the values of the clean run. `hold` applies to every run:
    with `norms` the direct effect is the edit times the clean scale of the final norm times the unembedding; without
    it, the final norm is live. With all of `attention`, `norms` and `gates` the effects of disjoint sets of paths add
    up to the total.

    Args:
        batch: one prompt.
        receivers: modules, `"attn_out 2"` or `Site("mlp_out", 3)`; `"all"`: every module after the edit.

    Raises:
        UserError: there are no interventions; a receiver is before the edit, or held; or `run` would refuse it. No pass
            has run then.
    """
    chosen = check_hold(hold, host.n_layers)
    base, every = chosen.outputs(host.n_layers), modules(host.n_layers)
    items = as_interventions(interventions)
    behind = [site for site in every if _passes(site, _written(store, items)) and site not in base]
    listed = [receivers] if isinstance(receivers, str) else receivers
    opened = behind if receivers == "all" else [module(site) for site in listed]
    for site in opened:
        _check_open(site, behind, base, host.n_layers)
    metric = _Metric.of(host, target, against, pos, batch)
    rows = [_Row(items, base), _Row(items, frozenset(every))]
    rows += [_Row(items, frozenset(every) - {site}) for site in opened]
    run = _Rows(host, store, batch, metric.pos)
    run.check(rows)
    with parts_held(host, batch, chosen):
        total, direct, *others = metric.read(run.logits(rows))
    through = {site: one.delta - direct.delta for site, one in zip(opened, others, strict=True)}
    return Effects(total.target, total.against, total.delta, direct.delta, through)


# -- from one feature to another ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathEffect:
    """The effect of an edit on one feature along some paths, and the effect of that feature's change on the logits.

    Attributes:
        sender: the edit, as given.
        through: `all`, `direct`, or the open modules.
        preactivation_before, preactivation_after: the receiver's, in the clean run and with the paths open.
        activation_before, activation_after: the same after TopK (which selects again) and ReLU.
        effect: on the logits, when only the receiver is set to `activation_after` in an otherwise clean run.
    """

    sender: tuple[FeatureIntervention, ...]
    receiver: FeatureAddress
    through: Paths
    preactivation_before: float
    preactivation_after: float
    activation_before: float
    activation_after: float
    effect: Effect

    @property
    def delta_preactivation(self) -> float:
        """After minus before."""
        return self.preactivation_after - self.preactivation_before

    @property
    def delta_activation(self) -> float:
        """After minus before; 0 where TopK leaves out the receiver both times."""
        return self.activation_after - self.activation_before

    @property
    def delta(self) -> float:
        """Change of logit(target) − logit(against) in the second run."""
        return self.effect.delta

    @property
    def delta_metric(self) -> float:
        """The earlier name of `delta`."""
        deprecated("delta_metric", "delta")
        return self.delta


def path_effects(
    host: Host,
    store: TranscoderStore,
    batch: Batch,
    senders: Interventions,
    receivers: AddressLike | Sequence[AddressLike],
    through: Through = "all",
    *,
    target: Any = None,
    against: Any = None,
    pos: int = -1,
    hold: HoldLike = "nothing",
) -> tuple[PathEffect, ...]:
    """Path patching between features, for every sender with every receiver, senders outermost.

    Two runs (Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching"; Wang et al. 2022, the paths of
    the IOI circuit), with a feature in the place of a head:

    1. The sender is edited. The modules named in `through` are live, and every other module's output is held at its
       clean value. The receiver's stream is then the clean stream plus the edit's effect along the skip connection
       *and* through any of the open modules, one after the other. `direct`: no module is open. `all`: none is held.
    2. Only the receiver is set, to the activation measured in the first run. The sender is not edited, and everything
       after the receiver is live.

    `hold` applies to both runs. The encoder's norm and TopK are always live, so other features change too.
    The skip connection cannot be closed: for the effect through modules only, subtract the `direct` result. It connects
    no two tokens, so between different tokens `direct` is 0, and so is the effect through modules without attention.

    Args:
        batch: one prompt.
        senders: each is an intervention, or a list of interventions that act together.
        receivers: addresses of one feature at one token.
        through: `all`, `direct`, or modules as in `effects`.

    Cost: one row per sender, then one row per pair; 64 rows per pass.

    Raises:
        UserError: a receiver is not after a sender, in depth or in tokens, or is at several tokens; a module is not
            between them, or is held; or `run` would refuse it. No pass has run then.
    """
    chosen = check_hold(hold, host.n_layers)
    base, every = chosen.outputs(host.n_layers), modules(host.n_layers)
    edits = [as_interventions(sender) for sender in listed(senders)]
    one = isinstance(receivers, str | FeatureAddress)
    addresses = [FeatureAddress.of(receiver) for receiver in ([receivers] if one else receivers)]
    metric = _Metric.of(host, target, against, pos, batch)
    run = _Rows(host, store, batch, metric.pos)
    run.check([_Row([Ablate(address)], base) for address in addresses] + [_Row(items, base) for items in edits])
    named = _paths(through)
    for items, address in product(edits, addresses):
        _check_pair(store, items, address, batch.lengths[0])
        _check_between(store, items, address, named, base, host.n_layers)
    if not edits or not addresses:
        return ()
    closed = base if named == "all" else frozenset(every) - frozenset(() if named == "direct" else named)
    places = [(address, address.positions.bounds(batch.lengths[0])[0]) for address in addresses]
    with parts_held(host, batch, chosen):
        before, after = run.features([_Row(items, closed) for items in edits], places)
        pairs = list(product(range(len(edits)), range(len(addresses))))
        rows = [_Row([Clamp(addresses[r], float(after[s, r, 1]))], base) for s, r in pairs]
        measured = metric.read(run.logits(rows))
    return tuple(
        PathEffect(
            tuple(edits[s]), addresses[r], named,
            float(before[s, r, 0]), float(after[s, r, 0]), float(before[s, r, 1]), float(after[s, r, 1]), one,
        )
        for (s, r), one in zip(pairs, measured, strict=True)
    )  # fmt: skip


# -- many rows of one prompt ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One question: the edit, and the modules whose outputs are held at their clean values."""

    interventions: Sequence[object]
    closed: frozenset[Site]


@dataclass(frozen=True)
class _Rows:
    """Runs rows of one prompt in packed passes; the first row of each pass is the unedited prompt."""

    host: Host
    store: TranscoderStore
    batch: Batch
    position: int

    def check(self, rows: Sequence[_Row]) -> None:
        make_plan(self.store, [row.interventions for row in rows], [self.batch.lengths[0]] * len(rows))

    def logits(self, rows: Sequence[_Row]) -> list[tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]]:
        """(unedited, edited) at the position, per row."""
        out: list[tuple[Tensor, Tensor]] = []
        for batch, edits in self._passes(rows):
            pos = torch.full((len(batch.lengths),), self.position)
            first, *others = self.host.forward_at(batch, pos, edits)
            out += [(first, other) for other in others]
        return out

    def features(
        self, rows: Sequence[_Row], places: Sequence[tuple[FeatureAddress, int]]
    ) -> tuple[Float[Tensor, "row place 2"], Float[Tensor, "row place 2"]]:
        """(unedited, edited) pre-activation and activation at every place, per row."""
        before, after = [], []
        sites = {self.store.sites(address.layer)[0] for address, _ in places}
        for batch, edits in self._passes(rows):
            seen: dict[Site, Tensor] = {}
            self.host.forward_hidden(batch, [*edits, *(tap(site, seen) for site in sites)])
            values = torch.stack([self._feature(seen, *place) for place in places], dim=1)
            before.append(values[:1].expand_as(values[1:]))
            after.append(values[1:])
        return torch.cat(before), torch.cat(after)

    def _feature(self, seen: Mapping[Site, Tensor], address: FeatureAddress, pos: int) -> Float[Tensor, "row 2"]:
        transcoder = self.store[address.layer]
        pre = transcoder.preactivations(seen[transcoder.read][:, pos])
        feature = torch.full((len(pre), 1), address.feature, device=pre.device)
        acts = gather_features(transcoder.select(pre), feature)
        return torch.cat([pre.gather(-1, feature), acts], dim=-1).double().cpu()

    def _passes(self, rows: Sequence[_Row]) -> Iterator[tuple[Batch, list[Edit]]]:
        for start in range(0, len(rows), ROWS):
            part = [_Row((), frozenset()), *rows[start : start + ROWS]]
            batch = self.batch.rows([0] * len(part))
            sites = sorted({site for row in part for site in row.closed}, key=lambda site: site.depth)
            closed = [_as_first(site, torch.tensor([site in row.closed for row in part])) for site in sites]
            plan = make_plan(self.store, [row.interventions for row in part], batch.lengths)
            yield batch, closed + make_edits(self.store, plan)


def _as_first(site: Site, rows: Bool[Tensor, " batch"]) -> Edit:
    """An edit that copies the site's value from the unedited row into some rows."""
    return Edit(site, lambda x, at: torch.where(rows.to(x.device)[:, None, None], x[:1], x))


@dataclass(frozen=True)
class _Metric:
    """logit(target) − logit(against) at one position; a token that is None is taken from the unedited run."""

    target: int | None
    against: int | None
    pos: int
    string: Callable[[int], str]

    @classmethod
    def of(cls, host: Host, target: Any, against: Any, pos: int, batch: Batch) -> "_Metric":
        if len(batch.lengths) != 1:
            raise UserError("effects are measured on one prompt", found=f"{len(batch.lengths)} prompts")
        token, other = (None if given is None else host.token_id(given) for given in (target, against))
        if token is not None and token == other:
            raise TargetError("target and against are the same token", found=repr(host.string(token)))
        length, pos = batch.lengths[0], whole(pos, "position")
        if not -length <= pos < length:
            raise TargetError(f"position {pos} does not occur", expected=f"-{length} to {length - 1}")
        return cls(token, other, pos % length, host.string)

    def read(self, pairs: Sequence[tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]]) -> list[Effect]:
        if not pairs:
            return []
        token = int(pairs[0][0].argmax()) if self.target is None else self.target
        if token == self.against:
            raise TargetError("target and against are the same token", found=f"{token}, the clean answer")
        against = effect(*pairs[0], token, self.against).against
        return [effect(before, after, token, against, string=self.string) for before, after in pairs]


def _written(store: TranscoderStore, items: Sequence[FeatureIntervention]) -> Site:
    """The first site that an edit writes. Layers that do not exist are ignored: the plan refuses them later."""
    if not items:
        raise InterventionError("no interventions given, so there is no effect", expected="at least one")
    layers = [item.address.layer for item in items if item.address.layer in store]
    return store.sites(min(layers, default=store.layers[0]))[1]


def _passes(module: Site, write: Site, read: Site | None = None) -> bool:
    """Whether a module's input is at or after `write`, and its output before `read`."""
    return write.depth <= (module.layer, ENTRY[module.name]) and (read is None or module.depth <= read.depth)


def _check_open(site: Site, between: Collection[Site], base: Collection[Site], n_layers: int) -> None:
    check_layer(site, n_layers)
    if site in base:
        raise UserError(f"{site} cannot be open and held", repair="take it out of the hold")
    if site not in between:
        raise UserError(
            f"no path of this edit goes through {site}",
            expected=", ".join(map(str, between)) or "the direct path: no module lies between",
        )


def _paths(through: Through) -> Paths:
    if not isinstance(through, str):
        return tuple(map(module, through))
    if through == "all":
        return "all"
    if through == "direct":
        return "direct"
    raise UserError(f"unknown paths {through!r}", expected='"all", "direct", or a list of modules')


def _check_between(
    store: TranscoderStore,
    items: Sequence[FeatureIntervention],
    receiver: FeatureAddress,
    through: Paths,
    base: frozenset[Site],
    n_layers: int,
) -> None:
    if isinstance(through, str):
        return
    write, read = _written(store, items), store.sites(receiver.layer)[0]
    between = [site for site in modules(n_layers) if _passes(site, write, read) and site not in base]
    for site in through:
        _check_open(site, between, base, n_layers)


def _check_pair(
    store: TranscoderStore, items: Sequence[FeatureIntervention], receiver: FeatureAddress, length: int
) -> None:
    """Refuse a receiver that is not one feature at one token after everything that is edited."""
    start, stop = receiver.positions.bounds(length)
    if (length if stop is None else stop) != start + 1:
        raise AddressError(
            f"the receiver {receiver} is at several tokens", expected=f"one token, for example L{receiver.layer}/0@-1"
        )
    if not items:
        raise InterventionError("no interventions given, so there is no effect", expected="at least one")
    read = store.sites(receiver.layer)[0]
    for item in items:
        write = store.sites(item.address.layer)[1]
        if item.address.layer >= receiver.layer or write.depth > read.depth:
            raise AddressError(
                f"the receiver {receiver} is not after {item.address}",
                expected=f"a layer that reads at or behind {write}",
                found=f"it reads {read}",
            )
        if item.address.positions.bounds(length)[0] > start:
            raise AddressError(
                f"the receiver {receiver} is at an earlier token than {item.address}",
                expected="attention looks back only: a receiver at the edited token, or at a later one",
            )
