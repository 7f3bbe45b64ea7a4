"""Make foreign text, such as a token or a prompt, fit for files and pictures."""

import re
from collections.abc import Sequence

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """The text with U+FFFD in place of characters that XML 1.0 does not allow: control characters (a byte token can be
    one) and surrogates."""
    return _NOT_XML.sub("\ufffd", text)


def drawn(text: str, longest: int = 160) -> str:
    """Text for one line of a picture: cleaned, with signs for line ends and tabs, and shortened."""
    line = clean(text[: longest + 1]).translate({10: "⏎", 13: "⏎", 9: "⇥"})
    return line if len(line) <= longest else line[: longest - 1] + "…"


def token(text: str, longest: int = 14) -> str:
    """A token for a picture: without the spaces around it, unless it consists of spaces."""
    return drawn(text.strip(), longest) if text.strip() else drawn(repr(text)[1:-1], longest) or "␣"


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names in their order, made unique: a repeated name gets the next free number, as in `x (2)`."""
    taken, used, count = set(names), set[str](), dict[str, int]()
    out = []
    for name in names:
        new = name
        while new in used or (new != name and new in taken):
            count[name] = count.get(name, 1) + 1
            new = f"{name} ({count[name]})"
        used.add(new)
        out.append(new)
    return tuple(out)
