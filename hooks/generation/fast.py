"""Decoding with everything in place: a static cache, interventions in tables of fixed size, one step captured once.

Everything that changes from token to token, or from one experiment to the next, lies in buffers that the step reads:
the token, its position, and per layer a table of interventions. New interventions are written there; nothing is
attached, compiled or captured again. On CUDA the step is one CUDA graph, elsewhere the same function runs as it is.

Which layers can be steered, are observed or replaced is fixed when the decoder is made: only those are encoded.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StaticCache

from hooks.checkpoints import TranscoderStore
from hooks.errors import InterventionError, ModelError, PromptError, UserError
from hooks.generation.decoding import Generated, Row, Token, seeded
from hooks.generation.fast_step import EntryBuffers, LayerStep, acts_buffer
from hooks.generation.observe import Observed, observed_layers
from hooks.generation.sampling import Sampling, stop_strings
from hooks.host import CACHE, Batch, Host, Prompt, execution_device
from hooks.kernels import select_static
from hooks.passes import HostAndStore, Interventions, Plan, Swap, listed, make_edits, make_plan
from hooks.types import Edit, Pass, SparseActs
from hooks.whole import whole

_WARM_UP = 3  # passes before a capture: libraries choose their kernels and make their workspaces


class FastDecoder:
    """Decode one prompt token by token, steered, observed or replaced.

        fast = FastDecoder(model, layers=[3, 5], max_length=512)
        fast.set([Clamp("L3/383", 8.0)])
        fast.prefill("fact: the capital of the state containing Dallas is")
        fast.generate(32).text
        fast.set([])                      # from the next token on; the cache keeps what it holds

    Edits are in delta form and TopK is not run again (`mask="frozen"`); replaced sites lose their error
    (`error="zero"`). With the interventions set before `prefill`, tokens are those of `HookedModel.generate`. Set
    later, they act from the next token that is read; keys and values of earlier tokens stay what they were. A
    `HookedModel.session` reads those again.

    The transcoders of all layers named here are held, whatever the store's budget.

    Args:
        layers: that may be steered; all that have a transcoder by default.
        capacity: how many interventions each of them has room for.
        observe: layers (or sites they read, or `"all"`) whose features at the newest token are kept in `observed`.
        replace: layers, or `"all"`, whose write sites are replaced by their reconstruction.
        max_length: prompt and new tokens together.

    Raises:
        UserError: a layer has no transcoder, or there is no room for anything.
        PromptError: `max_length` is more than the model's context.
        ModelError: the model attends through a sliding window, or is spread over several devices.
    """

    def __init__(
        self,
        model: HostAndStore,
        *,
        layers: str | Sequence[int] = "all",
        capacity: int = 16,
        observe: Observed = (),
        replace: str | Sequence[int] = (),
        max_length: int = 1024,
    ):
        host, store = model.host, model.store
        capacity, max_length = whole(capacity, "capacity"), whole(max_length, "max_length")
        steered, observed, self._replaced = (observed_layers(store, chosen) for chosen in (layers, observe, replace))
        _check_room(host, capacity, max_length)
        check_suited(host, store, {*steered, *observed, *self._replaced}, max_length)
        device = host.device
        self._host, self._store, self.max_length, self.capacity = host, store, max_length, capacity
        self._cache = StaticCache(config=host.model.config, max_cache_len=max_length)  # type: ignore[arg-type]
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._tables = {layer: EntryBuffers.empty(capacity, device) for layer in steered}
        self.observed: Mapping[int, SparseActs] = {layer: acts_buffer(store[layer]) for layer in observed}
        self._edits = self._step_edits()
        self._interventions: tuple[object, ...] = ()
        self._prompt_length = 0
        self._text: list[int] = []  # every token, read or only chosen
        self._read = 0
        self._logits = self._first_pass()
        self._graph = self._captured() if device.type == "cuda" else None

    # -- steering ----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a table."""
        return tuple(self._tables)

    def set(self, interventions: Interventions) -> None:
        """Go on with these interventions in place of those before. Buffers are written, nothing else happens.

        Raises:
            UserError: an address does not exist, interventions contradict each other, or a layer has no room.
        """
        if self._prompt_length:  # positions mean something only once there is a prompt
            self._write(self._plan(interventions, self._prompt_length))
        self._interventions = tuple(listed(interventions))

    def _plan(self, interventions: Interventions, length: int) -> Plan:
        plan = make_plan(self._store, [interventions], [length], new_tokens=self.max_length - length)
        for layer, table in plan.tables.items():
            if layer not in self._tables:
                raise InterventionError(
                    f"layer {layer} cannot be steered here",
                    expected=f"a layer among {', '.join(map(str, self._tables)) or 'none'}",
                    repair="name it in layers= when the decoder is made",
                )
            if len(table.features) > self.capacity:
                raise InterventionError(
                    f"{len(table.features)} interventions at layer {layer}, and room for {self.capacity}",
                    repair="make the decoder with more capacity= (a mask of positions takes a place per gap)",
                )
        return plan

    def _write(self, plan: Plan) -> None:
        for layer, table in self._tables.items():
            table.write(plan.tables.get(layer))

    # -- decoding ----------------------------------------------------------------------------------------------

    def prefill(self, prompt: Prompt) -> Float[Tensor, " vocab"]:
        """Forget what was there and read a prompt, under the interventions that are set. Logits of the next token.

        Raises:
            UserError: as `set`, the prompt is unusable or too long, or its streams are not numbers.
        """
        batch = self._host.batch([prompt])
        length = batch.lengths[0]
        self._require_room(length)
        plan = self._plan(self._interventions, length)
        self._rewind(0)
        self._prompt_length = 0  # until the pass has succeeded
        logits = self._prompt_pass(batch, plan)
        self._write(plan)
        self._logits.copy_(logits)
        self._rewind(length)
        self._prompt_length, self._text = length, batch.ids[0].tolist()
        return logits

    @torch.no_grad()
    def _prompt_pass(self, batch: Batch, plan: Plan) -> Float[Tensor, " vocab"]:
        edits = make_edits(self._store, plan, Swap(self._replaced, "zero") if self._replaced else None)
        with self._host.attached([*self._observe_last(), *edits]) as session:
            session.current = Pass(0, list(batch.lengths))
            return self._feed(batch.ids.to(self._ids.device))

    def _observe_last(self) -> list[Edit]:
        def look(layer: int) -> Any:
            def function(x: Tensor, at: Pass) -> Tensor:
                coder, kept = self._store[layer], self.observed[layer]
                acts = select_static(coder.gated(coder.preactivations(x[0, -1])), coder.k)
                kept.values.copy_(acts.values)
                kept.indices.copy_(acts.indices)
                return x

            return function

        return [Edit(self._store.sites(layer)[0], look(layer)) for layer in self.observed]

    def step(self, token: int | None = None) -> Float[Tensor, " vocab"]:
        """Read one more token; logits of the one behind it.

        Args:
            token: what is read. By default what `generate` chose last and did not read, else the most likely token.

        Raises:
            UserError: there is no prompt yet, no room is left, or the token is not in the vocabulary.
            ModelError: a stream is not a number.
        """
        self._require_prompt()
        self._require_room(self._read + 1)
        if token is None:
            token = self._text[self._read] if self._read < len(self._text) else int(self._logits.argmax())
        elif not 0 <= (token := whole(token, "token")) < self._host.d_vocab:
            raise PromptError(f"token id {token} is outside the vocabulary", expected=f"0 to {self._host.d_vocab - 1}")
        self._text[self._read :] = [token]
        self._ids.fill_(token)
        try:
            self._run()
        except BaseException:  # an interrupted pass leaves some layers' caches longer than others
            self._prompt_length = 0
            raise
        self._read += 1
        if bool(self._bad):
            self._prompt_length = 0
            raise ModelError(
                f"the stream behind {self._read} tokens is not a number",
                repair="weaken the interventions, or run the model in bfloat16 or float32 (fp16 overflows easily)",
            )
        return self._logits.clone()

    def generate(
        self,
        n: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
    ) -> Generated:
        """Up to n more tokens. The last one is chosen but not read: going on reads it first.

        Raises:
            UserError: there is no prompt yet, n is below 1, n tokens do not fit, or as `step`.
        """
        row, before = self._row(n, sampling, stop), tuple(self._text)
        seen = torch.stack(list(self._advanced(row)))
        return Generated(before, tuple(row.ids), "".join(row.text), seen, row.reason or "length")

    def stream(
        self,
        n: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
    ) -> Iterator[Token]:
        """The same, token by token.

        Raises:
            UserError: as `generate`, at once.
        """
        row = self._row(n, sampling, stop)
        return (row.newest(logits, len(self._text) - 1) for logits in self._advanced(row))

    def _row(self, n: int, sampling: Sampling, stop: str | Sequence[str]) -> Row:
        self._require_prompt()
        n = whole(n, "n")
        if n < 1:
            raise UserError(f"cannot generate {n} tokens", expected="at least 1")
        self._require_room(len(self._text) + n)
        prompt, behind = self._text[: self._prompt_length], self._text[self._prompt_length :]
        return Row(self._host, sampling, seeded(sampling), stop_strings(stop), n, prompt, behind)

    def _advanced(self, row: Row) -> Iterator[Float[Tensor, " vocab"]]:
        """Token by token until the row is done; yields what the newest token was chosen from."""
        while row.reason is None:
            if self._read < len(self._text):
                self.step()
            logits = self._logits.clone()
            self._text.append(row.take(logits))
            yield logits

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole text so far, prompt included."""
        return tuple(self._text)

    def _require_prompt(self) -> None:
        if not self._prompt_length:
            raise UserError("there is no prompt to go on from", repair="call prefill(prompt) first")

    def _require_room(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise PromptError(
                f"{tokens} tokens do not fit into this decoder",
                expected=f"at most {self.max_length}, prompt and new tokens together",
                repair="make it with a larger max_length=",
            )

    # -- the step ----------------------------------------------------------------------------------------------

    def _step_edits(self) -> list[Edit]:
        chosen = sorted({*self._tables, *self.observed, *self._replaced})
        out: list[Edit] = []
        for layer in chosen:
            table, observed = self._tables.get(layer), self.observed.get(layer)
            replaced = layer in self._replaced
            out += LayerStep(self._store[layer], table, observed, replaced, self._position, self._bad).edits()
        return out

    def _feed(self, ids: Int[Tensor, "1 pos"]) -> Float[Tensor, " vocab"]:
        """Read tokens behind what the cache holds; logits behind the last."""
        given: dict[str, Any] = {CACHE: self._cache}
        hidden = self._host.decoder(input_ids=ids, use_cache=True, **given).last_hidden_state
        return self._host.unembed(hidden[:, -1])[0]

    def _advance(self) -> None:
        """One token, from buffers to buffers: what a CUDA graph replays."""
        self._logits.copy_(self._feed(self._ids))
        self._position.add_(1)

    @torch.no_grad()
    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        with self._host.attached(self._edits):
            self._advance()

    @torch.no_grad()
    def _first_pass(self) -> Float[Tensor, " vocab"]:
        """The cache makes its buffers, and the logits' shape and precision become known."""
        with self._host.attached(self._edits):
            logits = self._feed(self._ids).clone()
        self._rewind(0)
        return logits

    @torch.no_grad()
    def _captured(self) -> Any:
        """The step as a CUDA graph; what it reads and writes are the buffers made here."""
        with torch.cuda.device(self._ids.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), self._host.attached(self._edits):
                for _ in range(_WARM_UP):
                    self._rewind(0)
                    self._advance()
            torch.cuda.current_stream().wait_stream(side)
            self._rewind(0)
            graph = torch.cuda.CUDAGraph()
            with self._host.attached(self._edits), torch.cuda.graph(graph):
                self._advance()
        self._rewind(0)
        return graph

    def _rewind(self, length: int) -> None:
        """Say how many tokens the cache holds; what lies behind them is masked, and overwritten."""
        self._position.fill_(length)
        self._bad.fill_(False)
        self._read = length
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)  # type: ignore[union-attr]


