"""One forward pass: record it, replace sites by reconstructions, edit features."""

from hooks.passes.options import HostAndStore, RunOptions
from hooks.passes.plan import (
    NEVER,
    Interventions,
    LayerTable,
    Plan,
    as_interventions,
    inactive,
    listed,
    lists_per_row,
    make_edits,
    make_plan,
)
from hooks.passes.recording import LayerRecord, Recording, check_same_length, is_sink, record, sink_norm, sink_watch
from hooks.passes.swap import (
    Places,
    SiteQuality,
    Swap,
    SwapEffect,
    Where,
    check_modes,
    marked,
    site_quality,
    swap_effect,
)

__all__ = [
    "NEVER",
    "HostAndStore",
    "Interventions",
    "LayerRecord",
    "LayerTable",
    "Places",
    "Plan",
    "Recording",
    "RunOptions",
    "SiteQuality",
    "Swap",
    "SwapEffect",
    "Where",
    "as_interventions",
    "check_modes",
    "check_same_length",
    "inactive",
    "is_sink",
    "listed",
    "lists_per_row",
    "make_edits",
    "make_plan",
    "marked",
    "record",
    "sink_norm",
    "sink_watch",
    "site_quality",
    "swap_effect",
]
