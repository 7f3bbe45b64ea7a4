"""`HookedModel`: the public face over host, store, recording, swap and interventions. Thin."""

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import huggingface_hub
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.demo import TRANSCODERS, WEIGHTS
from hooks.errors import CheckpointError, ModelError, TargetError, UserError, first_line
from hooks.generation import Generated, Sampling, generate
from hooks.host import Batch, Host, Prompt, tap
from hooks.intervene import make_edits, make_plan
from hooks.readout import Effect, RankedToken, effect
from hooks.recording import Recording, record
from hooks.sites import Site, SiteSpec, branches_off, module_at
from hooks.store import TranscoderStore
from hooks.swap import SiteQuality, Swap, SwapEffect, check_modes, site_quality, swap_effect
from hooks.transcoder import Transcoder
from hooks.types import Edit, ErrorMode, MaskMode, Pass

log = logging.getLogger("hooks")

Transcoders = str | Path | TranscoderStore | Sequence[Transcoder]
ROWS_PER_PASS = 256


@dataclass(frozen=True)
class Run:
    """One prompt, run plain and run with interventions."""

    batch: Batch
    baseline: Float[Tensor, "pos vocab"]
    logits: Float[Tensor, "pos vocab"]
    host: Host

    def effect(
        self, target: str | SupportsIndex | None = None, against: str | SupportsIndex | None = None, position: int = -1
    ) -> Effect:
        """What happened to a target token at one position; by default the clean run's answer at the last token.

        Raises:
            TargetError: target or against is not one token.
        """
        before, after = self.baseline[position], self.logits[position]
        token = int(before.argmax()) if target is None else self.host.token_id(target)
        other = None if against is None else self.host.token_id(against)
        if token == other:
            raise TargetError("target and against are the same token", found=repr(self.host.string(token)))
        return effect(before, after, token, other)

    def top_before(self, n: int = 5, position: int = -1) -> list[RankedToken]:
        """The clean run's most likely next tokens."""
        return self.host.top(self.baseline[position], n)

    def top_after(self, n: int = 5, position: int = -1) -> list[RankedToken]:
        """The edited run's most likely next tokens."""
        return self.host.top(self.logits[position], n)


@dataclass(frozen=True)
class SwapReport:
    """Reconstruction quality per layer, and what replacing the chosen layers did."""

    layers: tuple[SiteQuality, ...]
    effect: SwapEffect
    run: Run


