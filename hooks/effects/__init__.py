"""Many edits of one prompt, measured: sweeps, effects along paths, and the effect of rounding on both."""

from hooks.effects.changes import Change, active_features, changed, doses, pairs
from hooks.effects.paths import Effects, PathEffect, Through, effects, path_effects
from hooks.effects.staggered import out_of_memory
from hooks.effects.sweeping import TOKENS_AT_ONCE, Sweep, sweep

__all__ = [
    "TOKENS_AT_ONCE",
    "Change",
    "Effects",
    "PathEffect",
    "Sweep",
    "Through",
    "active_features",
    "changed",
    "doses",
    "effects",
    "out_of_memory",
    "pairs",
    "path_effects",
    "sweep",
]
