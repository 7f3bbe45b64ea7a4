"""`circuits train`: transcoders for a model, from text."""

import argparse
from dataclasses import asdict

import pandas as pd

from circuits.commands._options import settle
from circuits.commands._output import Result, finish, say, show, table
from circuits.drawing import check_drawing
from circuits.plots import training_plot
from hooks.check import Texts
from hooks.model import load_host
from hooks.train import Recipe, Training, train, written_by


def run(args: argparse.Namespace) -> Result:
    """Train, write the set, say how good it is."""
    if args.plot is not None:
        check_drawing(args.plot)
    settle(args.model)
    host = load_host(args.model, dtype=args.dtype, device=args.device, device_map=args.device_map)
    recipe = recipe_of(args, host.d_model)
    texts = Texts.of_file(args.text) if args.text else Texts.built_in(demo=args.model == "demo")
    prompts = list(texts.texts)
    if args.written:
        say(f"the model writes {args.written:,} tokens")
        prompts += written_by(host, args.written, recipe.context, recipe.seed, progress=True)
    done = train(
        host,
        prompts,
        args.out,
        recipe=recipe,
        layers=None if args.layers == "all" else args.layers,
        memory_gb=args.memory_gb,
        model=args.model,
        text=texts.name + (f", and {args.written:,} tokens of the model's own" if args.written else ""),
        progress=True,
        say=say,
    )
    frame = frame_of(done)
    show(args, table(frame))
    show(args, f"{done.root}: {len(frame)} layers, {done.tokens:,} tokens, {done.seconds:,.0f} s")
    result = {
        "path": str(done.root),
        "tokens": done.tokens,
        "seconds": done.seconds,
        "layers": frame.to_dict("records"),
        "curves": done.curves,
    }
    return finish(result, args.plot, lambda path: training_plot(done, path))


def recipe_of(args: argparse.Namespace, d_model: int) -> Recipe:
    """What was asked for; the rest is the recipe's own."""
    given = {"learning_rate": args.learning_rate} if args.learning_rate is not None else {}
    return Recipe.sized(
        d_model,
        d_features=args.features,
        expansion=args.expansion,
        k=args.k,
        read=args.read,
        write=args.write or args.read,
        tokens=args.tokens,
        batch=args.batch_tokens,
        chunk=args.chunk,
        context=args.window,
        seed=args.seed,
        **given,
    )


def frame_of(done: Training) -> pd.DataFrame:
    """One row per layer, on held-out text without attention sinks."""
    return pd.DataFrame([{"layer": layer, **asdict(figures)} for layer, figures in done.figures.items()])
