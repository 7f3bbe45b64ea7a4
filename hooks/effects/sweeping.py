"""The effects of thousands of interventions on one prompt, each exact, in staggered passes (`suffix`).

groups of interventions → a checked plan → rows that enter where they first differ → metrics at one position → a table

A group is run as one variant: one feature, a pair, or any set. Every batch also has unchanged rows: effects are
differences from their mean, and their spread is the noise floor.

Before a sweep, unchanged rows are compared with the model's own result. If staggered passes do not reproduce it, or
rows cannot share the model's attention, every group is run as a whole pass over the prompt: the same table, more
slowly.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import pandas as pd
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from hooks.checkpoints import TranscoderStore
from hooks.choices import METRICS, TABLES
from hooks.effects.groups import GroupTensors, lay_out, live_groups, run_groups, run_whole
from hooks.effects.metrics import ANYWHERE, Question, against_controls, baseline_of, measure_rows
from hooks.effects.rounding import SPREADS, rounding_behind
from hooks.effects.staggered import Clean, misses, out_of_memory, record_clean
from hooks.errors import OutputError, UserError
from hooks.files import replacing
from hooks.host import Batch, Host, computes_in, is_half
from hooks.interventions import FeatureIntervention, change
from hooks.passes import Interventions, LayerTable, as_interventions, listed, make_plan
from hooks.readout import best_other
from hooks.whole import whole

log = logging.getLogger("hooks")

CONTROLS = 8  # unchanged rows in every batch, at least
TOKENS_AT_ONCE, TOKENS_AT_LEAST = 8192, 64

Way = Literal["suffix", "whole"]


@dataclass(frozen=True)
class Sweep:
    """Measured effects.

    Attributes:
        table: one row per group, in the order given: `name`; `layer`, `pos`, `feature`, `activation` of groups of one
            feature (its clean activation, or its largest where the group spans positions); a column per metric;
            `resolved`; `role`: `supports` if the metric moved in the same direction as the features' activations,
            `opposes` if it moved in the other direction, None if that is not known (the effect is not resolved, or some
            activations rose and some fell). An ablated feature supports where `delta` < 0.
        noise_floor: three standard deviations of `delta` in unchanged rows, and at least the rounding error of two
            logits. In the native arithmetic of a half-precision model it is the largest floor of any group;
            `table["floor"]` has each group's own, measured as `hooks.effects.rounding` describes.
        baseline: the metrics of the clean run: `metric`, `logit`, `prob`, `rank`.
        tokens: the prompt's tokens.
        passes: number of batches that were run.
        precision: the arithmetic, see `hooks.host.arithmetic`.
        way: `suffix`: each group was run from where it first differs. `whole`: each group was a pass over the whole
            prompt, because rows cannot share the model's attention.
    """

    table: pd.DataFrame
    noise_floor: float
    baseline: Mapping[str, float]
    question: Question
    tokens: tuple[str, ...]
    passes: int
    precision: str
    way: Way = "suffix"

    def save(self, path: str | Path) -> None:
        """Write the table whole or not at all: parquet, CSV or JSON by the suffix.

        Raises:
            OutputError: the suffix is another one, the file cannot be written, or pyarrow is not installed.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in TABLES:
            raise OutputError(f"unknown table format {path.suffix!r}", expected=" or ".join(TABLES), where=str(path))
        with replacing(path) as temporary:
            if suffix == ".csv":
                self.table.to_csv(temporary, index=False)
            elif suffix == ".json":
                self.table.to_json(temporary, orient="records", indent=1)
            else:
                try:
                    self.table.to_parquet(temporary, index=False)
                except ImportError:
                    raise OutputError("parquet needs pyarrow", repair="pip install 'qwen-circuits[parquet]'") from None

    def ranked(self) -> pd.DataFrame:
        """The table, strongest effect first; equal effects stay in the order given."""
        order = self.table["delta"].abs().sort_values(ascending=False, kind="stable").index
        return self.table.loc[order].reset_index(drop=True)


