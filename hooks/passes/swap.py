"""Sites replaced by their reconstructions, and how good the reconstructions are.

swapped site = decode(encode(read site)) + error        error: live, frozen (of the clean run), or zero
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.choices import ERROR_MODES, MASK_MODES, SKIPS
from hooks.errors import UserError
from hooks.host import Batch, Host
from hooks.passes.recording import LayerRecord, Recording, sink_tokens
from hooks.transcoder import Transcoder
from hooks.types import ErrorMode, Pass, Positions, SparseActs


def check_modes(error: str, mask: str, *, swapping: bool) -> None:
    """Refuse unknown modes, and an error mode where no site is replaced.

    Raises:
        UserError: a mode is not known, or no site is replaced.
    """
    if error not in ERROR_MODES:
        raise UserError(f"unknown error mode {error!r}", expected=", ".join(ERROR_MODES))
    if mask not in MASK_MODES:
        raise UserError(f"unknown mask mode {mask!r}", expected=", ".join(MASK_MODES))
    if not swapping and error != "live":
        raise UserError(
            f"error={error!r} says what happens at replaced sites, and no site is replaced",
            repair='pass swap="all" or a list of layers, or leave error away',
        )


@dataclass(frozen=True)
class Places:
    """At which tokens sites are replaced.

    Attributes:
        positions: as in an address.
        spared: per row, tokens of the prompt that are excepted; empty: none.
    """

    positions: Positions = field(default_factory=lambda: Positions("all"))
    spared: tuple[tuple[int, ...], ...] = ()

    def mask(self, at: Pass, rows: int, count: int) -> Bool[Tensor, "row pos"] | None:
        """Which tokens of a pass are meant; None: all, padding included, whose streams reach nothing."""
        if self.positions.kind == "all" and not any(self.spared):
            return None
        out = torch.zeros(rows, count, dtype=torch.bool)
        for row, length in enumerate(at.prompt_lengths):
            first = at.first - (at.pads[row] if at.pads else 0)
            out[row] = self.positions.mask(first, count, length)
            spared = self.spared[row] if self.spared else ()
            out[row, [pos - first for pos in spared if first <= pos < first + count]] = False
        return out

    def in_prompt(self, row: int, length: int) -> tuple[int, ...]:
        """The positions of a row's prompt that are meant."""
        spared = self.spared[row] if self.spared else ()
        chosen = self.positions.mask(0, length, length).nonzero()[:, 0].tolist()
        return tuple(pos for pos in chosen if pos not in spared)


@dataclass(frozen=True)
class Where:
    """At which tokens sites are replaced, as a person says it.

    Attributes:
        positions: what a position in an address can be; None and `all`: every token.
        skip: `special` leaves out the tokenizer's special tokens in the prompt, `sinks` its attention sinks.

    Raises:
        UserError: there is no such kind of token to skip.
        AddressError: the positions cannot be read.
    """

    positions: Any = None
    skip: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in SKIPS:
                raise UserError(f"cannot skip {kind!r}", expected=" or ".join(SKIPS), where="skip=")
        self.chosen  # noqa: B018 (read now, so that what cannot be read is refused before a model runs)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tokens that are skipped."""
        return (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)

    @property
    def chosen(self) -> Positions:
        """The positions, parsed."""
        return Positions("all") if self.positions is None else Positions.of(self.positions)

    @property
    def everywhere(self) -> bool:
        """Whether no token is left out."""
        return self.chosen.kind == "all" and not self.kinds

    def check(self, *, swapping: bool) -> None:
        """Refuse named tokens if no site is replaced.

        Raises:
            UserError: tokens are named, and no site is replaced.
        """
        if not swapping and (self.positions is not None or self.kinds):
            raise UserError(
                "positions= and skip= say at which tokens sites are replaced, and no site is replaced",
                repair='pass swap="all" or a list of layers; an intervention has positions of its own, "L3/383@-1"',
            )

    def on(self, host: Host, batch: Batch, new_tokens: int = 0) -> Places:
        """The places in some prompts. To find sinks, the plain model runs once.

        Raises:
            AddressError: the positions do not occur.
            UserError: no token is left.
        """
        positions = self.chosen
        for length in batch.lengths:
            positions.check(length, new_tokens, "positions=")
        if not self.kinds:
            return Places(positions)
        left_out = torch.zeros_like(batch.mask)
        if "special" in self.kinds:
            special = torch.tensor(list(getattr(host.tokenizer, "all_special_ids", ())), dtype=batch.ids.dtype)
            left_out |= torch.isin(batch.ids, special)
        if "sinks" in self.kinds:
            left_out |= sink_tokens(host, batch)
        spared = [row[:length].nonzero()[:, 0].tolist() for row, length in zip(left_out, batch.lengths, strict=True)]
        places = Places(positions, tuple(map(tuple, spared)))
        if not new_tokens and not all(places.in_prompt(row, length) for row, length in enumerate(batch.lengths)):
            raise UserError("no token is left to replace a site at", found=f"positions {positions}, all skipped")
        return places


