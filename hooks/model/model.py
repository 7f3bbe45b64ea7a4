"""`HookedModel`: the public face over host, store, recording, swap and interventions. Thin."""

import functools
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar, cast, overload

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig

from hooks.checkpoints import TranscoderStore
from hooks.demo import WEIGHTS
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
from hooks.errors import CheckpointError, ModelError, TargetError, UserError, first_line
from hooks.generation import (
    Comparison,
    DoseResponse,
    Generated,
    Observed,
    Observer,
    Sampling,
    Session,
    Setting,
    Strength,
    Token,
    check_length,
    compare_steering,
    dose_response,
    generate,
    left_pads,
    observed_layers,
    stop_strings,
)
from hooks.host import (
    Batch,
    Exclusive,
    Hold,
    HoldLike,
    Host,
    Precision,
    Prompt,
    Prompts,
    check_hold,
    choose_precision,
    computing,
    exclusive,
    fingerprint,
    holding,
    is_half,
    is_one,
    listed,
    measured,
    tap,
)
from hooks.lens import FeatureCache, LensHook, Passes, boot, fwd_hooks, lens_edits
from hooks.memory import Ask, Task, ask_for, explained
from hooks.names import dtype_of, transcoder_folder
from hooks.passes import (
    Interventions,
    Recording,
    SiteQuality,
    Swap,
    SwapEffect,
    Where,
    as_interventions,
    check_modes,
    inactive,
    lists_per_row,
    make_edits,
    make_plan,
    marked,
    record,
    site_quality,
    swap_effect,
)
from hooks.readout import Effect, RankedToken, Rounding, effect, rounding, token_name
from hooks.renamed import keywords
from hooks.sites import Site, SiteSpec, module_at
from hooks.transcoder import Transcoder
from hooks.types import AddressLike, Edit, ErrorMode, FeatureAddress, MaskMode
from hooks.whole import whole, wholes

Transcoders = str | Path | TranscoderStore | Sequence[Transcoder]
ROWS_PER_PASS = 256


@dataclass(frozen=True)
class Run:
    """One prompt, run plain and run with interventions. Logits are formed where they are asked for.

    Attributes:
        before, after: the streams behind the final norm of the plain and of the edited run.
        precision: in which arithmetic both were computed.
    """

    batch: Batch
    before: Float[Tensor, "pos d_model"]
    after: Float[Tensor, "pos d_model"]
    host: Host
    precision: str
    store: TranscoderStore
    interventions: tuple[Any, ...] = ()

    @cached_property
    @measured
    def inactive(self) -> tuple[FeatureAddress, ...]:
        """Addresses of interventions whose feature the clean run activates at none of the tokens they name: to ablate
        or scale it does nothing. Found by one more pass, when it is asked for."""
        return inactive(self.host, self.store, self.batch, self.interventions)

    @cached_property
    def baseline(self) -> Float[Tensor, "pos vocab"]:
        """Logits of the plain run, at every position."""
        return self.host.unembed(self.before)

    @cached_property
    def logits(self) -> Float[Tensor, "pos vocab"]:
        """Logits of the edited run, at every position."""
        return self.baseline if self.after is self.before else self.host.unembed(self.after)

    @keywords(position="pos")
    def effect(
        self, target: str | SupportsIndex | None = None, against: str | SupportsIndex | None = None, pos: int = -1
    ) -> Effect:
        """What happened to a target token at one position; by default the clean run's answer at the last token.

        Raises:
            TargetError: target or against is not one token, or the position does not occur.
        """
        place = self._place(pos)
        before, after = (self.host.unembed(stream[place]) for stream in (self.before, self.after))
        token = int(before.argmax()) if target is None else self.host.token_id(target)
        other = None if against is None else self.host.token_id(against)
        if token == other:
            raise TargetError("target and against are the same token", found=repr(self.host.string(token)))
        return effect(before, after, token, other, string=self.host.string)

    def __repr__(self) -> str:
        """One line: how long the prompt is, and the answer before and after."""
        before, after = (token_name(top.token, top.id) for (top,) in (self.top_before(1), self.top_after(1)))
        return f"Run({len(self.before)} tokens, answer {before} → {after})"

    def _repr_html_(self) -> str:
        """For notebooks: the likeliest next tokens before and after."""
        rows = zip(self.top_before(), self.top_after(), strict=True)
        cells = [[(token_name(top.token, top.id), f"{top.prob:.3f}") for top in pair] for pair in rows]
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(name)}</td><td>{prob}</td>" for name, prob in row) + "</tr>"
            for row in cells
        )
        return f"<table><tr><th colspan='2'>plain</th><th colspan='2'>with interventions</th></tr>{body}</table>"

    @keywords(position="pos")
    def top_before(self, n: int = 5, pos: int = -1) -> list[RankedToken]:
        """The clean run's most likely next tokens."""
        return self.host.top(self.host.unembed(self.before[self._place(pos)]), n)

    @keywords(position="pos")
    def top_after(self, n: int = 5, pos: int = -1) -> list[RankedToken]:
        """The edited run's most likely next tokens."""
        return self.host.top(self.host.unembed(self.after[self._place(pos)]), n)

    def _place(self, pos: int) -> int:
        length = len(self.before)
        return whole(pos, "position", least=-length, most=length - 1)