def sweep(
    host: Host,
    store: TranscoderStore,
    batch: Batch,
    groups: Interventions,
    *,
    target: int | None = None,
    against: int | None = None,
    pos: int = -1,
    metrics: Sequence[str] = ("delta", "delta_logit"),
    tokens_at_once: int | None = None,
    progress: bool = False,
) -> Sweep:
    """Run every group of interventions on one prompt and measure its effect on the token that follows a position.

    Args:
        groups: for each variant, an intervention or a list of them; in delta form, and TopK is not run again
            (`mask="frozen"`).
        target, against: token ids; the clean run's answer and its best other by default.
        metrics: any of `hooks.choices.METRICS`. The first two need two rows of the unembedding, the others all of it.
        tokens_at_once: tokens of all rows of a batch; by default as many as fit into a quarter of the free memory, and
            at most 8,192. Halved each time memory runs out.

    Raises:
        UserError: an address, metric, target or position does not exist, interventions of a group contradict each
            other, the model's attention is held, or not even one row fits into memory.
    """
    length = batch.lengths[0]
    question_pos = _checked_position(pos, length)
    if tokens_at_once is not None:
        tokens_at_once = whole(tokens_at_once, "tokens_at_once", least=1)
    _check_metrics(metrics)
    groups = listed(groups)
    if not groups:
        raise UserError("nothing to sweep", expected="at least one group of interventions")
    plan = make_plan(store, groups, [length] * len(groups))
    reads = {layer: store.sites(layer)[0] for layer in plan.tables}
    clean = record_clean(host, batch, list(reads.values()))
    logits = host.unembed(clean.final[question_pos])
    question = _question(logits, target, against, question_pos, tuple(metrics))
    dense = _clean_activations(store, clean, plan.tables)
    work = lay_out(host, store, plan.tables, dense, len(groups), question_pos + 1)
    runner = _runner(host, store, clean, work, groups)
    measured, spreads, passes = _run_all(host, runner, clean, logits, work, question, tokens_at_once, progress)
    noise = _noise_floor(spreads, logits, question)
    table = _described(groups, dense, length)
    for name, column in measured.items():
        table[name] = column.tolist()
    table["floor"] = noise
    if is_half(host) and not host.exact:
        floors = _rounding_floors(host, clean, work, logits, question)
        table["floor"] = floors.clamp(min=noise).tolist()
        noise = max(noise, float(floors.max()))
    table["resolved"] = (table["delta"].abs() > table["floor"]) | (table["delta"] == 0)
    moved = [_moved(as_interventions(group), dense, length) for group in groups]
    table["role"] = [_role(*row) for row in zip(moved, table["delta"], table["resolved"], strict=True)]
    baseline = baseline_of(logits, question)
    return Sweep(table, noise, baseline, question, batch.strings[0], passes, computes_in(host), runner.way)


# -- the question --------------------------------------------------------------------------------------------------


def _checked_position(position: int, length: int) -> int:
    position = whole(position, "position")
    if not -length <= position < length:
        raise UserError(f"position {position} does not occur", expected=f"0 to {length - 1}, or -{length} to -1")
    return position % length


