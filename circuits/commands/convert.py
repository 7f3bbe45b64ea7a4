"""`circuits convert`: write a transcoder set in another format."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.commands._options import command, layers
from circuits.commands._output import Result, say, show, table
from hooks.convert import WRITERS, convert
from hooks.model import precision, transcoder_folder


def add(commands: Any) -> None:
    """Its options."""
    parser = command(commands, "convert", run, "write a transcoder set in another format", model=False)
    parser.add_argument("source", metavar="SRC", help="demo, demo-dense, a folder, or a hub id")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--to", default="native", metavar="F", help=f"one of {', '.join(WRITERS)} (default: native)")
    parser.add_argument("--read", metavar="SITE", help="the site the transcoders read, if the files do not say")
    parser.add_argument("--write", metavar="SITE", help="the site they reconstruct, likewise")
    parser.add_argument("--k", type=int, metavar="N", help="features TopK keeps, if the files do not say")
    parser.add_argument("--encoder", metavar="E", help="trained (default), or card: as on the published card")
    parser.add_argument("--decoder", type=int, metavar="N", help="which one, where a file has several (from 0)")
    parser.add_argument("--layers", type=layers, metavar="0,1|all", default="all", help="only these layers")
    parser.add_argument("--dtype", help="of the new weights (default: as they are)")
    parser.add_argument("--base-model", metavar="ID", help="the model they belong to, if the files do not say")


def run(args: argparse.Namespace) -> Result:
    """Write a transcoder set in another format."""
    wanted = None if args.layers == "all" else args.layers
    found = transcoder_folder(args.source, wanted)
    done = convert(
        found.root,
        args.target,
        to=args.to,
        read=args.read,
        write=args.write,
        k=args.k,
        encoder=args.encoder,
        decoder=args.decoder,
        layers=wanted,
        dtype=precision(args.dtype),
        base_model=args.base_model,
        origin={"name": args.source, "repo": found.repo, "revision": found.revision},
        progress=True,
    )
    facts = [{"fact": name, "value": value, "known": source} for name, (value, source) in done.facts.items()]
    show(args, table(pd.DataFrame(facts).fillna("unknown")))
    show(args, f"{done.root}: {len(done.layers)} layers, {done.nbytes / 1e6:.1f} MB, {done.format}")
    if done.facts["read"][0] is None or done.facts["write"][0] is None:
        say(f"the sites stay unknown: `circuits check --transcoders {done.root} --save` measures them")
    return {
        "path": str(done.root),
        "format": done.format,
        "layers": list(done.layers),
        "bytes": done.nbytes,
        "facts": {name: {"value": value, "source": source} for name, (value, source) in done.facts.items()},
    }
