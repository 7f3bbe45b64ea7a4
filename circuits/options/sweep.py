"""Options of `circuits sweep`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import add_force, add_many, add_prompt, add_target, command, count, whole
from hooks.choices import CHANGES, METRICS, TABLES

EXAMPLES = (
    "sweep 'fact: the capital of Texas is' --layer 2 3 --out effects.csv",
    "sweep 'fact: the capital of Texas is' --dose L3/383@-1 --values -2,0,2",
)


def add(commands: Any) -> None:
    """Its options."""
    about = "change features one by one and measure what each does to the next token"
    sweep = command(commands, "sweep", about, examples=EXAMPLES)
    add_prompt(sweep)
    what = sweep.add_argument_group("what is changed (default: every active feature of the prompt)")
    what.add_argument("--layer", type=whole, nargs="+", action="extend", metavar="L", help="features of these layers")
    what.add_argument("--position", type=whole, nargs="+", action="extend", metavar="T", help="at these tokens")
    add_many(what, "--group", "ADDR[+ADDR…]", "features changed together, for example L3/118@-1+L4/7")
    what.add_argument("--pairs", action="store_true", help="every two of the groups together as well")
    what.add_argument("--change", choices=CHANGES, default="zero", help="what becomes of a feature (default zero)")
    what.add_argument("--value", type=float, metavar="X", help="of scale and set")
    add_many(what, "--reference", "PROMPT", "prompts that mean and resample take activations from")
    what.add_argument("--dose", metavar="ADDR", help="hold one feature at each of --values")
    what.add_argument("--values", metavar="A,B,…", help="numbers, or FROM:TO:COUNT")
    add_target(sweep, top=False)
    sweep.add_argument("--at", type=whole, default=-1, metavar="T", help="the token whose successor is measured")
    sweep.add_argument("--metrics", nargs="+", choices=METRICS, default=["delta", "delta_logit"], help="columns")
    sweep.add_argument("--top", type=count, default=20, metavar="N", help="strongest effects to show (default 20)")
    sweep.add_argument("--out", type=Path, metavar="FILE", help=f"the whole table: {', '.join(TABLES)}")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="effects by layer and position, png or svg")
    sweep.add_argument("--tokens-at-once", type=count, metavar="N", help="positions per batch (default: what fits)")
    add_force(sweep)