class HookedModel:
    """A language model and its transcoders.

    Example:
        >>> from hooks import Ablate, HookedModel
        >>> model = HookedModel.load("demo")
        >>> model.run("fact: the capital of the state containing Dallas is").top_before(1)[0].token
        ' Austin'
    """

    def __init__(self, host: Host, store: TranscoderStore, name: str = "in memory"):
        self.host, self.store, self.name = host, store, name
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
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        device_map: str | None = None,
        layers: Sequence[int] | None = None,
        budget_bytes: int | None = None,
    ) -> "HookedModel":
        """Load a model and its transcoders.

        Args:
            name: `demo` (embedded, offline), a local folder, or a hub id.
            transcoders: `demo` or `demo-dense` (embedded), a local folder, a hub id, or transcoders in memory.
            read, write, k, layers, budget_bytes: see `TranscoderStore.open`.
            dtype: precision of the language model, such as `bfloat16`; the checkpoint's own by default.
            device: move the model there; `device_map` lets accelerate spread it instead.

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
        if device and device_map:
            raise UserError("device and device_map contradict each other", repair="give one of them")
        chosen = _device(device) if device else None  # looked at before minutes of loading
        precision = _dtype(dtype)
        store = _open_store(transcoders, read=read, write=write, k=k, layers=layers, budget_bytes=budget_bytes)
        host = Host.load(WEIGHTS if demo else name, dtype=precision, device_map=device_map)
        if chosen:
            host.model.to(chosen)
        return cls(host, store, str(name))

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
        layers: Sequence[int] | None = None,
        budget_bytes: int | None = None,
        name: str = "in memory",
    ) -> "HookedModel":
        """A transformers model that is already in memory. Its parameters' `requires_grad` is turned off."""
        store = _open_store(transcoders, read=read, write=write, k=k, layers=layers, budget_bytes=budget_bytes)
        return cls(Host(model, tokenizer), store, name)

    @cached_property
    def fingerprint(self) -> str:
        """Tells models and transcoder sets apart by a few of their numbers, wherever they came from and in whatever
        precision they are held."""
        digest = hashlib.sha256()
        first, last = self.store[self.store.layers[0]], self.store[self.store.layers[-1]]
        own = [p.detach().reshape(-1)[-16:] for p in self.host.model.parameters() if not p.is_meta]
        for part in (*own, first.W_enc[:2], last.W_dec[-2:]):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- looking -----------------------------------------------------------------------------------------------

    def record(self, prompts: Prompt | Sequence[Prompt], layers: Sequence[int] | None = None) -> Recording:
        """Features, errors, residuals and logits of one pass over one or more prompts."""
        chosen = None if layers is None else self._layers(layers)
        return record(self.host, self.store, self.host.batch(_listed(prompts)), chosen)

    def features(self, prompt: Prompt, top: int = 10, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """The strongest features of each token, a table.

        `strength` is |a_i d_i| / |x|, the share of the stream the feature writes: it is comparable across layers,
        activations are not. The `top` strongest per position over all layers, positions in order.
        """
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
        strength = values * norms / record.target[0].to(values.dtype).norm(dim=-1, keepdim=True)
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

    def run(
        self,
        prompt: Prompt,
        interventions: Sequence[object] = (),
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
    ) -> Run:
        """One prompt, plain and with interventions.

        Args:
            interventions: `Ablate`, `Clamp`, `Scale`, `Add`, or `(layer, position, feature, value)`.
            swap: layers whose sites are replaced by their reconstruction: `"all"`, a list, or None for delta form.
            error: what becomes of the reconstruction error at replaced sites.
            mask: whether TopK selects again when a feature is ablated.

        Raises:
            UserError: anything does not exist or contradicts; nothing has run then.
        """
        batch = self.host.batch([prompt])
        edits = self._edits(batch, [interventions], swap, error, mask)
        baseline = self.host.forward(batch)[0]
        logits = self.host.forward(batch, edits)[0] if edits else baseline
        return Run(batch, baseline, logits, self.host)

    def run_many(
        self,
        prompts: Sequence[Prompt],
        interventions: Sequence[Sequence[object]] | None = None,
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
    ) -> Float[Tensor, "batch vocab"]:
        """Logits at the last token of many prompts, each with its own interventions, in packed passes."""
        plans = [()] * len(prompts) if interventions is None else interventions
        out = []
        for start in range(0, len(prompts), ROWS_PER_PASS):
            batch = self.host.batch(prompts[start : start + ROWS_PER_PASS])
            edits = self._edits(batch, plans[start : start + ROWS_PER_PASS], swap, error, mask)
            out.append(self.host.forward_at(batch, batch.last, edits))
        return torch.cat(out)

    def generate(
        self,
        prompt: Prompt,
        interventions: Sequence[object] = (),
        *,
        max_new_tokens: int = 32,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        use_cache: bool = True,
    ) -> Generated:
        """Continue a prompt under interventions, token by token.

        Raises:
            UserError: as `run`; and `error="frozen"`, which is not defined for new tokens.
        """
        if max_new_tokens < 1:
            raise UserError(f"cannot generate {max_new_tokens} tokens", expected="at least 1")
        if swap is not None and error == "frozen":
            raise UserError(
                "a frozen error exists for the prompt only, not for generated tokens",
                repair="use live or zero",
            )
        batch = self.host.batch([prompt])
        edits = self._edits(batch, [interventions], swap, error, mask, max_new_tokens)
        return generate(self.host, batch, edits, max_new_tokens=max_new_tokens, sampling=sampling, use_cache=use_cache)

    def swap(self, prompt: Prompt, layers: str | Sequence[int] = "all", error: ErrorMode = "zero") -> SwapReport:
        """Replace sites by their reconstructions and measure: per layer FVU, loss, L0; then KL, top-1 agreement."""
        chosen = self._layers(layers)
        run = self.run(prompt, swap=chosen, error=error)
        recording = record(self.host, self.store, run.batch, chosen)
        quality = tuple(site_quality(recording, layer) for layer in chosen)
        return SwapReport(quality, swap_effect(run.baseline[None], run.logits[None], run.batch.mask), run)

    def edits(
        self,
        batch: Batch,
        interventions: Sequence[Sequence[object]],
        *,
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
    ) -> list[Edit]:
        """The edits of a batch, one list of interventions per row, for `host.forward`."""
        return self._edits(batch, interventions, swap, error, mask)

    def _edits(
        self,
        batch: Batch,
        per_row: Sequence[Sequence[object]],
        swap: str | Sequence[int] | None,
        error: ErrorMode,
        mask: MaskMode,
        new_tokens: int = 0,
    ) -> list[Edit]:
        check_modes(error, mask, swapping=swap is not None)
        plan = make_plan(self.store, per_row, batch.lengths, new_tokens=new_tokens, mask=mask)
        return make_edits(self.store, plan, self._swap(batch, swap, error))

    def _swap(self, batch: Batch, swap: str | Sequence[int] | None, error: ErrorMode) -> Swap | None:
        if swap is None:
            return None
        layers = self._layers(swap)
        clean = {}
        if error == "frozen":
            recording = record(self.host, self.store, batch, layers)
            clean = {layer: seen.error for layer, seen in recording.layers.items()}
        return Swap(layers, error, clean)

    def _layers(self, layers: str | Sequence[int]) -> tuple[int, ...]:
        if layers == "all":
            return self.store.layers
        if isinstance(layers, str):
            raise UserError(f"unknown layers {layers!r}", expected='"all" or a list of layer numbers')
        for layer in layers:
            self.store.require(layer)
        return tuple(sorted(set(layers)))

    # -- TransformerLens ---------------------------------------------------------------------------------------

    def fwd_hooks(self, interventions: Sequence[object]) -> list[tuple[str, Any]]:
        """`(name, function)` pairs for `bridge.run_with_hooks(tokens, fwd_hooks=...)`.

        Every row of the input gets all the interventions; the whole input is the prompt, without padding.

        Raises:
            UserError: the set writes resid_mid, which a bridge hook cannot replace: its `hook_resid_mid` is the branch
                into the MLP, and the stream passes by.
        """
        if branches_off(self.store.convention.write.at(0)):
            raise UserError(
                "an edit of resid_mid cannot be expressed as a TransformerBridge hook", repair="use model.run"
            )
        plan = make_plan(self.store, [interventions], [self.host.max_positions])
        memo: dict[Any, Any] = {}
        made: dict[tuple[int, int], list[Edit]] = {}  # the same edits serve every hook of a pass

        def edits(rows: int, count: int) -> list[Edit]:
            if (rows, count) not in made:
                made.clear()
                made[rows, count] = make_edits(
                    self.store, make_plan(self.store, [interventions] * rows, [count] * rows)
                )
            return made[rows, count]

        def hook(number: int) -> Any:
            def function(act: Tensor, hook: Any) -> Tensor:
                rows, count = act.shape[:2]
                return edits(rows, count)[number].apply(act, Pass(0, [count] * rows, memo))

            return function

        return [(edit.site.lens_name, hook(number)) for number, edit in enumerate(make_edits(self.store, plan))]

    @cached_property
    def bridge(self) -> Any:
        """A TransformerBridge on a twin of the model that shares every tensor; the plain model stays as it is.

        Raises:
            ModelError: transformer-lens is not installed.
        """
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError:
            raise ModelError("transformer-lens is not installed", repair="pip install 'qwen-circuits[lens]'") from None
        model = self.host.model
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, memo=shared)
        dtype = next(model.parameters()).dtype
        name = str(getattr(model.config, "_name_or_path", "") or self.name)
        return TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=self.host.tokenizer, dtype=dtype)


