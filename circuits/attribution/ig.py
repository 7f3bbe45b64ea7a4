"""ig: integrated gradients, the exact derivative averaged over steps from the prompt to a baseline.

    e_ij = a_i d_i · mean_s ∂pre_j/∂x (x − (s / S) δ)        s = 0 … S − 1, S = 10

δ is the sum of all nodes of the feeding cut: features, rest and error are scaled to zero together (b_dec stays), or to
the counterfactual's in a pair of prompts. The mean is a left Riemann sum of ten terms, as in feature-circuits (Marks et
al., arXiv:2403.19647). With larger S, the edges into a target sum to its value minus its value at the baseline, which
the remainder node has. The rule needs transcoders that write the whole stream, so that one cut feeds a target.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import Rule, record_block
from circuits.edges import (
    Block,
    Cut,
    LocalRun,
    Point,
    Rows,
    Stack,
    group_edges,
    joins_at,
    read_from,
    rotary,
    stretches,
    token_rows,
)
from circuits.targets import AnyTarget, metric
from hooks.errors import UserError
from hooks.host import Host, tap
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import Site
from hooks.types import Edit, Pass

CONSERVES = False
RULE = Rule(norms="exact", attention="exact", gate="exact")
STEPS = 10


def edge_rows(run: LocalRun) -> Iterator[Rows]:
    """All edges of a graph; ten times the work of `exact`.

    Raises:
        UserError: the algebra does not support the model's blocks, or several cuts feed a target.
    """
    stack = run.stack
    if stack is None or not all(cut.write.whole_stream for cut in run.cuts):
        raise UserError(
            "rule ig needs known blocks, and one cut that feeds a target",
            expected="a Qwen2, Qwen3 or Llama model, and transcoders that write the whole stream",
            found=f"{type(run.model.host.model).__name__}, write site {run.model.store.convention.write}",
            repair="use --rule exact",
        )
    still = replace(run, cuts=tuple(replace(cut, bias=torch.zeros_like(cut.bias)) for cut in run.cuts))
    for number in run.groups:
        if run.reads_embedding(number):
            yield token_rows(run, number)
            continue
        stacks = [_moved_stack(run, stack, number, step / STEPS) for step in range(STEPS)]
        steps = [group_edges(still, moved, number, RULE) for moved in stacks]
        for parts in zip(*steps, strict=True):
            mean = sum(part.weights for part in parts) / STEPS
            yield replace(parts[0], weights=mean)


def _moved_stack(run: LocalRun, stack: Stack, number: int, share: float) -> Stack:
    """The blocks between a group and the cut that feeds it, run on a stream from which a share of the nodes' sum is
    subtracted."""
    (feeder,) = run.feeders(number)
    site = run.reads(number)
    top = (len(stack.blocks), 0) if site is None else read_from(site)
    if feeder is None:
        start, moved = (0, 0), run.embedding
    else:
        start, moved = joins_at(run.cuts[feeder].write), _held_by(run.cuts[feeder])
    if share == 0:
        return stack
    x = stack.stream(start)
    return _run_again(run.model.host, stack, start, top, x - share * moved.to(x))


def _run_again(host: Host, stack: Stack, start: Point, top: Point, x: Float[Tensor, "pos d_model"]) -> Stack:
    if start[1]:
        raise UserError(
            "rule ig starts in front of a block",
            expected="transcoders that write resid_pre or resid_post",
            found="a write site inside a block",
        )
    cos, sin = rotary(host, x)
    blocks, end = list(stack.blocks), stack.end
    for layer in range(start[0], top[0] + 1):
        if layer == len(blocks):
            end = x.to(end.device)
            break
        w = blocks[layer].weights
        parts = (part.to(w.g1.device) for part in (x, cos, sin))
        blocks[layer] = Block(w, record_block(w, *parts))
        x = blocks[layer].record.y
    return Stack(tuple(blocks), end)


def _held_by(cut: Cut) -> Float[Tensor, "pos d_model"]:
    """The sum of a cut's nodes: its features, the rest and the error."""
    out = cut.rest + cut.error
    for t, here in stretches(cut.pos, len(out)):
        out[t] += cut.activation[here].to(out) @ cut.transcoder.W_dec[cut.feature[here]].to(out)
    return out


def gradients(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    sites: tuple[Site, ...],
    counterfactual: Recording | None = None,
) -> dict[Site, Tensor]:
    """The metric's mean gradient at each site over the steps to the baseline, [pos d_model] each.

    One forward and one backward pass of `STEPS` copies of the prompt per site.
    """
    return {
        site: mean_gradient(model, recording, targets, site, moved(model, recording, site, counterfactual))
        for site in dict.fromkeys(sites)
    }


def moved(
    model: HookedModel, recording: Recording, site: Site, counterfactual: Recording | None
) -> Float[Tensor, "pos d_model"]:
    """The difference between a site's tensor and its baseline: all except the decoder's bias, or the difference of the
    two prompts."""
    _, seen = model.host.capture(recording.batch, [site])
    if counterfactual is not None:
        _, other = model.host.capture(counterfactual.batch, [site])
        return seen[site][0] - other[site][0]
    writers = [layer for layer in recording.layers if model.store.sites(layer)[1] == site]
    bias = model.store[writers[0]].b_dec if writers else torch.zeros(())
    return seen[site][0] - bias.to(seen[site])


@torch.inference_mode(False)
@torch.enable_grad()
def mean_gradient(
    model: HookedModel,
    recording: Recording,
    targets: tuple[AnyTarget, ...],
    site: Site,
    moved: Float[Tensor, "pos d_model"],
    steps: int = STEPS,
) -> Float[Tensor, "pos d_model"]:
    """mean_s dm/dx at x − (s / steps) moved, in the plain model."""
    leaf: list[Tensor] = []
    seen: dict[Site, Tensor] = {}
    shares = torch.arange(steps, device=moved.device)[:, None, None] / steps

    def way(x: Tensor, at: Pass) -> Tensor:
        leaf.append((x - (shares * moved).to(x)).detach().requires_grad_())
        return leaf[0]

    end = targets[0].site
    edits = [Edit(site, way), *([tap(end, seen)] if end else [])]
    logits = model.host.forward_with_gradients(recording.batch.rows([0] * steps), edits)
    value = metric(targets, logits if end is None else seen[end]).sum()
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(leaf[0][0]) if gradient is None else gradient.mean(0)