def _check_room(host: Host, capacity: int, max_length: int) -> None:
    if capacity < 1:
        raise UserError(f"a table needs room for interventions, found capacity {capacity}", expected="at least 1")
    if not 2 <= max_length <= host.max_positions:
        raise PromptError(
            f"a decoder cannot hold {max_length} tokens",
            expected=f"2 to {host.max_positions}, the model's context",
        )


def check_suited(host: Host, store: TranscoderStore, layers: set[int], max_length: int) -> None:
    """Refuse a model that no decoder can be made for. Nothing is loaded.

    Args:
        layers: whose transcoders are needed.

    Raises:
        ModelError: the model attends through a sliding window, or is spread over several devices.
    """
    types = getattr(host.model.config, "layer_types", None) or []
    window = host.window()
    if (window is not None and window < max_length) or any(kind != "full_attention" for kind in types):
        raise ModelError(
            "the model does not attend to its whole context at every layer",
            expected="full attention throughout",
            found=", ".join(sorted(set(types))) or f"a sliding window of {window}",
            repair='use model.generate, with engine="dynamic"',
        )
    # CUDA graphs and buffers belong to one device
    found = {host.device, *map(execution_device, host.layers), *map(store.device, layers)}
    if len(found) > 1:
        raise ModelError(
            "the model is spread over several devices",
            expected="everything on one",
            found=", ".join(sorted(map(str, found))),
            repair='use model.generate, with engine="dynamic"',
        )
