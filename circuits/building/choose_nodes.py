"""Which features become nodes. Each order gives a number per feature; ties are broken by (layer, position, feature), so
the choice is deterministic.

    score       |s_i|, grad × activation in the plain model
    total       |total effect| along all paths through features, with errors held
    ose         |s_i| with the next block run, among the candidates of the highest score
    influence   unsigned influence in the complete graph; all edges are computed and none is kept

Half of the nodes are shared out over the layers, since every path crosses every cut and needs a node there.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuits.attribution import RULES, one_step_scores
from circuits.building.assembly import Setting, make_run
from circuits.building.feature_scores import from_gradients
from circuits.edges import chain_gradients
from circuits.graph import FEATURE, TARGET

KEYS = ["layer", "pos", "feature"]
CANDIDATES = 4  # candidates per node, for orders that cost a run of a block per candidate


def select(setting: Setting, max_nodes: int | None, order: str) -> pd.DataFrame:
    """The chosen rows of the score table, with the strength that chose them in a column `order`."""
    table = setting.scores.frame
    if max_nodes is None or max_nodes >= len(table):
        return table.assign(order=table["score"].abs())
    ranked = ORDERS[order](setting, table, max_nodes)
    ranked = ranked.sort_values(["order", *KEYS], ascending=[False, True, True, True], ignore_index=True)
    share = max_nodes // (2 * len(setting.scores.layers))
    first = ranked.groupby("layer").head(share).index
    others = ranked.index.difference(first, sort=True)[: max_nodes - len(first)]
    return ranked.loc[first.union(others)]


def coverage(setting: Setting, chosen: pd.DataFrame, order: str) -> dict[str, int | float | str]:
    """The chosen features' share of sum |score| over all active features."""
    size = setting.scores.frame["score"].abs()
    covered = float(chosen["score"].abs().sum() / size.sum()) if size.sum() else 1.0
    return {"active_features": len(size), "selected": len(chosen), "covered_score": covered, "order": order}


def by_layer(setting: Setting, chosen: pd.DataFrame) -> dict[int, list[tuple[int, int]]]:
    """(position, feature) pairs per layer."""
    pairs: dict[int, list[tuple[int, int]]] = {layer: [] for layer in setting.scores.layers}
    for layer, rows in chosen.groupby("layer"):
        pairs[int(layer)] = list(zip(rows["pos"].tolist(), rows["feature"].tolist(), strict=True))
    return pairs


def _by_score(setting: Setting, table: pd.DataFrame, max_nodes: int) -> pd.DataFrame:
    return table.assign(order=table["score"].abs())


def _by_total(setting: Setting, table: pd.DataFrame, max_nodes: int) -> pd.DataFrame:
    totals = total_effects(setting)
    return table.merge(totals, on=KEYS, validate="one_to_one").assign(order=lambda t: t.pop("total").abs())


def total_effects(setting: Setting) -> pd.DataFrame:
    """layer, pos, feature, total of every active feature: its effect along all paths of features."""
    layers = list(setting.scores.layers)
    rule = getattr(RULES[setting.rule], "RULE", RULES["exact"].RULE)
    gradients = chain_gradients(setting.model, setting.recording, setting.targets, layers, rule)
    scores = from_gradients(setting.model, setting.recording, setting.targets, gradients, setting.counterfactual)
    return scores.frame[[*KEYS, "score"]].rename(columns={"score": "total"})


def _by_ose(setting: Setting, table: pd.DataFrame, max_nodes: int) -> pd.DataFrame:
    share = max_nodes // (2 * len(setting.scores.layers))
    per_layer = table.groupby("layer").head(CANDIDATES * share).index
    candidates = table.loc[per_layer.union(table.index[: CANDIDATES * max_nodes])]
    parts = []
    for layer, rows in candidates.groupby("layer"):
        device = setting.model.store[int(layer)].device
        pos, feature = (torch.tensor(rows[name].tolist(), device=device) for name in ("pos", "feature"))
        amount = torch.tensor((rows["activation"] - rows["baseline"]).tolist(), dtype=torch.float64, device=device)
        nodes = (pos, feature, amount)
        found = one_step_scores(setting.model, setting.recording, setting.targets, int(layer), nodes)
        parts.append(rows.assign(order=found.abs().numpy()))
    return pd.concat(parts)


def _by_influence(setting: Setting, table: pd.DataFrame, max_nodes: int) -> pd.DataFrame:
    run = make_run(setting, by_layer(setting, table))
    index, found = run.index, np.zeros(len(run.index))
    found[index.rows(TARGET)] = [target.weight for target in setting.targets]
    for rows in RULES[setting.rule].edge_rows(run):  # from the targets down, so a target's influence is known first
        size = rows.weights.abs().double()
        start = torch.from_numpy(found[rows.targets.numpy()]).to(size.device)
        flow: Float[torch.Tensor, " source"] = (start / size.sum(1).clamp_min(1e-10)) @ size
        np.add.at(found, rows.sources.numpy(), flow.cpu().numpy())
    nodes = index.rows(FEATURE)
    influence = pd.DataFrame({name: getattr(index, name)[nodes] for name in KEYS}).assign(order=found[nodes])
    return table.merge(influence, on=KEYS, validate="one_to_one")


ORDERS: dict[str, Callable[[Setting, pd.DataFrame, int], pd.DataFrame]] = {
    "score": _by_score,
    "total": _by_total,
    "ose": _by_ose,
    "influence": _by_influence,
}
