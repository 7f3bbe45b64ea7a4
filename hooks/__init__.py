"""What does the model do, and what if I change this? Record, ablate and steer transcoder features.

from hooks import HookedModel, Ablate
model = HookedModel.load("demo")
run = model.run("fact: the capital of the state containing Dallas is", [Ablate("L3/383@-1")])
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_packages.py compares the three lists
    from hooks.checkpoints import TranscoderStore
    from hooks.effects import Change
    from hooks.errors import UserError
    from hooks.generation import Sampling, Steer
    from hooks.host import Hold
    from hooks.interventions.ablate import Ablate
    from hooks.interventions.add import Add
    from hooks.interventions.clamp import Clamp
    from hooks.interventions.scale import Scale
    from hooks.model import HookedModel
    from hooks.sites import Site
    from hooks.train import Recipe, train
    from hooks.transcoder import Transcoder
    from hooks.types import FeatureAddress, SparseActs
    from hooks.version import __version__ as __version__

__all__ = [
    "Ablate",
    "Add",
    "Change",
    "Clamp",
    "FeatureAddress",
    "Hold",
    "HookedModel",
    "Recipe",
    "Sampling",
    "Scale",
    "Site",
    "SparseActs",
    "Steer",
    "Transcoder",
    "TranscoderStore",
    "UserError",
    "train",
]

lazily(
    __name__,
    {
        "hooks.checkpoints": ("TranscoderStore",),
        "hooks.effects": ("Change",),
        "hooks.errors": ("UserError",),
        "hooks.generation": (
            "Sampling",
            "Steer",
        ),
        "hooks.host": ("Hold",),
        "hooks.interventions.ablate": ("Ablate",),
        "hooks.interventions.add": ("Add",),
        "hooks.interventions.clamp": ("Clamp",),
        "hooks.interventions.scale": ("Scale",),
        "hooks.model": ("HookedModel",),
        "hooks.sites": ("Site",),
        "hooks.train": ("Recipe", "train"),
        "hooks.transcoder": ("Transcoder",),
        "hooks.types": (
            "FeatureAddress",
            "SparseActs",
        ),
        "hooks.version": ("__version__",),
    },
)
