"""Is a circuit enough, and is it needed? Every feature outside it is ablated in the model, and the metric is measured.

prompt pairs → recorded cases with ablation values → rankings → circuits of growing size → one batch per pair → curves

A circuit is a set of (layer, position, feature). At every chosen site, with everything live,

    x' = Σ_{i in C} a_i d_i + Σ_{i not in C} ã_i d_i + b_dec + e

where a_i is TopK's activation on the stream of the *cut* run, with earlier cuts in it, ã_i is the ablation value and e
the error by mode. Only what the mode names is frozen. With the metric m, the empty circuit 0 and the model M,

    faithfulness f(C) = (m(C) − m(0)) / (m(M) − m(0))        completeness of C: f(M \\ C), lower is better

(Marks et al., arXiv:2403.19647; sizes and areas of MIB, arXiv:2504.13151). If the *whole* stream is cut at many sites,
the transcoders' errors accumulate. So a figure is meaningful only together with its sites and its error mode.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.faithfulness.cases import Case, Ranking
from circuits.faithfulness.curves import Curve, Order
from hooks.errors import UserError
from hooks.kernels import linear_fp32
from hooks.model import HookedModel
from hooks.types import Edit, Pass

CutError = Literal["clean", "live", "patched", "zero"]
"""The error at cut sites: the clean run's; computed from the cut run's own stream; the counterfactual's; none."""

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
ORDERS: tuple[Order, ...] = ("signed", "absolute")
ROWS = 64  # circuits per pass


# -- cutting -----------------------------------------------------------------------------------------------------------


def measure(
    model: HookedModel, case: Case, keep: Bool[Tensor, "row item"], error: CutError = "clean"
) -> Float[Tensor, " row"]:
    """m of several circuits at once; each is one row of a batch.

    Memory: `ROWS` × pos × d_features numbers, for one cut at a time.

    Args:
        keep: for each circuit, a mask over the items of the case's universe.

    Raises:
        UserError: the error mode is unknown, or it is `patched` without a counterfactual.
    """
    check_error(error, case)
    values = []
    for part in keep.split(ROWS):
        batch = case.clean.batch.rows([0] * len(part))
        at = torch.full((len(part),), case.target.pos)
        logits = model.host.forward_at(batch, at, cut(model, case, part, error))
        values.append(case.target.of_row(logits).double().cpu())
    return torch.cat(values)


def check_error(error: str, case: Case) -> None:
    """Refuse an unknown error mode, and `patched` for a case without a counterfactual.

    Raises:
        UserError: the mode is one of these.
    """
    if error not in get_args(CutError):
        raise UserError(f"unknown error mode {error!r}", expected=", ".join(get_args(CutError)))
    if error == "patched" and case.counterfactual is None:
        raise UserError("error 'patched' needs a counterfactual in every pair", repair="error='clean' or 'live'")


def cut(model: HookedModel, case: Case, keep: Bool[Tensor, "row item"], error: CutError) -> list[Edit]:
    """Edits for a batch of copies of the prompt: in each row, at every site of the case, only one circuit is kept."""
    sizes = [int(mask.sum()) for mask in case.universe.values()]
    edits: list[Edit] = []
    for layer, part in zip(case.universe, keep.split(sizes, dim=1), strict=True):
        edits += _cut_site(model, case, layer, part, error)
    return edits


def _cut_site(
    model: HookedModel, case: Case, layer: int, keep: Bool[Tensor, "row item"], error: CutError
) -> list[Edit]:
    """Encode at the read site, write at the write site: x' = stream + (new − acts) @ W_dec.

    `stream` and `acts` are a pair that fixes the error: (x, a) of the cut run, of the clean run, of the counterfactual,
    or (b_dec, 0). So where no feature changes, nothing is added, and no reconstruction is rounded.
    """
    key = ("cut", layer)

    def read(x: Tensor, at: Pass) -> Tensor:
        transcoder = model.store[layer]
        at.memo[key] = transcoder.encode(x).dense(transcoder.d_features)
        return x

    def write(x: Tensor, at: Pass) -> Tensor:
        live, transcoder = at.memo.pop(key), model.store[layer]
        kept = live.new_zeros(live.shape, dtype=torch.bool)
        kept[:, case.universe[layer]] = keep.to(live.device)
        new = torch.where(kept, live, case.ablated[layer])
        if error == "live":
            stream, acts = x.to(live.device), live
        elif error == "zero":
            stream, acts = transcoder.b_dec, torch.zeros_like(live)
        else:
            recording = case.clean if error == "clean" or case.counterfactual is None else case.counterfactual
            record = recording.layers[layer]
            stream, acts = record.target, record.acts.dense(transcoder.d_features)
        change = linear_fp32(new - acts, transcoder.W_dec.T, None)
        return (stream.to(change.dtype) + change).to(x)

    read_site, write_site = model.store.sites(layer)
    if read_site == write_site:
        return [Edit(read_site, lambda x, at: write(read(x, at), at))]
    return [Edit(read_site, read), Edit(write_site, write)]


# -- curves ------------------------------------------------------------------------------------------------------------


