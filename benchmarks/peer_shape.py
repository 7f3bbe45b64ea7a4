"""Whole graphs of the sizes that other tools use: time and peak memory of `trace`, small models with a dense
dictionary.

    python benchmarks/peer_shape.py [--json] [--tiny] [--repeats N]

`trace(..., sample=0)`: record, score, select, all edges, the strongest 256 into each node kept, influence, prune. Each
case runs in its own process. `peak_bytes` is the peak of resident memory during its first trace, minus the memory that
was resident after the model was loaded (the kernel's high-water mark, reset in between; docs/performance.md).
`seconds` is the median over all traces, the first one included; `first_seconds` is the time of the first one. The
alternative is the rule `autograd`, the same graph by automatic differentiation of whole passes, on 500 features.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from _measure import clock, emit, machine, peak_since, phases, say, start_peak
from _worlds import Shape, random_model, random_prompt

from circuits import Graph, trace
from hooks import HookedModel

SMALL = Shape(8, 256, 688, 8, 2, features=1024, k=122, head_dim=32)
LARGE = Shape(16, 512, 1376, 8, 2, features=2048, k=245, head_dim=64)
ENOUGH = 60.0  # seconds of one case, after which it is not repeated
TINY = Shape(2, 40, 56, 5, 1, features=96, k=11, head_dim=16, vocab=64)


@dataclass(frozen=True)
class Case:
    """One graph.

    Attributes:
        max_nodes: None: every active feature.
        alternative: whether the rule `autograd` is timed too.
    """

    shape: Shape
    tokens: int
    convention: str
    max_nodes: int | None
    alternative: bool = False


def cases(tiny: bool) -> list[Case]:
    """Smallest first."""
    if tiny:
        return [Case(TINY, 5, "same-site", 20, alternative=True)]
    return [
        Case(shape, tokens, convention, most, alternative=most == 500)
        for shape, tokens in ((SMALL, 24), (LARGE, 16))
        for convention in ("same-site", "mlp")
        for most in (500, 2000, None)
    ]


def measure(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(threads)
    model = random_model(case.shape, case.convention)
    prompt = random_prompt(case.shape, case.tokens)
    before = start_peak()
    first, graph, parts = draw(model, prompt, case.max_nodes, "exact")
    peak, found = peak_since(before), {"exact": [first], "autograd": []}
    for _ in range(repeats if case.alternative else 0):
        found["autograd"].append(draw(model, prompt, case.max_nodes, "autograd")[0])
        found["exact"].append(draw(model, prompt, case.max_nodes, "exact")[0])
    while len(found["exact"]) < repeats and sum(found["exact"]) < ENOUGH:
        seconds, graph, parts = draw(model, prompt, case.max_nodes, "exact")
        found["exact"].append(seconds)
    seconds = statistics.median(found["exact"])
    result = {
        "shape": str(case.shape),
        "tokens": case.tokens,
        "convention": case.convention,
        "nodes": graph.meta["selection"]["selected"],
        "of_active": graph.meta["selection"]["active_features"],
        "edges": graph.meta["pruning"]["edges_before"],
        "seconds": seconds,
        "first_seconds": first,
        "peak_bytes": peak,
        "phases": parts,
    }
    if case.alternative:
        slow = statistics.median(found["autograd"])
        result |= {"autograd_seconds": slow, "autograd_ratio": slow / seconds}
    return result


def draw(
    model: HookedModel, prompt: list[int], max_nodes: int | None, rule: str
) -> tuple[float, Graph, dict[str, float]]:
    """One graph: how long it took, the graph, and seconds by phase."""
    graphs: list[Graph] = []
    with phases() as found:
        seconds = clock(lambda: graphs.append(trace(model, prompt, max_nodes=max_nodes, rule=rule, sample=0)))
    return seconds, graphs[0], dict(found)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Time and peak memory of whole graphs on small models.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--repeats", type=int, default=3, help="traces per case")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    say("a moment" if args.tiny else "about 4 minutes on 2 free cores; 2 GB of memory")
    found = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for case in cases(args.tiny):
            found.append(pool.submit(measure, case, args.repeats, args.threads).result())
            last = found[-1]
            say(
                f"{last['convention']}, {last['nodes']} of {last['of_active']} features, {last['shape']}: "
                f"{last['seconds']:.2f} s, {last['peak_bytes'] / 1e9:.2f} GB"
            )
    head = next(one for one in reversed(found[:3]) if one["convention"] == "same-site")
    result = {
        "seconds": head["seconds"],
        "peak_bytes": head["peak_bytes"],
        "autograd_ratio": found[0]["autograd_ratio"],
        "cases": found,
        "machine": {**machine(), "threads": args.threads},
    }
    emit(result, as_json=args.json)


if __name__ == "__main__":
    main()
