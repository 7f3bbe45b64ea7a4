"""What the subcommands do, one file each; their options are in `circuits.options`. A file defines

    run(args) -> Result          what it does; returns what `--json` prints

Results go to stdout, progress and warnings to stderr; `_output` is the only file that prints.
"""
