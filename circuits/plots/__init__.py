"""Pictures of results: a check, a grid of strengths, a quality report, a sweep."""

from circuits.plots.check import check_plot
from circuits.plots.dose import dose_plot
from circuits.plots.quality import quality_plot
from circuits.plots.sweep import sweep_plot
from circuits.plots.training import training_plot

__all__ = ["check_plot", "dose_plot", "quality_plot", "sweep_plot", "training_plot"]
