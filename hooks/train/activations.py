"""What a model's sites hold over windows of text, all sites from one pass, attention sinks left out."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from hooks.host import Host, tap
from hooks.passes import is_sink
from hooks.sites import Site
from hooks.types import Edit, Pass

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
        calm = batch.mask.clone()
        seen: dict[Site, Tensor] = {}
        host.forward_hidden(batch, [edit for site in sites for edit in (tap(site, seen), _watch(site, calm))])
        count = int(calm.sum())
        for site in sites:
            kept = seen[site][calm.to(seen[site].device)]
            if site not in out:
                out[site] = kept.new_empty(total, kept.shape[-1])
            out[site][filled : filled + count] = kept
        filled += count
    return {site: rows[:filled] for site, rows in out.items()}


def _watch(site: Site, calm: Bool[Tensor, "batch pos"]) -> Edit:
    """Takes attention sinks out of `calm`; one row is one text."""

    def look(x: Float[Tensor, "batch pos d_model"], at: Pass) -> Float[Tensor, "batch pos d_model"]:
        norms = x.float().norm(dim=-1).cpu()
        for row in range(len(calm)):
            length = int(lengths[row])
            calm[row, :length] &= ~is_sink(norms[row, :length])
        return x

    lengths = calm.sum(1)
    return Edit(site, look)


def _passes(lengths: Sequence[int]) -> list[range]:
    """Ascending lengths → ranges whose padded size is at most `TOKENS_AT_ONCE`."""
    out, start = [], 0
    for end in range(1, len(lengths) + 1):
        full = end < len(lengths) and (end + 1 - start) * lengths[end] > TOKENS_AT_ONCE
        if full or end == len(lengths):
            out.append(range(start, end))
            start = end
    return out
