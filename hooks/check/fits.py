"""How well one layer's encoders and decoders fit every pair of sites.

tensors at the sites of a few blocks → each read site encoded once per encoder → each decoder's reconstruction compared
with every write site

    FVU = sum_t |x_t − x_hat_t|² / sum_t |x_t − mean x|²

over all tokens; without attention sinks; and with x / rms(x) in place of x, which is what later blocks read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.check.block_by_block import Streams
from hooks.check.sums import CONSTANT
from hooks.passes import is_sink
from hooks.sites import SITE_NAMES, SiteSpec
from hooks.transcoder import Transcoder

_PREACTIVATIONS_AT_ONCE = 1 << 26  # 256 MB of fp32
_BRANCHES = ("attn_out", "mlp_out")  # read only by sets that reconstruct what they read
_EPS = 1e-6  # of x / rms(x); any model's


@dataclass(frozen=True)
class Option:
    """One possibility for what a set reads and writes.

    Attributes:
        write: None: the block's update, resid_post − resid_pre, which is no site.
        encoder: see `hooks.formats.encoders`.
    """

    read: SiteSpec
    write: SiteSpec | None
    encoder: str
    decoder: int = 0

    def __str__(self) -> str:
        return f"{self.read} -> {self.write or 'resid_post - resid_pre'}, {self.encoder}"


@dataclass(frozen=True)
class Fit:
    """One option at one layer; an FVU is None where the target does not vary.

    Attributes:
        calm: the FVU without attention sinks.
        normed: the FVU of x / rms(x).
        loss: mean of (x − x_hat)² per entry, without sinks.
        l0: mean number of active features per token.
    """

    layer: int
    option: Option
    fvu: float | None
    calm: float | None
    normed: float | None
    loss: float
    l0: float


@dataclass(frozen=True)
class SiteTarget:
    """A write site's tokens, and their summed squared distances from their mean: over all tokens, without sinks, and
    normed."""

    x: Float[Tensor, "token d_model"]
    spread: Float[Tensor, " way"]


def options(encoders: Sequence[str], decoders: int) -> Iterator[Option]:
    """Every option. The decoder for the n-th target layer may write up to n layers after the first one."""
    for decoder in range(decoders):
        later = [SiteSpec(name, n) for n in range(1, decoder + 2) for name in SITE_NAMES if name != "resid_pre"]
        for read in map(SiteSpec, SITE_NAMES):
            behind = [SiteSpec(name) for name in SITE_NAMES if SiteSpec(name).at(0).depth >= read.at(0).depth]
            writes = [read] if read.name in _BRANCHES else [*behind, *later]
            update = [None] if read.name not in ("resid_post", *_BRANCHES) else []
            for encoder in encoders:
                yield from (Option(read, write, encoder, decoder) for write in [*writes, *update])


def sink_mask(streams: Streams) -> Bool[Tensor, " token"]:
    """Tokens whose stream has, at some depth of these blocks, more than `SINK` times the norm of the median token's."""
    masks = []
    for site, x in streams.items():
        if site.whole_stream:
            masks.append(is_sink(x.float().norm(dim=-1)).cpu())
    return torch.stack(masks).any(0)


def rms_normed(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """x / rms(x)."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=_EPS)


def targets(
    streams: Streams, layer: int, sinks: Bool[Tensor, " token"], wanted: Sequence[Option]
) -> dict[SiteSpec | None, SiteTarget]:
    """Every write site that the options name and this layer has."""
    out = {}
    for write in dict.fromkeys(option.write for option in wanted):
        x = _update(streams, layer) if write is None else streams.get(write.at(layer))
        if x is not None:
            out[write] = target(x, sinks)
    return out


def target(x: Float[Tensor, "token d_model"], sinks: Bool[Tensor, " token"]) -> SiteTarget:
    """A write site's tokens."""
    calm, wide = ~sinks.to(x.device), x.float()
    parts = (wide, wide[calm], rms_normed(wide))
    return SiteTarget(x, torch.stack([_spread(part) for part in parts]))


def _spread(x: Float[Tensor, "token d_model"]) -> Float[Tensor, ""]:
    """sum |x − mean x|²; 0 where it is only rounding error."""
    spread = (x - x.mean(0)).square().sum(dtype=torch.float64)
    return torch.where(spread > CONSTANT * x.square().sum(dtype=torch.float64), spread, 0)


def _update(streams: Streams, layer: int) -> Float[Tensor, "token d_model"]:
    before, after = (SiteSpec(name).at(layer) for name in ("resid_pre", "resid_post"))
    return streams[after].float() - streams[before].to(streams[after].device).float()


def fits(
    transcoders: Mapping[str, Sequence[Transcoder]],
    streams: Streams,
    layer: int,
    sinks: Bool[Tensor, " token"],
    wanted: Sequence[Option],
) -> list[Fit]:
    """Every wanted option that exists at this layer.

    Args:
        transcoders: by encoder, one per decoder; the decoders of one encoder share its encoding weights.

    Memory: a d_model vector per token and write site, and 256 MB of pre-activations.
    """
    aims, out = targets(streams, layer, sinks, wanted), []
    for encoder, decoders in transcoders.items():
        for read in dict.fromkeys(option.read for option in wanted):
            here = [o for o in wanted if (o.encoder, o.read) == (encoder, read) and o.write in aims]
            if here and read.at(layer) in streams:
                out += _one_read(decoders, streams[read.at(layer)], layer, sinks, here, aims)
    return out


def _one_read(
    decoders: Sequence[Transcoder],
    x: Float[Tensor, "token d_model"],
    layer: int,
    sinks: Bool[Tensor, " token"],
    wanted: Sequence[Option],
    aims: Mapping[SiteSpec | None, SiteTarget],
) -> list[Fit]:
    sums = {option: torch.zeros(3, dtype=torch.float64) for option in wanted}
    active = 0
    for rows in torch.arange(len(x)).split(max(1, _PREACTIVATIONS_AT_ONCE // decoders[0].d_features)):
        part = x[rows.to(x.device)]
        acts = decoders[0].encode(part)
        active += int((acts.values > 0).sum())
        for number, transcoder in enumerate(decoders):
            whole = transcoder.reconstruct(acts, part)
            normed, calm = rms_normed(whole), ~sinks[rows].to(whole.device)
            for option in wanted:
                if option.decoder == number:
                    aim = aims[option.write].x
                    sums[option] += _errors(aim[rows.to(aim.device)].to(whole), whole, normed, calm)
    calm_entries = int((~sinks).sum()) * x.shape[1]
    return [_fit(layer, option, sums[option], aims[option.write], calm_entries, active / len(x)) for option in wanted]


def _errors(
    x: Float[Tensor, "token d_model"],
    whole: Float[Tensor, "token d_model"],
    normed: Float[Tensor, "token d_model"],
    calm: Bool[Tensor, " token"],
) -> Float[Tensor, " way"]:
    error = (x - whole).square().sum(-1, dtype=torch.float64)
    normed_error = (rms_normed(x) - normed).square().sum(dtype=torch.float64)
    return torch.stack([error.sum(), error[calm].sum(), normed_error]).cpu()


def _fit(layer: int, option: Option, errors: Tensor, aim: SiteTarget, calm_entries: int, l0: float) -> Fit:
    spread = aim.spread.tolist()
    shares = [error / var if var > 0 else None for error, var in zip(errors.tolist(), spread, strict=True)]
    return Fit(layer, option, shares[0], shares[1], shares[2], float(errors[1]) / max(1, calm_entries), l0)


Load = Callable[[int], dict[str, list[Transcoder]]]
"""A layer's transcoders, by encoder and decoder."""
