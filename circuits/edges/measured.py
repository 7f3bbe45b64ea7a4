"""Passes of the plain model in which every cut is held at its clean value, minus a vector that a row removes from it.

Between a source and a target that it feeds directly nothing is approximated, and no other path is open. So the change
at the target is the measured counterpart of one edge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.targets import AnyTarget
from hooks.host import Batch
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site
from hooks.types import Edit, Pass

ROWS = 64  # copies of the prompt per pass

Look = Callable[[Float[Tensor, "row pos d_model"], int], None]


@dataclass(frozen=True)
class Removal:
    """The vector that one row removes from one site; `pos` None removes it at every position."""

    pos: int | None
    vector: Float[Tensor, " d_model"]


def run_held(
    model: HookedModel,
    recording: Recording,
    layers: Sequence[int],
    rows: Sequence[Mapping[Site, Removal]],
    looks: Mapping[Site, Look],
    targets: Sequence[AnyTarget] = (),
) -> Float[Tensor, "row target"]:
    """Run one row per mapping and return the targets' values.

    Args:
        layers: layers whose write sites are held at the recorded prompt's values.
        rows: what each row removes. It may name several sites, if none of them affects another.
        looks: functions by site, called with the *incoming* tensor of some rows and the number of the first row. A site
            that is also held is passed to its function before it is replaced.
        targets: computed from the logits, or from the stream at one site.

    Memory: `ROWS` copies of the prompt through the model.
    """
    clean = {model.store.sites(layer)[1]: recording.layers[layer].target for layer in layers}
    free = {site for row in rows for site in row} - set(clean)
    end = targets[0].site if targets else None
    values: list[Tensor] = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        batch = recording.batch.rows([0] * len(part))
        seen: list[Tensor] = []
        edits = [_look(site, look, start) for site, look in looks.items()]
        if end is not None:
            edits.append(_look(end, partial(_keep, seen), start))
        edits += [_hold(site, stream, part) for site, stream in clean.items()]
        edits += [_hold(site, None, part) for site in free]
        if end is None and targets:
            values.append(_read_logits(model, batch, edits, targets))
        else:
            model.host.forward_hidden(batch, edits)
            values.append(_stack(targets, seen[0]) if targets else torch.zeros(len(part), 0, dtype=torch.float64))
    return torch.cat(values) if values else torch.zeros(0, len(targets), dtype=torch.float64)


def _read_logits(
    model: HookedModel, batch: Batch, edits: list[Edit], targets: Sequence[AnyTarget]
) -> Float[Tensor, "row target"]:
    hidden = model.host.forward_hidden(batch, edits)
    rows = {pos: model.host.unembed(hidden[:, pos]) for pos in {target.pos for target in targets}}
    return torch.stack([target.of_row(rows[target.pos]).double().cpu() for target in targets], dim=1)


def _stack(targets: Sequence[AnyTarget], stream: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row target"]:
    return torch.stack([target.value(stream).double().cpu() for target in targets], dim=1)


def _keep(seen: list[Tensor], x: Float[Tensor, "row pos d_model"], start: int) -> None:
    seen.append(x)


def _look(site: Site, look: Look, start: int) -> Edit:
    def apply(x: Tensor, at: Pass) -> Tensor:
        look(x, start)
        return x

    return Edit(site, apply)


def _hold(site: Site, clean: Float[Tensor, "1 pos d_model"] | None, rows: Sequence[Mapping[Site, Removal]]) -> Edit:
    """An edit: the site's clean value (or its own value, if `clean` is None), minus what each row removes; subtracted
    in fp32 or wider, cast once."""

    def apply(x: Tensor, at: Pass) -> Tensor:
        base = x if clean is None else clean.to(x).expand_as(x)
        out = base.to(torch.promote_types(x.dtype, torch.float32)).clone()
        for number, row in enumerate(rows):
            if site in row:
                where = slice(None) if row[site].pos is None else row[site].pos
                out[number, where] -= row[site].vector.to(out)
        return out.to(x.dtype)

    return Edit(site, apply)


def feature_values(
    model: HookedModel,
    layer: int,
    pos: Int[Tensor, " target"],
    feature: Int[Tensor, " target"],
    stream: Float[Tensor, "row pos d_model"],
) -> Float[Tensor, "row target"]:
    """Pre-activations of named features from the stream at the read site, one position at a time."""
    transcoder = model.store[layer]
    pos, feature = pos.to(transcoder.device), feature.to(transcoder.device)
    out = torch.zeros(len(stream), len(pos), dtype=torch.float64)
    for t in pos.unique().tolist():
        here = (pos == t).nonzero()[:, 0]
        normed = transcoder.normed(stream[:, t].to(transcoder.device)).double()
        weight, bias = transcoder.W_enc[feature[here]].double(), transcoder.b_enc[feature[here]].double()
        out[:, here.cpu()] = (normed @ weight.T + bias).cpu()
    return out
