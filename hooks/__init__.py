"""What does the model do, and what if I change this? Record, ablate and steer transcoder features.

from hooks import HookedModel, Ablate
model = HookedModel.load("demo")
run = model.run("fact: the capital of the state containing Dallas is", [Ablate("L3/383@-1")])
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily
from qwen_circuits import warn_of_another

warn_of_another("circuits")  # other distributions have packages of this name; `hooks` works without ours

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_packages.py compares the three lists
    from hooks.check import Texts, calibrate, quality
    from hooks.checkpoints import TranscoderStore, read_findings, save_findings
    from hooks.effects import Change, active_features, changed, doses, pairs, path_effects
    from hooks.errors import (
        AddressError,
        CheckpointError,
        InterventionError,
        ModelError,
        OutputError,
        PictureError,
        PromptError,
        TargetError,
        TrainingError,
        UserError,
    )
    from hooks.generation import Sampling, Steer
    from hooks.host import Hold
    from hooks.interventions.ablate import Ablate
    from hooks.interventions.add import Add
    from hooks.interventions.clamp import Clamp
    from hooks.interventions.scale import Scale
    from hooks.model import HookedModel
    from hooks.sites import Site, SiteSpec
    from hooks.train import Recipe, train
    from hooks.transcoder import Transcoder
    from hooks.types import Edit, FeatureAddress, SparseActs
    from hooks.version import __version__ as __version__

__all__ = [
    "Ablate",
    "Add",
    "AddressError",
    "Change",
    "CheckpointError",
    "Clamp",
    "Edit",
    "FeatureAddress",
    "Hold",
    "HookedModel",
    "InterventionError",
    "ModelError",
    "OutputError",
    "PictureError",
    "PromptError",
    "Recipe",
    "Sampling",
    "Scale",
    "Site",
    "SiteSpec",
    "SparseActs",
    "Steer",
    "TargetError",
    "Texts",
    "TrainingError",
    "Transcoder",
    "TranscoderStore",
    "UserError",
    "active_features",
    "calibrate",
    "changed",
    "doses",
    "pairs",
    "path_effects",
    "quality",
    "read_findings",
    "save_findings",
    "train",
]

lazily(
    __name__,
    {
        "hooks.check": ("Texts", "calibrate", "quality"),
        "hooks.checkpoints": ("TranscoderStore", "read_findings", "save_findings"),
        "hooks.effects": ("Change", "active_features", "changed", "doses", "pairs", "path_effects"),
        "hooks.errors": (
            "AddressError",
            "CheckpointError",
            "InterventionError",
            "ModelError",
            "OutputError",
            "PictureError",
            "PromptError",
            "TargetError",
            "TrainingError",
            "UserError",
        ),
        "hooks.generation": ("Sampling", "Steer"),
        "hooks.host": ("Hold",),
        "hooks.interventions.ablate": ("Ablate",),
        "hooks.interventions.add": ("Add",),
        "hooks.interventions.clamp": ("Clamp",),
        "hooks.interventions.scale": ("Scale",),
        "hooks.model": ("HookedModel",),
        "hooks.sites": ("Site", "SiteSpec"),
        "hooks.train": ("Recipe", "train"),
        "hooks.transcoder": ("Transcoder",),
        "hooks.types": ("Edit", "FeatureAddress", "SparseActs"),
        "hooks.version": ("__version__",),
    },
)
