"""Measured over text: which sites a set reads and writes, and how good it is."""

from hooks.check.block_by_block import rows_of
from hooks.check.calibration import Calibration, calibrate
from hooks.check.fits import Option
from hooks.check.quality_figures import quality
from hooks.check.quality_report import QualityReport, check_report_suffix
from hooks.check.texts import Texts

__all__ = [
    "Calibration",
    "Option",
    "QualityReport",
    "Texts",
    "calibrate",
    "check_report_suffix",
    "quality",
    "rows_of",
]
