"""Exact arithmetic over half-precision weights: the stream, norms, attention, MLPs and logits in fp32.

A half-precision model rounds every intermediate result to 8 (bf16) or 11 (fp16) bits. This changes a logit by as much
as most single features do, so a difference of two such runs is mostly rounding. Under `exact` the weights stay as they
are stored, in two bytes, and every product with one is computed in fp32 (`hooks.kernels.products`):

* the embedding's output is widened to fp32; norms, rotations, attention and activations compute in their input's dtype;
* every `nn.Linear` of a block multiplies fp32 inputs with its stored weight, without a copy of it.

The result is what an fp32 copy of the same weights computes, to fp32 rounding. `native` is the model's own arithmetic.
A model in fp32 or fp64 computes in its own precision either way.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.choices import PRECISIONS
from hooks.errors import ModelError, UserError
from hooks.host.exclusive_use import Exclusive
from hooks.host.host import Host, forward_of
from hooks.kernels import linear_fp32

log = logging.getLogger("hooks")

Precision = Literal["exact", "native"]
HALF = (torch.bfloat16, torch.float16)
_ROWS_OF = 1 << 22  # numbers of a quantised weight that are read at a time

Function = TypeVar("Function", bound=Callable[..., Any])


def choose_precision(host: Host, precision: str | None) -> Precision:
    """A precision by its name. None: `exact`; or `native` with a warning, if `exact` does not support the model.

    Raises:
        UserError: there is no precision of this name.
    """
    if precision is None:
        unknown = unknown_weights(host) if is_half(host) else None
        if unknown is None:
            return "exact"
        log.warning("effects are measured in the model's own rounding: exact arithmetic does not know %s", unknown)
        return "native"
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}", expected=" or ".join(PRECISIONS), where="--precision")
    return cast(Precision, precision)


def is_half(host: Host) -> bool:
    """Whether the model's own dtype is half precision."""
    return host.dtype in HALF


def computes_in(host: Host) -> str:
    """The arithmetic of the next pass: `exact` or `native` on a half-precision model, else the model's own dtype."""
    return ("exact" if host.exact else "native") if is_half(host) else str(host.dtype).removeprefix("torch.")


@contextmanager
def computing(host: Host, precision: str) -> Iterator[None]:
    """Every pass of this model inside the `with` uses this arithmetic.

    Raises:
        ModelError: the weights of a module in the blocks cannot be read (only with `exact`).
        UserError: `native` inside `exact`.
    """
    wanted = precision == "exact" and is_half(host)
    if wanted == host.exact:
        yield
        return
    if host.exact:
        raise UserError("a pass in native precision cannot run inside one in exact precision")
    if (unknown := unknown_weights(host)) is not None:
        raise ModelError(
            f"exact arithmetic does not know {unknown}",
            expected="nn.Linear in bf16 or fp16, int8 of bitsandbytes, or weights with a dequantize method",
            repair='precision="native" (--precision native) measures with the model\'s own rounding',
        )
    with Exclusive(host.layers) as block:
        block.set_attribute(host, "exact", True)
        for module, forward in _wide_forwards(host):
            block.set_attribute(module, forward_of(module), forward)
        yield


def unknown_weights(host: Host) -> str | None:
    """The reason why exact arithmetic does not support this model; None if it does."""
    for number, layer in enumerate(host.layers):
        for name, module in layer.named_modules():
            matrices = [part for part in module.parameters(recurse=False) if part.ndim > 1]
            if matrices and not (isinstance(module, nn.Linear) and _readable(module)):
                return f"the weights of layers.{number}.{name}, a {type(module).__name__}"
    return None


def _wide_forwards(host: Host) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    embedding = host.decoder.get_input_embeddings()
    yield embedding, partial(_widened, getattr(embedding, forward_of(embedding)))
    for layer in host.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                yield module, partial(_linear, module)


def _widened(forward: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return forward(*args, **options).float()


def _linear(module: Any, x: Float[Tensor, "*token inner"]) -> Float[Tensor, "*token outer"]:
    if _plain(module):
        return linear_fp32(x, module.weight, module.bias)
    rows = max(1, _ROWS_OF // module.in_features)
    parts = [linear_fp32(x, _read(module, start, start + rows), None) for start in range(0, module.out_features, rows)]
    out = torch.cat(parts, dim=-1)
    return out if module.bias is None else out + module.bias.float()


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _readable(module: Any) -> bool:
    return _plain(module) or hasattr(module.weight, "SCB") or hasattr(module.weight, "dequantize")


def _read(module: Any, start: int, stop: int) -> Float[Tensor, "outer inner"]:
    """Some rows of a quantised weight as numbers."""
    if not hasattr(module.weight, "SCB"):
        return module.weight[start:stop].dequantize().float()
    state = module.state  # bitsandbytes: int8 numbers, where 127 means the row's largest magnitude
    numbers = module.weight.data if state.CB is None else state.CB
    scale = module.weight.SCB if state.SCB is None else state.SCB
    return numbers[start:stop].float() * (scale[start:stop].float()[:, None] / 127)


def measured(function: Function) -> Function:
    """Decorates a method of a `HookedModel`, or a function whose first argument is one, that measures differences.
    Calls on one model run one after the other, in the precision `model.precision`."""

    @functools.wraps(function)
    def in_precision(model: Any, *args: Any, **options: Any) -> Any:
        with Exclusive(model.host.layers), computing(model.host, model.precision):
            return function(model, *args, **options)

    return in_precision  # type: ignore[return-value]