@dataclass(frozen=True)
class SwapReport:
    """Reconstruction quality per layer, and what replacing the chosen layers did.

    Attributes:
        positions: where sites were replaced, and what `layers` is over.
        measured: what `effect` is over.
    """

    layers: tuple[SiteQuality, ...]
    effect: SwapEffect
    run: Run
    positions: tuple[int, ...]
    measured: tuple[int, ...]


Method = TypeVar("Method", bound=Callable[..., Any])


def _within_memory(task: Task) -> Callable[[Method], Method]:
    """A method of `HookedModel` whose first argument is a prompt; where memory runs out, it says what would fit."""

    def wrap(method: Method) -> Method:
        @functools.wraps(method)
        def explaining(model: "HookedModel", *args: Any, **options: Any) -> Any:
            def ask() -> Ask:
                bound = signature(method).bind(model, *args, **options).arguments
                prompt: Any = bound.get("prompt", bound.get("prompts"))
                return replace(model.request(prompt), new=int(bound.get("max_new_tokens", 32)))

            with explained(f"running {task}", model.host.device_of(0), ask, task):
                return method(model, *args, **options)

        return cast(Method, explaining)

    return wrap


class HookedModel:
    """A language model and its transcoders.

    Example:
        >>> from hooks import Ablate, HookedModel
        >>> model = HookedModel.load("demo")
        >>> model.run("fact: the capital of the state containing Dallas is").top_before(1)[0].token
        ' Austin'
    """

    def __init__(self, host: Host, store: TranscoderStore, name: str = "in memory", *, precision: str | None = None):
        self.host, self.store, self.name = host, store, name
        self.precision: Precision = choose_precision(host, precision)
        _check_fit(host, store)
        for layer in store.layers:
            store.place(layer, host.device_of(min(layer, host.n_layers - 1)))
        self_test(host, store)

    @classmethod
    def load(
        cls,
        name: str | Path = "demo",
        transcoders: Transcoders | None = None,
        *,
        read: str | SiteSpec | None = None,
        write: str | SiteSpec | None = None,
        k: int | None = None,
        encoder: str | None = None,
        decoder: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        device_map: str | None = None,
        layers: Sequence[int] | None = None,
        budget_bytes: int | None = None,
        context: int | None = None,
        precision: str | None = None,
    ) -> "HookedModel":
        """Load a model and its transcoders.

        Args:
            name: `demo` (embedded, offline), a local folder, or a hub id.
            transcoders: `demo` or `demo-dense` (embedded), a local folder, a hub id, or transcoders in memory.
            read, write, k, encoder, decoder, layers, budget_bytes: see `TranscoderStore.open`.
            dtype: precision of the language model, such as `bfloat16`; the checkpoint's own by default.
            device: move the model there; `device_map` lets accelerate spread it instead.
            context: how many tokens the model may be given, where its config says too few (`hooks.host.context`).
            precision: in which arithmetic a half-precision model's effects are measured: `exact` (fp32 over the weights
                as they are stored; the default) or `native` (the model's own rounding). See `hooks.host.arithmetic`.

        Raises:
            ModelError, CheckpointError: something is not there, damaged, or does not fit together.
        """
        demo = str(name) == "demo"
        if transcoders is None:
            if not demo:
                raise CheckpointError(
                    f"no transcoders given for {name}",
                    expected="a folder or hub id, for example KokosDev/qwen25-32b-clt",
                    repair="--transcoders PATH_OR_ID",
                )
            transcoders = "demo"
        chosen = _placement(device, device_map)  # looked at before minutes of loading
        wanted = dtype_of(dtype)
        sites: dict[str, Any] = {"read": read, "write": write, "k": k, "encoder": encoder, "decoder": decoder}
        store = _open_store(transcoders, **sites, layers=layers, budget_bytes=budget_bytes)
        where = chosen or torch.device("cuda" if device_map and torch.cuda.is_available() else "cpu")

        def ask() -> Ask:
            config = AutoConfig.from_pretrained(WEIGHTS if demo else name, trust_remote_code=False)
            held = wanted or config.dtype or torch.bfloat16
            return ask_for(config.to_dict(), store, 32, held, where.type)

        with explained("loading the model", where, ask):
            placed: dict[str, Any] = {"device": device, "device_map": device_map, "context": context}
            return cls(load_host(name, dtype=wanted, **placed), store, str(name), precision=precision)

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        tokenizer: Any,
        transcoders: Transcoders,
        *,
        read: str | SiteSpec | None = None,
        write: str | SiteSpec | None = None,
        k: int | None = None,
        encoder: str | None = None,
        decoder: int | None = None,
        layers: Sequence[int] | None = None,
        budget_bytes: int | None = None,
        context: int | None = None,
        name: str = "in memory",
        precision: str | None = None,
    ) -> "HookedModel":
        """A transformers model that is already in memory. Its parameters' `requires_grad` is turned off."""
        sites: dict[str, Any] = {"read": read, "write": write, "k": k, "encoder": encoder, "decoder": decoder}
        store = _open_store(transcoders, **sites, layers=layers, budget_bytes=budget_bytes)
        return cls(Host(model, tokenizer, context), store, name, precision=precision)

    def request(self, prompts: Prompts) -> Ask:
        """What running some prompts asks of memory, for `hooks.memory.plan`."""
        batch, model = self.host.batch(listed(prompts)), self.host.model
        loaded: Any = model.config
        tokens, config = max(batch.lengths), dict(loaded.to_dict())
        asked = ask_for(config, self.store, tokens, next(model.parameters()).dtype, self.host.device_of(0).type)
        return replace(asked, batch=len(batch.lengths))

    @property
    def computes_in(self) -> str:
        """How effects are measured: `exact` or `native` on a half-precision model, else the model's own dtype."""
        return self.precision if is_half(self.host) else str(self.host.dtype).removeprefix("torch.")

    def rounding(self, prompt: Prompt, position: int = -1) -> Rounding:
        """What the model's own rounding does to its logits: the model as served against the model as measured.

        Costs one pass in each precision. On a model in fp32 or fp64 both are the same.
        """
        batch, streams = self.host.batch([prompt]), []
        for precision in ("native", "exact"):
            with Exclusive(self.host.layers), computing(self.host, choose_precision(self.host, precision)):
                streams.append(self.host.forward_hidden(batch)[0, position])
        native, exact = (self.host.unembed(stream) for stream in streams)
        return rounding(native, exact)

    @cached_property
    def fingerprint(self) -> str:
        """Tells models and transcoder sets apart by a few of their numbers, wherever they came from and in whatever
        precision they are held."""
        first, last = self.store[self.store.layers[0]], self.store[self.store.layers[-1]]
        return fingerprint([*self.host.tails(), first.W_enc[:2], last.W_dec[-2:]])

    # -- looking -----------------------------------------------------------------------------------------------

    @measured
    @_within_memory("features")
    def record(self, prompts: Prompts, layers: Sequence[int] | None = None) -> Recording:
        """Features, errors, residuals and logits of one pass over one or more prompts."""
        chosen = None if layers is None else self._layers(layers)
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
        chosen = self.store.layers if layers is None else self._layers(layers)
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

    # -- changing ----------------------------------------------------------------------------------------------

    @measured
    @_within_memory("features")
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
        chosen, batch = self._hold(hold, swap), self.host.batch([prompt])
        edits = self._edits(batch, [interventions], swap, error, mask, Where(positions, skip))
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
        chosen, by_lens = self._hold(hold, swap), lens_edits(lens_hooks, self.host.n_layers)
        plans = lists_per_row(interventions, len(prompts))
        out = []
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = self.host.batch(prompts[start : start + ROWS_PER_PASS])
            edits = self._edits(batch, plans[start : start + ROWS_PER_PASS], swap, error, mask, Where(positions, skip))
            with holding(self.host, batch, chosen) as clean:
                out.append(self.host.forward_at(batch, batch.last, [*clean, *edits, *by_lens]))
        return torch.cat(out)

    @overload
    def generate(self, prompt: Prompt, interventions: Interventions = (), **options: Any) -> Generated: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], interventions: Interventions = (), **options: Any
    ) -> list[Generated]: ...

    @exclusive  # type: ignore[misc]
    @_within_memory("generate")
    def generate(  # the overloads leave the options to this signature
        self,
        prompt: Prompts,
        interventions: Interventions = (),
        *,
        max_new_tokens: int = 32,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
        observe: Observed = (),
        use_cache: bool = True,
        lens_hooks: Sequence[LensHook] = (),
        precision: str = "native",
    ) -> Generated | list[Generated]:
        """Continue one prompt, or several in one batch, token by token. Each row is what it would be alone.

        Args:
            interventions: of every row, or a list of lists, one per row.
            sampling: of every row, or one per row; a row's random numbers depend on its own seed only.
            stop: texts that end a row; its text is cut in front of them.
            positions, skip: as in `run`; new tokens are never skipped.
            observe: layers, or `"all"`, whose features at every token come back in `Generated.features`.
            lens_hooks: as in `run`; while tokens are generated a function gets [batch, 1, d_model].
            precision: `native` gives the tokens that transformers gives; `exact` computes in fp32.

        Raises:
            UserError: as `run`; and `error="frozen"`, which is not defined for new tokens, an empty stop string, more
                tokens than fit into the context; nothing has run then. While running: logits that are not numbers.
        """
        prompts = listed(prompt)
        batch = self.host.batch(prompts)
        max_new_tokens = check_length(self.host, max(batch.lengths), max_new_tokens)
        per_row = lists_per_row(interventions, len(prompts))
        edits = self._generation_edits(batch, per_row, swap, error, mask, Where(positions, skip), max_new_tokens)
        edits += lens_edits(lens_hooks, self.host.n_layers)
        layers = observed_layers(self.store, observe)
        out = generate(
            self.host,
            batch,
            edits,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stops=stop_strings(stop),
            observer=Observer(self.store, layers) if layers else None,
            use_cache=use_cache,
            precision=choose_precision(self.host, precision),
        )
        return out[0] if is_one(prompt) else out

    def stream(
        self,
        prompt: Prompt,
        interventions: Interventions = (),
        *,
        max_new_tokens: int = 32,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
        precision: str = "native",
    ) -> Iterator[Token]:
        """`generate`, token by token as they come. Hooks are attached only while the next token is computed.

        Example:
            for token in model.stream(prompt, [Clamp("L3/383", 8.0)]):
                print(token.text, end="", flush=True)

        Raises:
            UserError: as `generate`, at once and not with the first token.
        """
        session = self.session(
            prompt,
            interventions,
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            sampling=sampling,
            new_tokens=max_new_tokens,
            precision=precision,
        )
        return session.stream(max_new_tokens, stop=stop)

    def session(
        self,
        prompt: Prompt,
        interventions: Interventions = (),
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        new_tokens: int | None = None,
        precision: str = "native",
    ) -> Session:
        """A generation that can be stopped, steered otherwise and gone on with, keeping the cache.

        Args:
            new_tokens: how many will follow at most; positions beyond are refused. By default what the context holds.

        Raises:
            UserError: as `generate`.
        """
        batch = self.host.batch([prompt])
        if new_tokens is not None:
            new_tokens = check_length(self.host, batch.lengths[0], new_tokens)
        room = self.host.max_positions - batch.lengths[0] if new_tokens is None else new_tokens

        def make(items: Interventions) -> list[Edit]:
            return self._generation_edits(batch, [items], swap, error, mask, Where(positions, skip), room)

        chosen = choose_precision(self.host, precision)
        return Session(self.host, batch, make, interventions, sampling, chosen)

    def _generation_edits(
        self,
        batch: Batch,
        per_row: Sequence[Interventions],
        swap: str | Sequence[int] | None,
        error: ErrorMode,
        mask: MaskMode,
        where: Where,
        new_tokens: int,
    ) -> list[Edit]:
        if swap is not None and error == "frozen":
            raise UserError(
                "a frozen error exists for the prompt only, not for generated tokens",
                repair="use live or zero",
            )
        return self._edits(batch, per_row, swap, error, mask, where, new_tokens)

    @exclusive
    def steer(
        self, prompt: Prompt, interventions: Interventions, *, texts: Sequence[Prompt] = (), **setting: Any
    ) -> Comparison:
        """Continue a prompt plain and steered, side by side, with every token's probability under both models.

        Args:
            interventions: `hooks.generation.strength.Steer`, whose strength may be relative, or anything `run` accepts.
            texts: where typical activations are measured beside the prompt.
            setting: fields of `hooks.generation.comparison.Setting`: max_new_tokens, sampling, stop, swap, error, mask.

        Raises:
            UserError: as `generate`; or a strength cannot be read or measured.
        """
        return compare_steering(self, prompt, interventions, setting=Setting(**setting), texts=texts)

    @exclusive
    def dose(
        self,
        prompt: Prompt,
        interventions: Interventions,
        strengths: str | Sequence[float | str | Strength],
        *,
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        texts: Sequence[Prompt] = (),
        **setting: Any,
    ) -> DoseResponse:
        """The same at every strength of a grid, which each `Steer` without a strength takes; see `steer` and
        `hooks.generation.dose.dose_response`."""
        return dose_response(
            self,
            prompt,
            interventions,
            strengths,
            target=target,
            against=against,
            setting=Setting(**setting),
            texts=texts,
        )

    @keywords(position="pos")
    @measured
    def effects(
        self,
        prompt: Prompt,
        interventions: Interventions,
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        **options: Any,
    ) -> Effects:
        """Total, direct and indirect effect of an edit on logit(target) − logit(against), and what single modules add;
        options and errors as in `hooks.effects.paths.effects`: pos, hold, receivers.

        Example:
            model.effects(prompt, [Ablate("L1/5@3")], "Austin", receivers="all").through
        """
        batch = self.host.batch([prompt])
        return effects(self.host, self.store, batch, interventions, target, against, **options)

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
        **options: Any,
    ) -> Sweep:
        """Measure the effect of many interventions on the next token, each exact; thousands cost little more than one.

        Args:
            groups: sets of interventions, each run on its own; None: every active feature of the prompt, one by one, at
                some `layers` and `positions`, with what `change` says.
            target, against: tokens of the metric logit(target) − logit(against); the clean run's two best by default.
            options: see `hooks.effects.sweeping.sweep`.

        Raises:
            UserError: as `hooks.effects.sweeping.sweep`, and as `Change`.
        """
        batch = self.host.batch([prompt])
        if groups is None:
            chosen = None if layers is None else self._layers(layers)
            recording = record(self.host, self.store, batch, chosen)
            groups = changed(active_features(recording, chosen, positions), change, recording)
        own, other = (None if token is None else self.host.token_id(token) for token in (target, against))
        return sweep(self.host, self.store, batch, groups, target=own, against=other, **options)

    @keywords(position="pos")
    @measured
    def path_effect(
        self,
        prompt: Prompt,
        sender: object,
        receiver: AddressLike,
        through: Through = "all",
        **options: Any,
    ) -> PathEffect:
        """What an edit does to a feature along the skip connection and the named modules only, and what that feature
        then does to the logits; exact meaning, options and errors in `hooks.effects.paths.path_effects`.

        Example:
            model.path_effect(prompt, Ablate("L1/5@3"), "L3/7@-1", through=["attn_out 2"], target="Austin")
        """
        batch = self.host.batch([prompt])
        return path_effects(self.host, self.store, batch, [sender], [receiver], through, **options)[0]

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
        chosen = self._layers(layers)
        run = self.run(prompt, swap=chosen, error=error, positions=positions, skip=skip)
        recording = record(self.host, self.store, run.batch, chosen)
        length = run.batch.lengths[0]
        swapped = Where(positions, skip).on(self.host, run.batch).in_prompt(0, length)
        measured = tuple(range(swapped[0], length))
        quality = tuple(site_quality(recording, layer, marked(swapped, length)) for layer in chosen)
        effect = swap_effect(run.baseline[None], run.logits[None], marked(measured, length))
        return SwapReport(quality, effect, run, swapped, measured)

    @measured
    def edits(
        self,
        batch: Batch,
        interventions: Interventions,
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        new_tokens: int = 0,
    ) -> list[Edit]:
        """The edits of a batch, one list of interventions per row, for `host.forward`; `new_tokens` may follow it."""
        new_tokens = whole(new_tokens, "new_tokens", least=0)
        per_row = lists_per_row(interventions, len(batch.lengths))
        return self._edits(batch, per_row, swap, error, mask, Where(positions, skip), new_tokens)

    def _edits(
        self,
        batch: Batch,
        per_row: Sequence[Interventions],
        swap: str | Sequence[int] | None,
        error: ErrorMode,
        mask: MaskMode,
        where: Where,
        new_tokens: int = 0,
    ) -> list[Edit]:
        check_modes(error, mask, swapping=swap is not None)
        where.check(swapping=swap is not None)
        pads = left_pads(batch) if new_tokens else ()
        plan = make_plan(self.store, per_row, batch.lengths, new_tokens=new_tokens, mask=mask, pads=pads)
        return make_edits(self.store, plan, self._swap(batch, swap, error, where, new_tokens))

    def _swap(
        self, batch: Batch, swap: str | Sequence[int] | None, error: ErrorMode, where: Where, new_tokens: int
    ) -> Swap | None:
        if swap is None:
            return None
        layers, places = self._layers(swap), where.on(self.host, batch, new_tokens)
        clean = {}
        if error == "frozen":
            recording = record(self.host, self.store, batch, layers)
            clean = {layer: seen.error for layer, seen in recording.layers.items()}
        return Swap(layers, error, clean, places)

    def _hold(self, hold: HoldLike, swap: str | Sequence[int] | None) -> Hold:
        replaced = [] if swap is None else [self.store.sites(layer)[1] for layer in self._layers(swap)]
        return check_hold(hold, self.host.n_layers, replaced)

    def _layers(self, layers: str | Sequence[int]) -> tuple[int, ...]:
        if layers == "all":
            return self.store.layers
        if isinstance(layers, str):
            raise UserError(f"unknown layers {layers!r}", expected='"all" or a list of layer numbers')
        chosen = wholes(layers, "layers")
        for layer in chosen:
            self.store.require(layer)
        return tuple(sorted(set(chosen)))

    # -- TransformerLens ---------------------------------------------------------------------------------------

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
        check_modes(error, mask, swapping=swap is not None)
        where = Where(positions, skip)
        where.check(swapping=swap is not None)
        replaced = None if swap is None else Swap(self._layers(swap), error)
        options: dict[str, Any] = {"swap": replaced, "where": where, "mask": mask, "max_new_tokens": max_new_tokens}
        return fwd_hooks(self.host, self.store, self._bridge_passes, interventions, **options)

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


