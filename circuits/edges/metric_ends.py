"""A target's value, and its gradient with respect to the stream it reads, at its own position."""

from typing import Any

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import Rule, norm_transposed
from circuits.edges.run import LocalRun
from circuits.edges.stack import Point, Stack, read_from
from circuits.targets import AnyTarget, Direction, Feature, Target
from hooks.host import Host
from hooks.sites import Site
from hooks.transcoder import Transcoder

Ends = tuple[Point, Float[Tensor, "target d_model"], Int[Tensor, " target"], Float[Tensor, " target"]]


def ends(run: LocalRun, stack: Stack, number: int, part: slice, rule: Rule) -> Ends:
    """Of some targets of a group: the point they read, their gradients there, positions, values without constants.

    A constant is the part of a value that only the bias node contributes: b_j + w_j · ln_b.
    """
    if number == len(run.cuts):
        return target_ends(run.model.host, stack, run.targets[part], rule)
    cut = run.cuts[number]
    gradients, values = _feature_ends(stack, cut.transcoder, cut.feature[part], cut.pos[part], rule)
    return read_from(cut.read), gradients, cut.pos[part], values


def constants(run: LocalRun, number: int, part: slice) -> Float[Tensor, " target"]:
    """w_j · ln_b + b_j of some targets of a group; 0 in a pair of prompts, where constants cancel."""
    none = torch.zeros(len(run.target_rows(number)[part]))
    if run.paired:
        return none
    if number < len(run.cuts):
        return encoder_bias(run.cuts[number].transcoder, run.cuts[number].feature[part])
    targets = run.targets[part]
    places, transcoder, feature = _features_among(targets)
    if transcoder is None:
        return none
    found = encoder_bias(transcoder, feature)
    return none.to(found).index_put((places,), found)


def _features_among(
    targets: tuple[AnyTarget, ...],
) -> tuple[Int[Tensor, " row"], Transcoder | None, Int[Tensor, " row"]]:
    """Which targets are features: their indices, the transcoder they share, their feature numbers."""
    found = [(place, target) for place, target in enumerate(targets) if isinstance(target, Feature)]
    transcoder = found[0][1].transcoder if found else None
    device = None if transcoder is None else transcoder.device
    places = torch.tensor([place for place, _ in found], dtype=torch.int64)
    feature = torch.tensor([target.address.feature for _, target in found], dtype=torch.int64, device=device)
    return places, transcoder, feature


def encoder_bias(transcoder: Transcoder, feature: Int[Tensor, " target"]) -> Float[Tensor, " target"]:
    """b_j + w_j · (ln_b − shift): the part of a pre-activation that does not depend on the stream."""
    dtype = torch.promote_types(transcoder.W_enc.dtype, torch.float32)
    bias = transcoder.b_enc[feature].to(dtype)
    if transcoder.norm_bias is not None:
        bias = bias + transcoder.W_enc[feature].to(dtype) @ transcoder.norm_bias.to(dtype)
    if transcoder.shift is not None:
        bias = bias - transcoder.W_enc[feature].to(dtype) @ transcoder.shift.to(dtype)
    return bias


def target_ends(host: Host, stack: Stack, targets: tuple[AnyTarget, ...], rule: Rule) -> Ends:
    """The same for the targets of a graph: logits, directions or features. All of them read one point."""
    pos = torch.tensor([target.pos for target in targets], device=stack.end.device)
    if not targets:
        return (0, 0), stack.end.new_zeros(0, stack.end.shape[1]), pos, stack.end.new_zeros(0)
    site = targets[0].site
    if site is None:
        logits = [target for target in targets if isinstance(target, Target)]
        return (len(stack.blocks), 0), *_logit_ends(host, stack, logits, pos, rule)
    x = stack.stream(read_from(site))
    pos = pos.to(x.device)
    places, transcoder, feature = _features_among(targets)
    directions = [target.row.to(x) for target in targets if isinstance(target, Direction)]
    others = torch.tensor([place for place, target in enumerate(targets) if isinstance(target, Direction)])
    parts = []
    if transcoder is not None:
        parts.append(_feature_ends(stack, transcoder, feature, pos[places].to(transcoder.device), rule))
    if directions:
        vectors, at = torch.stack(directions), pos[others]
        values = (vectors * read(stack, site, at)).sum(-1)
        parts.append((before_norm(stack, site, vectors, at, rule), values))
    order = torch.cat([places, others]).argsort()
    gradients, values = (torch.cat([part.to(x.device) for part in each])[order] for each in zip(*parts, strict=True))
    return read_from(site), gradients, pos, values


