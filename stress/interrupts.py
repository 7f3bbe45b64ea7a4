"""Ctrl-C at random moments, and at every line of this project: afterwards the model is as before.

Real SIGINTs are sent to this process while it runs, generates, streams, sweeps, measures effects, traces and holds
parts. After each, no module has a hook or a `forward` of its own, the attention implementation is the model's,
gradients are on, and a plain forward gives the same bits.
"""

import collections
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _models import main, small_model

from circuits import trace
from hooks import Ablate, Clamp, HookedModel

PROMPT = "w1 w2 w3 w4"
OURS = tuple(str(Path(__file__).parents[1] / folder) + os.sep for folder in ("hooks", "circuits"))
PATIENCE = 2.0  # seconds after which a signal that was sent and raised nothing counts as swallowed

Call = Callable[[HookedModel], Any]
CALLS: dict[str, Call] = {
    "run": lambda model: model.run(PROMPT, [Ablate("L1/3"), Clamp("L0/2@1", 2.0)]).logits,
    "generate": lambda model: model.generate(PROMPT, [Clamp("L1/3", 2.0)], max_new_tokens=3).logits,
    "stream": lambda model: [token.logprob for token in model.stream(PROMPT, [Clamp("L1/3", 2.0)], max_new_tokens=3)],
    "sweep": lambda model: model.sweep(PROMPT, layers=[1]).table["delta"].tolist(),
    "effects": lambda model: model.effects(PROMPT, [Ablate("L1/3")], hold="norms").total,
    "trace": lambda model: trace(model, PROMPT, max_nodes=12, sample=4, progress=False).meta["verification"],
    "hold": lambda model: model.run(PROMPT, [Ablate("L1/3")], hold=("attention", "norms", "gates")).logits,
}


class Sender:
    """A thread that sends one SIGINT to the main thread, some time after it is told to."""

    def __init__(self) -> None:
        self._delays: collections.deque[float] = collections.deque()
        self._ready = threading.Semaphore(0)
        self.sent = 0
        threading.Thread(target=self._run, daemon=True).start()

    def arm(self, delay: float) -> None:
        """Send after so many seconds."""
        self._delays.append(delay)
        self._ready.release()

    def _run(self) -> None:
        while True:
            self._ready.acquire()
            time.sleep(self._delays.popleft())
            self.sent += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


class Reference:
    """The state of a model before the first signal."""

    def __init__(self, model: HookedModel):
        self.model, self.hf = model, model.host.model
        self.ids = torch.tensor([model.host.tokenize(PROMPT)])
        self.logits, self.attention = self._plain(), self.hf.config._attn_implementation
        self.handler = signal.getsignal(signal.SIGINT)
        self.run = model.run(PROMPT, [Ablate("L1/3")]).logits

    def _plain(self) -> torch.Tensor:
        with torch.no_grad():
            return self.hf(input_ids=self.ids).logits

    def faults(self, *, thorough: bool) -> list[str]:
        """Differences from that state."""
        out = []
        for name, module in self.hf.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                out.append(f"a hook on {name}")
            if "forward" in vars(module) or "held_attention" in vars(module):
                out.append(f"a replaced part in {name}")
        if self.hf.config._attn_implementation != self.attention:
            out.append(f"attention implementation {self.hf.config._attn_implementation}")
        if self.model.host.held:
            out.append("the host says that parts are held")
        if not torch.is_grad_enabled():
            out.append("gradients are off")
            torch.set_grad_enabled(True)
        if signal.getsignal(signal.SIGINT) != self.handler:
            out.append("another SIGINT handler")
        if not torch.equal(self._plain(), self.logits):
            out.append("other logits")
        if thorough and not torch.equal(self.model.run(PROMPT, [Ablate("L1/3")]).logits, self.run):
            out.append("other logits of an ablation")
        return out


def interrupted(call: Call, model: HookedModel, sender: Sender, delay: float) -> bool:
    """Whether the signal ended the call or arrived after it, and no library caught its exception."""
    try:
        before = sender.sent
        sender.arm(delay)
        call(model)
        end = None
        while end is None or time.monotonic() < end:
            time.sleep(0.001)
            if end is None and sender.sent > before:
                end = time.monotonic() + PATIENCE
    except KeyboardInterrupt:
        return True
    return False


def at_random(model: HookedModel, count: int, seed: int) -> dict[str, Any]:
    """Signals at random moments of every kind of call, in turn."""
    reference, sender, draw = Reference(model), Sender(), random.Random(seed)
    seconds = {}
    for name, call in CALLS.items():
        call(model)
        began = time.perf_counter()
        call(model)
        seconds[name] = time.perf_counter() - began
    faults: collections.Counter[str] = collections.Counter()
    swallowed = 0
    for number in range(count):
        name = list(CALLS)[number % len(CALLS)]
        swallowed += not interrupted(CALLS[name], model, sender, draw.uniform(0, 1.05 * seconds[name]))
        for fault in reference.faults(thorough=number % 10 == 0):
            faults[f"{name}: {fault}"] += 1
    return {"signals": count, "swallowed": swallowed, "faults": dict(faults)}


def at_line(call: Call, model: HookedModel, wanted: int) -> int:
    """Run a call and send a signal when the wanted line of our code is about to run; how many lines there were."""
    lines = 0

    def follow(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            lines += 1
            if lines == wanted:
                signal.raise_signal(signal.SIGINT)
        return follow

    sys.settrace(follow)
    try:
        call(model)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


def line_by_line(model: HookedModel, count: int, seed: int) -> dict[str, Any]:
    """Signals at lines of every kind of call, spread evenly over them."""
    reference = Reference(model)
    faults: collections.Counter[str] = collections.Counter()
    tried, there = 0, {}
    for name, call in CALLS.items():
        there[name] = at_line(call, model, -1)
        step = max(1, there[name] * len(CALLS) // count)
        for wanted in range(1 + seed % step, there[name] + 1, step):
            at_line(call, model, wanted)
            tried += 1
            for fault in reference.faults(thorough=tried % 10 == 0):
                faults[f"{name}, line event {wanted}: {fault}"] += 1
    return {"lines_tried": tried, "lines": there, "faults": dict(faults)}


def measure(count: int, seed: int) -> dict[str, Any]:
    """`count` signals at random moments, and a tenth as many at lines."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = small_model()
    found = at_random(model, count, seed)
    lines = line_by_line(model, max(len(CALLS), count // 10), seed)
    failed = sum(found["faults"].values()) + sum(lines["faults"].values())
    return {"count": count, "failed": failed, "random": found, "lines": lines}


if __name__ == "__main__":
    sys.exit(main(measure, "Interrupts: the model is afterwards what it was.", 20_000))
