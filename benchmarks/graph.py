"""How the time of a whole graph grows with features, tokens and layers, by phase.

    python benchmarks/graph.py [--json] [--tiny] [--repeats N]

`trace(..., sample=0)` on a random model, one size changed at a time. An exponent is the slope of log seconds against
log size by least squares: 1 is linear growth, 0 none. Phases: recording and scoring; choosing nodes and laying them
out; computing the edges and keeping the strongest into each node; pruning.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from _measure import emit, exponent, machine, phases, say
from _worlds import Shape, random_model, random_prompt

from circuits import trace
from hooks import HookedModel

PARTS = {
    "record": "record_score",
    "score": "record_score",
    "select": "select",
    "lay out": "select",
    "edges": "edges",
    "keep": "edges",
    "prune": "prune",
}


@dataclass(frozen=True)
class Sizes:
    """The base case, and the further sizes along each axis."""

    shape: Shape
    nodes: int
    tokens: int
    over: dict[str, tuple[int, ...]]


FULL = Sizes(
    Shape(8, 512, 1376, 8, 2, features=2048, k=245, head_dim=64),
    nodes=2000,
    tokens=16,
    over={"nodes": (500, 1000, 2000, 4000, 8000), "tokens": (8, 16, 32, 64), "layers": (4, 8, 16)},
)
TINY = Sizes(
    Shape(2, 40, 56, 5, 1, features=96, k=11, head_dim=16, vocab=64),
    nodes=20,
    tokens=5,
    over={"nodes": (10, 20), "tokens": (4, 8), "layers": (2, 3)},
)


def seconds(model: HookedModel, prompt: list[int], nodes: int, repeats: int) -> dict[str, float]:
    """Median seconds by phase, and of the whole."""
    seen: list[dict[str, float]] = []
    for _ in range(repeats):
        with phases() as found:
            trace(model, prompt, max_nodes=nodes, sample=0)
        parts = dict.fromkeys(PARTS.values(), 0.0)
        for name, spent in found.items():
            parts[PARTS[name]] += spent
        seen.append({**parts, "whole": sum(parts.values())})
    return {name: statistics.median(one[name] for one in seen) for name in seen[0]}


def along(sizes: Sizes, axis: str, repeats: int, convention: str) -> dict[str, Any]:
    """One axis: seconds by size and phase, and the exponents."""
    found: dict[int, dict[str, float]] = {}
    model = None
    for size in sizes.over[axis]:
        if model is None or axis == "layers":
            shape = replace(sizes.shape, layers=size) if axis == "layers" else sizes.shape
            model = random_model(shape, convention)
            seconds(model, random_prompt(shape, sizes.tokens), sizes.nodes, 1)  # warm
        prompt = random_prompt(shape, size if axis == "tokens" else sizes.tokens)
        found[size] = seconds(model, prompt, size if axis == "nodes" else sizes.nodes, repeats)
        say(f"{axis} {size}: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in found[size].items()))
    parts = next(iter(found.values()))
    slopes = {name: exponent(list(found), [one[name] for one in found.values()]) for name in parts}
    return {"seconds": {str(size): one for size, one in found.items()}, "exponents": slopes}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="How the time of a whole graph grows.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--repeats", type=int, default=3, help="traces per size (medians are reported)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--convention", default="same-site", choices=("same-site", "next-layer", "mlp"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 2 minutes on 2 free cores; 2 GB of memory")
    axes = {axis: along(sizes, axis, args.repeats, args.convention) for axis in sizes.over}
    base = {"shape": str(sizes.shape), "nodes": sizes.nodes, "tokens": sizes.tokens, "convention": args.convention}
    emit({**axes, "base": base, "machine": machine()}, as_json=args.json)


if __name__ == "__main__":
    main()
