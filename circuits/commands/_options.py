"""What the values of options mean that several subcommands share: a model to load, an intervention."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from hooks.errors import InterventionError, UserError
from hooks.interventions import INTERVENTIONS
from hooks.model import HookedModel

_MOST_GB = 1e9


def intervention(text: str) -> Any:
    """`NAME:ADDR[=VALUE]`."""
    name, _, rest = text.partition(":")
    if name not in INTERVENTIONS:
        raise InterventionError(f"unknown intervention {name!r}", expected=", ".join(INTERVENTIONS), where=text)
    address, equals, value = rest.rpartition("=")
    if not equals:
        return INTERVENTIONS[name].from_text(rest, None)
    try:
        number = float(value)
    except ValueError:
        raise InterventionError(f"{value!r} is not a number", expected="ADDRESS=NUMBER", where=rest) from None
    return INTERVENTIONS[name].from_text(address, number)


def settle(model: str) -> None:
    """A tiny model is slower on several threads, and nobody waits for it to load."""
    if model == "demo":
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()


def load(args: argparse.Namespace, layers: str | Sequence[int] | None = None) -> HookedModel:
    """The model, and the transcoders of some layers if a command needs no others."""
    settle(args.model)
    if args.budget_gb is not None and not 0 < args.budget_gb < _MOST_GB:
        raise UserError(f"--budget-gb {args.budget_gb} holds nothing", expected=f"above 0 and below {_MOST_GB:g}")
    return HookedModel.load(
        args.model,
        args.transcoders,
        read=args.read,
        write=args.write,
        k=args.k,
        encoder=args.encoder,
        decoder=args.decoder,
        dtype=args.dtype,
        device=args.device,
        device_map=args.device_map,
        budget_bytes=None if args.budget_gb is None else int(args.budget_gb * 2**30),
        context=args.context,
        layers=None if layers is None or isinstance(layers, str) else sorted(set(layers)),
    )