def _check_metrics(metrics: Sequence[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}", expected=", ".join(METRICS))


def _question(
    logits: Float[Tensor, " vocab"], target: int | None, against: int | None, pos: int, metrics: tuple[str, ...]
) -> Question:
    token = int(logits.argmax()) if target is None else target
    other = best_other(logits, token) if against is None else against
    if token == other:
        raise UserError("target and against are the same token", found=str(token))
    return Question(token, other, pos, tuple(dict.fromkeys(("delta", *metrics))))


def _clean_activations(
    store: TranscoderStore, clean: Clean, layers: Mapping[int, LayerTable]
) -> dict[int, Float[Tensor, "pos feature"]]:
    """Activations of the clean run at the layers that groups change: pos × d_features numbers per layer."""
    out = {}
    for layer in layers:
        transcoder = store[layer]
        out[layer] = transcoder.encode(clean.seen[store.sites(layer)[0]]).dense(transcoder.d_features).double().cpu()
    return out


def _change_text(item: FeatureIntervention) -> str:
    """The address, and the change of the feature unless it is ablated."""
    factor, shift = item.affine
    known = {
        (1.0, shift): f" + {shift:g}",
        (factor, 0.0): f" × {factor:g}",
        (0.0, shift): f" = {shift:g}",
        (0.0, 0.0): "",
    }
    return str(item.address) + known.get((factor, shift), f" × {factor:g} + {shift:g}")


def _described(groups: Sequence[Interventions], dense: Mapping[int, Tensor], length: int) -> pd.DataFrame:
    rows = []
    for group in groups:
        items = as_interventions(group)
        addresses = [item.address for item in items]
        row: dict[str, object] = {"name": " + ".join(map(_change_text, items))}
        if len({(address.layer, address.feature) for address in addresses}) == 1:
            one = addresses[0]
            spans = [span for address in addresses for span in address.positions.spans(length)]
            start, stop = spans[0]
            seen = torch.cat([dense[one.layer][slice(*span), one.feature] for span in spans])
            single = len(spans) == 1 and stop == start + 1
            row |= {"layer": one.layer, "pos": start if single else None, "feature": one.feature}
            row["activation"] = float(seen.max()) if len(seen) else 0.0
        rows.append(row)
    table = pd.DataFrame(rows, columns=["name", "layer", "pos", "feature", "activation"])
    return table.astype({"layer": "Int64", "pos": "Int64", "feature": "Int64", "activation": "Float64"})


def _moved(items: Sequence[FeatureIntervention], dense: Mapping[int, Tensor], length: int) -> int:
    """1 if activations rise and none falls, −1 if they fall and none rises, else 0."""
    ways = set[float]()
    for item in items:
        for span in item.address.positions.spans(length):
            old = dense[item.address.layer][slice(*span), item.address.feature]
            factor, shift = (torch.full_like(old, number) for number in item.affine)
            ways |= set(change(old, factor, shift, torch.full(old.shape, item.when_inactive == "skip")).sign().tolist())
    return {frozenset({1.0}): 1, frozenset({-1.0}): -1}.get(frozenset(ways - {0.0}), 0)


def _role(moved: int, delta: float, resolved: bool) -> str | None:
    sign = moved * delta if resolved else 0
    return "supports" if sign > 0 else "opposes" if sign < 0 else None


def _noise_floor(spreads: Sequence[float], logits: Float[Tensor, " vocab"], question: Question) -> float:
    """Unchanged rows may agree bit for bit although a changed row rounds differently. So the floor is at least eps/2
    per logit and row."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rounding = torch.finfo(wide).eps * float(logits[[question.target, question.against]].abs().sum())
    return max(rounding, 3 * math.sqrt(sum(spreads) / len(spreads)) if spreads else 0.0)


def _rounding_floors(
    host: Host, clean: Clean, work: GroupTensors, logits: Float[Tensor, " vocab"], question: Question
) -> Float[Tensor, " group"]:
    """`SPREADS` times the root mean square of the rounding error of each group's `delta`, by the block at which the
    group's effect enters (see `hooks.effects.rounding`); 0 for groups that change nothing."""

    def metric(hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        return measure_rows(host, hidden, logits, question)["delta"]

    before = float(metric(clean.streams[-1][question.pos][None])[0])
    live, floors = live_groups(work), torch.zeros(len(work.block), dtype=torch.float64)
    for block in work.block[live].unique().tolist():
        here = live[work.block[live] == block]
        behind = rounding_behind(host, clean.batch, block, work.start[here].tolist(), question.pos, metric, before)
        floors[here] = SPREADS * behind
    return floors


# -- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runner:
    """How groups are run.

    Attributes:
        run: gives the streams after the last block of some groups, then of the unchanged rows.
        lengths: number of tokens of each group in a pass.
    """

    way: Way
    run: Callable[[Int[Tensor, " live"]], tuple[Float[Tensor, "row d_model"], Int[Tensor, " control"]]]
    lengths: Int[Tensor, " group"]


def _runner(
    host: Host, store: TranscoderStore, clean: Clean, work: GroupTensors, groups: Sequence[Interventions]
) -> _Runner:
    """Staggered passes if they reproduce the model's own result, else whole passes."""
    reason = clean.shared if isinstance(clean.shared, str) else _measured_miss(host, clean, work)
    if not reason:
        run = partial(run_groups, host, store, clean, work, controls=CONTROLS)
        return _Runner("suffix", run, work.end - work.start)
    log.warning("every group is run as a whole pass over the prompt, which is slower: %s", reason)
    length = clean.batch.lengths[0]

    def run_chosen(chosen: Int[Tensor, " live"]) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, " control"]]:
        rows = [groups[i] for i in chosen.tolist()]
        return run_whole(host, store, clean.batch, rows, work.end - 1, CONTROLS), torch.full((CONTROLS,), ANYWHERE)

    return _Runner("whole", run_chosen, torch.full_like(work.start, length))


