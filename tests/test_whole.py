"""Whole numbers that callers give: taken in every form that is one, refused in every other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hooks import UserError
from hooks.whole import whole, wholes

ROOT = Path(__file__).parents[1]
NONE = [2.5, 2.0, "2", b"2", True, None, math.nan, math.inf, 2 + 0j, [2], (), np.float64(2), np.bool_(True),
        torch.tensor(2.0), torch.tensor(True), torch.tensor([1, 2]), NotImplemented]  # fmt: skip


@pytest.mark.parametrize("two", [2, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([2])])
def test_every_form_of_a_whole_number_is_taken(two):
    got = whole(two, "n", least=2, most=2)
    assert (got, type(got)) == (2, int)
    assert wholes(two, "n") == (2,)


@pytest.mark.parametrize("value", NONE, ids=repr)
def test_nothing_else_is(value):
    with pytest.raises(UserError, match="is not a whole number"):
        whole(value, "n")
    with pytest.raises(UserError, match="an entry of n = "):
        wholes([0, value], "n")


def test_the_range_is_said():
    with pytest.raises(UserError, match="n = 0 is out of range\n  expected: a whole number, at least 1 and at most 9"):
        whole(0, "n", least=1, most=9)
    with pytest.raises(UserError, match="thousands of digits is out of range"):
        whole(10**5000, "n", most=9)
    with pytest.raises(UserError, match="n = '12' is not a list of whole numbers"):
        wholes("12", "n")
    assert wholes([], "n") == ()
    assert wholes(range(2), "n") == (0, 1)
    assert wholes(torch.tensor([3, 1]), "n") == (3, 1)


# -- every whole number of a public call ---------------------------------------------------------------------------

SCRIPT = """
import json
import numpy as np, torch
from worlds import random_hooked
from circuits import Logit, Mass, Pair, decompose, make_cases, prepare, trace, verify
from circuits.attribution import integrated_scores
from circuits.faithfulness.rankings import chance
from hooks import HookedModel, Sampling, Steer, UserError
from hooks.generation.fast import FastDecoder
from hooks.check import quality

model, start = random_hooked(missing=None), "w1 w2 w3"
demo, fact = HookedModel.load("demo"), "fact: the capital of the state containing Dallas is"
graph = trace(demo, fact, max_nodes=30, max_in_edges=4, sample=0)
ready = FastDecoder(model, max_length=32)
ready.prefill(start)
session = model.session(start)
run = model.run(start)

CALLS = {
    "generate max_new_tokens": lambda n: model.generate(start, max_new_tokens=n),
    "stream max_new_tokens": lambda n: list(model.stream(start, max_new_tokens=n)),
    "session new_tokens": lambda n: model.session(start, new_tokens=n),
    "session generate": lambda n: model.session(start).generate(n),
    "session stream": lambda n: list(model.session(start).stream(n)),
    "steer max_new_tokens": lambda n: model.steer(start, [(1, -1, 7, 2.0)], max_new_tokens=n),
    "dose max_new_tokens": lambda n: model.dose(start, [Steer("L1/7@-1")], "1", max_new_tokens=n),
    "edits new_tokens": lambda n: model.edits(model.host.batch([start]), [[]], new_tokens=n),
    "fwd_hooks max_new_tokens": lambda n: model.fwd_hooks([(1, -1, 7, 2.0)], max_new_tokens=n),
    "observe": lambda n: model.generate(start, max_new_tokens=1, observe=[n]),
    "sampling seed": lambda n: Sampling(1.0, seed=n),
    "features top": lambda n: model.features(start, top=n),
    "features layers": lambda n: model.features(start, layers=[n]),
    "record layers": lambda n: model.record(start, layers=[n]),
    "swap layers": lambda n: model.swap(start, [n]),
    "run swap": lambda n: model.run(start, swap=[n]),
    "top n": lambda n: run.top_before(n),
    "top position": lambda n: run.top_after(1, n),
    "effect position": lambda n: run.effect(pos=n),
    "effects position": lambda n: model.effects(start, [(1, 0, 7, 2.0)], pos=n),
    "sweep layers": lambda n: model.sweep(start, layers=[n]),
    "sweep positions": lambda n: model.sweep(start, positions=[n]),
    "sweep position": lambda n: model.sweep(start, layers=[1], positions=[0], pos=n),
    "sweep tokens_at_once": lambda n: model.sweep(start, layers=[1], positions=[0], tokens_at_once=n),
    "decoder capacity": lambda n: FastDecoder(model, capacity=n, max_length=8),
    "decoder max_length": lambda n: FastDecoder(model, max_length=n),
    "decoder layers": lambda n: FastDecoder(model, layers=[n], max_length=8),
    "decoder replace": lambda n: FastDecoder(model, replace=[n], max_length=8),
    "decoder n": lambda n: ready.generate(n),
    "decoder token": lambda n: ready.step(n),
    "open k": lambda n: HookedModel.load("demo", "demo", k=n),
    "open layers": lambda n: HookedModel.load("demo", "demo", layers=[n]),
    "open decoder": lambda n: HookedModel.load("demo", "demo", decoder=n),
    "quality layers": lambda n: quality(model, [start], layers=[n]),
    "quality tokens_at_once": lambda n: quality(model, [start], layers=[1], tokens_at_once=n),
    "trace max_nodes": lambda n: trace(demo, fact, max_nodes=n, max_in_edges=2, sample=0),
    "trace max_in_edges": lambda n: trace(demo, fact, max_nodes=5, max_in_edges=n, sample=0),
    "trace sample": lambda n: trace(demo, fact, max_nodes=5, max_in_edges=2, sample=n),
    "trace seed": lambda n: trace(demo, fact, max_nodes=5, max_in_edges=2, sample=1, seed=n),
    "prepare max_nodes": lambda n: prepare(demo, fact, max_nodes=n),
    "target pos": lambda n: prepare(demo, fact, Logit(" Austin", pos=n), max_nodes=5),
    "mass most": lambda n: prepare(demo, fact, Mass(0.5, most=n), max_nodes=5),
    "verify n": lambda n: verify(demo, graph, n=n),
    "verify seed": lambda n: verify(demo, graph, n=1, seed=n),
    "decompose top": lambda n: decompose(demo, graph, top=n),
    "cases seed": lambda n: make_cases(demo, [Pair(fact)], sites=1, ablation="zero", seed=n),
    "cases sites": lambda n: make_cases(demo, [Pair(fact)], sites=[n], ablation="zero"),
    "chance seed": lambda n: chance(n),
    "steps": lambda n: integrated_scores(demo, demo.record(fact, [1]), graph_target, None, n),
}
TWO = np.int64(2)
WRONG = [2.5, "2", True]
graph_target = prepare(demo, fact, max_nodes=5).targets[0]
out = {}
for name, call in CALLS.items():
    slow = name.startswith(("open", "trace", "verify", "mass", "target", "steps"))
    for value in WRONG if slow else (*WRONG, TWO):
        try:
            call(value)
            out[f"{name} {value!r}"] = "taken"
        except UserError as error:
            out[f"{name} {value!r}"] = "refused" if "whole number" in str(error) else str(error)
        except Exception as error:
            out[f"{name} {value!r}"] = f"{type(error).__name__}: {error}"
print(json.dumps(out))
"""


def test_every_count_seed_layer_and_position_of_a_public_call():
    """In a process of its own: the suite checks the types of every call, and would refuse before our code does."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    right = {name: "taken" if "np.int64" in name else "refused" for name in found}
    assert {name: said for name, said in found.items() if said != right[name]} == {}
