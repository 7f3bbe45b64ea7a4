"""What does the model do, and what if I change this? Record, ablate and steer transcoder features.

from hooks import HookedModel, Ablate
model = HookedModel.load("demo")
run = model.run("fact: the capital of the state containing Dallas is", [Ablate("L3/118@-1")])
"""

from hooks.candidates import Change
from hooks.errors import UserError
from hooks.generation import Sampling
from hooks.hold import Hold
from hooks.interventions.ablate import Ablate
from hooks.interventions.add import Add
from hooks.interventions.clamp import Clamp
from hooks.interventions.scale import Scale
from hooks.model import HookedModel
from hooks.sites import Site
from hooks.store import TranscoderStore
from hooks.strength import Steer
from hooks.transcoder import Transcoder
from hooks.types import FeatureAddress, SparseActs

__all__ = [
    "Ablate",
    "Add",
    "Change",
    "Clamp",
    "FeatureAddress",
    "Hold",
    "HookedModel",
    "Sampling",
    "Scale",
    "Site",
    "SparseActs",
    "Steer",
    "Transcoder",
    "TranscoderStore",
    "UserError",
]
