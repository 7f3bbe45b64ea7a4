"""The public face, token by token: generate, stream, session, steer, dose."""

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, overload

from hooks.errors import UserError
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
    observed_layers,
    stop_strings,
)
from hooks.host import (
    Batch,
    Prompt,
    Prompts,
    choose_precision,
    exclusive,
    is_one,
    listed,
)
from hooks.lens import LensHook, lens_edits
from hooks.model.base import Base, within_memory
from hooks.passes import (
    Interventions,
    Where,
    lists_per_row,
)
from hooks.types import Edit, ErrorMode, MaskMode


class Generating(Base):
    """A model and its transcoders, token by token."""

    @overload
    def generate(self, prompt: Prompt, interventions: Interventions = (), **options: Any) -> Generated: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], interventions: Interventions = (), **options: Any
    ) -> list[Generated]: ...

    @exclusive  # type: ignore[misc]
    @within_memory("generate")
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
