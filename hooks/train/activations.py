"""What a model's sites hold over windows of text, all sites from one pass, attention sinks left out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.host import Host, tap
from hooks.passes import sink_watch
from hooks.sites import Site

TOKENS_AT_ONCE = 2048  # of one pass


def capture(
    host: Host, windows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "token d_model"]]:
    """What each site holds at every token that is no attention sink at any of them, in the model's own precision.

    Windows of like length share a pass, so tokens come in an order of their own, the same for every site.
    """
    sites = list(dict.fromkeys(sites))
    order = sorted(range(len(windows)), key=lambda number: (len(windows[number]), number))
    total = sum(len(window) for window in windows)
    out: dict[Site, Tensor] = {}
    filled = 0
    for group in _passes([len(windows[number]) for number in order]):
        batch = host.batch([list(windows[order[place]]) for place in group])
        sinks = torch.zeros_like(batch.mask)
        seen: dict[Site, Tensor] = {}
        watched = ((tap(site, seen), sink_watch(site, batch.lengths, sinks)) for site in sites)
        host.forward_hidden(batch, [edit for pair in watched for edit in pair])
        calm = batch.mask & ~sinks
        count = int(calm.sum())
        for site in sites:
            kept = seen[site][calm.to(seen[site].device)]
            if site not in out:
                out[site] = kept.new_empty(total, kept.shape[-1])
            out[site][filled : filled + count] = kept
        filled += count
    return {site: rows[:filled] for site, rows in out.items()}


def _passes(lengths: Sequence[int]) -> list[range]:
    """Ascending lengths → ranges whose padded size is at most `TOKENS_AT_ONCE`."""
    out, start = [], 0
    for end in range(1, len(lengths) + 1):
        full = end < len(lengths) and (end + 1 - start) * lengths[end] > TOKENS_AT_ONCE
        if full or end == len(lengths):
            out.append(range(start, end))
            start = end
    return out