def _measured_miss(host: Host, clean: Clean, work: GroupTensors) -> str:
    """See `misses`; checked at the first, the middle and the last of the groups' first positions."""
    live = live_groups(work)
    if not len(live):
        return ""
    starts = work.start[live].sort().values
    chosen = starts[[0, len(starts) // 2, -1]].tolist()
    found = ""
    with out_of_memory() as failed:
        found = misses(host, clean, chosen, int(work.block[live].min()), work.end)
    if failed:
        _refuse_for_memory(int((work.end - torch.tensor(chosen)).sum()))
    return found


def _run_all(
    host: Host,
    runner: _Runner,
    clean: Clean,
    logits: Float[Tensor, " vocab"],
    work: GroupTensors,
    question: Question,
    tokens_at_once: int | None,
    progress: bool,
) -> tuple[dict[str, Float[Tensor, " group"]], list[float], int]:
    """Metrics of every group, the variance of `delta` in each batch's unchanged rows, and the number of batches."""
    out = {name: torch.zeros(len(work.start), dtype=torch.float64) for name in question.metrics}
    if "rank" in out:
        out["rank"] += baseline_of(logits, question)["rank"]
    waiting = live_groups(work)
    budget = tokens_at_once or _tokens_that_fit(host)
    spreads: list[float] = []
    passes = 0
    with tqdm(total=len(waiting), desc="sweep", unit="run", disable=not progress, leave=False) as bar:
        while len(waiting):
            count = _rows_that_fit(runner.lengths[waiting], budget)
            chosen = waiting[:count]
            with out_of_memory() as failed:
                hidden, controls = runner.run(chosen)
                found = measure_rows(host, hidden, logits, question)
            if failed:
                budget = _halved(min(budget, int(runner.lengths[chosen].sum())))
                continue
            for name, values in against_controls(found, work.block[chosen], controls).items():
                out[name][chosen] = values
            spreads.append(float(found["delta"][len(chosen) :].var(unbiased=True)))
            passes += 1
            waiting = waiting[count:]
            bar.update(count)
    return out, spreads, passes


def _rows_that_fit(lengths: Int[Tensor, " row"], budget: int) -> int:
    return max(1, int((lengths.cumsum(0) <= budget).sum()))


def _halved(tokens: int) -> int:
    if tokens <= TOKENS_AT_LEAST:
        _refuse_for_memory(tokens)
    return tokens // 2


def _refuse_for_memory(tokens: int) -> NoReturn:
    raise UserError(
        "memory does not hold even a small batch of the sweep",
        found=f"{tokens} tokens at once did not fit",
        repair="free memory, shorten the prompt, or load fewer transcoder layers (--budget-gb)",
    )


def _tokens_that_fit(host: Host) -> int:
    """How many tokens fit into a quarter of the free memory. A token takes streams, MLP and attention scores."""
    config: Any = host.model.config
    width = 8 * host.d_model + 4 * int(getattr(config, "intermediate_size", 4 * host.d_model))
    width += 4 * int(config.num_attention_heads) * min(256, host.max_positions)
    free = torch.cuda.mem_get_info(host.device)[0] if host.device.type == "cuda" else psutil.virtual_memory().available
    return max(TOKENS_AT_LEAST, min(TOKENS_AT_ONCE, free // 4 // (4 * width)))
