"""Edges of one block of Qwen2.5-32B's shape: ours against plain automatic differentiation, same rule, same numbers.

    python benchmarks/edges.py [--json] [--tiny] [--repeats N]

The targets are 160 directions after one block. The sources are all active features before it (32 tokens × 1,474). All
edges between them are computed, in fp32 on 2 threads. The alternative is the faster form of `_plain_block`. Both times
begin after the forward pass (`*_forward_s`). `ratio_with_forward` includes it. `ours_cold_s` includes it too, and the
images of the dictionary in value and key space, which depend only on weights and are computed once per layer.
`products_s` is the time of torch's matrix products with the block's weights and the sources' images alone, on random
numbers of the same shapes, everything gathered beforehand. `flat` says how our own time grows with the prompt.
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _measure import clock, emit, interleaved, machine, say
from _plain_block import Form, PlainBlock, differentiated, fastest
from _worlds import Shape, random_model, random_prompt
from torch import Tensor

from circuits import RULES, Direction, prepare
from circuits.edges import LocalRun
from hooks import HookedModel, Site

BEHIND = Site("resid_post", 0)
TURNS = 2  # calls of ours before and after each of the alternative


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        chunks: of targets, that the alternative tries.
        lengths: of prompts, along which our own time should be flat.
    """

    shape: Shape
    tokens: int
    targets: int
    chunks: tuple[int, ...]
    lengths: tuple[int, ...]

    def spread(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Targets: random directions [target d_model], and their positions, spread evenly over the prompt."""
        vectors = torch.randn(self.targets, self.shape.d_model, generator=torch.Generator().manual_seed(1))
        return vectors / self.shape.d_model**0.5, torch.arange(self.targets) * tokens // self.targets


FULL = Sizes(
    Shape(1, 5120, 27648, 40, 8, features=12288, k=1474), 32, 160, chunks=(8, 16, 32), lengths=(16, 32, 64, 128)
)
TINY = Sizes(Shape(1, 40, 56, 5, 1, 96, 11, head_dim=16, vocab=64), 6, 8, chunks=(4,), lengths=(4, 8))


def prepared(
    model: HookedModel, sizes: Sizes, rule: str, *, tokens: int, seed: int, max_nodes: int | None = None
) -> LocalRun:
    """A prompt with everything done but the edges and the recording of the blocks."""
    pairs = enumerate(zip(*sizes.spread(tokens), strict=True))
    targets = [Direction(vector, BEHIND, int(pos), name=f"direction {j}") for j, (vector, pos) in pairs]
    prompt = random_prompt(sizes.shape, tokens, seed=seed)
    return prepare(model, prompt, targets=targets, max_nodes=max_nodes, rule=rule)


def ours(run: LocalRun, rule: str) -> Tensor:
    """All edges into the targets, [target source]; features come first."""
    return next(iter(RULES[rule].edge_rows(run))).weights


def compare(model: HookedModel, sizes: Sizes, rule: str, repeats: int) -> dict[str, Any]:
    """Ours and the alternative in turn, on a new prompt each time."""
    run = prepared(model, sizes, rule, tokens=sizes.tokens, seed=0)
    cold = clock(lambda: run.stack) + clock(lambda: ours(run, rule))
    block = PlainBlock.of(run, *sizes.spread(sizes.tokens))
    with differentiated(block.layer, rule):
        form = fastest(block, sizes.chunks, clock)
    times: dict[str, list[float]] = defaultdict(list)
    differences = []
    for seed in range(1, repeats + 1):
        run = prepared(model, sizes, rule, tokens=sizes.tokens, seed=seed)
        differences.append(_take_turns(run, sizes, rule, form, times))
        say(f"{rule}, {form}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in times.items()))
    median = {name: statistics.median(values) for name, values in times.items()}
    whole = [median[f"{who}_s"] + median[f"{who}_forward_s"] for who in ("alternative", "ours")]
    return {
        "ratio": median["alternative_s"] / median["ours_s"],
        "ratio_with_forward": whole[0] / whole[1],
        **median,
        "ours_cold_s": cold,
        "products_s": bare_products(sizes, rule, sizes.tokens, repeats),
        "alternative": str(form),
        "max_rel_diff": max(differences),
    }


def bare_products(sizes: Sizes, rule: str, tokens: int, repeats: int) -> float:
    """Seconds of the matrix products that the targets' gradients and the sources' images need."""
    shape, exact, targets = sizes.shape, rule == "exact", sizes.targets
    d, ff = shape.d_model, shape.d_ff
    shapes = [(targets, d, ff)] + [(targets, ff, d)] * (1 + exact)  # down projection; up, and gate
    shapes += [(targets, d, shape.heads * shape.head_dim)] * (1 + exact)  # output projection, and queries
    first = [-(-t * targets // tokens) for t in range(tokens)]  # targets at or after each position of sources
    shapes += [(targets - start, shape.kv_heads * shape.head_dim, shape.k) for start in first for _ in range(1 + exact)]
    numbers = {size: torch.randn(size) for pair in shapes for size in ((pair[0], pair[1]), (pair[2], pair[1]))}
    pairs = [(numbers[rows, inner], numbers[columns, inner].T) for rows, inner, columns in shapes]

    def work() -> None:
        for left, right in pairs:
            left @ right

    return statistics.median(clock(work) for _ in range(repeats + 1))


def _take_turns(run: LocalRun, sizes: Sizes, rule: str, form: Form, times: dict[str, list[float]]) -> float:
    """Time both on one prompt; return the largest difference relative to the largest edge."""
    block = PlainBlock.of(run, *sizes.spread(sizes.tokens))
    times["ours_forward_s"].append(clock(lambda: run.stack))
    times["ours_s"] += [clock(lambda: ours(run, rule)) for _ in range(TURNS)]
    with differentiated(block.layer, rule):
        found: list[Any] = []
        times["alternative_forward_s"].append(clock(lambda: found.append(block.forward())))
        times["alternative_s"].append(clock(lambda: found.append(block.edges(form, found[0]))))
    times["ours_s"] += [clock(lambda: ours(run, rule)) for _ in range(TURNS)]
    theirs = found[1]
    return float((ours(run, rule)[:, : theirs.shape[1]] - theirs).abs().max() / theirs.abs().max())


def flat(model: HookedModel, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Our time by length of the prompt, `exact`: of the targets' products alone, and of all rows."""
    found: dict[str, Any] = {}
    for name, most in (("vjp", 1), ("rows", None)):
        runs = {T: prepared(model, sizes, "exact", tokens=T, seed=T, max_nodes=most) for T in sizes.lengths}
        for run in runs.values():
            ours(run, "exact")  # the blocks are recorded, the dictionary's images made
        works = {str(T): partial(ours, run, "exact") for T, run in runs.items()}
        found[name] = interleaved(works, repeats)
        found[f"{name}_spread"] = max(found[name].values()) / min(found[name].values())
        say(f"{name}: " + ", ".join(f"{T} tokens {seconds:.2f} s" for T, seconds in found[name].items()))
    found["products"] = {str(T): bare_products(sizes, "exact", T, repeats) for T in sizes.lengths}
    found["products_spread"] = max(found["products"].values()) / min(found["products"].values())
    return found


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Edges of one block of the true shape, against plain autograd.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--repeats", type=int, default=3, help="prompts per figure (medians are reported)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 5 minutes on 2 free cores; 7 GB of memory")
    model = random_model(sizes.shape)
    found = {rule: compare(model, sizes, rule, args.repeats) for rule in ("exact", "affine")}
    equal = {"max_rel_diff": max(figures.pop("max_rel_diff") for figures in found.values())}
    result = {**found, "equal": equal, "flat": flat(model, sizes, args.repeats), "machine": machine()}
    emit(result, as_json=args.json)


if __name__ == "__main__":
    main()