def self_test(host: Host, store: TranscoderStore) -> None:
    """Tiny passes: sites are where we think they are, and edits that do nothing change nothing, bit for bit.

    Raises:
        ModelError: this model's blocks are not wired as expected; nothing measured on it could be trusted.
    """
    batch = host.batch([[0, min(1, host.d_vocab - 1), 0]])
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    layers = sorted({0, min(1, host.n_layers - 1), host.n_layers - 1})
    logits, seen = host.capture(batch, [Site(name, layer) for layer in layers for name in names])
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
        folder = _transcoder_folder(str(transcoders), options.get("layers"))
        return TranscoderStore.open(folder, name=str(transcoders), **options)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]} was given for transcoders that are already in memory",
            expected="a folder or hub id, or transcoders that carry it themselves",
            repair=f"leave {given[0]} away, or make the transcoders with it",
        )
    return transcoders if isinstance(transcoders, TranscoderStore) else TranscoderStore.of(list(transcoders))


def _transcoder_folder(name: str, layers: Sequence[int] | None) -> Path:
    if name in TRANSCODERS:
        return TRANSCODERS[name]
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        return path
    try:
        wanted = ["transcoder_L*.pt"] if layers is None else [f"transcoder_L{layer}.pt" for layer in layers]
        patterns = ["*.json", "*.yaml", "*.safetensors", *wanted]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot find the transcoders {name!r}",
            expected=f"{', '.join(TRANSCODERS)}, a folder, or a hub id such as KokosDev/qwen25-32b-clt",
            found=first_line(error, 200),
        ) from None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if dtype not in known:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(known), where="--dtype")
    return known[dtype]


def _device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        float(torch.zeros(1, device=chosen))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {device!r} cannot be used", found=first_line(error), where="--device") from None
    return chosen


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Tensor) or (len(prompts) and isinstance(prompts[0], SupportsIndex)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
