"""Memory for one large block of edges after the other."""

import math
import sys

import numpy as np
import torch
from torch import Tensor


class Room:
    """Hands out the memory of the last array, once nobody holds that any more.

    Fresh pages of a large array cost more than the arithmetic that fills them. On other devices torch does the same;
    on the CPU the array is NumPy's, whose references tell whether a tensor still stands on it.
    """

    def __init__(self) -> None:
        self._array = np.empty(0, np.float32)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for numbers in the dtype and on the device of another tensor; what stands in it means nothing."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        dtype, count = np.dtype(str(like.dtype).removeprefix("torch.")), math.prod(shape)
        free = sys.getrefcount(self._array) <= 2  # this object's reference and the call's argument: no tensor has it
        if free and self._array.dtype == dtype and len(self._array) >= count:
            return torch.from_numpy(self._array)[:count].view(shape)
        self._array = np.empty(count, dtype)
        return torch.from_numpy(self._array).view(shape)

    def clear(self) -> None:
        """Keep nothing."""
        self._array = np.empty(0, np.float32)