def self_test(host: Host, store: TranscoderStore) -> None:
    """Tiny passes: sites are where we think they are, and edits that do nothing change nothing, bit for bit.

    Raises:
        ModelError: this model's blocks are not wired as expected; nothing measured on it could be trusted.
    """
    batch = host.batch([[0, min(1, host.d_vocab - 1), 0]])
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    layers = sorted({0, min(1, host.n_layers - 1), host.n_layers - 1})
    final, seen = host.capture(batch, [Site(name, layer) for layer in layers for name in names])
    logits = host.unembed(final)
    _check_logits(host, batch, seen[Site("resid_post", host.n_layers - 1)], logits)
    for layer in layers:
        pre, attention, mid, out, post = (seen[Site(name, layer)] for name in names)
        wired = mid.shape == (1, 3, host.d_model) and torch.equal(mid + out, post) and torch.equal(pre + attention, mid)
        if not wired:
            raise ModelError(
                f"block {layer} of {type(host.model).__name__} is not pre + attention = mid, mid + mlp = post",
                expected="a pre-norm decoder as in Qwen2, Qwen3 or Llama",
            )
    before, after = Site("resid_post", 0), Site("resid_pre", 1)
    if host.n_layers > 1 and not torch.equal(seen[before], seen[after].to(seen[before].device)):
        raise ModelError("what block 0 puts out is not what block 1 takes in")
    empty = make_edits(store, make_plan(store, [()], batch.lengths), Swap(store.layers, "live"))
    touched: dict[Site, Tensor] = {}
    taps = [tap(site, touched) for layer in store.layers for site in store.sites(layer)]
    if not torch.equal(host.forward(batch, [*empty, *taps]), logits) or len(touched) != len({t.site for t in taps}):
        raise ModelError("an empty edit changes this model's logits, or a site is never reached")


