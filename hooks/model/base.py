"""What every part of the public face needs: the model, its store, what they fit, and the edits of a batch."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from hooks.checkpoints import TranscoderStore
from hooks.demo import WEIGHTS
from hooks.errors import CheckpointError
from hooks.host import (
    Batch,
    Exclusive,
    Host,
    Precision,
    Prompt,
    Prompts,
    choose_precision,
    computing,
    config_of,
    fingerprint,
    is_half,
    listed,
    measured,
)
from hooks.memory import Ask, Task, ask_for, explained
from hooks.model.loading import Transcoders, check_fit, load_host, open_store, placement, self_test
from hooks.names import dtype_of
from hooks.passes import (
    Interventions,
    RunOptions,
    lists_per_row,
)
from hooks.readout import Rounding, rounding
from hooks.sites import SiteSpec
from hooks.types import Edit, ErrorMode, MaskMode
from hooks.whole import whole

Method = TypeVar("Method", bound=Callable[..., Any])
Face = TypeVar("Face", bound="Base")  # typing.Self is refused by beartype in a class that jaxtyping decorates


def within_memory(task: Task) -> Callable[[Method], Method]:
    """A method of `HookedModel` whose first argument is a prompt; where memory runs out, it says what would fit."""

    def wrap(method: Method) -> Method:
        @functools.wraps(method)
        def explaining(model: "Base", *args: Any, **options: Any) -> Any:
            def ask() -> Ask:
                bound = signature(method).bind(model, *args, **options).arguments
                prompt: Any = bound.get("prompt", bound.get("prompts"))
                return replace(model.request(prompt), new=int(bound.get("max_new_tokens", 32)))

            with explained(f"running {task}", model.host.device_of(0), ask, task):
                return method(model, *args, **options)

        return cast(Method, explaining)

    return wrap


class Base:
    """A model and its transcoders that fit together."""

    def __init__(self, host: Host, store: TranscoderStore, name: str = "in memory", *, precision: str | None = None):
        self.host, self.store, self.name = host, store, name
        self.precision: Precision = choose_precision(host, precision)
        check_fit(host, store)
        for layer in store.layers:
            store.place(layer, host.device_of(min(layer, host.n_layers - 1)))
        self_test(host, store)

    @classmethod
    def load(
        cls: type[Face],
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
    ) -> Face:
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
        chosen = placement(device, device_map)  # looked at before minutes of loading
        wanted = dtype_of(dtype)
        store = open_store(
            transcoders,
            read=read,
            write=write,
            k=k,
            encoder=encoder,
            decoder=decoder,
            layers=layers,
            budget_bytes=budget_bytes,
        )
        where = chosen or torch.device("cuda" if device_map and torch.cuda.is_available() else "cpu")

        def ask() -> Ask:
            config = config_of(WEIGHTS if demo else name)
            held = wanted or config.dtype or torch.bfloat16
            return ask_for(config.to_dict(), store, 32, held, where.type)

        with explained("loading the model", where, ask):
            host = load_host(name, dtype=wanted, device=device, device_map=device_map, context=context)
            return cls(host, store, str(name), precision=precision)

    @classmethod
    def from_model(
        cls: type[Face],
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
    ) -> Face:
        """A transformers model that is already in memory. Its parameters' `requires_grad` is turned off."""
        store = open_store(
            transcoders,
            read=read,
            write=write,
            k=k,
            encoder=encoder,
            decoder=decoder,
            layers=layers,
            budget_bytes=budget_bytes,
        )
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
        options = RunOptions(swap=swap, error=error, mask=mask, positions=positions, skip=skip)
        return options.edits(self.host, self.store, batch, per_row, new_tokens)
