"""Total effects: one backward pass through the chain of features is the sum over all paths of the graph's edges.

The models run wholly in fp64 (`double_norms`), as transformers' own norms would add 1e-7 between the streams of one
block and the next.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from test_conventions import ALL, hooked, local_run, over, run_of, settled

from circuits import Direction, Logit
from circuits.attribution import RULES
from circuits.building import assemble
from circuits.building.choose_nodes import total_effects
from circuits.edges import chain_gradients
from circuits.graph import BIAS, ERROR, FEATURE, REST, TARGET, TOKEN
from hooks import Site, UserError

SETS = [
    ("resid_pre", "resid_pre", ALL),
    ("resid_pre", "resid_pre", (0, 2)),
    ("resid_mid", "resid_mid", (1, 3)),
    ("resid_pre", "resid_post", ALL),
    ("resid_pre", "resid_post", (0, 2)),
    ("resid_pre", "resid_mid", ALL),
    ("mlp_in", "mlp_out", ALL),
    ("mlp_in", "mlp_out", (1, 3)),
    ("resid_mid", "mlp_out", (0, 2)),
    ("resid_pre", "mlp_out", ALL),
    ("mlp_in", "mlp_out+1", (0, 1, 2)),
    ("resid_pre", "attn_out", ALL),
]
EVERY_SET = over(SETS)


@cache
def complete(sites, rule):
    """A setting and its complete graph, no edge left out."""
    setting = replace(settled(sites), rule=rule)
    return setting, assemble(setting, run_of(setting), 10**6)


def explaining(sites, targets):
    setting, run = local_run(hooked(*sites), rule="affine", targets=targets)
    return setting, assemble(setting, run, 10**6)


def path_sums(graph, weights=(1.0,)) -> np.ndarray:
    """Total effect of every node: over all paths to the targets, the product of edges, over a_j at each feature j.

    Worked out from the targets down; a feature's row is complete before anything that feeds it is looked at.
    """
    index, total = graph.index, np.zeros(graph.n_nodes)
    per_unit = np.zeros(graph.n_nodes)
    per_unit[index.rows(TARGET)] = weights
    top = index.layer.max() + 1
    depth = np.where(index.kind == TARGET, top, index.layer)
    for level in range(top, -1, -1):
        here = (depth == level) & (index.kind == FEATURE)
        per_unit[here] = total[here] / graph.activation[here]
        into = np.flatnonzero(depth[graph.target] == level)
        np.add.at(total, graph.source[into], graph.weight[into] * per_unit[graph.target[into]])
    return total


@pytest.mark.parametrize("rule", ["affine", "exact"])
@EVERY_SET
def test_the_chain_sums_over_all_paths(sites, rule):
    setting, graph = complete(sites, rule)
    paths, index = path_sums(graph), graph.index
    rows = index.rows(FEATURE)
    totals = total_effects(setting).set_index(["layer", "pos", "feature"])["total"]
    ours = totals.loc[list(zip(index.layer[rows], index.pos[rows], index.feature[rows], strict=True))].to_numpy()
    assert len(totals) == len(rows)
    assert (paths[rows][index.pos[rows] == 3] != 0).all()  # at the target's own position all features have a path
    np.testing.assert_allclose(ours, paths[rows], rtol=1e-9, atol=1e-12)


@EVERY_SET
def test_gradients_of_the_chain_are_the_totals_of_errors_and_biases(sites):
    setting, graph = complete(sites, "exact")
    paths, index = path_sums(graph), graph.index
    layers = list(setting.scores.layers)
    found = chain_gradients(setting.model, setting.recording, setting.targets, layers, RULES["exact"].RULE)
    for layer in layers:
        record, gradient = setting.recording.layers[layer], found[layer]
        np.testing.assert_allclose((record.error[0] * gradient).sum(-1), paths[index.rows(ERROR, layer)], rtol=1e-9)


@pytest.mark.parametrize("rule", ["affine", "half"])
@EVERY_SET
def test_what_has_no_input_adds_up_to_the_target(sites, rule):
    """Tokens, errors and biases; the constants of encoders and value biases are edges of bias nodes."""
    _, graph = complete(sites, rule)
    paths, kind = path_sums(graph), graph.index.kind
    first = np.isin(kind, (TOKEN, ERROR, REST, BIAS))
    (row,) = graph.index.rows(TARGET)
    assert np.abs(paths[kind == REST]).max() < 1e-12  # every active feature is a node
    assert np.abs(paths[first]).sum() > abs(graph.activation[row])  # they do cancel
    assert paths[first].sum() == pytest.approx(graph.activation[row], rel=1e-9)


def test_without_the_constants_it_would_not_add_up():
    _, graph = complete(("mlp_in", "mlp_out", ALL), "affine")
    paths = path_sums(graph)
    (row,) = graph.index.rows(TARGET)
    biases = graph.index.kind == BIAS
    assert (np.abs(paths[biases]) > 1e-3 * abs(graph.activation[row])).all()


def test_several_targets_are_summed_with_their_weights():
    """Two positions and the shares of a list: totals of the mean of the two."""
    targets = [Logit("w7", "w9"), Logit("w8", "w3", pos=1)]
    sites = ("resid_pre", "resid_pre", ALL)
    totals = [total_effects(explaining(sites, one)[0]) for one in (targets, *targets)]
    tables = [table.set_index(["layer", "pos", "feature"])["total"].sort_index() for table in totals]
    np.testing.assert_allclose(tables[0], (tables[1] + tables[2]) / 2, rtol=1e-9, atol=1e-12)
    setting, graph = explaining(sites, targets)
    paths = path_sums(graph, [target.weight for target in setting.targets])
    first = np.isin(graph.index.kind, (TOKEN, ERROR, REST, BIAS))
    rows = graph.index.rows(TARGET)
    assert paths[first].sum() == pytest.approx(graph.activation[rows].mean(), rel=1e-9)


@pytest.mark.parametrize("sites", [("resid_pre", "resid_pre", ALL), ("resid_pre", "resid_post", ALL)], ids=str)
def test_targets_within_the_model(sites):
    """Below the target's site only; the last cut may write right where it is read."""
    vector = torch.randn(40, generator=torch.Generator().manual_seed(0))
    setting, graph = explaining(sites, Direction(vector, Site("resid_pre", 3), pos=2))
    assert max(setting.scores.layers) == 2
    paths, index = path_sums(graph), graph.index
    (row,) = index.rows(TARGET)
    first = np.isin(index.kind, (TOKEN, ERROR, REST, BIAS))
    assert paths[first].sum() == pytest.approx(graph.activation[row], rel=1e-9)
    features = index.rows(FEATURE)
    totals = total_effects(setting).sort_values(["layer", "pos", "feature"])["total"]
    np.testing.assert_allclose(totals, paths[features], rtol=1e-9, atol=1e-12)


def test_where_the_algebra_does_not_know_a_site_totals_are_refused():
    """A set on a module's output has a graph by autograd, but no chain; without the check it would be a wrong one."""
    with pytest.raises(UserError, match="total effects need to know what a block computes"):
        total_effects(settled(("mlp_out", "mlp_out", ALL)))
