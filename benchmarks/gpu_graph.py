"""Whole graphs at Qwen2.5-32B's shape on one GPU: time by phase, peak memory, and the share of what the device allows.

    python benchmarks/gpu_graph.py [--json] [--convention same-site|next-layer|mlp] [--tokens 16,32,128]
                                   [--nodes 2000,10000,50000,all] [--out FILE] [--limit SECONDS] [--tiny]

64 blocks, transcoders at 63 of them, bf16, random weights drawn on the device, one tensor after the other. Cases run
by tokens, then nodes; none is begun after `--limit` seconds, and what is left out is listed. `--out` is rewritten
after every case, so that a run that is cut short has lost nothing. `--tiny` runs the same code on the CPU.

A floor is the larger of bytes / bandwidth and FLOP / rate of the necessary work of a phase, with each weight read once
(docs/performance.md has the formulas). Bandwidth and rate are measured at the start, on this device.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import clock, emit, machine, peak_since, phases, say, start_peak
from _worlds import CONVENTIONS, Shape, random_model, random_prompt

from circuits import Graph, trace
from circuits.graph import FEATURE
from hooks import HookedModel

FULL = Shape(64, 5120, 27648, 40, 8, features=12288, k=1474, vocab=152064, transcoders=63)
TINY = Shape(3, 40, 56, 5, 1, features=96, k=11, head_dim=16, vocab=64, transcoders=2)


@dataclass(frozen=True)
class Rates:
    """The device's best rates: floating-point operations and bytes read per second."""

    flop: float
    bytes: float

    def seconds(self, flop: float, nbytes: float) -> float:
        """No less than this."""
        return max(flop / self.flop, nbytes / self.bytes)


def measured_rates(device: str, dtype: torch.dtype) -> Rates:
    """A large matrix product, and a sum over a large tensor; the best of five."""
    side, entries = (8192, 1 << 31) if device == "cuda" else (512, 1 << 22)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    flop = 2 * side**3 / min(clock(lambda: a @ b, device) for _ in range(5))
    x = torch.ones(entries, dtype=dtype, device=device)
    return Rates(flop, x.nbytes / min(clock(x.sum, device) for _ in range(5)))


def floors(shape: Shape, tokens: int, convention: str, graph: Graph, itemsize: int, rates: Rates) -> dict[str, float]:
    """Seconds by phase of a graph, `exact`.

    Edges: behind one another, each target passes its own MLP once and every block down to what feeds it; one block, at
    its own position, where the whole stream is rewritten; the attention of all blocks below, at all positions, where
    outputs of MLPs are.
    """
    coders = shape.transcoders or shape.layers
    blocks, head = shape.layers * shape.block_numbers, shape.vocab * shape.d_model
    dictionary = coders * shape.features * shape.d_model
    forward = rates.seconds(2 * tokens * blocks + 2 * head, itemsize * (blocks + head))
    encode = rates.seconds(2 * tokens * dictionary, itemsize * dictionary)
    query, keyvalue = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp, attention = 3 * shape.d_model * shape.d_ff, shape.d_model * (2 * query + 2 * keyvalue)
    per_layer = Counter(graph.index.layer[graph.index.kind == FEATURE].tolist())
    flop = numbers = 0.0
    for layer, count in per_layer.items():
        if convention == "mlp":
            flop, numbers = flop + 2 * count * tokens * attention * layer, numbers + attention * layer
        elif convention == "same-site" and layer:
            pairs = count * per_layer[layer - 1] / 2
            flop += 2 * count * (mlp + 2 * query * shape.d_model) + 4 * pairs * keyvalue
            numbers += mlp + attention
    return {"record": forward + encode, "score": forward + encode, "edges": rates.seconds(flop, itemsize * numbers)}