def _check_logits(
    host: Host, batch: Batch, stream: Float[Tensor, "batch pos d_model"], logits: Float[Tensor, "batch pos vocab"]
) -> None:
    with torch.no_grad():
        theirs = host.own_logits(batch, host.decoder.norm(stream)).to(logits.device)
    miss = float((logits - theirs).abs().max())
    if not miss <= 4 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max()) + 1e-30:
        raise ModelError(
            f"{type(host.model).__name__} makes its logits in a way that is not known here",
            expected="the unembedding of what is behind the final norm, scaled or capped as config.json says",
            found=f"logits up to {miss:.2g} from the model's own",
        )


def _check_fit(host: Host, store: TranscoderStore) -> None:
    for layer in store.layers:
        if store.d_model(layer) != host.d_model:
            raise CheckpointError(
                "the transcoders do not fit the model",
                expected=f"width {host.d_model}, the model's hidden size",
                found=f"width {store.d_model(layer)} at layer {layer}",
                where=store.name,
                repair="use the transcoders that were trained on this model",
            )
        read, write = store.sites(layer)
        for site in (read, write):
            module_at(host.model, site)
        if write.depth < read.depth:
            raise CheckpointError(
                f"layer {layer} would write {write} before it reads {read}",
                expected="a write site at or behind the read site",
                where=store.name,
                repair="check --read and --write",
            )


