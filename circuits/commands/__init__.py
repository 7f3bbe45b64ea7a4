"""The subcommands, one file each; their options are in `circuits.options`. A file defines

    run(args) -> Result          runs the command; returns the result that `--json` prints

Results go to stdout, progress and warnings to stderr; `_output` is the only file that prints.
"""
