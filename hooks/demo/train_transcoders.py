"""Train same-site TopK transcoders on the demo model's residual stream, all sites at once.

One transcoder per block reads the block's input and reconstructs it:
`z = relu(topk_k(LayerNorm(x) @ W_enc.T + b_enc))`, `x_hat = z @ W_dec + b_dec`, decoder rows of norm one.
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from hooks.demo.world import N_COPYING_SENTENCES
from hooks.host import Batch, Host
from hooks.sites import Site
from hooks.transcoder import Transcoder

log = logging.getLogger(__name__)

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TranscoderRecipe:
    """Everything that decides a set of transcoders besides the seed and the model."""

    d_features: int
    k: int
    steps: int = 2400
    batch_size: int = 1024
    learning_rate: float = 2e-3
    auxiliary_weight: float = 1 / 32
    spread_weight: float = 0.02
    dead_after_steps: int = 60
    n_sentences: int = 20_000
    n_copying: int = N_COPYING_SENTENCES


def dense_recipe(d_model: int, steps: int = 2400) -> TranscoderRecipe:
    """The proportions of the published set: 2.4 features per dimension, 12 % of them active."""
    d_features = round(2.4 * d_model)
    return TranscoderRecipe(d_features=d_features, k=max(1, int(0.12 * d_features)), steps=steps)


class TranscoderStack(nn.Module):
    """The transcoders of all sites, stacked so that one batched product serves them all."""

    def __init__(self, n_sites: int, d_model: int, recipe: TranscoderRecipe) -> None:
        super().__init__()
        directions = nn.functional.normalize(torch.randn(n_sites, recipe.d_features, d_model), dim=-1)
        self.k = recipe.k
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_sites, 1, recipe.d_features))
        self.W_dec = nn.Parameter(directions.clone())
        self.b_dec = nn.Parameter(torch.zeros(n_sites, 1, d_model))

    def pre_activations(self, x: Float[Tensor, "site n d"]) -> Float[Tensor, "site n feature"]:
        """Encoder output before TopK."""
        normed = nn.functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.baddbmm(self.b_enc, normed, self.W_enc.transpose(1, 2))


def keep_top(pre: Float[Tensor, "site n feature"], k: int) -> Float[Tensor, "site n feature"]:
    """TopK, then ReLU; every other entry zero."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def residuals_before_blocks(
    host: Host, ids: Int[Tensor, "n length"], mask: Bool[Tensor, "n length"], batch: int = 500
) -> Float[Tensor, "site token d"]:
    """The input of every block at every token under the mask, in reading order."""
    sites = [Site("resid_pre", layer) for layer in range(host.n_layers)]
    parts: list[list[Tensor]] = [[] for _ in sites]
    for rows in torch.arange(len(ids)).split(batch):
        # whole rows, padding included: no attention mask, which would change the last bits
        whole = Batch(ids[rows], (ids.shape[1],) * len(rows), ((),) * len(rows))
        _, seen = host.capture(whole, sites)
        for part, site in zip(parts, sites, strict=True):
            part.append(seen[site][mask[rows]])
    return torch.stack([torch.cat(part) for part in parts])


def _schedule(step: int, steps: int) -> float:
    """Warm-up over fifty steps, linear decay over the last half."""
    return min(1.0, (step + 1) / 50) * min(1.0, (steps - step) / (0.5 * steps))


def _relative_power(
    active: Float[Tensor, "site n feature"],
    W_dec: Float[Tensor, "site feature d"],
    variance: Float[Tensor, " site"],
) -> Float[Tensor, ""]:
    """Sum over sites of the features' own squared lengths over the variance; smallest when spread evenly.

    If a few very large features explain a site, removing one of them leaves the range in which the model is nearly
    linear.
    """
    squared = active.pow(2) * W_dec.detach().pow(2).sum(-1)[:, None, :]
    return (squared.sum(-1).mean(1) / variance).sum()


