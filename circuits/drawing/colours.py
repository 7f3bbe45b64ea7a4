"""The colours of pictures and their meaning in words. A colour means the same in every picture.

Supports and opposes are about the target, never about the sign of a number: a score is positive where a node supports
the target; ablating such a feature lowers the metric, so its effect is negative.
"""

SUPPORTS, OPPOSES = "#1f6f8b", "#c8553d"  # blue, red
AS_PREDICTED, OTHER_SIGN = "#3f8f4f", "#9c2f9c"  # green, purple
FIRST, SECOND = AS_PREDICTED, OTHER_SIGN  # for two lines in a picture without roles
QUIET, INK, MUTED = "#9a9a9a", "#2b2b2b", "#555555"
ROLE = {"supports": SUPPORTS, "opposes": OPPOSES}  # by the words of a sweep's column `role`
ROLES = "blue: supports the target; red: opposes it"
