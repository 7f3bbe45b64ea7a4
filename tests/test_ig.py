"""Integrated gradients: complete in the limit, exact in one step, refused where several cuts feed a target."""

import pytest
import torch
from worlds import random_hooked, random_qwen2, random_transcoder, word_tokenizer

from circuits import RULES, prepare, trace
from circuits.attribution import ig
from circuits.edges import feature_values
from hooks import HookedModel, Site, UserError
from hooks.host import tap
from hooks.types import Edit

TEXT = "w1 w2 w3 w4 w5"


@pytest.fixture(scope="module")
def wide() -> HookedModel:
    return random_hooked(dtype=torch.float64, seed=3)


def test_one_step_is_the_exact_rule(odd, monkeypatch):
    monkeypatch.setattr(ig, "STEPS", 1)
    exact, one = (list(RULES[rule].edge_rows(prepare(odd, TEXT, rule=rule, max_nodes=60))) for rule in ("exact", "ig"))
    for ours, theirs in zip(one, exact, strict=True):
        torch.testing.assert_close(ours.weights[:, :-1], theirs.weights[:, :-1])  # the bias does not move under ig


def test_with_many_steps_edges_sum_to_what_the_path_changes(wide, monkeypatch):
    """sum_i e_ij -> pre_j(clean) − pre_j(features, rest and error of the cut gone), which really runs."""
    run = prepare(wide, TEXT, rule="ig", max_nodes=60)
    misses = []
    for steps in (30, 240):
        monkeypatch.setattr(ig, "STEPS", steps)
        miss = 0.0
        for rows in ig.edge_rows(run):
            layer = int(run.index.layer[rows.targets[0]])
            numbers = [n for n, cut in enumerate(run.cuts) if cut.layer == layer and n > 0]
            if not numbers:  # the targets, or fed by the tokens
                continue
            moved = rows.values - baseline_values(run, numbers[0])
            miss = max(miss, float((rows.weights[:, :-1].sum(1) - moved).abs().max() / moved.abs().max()))
        misses.append(miss)
    assert misses[1] < 0.06
    assert misses[1] < misses[0] / 4  # left sums: the miss falls as 1 / steps, here to an eighth


def baseline_values(run, number: int) -> torch.Tensor:
    """Pre-activations of a cut's features where the cut below holds its decoder's bias and nothing else."""
    cut, below = run.cuts[number], run.cuts[number - 1]
    seen = {}
    empty = below.bias.expand(1, len(run.embedding), -1)
    edits = [Edit(below.transcoder.write, lambda x, at: empty.to(x)), tap(cut.transcoder.read, seen)]
    run.model.host.forward_hidden(run.recording.batch, edits)
    return feature_values(run.model, cut.layer, cut.pos, cut.feature, seen[cut.transcoder.read])[0]


def test_a_pair_of_prompts_is_the_way_between_them(odd):
    graph = trace(odd, TEXT, counterfactual="w1 w9 w3 w4 w5", rule="ig", sample=0)
    assert graph.meta["remainder_share"] < 0.5


def test_several_feeders_are_refused():
    coders = [random_transcoder(n, 40, read=Site("mlp_in", n), write=Site("mlp_out", n)) for n in range(4)]
    model = HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)
    with pytest.raises(UserError, match="one cut that feeds a target"):
        trace(model, TEXT, rule="ig", sample=0)
