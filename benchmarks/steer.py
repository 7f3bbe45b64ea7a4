"""The time of steering during generation: seconds per token against transformers' own `generate`, greedy, cached.

    python benchmarks/steer.py [--json] [--tiny] [--repeats N]

Ours with one clamped feature in 0, 1, 5 and all layers, at every position; with the features of all layers observed;
and with all layers replaced by their reconstructions (`error="zero"`: under `live` a swap without interventions is the
identity and computes nothing). All modes take turns, the order reversed every other round, and an overhead is the
median over rounds of a ratio within the round. Seconds include the prompt. `one_layer_overhead` is against
transformers' own `generate`, `one_layer_overhead_over_ours` against ours without interventions. TransformerLens' bridge
runs once, for comparison, if it is installed. Before timing, the modules are checked during a pass: without
interventions none of them has a hook.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _measure import clock, emit, machine, say
from _worlds import Shape, random_model, random_prompt
from torch.nn.modules import module as torch_module

from hooks import Clamp, HookedModel

Works = Mapping[str, Callable[[], list[int]]]  # each returns the new tokens


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: Shape
    prompt: int
    new: int


FULL = Sizes(Shape(16, 512, 1376, 8, 2, 2048, 245, head_dim=64), 32, 64)
TINY = Sizes(Shape(6, 40, 56, 5, 1, 96, 11, head_dim=16, vocab=64), 6, 4)


def endless(model: HookedModel) -> HookedModel:
    """The same model without an end token, for us and for transformers: every generation has its full length."""
    plain: Any = model.host.model
    plain.generation_config.eos_token_id = None
    plain.generation_config.pad_token_id = 0
    return model


def clamps(model: HookedModel, count: int) -> list[Clamp]:
    """One feature in each of some layers, evenly spread, at every position."""
    layers = model.store.layers
    chosen = [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]
    return [Clamp(f"L{layer}/{3 * layer}@all", 2.0) for layer in chosen]


def transformers_alone(model: HookedModel, prompt: list[int], new: int) -> list[int]:
    """The library's own loop, its own cache."""
    plain: Any = model.host.model
    ids = torch.tensor([prompt])
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def ours(model: HookedModel, prompt: list[int], new: int, plan: list[Clamp], **options: Any) -> list[int]:
    """Through the public call."""
    return list(model.generate(prompt, plan, max_new_tokens=new, **options).ids)


def on_the_bridge(model: HookedModel, prompt: list[int], new: int, plan: list[Clamp]) -> list[int]:
    """TransformerLens' own loop, with our hooks."""
    hooks = model.fwd_hooks(plan, max_new_tokens=new) if plan else []
    with model.bridge.hooks(fwd_hooks=hooks):
        out = model.bridge.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False
        )
    return out[0, len(prompt) :].tolist()


def works_of(model: HookedModel, prompt: list[int], new: int) -> Works:
    """Every mode but the bridge's."""
    counts = {"0": 0, "1": 1, "5": min(5, len(model.store)), "all": len(model.store)}
    steered = {
        f"steered_{name}": partial(ours, model, prompt, new, clamps(model, count)) for name, count in counts.items()
    }
    return {
        "transformers": partial(transformers_alone, model, prompt, new),
        **steered,
        "observed": partial(ours, model, prompt, new, [], observe="all"),
        "replaced": partial(ours, model, prompt, new, [], swap="all", error="zero"),
    }


def hooks_during(model: HookedModel, work: Callable[[], Any]) -> int:
    """The largest number of hooks on all modules together while the decoder computes, torch's global hooks included.
    The count itself needs no hook: it replaces the final norm's `forward`."""
    norm: Any = model.host.decoder.norm
    plain, seen = norm.forward, [0]

    def looking(*args: Any, **options: Any) -> Any:
        seen.append(sum(map(len, _hook_tables(model))))
        return plain(*args, **options)

    norm.forward = looking
    try:
        work()
    finally:
        del norm.forward
    assert len(seen) > 1, "the decoder did not run"
    return max(seen)


def _hook_tables(model: HookedModel) -> Iterator[Mapping[int, Any]]:
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    for part in model.host.model.modules():
        yield from (getattr(part, f"_{name}") for name in names)
    yield from (getattr(torch_module, f"_global_{name}") for name in names)


def take_turns(works: Works, repeats: int) -> dict[str, list[float]]:
    """Seconds of each mode, round by round; each round in the other direction, so that no mode is always first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats):
        for name in list(works)[:: -1 if number % 2 else 1]:
            times[name].append(clock(works[name]))
        say(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.3f} s" for name, values in times.items()))
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of a ratio within the round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def bridge_seconds(model: HookedModel, sizes: Sizes, prompt: list[int], expected: Mapping[str, list[int]]) -> Any:
    """Seconds of one generation by the bridge, plain and steered in one layer; nothing where it is not installed."""
    if importlib.util.find_spec("transformer_lens") is None:
        return {}
    found = {}
    for name, count in (("bridge_0", 0), ("bridge_1", 1)):
        plan = clamps(model, count)
        on_the_bridge(model, prompt, 2, plan)  # first passes allocate
        new: list[list[int]] = []
        found[name] = [clock(lambda p=plan, n=new: n.append(on_the_bridge(model, prompt, sizes.new, p)))]
        assert new[0] == expected[f"steered_{count}"], "the bridge chose other tokens"
    return found


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Steered generation against the plain transformers `generate`.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that it works")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (medians are reported)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else FULL
    say("a moment" if args.tiny else "about 2 minutes on 2 free cores; 1 GB of memory")
    model = endless(random_model(sizes.shape))
    prompt = random_prompt(sizes.shape, sizes.prompt)
    works = works_of(model, prompt, sizes.new)
    unhooked = hooks_during(model, works["steered_0"])
    assert unhooked == 0, f"{unhooked} hooks without interventions"
    tokens = {name: work() for name, work in works.items()}
    assert all(len(new) == sizes.new for new in tokens.values())
    assert tokens["transformers"] == tokens["steered_0"] == tokens["observed"], "other tokens than transformers' own"
    times = take_turns(works, args.repeats)
    result: dict[str, Any] = {
        "one_layer_overhead": ratio(times, "steered_1", "transformers") - 1,
        "one_layer_overhead_over_ours": ratio(times, "steered_1", "steered_0") - 1,
        "ratio_to_transformers": {name: ratio(times, name, "transformers") for name in times},
        "no_hooks_without_interventions": unhooked == 0,
        "hooks_with_one_layer": hooks_during(model, works["steered_1"]),
    }
    times |= bridge_seconds(model, sizes, prompt, tokens)
    seconds = {name: statistics.median(values) / sizes.new for name, values in times.items()}
    result["seconds_per_token"] = seconds
    result["tokens_per_s"] = {name: 1 / each for name, each in seconds.items()}
    emit({**result, "machine": machine()}, as_json=args.json)


if __name__ == "__main__":
    main()
