"""`circuits convert`: write a transcoder set in another format."""

import argparse

import pandas as pd

from circuits.commands._output import Result, say, show, table
from hooks.checkpoints import convert
from hooks.names import dtype_of, transcoder_folder


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
        dtype=dtype_of(args.dtype),
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
