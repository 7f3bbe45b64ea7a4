"""argparse with error messages that name the repair: the probable word, and the corrected command line."""

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

_LONGEST = 120  # characters of one value in a message
_NUMBERS = re.compile(r"all|,?[-+]?\d[-+,\d]*")  # a word that can be part of a list of numbers


class NumberList(argparse.Action):
    """An option that takes a list of numbers, in one word or several; if it is repeated, the lists are joined."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Keep the numbers."""
        earlier = getattr(namespace, self.dest)
        lists = isinstance(earlier, list) and isinstance(values, list)
        setattr(namespace, self.dest, [*earlier, *values] if lists else values)


class Parser(argparse.ArgumentParser):
    """The parser of the command, and of every subcommand."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any):
        if examples:
            settings["epilog"] = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **settings)
        # a word that begins with one dash is a value, as in --strengths -2,0,2; the only short option is -h
        self._negative_number_matcher = re.compile(r"-[^-]")
        self.words: list[str] = []
        self.renamed: dict[str, str] = {}  # earlier names of options, which this version still takes

    @property
    def commands(self) -> dict[str, "Parser"]:
        """The parsers of subcommands, if this one has any."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but the parser of the subcommand refuses words that are left over."""
        self.words = list(sys.argv[1:] if args is None else args)
        first = self.words[0] if self.words else ""
        if first.startswith("--") and not self.knows(first) and any(sub.knows(first) for sub in self.commands.values()):
            self._fail(f"{first} is before the command; options follow it: circuits features PROMPT {first}")
        found, rest = super().parse_known_args(self._joined(self._by_new_names(self.words)), namespace)
        if rest:
            self._refuse(found, rest)
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print usage, message and hints to stderr; exit status 2."""
        self._fail(message, self._hints(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Raise an error if help cannot be written; argparse would exit with status 0."""
        (file or sys.stderr).write(message)

    def knows(self, word: str) -> bool:
        """Whether a word names an option, shortened or not."""
        known = (*self._option_string_actions, *self.renamed)
        return any(option.startswith(word.partition("=")[0]) for option in known)

    def _by_new_names(self, words: Sequence[str]) -> list[str]:
        """The words with earlier names of options replaced; a line on stderr for each of them."""
        end = words.index("--") if "--" in words else len(words)
        said, out = dict.fromkeys(words[:0]), []
        for word in words[:end]:
            name, equals, value = word.partition("=")
            new = self.renamed.get(name)
            if new:
                said[f"{self.prog}: {name} is deprecated; it is {new} now"] = None
            out.append(f"{new or name}{equals}{value}")
        for line in said:
            self._print_message(line + "\n")
        return [*out, *words[end:]]

    def _joined(self, words: Sequence[str]) -> list[str]:
        """The words with each list of numbers joined to one: `--layers 2 3` → `--layers 2,3`. Then the prompt may
        follow."""
        out: list[str] = []
        joins = False
        for word in words:
            if joins and _NUMBERS.fullmatch(word) and out[-1] not in self._option_string_actions:
                out[-1] = f"{out[-1].rstrip(',')},{word.lstrip(',')}"
                continue
            joins = joins and out[-1] in self._option_string_actions and bool(_NUMBERS.fullmatch(word))
            joins = joins or isinstance(self._option_string_actions.get(word), NumberList)
            out.append(word)
        return out

    def _fail(self, message: str, hints: Iterable[str] = ()) -> NoReturn:
        message = re.sub(rf"\S{{{_LONGEST},}}", lambda long: f"{long[0][: _LONGEST // 2]}…", message)
        self.print_usage(sys.stderr)
        self.exit(2, "\n".join([f"{self.prog}: error: {message}", *(f"  {hint}" for hint in hints)]) + "\n")

    def _refuse(self, found: argparse.Namespace, rest: list[str]) -> NoReturn:
        """Refuse words that belong to no option or argument: a misspelt option, or a prompt without quotes."""
        prompt = getattr(found, "prompt", None)
        if prompt is None or any(word.startswith("--") for word in rest):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        others = list(self.words)
        for word in (prompt, *rest):
            others.remove(word)
        line = shlex.join([*self.prog.split(), " ".join([prompt, *rest]), *others])
        self._fail(f"the prompt is one argument, and {prompt!r} is followed by {rest[0]!r}; quote it: {line}")

    def _hints(self, message: str) -> Iterator[str]:
        typed = self.words[: self.words.index("--")] if "--" in self.words else self.words
        for word in typed:
            if word.startswith("--") and not self.knows(word):
                yield from _meant(word.partition("=")[0], self._option_string_actions)
        if self.commands and "invalid choice" in message:
            yield from _meant(next(word for word in typed if not word.startswith("-")), self.commands)
        lists = [word for word in typed if getattr(self._option_string_actions.get(word), "nargs", "") == "+"]
        if "required: PROMPT" in message and lists:
            line = shlex.join([*self.prog.split(), self.words[-1], *self.words[:-1]])
            yield f"{lists[-1]} takes every word behind it; the prompt comes first: {line}"


def _meant(word: str, known: Iterable[str]) -> Iterator[str]:
    for guess in difflib.get_close_matches(word, list(known), 1):
        yield f"{word}: did you mean {guess}?"
