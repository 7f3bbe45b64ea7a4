"""Two GPUs played on a CPU: torch's FakeTensorMode judges every operation, and the numbers are the real ones.

FakeTensorMode refuses what a machine with cuda:0 and cuda:1 would refuse (mixed devices), but computes nothing, so that
the first branch on a number ends it. Here each fake tensor holds its real twin on the CPU, and every operation that was
found allowed runs on the twins. What arrives on the CPU is a plain tensor again.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
UNKNOWABLE = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)


class Judged(FakeTensorMode):
    """FakeTensorMode with real numbers beside it."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._judging = False

    def put(self, real: Tensor, device: torch.device | str) -> FakeTensor:
        """A tensor on one of the played devices."""
        out = FakeTensor(self, real.to("meta"), torch.device(device))
        out.held = real
        return out

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._judging or func in fake_tensor._DISPATCH_META_HANDLERS:
            return super().dispatch(func, types, args, kwargs)
        placed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        device = kwargs.get("device")
        if not placed and (device is None or torch.device(device).type == "cpu"):
            return func(*args, **kwargs)
        _check_index(func, args)
        self._judging = True
        try:
            told = super().dispatch(func, types, args, kwargs)
        except (RuntimeError, *UNKNOWABLE) as error:
            told = None  # it depends on numbers, or asks for a CUDA that is not there
            if not isinstance(error, UNKNOWABLE) and "not linked" not in str(error):
                raise
            if len({tensor.fake_device for tensor in placed}) > 1:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device") from None
        finally:
            self._judging = False
        on_cpu = {} if device is None else {"device": torch.device("cpu")}
        found = func(*tree_map(_held, args), **(tree_map(_held, kwargs) | on_cpu))
        if told is None:
            return tree_map(lambda f: self.put(f, placed[0].fake_device) if isinstance(f, Tensor) else f, found)
        if isinstance(told, list | tuple):
            paired = [self._paired(*both) for both in zip(told, found, strict=True)]
            return paired if isinstance(told, list) else tuple(paired)
        return self._paired(told, found)

    def _paired(self, told: Any, found: Any) -> Any:
        if not isinstance(told, FakeTensor) or told.fake_device.type == "cpu":
            return found
        if told.shape != found.shape:  # by-products of a kernel differ between kinds of devices
            return self.put(found, told.fake_device)
        told.held = found
        return told


def _check_index(func: Any, args: Any) -> None:
    """FakeTensorMode lets an index come from anywhere; CUDA takes it from the CPU or from the same device."""
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        own = args[0].fake_device if isinstance(args[0], FakeTensor) else torch.device("cpu")
        places = {index.fake_device for index in args[1] if isinstance(index, FakeTensor)}
        if places - {own, torch.device("cpu")}:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, an index or the CPU apart")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, FakeTensor) else value


_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist}


class Methods(TorchFunctionMode):
    """A few methods by plain operators: torch's own way asks for a CUDA that a CPU build does not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            view, index = _basic(*args)
            return aten.index(view, index) if index else view
        if func is Tensor.__setitem__:
            view, index = _basic(*args[:2])
            value = args[2] if isinstance(args[2], Tensor) else torch.tensor(args[2], dtype=view.dtype)
            return aten.index_put_(view, index, value) if index else _copy(view, value)
        if func is Tensor.copy_:
            return _copy(*args[:2])
        if func is Tensor.contiguous:
            return aten.contiguous(args[0])
        if func is Tensor.nonzero:
            found = aten.nonzero(args[0])
            return found.unbind(1) if kwargs and kwargs.get("as_tuple") else found
        if func is Tensor.__invert__:
            return aten.bitwise_not(args[0])
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], dtype=args[0].dtype, device=args[0].device)
        if func in _NUMBERS:  # they are fetched from wherever they are
            return func(args[0].held)
        return func(*args, **(kwargs or {}))


def _copy(place: FakeTensor, value: Tensor) -> FakeTensor:
    """A copy may cross devices, so there is nothing to judge."""
    assert not (torch.is_grad_enabled() and (place.requires_grad or value.requires_grad)), "no gradient is kept here"
    place.held.copy_(_held(value))
    return place


def _basic(x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
    """A view by slices, numbers, None and `...`; and the index tensors that remain, by dimension."""
    keys = list(key) if isinstance(key, tuple) else [key]
    keys = [torch.tensor(part) if isinstance(part, list) else part for part in keys]
    if not any(part is Ellipsis for part in keys):
        keys.append(Ellipsis)
    dim, index = 0, []
    for number, part in enumerate(keys):
        if isinstance(part, Tensor):
            index += [None] * (dim - len(index)) + [part]
            dim += _taken(part)
        elif part is None:
            x, dim = aten.unsqueeze(x, dim), dim + 1
        elif part is Ellipsis:
            dim = x.ndim - sum(map(_taken, keys[number + 1 :]))
        elif isinstance(part, slice):
            x, dim = aten.slice(x, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            x = aten.select(x, dim, int(part))
    return x, index


def _taken(part: Any) -> int:
    """How many dimensions of the tensor one part of an index speaks of."""
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return int(part is not None)


def playing(stack: ExitStack, machine: Judged) -> Judged:
    """Enter the played machine."""
    stack.enter_context(Methods())
    return stack.enter_context(machine)


def spread(model: nn.Module, mode: Judged, device_of: Callable[[str], str]) -> nn.Module:
    """Put every parameter on the device of its module, and let inputs follow as accelerate's dispatch does."""
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is not None:
                    placed = mode.put(tensor.detach(), device_of(name))
                    tensors[key] = nn.Parameter(placed, False) if tensors is module._parameters else placed
    for name in (*(f"model.layers.{n}" for n in range(len(model.model.layers))), "model.norm", "lm_head"):
        hook = AlignDevicesHook(execution_device=torch.device(device_of(name)))
        add_hook_to_module(model.get_submodule(name), hook)
    return model
