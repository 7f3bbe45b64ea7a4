"""The effect of rounding alone on a metric of a half-precision model.

An edited run and the clean run round differently everywhere after the edit. So their difference has the rounding errors
of both runs in it, however small the edit is. Unchanged rows do not show this error, because they all round alike. To
measure it, the stream that enters a block is changed at random by as much as one rounding can change it: each number by
one unit in its last place, up or down, with a probability of 1/12, which gives the variance of a rounding error. Then
the run continues from there. The change of the metric is the effect of rounding on an edit that enters at this block.

Rounding before the edit changes the stream on which the edit acts: the activation that is ablated, and how later blocks
respond. This error grows with the effect. `rounding_edits` changes the stream before every block up to the edit's
block, so that the same edits can be measured again with other roundings.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.host import Batch, Host, tap
from hooks.sites import Site
from hooks.types import Edit, Pass

DRAWS = 8  # runs per block
REDRAWS, SAMPLE = 4, 8  # other draws of the roundings before a block; edits that are measured again in each draw
SPREADS = 2.5  # an effect below so many root mean squares of the rounding error counts as noise

Metric = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, " row"]]


def last_place(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The distance from every number to the next one of larger magnitude, in its own precision."""
    exponent = torch.frexp(x.float()).exponent - 1
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent) * torch.finfo(x.dtype).eps


def rounding_steps(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Units in the last place: one up or one down, with a probability of 1/24 each, else none."""
    drawn = torch.rand(*shape, generator=generator)
    return (drawn < 1 / 24).float() - (drawn > 23 / 24).float()


def moved_by_rounding(x: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Each number plus such steps."""
    return (x.float() + rounding_steps(x.shape, generator).to(x.device) * last_place(x)).to(x.dtype)


def rounding_behind(
    host: Host, batch: Batch, block: int, starts: Sequence[int], pos: int, metric: Metric, clean: float
) -> float:
    """The root mean square of the rounding error in a metric, for effects that enter before a block.

    Args:
        batch: one prompt.
        block: `n_layers` means after the last one.
        starts: first positions of the effects; the draws are spread over them.
        pos: the position at which the metric is computed, from streams after the last block.
        clean: the metric of the clean run.

    Cost: `DRAWS` rows in one whole pass.
    """
    end = Site("resid_post", host.n_layers - 1)
    site = Site("resid_pre", block) if block < host.n_layers else end
    ordered = sorted(starts)
    first = torch.tensor([ordered[(2 * draw + 1) * len(ordered) // (2 * DRAWS)] for draw in range(DRAWS)])
    generator = torch.Generator().manual_seed(block)

    def move(x: Tensor, at: Pass) -> Tensor:
        behind = (torch.arange(x.shape[1]) >= first[:, None])[..., None].to(x.device)
        return torch.where(behind, moved_by_rounding(x, generator), x)

    seen: dict[Site, Tensor] = {}
    host.forward_hidden(batch.rows([0] * DRAWS), [Edit(site, move), tap(end, seen)])
    moves = metric(seen[end][:, pos]).double() - clean
    return float(moves.square().mean().sqrt())


def rounding_edits(last: int, seed: int) -> list[Edit]:
    """Edits that change the stream before every block up to `last` by as much as one rounding can, the same in every
    row of a batch."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor, at: Pass) -> Tensor:
        step = rounding_steps(x.shape[1:], generator).to(x.device)
        return (x.float() + step * last_place(x)).to(x.dtype)

    return [Edit(Site("resid_pre", block), move) for block in range(last + 1)]
