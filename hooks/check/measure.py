"""The passes of a check over the model: one to choose the selection rule, one over the grid of all candidates, and one
to decide between the best of them.

Each pass runs block by block (`hooks.check.block_by_block`), with one layer's transcoders loaded at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.check.avoidable import avoidable_by_row, by_row
from hooks.check.block_by_block import Streams, TextRows, streams_by_layer
from hooks.check.fits import Fit, Option, fits, sink_mask, target
from hooks.check.selection_rule import Curve, SelectionRule, curve_at, finer, fit_by_rule, rules
from hooks.check.verdict import CLOSE, CandidateRanking, Evidence, rank
from hooks.checkpoints import Convention, TranscoderStore, choose, named_layers
from hooks.errors import CheckpointError
from hooks.formats import Checkpoint, encoders, for_decoder
from hooks.host import Host
from hooks.sites import SiteSpec
from hooks.transcoder import Transcoder

_SETTLE_TOKENS, _SETTLE_LAYERS = 4096, 16
_PILOT_TOKENS, _PILOT_LAYERS, _PILOT_CONTENDERS = 1024, 3, 4
_LEAST_ROWS = 8  # with fewer, every token counts as a row
_UNDECIDED = Convention(SiteSpec("resid_pre"), SiteSpec("resid_pre"), "unknown")


@dataclass(frozen=True)
class Settled:
    """Of every contender, per layer: its evidence, and its FVU by k."""

    evidence: dict[Option, dict[int, Evidence]]
    curves: dict[Option, list[tuple[int, Curve]]]

    def mean(self, layers: Sequence[int]) -> dict[Option, Evidence]:
        """The mean of each contender's evidence over those of the layers at which it was measured."""
        return {
            option: Evidence.mean([part for layer, part in parts.items() if layer in layers])
            for option, parts in self.evidence.items()
        }


