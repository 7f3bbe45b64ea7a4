"""Errors a user can repair. Each says what was expected, what was found, where, and how to repair it.

Everything a person or a file got wrong is a `UserError` (exit status 2, no traceback); what we got wrong is an
`assert` with a text, or any other exception (exit status 1).
"""

import errno
import re
from typing import Any


class UserError(ValueError):
    """The input was wrong. `str(error)` is a complete message; nothing was written.

    Attributes:
        problem: one sentence, what is wrong, with the offending value.
        expected: what would have been right.
        found: what was there instead.
        where: file, key, layer or argument.
        repair: what to type or change.
    """

    def __init__(self, problem: str, *, expected: str = "", found: str = "", where: str = "", repair: str = ""):
        self.problem, self.expected, self.found, self.where, self.repair = (
            problem,
            expected,
            found,
            where,
            repair,
        )
        parts = [problem]
        for label, text in (("expected", expected), ("found", found), ("where", where), ("repair", repair)):
            if text:
                parts.append(f"  {label}: {text}")
        super().__init__(printable("\n".join(parts)))


# Characters that move a terminal's cursor, change its colours or reverse its text: C0 except tab and line feed, DEL,
# C1, line separators, overrides of direction. Lone surrogates are here too, since no stream can encode them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a terminal: characters that would act on it, as in `\\x1b`, are shown as Python writes them."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def first_line(error: BaseException, limit: int = 160) -> str:
    """What a foreign exception says, as one plain line (some libraries colour their messages)."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:limit]


class AddressError(UserError):
    """A feature address that is malformed, or names a layer, feature or position that does not exist."""


class CheckpointError(UserError):
    """A transcoder folder or file that cannot be read, is damaged, or does not fit the model."""


class ModelError(UserError):
    """A language model that cannot be found or is not of a supported kind."""


class PromptError(UserError):
    """A prompt that is empty or too long."""


class TargetError(UserError):
    """A target that is not one token of the vocabulary."""


class InterventionError(UserError):
    """Interventions that contradict each other or carry an unusable strength."""


class TrainingError(UserError):
    """A training cannot go on."""


class OutputError(UserError):
    """A file or folder that cannot be written, or an unknown export format."""


class PictureError(OutputError):
    """A picture could not be drawn; everything else was computed and written.

    Attributes:
        result: the result of the command, so that no measurement is lost.
    """

    def __init__(self, problem: str, result: dict[str, Any], **parts: str):
        super().__init__(problem, **parts)
        self.result = result


def memory_ran_out(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on either kind of device."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch's class is compared by its name, because the command line imports this file before it imports torch
    said = str(error).lower()  # of a RuntimeError of torch, or what safetensors makes of the system's refusal
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said or "cannot allocate" in said
