"""`HookedModel`: the public face over host, store, recording, swap and interventions. Thin."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.effects import (
    Change,
    Effects,
    PathEffect,
    Sweep,
    Through,
    active_features,
    changed,
    effects,
    path_effects,
    sweep,
)
from hooks.host import (
    HoldLike,
    Prompt,
    Prompts,
    holding,
    listed,
    measured,
)
from hooks.lens import FeatureCache, LensHook, Passes, boot, fwd_hooks, lens_edits
from hooks.model.base import within_memory
from hooks.model.generating import Generating
from hooks.model.run import Run, SwapReport
from hooks.passes import (
    Interventions,
    Recording,
    RunOptions,
    Where,
    as_interventions,
    inactive,
    lists_per_row,
    marked,
    record,
    site_quality,
    swap_effect,
)
from hooks.renamed import keywords
from hooks.sites import Site, SiteSpec
from hooks.types import AddressLike, ErrorMode, FeatureAddress, MaskMode
from hooks.whole import whole

ROWS_PER_PASS = 256


class HookedModel(Generating):
    """A language model and its transcoders.

    Examples:
        >>> from hooks import Ablate, HookedModel
        >>> model = HookedModel.load("demo")
        >>> model.run("fact: the capital of the state containing Dallas is").top_before(1)[0].token
        ' Austin'
    """

    # -- looking ---------------------------------------------------------------------------------------------------

    @measured
    @within_memory("features")
    def record(self, prompts: Prompts, layers: Sequence[int] | None = None) -> Recording:
        """Features, errors, residuals and logits of one pass over one or more prompts."""
        chosen = None if layers is None else self.store.chosen(layers)
        return record(self.host, self.store, self.host.batch(listed(prompts)), chosen)

    @measured
    def feature_cache(
        self,
        prompts: Prompts,
        layers: Sequence[int] | None = None,
        sites: Sequence[str] = ("resid_pre", "resid_mid", "resid_post"),
    ) -> FeatureCache:
        """One pass as a mapping from TransformerLens names to features, reconstructions, errors and residuals.

        Args:
            layers: whose features are kept; all that have a transcoder by default.
            sites: kept at every block of the model.

        Memory: batch × pos × (d_model + 2 k) numbers per layer with features, an error d_model more while it is in use;
        and d_model per site and block, where `resid_post L` is the same tensor as `resid_pre L+1`; the logits, vocab.

        Raises:
            UserError: there is no such site or layer.
        """
        chosen = self.store.layers if layers is None else self.store.chosen(layers)
        kept = [SiteSpec.parse(name).at(layer) for layer in range(self.host.n_layers) for name in sites]
        kept += [site for layer in chosen for site in self.store.sites(layer)]
        batch = self.host.batch(listed(prompts))
        return FeatureCache(record(self.host, self.store, batch, chosen, streams=list(dict.fromkeys(kept))))

    @measured
    def features(self, prompt: Prompt, top: int = 10, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """The strongest features of each token, a table.

        `strength` is |a_i d_i| / |x|, the share of the stream the feature writes: it is comparable across layers,
        activations are not; NaN where the stream is 0. The `top` strongest per position over all layers, by position.
        """
        top = whole(top, "top", least=1)
        recording = self.record([prompt], layers)
        frames = [self._feature_frame(recording, layer) for layer in recording.layers]
        table = pd.concat(frames, ignore_index=True).sort_values(
            ["pos", "strength", "layer", "feature"], ascending=[True, False, True, True]
        )
        return table.groupby("pos").head(top).reset_index(drop=True)

    def _feature_frame(self, recording: Recording, layer: int) -> pd.DataFrame:
        record = recording.layers[layer]
        values, indices = record.acts.values[0], record.acts.indices[0]
        norms = self.store[layer].W_dec.to(values.dtype).norm(dim=-1)[indices]
        size = record.target[0].to(values.dtype).norm(dim=-1, keepdim=True)
        strength = torch.where(size > 0, values * norms / size, torch.nan)
        pos, slot = (values > 0).nonzero(as_tuple=True)
        tokens = recording.batch.strings[0]
        return pd.DataFrame(
            {
                "pos": pos.tolist(),
                "token": [tokens[p] for p in pos.tolist()],
                "layer": layer,
                "feature": indices[pos, slot].tolist(),
                "activation": values[pos, slot].tolist(),
                "strength": strength[pos, slot].tolist(),
            }
        )

    # -- changing --------------------------------------------------------------------------------------------------

    @measured
    @within_memory("features")
    def run(
        self,
        prompt: Prompt,
        interventions: Interventions = (),
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        hold: HoldLike = "nothing",
        lens_hooks: Sequence[LensHook] = (),
    ) -> Run:
        """One prompt, plain and with interventions.

        Args:
            interventions: `Ablate`, `Clamp`, `Scale`, `Add`, or `(layer, position, feature, value)`; one or many.
            swap: layers whose sites are replaced by their reconstruction: `"all"`, a list, or None for delta form.
            error: what becomes of the reconstruction error at replaced sites.
            mask: whether TopK selects again when a feature is ablated.
            positions: at which tokens sites are replaced: as in an address, an index, a slice, `"1:"`, a list, `"new"`;
                by default at all.
            skip: tokens of the prompt where they are not: `"special"` ones, attention `"sinks"`, or both.
            hold: what stands at its clean value in both runs: parts (`"attention"`, `("attention", "norms")`), or a
                `Hold` with outputs of modules.
            lens_hooks: TransformerLens `(name, fn(activation, hook))` pairs, behind the interventions of their site.

        Raises:
            UserError: anything does not exist or contradicts; nothing has run then. While running: what a lens hook
                returns is no activation.
        """
        options = RunOptions(swap=swap, error=error, mask=mask, positions=positions, skip=skip, hold=hold)
        chosen, batch = options.held(self.host, self.store), self.host.batch([prompt])
        edits = options.edits(self.host, self.store, batch, [interventions])
        edits += lens_edits(lens_hooks, self.host.n_layers)
        with holding(self.host, batch, chosen) as clean:
            before = self.host.forward_hidden(batch, clean)[0]
            after = self.host.forward_hidden(batch, [*clean, *edits])[0] if edits else before
        done = tuple(as_interventions(interventions))
        return Run(batch, before, after, self.host, self.computes_in, self.store, done)

    @measured
    def inactive(self, prompt: Prompt, interventions: Interventions) -> tuple[FeatureAddress, ...]:
        """Addresses of interventions whose feature the prompt activates at none of the tokens they name.

        Raises:
            UserError: as `run`.
        """
        return inactive(self.host, self.store, self.host.batch([prompt]), interventions)

    @measured
    def run_many(
        self,
        prompts: Sequence[Prompt],
        interventions: Interventions | None = None,
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        hold: HoldLike = "nothing",
        lens_hooks: Sequence[LensHook] = (),
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at the last token of many prompts, in packed passes.

        Args:
            interventions: of every prompt, or a list of lists, one per prompt; the rest as in `run`.
        """
        options = RunOptions(swap=swap, error=error, mask=mask, positions=positions, skip=skip, hold=hold)
        chosen, by_lens = options.held(self.host, self.store), lens_edits(lens_hooks, self.host.n_layers)
        plans = lists_per_row(interventions, len(prompts))
        out = []
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = self.host.batch(prompts[start : start + ROWS_PER_PASS])
            edits = options.edits(self.host, self.store, batch, plans[start : start + ROWS_PER_PASS])
            with holding(self.host, batch, chosen) as clean:
                out.append(self.host.forward_at(batch, batch.last, [*clean, *edits, *by_lens]))
        return torch.cat(out)

    @keywords(position="pos")
    @measured
    def effects(
        self,
        prompt: Prompt,
        interventions: Interventions,
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        *,
        pos: int = -1,
        hold: HoldLike = "nothing",
        receivers: str | Sequence[str | Site] = (),
    ) -> Effects:
        """Total, direct and indirect effect of an edit on logit(target) − logit(against), and what single modules add;
        arguments and errors as in `hooks.effects.effects`.

        Examples:
            >>> model.effects(prompt, [Ablate("L1/5@3")], "Austin", receivers="all").through
        """
        about = (self.host, self.store, self.host.batch([prompt]))
        return effects(*about, interventions, target, against, pos=pos, hold=hold, receivers=receivers)

    @keywords(position="pos")
    @measured
    def sweep(
        self,
        prompt: Prompt,
        groups: Interventions | None = None,
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        change: Change = Change(),  # noqa: B008 (frozen)
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        pos: int = -1,
        metrics: Sequence[str] = ("delta", "delta_logit"),
        tokens_at_once: int | None = None,
        progress: bool = False,
    ) -> Sweep:
        """Measure the effect of many interventions on the next token, each exact; thousands cost little more than one.

        Args:
            groups: sets of interventions, each run on its own; None: every active feature of the prompt, one by one, at
                some `layers` and `positions`, with what `change` says.
            target, against: tokens of the metric logit(target) − logit(against); the clean run's two best by default.
            pos, metrics, tokens_at_once, progress: see `hooks.effects.sweep`.

        Raises:
            UserError: as `hooks.effects.sweep`, and as `Change`.
        """
        batch = self.host.batch([prompt])
        if groups is None:
            chosen = None if layers is None else self.store.chosen(layers)
            recording = record(self.host, self.store, batch, chosen)
            groups = changed(active_features(recording, chosen, positions), change, recording)
        own, other = (None if token is None else self.host.token_id(token) for token in (target, against))
        return sweep(
            self.host,
            self.store,
            batch,
            groups,
            target=own,
            against=other,
            pos=pos,
            metrics=metrics,
            tokens_at_once=tokens_at_once,
            progress=progress,
        )

    @keywords(position="pos")
    @measured
    def path_effect(
        self,
        prompt: Prompt,
        sender: object,
        receiver: AddressLike,
        through: Through = "all",
        *,
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        pos: int = -1,
        hold: HoldLike = "nothing",
    ) -> PathEffect:
        """What an edit does to a feature along the skip connection and the named modules only, and what that feature
        then does to the logits; exact meaning, arguments and errors in `hooks.effects.path_effects`.

        Examples:
            >>> model.path_effect(prompt, Ablate("L1/5@3"), "L3/7@-1", through=["attn_out 2"], target="Austin")
        """
        batch = self.host.batch([prompt])
        (found,) = path_effects(
            self.host,
            self.store,
            batch,
            [sender],
            [receiver],
            through,
            target=target,
            against=against,
            pos=pos,
            hold=hold,
        )
        return found

    @measured
    def swap(
        self,
        prompt: Prompt,
        layers: str | Sequence[int] = "all",
        error: ErrorMode = "zero",
        *,
        positions: Any = None,
        skip: str | Sequence[str] = (),
    ) -> SwapReport:
        """Replace sites by their reconstructions and measure: per layer FVU, loss, L0; then KL, top-1 agreement.

        Args:
            positions, skip: where, as in `run`. FVU, loss and L0 are over these tokens; KL and top-1 agreement over all
                from the first of them on, since what comes before is the clean run's.
        """
        chosen = self.store.chosen(layers)
        run = self.run(prompt, swap=chosen, error=error, positions=positions, skip=skip)
        recording = record(self.host, self.store, run.batch, chosen)
        length = run.batch.lengths[0]
        swapped = Where(positions, skip).on(self.host, run.batch).in_prompt(0, length)
        measured = tuple(range(swapped[0], length))
        quality = tuple(site_quality(recording, layer, marked(swapped, length)) for layer in chosen)
        effect = swap_effect(run.baseline[None], run.logits[None], marked(measured, length))
        return SwapReport(quality, effect, run, swapped, measured)

    # -- TransformerLens -------------------------------------------------------------------------------------------

    def fwd_hooks(
        self,
        interventions: Interventions = (),
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        max_new_tokens: int = 0,
    ) -> list[tuple[str, Any]]:
        """`(name, function)` pairs for `bridge.run_with_hooks(tokens, fwd_hooks=...)` of this model's bridge.

        Every row of the input gets all the interventions. Positions count a row's real tokens, padding excluded, also
        while `bridge.generate` goes on token by token, with its cache or without.

        Args:
            swap, error, mask, positions, skip: as in `run`; no frozen error, since a hook knows no clean run.
            max_new_tokens: how many tokens may follow the prompt; 0 is a single pass, and every pass a new prompt.

        Raises:
            UserError: as `run`. While the bridge runs: positions that do not occur in what it is given, padding that
                no attention mask shows, more tokens than announced, or a pass of another bridge.
        """
        max_new_tokens = whole(max_new_tokens, "max_new_tokens", least=0)
        options = RunOptions(swap=swap, error=error, mask=mask, positions=positions, skip=skip)
        where = (self.host, self.store, self._bridge_passes)
        return fwd_hooks(*where, interventions, options=options, max_new_tokens=max_new_tokens)

    @cached_property
    def _bridge_passes(self) -> Passes:
        return Passes()

    @cached_property
    def bridge(self) -> Any:
        """A TransformerBridge on a twin of the model that shares every tensor; the plain model stays as it is.

        It finds its cache by the name that the installed transformers gives it; a bridge booted by other means may not
        (docs/transformerlens.md, "A bridge of your own").

        Raises:
            ModelError: transformer-lens is not installed.
        """
        return boot(self.host, self._bridge_passes, self.name)
