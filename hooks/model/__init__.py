"""`HookedModel`, the public face: a language model and its transcoders."""

from hooks.model.model import HookedModel, Run, SwapReport, load_host, self_test

__all__ = ["HookedModel", "Run", "SwapReport", "load_host", "self_test"]
