"""Options of `circuits trace`."""

from typing import Any

from circuits.options._shared import (
    add_at,
    add_force,
    add_out,
    add_plot,
    add_prompt,
    add_seed,
    add_target,
    command,
    nodes,
    whole,
)
from hooks.plugins import names

RULES = names("circuits.attribution", "edge_rows")
ORDERS = ("score", "total", "ose", "influence")
EXAMPLES = ("trace 'fact: the capital of the state containing Dallas is' --out graph.safetensors --plot scatter.png",)


def add(commands: Any) -> None:
    """Its options."""
    tracer = command(commands, "trace", "explain an answer by a graph, verified by real ablations", examples=EXAMPLES)
    add_prompt(tracer)
    add_out(tracer, "the graph, as safetensors", required=True)
    tracer.add_argument("--rule", default="exact", help=f"attribution rule: {', '.join(RULES)} (default exact)")
    tracer.add_argument(
        "--select", default="score", metavar="ORDER", help=f"how features are chosen: {', '.join(ORDERS)}"
    )
    tracer.add_argument("--max-nodes", type=nodes, default=10_000, metavar="N|all", help="features (default 10000)")
    tracer.add_argument("--max-in-edges", type=whole, default=256, metavar="N", help="kept per node (default 256)")
    tracer.add_argument("--node-threshold", type=float, default=0.8, metavar="SHARE", help="influence kept, nodes")
    tracer.add_argument("--edge-threshold", type=float, default=0.98, metavar="SHARE", help="influence kept, edges")
    tracer.add_argument("--sample", type=whole, default=200, metavar="N", help="how many to verify (default 200)")
    add_seed(tracer, "the verified sample")
    add_plot(tracer, "predicted against measured")
    add_force(tracer)
    add_target(tracer)
    add_at(tracer)
    tracer.add_argument("--answer", metavar="TEXT", help="an answer of one or several tokens, explained as a whole")
    tracer.add_argument("--mass", type=float, metavar="P", help="the likeliest next tokens up to this probability")
    tracer.add_argument("--explain", metavar="ADDR", help="a feature instead of an answer, for example L3/383@-1")
    tracer.add_argument("--counterfactual", metavar="PROMPT", help="explain what differs from this other prompt")
    tracer.renamed = {"--position": "--at"}
