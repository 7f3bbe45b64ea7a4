"""One thread at a time uses a model, and its changes to the model's modules are undone, however the call ends.

`with Exclusive(layers)` waits until no other thread is inside; threads enter in the order in which they came. Blocks of
one thread may be nested. Every change to a module (a hook, its own `forward`, the name of an attention function) is
made by `change`, which records how to undo it *before* it is made. The end of the block undoes all changes inside it,
also those that a nested block did not undo.

Ctrl-C can raise KeyboardInterrupt at almost any bytecode of the main thread, even at the first one of `__exit__`. So
the outermost block installs its own handler for SIGINT. The handler looks at the interrupted frames. If one of them is
a function marked `uninterrupted`, it records the signal, and the exception is raised when that function returns.
Otherwise, for example during a pass, it calls the earlier handler at once.

Exceptions from other signals' handlers, or raised in a thread from outside, can still end a block before it has undone
its changes. Then the next block that is entered on the same model undoes them first. The same happens after a thread
has died.
"""

import functools
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from hooks.errors import UserError

_POLL = 0.1  # seconds between two looks at whether the thread that is inside still lives, and at Ctrl-C

Function = TypeVar("Function", bound=Callable[..., Any])

_UNINTERRUPTED: set[CodeType] = set()


def uninterrupted(function: Function) -> Function:
    """While this function runs inside a block, Ctrl-C waits until it is done."""
    _UNINTERRUPTED.add(function.__code__)
    return function


class _Interrupts:
    """The handler for SIGINT while the main thread is inside a block."""

    def __init__(self) -> None:
        self.noted = False
        self._before: Any = None

    @uninterrupted
    def take(self) -> bool:
        """Install our handler. False if it is installed already, or if none is needed."""
        here = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        if not here or before == self.handle or not callable(before):
            return False
        self._before = before
        signal.signal(signal.SIGINT, self.handle)
        return True

    @uninterrupted
    def give_back(self) -> None:
        """Install the earlier handler again, unless other code has installed another one since."""
        if signal.getsignal(signal.SIGINT) == self.handle:
            signal.signal(signal.SIGINT, self._before)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler: Python calls it between two bytecodes of the main thread."""
        inside = frame
        while inside is not None:
            if inside.f_code in _UNINTERRUPTED:
                self.noted = True
                return
            inside = inside.f_back
        self._before(number, frame)

    def raise_noted(self) -> None:
        """Call the earlier handler now, if a signal was recorded."""
        if self.noted and threading.current_thread() is threading.main_thread():
            self.noted = False
            self._before(signal.SIGINT, None)


_INTERRUPTS = _Interrupts()


@dataclass(frozen=True)
class _Block:
    """A block that was entered: itself, and how many changes there were before it."""

    itself: "weakref.ref[Exclusive]"
    changes: int


@dataclass
class _Queue:
    """The thread that uses a model, the threads that wait, and functions that undo the changes."""

    free: threading.Condition = field(default_factory=threading.Condition)
    owner: threading.Thread | None = None
    waiting: deque[threading.Thread] = field(default_factory=deque)
    blocks: list[_Block] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    editing: "weakref.ref[Exclusive] | None" = None

    def acquire(self) -> None:
        """Wait for this thread's turn; the caller holds `free`."""
        me = threading.current_thread()
        if self.owner is me:
            return
        self.waiting.append(me)
        try:
            while not self._is_next(me):
                self.free.wait(_POLL)
                _INTERRUPTS.raise_noted()
        finally:
            self.waiting.remove(me)
        if self.owner is not None:  # a thread that died inside
            self.blocks.clear()
        self.owner = me

    def _is_next(self, me: threading.Thread) -> bool:
        if self.owner is not None and self.owner.is_alive():
            return False
        while not self.waiting[0].is_alive():
            self.waiting.popleft()
        return self.waiting[0] is me

    def drop_dead_blocks(self) -> None:
        """Undo the changes of blocks that ended without undoing them."""
        while self.blocks and self.blocks[-1].itself() is None:
            self.leave(len(self.blocks) - 1)
        if not self.blocks:
            self.undo_to(0)

    def leave(self, depth: int) -> None:
        """Undo the changes since this block was entered, and forget the blocks inside it."""
        count = self.blocks[depth].changes
        del self.blocks[depth:]
        self.undo_to(count)

    def undo_to(self, count: int) -> None:
        """Undo the last changes until `count` are left, the last one first. An undo may run twice; the second run does
        nothing."""
        while len(self.undo) > count:
            self.undo[-1]()
            self.undo.pop()

    def release(self) -> None:
        """Let the next thread in; the caller holds `free`."""
        if not self.blocks:
            self.owner = None
            self.free.notify_all()


