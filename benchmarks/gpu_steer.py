"""Steered decoding, sweeps and encoding at Qwen2.5-32B's shape on one GPU.

    python benchmarks/gpu_steer.py [--json] [--tokens N] [--tiny]

64 blocks, transcoders at 63 of them, bf16, random weights drawn on the device. `decode`: tokens per second of
`FastDecoder`, one CUDA graph per token: plain, 5 layers steered, all sites observed, all replaced; its floor is the
bytes of the weights that a token needs over the measured bandwidth. `eager`: `HookedModel.generate`, plain and with the
same 5 layers steered. `sweep`: ablations at the last of 32 positions, one by one. `encode`: 32 tokens at every site, as
one graph. `load`: one layer from a local safetensors file, its digest checked. `--tiny` runs the same code on the CPU.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _measure import clock, emit, machine, say
from _worlds import Shape, random_model, random_prompt
from gpu_graph import FULL, TINY, Rates, measured_rates
from kernel_speed import captured

from hooks import Ablate, Clamp, HookedModel, TranscoderStore
from hooks.formats import native
from hooks.generation.fast import FastDecoder
from hooks.kernels import select_static

PROMPT = 32
STEERED = 5
SWEPT = 1000


def spread(model: HookedModel, count: int) -> list[int]:
    """Some layers with transcoders, evenly spread."""
    layers = model.store.layers
    count = min(count, len(layers))
    return [layers[i * len(layers) // count] for i in range(count)]


def decode_floor(model: HookedModel, shape: Shape, mode: str, rates: Rates, itemsize: int) -> float:
    """Seconds of reading what one token needs: all blocks and the unembedding, and per touched site the encoder;
    the rows of kept features where a site is replaced."""
    sites = {"plain": 0, "steered": min(STEERED, len(model.store)), "observed": len(model.store)}.get(mode)
    rows = 0 if sites is not None else shape.k * len(model.store)
    sites = len(model.store) if sites is None else sites
    numbers = shape.layers * shape.block_numbers + shape.vocab * shape.d_model
    numbers += (sites * shape.features + rows) * shape.d_model
    return itemsize * numbers / rates.bytes


def decoding(
    model: HookedModel, shape: Shape, prompt: list[int], tokens: int, device: str, rates: Rates
) -> Mapping[str, Any]:
    """Tokens per second of the fast decoder in every mode, and its shares of the floors."""
    chosen = spread(model, STEERED)
    modes: dict[str, dict[str, Any]] = {
        "plain": {"layers": ()},
        "steered": {"layers": chosen},
        "observed": {"layers": (), "observe": "all"},
        "replaced": {"layers": (), "replace": "all"},
    }
    itemsize = next(model.host.model.parameters()).element_size()
    out: dict[str, Any] = {}
    for mode, options in modes.items():
        made: list[FastDecoder] = []
        built = clock(
            lambda o=options, m=made: m.append(FastDecoder(model, max_length=PROMPT + tokens + 8, **o)), device
        )
        (fast,) = made
        if mode == "steered":
            fast.set([Clamp(f"L{layer}/{3 * layer}", 2.0) for layer in chosen])
        fast.prefill(prompt)
        for _ in range(3):
            fast.step()
        seconds = [clock(fast.step, device) for _ in range(tokens)]
        each = statistics.median(seconds)
        floor = decode_floor(model, shape, mode, rates, itemsize)
        changed = clock(lambda f=fast: f.set([]), device)
        out[mode] = {
            "tokens_per_s": 1 / each,
            "seconds_per_token": each,
            "floor_seconds": floor,
            "share_of_floor": floor / each,
            "build_seconds": built,
            "set_seconds": changed,
        }
        say(f"{mode}: {1 / each:.1f} tokens/s, {floor / each:.0%} of the floor")
        del fast, made
    for mode in ("steered", "observed", "replaced"):
        out[mode]["overhead"] = out[mode]["seconds_per_token"] / out["plain"]["seconds_per_token"] - 1
    return out


def eager(model: HookedModel, prompt: list[int], tokens: int, device: str) -> dict[str, float]:
    """Tokens per second of `generate` with its dynamic engine, prompt included."""
    plan = [Clamp(f"L{layer}/{3 * layer}", 2.0) for layer in spread(model, STEERED)]
    out = {}
    for name, items in (("plain", []), ("steered", plan)):
        model.generate(prompt, items, max_new_tokens=2, engine="dynamic")
        found: list[Any] = []
        options: Any = {"max_new_tokens": tokens, "engine": "dynamic"}
        seconds = clock(lambda i=items, f=found, o=options: f.append(model.generate(prompt, i, **o)), device)
        out[f"{name}_tokens_per_s"] = len(found[0].ids) / seconds
    return out


def swept(model: HookedModel, prompt: list[int], count: int, device: str) -> dict[str, Any]:
    """Ablations of active features at the last position, spread over all layers, one by one in packed passes."""
    recording = model.record(prompt)
    each = -(-count // len(recording.layers))
    groups = []
    for layer, seen in recording.layers.items():
        values, indices = seen.acts.values[0, -1], seen.acts.indices[0, -1]
        active = indices[values > 0][:each].tolist()
        groups += [[Ablate(f"L{layer}/{feature}@{len(prompt) - 1}")] for feature in active]
    groups = groups[:count]
    model.sweep(prompt, groups[:8])  # warm
    seconds = clock(lambda: model.sweep(prompt, groups), device)
    return {"ablations": len(groups), "seconds": seconds, "ablations_per_s": len(groups) / seconds}


@torch.no_grad()
def encoded(model: HookedModel, shape: Shape, device: str, rates: Rates) -> dict[str, Any]:
    """32 tokens at every site: pre-activations and TopK."""
    coders = list(model.store)
    x = torch.randn(PROMPT, shape.d_model, device=device).to(coders[0].W_enc.dtype)

    def work() -> None:
        for coder in coders:
            select_static(coder.preactivations(x), coder.k)

    run = captured(work) if device == "cuda" else work
    run()
    seconds = statistics.median(clock(run, device) for _ in range(5))
    floor = sum(coder.W_enc.nbytes for coder in coders) / rates.bytes
    return {"sites": len(coders), "seconds": seconds, "floor_seconds": floor, "share_of_floor": floor / seconds}


def loaded(model: HookedModel, device: str) -> dict[str, Any]:
    """One layer: written to a local folder, opened, read to the device."""
    layer = model.store.layers[0]
    convention = model.store.convention
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        native.save(folder, [model.store[layer]], read=convention.read, write=convention.write)
        seconds = []
        for _ in range(3):
            store = TranscoderStore.open(folder)
            store.place(layer, model.host.device)
            seconds.append(clock(lambda s=store: s[layer], device))
    nbytes = model.store[layer].nbytes
    return {"bytes": nbytes, "seconds": min(seconds), "gb_per_s": nbytes / min(seconds) / 1e9}


def run(shape: Shape, device: str, dtype: torch.dtype, tokens: int, count: int) -> dict[str, Any]:
    """Build the model, then everything."""
    rates = measured_rates(device, dtype)
    models: list[HookedModel] = []
    built = clock(lambda: models.append(random_model(shape, dtype=dtype, device=device)), device)
    (model,) = models
    say(f"model built in {built:.1f} s: {shape}")
    prompt = random_prompt(shape, PROMPT)
    result: dict[str, Any] = {"shape": str(shape), "bandwidth_gb_per_s": rates.bytes / 1e9, "build_seconds": built}
    result["decode"] = decoding(model, shape, prompt, tokens, device, rates)
    result["eager"] = eager(model, prompt, tokens, device)
    result["encode"] = encoded(model, shape, device, rates)
    result["load"] = loaded(model, device)
    result["sweep"] = swept(model, prompt, count, device)
    return {**result, "machine": machine(device)}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Steered decoding at the shape of Qwen2.5-32B on one GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU, to see that it works")
    parser.add_argument("--tokens", type=int, help="decoded per mode (a median is reported)")
    args = parser.parse_args(arguments)
    device, dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    if not args.tiny and not torch.cuda.is_available():
        say("no CUDA device here; --tiny runs the same code on the CPU")
        emit({"skipped": "no CUDA device", "machine": machine()}, as_json=args.json)
        return
    shape = TINY if args.tiny else FULL
    say("a moment" if args.tiny else f"{shape.nbytes(dtype) / 1e9:.0f} GB of weights, about 3 minutes")
    tokens = args.tokens or (4 if args.tiny else 64)
    emit(run(shape, device, dtype, tokens, 10 if args.tiny else SWEPT), as_json=args.json)


if __name__ == "__main__":
    main()
