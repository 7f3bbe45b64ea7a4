"""Transcoders from text: for any model, in the published form."""

from hooks.train.recipe import Recipe
from hooks.train.training import Training, train
from hooks.train.written import written_by

__all__ = ["Recipe", "Training", "train", "written_by"]
