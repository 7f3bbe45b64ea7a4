"""Options of `circuits sweep`."""

from typing import Any

from circuits.options._shared import (
    add_at,
    add_force,
    add_layers,
    add_many,
    add_out,
    add_plot,
    add_positions,
    add_prompt,
    add_target,
    add_top,
    command,
    count,
)
from hooks.choices import CHANGES, METRICS, TABLES

EXAMPLES = (
    "sweep 'fact: the capital of Texas is' --layers 2,3 --out effects.csv",
    "sweep 'fact: the capital of Texas is' --dose L3/383@-1 --values -2,0,2",
)


def add(commands: Any) -> None:
    """Its options."""
    about = "change features one by one and measure what each does to the next token"
    sweep = command(commands, "sweep", about, examples=EXAMPLES)
    add_prompt(sweep)
    what = sweep.add_argument_group("what is changed (default: every active feature of the prompt)")
    add_layers(what)
    add_positions(what)
    add_many(what, "--group", "ADDR[+ADDR…]", "features changed together, for example L3/383@-1+L4/242@8")
    what.add_argument("--pairs", action="store_true", help="every two of the groups together as well")
    what.add_argument("--change", choices=CHANGES, default="zero", help="what becomes of a feature (default zero)")
    what.add_argument("--value", type=float, metavar="X", help="of scale and set")
    add_many(what, "--reference", "PROMPT", "prompts that mean and resample take activations from")
    what.add_argument("--dose", metavar="ADDR", help="hold one feature at each of --values")
    what.add_argument("--values", metavar="A,B,…", help="numbers, or FROM:TO:COUNT")
    add_target(sweep)
    add_at(sweep)
    sweep.add_argument("--metrics", nargs="+", choices=METRICS, default=["delta", "delta_logit"], help="columns")
    add_top(sweep, None, "the strongest effects (default: 20, and all with --json)")
    add_out(sweep, f"the whole table, {', '.join(TABLES)}")
    add_plot(sweep, "effects by layer and position")
    sweep.add_argument("--tokens-at-once", type=count, metavar="N", help="positions per batch (default: what fits)")
    add_force(sweep)
    sweep.renamed = {"--layer": "--layers", "--position": "--positions"}
