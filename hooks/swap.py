"""Reconstructions in place of sites, and how good they are.

swapped site = decode(encode(read site)) + error        error: live, frozen (of the clean run), or zero
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.choices import ERROR_MODES, MASK_MODES
from hooks.errors import UserError
from hooks.recording import LayerRecord, Recording
from hooks.transcoder import Transcoder
from hooks.types import ErrorMode, Pass, SparseActs


def check_modes(error: str, mask: str, *, swapping: bool) -> None:
    """Refuse unknown modes, and an error mode where no site is replaced.

    Raises:
        UserError: naming the known modes.
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
class Swap:
    """Which layers' write sites are replaced, and what becomes of the error.

    `clean_errors` holds the clean run's error per layer; only `frozen` needs it.
    """

    layers: tuple[int, ...]
    error: ErrorMode
    clean_errors: Mapping[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)

    def base(
        self,
        transcoder: Transcoder,
        acts: SparseActs,
        skipped: Float[Tensor, "batch pos d_model"] | None,
        x: Float[Tensor, "batch pos d_model"],
        at: Pass,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The replaced site before any feature is edited; under `live` that is x itself, exactly.

        Args:
            skipped: what the transcoder's skip connection adds, if it has one.
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
    """What replacing sites did to the predictions.

    Attributes:
        kl: mean over real tokens of KL(clean || swapped), nats.
        top1_agreement: share of real tokens whose most likely next token is unchanged.
    """

    kl: float
    top1_agreement: float


def site_quality(recording: Recording, layer: int) -> SiteQuality:
    """Reconstruction quality of one layer over the real tokens of a recording."""
    record: LayerRecord = recording.layers[layer]
    real = recording.batch.mask.to(record.target.device)
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
    """KL and top-1 agreement over the real tokens."""
    before, after = (logits[real.to(logits.device)].float().log_softmax(-1) for logits in (clean, swapped))
    kl = (before.exp() * (before - after)).sum(-1).mean()
    return SwapEffect(float(kl), float((before.argmax(-1) == after.argmax(-1)).float().mean()))
