"""Clocks, the peak memory of a process, and facts about the machine."""

import contextlib
import importlib
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuits import RULES

PHASES = {  # functions that the driver calls, by module → the phase their time counts in
    ("circuits.building.assembly", "recorded"): "record",
    ("circuits.building.assembly", "score_features"): "score",
    ("circuits.tracing", "select"): "select",
    ("circuits.tracing", "make_run"): "lay out",
    ("circuits.tracing", "assemble"): "keep",
    ("circuits.tracing", "prune"): "prune",
}


def say(text: str) -> None:
    """A line of progress; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def emit(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The result, on one line for programs."""
    print(json.dumps(result, indent=None if as_json else 1))


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine on which the figures were measured, and its load."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "torch": torch.__version__,
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def clock(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    _settled(device)
    start = time.perf_counter()
    work()
    _settled(device)
    return time.perf_counter() - start


def _settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(works: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each; the calls alternate, so that a busy moment affects all of them."""
    seen: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seen[name].append(clock(work, device))
    return {name: statistics.median(times) for name, times in seen.items()}


@contextlib.contextmanager
def phases(device: str = "cpu") -> Iterator[dict[str, float]]:
    """Seconds of `trace` inside the `with`, by phase; time in a nested phase counts only there.

    "edges" is the rule's own work; "keep" is choosing the strongest edges, influence and the values of the nodes.
    """
    found: dict[str, float] = defaultdict(float)
    open_phases: list[str] = []
    last = [0.0]

    def turn() -> None:
        _settled(device)
        now = time.perf_counter()
        if open_phases:
            found[open_phases[-1]] += now - last[0]
        last[0] = now

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        turn()
        open_phases.append(name)
        try:
            yield
        finally:
            turn()
            open_phases.pop()

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with phase(name):
                return function(*args, **options)

        return call

    def timed_rows(rows: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def each(run: Any) -> Iterator[Any]:
            with phase("edges"):
                blocks = iter(rows(run))
            while True:
                with phase("edges"):
                    block = next(blocks, None)
                if block is None:
                    return
                yield block

        return each

    with contextlib.ExitStack() as stack:
        for (module, name), label in PHASES.items():
            owner = importlib.import_module(module)
            stack.enter_context(_instead(owner, name, timed(getattr(owner, name), label)))
        for rule in RULES.values():
            stack.enter_context(_instead(rule, "edge_rows", timed_rows(rule.edge_rows)))
        yield found


@contextlib.contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def start_peak() -> int:
    """Bytes resident now; from here on `peak_since` counts. Where the kernel cannot reset its mark (it is Linux that
    can), the mark of the whole process stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    status = _status()
    return status["VmRSS"] if status else _most_resident()


def peak_since(start: int) -> int:
    """Most bytes resident at once since `start_peak`, beyond those that were then."""
    status = _status()
    return max(0, (status["VmHWM"] if status else _most_resident()) - start)


def _status() -> dict[str, int]:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _most_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value against log size by least squares: 1 is linear growth."""
    x, y = ([math.log(v) for v in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope
