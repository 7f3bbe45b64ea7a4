"""Train the transcoders of a model on text: one pass of the model for many layers, in memory that is known beforehand.

text → windows → chunks → activations of all layers of a group (one pass) → shuffled → steps of every layer → the set

A chunk's activations are held, shuffled and used, and then the next chunk's take their place. Where the layers do not
fit together they are trained in groups, one group after the other over the same chunks. The state behind a chunk is on
disk from time to time; a training that is started again goes on from there, and arrives at the same bytes.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from hooks.errors import UserError
from hooks.files import check_writable
from hooks.formats import native
from hooks.host import Host, Prompt, fingerprint
from hooks.sites import Site, SiteSpec
from hooks.train.activations import capture
from hooks.train.layer import Figures, TrainedLayer
from hooks.train.recipe import Recipe
from hooks.train.state import Curves, State
from hooks.train.windows import HELD_OUT_TOKENS, Windows, chunks, cut

log = logging.getLogger("hooks")

SHARE = 0.6  # of the free memory, unless told otherwise
SAVE_EVERY = 120.0  # seconds between two saved states, at least
MEASURED = 12  # times a layer is measured on held-out text on its way, about


@dataclass(frozen=True)
class Plan:
    """What a training will do, and what it takes.

    Attributes:
        groups: layers that are trained together, over one reading of the text.
        chunks: windows that each chunk holds.
        tokens: of all chunks.
        nbytes: memory above the model's.
        half: whether products are formed in bf16.
    """

    groups: tuple[tuple[int, ...], ...]
    chunks: tuple[tuple[int, ...], ...]
    tokens: int
    nbytes: int
    half: bool


@dataclass(frozen=True)
class Training:
    """What a training arrived at.

    Attributes:
        root: the folder of the set.
        figures: by layer, on held-out text without attention sinks.
        curves: by layer, the same on the way: `tokens`, `fvu`, `l0`, `dead`.
        tokens: that each layer was trained on, attention sinks left out.
        seconds: of this run.
    """

    root: Path
    figures: Mapping[int, Figures]
    curves: Curves
    tokens: int
    seconds: float


def train(
    host: Host,
    texts: Sequence[Prompt],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    layers: Sequence[int] | None = None,
    memory_gb: float | None = None,
    half: bool | None = None,
    model: str | None = None,
    text: str = "given texts",
    progress: bool = False,
    say: Callable[[str], None] = log.info,
) -> Training:
    """Train a transcoder for every layer, and write the set in the native form.

    Started again with the same arguments on the same folder it goes on where it stopped.

    Args:
        recipe: by default the published proportions, `Recipe.sized(host.d_model)`.
        layers: all by default that the sites exist for.
        memory_gb: for layers and activations; by default 60 % of what is free.
        half: form products in bf16; by default where this is faster.
        model, text: what they are called in the manifest.
        say: is told what will be done before it is.

    Raises:
        UserError: a layer does not exist, the memory does not hold one layer, `out` holds a set or another training.
        PromptError: the text is too short.
        TrainingError: a loss is no number; the state that was saved last is kept.
        OutputError: `out` cannot be written.
    """
    began = time.monotonic()
    root, recipe = Path(out), recipe or Recipe.sized(host.d_model)
    _check_place(root)
    windows = cut(host, texts, recipe.context)
    half = _bf16_is_faster(host.device, host.d_model, recipe) if half is None else half
    plan = make_plan(host, windows, recipe, layers, memory_gb, half)
    for line in described(plan, windows, recipe):
        say(line)
    state = State.opened(root, _facts(host, windows, recipe, plan))
    for group in range(state.group, len(plan.groups)):
        _train_group(host, windows, recipe, plan, state, group, progress)
    figures = _write(host, windows, recipe, plan, state, model, text)
    tokens = max(curve[-1]["tokens"] for curve in state.curves.values())
    return Training(root, figures, state.curves, int(tokens), time.monotonic() - began)


def _check_place(root: Path) -> None:
    if (root / native.MANIFEST).exists():
        raise UserError(f"{root} holds a set already", expected="a new folder", repair="choose another, or remove it")
    check_writable(root / native.MANIFEST)


def _facts(host: Host, windows: Windows, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    return {
        "recipe": dict(recipe.facts()),
        "text": windows.digest,
        "model": fingerprint(host.tails()),
        "groups": [list(group) for group in plan.groups],
        "products": "bf16" if plan.half else "fp32",
    }


# -- what will be done -------------------------------------------------------------------------------------------------


def make_plan(
    host: Host,
    windows: Windows,
    recipe: Recipe,
    layers: Sequence[int] | None,
    memory_gb: float | None,
    half: bool,
) -> Plan:
    """Which layers are trained together, and what that takes.

    Raises:
        UserError: a layer does not exist, or the memory does not hold one layer and its activations.
    """
    chosen = _layers(host, recipe, layers)
    most = int(memory_gb * 1e9) if memory_gb is not None else int(SHARE * _free(host.device))
    each = _per_layer(host, recipe)
    count = most // each
    if count < 1:
        raise UserError(
            "the memory does not hold one layer in training",
            expected=f"at least {each / 1e9:.1f} GB",
            found=f"{most / 1e9:.1f} GB",
            where="--memory-gb",
            repair="a smaller chunk (--chunk), fewer features, or more memory",
        )
    parts = -(-len(chosen) // int(count))  # equal shares
    size = -(-len(chosen) // parts)
    groups = tuple(tuple(chosen[start : start + size]) for start in range(0, len(chosen), size))
    order = chunks(windows, recipe.tokens, recipe.chunk, recipe.seed)
    tokens = sum(len(windows.trained[number]) for chunk in order for number in chunk)
    return Plan(groups, tuple(map(tuple, order)), tokens, size * each, half)


def _layers(host: Host, recipe: Recipe, layers: Sequence[int] | None) -> list[int]:
    specs = [SiteSpec.parse(text) for text in (recipe.read, recipe.write)]
    there = [n for n in range(host.n_layers) if all(spec.at(n).layer < host.n_layers for spec in specs)]
    if layers is None:
        return there
    missing = sorted(set(layers) - set(there))
    if missing or not layers:
        raise UserError(
            f"layer {missing[0]} cannot be trained" if missing else "no layer to train",
            expected=f"layers from {there[0]} to {there[-1]}",
        )
    return sorted(set(layers))


def _per_layer(host: Host, recipe: Recipe) -> int:
    """Bytes: a layer in training, and what is held of a chunk and of the held-out text at its sites."""
    sites = 1 if recipe.read == recipe.write else 2
    tokens = 2 * (
        recipe.chunk + HELD_OUT_TOKENS
    )  # both are held twice: a chunk while it is shuffled, texts as measured
    return TrainedLayer.nbytes(host.d_model, recipe.d_features) + sites * tokens * host.d_model * host.dtype.itemsize


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _bf16_is_faster(device: torch.device, d_model: int, recipe: Recipe) -> bool:
    """Whether this machine multiplies matrices of these sizes faster in bf16 than in fp32."""
    if device.type == "cuda":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(min(recipe.batch, 512), d_model, dtype=dtype)
        weight = torch.ones(recipe.d_features, d_model, dtype=dtype)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            x @ weight.T
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def described(plan: Plan, windows: Windows, recipe: Recipe) -> list[str]:
    """What will be done, in sentences, before it is."""
    layers = [layer for group in plan.groups for layer in group]
    readings = plan.tokens / windows.tokens
    together = f" in {len(plan.groups)} groups, one after the other" if len(plan.groups) > 1 else ""
    skipped = f"; {windows.skipped} texts were too short" if windows.skipped else ""
    return [
        f"{len(layers)} layers{together}: {recipe.d_features} features each, TopK keeps {recipe.k}; "
        f"read {recipe.read}, write {recipe.write}",
        f"{plan.tokens:,} tokens, {readings:.2g} readings of {windows.tokens:,}, in {len(plan.chunks)} chunks; "
        f"{sum(map(len, windows.held_out)):,} tokens held out{skipped}",
        f"{plan.nbytes / 1e9:.2f} GB of memory above the model's; products in {'bf16' if plan.half else 'fp32'}",
    ]


# -- doing it ----------------------------------------------------------------------------------------------------------


def _train_group(
    host: Host, windows: Windows, recipe: Recipe, plan: Plan, state: State, group: int, progress: bool
) -> None:
    layers = plan.groups[group]
    pairs = {layer: _sites(recipe, layer) for layer in layers}
    sites = [site for pair in pairs.values() for site in pair]
    measured = capture(host, windows.held_out, sites)
    first = state.chunk if state.group == group else 0
    running = {layer: state.layer(layer, recipe, host.device_of(layer)) if first else None for layer in layers}
    saved = time.monotonic()
    every = max(1, len(plan.chunks) // MEASURED)
    seen = sum(len(windows.trained[n]) for chunk in plan.chunks[:first] for n in chunk)
    with _bar(plan, group, seen, progress) as bar:
        for number in range(first, len(plan.chunks)):
            held = capture(host, [windows.trained[n] for n in plan.chunks[number]], sites)
            order = _shuffled(recipe, number, len(held[sites[0]]))
            size = sum(len(windows.trained[n]) for n in plan.chunks[number])
            for place, layer in enumerate(layers):
                pair = tuple(held[site] for site in pairs[layer])
                running[layer] = _steps(running[layer], layer, recipe, pair, order, seen, size, plan.half)
                bar.update(size // len(layers) + (size % len(layers) if place == 0 else 0))
            seen += size
            last = number == len(plan.chunks) - 1
            if last or (number + 1) % every == 0:
                bar.set_postfix_str(_measure(state, running, pairs, measured, seen))
            if last or time.monotonic() - saved > SAVE_EVERY:
                done = {layer: trained for layer, trained in running.items() if trained is not None}
                state.save(done, group + last, 0 if last else number + 1)
                saved = time.monotonic()


def _sites(recipe: Recipe, layer: int) -> tuple[Site, Site]:
    return SiteSpec.parse(recipe.read).at(layer), SiteSpec.parse(recipe.write).at(layer)


def _bar(plan: Plan, group: int, seen: int, progress: bool) -> Any:
    name = f"training, group {group + 1} of {len(plan.groups)}" if len(plan.groups) > 1 else "training"
    return tqdm(
        total=plan.tokens, initial=seen, desc=name, unit="tok", unit_scale=True, disable=not progress, smoothing=0.1
    )


def _shuffled(recipe: Recipe, chunk: int, count: int) -> Tensor:
    """An order of a chunk's tokens, the same for every layer and group."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + chunk)
    return torch.randperm(count, generator=generator)


