"""How a prompt is continued: made once from the keywords of a call, checked, and handed along."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from hooks.choices import ENGINES
from hooks.errors import UserError
from hooks.generation.observe import Observed
from hooks.generation.sampling import Sampling, stop_strings
from hooks.passes import RunOptions
from hooks.types import ErrorMode, MaskMode

GREEDY = Sampling()


class GenerateKeywords(TypedDict, total=False):
    """The keywords of `HookedModel.generate`, for a caller that hands them on."""

    max_new_tokens: int
    swap: str | Sequence[int] | None
    error: ErrorMode
    mask: MaskMode
    positions: Any
    skip: str | Sequence[str]
    sampling: Sampling | Sequence[Sampling]
    stop: str | Sequence[str]
    observe: Observed
    use_cache: bool
    lens_hooks: Sequence[Any]
    precision: str
    engine: str | None


@dataclass(frozen=True)
class GenerateOptions(RunOptions):
    """What `HookedModel.generate` and every method like it is told; attributes as its arguments.

    Raises:
        UserError: as `RunOptions`; a frozen error, an empty stop string, or an engine that does not exist.
    """

    max_new_tokens: int = 32
    sampling: Sampling | Sequence[Sampling] = GREEDY
    stop: str | Sequence[str] = ()
    observe: Observed = ()
    use_cache: bool = True
    engine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error == "frozen":
            raise UserError(
                "a frozen error exists for the prompt only, not for generated tokens", repair="use live or zero"
            )
        stop_strings(self.stop)
        if self.engine is not None and self.engine not in ENGINES:
            raise UserError(f"unknown engine {self.engine!r}", expected=" or ".join(ENGINES))

    @property
    def plain(self) -> "GenerateOptions":
        """The same where nothing is steered."""
        return replace(self, swap=None, error="live", mask="frozen", positions=None, skip=())

    def samplings(self, rows: int) -> list[Sampling]:
        """One sampling for each row.

        Raises:
            UserError: there are several, but not one per row.
        """
        given = [self.sampling] * rows if isinstance(self.sampling, Sampling) else list(self.sampling)
        if len(given) != rows:
            raise UserError(f"{len(given)} samplings for {rows} prompts", expected="one, or one each")
        return given