_QUEUES: "weakref.WeakKeyDictionary[nn.Module, _Queue]" = weakref.WeakKeyDictionary()


def _queue(layers: nn.Module) -> _Queue:
    """A model's queue. It needs no lock: `setdefault` is atomic, and Ctrl-C could leave a lock held for ever."""
    return _QUEUES.setdefault(layers, _Queue())


class Exclusive:
    """A `with` block in which this thread alone uses a model.

    Args:
        layers: the model's list of blocks. Two objects with the same blocks are the same model.
    """

    def __init__(self, layers: nn.Module):
        self._queue = _queue(layers)
        self._handles_interrupts = False
        self._grad_enabled = True

    @uninterrupted
    def __enter__(self) -> "Exclusive":
        queue = self._queue
        try:
            self._handles_interrupts = _INTERRUPTS.take()
            with queue.free:
                queue.acquire()
                queue.drop_dead_blocks()
                queue.blocks.append(_Block(weakref.ref(self), len(queue.undo)))
            self._grad_enabled = torch.is_grad_enabled()
            _INTERRUPTS.raise_noted()
        except BaseException:
            self._leave()
            raise
        return self

    @uninterrupted
    def __exit__(self, *_: object) -> None:
        self._leave()
        # an interrupt that arrives in `torch.no_grad().__exit__` leaves gradients switched off
        torch.set_grad_enabled(self._grad_enabled)
        _INTERRUPTS.raise_noted()

    @uninterrupted
    def _leave(self) -> None:
        queue = self._queue
        try:
            with queue.free:
                depths = [depth for depth, block in enumerate(queue.blocks) if block.itself() is self]
                if depths:
                    queue.leave(depths[0])
                    queue.release()
                elif queue.owner is threading.current_thread():
                    queue.release()
        finally:
            if self._handles_interrupts:
                self._handles_interrupts = False
                _INTERRUPTS.give_back()

    @uninterrupted
    def change(self, make: Callable[[], object], undo: Callable[[], None]) -> None:
        """Change something in the model until the end of the block.

        Args:
            undo: takes the change back. It may be called twice, and before the change was made.
        """
        self._queue.undo.append(undo)
        make()

    @uninterrupted
    def set_attribute(self, owner: object, name: str, value: object) -> None:
        """Set an attribute of this instance until the end of the block; then it is as before, or absent if it was."""
        own = vars(owner)
        before = {name: own[name]} if name in own else {}

        def undo() -> None:
            own.pop(name, None)
            own.update(before)

        self.change(lambda: own.__setitem__(name, value), undo)

    def begin_edits(self) -> None:
        """Record that edits are attached in this block.

        Raises:
            UserError: an outer block of this thread has edits attached, which would act on this block's pass too. The
                call was made inside a hook, or inside a `with` that attaches edits.
        """
        queue = self._queue
        outer = queue.editing() if queue.editing is not None else None
        if outer is not None and any(block.itself() is outer for block in queue.blocks):
            raise UserError(
                "this model is in the middle of another pass of the same thread",
                expected="one pass after the other: a pass started from inside a hook would see the outer pass's edits",
                repair="run it before, and use what it gave in the hook; or run it on another model object",
            )
        queue.editing = weakref.ref(self)


def exclusive(function: Function) -> Function:
    """Decorates a method of an object with a `host`, or a function whose first argument is one. Calls on one model run
    one after the other."""

    @functools.wraps(function)
    def in_turn(model: Any, *args: Any, **options: Any) -> Any:
        with Exclusive(model.host.layers):
            return function(model, *args, **options)

    return in_turn  # type: ignore[return-value]
