"""Names that a user gives → what they mean: a set of transcoders → its folder, a dtype's name → the dtype."""

import logging
from collections.abc import Sequence

import torch

from hooks.demo import TRANSCODERS
from hooks.errors import UserError
from hooks.files import ResolvedSet, resolve

log = logging.getLogger("hooks")


def transcoder_folder(name: str, layers: Sequence[int] | None = None) -> ResolvedSet:
    """The folder of a set: an embedded one, a local folder, or a hub id, which is downloaded if it is not in the cache.

    Raises:
        CheckpointError: see `hooks.files.hub.resolve`.
    """
    if name in TRANSCODERS:
        return ResolvedSet(TRANSCODERS[name])
    found = resolve(name, layers=layers, embedded=TRANSCODERS)
    for note in found.notes:
        log.warning("%s", note)
    return found


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of this name; None stays None.

    Raises:
        UserError: weights cannot be held in a dtype of this name.
    """
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
