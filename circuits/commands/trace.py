"""`circuits trace`: trace, verify, save."""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.attribution import RULES
from circuits.commands._options import add_prompt, add_target, command, load, nodes
from circuits.commands._output import Result, figure, peak_bytes, show, table
from circuits.export import export
from circuits.graph import Graph
from circuits.scatter import check_suffix
from circuits.select import ORDERS
from circuits.targets import Answer, Feature, Logit, Mass
from circuits.trace import check_options, trace
from hooks.errors import UserError
from hooks.files import check_writable


def add(commands: Any) -> None:
    """Its options."""
    tracer = command(commands, "trace", run, "explain an answer by a graph, verified by real ablations")
    add_prompt(tracer)
    tracer.add_argument("--out", type=Path, required=True, metavar="FILE", help="the graph, as safetensors")
    tracer.add_argument("--rule", default="exact", help=f"attribution rule: {', '.join(RULES)} (default exact)")
    tracer.add_argument(
        "--select", default="score", metavar="ORDER", help=f"how features are chosen: {', '.join(ORDERS)}"
    )
    tracer.add_argument("--max-nodes", type=nodes, default=10_000, metavar="N|all", help="features (default 10000)")
    tracer.add_argument("--max-in-edges", type=int, default=256, metavar="N", help="kept per node (default 256)")
    tracer.add_argument("--node-threshold", type=float, default=0.8, metavar="SHARE", help="influence kept, nodes")
    tracer.add_argument("--edge-threshold", type=float, default=0.98, metavar="SHARE", help="influence kept, edges")
    tracer.add_argument("--sample", type=int, default=200, metavar="N", help="nodes and edges to verify (default 200)")
    tracer.add_argument("--seed", type=int, default=0, help="of the verified sample")
    tracer.add_argument("--plot", type=Path, metavar="FILE", help="predicted against measured, png or svg")
    add_target(tracer, top=False)
    tracer.add_argument("--position", type=int, metavar="N", help="explain the next token after this one (default -1)")
    tracer.add_argument("--answer", metavar="TEXT", help="an answer of one or several tokens, explained as a whole")
    tracer.add_argument("--mass", type=float, metavar="P", help="the likeliest next tokens up to this probability")
    tracer.add_argument("--explain", metavar="ADDR", help="a feature instead of an answer, for example L3/118@7")
    tracer.add_argument("--counterfactual", metavar="PROMPT", help="explain what differs from this other prompt")


def run(args: argparse.Namespace) -> Result:
    """Trace, verify, save."""
    numbers = (args.max_nodes, args.max_in_edges, args.node_threshold, args.edge_threshold, args.sample, args.seed)
    check_options(args.rule, *numbers, args.select)
    target = _explained(args)
    check_writable(args.out)
    if args.plot:
        check_suffix(args.plot)
        check_writable(args.plot)
        if not args.sample:
            raise UserError("--plot draws the verification, and --sample 0 leaves none", repair="leave --sample away")
    started = time.perf_counter()
    model = load(args)
    graph = trace(
        model,
        args.prompt,
        target,
        counterfactual=args.counterfactual,
        select_by=args.select,
        max_nodes=args.max_nodes,
        max_in_edges=args.max_in_edges,
        rule=args.rule,
        node_threshold=args.node_threshold,
        edge_threshold=args.edge_threshold,
        sample=args.sample,
        seed=args.seed,
        progress=True,
    )
    graph.save(args.out)
    if args.plot:
        export(graph, args.plot, "scatter")
    result = {
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "path": str(args.out),
        "target": " + ".join(target["name"] for target in graph.meta["targets"]),
        **{
            key: graph.meta[key]
            for key in ("conservation", "remainder_share", "scores", "verification")
            if key in graph.meta
        },
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
    }
    show(args, _trace_text(graph, result))
    return result


def _explained(args: argparse.Namespace) -> Any:
    """The target that the options name."""
    named = {"--answer": args.answer, "--mass": args.mass, "--explain": args.explain}
    given = [name for name, value in named.items() if value is not None]
    if args.target is not None or args.against is not None:
        given.append("--target")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each name a target", expected="one of them")
    if args.against and args.target is None:
        raise UserError("--against needs --target", repair="name the answer too, with --target")
    if args.explain:
        return Feature(args.explain)
    if args.answer is not None:
        return Answer(args.answer)
    pos = -1 if args.position is None else args.position
    if args.mass is not None:
        return Mass(args.mass, pos=pos)
    return Logit(args.target, args.against, pos)


def _trace_text(graph: Graph, result: Result) -> str:
    lines = [f"{result['target']}: {graph.n_nodes} nodes, {graph.n_edges} edges, saved to {result['path']}"]
    strongest = graph.nodes_frame().query("kind == 'feature'").head(10)
    lines.append(table(strongest[["id", "token", "activation", "score", "influence"]]))
    shares = {name: figure(value) for name, value in graph.meta["scores"].items()}
    lines.append(f"replacement {shares['replacement']}, completeness {shares['completeness']} (before pruning)")
    lines += [_agreement(graph.meta["verification"])] if "verification" in graph.meta else []
    rule = graph.meta["rule"]
    if "remainder_share" in result:
        lines.append(f"share of the edge sums that rule {rule} leaves over: {result['remainder_share']:.1%}")
    if "conservation" in result:
        error = result["conservation"]["max_rel_error"]
        lines.append(f"rule {rule} conserves: edges into a node miss its value by {error:.1e} at most")
    for pos in graph.meta["sinks"]:
        lines.append(f"position {pos} ({graph.meta['tokens'][pos]!r}) is an attention sink; its nodes are kept")
    lines.append(f"{result['seconds']:.1f} s, peak {result['peak_bytes'] / 2**20:,.0f} MiB")
    return "\n".join(lines)


def _agreement(check: dict[str, Any]) -> str:
    rows = {
        "features ablated": check["ablation"],
        "features doubled": check["doubling"],
        "edges, source ablated": check["edge"],
    }
    names = {"n": "n", "pearson": "Pearson", "spearman": "Spearman", "sign": "sign", "slope": "slope"}
    names |= {"top_tenth": "top 10 %", "top_20": "top 20"}
    shown = [[figure(row[key]) if key != "n" else str(row[key]) for key in names] for row in rows.values()]
    table = pd.DataFrame(shown, columns=list(names.values()), index=list(rows))
    plain = f"; plain logit: Spearman {figure(check['logit_spearman'])}" if check["logit_spearman"] is not None else ""
    return f"verified by real interventions (noise floor {check['noise_floor']:.1e} logits{plain})\n{table.to_string()}"
