"""`circuits trace`: trace, verify, save."""

import argparse
import time
from typing import Any

import pandas as pd

from circuits.commands._options import computes_in, load
from circuits.commands._output import Result, figure, finish, peak_bytes, say_inactive, show, table
from circuits.commands._places import check_places
from circuits.drawing import check_suffix
from circuits.export import export
from circuits.graph import Graph, carried, warning
from circuits.targets import Answer, Feature, Logit, Mass
from circuits.tracing import check_options, trace
from hooks.errors import UserError
from hooks.interventions.ablate import Ablate
from hooks.model import HookedModel
from hooks.types import FeatureAddress


def run(args: argparse.Namespace) -> Result:
    """Trace, verify, save."""
    numbers = (args.max_nodes, args.max_in_edges, args.node_threshold, args.edge_threshold, args.sample, args.seed)
    check_options(args.rule, *numbers, args.select)
    target = _explained(args)
    if args.plot:
        check_suffix(args.plot)
        if not args.sample:
            raise UserError("--plot draws the verification, and --sample 0 leaves none", repair="leave --sample away")
    check_places(args.force, [(args.out, "graph"), (args.plot, "picture")])
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
    inactive = say_inactive(_inactive(model, args.prompt, target, graph))
    graph.save(args.out)
    result = {
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "path": str(args.out),
        "inactive": inactive,
        "target": " + ".join(target["name"] for target in graph.meta["targets"]),
        **{
            key: graph.meta[key]
            for key in ("sites", "conservation", "remainder_share", "scores", "verification")
            if key in graph.meta
        },
        **computes_in(args, model),
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
    }
    show(args, _trace_text(graph, result))
    return finish(result, args.plot, lambda path: export(graph, path, "scatter"))


def _inactive(model: HookedModel, prompt: str, target: Any, graph: Graph) -> tuple[FeatureAddress, ...]:
    """The explained feature, if the prompt does not activate it."""
    if not isinstance(target, Feature):
        return ()
    return model.inactive(prompt, Ablate(graph.meta["targets"][0]["address"]))


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
    if args.mass is not None:
        return Mass(args.mass, pos=args.at)
    return Logit(args.target, args.against, args.at)


def _trace_text(graph: Graph, result: Result) -> str:
    lines = [f"{result['target']}: {graph.n_nodes} nodes, {graph.n_edges} edges, saved to {result['path']}"]
    strongest = graph.nodes_frame().query("kind == 'feature'").head(10)
    lines.append(table(strongest[["name", "token", "activation", "score", "influence"]]))
    shares = {name: figure(value) for name, value in graph.meta["scores"].items()}
    lines += [text for text in (carried(graph.meta), warning(graph.meta)) if text is not None]
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