@dataclass(frozen=True)
class CheckPasses:
    """The passes of one set over one model."""

    host: Host
    checkpoint: Checkpoint
    options: tuple[Option, ...]
    rule: SelectionRule

    @classmethod
    def of(
        cls,
        host: Host,
        checkpoint: Checkpoint,
        layers: Sequence[int] | None,
        k: int | None,
        wanted: tuple[Option, ...],
    ) -> "CheckPasses":
        """Make one, after all checks that need no computation.

        Raises:
            CheckpointError: the set and the model do not fit together.
        """
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
        """The layers that are measured."""
        return tuple(source.layer for source in self.checkpoint.layers)

    @property
    def decoders(self) -> tuple[int, ...]:
        """The decoders that are measured."""
        return tuple(sorted({option.decoder for option in self.options}))

    @property
    def steps(self) -> int:
        """The number of layers that are measured, summed over all passes; for the progress bar."""
        possible = rules(self.checkpoint)
        pilot = len(possible) * len(_spread(self.layers, _PILOT_LAYERS)) + 1 if len(possible) > 1 else 0
        return pilot + len(self.layers) + min(len(self.layers), _SETTLE_LAYERS)

    @property
    def ahead(self) -> int:
        """How many blocks after a transcoder's own block its write site may be."""
        return max(option.write.offset for option in self.options if option.write)

    def with_best_rule(self, rows: TextRows, bar: Any) -> "CheckPasses":
        """If the files do not say how features are selected: the rule under which the decoder can be improved least.

        First the rule with the smallest FVU of any candidate. Then, for the candidates near the best, the rule with the
        least avoidable error among the rules near that one.
        """
        possible = rules(self.checkpoint)
        if len(possible) == 1:
            return self
        few, layers = rows.head(_PILOT_TOKENS), _spread(self.layers, _PILOT_LAYERS)
        tried = {rule: rank(replace(self, rule=rule).grid(few, layers, bar)[0]) for rule in possible}
        ranked = {rule: ranking for rule, ranking in tried.items() if ranking}
        if not ranked:
            return self
        best = min(ranked, key=lambda rule: min(ranked[rule].scores.values()))
        near = possible if self.checkpoint.layers[0].k_source == "metadata" else finer(best)
        found = self._by_rule(few, ranked[best], near)
        bar.update()
        bound = min(fvu for fvu, _ in found.values()) + CLOSE
        chosen = min((pair for pair in found if found[pair][0] < bound), key=lambda pair: found[pair][1])
        return replace(self, rule=chosen[1])

    def _by_rule(
        self, rows: TextRows, ranking: CandidateRanking, near: Sequence[SelectionRule]
    ) -> dict[tuple[Option, SelectionRule], tuple[float, float]]:
        """FVU and avoidable error, over a few layers, of each of the best candidates under each rule."""
        sums: dict[tuple[Option, SelectionRule], list[tuple[float, float]]] = {}
        stores = replace(self, rule=SelectionRule()).stores()
        for layer, streams in streams_by_layer(self.host, rows, _spread(ranking.layers, _PILOT_LAYERS), self.ahead):
            transcoders, sinks = self._load(stores, layer), sink_mask(streams)
            for option in ranking.contenders[:_PILOT_CONTENDERS]:
                assert option.write is not None, "the update is no candidate"
                x, aim = streams[option.read.at(layer)], target(streams[option.write.at(layer)], sinks)
                coder = transcoders[option.encoder][option.decoder]
                for rule, pair in zip(near, fit_by_rule(coder, x, aim, sinks, _units(rows), near), strict=True):
                    sums.setdefault((option, rule), []).append(pair)
        return {
            pair: (mean(part[0] for part in parts), mean(part[1] for part in parts)) for pair, parts in sums.items()
        }

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

    def grid(self, rows: TextRows, layers: Sequence[int], bar: Any) -> tuple[list[Fit], int]:
        """The fit of every option at every layer, and how many tokens are sinks at some layer."""
        out: list[Fit] = []
        stores, ever = self.stores(), torch.zeros(rows.n_tokens, dtype=torch.bool)
        for layer, streams in streams_by_layer(self.host, rows, layers, self.ahead):
            sinks = sink_mask(streams)
            ever |= sinks
            out += fits(self._load(stores, layer), streams, layer, sinks, self.options)
            bar.update()
        return out, int(ever.sum())

    def settle(self, rows: TextRows, rankings: Sequence[CandidateRanking], bar: Any) -> Settled:
        """The contenders' avoidable errors and curves, at up to `_SETTLE_LAYERS` layers."""
        few, stores = rows.head(_SETTLE_TOKENS), self.stores()
        contenders = [option for ranking in rankings for option in ranking.contenders]
        out = Settled({option: {} for option in contenders}, {option: [] for option in contenders})
        ranked = _spread(rankings[0].layers, _SETTLE_LAYERS)
        others = [layer for layer in self.layers if layer not in rankings[0].layers]  # only for the table
        for layer, streams in streams_by_layer(self.host, few, (*ranked, *others), self.ahead):
            transcoders = self._load(stores, layer)
            for option in contenders:
                if option.write and option.write.at(layer) in streams:
                    self._settle_one(transcoders[option.encoder][option.decoder], streams, few, option, out)
            bar.update()
        return out

    def _settle_one(
        self, transcoder: Transcoder, streams: Streams, rows: TextRows, option: Option, out: Settled
    ) -> None:
        layer, sinks = transcoder.layer, sink_mask(streams)
        assert option.write is not None, "the update is no candidate"
        x, aim = streams[option.read.at(layer)], target(streams[option.write.at(layer)], sinks)
        if not aim.spread[1] > 0:
            return
        acts, calm = transcoder.encode(x), ~sinks.to(transcoder.device)
        error = transcoder.error(acts, x, aim.x)[calm]
        features = acts.dense(transcoder.d_features)[calm]
        unit = _units(rows)
        own, units, spread = unit[~sinks], int(unit.max()) + 1, float(aim.spread[1])
        out.evidence[option][layer] = Evidence(
            by_row(error.square().sum(-1), own, units) / spread,
            avoidable_by_row(features, error, own, units, spread),
        )
        out.curves[option].append((transcoder.d_features, curve_at(transcoder, x, aim, sinks)))


def _units(rows: TextRows) -> Int[Tensor, " token"]:
    """The unit over which errors are summed: the row of each token; or each token alone, if there are few rows."""
    row = rows.row
    return row if int(row.max()) + 1 >= _LEAST_ROWS else torch.arange(rows.n_tokens)


def _part(checkpoint: Checkpoint, layers: Sequence[int] | None, k: int | None) -> Checkpoint:
    """The set with some layers only, and with k if it was given; with all encoders and decoders."""
    if layers is not None:
        checkpoint = replace(checkpoint, layers=named_layers(checkpoint, layers))
    if k is None:
        return checkpoint
    return replace(choose(replace(checkpoint, decoders=1), k=k), decoders=checkpoint.decoders)


def _spread(layers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of the layers, evenly spaced, with the first and the last."""
    if len(layers) <= most:
        return tuple(layers)
    return tuple(layers[round(place * (len(layers) - 1) / (most - 1))] for place in range(most))
