"""One model is one queue, and what a call changes in it is undone however the call ends."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from worlds import random_qwen2, word_tokenizer

from hooks import Ablate, HookedModel, Site, Transcoder, UserError
from hooks.host import Exclusive

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    generator = torch.Generator().manual_seed(0)

    def coder(layer: int) -> Transcoder:
        weights = [torch.randn(*shape, generator=generator) / 6 for shape in ((16, 40), (16,), (16, 40), (40,))]
        return Transcoder(layer, Site("resid_pre", layer), Site("resid_pre", layer), *weights, None, None, 1e-5, 4)

    return HookedModel.from_model(random_qwen2(), word_tokenizer(), [coder(layer) for layer in range(4)])


@pytest.mark.parametrize(("script", "count"), [("interrupts", 1000), ("threads", 5)])
def test_a_twentieth_of_the_stress_scripts(script: str, count: int) -> None:
    """In a process without the checks of shapes: those wrap functions in others, where Ctrl-C does not wait."""
    command = [sys.executable, str(ROOT / "stress" / f"{script}.py"), "--json", "--count", str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["failed"] == 0, found
    assert done.returncode == 0


def test_a_pass_inside_a_hook_is_refused_and_leaves_nothing(model: HookedModel) -> None:
    plain = model.run("w1 w2").logits

    def nested(x: torch.Tensor, hook: object) -> torch.Tensor:
        model.run("w3", [Ablate("L0/1")])
        return x

    with pytest.raises(UserError, match="in the middle of another pass"):
        model.run("w1 w2", lens_hooks=[("blocks.1.hook_resid_pre", nested)])
    assert torch.equal(model.run("w1 w2").logits, plain)


def test_a_pass_inside_attached_edits_is_refused(model: HookedModel) -> None:
    batch = model.host.batch(["w1 w2"])
    with model.host.attached(model.edits(batch, [[Ablate("L0/1")]])), pytest.raises(UserError, match="another pass"):
        model.run("w1 w2")


def test_what_a_block_left_behind_is_undone_by_the_next_one(model: HookedModel) -> None:
    """As after an exception that struck in the first bytecode of `__exit__`."""
    plain = model.run("w1 w2").logits
    lost = model.host.attached(model.edits(model.host.batch(["w1 w2"]), [[Ablate("L0/1"), Ablate("L1/3")]]))
    lost.__enter__()
    assert any(module._forward_pre_hooks for module in model.host.model.modules())
    del lost
    gc.collect()
    with Exclusive(model.host.layers):
        seen = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.host.model.modules()]
    assert not any(seen)
    assert torch.equal(model.run("w1 w2").logits, plain)


def test_what_a_dead_thread_left_behind_is_undone(model: HookedModel) -> None:
    kept = []

    def enter() -> None:
        block = Exclusive(model.host.layers)
        block.__enter__()
        block.set_attribute(model.host, "held", True)
        kept.append(block)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert model.host.held
    with Exclusive(model.host.layers):
        assert not model.host.held


def test_threads_enter_in_the_order_in_which_they_came(model: HookedModel) -> None:
    order: list[int] = []
    waiting = [threading.Event() for _ in range(4)]

    def enter(number: int) -> None:
        waiting[number].set()
        with Exclusive(model.host.layers):
            order.append(number)

    with Exclusive(model.host.layers) as block:
        threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
        for number, thread in enumerate(threads):
            thread.start()
            waiting[number].wait()
            while len(block._queue.waiting) <= number:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_gradients_are_as_before_and_nested_blocks_undo_their_own(model: HookedModel) -> None:
    owner = torch.nn.Linear(1, 1)
    with Exclusive(model.host.layers) as outer:
        outer.set_attribute(owner, "one", 1)
        with Exclusive(model.host.layers) as inner:
            inner.set_attribute(owner, "one", 2)
            inner.set_attribute(owner, "two", 2)
            torch.set_grad_enabled(False)
        assert (owner.one, hasattr(owner, "two"), torch.is_grad_enabled()) == (1, False, True)
    assert not hasattr(owner, "one")


def test_a_handler_from_before_is_called_and_comes_back(model: HookedModel) -> None:
    before, calls = signal.getsignal(signal.SIGINT), list[int]()
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    own = signal.getsignal(signal.SIGINT)
    try:
        with Exclusive(model.host.layers):
            signal.raise_signal(signal.SIGINT)
        assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == own
    finally:
        signal.signal(signal.SIGINT, before)