@dataclass(frozen=True)
class Swap:
    """Which layers' write sites are replaced, at which tokens, and what happens to the reconstruction error.

    `clean_errors` holds the clean run's error per layer; only `frozen` needs it.
    """

    layers: tuple[int, ...]
    error: ErrorMode
    clean_errors: Mapping[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    places: Places = field(default_factory=Places)

    def base(
        self,
        transcoder: Transcoder,
        acts: SparseActs,
        skipped: Float[Tensor, "batch pos d_model"] | None,
        x: Float[Tensor, "batch pos d_model"],
        at: Pass,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The replaced site before any feature is edited. With `live` this is x itself, exactly.

        Args:
            skipped: the skip connection's part of the reconstruction, if there is one.
        """
        if self.error == "live":
            return x
        reconstruction = transcoder.decode(acts)
        if skipped is not None:
            reconstruction = reconstruction + skipped
        x = x.to(reconstruction.device)
        if self.error == "zero":
            return reconstruction
        error = self.clean_errors[transcoder.layer]
        if at.first + x.shape[1] > error.shape[1]:
            raise UserError(
                "the frozen error is known for the prompt only",
                found=f"position {at.first + x.shape[1] - 1}, the clean run had {error.shape[1]} tokens",
                repair="use --error live or zero while generating",
            )
        return reconstruction + error[:, at.first : at.first + x.shape[1]].to(reconstruction)


@dataclass(frozen=True)
class SiteQuality:
    """How well one transcoder reconstructs its site on some text.

    Attributes:
        fvu: sum |x − x_hat|² / sum |x − mean x|², the fraction of variance unexplained; None for a single token, which
            has no variance.
        loss: mean squared error per entry, the unit of the published `final_rec_loss`.
        l0: mean number of active features per token.
    """

    layer: int
    fvu: float | None
    loss: float
    l0: float


@dataclass(frozen=True)
class SwapEffect:
    """The effect of replacing sites on the predictions.

    Attributes:
        kl: mean over the measured tokens of KL(clean || swapped), nats.
        top1_agreement: share of the measured tokens whose most likely next token is unchanged.
    """

    kl: float
    top1_agreement: float


def marked(positions: Sequence[int], length: int) -> Bool[Tensor, "1 pos"]:
    """True at some positions of one prompt."""
    return torch.isin(torch.arange(length), torch.tensor(positions, dtype=torch.int64))[None]


def site_quality(recording: Recording, layer: int, chosen: Bool[Tensor, "batch pos"] | None = None) -> SiteQuality:
    """Reconstruction quality of one layer over the real tokens of a recording, or over some of them."""
    record: LayerRecord = recording.layers[layer]
    real = (recording.batch.mask if chosen is None else recording.batch.mask & chosen).to(record.target.device)
    target, error = record.target.to(record.reconstruction.dtype)[real], record.error[real]
    spread = (target - reduce(target, "token d_model -> 1 d_model", "mean")).square().sum()
    active = (record.acts.values[real] > 0).sum(-1).float().mean()
    fvu = float(error.square().sum() / spread) if spread > 0 else None
    return SiteQuality(layer, fvu, float(error.square().mean()), float(active))


def swap_effect(
    clean: Float[Tensor, "batch pos vocab"],
    swapped: Float[Tensor, "batch pos vocab"],
    real: Bool[Tensor, "batch pos"],
) -> SwapEffect:
    """KL and top-1 agreement over the tokens that `real` marks."""
    before, after = (logits[real.to(logits.device)].float().log_softmax(-1) for logits in (clean, swapped))
    kl = (before.exp() * (before - after)).sum(-1).mean()
    return SwapEffect(float(kl), float((before.argmax(-1) == after.argmax(-1)).float().mean()))
