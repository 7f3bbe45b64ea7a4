"""What rounding alone does to a metric on a half-precision model.

A run with an edit and the clean run differ in every rounding behind the edit, so their difference holds the rounding
errors of both, however small the edit is. Rows that are left alone do not show that: they round alike. So the stream
that enters a block is moved at random by what one rounding may move it (each number by a unit in its last place, up or
down, with a probability of 1/12: the variance of a rounding error), and the run goes on from there. How far the metric
moves is what rounding alone does to an effect that enters at this block.

Rounding in front of the edit moves the stream on which the edit acts: the activation that is taken away, and what the
blocks behind make of that. Such an error grows with the effect. `rounding_edits` moves the stream in front of every
block up to the edit's, so that the same edits can be measured again over another draw of these roundings.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.host import Batch, Host, tap
from hooks.sites import Site
from hooks.types import Edit, Pass

DRAWS = 8  # runs per block
REDRAWS, SAMPLE = 4, 8  # other draws of the roundings in front of a block, and edits that are measured again in each
SPREADS = 2.5  # root mean squares of the moves below which an effect is not told from rounding

Metric = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, " row"]]


def last_place(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The distance of every number to the next larger one in magnitude, in its own precision."""
    exponent = torch.frexp(x.float()).exponent - 1
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent) * torch.finfo(x.dtype).eps


def rounding_steps(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Units in the last place: one up or one down, with a probability of 1/24 each, else none."""
    drawn = torch.rand(*shape, generator=generator)
    return (drawn < 1 / 24).float() - (drawn > 23 / 24).float()


def moved_by_rounding(x: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Each number moved by such steps."""
    return (x.float() + rounding_steps(x.shape, generator).to(x.device) * last_place(x)).to(x.dtype)


def rounding_behind(
    host: Host, batch: Batch, block: int, starts: Sequence[int], pos: int, metric: Metric, clean: float
) -> float:
    """The root mean square of what rounding does to a metric of effects that enter in front of a block.

    Args:
        batch: one prompt.
        block: `n_layers` is behind the last one.
        starts: first positions of such effects; the draws are spread over them.
        pos: where the metric is read, from streams behind the last block.
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
    """Edits that move the stream in front of every block up to `last` by what one rounding may move it, every row of a
    batch alike."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor, at: Pass) -> Tensor:
        step = rounding_steps(x.shape[1:], generator).to(x.device)
        return (x.float() + step * last_place(x)).to(x.dtype)

    return [Edit(Site("resid_pre", block), move) for block in range(last + 1)]
