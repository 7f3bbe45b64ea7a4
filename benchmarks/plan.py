"""Is the memory plan right? Estimates of `hooks.memory` against measured peaks, at Qwen2.5-32B's block shape.

    python benchmarks/plan.py [--json] [--tiny] [--threads N]

Two blocks with their transcoders, a reduced vocabulary, fp32 and bf16; each case runs in its own process. `allocated`
is the peak of tensors in addition to the weights, counted by torch's allocator (`_allocations.py`). `resident` is the
kernel's high-water mark of the whole process since before the model was made; it includes NumPy, buffers of libraries
and gaps of the heap. A ratio is estimate / measurement: `ratio_weights` and `ratio_work` for the allocations of
weights and of the task, `ratio_whole` for both together, `ratio_resident` for everything, host tables included,
against the high-water mark. Bound: 0.85 to 1.15 for `ratio_whole`.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
from _allocations import allocations
from _measure import emit, machine, peak_since, say, start_peak
from _worlds import Shape, random_model, random_prompt

from circuits import trace
from hooks import Clamp, HookedModel
from hooks.memory import Ask, ModelShape, SetShape, Task, host_tables, work

FULL = Shape(2, 5120, 27648, 40, 8, features=12288, k=1474, vocab=8192)
TINY = Shape(2, 40, 56, 5, 1, features=96, k=11, head_dim=16, vocab=64)
BOUND = 0.15


@dataclass(frozen=True)
class Case:
    """One measurement. `nodes` is used only in `trace`; `sample` of them are verified."""

    shape: Shape
    dtype: str
    task: Task
    tokens: int
    batch: int = 1
    nodes: int = 318
    sample: int = 0

    @property
    def name(self) -> str:
        """For people."""
        rows = f"{self.batch} × " if self.batch > 1 else ""
        verified = f", {self.sample} verified" if self.sample else ""
        return f"{self.task}, {rows}{self.tokens} tokens{verified}"

    @property
    def ask(self) -> Ask:
        """The request to the plan."""
        s = self.shape
        model = ModelShape(s.layers, s.d_model, s.d_ff, s.heads, s.kv_heads, s.head_dim, s.vocab)
        coders = SetShape.of_numbers(s.layers, s.d_model, s.features, s.k, self.dtype)
        return Ask(
            model, coders, self.tokens, self.dtype, self.batch, new=NEW, nodes=self.nodes, sample=self.sample,
            sweep_tokens=SWEEP_TOKENS, on="cpu",
        )  # fmt: skip


NEW, SWEEP_TOKENS = 4, 512


def cases(tiny: bool) -> list[Case]:
    """By precision, lightest task first."""
    shape, tokens = (TINY, 5) if tiny else (FULL, 32)
    found = []
    for dtype in ("float32",) if tiny else ("float32", "bfloat16"):
        found += [
            Case(shape, dtype, "features", tokens),
            Case(shape, dtype, "features", tokens, batch=8),
            Case(shape, dtype, "generate", tokens),
            Case(shape, dtype, "sweep", tokens),
            Case(shape, dtype, "trace", tokens, nodes=20 if tiny else 318),
            Case(shape, dtype, "trace", tokens, nodes=20 if tiny else 318, sample=8),
        ]
        if not tiny:
            found.append(Case(shape, dtype, "trace", 4 * tokens))
    return found


def action(case: Case, model: HookedModel) -> Callable[[], Any]:
    """The task itself."""
    prompt = random_prompt(case.shape, case.tokens)
    return {
        "features": lambda: model.record([prompt] * case.batch),
        "generate": lambda: model.generate(prompt, [Clamp("L0/3", 4.0)], max_new_tokens=NEW),
        "sweep": lambda: model.sweep(prompt, positions=[case.tokens - 1], tokens_at_once=SWEEP_TOKENS),
        "trace": lambda: trace(model, prompt, max_nodes=case.nodes, sample=case.sample),
    }[case.task]


def measure(case: Case, threads: int) -> dict[str, Any]:
    """Measure resident memory first, since the profiler allocates memory itself."""
    torch.set_num_threads(threads)
    model = random_model(Shape(1, 40, 56, 5, 1, features=96, k=11, head_dim=16, vocab=64))
    action(Case(TINY, "float32", case.task, 5, nodes=20, sample=2), model)()  # libraries are loaded, tables are made
    del model
    start = start_peak()
    model = random_model(case.shape, dtype=getattr(torch, case.dtype))
    start_peak_again()
    action(case, model)()
    resident = peak_since(start)
    with allocations() as during:
        action(case, model)()
    del model
    with allocations() as loading:
        again = random_model(case.shape, dtype=getattr(torch, case.dtype))
    del again
    ask = case.ask
    weights = ask.model.nbytes(ask.item) + ask.coders.nbytes
    running = work(ask, case.task)
    tables = host_tables(ask, case.task)
    return {
        "case": case.name,
        "dtype": case.dtype,
        "estimate": {"weights": weights, "work": running.peak, "tables": tables},
        "steps": running.peaks,
        "allocated": {"weights": loading.left, "work": during.peak},
        "resident": resident,
        "ratio_weights": weights / loading.left,
        "ratio_work": running.peak / during.peak,
        "ratio_whole": (weights + running.peak) / (loading.left + during.peak),
        "ratio_resident": (weights + running.peak + tables) / resident if resident else None,
    }


def start_peak_again() -> None:
    """Forget what making the model took, and give the heap's free pages back."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    start_peak()


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    found = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for case in cases(args.tiny):
            one = pool.submit(measure, case, args.threads).result()
            found.append(one)
            say(f"{case.dtype} {case.name}: whole {one['ratio_whole']:.3f}, work {one['ratio_work']:.3f}, "
                f"resident {one['ratio_resident'] or 0:.3f}")  # fmt: skip
    worst = max(abs(one["ratio_whole"] - 1) for one in found)
    shape = asdict(cases(args.tiny)[0].shape)
    result = {"shape": shape, "cases": found, "worst": worst, "bound": BOUND, "machine": machine()}
    emit(result, as_json=args.json)


if __name__ == "__main__":
    main()
