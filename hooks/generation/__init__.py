"""Token by token: decoding, sampling, steering, sessions, doses."""

from hooks.generation.comparison import Comparison, Scored, compare, compare_steering, prepare
from hooks.generation.decoding import Generated, Token, check_length, generate
from hooks.generation.dose import DoseResponse, dose_response, grid
from hooks.generation.engines import continued, open_session, streamed
from hooks.generation.fast import FastDecoder
from hooks.generation.observe import Observed, Observer, observed_layers
from hooks.generation.options import GenerateKeywords, GenerateOptions
from hooks.generation.sampling import Sampling, stop_strings
from hooks.generation.session import Session
from hooks.generation.strength import Resolved, Steer, Strength, preliminary

__all__ = [
    "Comparison",
    "DoseResponse",
    "FastDecoder",
    "GenerateKeywords",
    "GenerateOptions",
    "Generated",
    "Observed",
    "Observer",
    "Resolved",
    "Sampling",
    "Scored",
    "Session",
    "Steer",
    "Strength",
    "Token",
    "check_length",
    "compare",
    "compare_steering",
    "continued",
    "dose_response",
    "generate",
    "grid",
    "observed_layers",
    "open_session",
    "preliminary",
    "prepare",
    "stop_strings",
    "streamed",
]
