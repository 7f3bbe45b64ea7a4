"""Edges split into parts: along the skip connection, the MLP and every attention head.

`decompose` splits edges of a graph; the parts of an edge sum to its weight.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import RULES
from circuits.blocks import Rule
from circuits.building import Setting, make_run, recorded, score_setting
from circuits.edges import MIDDLE, LocalRun, Parts, Stack, ends, joins_at, parts_of, read_from, stack_of
from circuits.graph import ERROR, FEATURE, TARGET, Graph, check_same
from circuits.targets import read_targets
from hooks.errors import UserError
from hooks.host import measured
from hooks.model import HookedModel
from hooks.whole import whole, wholes

PARTS = ("direct", "mlp", "ov", "key", "query")


@measured
def decompose(model: HookedModel, graph: Graph, edges: Sequence[int] | None = None, *, top: int = 50) -> pd.DataFrame:
    """Parts of edges: source, target, part, head (−1 where a part has none), weight.

    Args:
        edges: row numbers of edges; by default the `top` strongest ones that can be split. An edge can be split if it
            starts at a feature or an error and passes through one block: all edges between neighbouring cuts of a
            whole-stream set, and edges into the targets if one block is above the last cut.

    Raises:
        UserError: the graph belongs to another model, its rule has no block algebra, or an edge cannot be split.

    Examples:
        >>> from hooks import HookedModel
        >>> from circuits import trace
        >>> model = HookedModel.load("demo")
        >>> graph = trace(model, "fact: the capital of the state containing Dallas is", sample=0)
        >>> parts = decompose(model, graph, top=5)
        >>> bool(parts.groupby(["source", "target"])["weight"].sum().abs().min() > 0)
        True
    """
    top = whole(top, "top", least=0)
    check_same(model, graph)
    setting, run, stack, rule = _again(model, graph)
    wide = _through_one_block(graph, run)
    if edges is None:
        order = np.argsort(-np.abs(graph.effect[wide]), kind="stable")
        chosen = wide[order[:top]]
    else:
        chosen = np.asarray(wholes(edges, "edges"), dtype=np.int64)
        outside = np.setdiff1d(chosen, wide)
        if len(outside):
            raise UserError(
                f"edge {outside[0]} cannot be split by heads",
                expected="an edge from a feature or an error through one block",
                found=f"{graph.names[graph.source[outside[0]]]} → {graph.names[graph.target[outside[0]]]}",
            )
    frames = [_frame(graph, here, _parts(graph, setting, run, stack, rule, here)) for here in _grouped(graph, chosen)]
    columns = ["source", "target", "part", "head", "weight"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _again(model: HookedModel, graph: Graph) -> tuple[Setting, LocalRun, Stack, Rule]:
    """Record the graph's prompt again, with the graph's own features as nodes."""
    facts = graph.meta
    rule = getattr(RULES[facts["rule"]], "RULE", None)
    recording = recorded(model, facts["ids"])
    stack = stack_of(model.host, recording)
    if rule is None or stack is None:
        raise UserError(
            f"edges of rule {facts['rule']} on a {type(model.host.model).__name__} have no parts by heads",
            expected="a rule that holds or differentiates parts of a known block: "
            + ", ".join(name for name, module in RULES.items() if hasattr(module, "RULE")),
        )
    other = None if "counterfactual" not in facts else recorded(model, facts["counterfactual"]["ids"])
    targets = read_targets(facts["targets"], model.store)
    setting = score_setting(model, recording, other, targets, facts["rule"])
    index = graph.index
    selected: dict[int, list[tuple[int, int]]] = {layer: [] for layer in facts["layers"]}
    for row in index.rows(FEATURE):
        selected[int(index.layer[row])].append((int(index.pos[row]), int(index.feature[row])))
    return setting, make_run(setting, selected), stack, rule


def _through_one_block(graph: Graph, run: LocalRun) -> Int[np.ndarray, " edge"]:
    """Edges from features and errors into groups that one whole-stream cut feeds through one block."""
    index, n_layers = graph.index, run.model.host.n_layers
    good: list[tuple[int, int]] = []  # (layer of the source, layer of the target; −1: the targets)
    for number in run.groups:
        feeders = run.feeders(number)
        if len(feeders) > 1 or feeders[0] is None:
            continue
        bottom, site = joins_at(run.cuts[feeders[0]].write), run.reads(number)
        top = (n_layers, 0) if site is None else read_from(site)
        if bottom[1] == 0 and top in ((bottom[0] + 1, 0), (bottom[0], MIDDLE)):
            layer = run.cuts[number].layer if number < len(run.cuts) else -1
            good.append((run.cuts[feeders[0]].layer, layer))
    source_layer = index.layer[graph.source]
    target_layer = np.where(index.kind[graph.target] == TARGET, -1, index.layer[graph.target])
    kind = np.isin(index.kind[graph.source], (FEATURE, ERROR))
    fits = np.zeros(graph.n_edges, dtype=bool)
    for low, high in good:
        fits |= (source_layer == low) & (target_layer == high)
    return np.flatnonzero(fits & kind)


def _grouped(graph: Graph, chosen: Int[np.ndarray, " edge"]) -> list[Int[np.ndarray, " group"]]:
    """Edges, grouped by the block they pass through and by the kind of their target."""
    index, target = graph.index, graph.target[chosen]
    layer = np.where(index.kind[target] == TARGET, -1, index.layer[target])
    return [chosen[layer == one] for one in np.unique(layer)]


def _parts(
    graph: Graph, setting: Setting, run: LocalRun, stack: Stack, rule: Rule, edges: Int[np.ndarray, " edge"]
) -> Parts:
    index = graph.index
    source, target = graph.source[edges], graph.target[edges]
    at_end = index.kind[target[0]] == TARGET
    number = len(run.cuts) if at_end else [cut.layer for cut in run.cuts].index(int(index.layer[target[0]]))
    point, gradients, pos, _ = ends(run, stack, number, slice(None), rule)
    place = {int(row): n for n, row in enumerate(index.rows(TARGET) if at_end else _features(graph, target))}
    which = torch.tensor([place[int(row)] for row in target])
    (feeder,) = run.feeders(number)
    assert feeder is not None
    layer, _ = joins_at(run.cuts[feeder].write)
    block = stack.blocks[layer]
    x = block.record.x
    gradients, written = (part.to(x) for part in (gradients[which], _written(graph, run, feeder, source)))
    pos, at = (part.to(x.device) for part in (pos[which], torch.from_numpy(index.pos[source])))
    return parts_of(block, point, gradients, pos, written, at, rule)


def _features(graph: Graph, target: Int[np.ndarray, " edge"]) -> Int[np.ndarray, " row"]:
    return graph.index.rows(FEATURE, int(graph.index.layer[target[0]]))


def _written(
    graph: Graph, run: LocalRun, feeder: int, source: Int[np.ndarray, " edge"]
) -> Float[Tensor, "edge d_model"]:
    """The vector that each source writes: an error, or its activation times its decoder row."""
    cut, index = run.cuts[feeder], graph.index
    pos, feature = (torch.from_numpy(column[source]) for column in (index.pos, index.feature))
    device = cut.error.device
    amount = torch.from_numpy(graph.difference[source]).to(device)
    is_error = torch.from_numpy(index.kind[source] == ERROR).to(device)
    rows = cut.transcoder.W_dec[feature.clamp_min(0).to(device)].to(cut.error.dtype) * amount[:, None].to(cut.error)
    return torch.where(is_error[:, None], cut.error[pos.to(device)], rows)


def _frame(graph: Graph, edges: Int[np.ndarray, " edge"], parts: Parts) -> pd.DataFrame:
    names = {
        "source": [graph.names[row] for row in graph.source[edges]],
        "target": [graph.names[row] for row in graph.target[edges]],
    }
    frames = []
    for part in PARTS:
        table = getattr(parts, part).double().cpu().numpy()
        for head, column in enumerate(table.T) if table.ndim == 2 else [(-1, table)]:
            frames.append(pd.DataFrame({**names, "part": part, "head": head, "weight": column}))
    out = pd.concat(frames, ignore_index=True)
    return out[out["weight"] != 0].sort_values(["source", "target", "part", "head"], ignore_index=True)
