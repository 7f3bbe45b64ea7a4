"""The measurements on the embedded model, by public functions only: the protocols, the story, the report."""

from circuits.demo.curves import city_pairs
from circuits.demo.discovery import verification_prompts
from circuits.demo.feature_swap import best_site, select, state_addresses, swap_plan
from circuits.demo.questions import STATE_NAMES, Exam
from circuits.demo.report import markdown as report_markdown
from circuits.demo.report import terminal as report_terminal
from circuits.demo.story import PICTURES, label_states, tell

__all__ = [
    "PICTURES",
    "STATE_NAMES",
    "Exam",
    "best_site",
    "city_pairs",
    "label_states",
    "report_markdown",
    "report_terminal",
    "select",
    "state_addresses",
    "swap_plan",
    "tell",
    "verification_prompts",
]
