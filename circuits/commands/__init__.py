"""The subcommands of the command line, one file each. A file defines

    add(commands) -> None        its parser and options
    run(args) -> Result          what it does; returns what `--json` prints

Results go to stdout, progress and warnings to stderr; `_output` is the only file that prints.
"""
