"""`HookedModel`, the public face: a language model and its transcoders."""

from hooks.model.loading import load_host, self_test
from hooks.model.model import HookedModel
from hooks.model.run import Run, SwapReport

__all__ = ["HookedModel", "Run", "SwapReport", "load_host", "self_test"]
