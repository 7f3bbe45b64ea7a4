"""The parser of the whole command line."""

from circuits.options import (
    ablate,
    check,
    completion,
    convert,
    demo,
    export,
    features,
    steer,
    swap,
    sweep,
    trace,
    train,
)
from circuits.options._parser import Parser
from hooks.version import __version__

# in the order of the help
COMMANDS = (demo, check, features, swap, ablate, sweep, steer, trace, export, convert, train, completion)


def build_parser() -> Parser:
    """All subcommands and their options."""
    parser = Parser(
        prog="circuits",
        description="Ablate, steer and trace transcoder features of Qwen2.5 models.",
        examples=("circuits demo", "circuits features 'fact: the capital of Texas is'", "circuits ablate --help"),
    )
    parser.add_argument("--version", action="version", version=f"circuits {__version__}", help="print the version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
