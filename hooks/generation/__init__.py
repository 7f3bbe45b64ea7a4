"""Token by token: decoding, sampling, steering, sessions, doses."""

from hooks.generation.comparison import Comparison, Scored, Setting, compare, compare_steering, prepare
from hooks.generation.decoding import Generated, Token, check_length, generate, left_pads
from hooks.generation.dose import DoseResponse, dose_response, grid
from hooks.generation.observe import Observed, Observer, observed_layers
from hooks.generation.sampling import Sampling, stop_strings
from hooks.generation.session import Session
from hooks.generation.strength import Resolved, Steer, Strength, preliminary

__all__ = [
    "Comparison",
    "DoseResponse",
    "Generated",
    "Observed",
    "Observer",
    "Resolved",
    "Sampling",
    "Scored",
    "Session",
    "Setting",
    "Steer",
    "Strength",
    "Token",
    "check_length",
    "compare",
    "compare_steering",
    "dose_response",
    "generate",
    "grid",
    "left_pads",
    "observed_layers",
    "preliminary",
    "prepare",
    "stop_strings",
]
