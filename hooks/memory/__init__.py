"""How much memory a model and its transcoders will take, from their sizes alone, and which mode of running them fits.

sizes (`ModelShape`, `SetShape`) + the request (`Ask`) → the steps of every task (`work`) → modes of placing the
weights, and where they fit (`plan`). No weights are loaded. docs/memory.md derives every formula.
"""

from hooks.memory._modes import MARGIN, Mode, Plan, gb, gib, plan
from hooks.memory._refusal import ask_for, capacity_of, explained, refuse, repair_for
from hooks.memory._shapes import QWEN25, ModelShape, SetShape, known_model, model_shape
from hooks.memory._work import Ask, Step, Task, Work, host_tables, tasks, work

__all__ = [
    "MARGIN",
    "QWEN25",
    "Ask",
    "Mode",
    "ModelShape",
    "Plan",
    "SetShape",
    "Step",
    "Task",
    "Work",
    "ask_for",
    "capacity_of",
    "explained",
    "gb",
    "gib",
    "host_tables",
    "known_model",
    "model_shape",
    "plan",
    "refuse",
    "repair_for",
    "tasks",
    "work",
]