def _steps(
    running: TrainedLayer | None,
    layer: int,
    recipe: Recipe,
    pair: Any,
    order: Tensor,
    seen: int,
    size: int,
    half: bool,
) -> TrainedLayer:
    """One layer's steps over a chunk."""
    read, written = pair
    order = order.to(read.device)
    x = read[order]
    y = x if written is read else written[order.to(written.device)].to(x.device)
    trained = running or TrainedLayer.started(layer, recipe, (x, y))
    batches = max(1, len(x) // recipe.batch)
    for number in range(batches):
        here = slice(number * recipe.batch, (number + 1) * recipe.batch)
        trained.step((x[here], y[here]), seen + size * number // batches, half=half)
    return trained


def _measure(
    state: State,
    running: Mapping[int, TrainedLayer | None],
    pairs: Mapping[int, tuple[Site, Site]],
    measured: Mapping[Site, Float[Tensor, "token d_model"]],
    seen: int,
) -> str:
    """Figures on held-out text, into the curves; their middle as a text."""
    shown = []
    for layer, trained in running.items():
        if trained is None:
            continue
        figures = trained.figures((measured[pairs[layer][0]], measured[pairs[layer][1]]))
        point = {"tokens": seen, "fvu": figures.fvu, "l0": figures.l0, "dead": figures.dead}
        state.curves.setdefault(str(layer), []).append(point)
        shown.append(point)
    middle = {name: sorted(point[name] for point in shown)[len(shown) // 2] for name in ("fvu", "l0", "dead")}
    return f"FVU {middle['fvu']:.3f}, L0 {middle['l0']:.0f}, dead {middle['dead']:.0f}"


def _write(
    host: Host, windows: Windows, recipe: Recipe, plan: Plan, state: State, model: str | None, text: str
) -> dict[int, Figures]:
    """The set, from the layers' last state; then the state is removed."""
    layers = sorted(layer for group in plan.groups for layer in group)
    cpu = torch.device("cpu")

    def made() -> Any:
        for layer in layers:
            trained = state.layer(layer, recipe, cpu)
            assert trained is not None, f"layer {layer} was not trained"
            yield trained.transcoder()

    native.save(
        state.root,
        made(),
        read=SiteSpec.parse(recipe.read),
        write=SiteSpec.parse(recipe.write),
        base_model=model,
        trained_by="circuits train",
        recipe=dict(recipe.facts()),
        model_fingerprint=state.facts["model"],
        text=text,
        text_sha256=windows.digest,
        products=state.facts["products"],
        curves=state.curves,
    )
    figures = {}
    for layer in layers:
        last = state.curves[str(layer)][-1]
        figures[layer] = Figures(last["fvu"], last["l0"], int(last["dead"]))
    state.remove()
    return figures
