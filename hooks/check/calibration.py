"""Measure which sites a set of transcoders reads and writes, and with which encoder.

texts → every site of the model (one pass) → FVU of every read site × write site × encoder → candidates near the best
→ the one whose decoder cannot be improved (`hooks.check.avoidable`) → verdict

FVU decides between candidates whose FVU differs by 0.05 or more. It cannot decide between closer ones: a target that is
easier to reconstruct has the smaller error even for a decoder that was trained on another target. The avoidable error
can.

How many features TopK keeps, or whether there is a TopK at all, is not decided here (`hooks.check.selection_rule`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from hooks.check.block_by_block import TextRows, rows_of
from hooks.check.fits import Fit, Option, options
from hooks.check.measure import CheckPasses, Settled
from hooks.check.selection_rule import selection
from hooks.check.texts import Texts
from hooks.check.verdict import CandidateRanking, decide, doubts, layer_findings, rank, remarks
from hooks.checkpoints import DecoderFinding, Findings
from hooks.choices import CHECK_TOKENS
from hooks.errors import CheckpointError
from hooks.formats import Checkpoint, encoders
from hooks.host import Host, fingerprint
from hooks.sites import SiteSpec


@dataclass(frozen=True)
class Calibration:
    """The findings, and the measurements they are based on.

    Attributes:
        findings: the part that is saved.
        fits: every candidate at every layer.
        ranking: of the first decoder that was measured.
    """

    findings: Findings
    fits: tuple[Fit, ...]
    ranking: CandidateRanking


def calibrate(
    host: Host,
    checkpoint: Checkpoint,
    texts: Texts,
    *,
    tokens: int = CHECK_TOKENS,
    layers: Sequence[int] | None = None,
    read: SiteSpec | None = None,
    write: SiteSpec | None = None,
    encoder: str | None = None,
    decoder: int | None = None,
    k: int | None = None,
    model: str = "in memory",
    progress: bool = False,
) -> Calibration:
    """Measure which sites a described set reads and writes on a model.

    Args:
        texts: to measure on; the first `tokens` tokens are used.
        layers: measure only these.
        read, write, encoder, decoder: only candidates with these.
        k: how many features TopK keeps, if the files do not say.
        model: the model's name, stored in the findings.

    Memory: the sites of two or three blocks for all tokens, one layer's transcoders, 256 MB of pre-activations.

    Raises:
        CheckpointError: the set is of another width, has no such layer, encoder or decoder, or none of its layers is in
            the model.
        PromptError: there is no text.
    """
    found = CheckPasses.of(host, checkpoint, layers, k, _wanted(checkpoint, read, write, encoder, decoder))
    rows = rows_of(host, texts.texts, tokens)
    bar = tqdm(total=found.steps, desc="check", unit="layer", disable=not progress, leave=False)
    with bar, torch.no_grad():
        found = found.with_best_rule(rows, bar)
        measured, sinks = found.grid(rows, found.layers, bar)
        rankings = [ranking for number in found.decoders if (ranking := rank(_of(measured, number)))]
        if not rankings:
            raise CheckpointError(
                "nothing can be measured: every site is constant on this text",
                expected="a text of more than one token, and a model whose streams differ",
            )
        settled = found.settle(rows, rankings, bar)
    facts = _conclude(found, rows, measured, sinks, rankings, settled)
    findings = Findings(text=texts.name, model=model, fingerprint=fingerprint(host.tails()), **facts)
    return Calibration(findings, tuple(measured), rankings[0])


def _wanted(
    checkpoint: Checkpoint, read: SiteSpec | None, write: SiteSpec | None, encoder: str | None, decoder: int | None
) -> tuple[Option, ...]:
    for asked, known, name in (
        (encoder, tuple(encoders(checkpoint)), "encoder"),
        (decoder, tuple(range(checkpoint.decoders)), "decoder"),
    ):
        if asked is not None and asked not in known:
            raise CheckpointError(
                f"the set has no {name} {asked}", expected=", ".join(map(str, known)), where=f"--{name}"
            )
    every = options(tuple(encoders(checkpoint)), checkpoint.decoders)
    chosen = tuple(
        option
        for option in every
        if (read is None or option.read == read)
        and (write is None or option.write == write)
        and (encoder is None or option.encoder == encoder)
        and (decoder is None or option.decoder == decoder)
    )
    if not chosen:
        raise CheckpointError(
            f"no candidate reads {read or 'any site'} and writes {write or 'any site'}",
            expected="a write site at or behind the read site",
            where="--read / --write",
        )
    return chosen


def _conclude(
    found: CheckPasses,
    rows: TextRows,
    measured: Sequence[Fit],
    sinks: int,
    rankings: Sequence[CandidateRanking],
    settled: Settled,
) -> dict[str, Any]:
    """The measurements as fields of `Findings`."""
    decisions = [decide(ranking, settled.mean(ranking.layers), rows.n_tokens - sinks) for ranking in rankings]
    first, best = decisions[0], decisions[0].best
    by_layer = {layer: float(part.avoidable.sum()) for layer, part in settled.evidence.get(best, {}).items()}
    at_layers = layer_findings(_of(measured, best.decoder), best, found.checkpoint, by_layer)
    several = [DecoderFinding(best=d.candidates[0], verdict=d.verdict, margin=d.margin) for d in decisions]
    against = doubts(first, rankings[0], at_layers)
    good = first.verdict != "none is good"
    return {
        "verdict": first.verdict,
        "other_model": bool(against),
        "best": first.candidates[0],
        "margin": first.margin,
        "ranking": first.candidates,
        "layers": at_layers,
        "selection": selection(found.checkpoint, found.rule, settled.curves.get(best, []), good),
        "decoders": tuple(several if len(several) > 1 else ()),
        "notes": (*against, *remarks(first, rankings[0], at_layers, found.checkpoint, rows.n_tokens)),
        "tokens": rows.n_tokens,
        "sinks": sinks,
        "date": datetime.now(UTC).date().isoformat(),
        "program": f"qwen-circuits {version('qwen-circuits')}",
    }


def _of(measured: Sequence[Fit], decoder: int) -> list[Fit]:
    return [fit for fit in measured if fit.option.decoder == decoder]
