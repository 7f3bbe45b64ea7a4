"""The largest number of bytes that tensors take on a CPU, counted by torch's own allocator.

The profiler reports every allocation and every release of the CPU allocator, operators' inner buffers included; their
running sum has an exact maximum that does not depend on the interpreter, on fragments of the heap or on other
programs. It does not include memory that NumPy, MKL and oneDNN allocate themselves, and pages of files. On CUDA the
allocator's own `max_memory_allocated` counts the same.
"""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """The memory that the work inside a `with` took, in addition to what was allocated before.

    Attributes:
        peak: most bytes at once.
        left: bytes still held at its end.
    """

    peak: int = 0
    left: int = 0


@contextlib.contextmanager
def allocations(device: str = "cpu") -> Iterator[Allocations]:
    """Count what is allocated inside."""
    found = Allocations()
    gc.collect()  # else existing garbage would be freed while we count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.peak = torch.cuda.max_memory_allocated() - before
        found.left = torch.cuda.memory_allocated() - before
        return
    with _quiet():
        counted = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        counted.__enter__()
    try:
        yield found
    finally:
        with _quiet():
            counted.__exit__(None, None, None)
    events = counted.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    totals = [0, *accumulate(size for _, size in changes)]
    found.peak, found.left = max(totals), totals[-1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the lines that the profiler's library writes to both streams when it starts and stops."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(nowhere)