def _loss(
    stack: TranscoderStack,
    x: Float[Tensor, "site n d"],
    variance: Float[Tensor, " site"],
    dead: Bool[Tensor, "site feature"],
    recipe: TranscoderRecipe,
) -> tuple[Float[Tensor, ""], Bool[Tensor, "site feature"]]:
    """FVU summed over sites plus the auxiliary loss of dead features; and which features fired."""
    pre = stack.pre_activations(x)
    active = keep_top(pre, stack.k)
    error = x - torch.baddbmm(stack.b_dec, active, stack.W_dec)
    loss = (error.pow(2).sum(-1).mean(1) / variance).sum()
    if recipe.spread_weight:
        loss = loss + recipe.spread_weight * _relative_power(active, stack.W_dec, variance)
    if recipe.auxiliary_weight and bool(dead.any()):
        revived = keep_top(pre.relu() * dead[:, None, :], min(stack.k, pre.shape[-1] // 4))
        missed = error.detach() - torch.bmm(revived, stack.W_dec)
        loss = loss + recipe.auxiliary_weight * (missed.pow(2).sum(-1).mean(1) / variance).sum()
    return loss, (active > 0).any(1)


def train_transcoders(residuals: Float[Tensor, "site token d"], recipe: TranscoderRecipe, seed: int) -> TranscoderStack:
    """Train one transcoder per site on the residuals; single-threaded runs repeat byte for byte."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    n_sites, n_tokens, d_model = residuals.shape
    mean = residuals.mean(1, keepdim=True)
    variance = (residuals - mean).pow(2).sum(-1).mean(1)
    stack = TranscoderStack(n_sites, d_model, recipe)
    scale = (variance / d_model).sqrt()[:, None, None]
    stack.b_dec.data.copy_(mean)
    stack.W_dec.data.mul_(scale)
    optimizer = torch.optim.Adam(stack.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    idle = torch.zeros(n_sites, recipe.d_features)
    for step in tqdm(range(recipe.steps), desc=f"transcoders {recipe.d_features}/{recipe.k}", mininterval=20):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        rows = torch.randint(0, n_tokens, (recipe.batch_size,), generator=generator)
        dead = idle > recipe.dead_after_steps
        loss, fired = _loss(stack, residuals[:, rows], variance, dead, recipe)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        idle = torch.where(fired, torch.zeros_like(idle), idle + 1)
        with torch.no_grad():
            stack.W_dec.copy_(nn.functional.normalize(stack.W_dec, dim=-1) * scale)
        if (step + 1) % 500 == 0:
            log.info("step %d: mean FVU %.4f", step + 1, loss.item() / n_sites)
    return _with_unit_decoder(stack, scale)


@torch.no_grad()
def _with_unit_decoder(stack: TranscoderStack, scale: Float[Tensor, "site 1 1"]) -> TranscoderStack:
    """Move the decoder's norm into the encoder, so an activation is a length in the residual stream."""
    stack.W_dec.copy_(nn.functional.normalize(stack.W_dec, dim=-1))
    stack.W_enc.mul_(scale)
    stack.b_enc.mul_(scale)
    return stack.requires_grad_(False)


def as_transcoders(stack: TranscoderStack) -> list[Transcoder]:
    """One `Transcoder` per block, reading and reconstructing its input."""
    d_model = stack.W_dec.shape[-1]
    return [
        Transcoder(
            layer=layer,
            read=Site("resid_pre", layer),
            write=Site("resid_pre", layer),
            W_enc=stack.W_enc[layer],
            b_enc=stack.b_enc[layer, 0],
            W_dec=stack.W_dec[layer],
            b_dec=stack.b_dec[layer, 0],
            norm_weight=torch.ones(d_model),
            norm_bias=torch.zeros(d_model),
            norm_eps=LAYER_NORM_EPS,
            k=stack.k,
        )
        for layer in range(len(stack.W_dec))
    ]
