"""TransformerLens: its hook functions as our edits, and our edits as its hooks."""

from hooks.lens.bridge import Passes, boot, fwd_hooks
from hooks.lens.cache import FeatureCache
from hooks.lens.functions import LensHook, lens_edits

__all__ = [
    "FeatureCache",
    "LensHook",
    "Passes",
    "boot",
    "fwd_hooks",
    "lens_edits",
]
