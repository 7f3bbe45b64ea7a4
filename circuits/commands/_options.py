"""Values of options that several subcommands share → objects: a loaded model, an intervention."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from circuits.commands._output import say
from hooks.errors import InterventionError, UserError
from hooks.host import is_half
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
    """Settings for the embedded model: one thread, since it is slower on several, and no progress bar for loading."""
    if model == "demo":
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()


def computes_in(args: argparse.Namespace, model: HookedModel) -> dict[str, Any]:
    """The arithmetic in which effects were measured, for the result. For a half-precision model also the effect of its
    own rounding on the prompt's logits, which is printed too."""
    if not is_half(model.host):
        return {"precision": model.computes_in}
    found = model.rounding(args.prompt)
    dtype = str(model.host.dtype).removeprefix("torch.")
    how = f"fp32 over the {dtype} weights" if model.precision == "exact" else f"the model's own {dtype} rounding"
    say(f"measured in {how}; rounding moves this prompt's logits by {found.rms:.2g} rms, {found.largest:.2g} at most")
    if not found.same_answer:
        say("the model as served has another answer than in exact arithmetic")
    return {"precision": model.computes_in, "rounding": asdict(found)}


def load(args: argparse.Namespace, layers: str | Sequence[int] | None = None) -> HookedModel:
    """The model and its transcoders; only those of `layers` if the command needs no others."""
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
        precision=args.precision,
        budget_bytes=None if args.budget_gb is None else int(args.budget_gb * 2**30),
        context=args.context,
        layers=None if layers is None or isinstance(layers, str) else sorted(set(layers)),
    )
