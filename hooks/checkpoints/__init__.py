"""Described file → layer in memory: conventions, findings, loading, residency, the store, conversion."""

from hooks.checkpoints.convention import Convention, choose, named_layers
from hooks.checkpoints.conversion import convert
from hooks.checkpoints.findings import (
    FILE,
    Candidate,
    CurvePoint,
    DecoderFinding,
    Findings,
    LayerFinding,
    Selection,
    Verdict,
    read_findings,
    save_findings,
)
from hooks.checkpoints.store import TranscoderStore

__all__ = [
    "FILE",
    "Candidate",
    "Convention",
    "CurvePoint",
    "DecoderFinding",
    "Findings",
    "LayerFinding",
    "Selection",
    "TranscoderStore",
    "Verdict",
    "choose",
    "convert",
    "named_layers",
    "read_findings",
    "save_findings",
]
