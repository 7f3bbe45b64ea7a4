"""The error of bf16: edges of one block of Qwen2.5-32B's shape in bf16 against the same weights in fp32.

    python benchmarks/half_precision.py [--json] [--tiny]

The targets are 160 directions after the block. The sources are the features that are active in both precisions. The
streams are the model's own in each precision, so its rounding is included. Features that TopK keeps in only one
precision are left out of the comparison, and their number is reported. `conservation` is the affine rule's largest gap
in bf16, |value − sum of edges| / max(|value|, sum |e|), with every edge computed directly.
"""

import argparse
import copy
from typing import Any

import torch
from _measure import emit, machine, say
from _worlds import Shape, random_model, random_prompt
from torch import Tensor

from circuits import RULES, Direction, prepare
from circuits.edges import LocalRun, Rows
from hooks import HookedModel, Site

BEHIND = Site("resid_post", 0)
FULL, FULL_TOKENS, FULL_TARGETS = Shape(1, 5120, 27648, 40, 8, features=12288, k=1474), 32, 160
TINY, TINY_TOKENS, TINY_TARGETS = Shape(1, 64, 96, 4, 2, 128, 15, head_dim=16, vocab=64), 6, 8


def edges(model: HookedModel, rule: str, prompt: list[int], count: int) -> tuple[LocalRun, Rows]:
    """Edges into random directions, spread over the prompt."""
    width = model.host.d_model
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    pos = [j * len(prompt) // count for j in range(count)]
    targets = [
        Direction(v, BEHIND, t, name=f"direction {j}") for j, (v, t) in enumerate(zip(vectors, pos, strict=True))
    ]
    run = prepare(model, prompt, targets=targets, max_nodes=None, rule=rule)
    return run, next(iter(RULES[rule].edge_rows(run)))


def common(first: LocalRun, second: LocalRun) -> tuple[Tensor, Tensor]:
    """Columns of the features that both runs have."""
    keys = [cut.pos * cut.transcoder.d_features + cut.feature for cut in (first.cuts[0], second.cuts[0])]
    return torch.isin(keys[0], keys[1]).nonzero()[:, 0], torch.isin(keys[1], keys[0]).nonzero()[:, 0]


def measure(shape: Shape, tokens: int, count: int) -> dict[str, Any]:
    """Both rules."""
    half = random_model(shape, dtype=torch.bfloat16)
    coders = [coder.to("cpu", torch.float32) for coder in half.store]
    whole = HookedModel.from_model(copy.deepcopy(half.host.model).float(), half.host.tokenizer, coders)
    prompt, found = random_prompt(shape, tokens), {}
    for rule in ("exact", "affine"):
        say(f"{rule} …")
        (low, bf16), (high, fp32) = (edges(model, rule, prompt, count) for model in (half, whole))
        columns = common(low, high)
        a, b = bf16.weights[:, columns[0]].flatten(), fp32.weights[:, columns[1]].flatten()
        gap = (bf16.values - bf16.weights.sum(1)).abs()
        size = torch.maximum(bf16.values.abs(), bf16.weights.abs().sum(1))
        found[rule] = {
            "pearson": float(torch.corrcoef(torch.stack([a, b]).double())[0, 1]),
            "largest_difference": float((a - b).abs().max() / b.abs().max()),
            "compared_share_of_features": len(columns[0]) / len(low.cuts[0].pos),
            **({"conservation": float((gap / size).max())} if RULES[rule].CONSERVES else {}),
        }
    return {**found, "machine": machine()}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Edges in bf16 against fp32.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    args = parser.parse_args()
    say("a moment" if args.tiny else "about a minute; 8 GB of memory")
    sizes = (TINY, TINY_TOKENS, TINY_TARGETS) if args.tiny else (FULL, FULL_TOKENS, FULL_TARGETS)
    emit(measure(*sizes), as_json=args.json)


if __name__ == "__main__":
    main()