def measure(model: HookedModel, shape: Shape, tokens: int, nodes: int | None, setting: "Setting") -> dict[str, Any]:
    """One graph: seconds by phase, peak memory, shares of the floors."""
    prompt, graphs = random_prompt(shape, tokens), list[Graph]()
    start = _start_peak(setting.device)
    with phases(setting.device) as found:
        seconds = clock(
            lambda: graphs.append(
                trace(model, prompt, max_nodes=nodes, sample=0, node_threshold=1.0, edge_threshold=1.0)
            ),
            setting.device,
        )
    graph = graphs[0]
    least = floors(shape, tokens, setting.convention, graph, setting.dtype.itemsize, setting.rates)
    chosen = graph.meta["selection"]
    return {
        "tokens": tokens,
        "nodes": chosen["selected"],
        "of_active": chosen["active_features"],
        "edges": graph.n_edges,
        "seconds": seconds,
        "peak_bytes": _peak_since(setting.device, start),
        "phases": dict(found),
        "floors": {**least, "whole": sum(least.values())},
        "share_of_floor": {
            **{name: least[name] / found[name] for name in least if found.get(name)},
            "whole": sum(least.values()) / seconds,
        },
    }


@dataclass(frozen=True)
class Setting:
    """Facts that all cases share."""

    device: str
    dtype: torch.dtype
    convention: str
    rates: Rates


def _start_peak(device: str) -> int:
    if device == "cpu":
        return start_peak()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(device: str, start: int) -> int:
    return peak_since(start) if device == "cpu" else torch.cuda.max_memory_allocated() - start


def run(shape: Shape, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Build the model, then every case."""
    began = time.perf_counter()
    models: list[HookedModel] = []
    built = clock(
        lambda: models.append(random_model(shape, setting.convention, dtype=setting.dtype, device=setting.device)),
        setting.device,
    )
    say(f"model built in {built:.1f} s: {shape}")
    result: dict[str, Any] = {
        "shape": str(shape),
        "convention": setting.convention,
        "model_bytes": shape.nbytes(setting.dtype),
        "build_seconds": built,
        "rates": {"tflop_per_s": setting.rates.flop / 1e12, "gb_per_s": setting.rates.bytes / 1e9},
        "cases": [],
        "left_out": [],
        "machine": machine(setting.device),
    }
    plan = [(tokens, nodes) for tokens in args.tokens for nodes in args.nodes]
    measure(models[0], shape, *plan[0], setting)  # warm
    for tokens, nodes in plan:
        if time.perf_counter() - began > args.limit:
            result["left_out"].append({"tokens": tokens, "nodes": nodes})
            continue
        try:
            result["cases"].append(measure(models[0], shape, tokens, nodes, setting))
            say(json.dumps(result["cases"][-1]))
        except torch.OutOfMemoryError as error:
            result["left_out"].append({"tokens": tokens, "nodes": nodes, "reason": str(error).splitlines()[0]})
        if args.out:
            args.out.write_text(json.dumps(result))
    return result


def _counts(text: str) -> list[int | None]:
    return [None if part == "all" else int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Whole graphs at the shape of Qwen2.5-32B on one GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU, to see that it works")
    parser.add_argument("--convention", default="same-site", choices=CONVENTIONS)
    parser.add_argument("--tokens", type=_counts, help="lengths of prompts")
    parser.add_argument("--nodes", type=_counts, help="features per graph; all: every active one")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="rewritten after every case")
    args = parser.parse_args(arguments)
    device, dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    if not args.tiny and not torch.cuda.is_available():
        say("no CUDA device here; --tiny runs the same code on the CPU")
        emit({"skipped": "no CUDA device", "machine": machine()}, as_json=args.json)
        return
    args.tokens = args.tokens or ([4, 6] if args.tiny else [16, 32, 128])
    args.nodes = args.nodes or ([10, None] if args.tiny else [2000, 10_000, 50_000])
    shape = TINY if args.tiny else FULL
    say("a moment" if args.tiny else f"{shape.nbytes(dtype) / 1e9:.0f} GB of weights, up to {args.limit:.0f} s")
    setting = Setting(device, dtype, args.convention, measured_rates(device, dtype))
    emit(run(shape, setting, args), as_json=args.json)


if __name__ == "__main__":
    main()
