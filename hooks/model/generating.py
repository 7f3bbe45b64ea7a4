"""The public face, token by token: generate, stream, session, steer, dose."""

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, Unpack, overload

from hooks.generation import (
    Comparison,
    DoseResponse,
    Generated,
    GenerateKeywords,
    GenerateOptions,
    Observed,
    Sampling,
    Session,
    Strength,
    Token,
    compare_steering,
    continued,
    dose_response,
    open_session,
    streamed,
)
from hooks.host import Prompt, Prompts, exclusive, is_one, listed
from hooks.lens import LensHook, lens_edits
from hooks.model.base import Base, within_memory
from hooks.passes import Interventions
from hooks.types import ErrorMode, MaskMode


class Generating(Base):
    """A model and its transcoders, token by token."""

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts to a type checker
        self, prompt: Prompt, interventions: Interventions = (), **options: Unpack[GenerateKeywords]
    ) -> Generated: ...

    @overload
    def generate(
        self, prompt: Sequence[Prompt], interventions: Interventions = (), **options: Unpack[GenerateKeywords]
    ) -> list[Generated]: ...

    @exclusive
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
        engine: str | None = None,
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
            engine: `dynamic`, or `static`, a `FastDecoder`, which continues one prompt and makes each token one CUDA
                graph. By default `static` on CUDA where it applies and 16 tokens or more are generated.

        Raises:
            UserError: as `run`; and `error="frozen"`, which is not defined for new tokens, an empty stop string, more
                tokens than fit into the context, `engine="static"` for what it does not do; nothing has run then. While
                running: logits that are not numbers.
        """
        options = GenerateOptions(
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            precision=precision,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            observe=observe,
            use_cache=use_cache,
            engine=engine,
        )
        out = continued(self, listed(prompt), interventions, options, lens_edits(lens_hooks, self.host.n_layers))
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
        engine: str | None = None,
    ) -> Iterator[Token]:
        """`generate`, token by token as they come. Hooks are attached only while the next token is computed.

        Examples:
            >>> for token in model.stream(prompt, [Clamp("L3/383", 8.0)]):
            ...     print(token.text, end="", flush=True)

        Raises:
            UserError: as `generate`, at once and not with the first token.
        """
        options = GenerateOptions(
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            precision=precision,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            engine=engine,
        )
        return streamed(self, prompt, interventions, options)

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
        options = GenerateOptions(
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            precision=precision,
            sampling=sampling,
        )
        return open_session(self, prompt, interventions, options, new_tokens)

    @exclusive
    @within_memory("generate")
    def steer(
        self,
        prompt: Prompt,
        interventions: Interventions,
        *,
        texts: Sequence[Prompt] = (),
        max_new_tokens: int = 32,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        engine: str | None = None,
    ) -> Comparison:
        """Continue a prompt plain and steered, side by side, with every token's probability under both models.

        Args:
            interventions: `hooks.Steer`, whose strength may be relative, or anything `run` accepts.
            texts: where typical activations are measured beside the prompt.
            engine: as in `generate`, and all else.

        Raises:
            UserError: as `generate`; or a strength cannot be read or measured.
        """
        options = GenerateOptions(
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            engine=engine,
        )
        return compare_steering(self, prompt, interventions, options=options, texts=texts)

    @exclusive
    @within_memory("generate")
    def dose(
        self,
        prompt: Prompt,
        interventions: Interventions,
        strengths: str | Sequence[float | str | Strength],
        *,
        target: str | SupportsIndex | None = None,
        against: str | SupportsIndex | None = None,
        texts: Sequence[Prompt] = (),
        max_new_tokens: int = 32,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: str | Sequence[str] = (),
        swap: str | Sequence[int] | None = None,
        error: ErrorMode = "live",
        mask: MaskMode = "frozen",
        positions: Any = None,
        skip: str | Sequence[str] = (),
        engine: str | None = None,
    ) -> DoseResponse:
        """The same at every strength of a grid, which each `Steer` without a strength takes; see `steer` and
        `hooks.generation.dose_response`. With `engine="static"` the strengths run one after the other."""
        options = GenerateOptions(
            swap=swap,
            error=error,
            mask=mask,
            positions=positions,
            skip=skip,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            engine=engine,
        )
        return dose_response(
            self, prompt, interventions, strengths, target=target, against=against, options=options, texts=texts
        )
