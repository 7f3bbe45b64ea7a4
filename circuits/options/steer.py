"""Options of `circuits steer`."""

from pathlib import Path
from typing import Any

from circuits.options._shared import (
    add_changing,
    add_force,
    add_many,
    add_plot,
    add_prompt,
    add_seed,
    add_target,
    command,
    whole,
)
from hooks.choices import ENGINES
from hooks.plugins import names

INTERVENTIONS = names("hooks.interventions", "from_text")
EXAMPLES = (
    "steer 'fact: the capital of Texas is' --set L3/383=8.0",
    "steer 'fact: the capital of Texas is' --set L3/383 --strengths -2,0,2 --plot doses.svg",
)


def add(commands: Any) -> None:
    """Its options."""
    steer = command(commands, "steer", "generate with features held at chosen values", examples=EXAMPLES)
    add_prompt(steer)
    add_many(
        steer,
        "--set",
        "ADDR=VALUE",
        "hold a feature at a value, for example L3/383=8.0 or L3/383@new=8.0; x2 is twice its typical activation, 0.1r "
        "what makes it write a tenth of the residual norm",
    )
    add_many(steer, "--do", "NAME:ADDR[=VALUE]", f"any intervention: {', '.join(INTERVENTIONS)}; scale:L3/383=2.0")
    steer.add_argument(
        "--when-inactive", choices=("apply", "skip"), help="where a feature is inactive (default: apply)"
    )
    steer.add_argument("--texts", type=Path, metavar="FILE", help="one text a line, for typical activations as well")
    steer.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    add_changing(steer)
    add_force(steer)
    group = steer.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=whole, default=16, metavar="N", help="default 16")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this much probability")
    group.add_argument("--top-k", type=whole, default=0, metavar="N", help="sample from so many tokens (default: all)")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="leave out tokens below this share of the likeliest one's"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divide the logits of tokens that the text has (default: what the model's generation_config says)",
    )
    add_seed(group, "sampling")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="static: a cache and tables of fixed size, on CUDA one graph per token; dynamic does everything "
        "(default: static on CUDA where it applies)",
    )
    add_many(group, "--stop", "TEXT", "end as soon as the text contains this")
    sweep = steer.add_argument_group("sweep over strengths")
    sweep.add_argument(
        "--strengths",
        metavar="GRID",
        help="strengths for every --set ADDR without a value: 0,2,4 or 0:8:5 or x0,x1,x2 (--strengths=-2,0,2)",
    )
    add_plot(sweep, "effect and fluency against strength")
    add_target(sweep)
