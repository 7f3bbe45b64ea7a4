"""With everything frozen the affine rule is not an approximation: predicted equals measured, node by node.

circuit-tracer's own test (100 random features doubled, every error and token added once more; pre-activations atol 5e-4
rtol 1e-5, demeaned logits atol 1e-5 rtol 1e-3), against our graph. Measured with the model's own modules: attention
pattern, norm scales and gates held by `hooks.host.frozen_parts`, all cuts at their clean values, the encoder's norm
scale held.
"""

import numpy as np
import pytest
import torch
from worlds import planted_sink, random_qwen2, random_transcoder, word_tokenizer

from circuits import RULES, Mass, prepare
from circuits.edges import Removal, run_held
from circuits.graph import ERROR, FEATURE, TOKEN
from hooks import HookedModel, Site
from hooks.host.frozen_parts import held, record_held
from hooks.sites import EMBEDDING

PROMPT = "fact: the capital of the state containing Dallas is"
N_FEATURES = 100


def mlp_model() -> HookedModel:
    coders = [random_transcoder(n, 40, read=Site("mlp_in", n), write=Site("mlp_out", n)) for n in range(4)]
    return HookedModel.from_model(random_qwen2(), word_tokenizer(), coders)


@pytest.fixture(scope="module", params=["demo", "demo_dense", "odd", "sink", "mlp"])
def world(request):
    if request.param == "mlp":
        return mlp_model(), "w1 w2 w3 w4 w5"
    if request.param == "sink":  # a vector of 100 times the norm costs fp32 two digits of what it is added to
        return planted_sink(torch.float64), "w1 w2 w3 w4 w5"
    model = request.getfixturevalue(request.param)
    return model, PROMPT if "demo" in request.param else "w1 w2 w3 w4 w5"


def sources(run) -> list[tuple[int, Site, Removal]]:
    """(node row, site, what one more of the node writes), negated: a removal of −v adds v."""
    rng = np.random.default_rng(0)
    index, found = run.index, []
    for cut in run.cuts:
        rows = index.rows(FEATURE, cut.layer)
        site = cut.transcoder.write
        for slot, row in enumerate(rows):
            vector = -cut.activation[slot] * cut.transcoder.W_dec[cut.feature[slot]]
            found.append((int(row), site, Removal(int(cut.pos[slot]), vector)))
    picked = [found[i] for i in sorted(rng.choice(len(found), min(N_FEATURES, len(found)), replace=False))]
    for cut in run.cuts:
        for row in index.rows(ERROR, cut.layer):
            pos = int(index.pos[row])
            picked.append((int(row), cut.transcoder.write, Removal(pos, -cut.error[pos])))
    if run.cuts[0].transcoder.write != EMBEDDING:  # else the tokens are the first cut
        for row in index.rows(TOKEN):
            pos = int(index.pos[row])
            picked.append((int(row), EMBEDDING, Removal(pos, -run.embedding[pos])))
    return picked


def test_predicted_is_measured_when_everything_is_frozen(world):
    model, prompt = world
    run = prepare(model, prompt, Mass(0.95), max_nodes=None, rule="affine")
    chosen = sources(run)
    rows = [{}, *({site: removal} for _, site, removal in chosen)]
    streams: dict[Site, list[torch.Tensor]] = {cut.transcoder.read: [] for cut in run.cuts}
    looks = {site: (lambda x, start, out=out: out.append(x.clone())) for site, out in streams.items()}
    layers = [cut.layer for cut in run.cuts]
    batch = run.recording.batch
    with held(model.host, record_held(model.host, batch)):
        logits = run_held(model, run.recording, layers, rows, looks, run.targets)
    checked = 0
    for block in RULES["affine"].edge_rows(run):
        first = int(block.targets[0])
        column = {int(row): n for n, row in enumerate(block.sources)}
        predicted = torch.stack(
            [block.weights[:, column[row]] if row in column else block.weights.new_zeros(()).expand(len(block.targets))
             for row, _, _ in chosen]
        )  # fmt: skip
        if run.index.kind[first] != FEATURE:
            places = run.index.feature[block.targets.numpy()]
            measured = (logits[1:] - logits[0])[:, places].to(predicted)
            torch.testing.assert_close(measured, predicted, atol=1e-5, rtol=1e-3)
            checked += int((predicted != 0).sum())
            continue
        layer = int(run.index.layer[first])
        transcoder = model.store[layer]
        if transcoder.read == EMBEDDING:
            continue  # token edges there hold nothing to measure: no block lies between
        x = torch.cat(streams[transcoder.read])
        pos, feature = (torch.from_numpy(c[block.targets.numpy()]) for c in (run.index.pos, run.index.feature))
        measured = frozen_preactivations(transcoder, x, pos, feature)
        torch.testing.assert_close(measured, predicted, atol=5e-4, rtol=1e-5)
        checked += int((predicted != 0).sum())
    assert checked > 500


def frozen_preactivations(transcoder, x, pos, feature) -> torch.Tensor:
    """Change of pre_j against row 0, the encoder's norm scale held at row 0's."""
    here = x[:, pos]
    moved = here[1:] - here[0]
    moved = moved - moved.mean(-1, keepdim=True)
    scale = torch.rsqrt(here[0].var(-1, correction=0, keepdim=True) + transcoder.norm_eps)
    return (moved * scale * transcoder.norm_weight * transcoder.W_enc[feature]).sum(-1)
