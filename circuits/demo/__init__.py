"""What the embedded default shows, measured through the public engine: the protocols, the story, the report."""

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
