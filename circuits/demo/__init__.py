"""The measurements on the embedded model, by public functions only: the protocols, the story, the report."""

from circuits.demo.questions import Exam
from circuits.demo.report import markdown as report_markdown
from circuits.demo.report import terminal as report_terminal
from circuits.demo.story import PICTURES, tell

__all__ = [
    "PICTURES",
    "Exam",
    "report_markdown",
    "report_terminal",
    "tell",
]
