"""The error for exhausted memory: how much was needed, how much there is, and the mode that would fit."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import psutil
import torch

from hooks.checkpoints import TranscoderStore
from hooks.choices import ITEM
from hooks.effects import out_of_memory
from hooks.errors import ModelError
from hooks.memory._modes import Mode, Plan, gb, gib, plan
from hooks.memory._shapes import ModelShape, SetShape
from hooks.memory._work import Ask, Task


def capacity_of(device: torch.device) -> int:
    """Total bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def repair_for(ask: Ask, task: Task, capacity: int) -> str:
    """The options with which a task fits a device of so many bytes, in the fastest mode that fits; with half precision
    if fp32 does not fit. Empty where no mode fits."""
    halves = [ask] if ask.item <= 2 else [ask, replace(ask, dtype="bfloat16")]
    found = [(one, mode) for one in map(plan, halves) if (mode := one.first(task, capacity)) is not None]
    plain = [(one, mode) for one, mode in found if not mode.by_autograd and mode.host == 0] or found
    if plain:
        return _options(*plain[0], task, capacity, ask)
    last = plan(halves[-1])
    cards = last.cards(task, capacity) if ask.on == "cuda" else None
    return f"--device-map auto over {cards} such devices" if cards else ""


def _options(one: Plan, mode: Mode, task: Task, capacity: int, wanted: Ask) -> str:
    parts, total = [], one.nbytes(mode, task)
    if "budget" in mode.name:
        budget = one.budget(mode, task, capacity)
        total += budget + one.ask.coders.layer_bytes - mode.coders
        parts.append(f"--budget-gb {gib(budget, down=True)}")
    if one.ask.dtype != wanted.dtype:
        parts.append(f"--dtype {one.ask.dtype}")
    if mode.by_autograd and one.ask.model.bits is None:
        parts.append(f"{'with ' if parts else ''}a model quantised to {mode.name[0]} bits")
    if mode.host:
        parts = [mode.how]
    return f"{' '.join(parts) or 'free what other programs hold'}: {gb(total)} of {gb(capacity)}"


def refuse(doing: str, ask: Ask | None, task: Task, capacity: int, where: str) -> NoReturn:
    """Raise the error for exhausted memory, with the options that would fit.

    Args:
        doing: the activity, for example "loading the model".
        ask: the request; None where its sizes are not known.
        where: the device.

    Raises:
        ModelError: always.
    """
    expected, repair = "", ""
    if ask is not None:
        model = ask.model.nbytes(ask.item, ask.model.bits)
        running = plan(ask).works[task]
        expected = (
            f"{gb(model)} for the model, {gb(ask.coders.nbytes)} for its {ask.coders.layers} transcoders, "
            f"{gb(running.peak)} for {task} at {ask.tokens} tokens"
        )
        repair = repair_for(ask, task, capacity)
    raise ModelError(
        f"memory ran out while {doing}",
        expected=expected,
        found=f"{gb(capacity)} in all on {where}",
        repair=repair or "a shorter prompt, fewer nodes, a smaller model, or `circuits check --plan` for what fits",
    ) from None


def ask_for(config: Mapping[str, Any], store: TranscoderStore, tokens: int, dtype: torch.dtype, on: str) -> Ask:
    """The request for a loaded model and its set. `on`: the type of device."""
    largest = max(store.layers, key=store.d_features)
    d_features = store.d_features(largest)
    width = store.bytes_of(largest) / (2 * d_features * store.d_model(largest))
    item = min(ITEM, key=lambda name: abs(ITEM[name] - width))
    k = store.k(largest) or max(1, d_features // 8)
    coders = SetShape.of_numbers(len(store), store.d_model(largest), d_features, k, item)
    coders = coders.between(store.convention.read, store.convention.write)
    model = ModelShape.of_config(config, "the model's config")
    return Ask(model, coders, tokens, str(dtype).removeprefix("torch."), on="cuda" if on == "cuda" else "cpu")


@contextlib.contextmanager
def explained(
    doing: str, device: torch.device | str, ask: Callable[[], Ask | None] = lambda: None, task: Task = "features"
) -> Iterator[None]:
    """Turn a failed allocation, on either kind of device, into an error that names the options that would fit.

    Args:
        ask: gives the request; called only if memory runs out. If it returns None, the message names no options.

    Raises:
        ModelError: memory ran out inside.
    """
    with out_of_memory() as failed:
        yield
    if failed:
        place = torch.device(device)
        wanted: Ask | None = None
        with contextlib.suppress(ModelError):
            wanted = ask()
        refuse(doing, wanted, task, capacity_of(place), str(place))