def circuits_by_size(case: Case, ranking: Ranking, order: Order, counts: Sequence[int]) -> Bool[Tensor, "size item"]:
    """The first n items of a ranking, for every n; ties are broken by layer, position, feature."""
    scores = torch.cat([ranking[layer][mask].cpu() for layer, mask in case.universe.items()])
    scores = scores.abs() if order == "absolute" else scores
    place = scores.sort(descending=True, stable=True).indices.argsort()
    return place < rearrange(torch.tensor(counts), "size -> size 1")


def faithfulness(
    model: HookedModel,
    cases: Sequence[Case],
    rankings: Mapping[str, Sequence[Ranking]],
    *,
    error: CutError = "clean",
    sizes: Sequence[float] | Sequence[int] = SHARES,
    orders: Sequence[Order] = ORDERS,
) -> tuple[Curve, ...]:
    """f(C_k) for every ranking and order: the share of the metric that the first k features keep.

    All circuits of a pair (every ranking, order and size) are rows of the same batch.

    Args:
        rankings: per name, one ranking per case; see `circuits.faithfulness.rankings.rank`.
        sizes: shares of the universe in (0, 1] (rounded down, as MIB does), or numbers of features (int, at least 1).

    Raises:
        UserError: sizes do not ascend, the error mode is unknown, or ablation does not change the metric.
    """
    return _curves(model, cases, rankings, error, sizes, orders, lambda circuit: circuit)


def completeness(
    model: HookedModel,
    cases: Sequence[Case],
    rankings: Mapping[str, Sequence[Ranking]],
    *,
    error: CutError = "clean",
    sizes: Sequence[float] | Sequence[int] = SHARES,
    orders: Sequence[Order] = ORDERS,
) -> tuple[Curve, ...]:
    """f(M \\ C_k): the share of the metric that is left without the first k features. Lower is better; see
    `faithfulness`."""
    return _curves(model, cases, rankings, error, sizes, orders, torch.logical_not)


def _curves(
    model: HookedModel,
    cases: Sequence[Case],
    rankings: Mapping[str, Sequence[Ranking]],
    error: CutError,
    sizes: Sequence[float] | Sequence[int],
    orders: Sequence[Order],
    kept: Callable[[Bool[Tensor, "size item"]], Bool[Tensor, "size item"]],
) -> tuple[Curve, ...]:
    _check_sizes(sizes)
    _check_rankings(rankings, cases)
    names = [(name, order) for name in rankings for order in orders]
    counts = [[_count(size, case.size) for size in sizes] for case in cases]
    numerators, denominators = [], []
    for number, case in enumerate(cases):
        circuits = [circuits_by_size(case, rankings[name][number], order, counts[number]) for name, order in names]
        empty = torch.zeros(1, case.size, dtype=torch.bool)
        values = measure(model, case, torch.cat([empty, *map(kept, circuits)]), error)
        numerators.append(rearrange(values[1:] - values[0], "(name size) -> name size", size=len(sizes)))
        denominators.append(case.metric - values[0])
    numerator, denominator = torch.stack(numerators, dim=1), torch.stack(denominators)
    _check_denominator(denominator, cases)
    axes = _axes(sizes, counts, cases)
    return tuple(Curve(*name, *axes, numerator[n], denominator) for n, name in enumerate(names))


def _axes(
    sizes: Sequence[float] | Sequence[int], counts: Sequence[Sequence[int]], cases: Sequence[Case]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The given shares, or the mean shares of the given counts; and the mean counts."""
    table = torch.tensor(counts, dtype=torch.float64)
    of_all = (table / torch.tensor([[case.size] for case in cases])).mean(0).tolist()
    shares = sizes if isinstance(sizes[0], float) else of_all
    return tuple(shares), tuple(table.mean(0).tolist())


def _check_sizes(sizes: Sequence[float] | Sequence[int]) -> None:
    shares = all(isinstance(size, float) and 0 < size <= 1 for size in sizes)
    counts = all(isinstance(size, int) and size >= 1 for size in sizes)
    ascending = all(a < b for a, b in pairwise(sizes))
    if not sizes or not (shares or counts) or not ascending:
        raise UserError(
            f"cannot use the circuit sizes {list(sizes)}",
            expected="shares such as 0.01, 0.1, 1.0 or whole numbers such as 1, 4, 16, ascending",
        )


def _check_rankings(rankings: Mapping[str, Sequence[Ranking]], cases: Sequence[Case]) -> None:
    for name, each in rankings.items():
        if len(each) != len(cases) or any(set(r) < set(case.ablated) for r, case in zip(each, cases, strict=True)):
            raise UserError(
                f"the ranking {name!r} does not belong to these cases",
                expected=f"one entry for each of {len(cases)} cases, with every layer that is cut",
                repair="rank(model, cases)",
            )


def _count(size: float | int, items: int) -> int:
    return min(size, items) if isinstance(size, int) else int(size * items)


def _check_denominator(denominator: Float[Tensor, " pair"], cases: Sequence[Case]) -> None:
    """Refuse a denominator of about 0, for which f is not defined; the limit is the rounding of fp32 logits."""
    scale = max(abs(case.metric) for case in cases)
    if abs(float(denominator.mean())) <= 1e-6 * scale:
        raise UserError(
            "ablating everything leaves the metric as it is, so faithfulness is not defined",
            found=f"m(M) − m(0) = {float(denominator.mean()):.1e}",
            repair="cut another site, choose other counterfactuals, or another error mode",
        )