def _logit_ends(
    host: Host, stack: Stack, targets: list[Target], pos: Int[Tensor, " target"], rule: Rule
) -> tuple[Float[Tensor, "target d_model"], Int[Tensor, " target"], Float[Tensor, " target"]]:
    norm: Any = host.decoder.norm
    x = stack.end[pos]
    directions = torch.stack([_unembedded(host, target).to(x) for target in targets])
    scale = torch.rsqrt(reduce(x.square(), "target d -> target 1", "mean") + norm.variance_epsilon)
    gain = norm.weight.to(x)
    values = (directions * gain * x * scale).sum(-1)
    return norm_transposed(directions, gain, x, scale, rule), pos, values


def _unembedded(host: Host, target: Target) -> Float[Tensor, " d_model"]:
    """sum_v coefficient_v W_U[v], and the mean row's part."""
    head: Any = host.model.get_output_embeddings()  # type: ignore[operator]
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    picked = head.weight[list(target.tokens)].to(dtype)
    direction = picked.new_tensor(target.coefficients) @ picked
    if target.mean:
        total = sum(part.sum(0, dtype=dtype) for part in head.weight.split(1 << 14))
        direction = direction + target.mean * total / len(head.weight)
    return direction


def read(stack: Stack, site: Site, pos: Int[Tensor, " target"]) -> Float[Tensor, "target d_model"]:
    """A site's tensor at some positions."""
    x = stack.stream(read_from(site))
    pos = pos.to(x.device)
    x = x[pos]
    if site.name != "mlp_in":
        return x
    block = stack.blocks[site.layer]
    return block.weights.g2.to(x) * x * block.record.s2[pos]


def before_norm(
    stack: Stack, site: Site, gradients: Float[Tensor, "target d_model"], pos: Int[Tensor, " target"], rule: Rule
) -> Float[Tensor, "target d_model"]:
    """Gradients at a site → gradients at the residual stream: for `mlp_in`, through the second norm."""
    if site.name != "mlp_in":
        return gradients
    block = stack.blocks[site.layer]
    x, scale = block.record.x_mid, block.record.s2
    pos = pos.to(x.device)
    return norm_transposed(gradients.to(x.device), block.weights.g2, x[pos], scale[pos], rule)


def _feature_ends(
    stack: Stack, transcoder: Transcoder, feature: Int[Tensor, " target"], pos: Int[Tensor, " target"], rule: Rule
) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
    x = read(stack, transcoder.read, pos).to(transcoder.device)
    rows = transcoder.W_enc[feature].to(x)
    gradients = encoder_gradient(transcoder, rows, x, rule)
    return before_norm(stack, transcoder.read, gradients, pos, rule), encoder_value(transcoder, rows, x)


def encoder_gradient(
    transcoder: Transcoder, rows: Float[Tensor, "target d_model"], x: Float[Tensor, "target d_model"], rule: Rule
) -> Float[Tensor, "target d_model"]:
    """∂pre_j/∂x through the encoder's LayerNorm: σ (g − mean g − x̂ mean(x̂ g)) with g = γ w_j. If the rule holds norms,
    the last term is missing; for RMSNorm, the mean."""
    if transcoder.norm_weight is None:
        return rows
    g = rows * transcoder.norm_weight.to(rows.dtype)
    unit, scale = _unit(transcoder, x)
    if transcoder.norm_centred:
        g = g - reduce(g, "target d -> target 1", "mean")
    if rule.norms == "exact":
        g = g - unit * reduce(unit * g, "target d -> target 1", "mean")
    return scale * g


def encoder_value(
    transcoder: Transcoder, rows: Float[Tensor, "target d_model"], x: Float[Tensor, "target d_model"]
) -> Float[Tensor, " target"]:
    """pre_j − b_j − w_j · ln_b: the stream's own contribution."""
    if transcoder.norm_weight is not None:
        x = _unit(transcoder, x)[0] * transcoder.norm_weight.to(x.dtype)
    return (x * rows).sum(-1)


def _unit(transcoder: Transcoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """x after the encoder's norm without its gain, and the norm's scale."""
    if transcoder.norm_centred:
        x = x - reduce(x, "target d -> target 1", "mean")
    scale = torch.rsqrt(reduce(x.square(), "target d -> target 1", "mean") + transcoder.norm_eps)
    return x * scale, scale
