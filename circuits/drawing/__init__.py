"""Tools of all pictures, and the scatter plot of predictions against measurements."""

from circuits.drawing.canvas import check_drawing, check_suffix, picture, plain_decades
from circuits.drawing.colours import FIRST, INK, MUTED, OPPOSES, QUIET, ROLE, ROLES, SECOND, SUPPORTS
from circuits.drawing.scatter import plot_sample

__all__ = [
    "FIRST",
    "INK",
    "MUTED",
    "OPPOSES",
    "QUIET",
    "ROLE",
    "ROLES",
    "SECOND",
    "SUPPORTS",
    "check_drawing",
    "check_suffix",
    "picture",
    "plain_decades",
    "plot_sample",
]
