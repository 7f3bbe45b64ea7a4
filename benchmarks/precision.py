"""The time of exact arithmetic over bf16 weights, and of an ablation relative to a plain forward pass of transformers.

Two blocks of the shape of Qwen2.5-1.5B with its vocabulary of 152,000, random bf16 weights. In each round all calls run
one after the other; ratios are medians over the rounds. `forward` is a whole pass with the logits of the last position,
native and exact; `transformers` is the model's own code, which takes most of its time for the one row of bf16 logits
on a CPU: so `run`, `ablate` and `record`, which go through the public API, are also given per forward of ours.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from _allocations import allocations
from _measure import emit, machine, say
from _worlds import Shape, random_model

from hooks import Ablate, HookedModel
from hooks.host import computing

BLOCKS = Shape(layers=2, d_model=1536, d_ff=8960, heads=12, kv_heads=2, features=3686, k=442, vocab=151_936)


def ways(model: HookedModel, ids: list[int]) -> dict[str, Callable[[], object]]:
    """The calls that are timed, by name."""
    hf, batch = model.host.model, model.host.batch([ids])
    tokens = torch.tensor([ids])

    def plain() -> object:
        with torch.no_grad():
            return hf(input_ids=tokens, use_cache=False, logits_to_keep=1).logits

    def forward(precision: str) -> object:
        with computing(model.host, precision):
            return model.host.forward_at(batch, batch.last)

    def under(precision: str, call: Callable[[], object]) -> object:
        model.precision = precision  # type: ignore[assignment]
        return call()

    calls: dict[str, Callable[[], object]] = {
        "run": lambda: model.run(ids).top_before(1),
        "ablate": lambda: model.run(ids, [Ablate("L0/3")]).effect(),
        "record": lambda: model.record(ids),
    }
    out: dict[str, Callable[[], object]] = {"transformers": plain}
    for precision in ("native", "exact"):
        out[f"forward_{precision}"] = lambda p=precision: forward(p)  # type: ignore[misc]
        for name, call in calls.items():
            out[f"{name}_{precision}"] = lambda p=precision, c=call: under(p, c)  # type: ignore[misc]
    return out


def measure(model: HookedModel, length: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each way, and ratios."""
    peak = peaks(model, length)
    timed = ways(model, [(37 * n) % 1000 for n in range(length)])
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    peak = peaks(model, length)
    return {
        "tokens": length,
        "peak_bytes": peak,
        "seconds": {n: statistics.median(s) for n, s in seconds.items()},
        **ratios(seconds),
    }


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of quotients within a round."""

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))

    out = {"exact_ratio": ratio("forward_exact", "forward_native")}
    for precision in ("native", "exact"):
        for call in ("run", "ablate", "record"):
            out[f"{call}_{precision}_ratio"] = ratio(f"{call}_{precision}", "transformers")
            out[f"{call}_{precision}_per_own_forward"] = ratio(f"{call}_{precision}", f"forward_{precision}")
    return out


def peaks(model: HookedModel, length: int) -> dict[str, int]:
    """Bytes above the model that an exact ablation and an exact record take at most."""
    out = {}
    for name, call in ways(model, [(37 * n) % 1000 for n in range(length)]).items():
        if name in ("ablate_exact", "record_exact", "ablate_native"):
            with allocations() as found:
                call()
            out[name] = found.peak
    return out


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 32])
    parser.add_argument("--layers", type=int, default=BLOCKS.layers)
    parser.add_argument("--vocab", type=int, default=BLOCKS.vocab)
    args = parser.parse_args()
    shape = replace(BLOCKS, layers=args.layers, vocab=args.vocab)
    model = random_model(shape, dtype=torch.bfloat16)
    cases = []
    for length in args.tokens:
        say(f"{length} tokens")
        cases.append(measure(model, length, args.rounds))
    emit({"machine": machine(), "cases": cases}, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