def _open_store(transcoders: Transcoders, **options: Any) -> TranscoderStore:
    if isinstance(transcoders, str | Path):
        folder = transcoder_folder(str(transcoders), options.get("layers")).root
        return TranscoderStore.open(folder, name=str(transcoders), **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]} was given for transcoders that are already in memory",
            expected="a folder or hub id, or transcoders that carry it themselves",
            repair=f"leave {given[0]} away, or make the transcoders with it",
        )
    return transcoders if isinstance(transcoders, TranscoderStore) else TranscoderStore.of(list(transcoders))


def load_host(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | None,
    device_map: str | None,
    context: int | None = None,
) -> Host:
    """A language model alone, where it is wanted; see `HookedModel.load`.

    Raises:
        UserError: the device or the precision does not exist, or the model cannot be loaded.
    """
    chosen = _placement(device, device_map)
    path, wanted = WEIGHTS if str(name) == "demo" else name, dtype_of(dtype)
    host = Host.load(path, dtype=wanted, device_map=device_map, context=context)
    if chosen:
        host.model.to(chosen)
    return host


def _placement(device: str | None, device_map: str | None) -> torch.device | None:
    """The one device to move a model to; None: it stays, or accelerate places it."""
    if device and device_map:
        raise UserError("device and device_map contradict each other", repair="give one of them")
    return _device(device) if device else None


def _device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        float(torch.zeros(1, device=chosen))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {device!r} cannot be used", found=first_line(error), where="--device") from None
    return chosen
