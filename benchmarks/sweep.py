"""Ablating a thousand features one by one: ours against a loop of forward passes, and against a batched loop.

    python benchmarks/sweep.py [--json] [--tiny] [--repeats N]

The first alternative runs the plain model once per feature, with SDPA and one hook that adds the change to the stream.
The second takes the features of a layer in batches, and starts each batch at that layer's block from the clean stream
before it, so it skips all blocks below. Both get the changes −a_i d_i; ours computes them. All measure
logit(answer) − logit(best other) at the last position, and must agree to 1e-4. The time of ours includes its clean
pass.

`last_position`: features of the last position only; `uniform`: of all positions; `demo`: every active feature of a
prompt on the embedded model. Transcoders read and write the stream before a block.
"""

import argparse
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _measure import clock, emit, machine, say
from _worlds import Shape, random_model, random_prompt
from torch import Tensor

from hooks import Ablate, HookedModel
from hooks.effects import active_features
from hooks.types import FeatureAddress

ROWS_TRIED = (32, 64, 128)  # rows per batch that the batched loop tries


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: Shape
    tokens: int
    features: int


FULL = Sizes(Shape(16, 512, 1376, 8, 2, 2048, 245, head_dim=64), 32, 1000)
TINY = Sizes(Shape(3, 40, 56, 5, 1, 96, 11, head_dim=16, vocab=64), 6, 12)


@dataclass(frozen=True)
class Ready:
    """One prompt, its clean run, and the vector that each ablation adds to the stream before a block.

    Attributes:
        streams: the streams before every block.
        places: block and position of each change.
    """

    model: HookedModel
    prompt: list[int]
    addresses: list[FeatureAddress]
    ids: Tensor
    pair: tuple[int, int]
    clean: float
    streams: list[Tensor]
    places: list[tuple[int, int]]
    changes: Tensor


def ready(model: HookedModel, prompt: list[int], addresses: list[FeatureAddress]) -> Ready:
    """The inputs of the alternatives."""
    recording = model.record([prompt])
    logits = recording.logits[0, -1]
    first, second = logits.topk(2).indices.tolist()
    streams = [recording.layers[layer].target[0] for layer in recording.layers]
    dense = {layer: seen.acts.dense(model.store[layer].d_features)[0] for layer, seen in recording.layers.items()}
    places = [(address.layer, address.positions.start or 0) for address in addresses]
    acts = torch.stack([dense[a.layer][pos, a.feature] for a, (_, pos) in zip(addresses, places, strict=True)])
    rows = torch.stack([model.store[a.layer].W_dec[a.feature] for a in addresses])
    clean = float(logits[first].double() - logits[second].double())
    return Ready(
        model, prompt, addresses, recording.batch.ids, (first, second), clean, streams, places, -acts[:, None] * rows
    )


def ours(case: Ready) -> list[float]:
    """Through the public call."""
    return case.model.sweep(case.prompt, [[Ablate(address)] for address in case.addresses]).table["delta"].tolist()


def loop(case: Ready) -> list[float]:
    """One forward pass of the plain model per feature."""
    plain: Any = case.model.host.model
    found = []
    with torch.no_grad():
        for (layer, pos), change in zip(case.places, case.changes, strict=True):
            hook = plain.model.layers[layer].register_forward_pre_hook(partial(_add, pos, change))
            logits = plain(input_ids=case.ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            hook.remove()
            found.append(_metric(logits, case))
    return found


def _add(pos: int, change: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = inputs[0].clone()
    out[:, pos] += change
    return (out, *inputs[1:])


def _metric(logits: Tensor, case: Ready) -> float:
    return float(logits[case.pair[0]].double() - logits[case.pair[1]].double()) - case.clean


def batched(case: Ready, rows: int) -> list[float]:
    """Batches of one layer's features from its block on, whole rows."""
    host = case.model.host
    found = [0.0] * len(case.places)
    by_layer: dict[int, list[int]] = defaultdict(list)
    for number, (layer, _) in enumerate(case.places):
        by_layer[layer].append(number)
    for layer, numbers in by_layer.items():
        for start in range(0, len(numbers), rows):
            part = numbers[start : start + rows]
            x = case.streams[layer].expand(len(part), -1, -1).clone()
            for row, number in enumerate(part):
                x[row, case.places[number][1]] += case.changes[number]
            x = host.through_blocks(x, layer, host.n_layers)
            with torch.no_grad():
                logits = host.unembed(host.decoder.norm(x[:, -1]))
            for row, number in enumerate(part):
                found[number] = _metric(logits[row], case)
    return found


def compare(case: Ready, repeats: int) -> dict[str, Any]:
    """All three in turn."""
    candidates = {rows: clock(partial(batched, case, rows)) for rows in ROWS_TRIED}
    rows = min(candidates, key=lambda number: candidates[number])
    works = {"ours": partial(ours, case), "batched": partial(batched, case, rows), "loop": partial(loop, case)}
    effects = {name: work() for name, work in works.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
            if name != "loop":
                times[name].append(clock(work))
    seconds = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    differences = [
        max(abs(a - b) for a, b in zip(effects["ours"], effects[name], strict=True)) for name in ("batched", "loop")
    ]
    return {
        "features": len(case.addresses),
        **seconds,
        "ratio": seconds["loop_s"] / seconds["ours_s"],
        "batched_ratio": seconds["batched_s"] / seconds["ours_s"],
        "batched_rows": rows,
        "max_difference": max(differences),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="A thousand single-feature ablations, against two kinds of loops.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (medians are reported)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 10 minutes on 2 free cores; 1 GB of memory")
    model = random_model(sizes.shape)
    prompt = random_prompt(sizes.shape, sizes.tokens)
    every = active_features(model.record([prompt]))
    last = [address for address in every if address.positions.start == sizes.tokens - 1]
    draw = random.Random(0)
    result: dict[str, Any] = {}
    for name, chosen in (("last_position", last), ("uniform", every)):
        case = ready(model, prompt, draw.sample(chosen, min(sizes.features, len(chosen))))
        result[name] = compare(case, args.repeats)
        result[f"{name}_ratio"] = result[name]["ratio"]
        say(f"{name}: {result[name]}")
    demo = HookedModel.load("demo")
    torch.set_num_threads(1)  # a tiny model is slower on several
    text = "fact: the capital of the state containing Dallas is"
    ids = demo.host.tokenize(text)
    every = active_features(demo.record([ids]))
    result["demo"] = compare(ready(demo, ids, every[: 12 if args.tiny else None]), args.repeats)
    say(f"demo: {result['demo']}")
    emit({**result, "machine": machine()}, as_json=args.json)


if __name__ == "__main__":
    main()
