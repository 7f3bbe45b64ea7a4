"""Exact arithmetic over half-precision weights: the stream, norms, attention, MLPs and logits in fp32.

A half-precision model rounds every intermediate result to 8 (bf16) or 11 (fp16) bits. What that does to a logit is as
large as the effect of most single features, so a difference of two such runs is mostly rounding. Under `exact` the
weights stay as they are stored, in two bytes, and every product with one is formed in fp32 (`hooks.kernels`):

* the embedding's output is widened to fp32; norms, rotations, attention and activations follow their input;
* every `nn.Linear` of a block multiplies fp32 inputs with its stored weight, without a copy of it.

The result is what an fp32 copy of the same weights computes, to fp32 rounding. `native` is the model's own arithmetic.
A model in fp32 or fp64 computes in its own precision either way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import ModelError, UserError
from hooks.exclusive import Exclusive
from hooks.host import Host, forward_of
from hooks.kernels import linear_fp32

Precision = Literal["exact", "native"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HALF = (torch.bfloat16, torch.float16)


def check_precision(precision: str) -> Precision:
    """A precision by its name.

    Raises:
        UserError: there is none of this name.
    """
    for known in PRECISIONS:
        if precision == known:
            return known
    raise UserError(f"unknown precision {precision!r}", expected=" or ".join(PRECISIONS), where="--precision")


def is_half(host: Host) -> bool:
    """Whether the model computes in half precision by itself."""
    return host.dtype in HALF


@contextmanager
def computing(host: Host, precision: Precision) -> Iterator[None]:
    """Every pass of this model inside the `with` uses this arithmetic.

    Raises:
        ModelError: a module of the blocks is of a kind whose weights cannot be read (`exact` alone).
        UserError: `native` inside `exact`.
    """
    wanted = precision == "exact" and is_half(host)
    if wanted == host.exact:
        yield
        return
    if host.exact:
        raise UserError("a pass in native precision cannot run inside one in exact precision")
    with Exclusive(host.layers) as block:
        block.set_attribute(host, "exact", True)
        for module, forward in _wide_forwards(host):
            block.set_attribute(module, forward_of(module), forward)
        yield


def _wide_forwards(host: Host) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    embedding = host.decoder.get_input_embeddings()
    yield embedding, partial(_widened, getattr(embedding, forward_of(embedding)))
    for layer in host.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield module, partial(_linear, module, _reader(module, name))


def _widened(forward: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return forward(*args, **options).float()


def _linear(
    module: Any, read: "Callable[[], Tensor] | None", x: Float[Tensor, "*token inner"]
) -> Float[Tensor, "*token outer"]:
    return linear_fp32(x, module.weight if read is None else read(), module.bias)


def _reader(module: Any, name: str) -> "Callable[[], Tensor] | None":
    """How to read a weight that is no plain matrix of numbers; None for one that is."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return None
    if hasattr(module.weight, "SCB"):
        return partial(_from_int8, module)
    if hasattr(module.weight, "dequantize"):
        return lambda: module.weight.dequantize()
    raise ModelError(
        f"exact arithmetic does not know the weights of {name}, a {type(module).__name__}",
        expected="nn.Linear in bf16 or fp16, int8 of bitsandbytes, or weights with a dequantize method",
        repair='precision="native" (--precision native) measures with the model\'s own rounding',
    )


def _from_int8(module: Any) -> Float[Tensor, "outer inner"]:
    """bitsandbytes: int8 numbers, and each row's largest magnitude, which 127 stands for."""
    state = module.state
    numbers = module.weight.data if state.CB is None else state.CB
    scale = module.weight.SCB if state.SCB is None else state.SCB
    return (numbers.float() * (scale.float()[:, None] / 127)).to(torch.float32)
