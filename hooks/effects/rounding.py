"""The effect of rounding alone on a metric of a half-precision model.

An edited run and the clean run round differently everywhere after the edit. So their difference has the rounding errors
of both runs in it, however small the edit is. Unchanged rows do not show this error, because they all round alike.
Nor does a change of the stream by one rounding: after it most numbers are rounded as before. To measure it, the stream
that enters a block is changed at random by a few units in the last place, and in a second run by the opposite amount.
The mean of the two runs keeps their rounding, and the change itself cancels to first order. With `d` the difference
between this mean and the clean run,

    error² of an effect = mean(d²) + variance(d)

The first term has the clean run's own error, which all effects share. The variance of d is half of the variance of one
run's error, and mean(d²) has the other half.

The error hardly grows with the effect (docs/precision.md). Rounding before the edit changes the stream that the edit
acts on, and so the effect itself, but only by a small part of it.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.host import Batch, Host, tap
from hooks.sites import Site
from hooks.types import Edit, Pass

PAIRS = 16  # pairs of runs per block
CHANGE = 6  # units in the last place by which the stream is changed in a pair
SPREADS = 2.75  # an effect below so many root mean squares of the rounding error counts as noise

Metric = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, " row"]]


def last_place(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The distance from every number to the next one of larger magnitude, in its own precision."""
    exponent = torch.frexp(x.float()).exponent - 1
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent) * torch.finfo(x.dtype).eps


def rounding_behind(
    host: Host, batch: Batch, block: int, starts: Sequence[int], pos: int, metric: Metric, clean: float
) -> float:
    """The root mean square of the rounding error in a metric, for effects that enter before a block.

    Args:
        batch: one prompt.
        block: `n_layers` means after the last one.
        starts: first positions of the effects; the pairs are spread over them.
        pos: the position at which the metric is computed, from streams after the last block.
        clean: the metric of the clean run.

    Cost: 2 `PAIRS` rows in one whole pass.
    """
    end = Site("resid_post", host.n_layers - 1)
    site = Site("resid_pre", block) if block < host.n_layers else end
    ordered = sorted(starts)
    first = torch.tensor([ordered[(2 * pair + 1) * len(ordered) // (2 * PAIRS)] for pair in range(PAIRS)]).repeat(2)
    generator = torch.Generator().manual_seed(block)

    def change(x: Tensor, at: Pass) -> Tensor:
        signs = torch.randint(0, 2, (PAIRS, *x.shape[1:]), generator=generator).to(x.device) * 2 - 1
        behind = (torch.arange(x.shape[1]) >= first[:, None])[..., None].to(x.device)
        changed = x.float() + CHANGE * torch.cat([signs, -signs]) * last_place(x)
        return torch.where(behind, changed.to(x.dtype), x)

    seen: dict[Site, Tensor] = {}
    host.forward_hidden(batch.rows([0] * (2 * PAIRS)), [Edit(site, change), tap(end, seen)])
    d = metric(seen[end][:, pos]).double().view(2, PAIRS).mean(0) - clean
    return float((d.square().mean() + d.var()).sqrt())
