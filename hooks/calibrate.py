"""What a set of transcoders reads and writes, and with which encoder: measured, not believed.

texts → every site of the model (one pass) → FVU of every read site × write site × encoder → the candidates that are
near the best → whose decoder cannot be improved (`hooks.refit`) → verdict

FVU decides between candidates that are 0.05 or further apart. Nearer ones it cannot tell apart: a target that is easier
to hit has the smaller error even for a decoder that was trained on another. The avoidable error can.

How many features TopK keeps, or whether there is a TopK at all, is not decided here (`hooks.selection`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from hooks.convention import Convention, choose, spans
from hooks.errors import CheckpointError
from hooks.findings import DecoderFinding, Findings
from hooks.formats import Checkpoint, encoders, for_decoder
from hooks.host import Host, stored_tensors
from hooks.refit import avoidable_by_row, by_row
from hooks.selection import Curve, Rule, curve_at, rules, selection
from hooks.site_fits import Fit, Option, fits, options, sink_mask, target
from hooks.sites import SiteSpec
from hooks.store import TranscoderStore
from hooks.texts import Texts
from hooks.transcoder import Transcoder
from hooks.verdict import Evidence, Ranking, decide, doubts, layer_findings, rank, remarks
from hooks.walk import Rows, Streams, rows_of, walk

TOKENS = 4096
_SETTLE_TOKENS, _SETTLE_LAYERS = 4096, 16
_PILOT_TOKENS, _PILOT_LAYERS = 512, 3
_LEAST_ROWS = 8  # with fewer, every token counts as a row
_UNDECIDED = Convention(SiteSpec("resid_pre"), SiteSpec("resid_pre"), "unknown")


def fingerprint(host: Host) -> str:
    """Tells language models apart by a few numbers of every tensor, whatever precision they are held in."""
    digest = hashlib.sha256()
    for parameter in host.model.parameters():
        if not parameter.is_meta:
            for part in stored_tensors(parameter.detach()):
                digest.update(str(tuple(part.shape)).encode())
                ends = part.reshape(-1)[-16:].to("cpu", torch.bfloat16)
                digest.update(ends.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Calibration:
    """What was found, and everything it rests on.

    Attributes:
        findings: what is worth keeping.
        fits: every candidate at every layer.
        ranking: of the first decoder that was measured.
    """

    findings: Findings
    fits: tuple[Fit, ...]
    ranking: Ranking


def calibrate(
    host: Host,
    checkpoint: Checkpoint,
    texts: Texts,
    *,
    tokens: int = TOKENS,
    layers: Sequence[int] | None = None,
    read: SiteSpec | None = None,
    write: SiteSpec | None = None,
    encoder: str | None = None,
    decoder: int | None = None,
    k: int | None = None,
    model: str = "in memory",
    progress: bool = False,
) -> Calibration:
    """Measure what a described set reads and writes on a model.

    Args:
        texts: to measure on; the first `tokens` tokens count.
        layers: measure only these.
        read, write, encoder, decoder: only candidates with these.
        k: what TopK keeps, if the files do not say.
        model: its name, for the record.

    Memory: the sites of two or three blocks for all tokens, one layer's transcoders, 256 MB of pre-activations.

    Raises:
        CheckpointError: the set is of another width, has no such layer, encoder or decoder, or none of its layers is in
            the model.
        PromptError: there is no text.
    """
    found = _Measured.of(host, checkpoint, layers, k, _wanted(checkpoint, read, write, encoder, decoder))
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
    findings = Findings(text=texts.name, model=model, fingerprint=fingerprint(host), **facts)
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
    found: "_Measured",
    rows: Rows,
    measured: Sequence[Fit],
    sinks: int,
    rankings: Sequence[Ranking],
    settled: "_Settled",
) -> dict[str, Any]:
    """What was measured, in the words of `Findings`."""
    decisions = [decide(ranking, settled.mean(ranking.layers)) for ranking in rankings]
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


@dataclass(frozen=True)
class _Settled:
    """Of every contender: per layer, what tells it from the others, and its FVU by k."""

    evidence: dict[Option, dict[int, Evidence]]
    curves: dict[Option, list[tuple[int, Curve]]]

    def mean(self, layers: Sequence[int]) -> dict[Option, Evidence]:
        """Over those of the layers at which it was measured."""
        return {
            option: Evidence.mean([part for layer, part in parts.items() if layer in layers])
            for option, parts in self.evidence.items()
        }


@dataclass(frozen=True)
class _Measured:
    """A set on a model, and how it is gone through."""

    host: Host
    checkpoint: Checkpoint
    options: tuple[Option, ...]
    rule: Rule

    @classmethod
    def of(
        cls,
        host: Host,
        checkpoint: Checkpoint,
        layers: Sequence[int] | None,
        k: int | None,
        wanted: tuple[Option, ...],
    ) -> "_Measured":
        """Refuses what can be refused before anything is computed."""
        for source in checkpoint.layers:
            if source.d_model != host.d_model:
                raise CheckpointError(
                    "the transcoders do not fit the model",
                    expected=f"width {host.d_model}, the model's hidden size",
                    found=f"width {source.d_model} at layer {source.layer}",
                    where=str(checkpoint.root),
                    repair="use the transcoders that were trained on this model",
                )
        known = _part(checkpoint, layers, k)
        inside = tuple(source for source in known.layers if source.layer < host.n_layers)
        if len(inside) < len(known.layers):
            raise CheckpointError(
                "the set has transcoders for layers that the model lacks",
                expected=f"layers 0 to {host.n_layers - 1}",
                found=f"layer {known.layers[-1].layer}",
                where=str(checkpoint.root),
                repair="use the model they were trained on, or name its layers with --layers",
            )
        return cls(host, known, wanted, rules(known)[0])

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are measured."""
        return tuple(source.layer for source in self.checkpoint.layers)

    @property
    def decoders(self) -> tuple[int, ...]:
        """Those that are measured."""
        return tuple(sorted({option.decoder for option in self.options}))

    @property
    def steps(self) -> int:
        """Layers that are gone through, over all passes."""
        possible = rules(self.checkpoint)
        pilot = len(possible) * len(_spread(self.layers, _PILOT_LAYERS)) if len(possible) > 1 else 0
        return pilot + len(self.layers) + min(len(self.layers), _SETTLE_LAYERS)

    @property
    def ahead(self) -> int:
        """How many blocks behind a transcoder's own its write site may be."""
        return max(option.write.offset for option in self.options if option.write)

    def with_best_rule(self, rows: Rows, bar: Any) -> "_Measured":
        """Where the files leave open how features are selected: the rule under which some candidate fits best."""
        possible = rules(self.checkpoint)
        if len(possible) == 1:
            return self
        few, layers = rows.head(_PILOT_TOKENS), _spread(self.layers, _PILOT_LAYERS)
        best: dict[Rule, float] = {}
        for rule in possible:
            ranking = rank(replace(self, rule=rule).grid(few, layers, bar)[0])
            best[rule] = min(ranking.scores.values()) if ranking else float("inf")
        return replace(self, rule=min(possible, key=lambda rule: best[rule]))

    def stores(self) -> dict[str, list[TranscoderStore]]:
        """By encoder, one per decoder."""
        out = {}
        for name, described in encoders(self.checkpoint).items():
            if any(option.encoder == name for option in self.options):
                ruled = replace(described, layers=tuple(map(self.rule.apply, described.layers)))
                parts = [for_decoder(ruled, number) for number in range(ruled.decoders)]
                out[name] = [
                    TranscoderStore.described(part, _UNDECIDED, budget_bytes=1, prefetch=False) for part in parts
                ]
        return out

    def _load(self, stores: dict[str, list[TranscoderStore]], layer: int) -> dict[str, list[Transcoder]]:
        for parts in stores.values():
            for store in parts:
                store.place(layer, self.host.device_of(layer))
        return {name: [store[layer] for store in parts] for name, parts in stores.items()}

    def grid(self, rows: Rows, layers: Sequence[int], bar: Any) -> tuple[list[Fit], int]:
        """Every option at every layer; and how many tokens are sinks somewhere."""
        out: list[Fit] = []
        stores, ever = self.stores(), torch.zeros(rows.n_tokens, dtype=torch.bool)
        for layer, streams in walk(self.host, rows, layers, self.ahead):
            sinks = sink_mask(streams)
            ever |= sinks
            out += fits(self._load(stores, layer), streams, layer, sinks, self.options)
            bar.update()
        return out, int(ever.sum())

    def settle(self, rows: Rows, rankings: Sequence[Ranking], bar: Any) -> _Settled:
        """The contenders' avoidable errors and curves, at up to `_SETTLE_LAYERS` layers."""
        few, stores = rows.head(_SETTLE_TOKENS), self.stores()
        contenders = [option for ranking in rankings for option in ranking.contenders]
        out = _Settled({option: {} for option in contenders}, {option: [] for option in contenders})
        ranked = _spread(rankings[0].layers, _SETTLE_LAYERS)
        others = [layer for layer in self.layers if layer not in rankings[0].layers]  # for the table alone
        for layer, streams in walk(self.host, few, (*ranked, *others), self.ahead):
            transcoders = self._load(stores, layer)
            for option in contenders:
                if option.write and option.write.at(layer) in streams:
                    self._settle_one(transcoders[option.encoder][option.decoder], streams, few, option, out)
            bar.update()
        return out

    def _settle_one(self, transcoder: Transcoder, streams: Streams, rows: Rows, option: Option, out: _Settled) -> None:
        layer, sinks = transcoder.layer, sink_mask(streams)
        assert option.write is not None, "the update is no candidate"
        x, aim = streams[option.read.at(layer)], target(streams[option.write.at(layer)], sinks)
        acts, calm = transcoder.encode(x), ~sinks.to(transcoder.device)
        error = transcoder.error(acts, x, aim.x)[calm]
        features = acts.dense(transcoder.d_features)[calm]
        unit = rows.row if len(rows.row.unique()) >= _LEAST_ROWS else torch.arange(rows.n_tokens)
        own, units, spread = unit[~sinks], int(unit.max()) + 1, float(aim.spread[1])
        out.evidence[option][layer] = Evidence(
            by_row(error.square().sum(-1), own, units) / spread,
            avoidable_by_row(features, error, own, units, spread),
        )
        out.curves[option].append((transcoder.d_features, curve_at(transcoder, x, aim, sinks)))


def _part(checkpoint: Checkpoint, layers: Sequence[int] | None, k: int | None) -> Checkpoint:
    """Some layers, and k if it was given; with all encoders and decoders."""
    if layers is not None:
        sources = {source.layer: source for source in checkpoint.layers}
        missing = sorted(set(layers) - set(sources))
        if missing or not layers:
            raise CheckpointError(
                f"no transcoder for layer {missing[0]}" if missing else "no layers chosen",
                expected=f"layers among {spans(sorted(sources))}",
                where=str(checkpoint.root),
            )
        checkpoint = replace(checkpoint, layers=tuple(sources[layer] for layer in sorted(set(layers))))
    if k is None:
        return checkpoint
    return replace(choose(replace(checkpoint, decoders=1), k=k), decoders=checkpoint.decoders)


def _spread(layers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(layers) <= most:
        return tuple(layers)
    return tuple(layers[round(place * (len(layers) - 1) / (most - 1))] for place in range(most))
