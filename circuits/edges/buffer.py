"""One buffer for large blocks of edges, which are computed one after the other."""

import math
import sys

import numpy as np
import torch
from torch import Tensor


class Buffer:
    """Gives the memory of the last array again, when no tensor uses it any more.

    New pages of a large array cost more than the arithmetic that fills them. On other devices torch reuses memory
    itself. On the CPU the array is NumPy's, whose reference count says whether a tensor still uses it.
    """

    def __init__(self) -> None:
        self._array = np.empty(0, np.float32)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor in the dtype and on the device of another one."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        dtype, count = np.dtype(str(like.dtype).removeprefix("torch.")), math.prod(shape)
        free = sys.getrefcount(self._array) <= 2  # only this object's reference and the call's argument are left
        if free and self._array.dtype == dtype and len(self._array) >= count:
            return torch.from_numpy(self._array)[:count].view(shape)
        self._array = np.empty(count, dtype)
        return torch.from_numpy(self._array).view(shape)

    def clear(self) -> None:
        """Free the array."""
        self._array = np.empty(0, np.float32)
