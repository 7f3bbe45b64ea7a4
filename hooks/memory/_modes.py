"""Modes of placing a model and its transcoders, and which of them fit a device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from hooks.memory._shapes import ModelShape
from hooks.memory._work import Ask, Task, Work, tasks, work

MARGIN = 1.15  # factor on the memory of running; tests keep estimates within 15 % of measurements
BUDGET_LAYERS = 2  # a target's transcoder and its sources'
SWEEP_AT_LEAST = 512  # tokens of the smallest useful batch of a sweep; a sweep uses what fits
MOST_CARDS = 16


@dataclass(frozen=True)
class Mode:
    """One mode of running, on one device (or several equal ones).

    Attributes:
        how: what to type, or which checkpoint to load.
        model: bytes of the model on the device.
        coders: bytes of the transcoders that are loaded at once.
        host: bytes of host memory during the whole run.
        passing: bytes needed for a moment beside everything else: a matrix while it is dequantised, a block while it is
            copied to the device.
        tasks: the tasks that are possible.
        by_autograd: whether edges need the rule `autograd`.
        spread: whether it uses several devices, as many as needed.
    """

    name: str
    how: str
    model: int
    coders: int
    host: int = 0
    passing: int = 0
    tasks: tuple[Task, ...] = ("features", "generate", "sweep", "trace")
    by_autograd: bool = False
    spread: bool = False


@dataclass(frozen=True)
class Plan:
    """How much memory a request takes, and in which modes. See `plan`."""

    ask: Ask
    modes: tuple[Mode, ...]

    @cached_property
    def works(self) -> Mapping[Task, Work]:
        """The steps of every task, in modes where the edge algebra can read the blocks' weights."""
        return {task: work(self.ask, task) for task in tasks()}

    @cached_property
    def _by_autograd(self) -> Work:
        return work(self.ask, "trace", edges_by_autograd=True)

    def running(self, mode: Mode, task: Task) -> Work:
        """The steps of a task in a mode."""
        return self._by_autograd if task == "trace" and mode.by_autograd else self.works[task]

    def nbytes(self, mode: Mode, task: Task) -> int:
        """The largest memory in use on a single device, without margin."""
        return mode.model + mode.coders + mode.passing + self.running(mode, task).peak

    def fits(self, mode: Mode, task: Task, capacity: int) -> bool:
        """Whether a task fits a device of so many bytes (or several, where the mode is spread)."""
        if task not in mode.tasks:
            return False
        if mode.spread:
            return self.cards(task, capacity) is not None
        return mode.model + mode.coders + mode.passing + self._with_margin(mode, task) <= capacity

    def _with_margin(self, mode: Mode, task: Task) -> int:
        running = self._short_sweep if task == "sweep" else self.running(mode, task)
        return int(MARGIN * running.peak)

    @cached_property
    def _short_sweep(self) -> Work:
        return work(replace(self.ask, sweep_tokens=SWEEP_AT_LEAST), "sweep")

    def fitting(self, capacity: int) -> dict[str, tuple[Task, ...]]:
        """By mode, the tasks that fit."""
        return {mode.name: tuple(task for task in tasks() if self.fits(mode, task, capacity)) for mode in self.modes}

    def first(self, task: Task, capacity: int) -> Mode | None:
        """The first mode, fastest first, in which a task fits; several cards are not counted."""
        return next((mode for mode in self.modes if not mode.spread and self.fits(mode, task, capacity)), None)

    def cards(self, task: Task, capacity: int) -> int | None:
        """How many devices of so many bytes hold everything: block after block, each transcoder with its block.

        Lasting tensors are spread with the blocks; temporary ones are needed on every device.
        """
        running = self._short_sweep if task == "sweep" else self.works[task]
        m, item = self.ask.model, self.ask.item
        pieces = [m.d_vocab * m.d_model * item]  # embedding, blocks, unembedding
        coder = self.ask.coders.layer_bytes
        pieces += [
            m.block_bytes(item, m.bits) + (coder if n < self.ask.coders.layers else 0) for n in range(m.n_layers)
        ]
        pieces.append(m.outside * item - (0 if m.tied else pieces[0]))
        for count in range(1, MOST_CARDS + 1):
            room = capacity - int(MARGIN * (running.kept / count + running.passing))
            if _filled(pieces, room) <= count:
                return count
        return None

    def budget(self, mode: Mode, task: Task, capacity: int) -> int:
        """The store's byte budget in a mode with a budget: the rest of the memory, in whole layers, minus one layer,
        since a layer may still be in use while the next one is read."""
        rest = capacity - mode.model - mode.passing - self._with_margin(mode, task)
        layer = self.ask.coders.layer_bytes
        return layer * max(BUDGET_LAYERS, min(self.ask.coders.layers, rest // layer - 1))


def _filled(pieces: list[int], room: int) -> int:
    """Devices of `room` bytes that take the pieces in order; one more than allowed where a piece alone is too large."""
    count, left = 1, room
    for piece in pieces:
        if piece > room:
            return MOST_CARDS + 1
        if piece > left:
            count, left = count + 1, room
        left -= piece
    return count


def plan(ask: Ask) -> Plan:
    """The modes there are for a request, fastest first.

    Examples:
        >>> ask = Ask(QWEN25["32B"], SetShape.of_numbers(63, 5120, 12288, 1474), tokens=32)
        >>> plan(ask).first("features", 80 * 10**9).name
        'transcoders under a budget'
    """
    m, s, item = ask.model, ask.coders, ask.item
    few = min(s.nbytes, (BUDGET_LAYERS + 1) * s.layer_bytes)
    modes = []
    for bits in (None, 8, 4) if m.bits is None else (m.bits,):
        name = f"{bits}-bit model" if bits else "all on the device"
        how = "" if bits is None or m.bits else f"a checkpoint quantised to {bits} bits, or a model given to from_model"
        passing = m.d_model * m.d_ff * item if bits else 0
        weights, quantised = m.nbytes(item, bits), bits is not None
        whole = Mode(name, how, weights, s.nbytes, passing=passing, by_autograd=quantised)
        under = "transcoders under a budget" if not bits else f"{bits}-bit model, transcoders under a budget"
        budget = f"--budget-gb {gib(BUDGET_LAYERS * s.layer_bytes)}"
        modes += [whole, replace(whole, name=under, how=f"{how}; {budget}".strip("; "), coders=few)]
    if ask.on == "cuda":
        modes.append(Mode("several cards", "--device-map auto", m.nbytes(item, m.bits), s.nbytes, spread=True))
        modes.append(_offloaded(m, item, few))
    return Plan(ask, tuple(modes))


def _offloaded(m: ModelShape, item: int, few: int) -> Mode:
    """Blocks are in host memory, and each is copied to the device when it runs. `trace` is not possible, since edges
    and gradients need every block's weights."""
    block = m.block_bytes(item, m.bits)
    return Mode(
        "blocks in host memory",
        "--device-map auto and a --budget-gb; every pass moves the blocks that do not fit",
        m.outside * item,
        few,
        host=m.n_layers * block,
        passing=2 * block,
        tasks=("features", "generate", "sweep"),
    )


def gb(size: int) -> str:
    """Bytes as text: GB of 10^9, or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def gib(size: int, *, down: bool = False) -> str:
    """Bytes in the units of --budget-gb (2^30), to two decimals; rounded up, or down with `down`."""
    hundredths = size * 100 // (1 << 30) if down else -(-size * 100 // (1 << 30))
    return f"{hundredths / 100:g}"
