"""Which rule predicts which intervention? Predicted against measured on the embedded model: `rules.py [--json]`.

Ten fixed prompts (`verification_prompts`; nothing was tuned on them), metric logit(answer) − logit(best other). Every
intervention removes a vector v from the stream at one site and position; then the model after it is run:

    ablate 1      v = a_i d_i              ablate 6     v = sum a_i d_i, six features of one place drawn at random
    feature x2    v = −a_i d_i             ablate all   v = sum a_i d_i, all features of one place
    feature x5    v = −4 a_i d_i           resample     v = x − x', x' from another prompt at the same position
    ablate error  v = the reconstruction error

A rule predicts that the metric falls by v · g, where g is its gradient at the site; `ose` runs one block and uses a
gradient after it. A figure is a correlation over the items of one prompt, all `--layers` pooled, then the mean over the
prompts. Exit status 1 if an acceptance figure is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits import RULES, score_features
from circuits.agreement import correlation, rank_correlation
from circuits.attribution.ose import one_step
from circuits.blocks import Rule
from circuits.building import Setting, assemble, by_layer, make_run, settle
from circuits.demo import Exam
from circuits.demo.discovery import verification_prompts
from circuits.edges import LocalRun, Removal, known_edges, known_gradients, run_held
from circuits.verification import measure_edges, measure_nodes
from circuits.verification.verifying import KEYS, stratified, with_idle
from hooks import HookedModel
from hooks.passes import Recording
from hooks.sites import Site

SETS = ("demo", "demo-dense")
LAYERS = (1, 2, 3, 4)  # without site 0: an embedding minus a part never occurs in training
FEATURES, EDGES = 1000, 1000  # most items per prompt
GROUP, GROUPS_PER_PLACE = 6, 4
CHECKED = 200  # items per prompt of the acceptance figures, as in `circuits.demo.discovery.agreement`
ROWS = 64

NORMS_HELD = Rule(norms="frozen", attention="exact", gate="exact")
GRADIENTS: dict[str, Callable[..., dict[Site, Tensor]]] = {
    **{name: RULES[name].gradients for name in ("exact", "ig", "relp", "half", "affine")},
    "norms held": lambda *setting: known_gradients(*setting, NORMS_HELD, "norms held"),
}
STEPS = {"ose": "exact", "ose + relp": "relp"}  # after the block: the rule whose gradient is used
COLUMNS = ("exact", "ose", "ose + relp", "ig", "norms held", "relp", "half", "affine")

Predict = Callable[[int, Int[Tensor, " row"], Float[Tensor, "row d_model"]], Float[Tensor, " row"]]
Figures = dict[str, dict[str, float]]  # by column, then by figure


@dataclass(frozen=True)
class Item:
    """One intervention: the vector that is removed at a layer's site."""

    layer: int
    removal: Removal


# -- interventions -------------------------------------------------------------------------------------------------


def interventions(
    setting: Setting, others: Sequence[Recording], layers: Sequence[int], n: int = FEATURES, seed: int = 0
) -> dict[str, list[Item]]:
    """Items of every kind on one prompt; at most `n` of single features, spread over strength, layer and position."""
    table = setting.scores.frame
    table = table[table["layer"].isin(layers)].reset_index(drop=True)
    sample = stratified(table, table["score"].abs(), n, seed)
    one = [_written(setting, sample.loc[[row]]) for row in sample.index]
    places = [rows for _, rows in table.groupby(["layer", "pos"])]
    rng = np.random.default_rng(seed)
    groups = [place.sample(min(GROUP, len(place)), random_state=rng) for place in places * GROUPS_PER_PLACE]
    return {
        "ablate 1": one,
        "feature x2": [_times(item, -1.0) for item in one],
        "feature x5": [_times(item, -4.0) for item in one],
        "ablate 6": [_written(setting, rows) for rows in groups],
        "ablate all": [_written(setting, rows) for rows in places],
        "ablate error": [_error(setting, layer, pos) for layer in layers for pos in range(len(setting.scores.tokens))],
        "resample": list(_resampled(setting, others, layers)),
    }


def _written(setting: Setting, rows: pd.DataFrame) -> Item:
    """The sum of some features' vectors at one site and position: sum a_i d_i."""
    layer, pos = int(rows["layer"].iloc[0]), int(rows["pos"].iloc[0])
    directions = setting.model.store[layer].W_dec[torch.tensor(rows["feature"].tolist())]
    return Item(layer, Removal(pos, torch.tensor(rows["activation"].tolist()).to(directions) @ directions))


def _error(setting: Setting, layer: int, pos: int) -> Item:
    return Item(layer, Removal(pos, setting.recording.layers[layer].error[0, pos]))


def _times(item: Item, factor: float) -> Item:
    return Item(item.layer, Removal(item.removal.pos, factor * item.removal.vector))


def _resampled(setting: Setting, others: Sequence[Recording], layers: Sequence[int]) -> Iterator[Item]:
    """Every other prompt's stream at every position both have, unless all tokens so far are the same."""
    own = setting.recording
    for other in others:
        for pos in range(min(own.batch.lengths[0], other.batch.lengths[0])):
            if torch.equal(own.batch.ids[0, : pos + 1], other.batch.ids[0, : pos + 1]):
                continue
            for layer in layers:
                streams = (recording.layers[layer].target[0, pos] for recording in (own, other))
                yield Item(layer, Removal(pos, next(streams) - next(streams)))


def measured(setting: Setting, items: Sequence[Item]) -> tuple[Float[np.ndarray, " item"], float]:
    """How much the metric falls; and the noise floor, which is its change in unedited rows."""
    rows, real, idle = with_idle([{_site(setting, item.layer): item.removal} for item in items])
    values = run_held(setting.model, setting.recording, (), rows, {}, setting.targets)
    metric = values @ values.new_tensor([target.weight for target in setting.targets])
    return (metric[idle[0]] - metric[real]).numpy(), float((metric[idle] - metric[idle[0]]).abs().max())


def shape(setting: Setting, items: Sequence[Item]) -> dict[str, float]:
    """Size and direction of the vectors relative to the stream: medians of |v| / |x| and of cos(v, x)."""
    x = torch.stack([setting.recording.layers[item.layer].target[0, item.removal.pos] for item in items]).double()
    v = torch.stack([item.removal.vector for item in items]).double()
    cosine = torch.cosine_similarity(v, x)
    return {"size": float((v.norm(dim=1) / x.norm(dim=1)).quantile(0.5)), "cosine": float(cosine.quantile(0.5))}


def _site(setting: Setting, layer: int) -> Site:
    return setting.model.store.sites(layer)[1]


# -- predictions of the rules --------------------------------------------------------------------------------------


def predictors(setting: Setting, layers: Sequence[int]) -> dict[str, Predict]:
    """Per column, a function of layer, positions and vectors."""
    where = (setting.model, setting.recording, setting.targets)
    sites = tuple(_site(setting, layer) for layer in layers)
    found: dict[str, Predict] = {}
    for name in COLUMNS:
        if name in GRADIENTS:
            gradients = GRADIENTS[name](*where, sites)
            found[name] = partial(_along, dict(zip(layers, (gradients[site] for site in sites), strict=True)))
        else:
            rule = RULES[STEPS[name]].gradients
            steps = {layer: one_step(*where, layer, gradients=rule) for layer in layers}
            found[name] = lambda layer, pos, vectors, steps=steps: steps[layer].effects(pos, vectors)
    return found


def _along(
    gradients: Mapping[int, Float[Tensor, "pos d_model"]],
    layer: int,
    pos: Int[Tensor, " row"],
    vectors: Float[Tensor, "row d_model"],
) -> Float[Tensor, " row"]:
    """v · g."""
    return (vectors.to(gradients[layer]) * gradients[layer][pos]).sum(-1).double()


def predicted(predict: Predict, items: Sequence[Item]) -> Float[np.ndarray, " item"]:
    """One number per item, in their order."""
    out = np.zeros(len(items))
    for layer in {item.layer for item in items}:
        here = [number for number, item in enumerate(items) if item.layer == layer]
        for start in range(0, len(here), ROWS):
            part = here[start : start + ROWS]
            pos = torch.tensor([items[number].removal.pos for number in part])
            out[part] = predict(layer, pos, torch.stack([items[number].removal.vector for number in part])).numpy()
    return out


def edge_weights(run: LocalRun, name: str) -> Float[np.ndarray, "target source"]:
    """All edges of a run under a rule, by node rows."""
    out = np.zeros((len(run.index), len(run.index)))
    for rows in known_edges(run, NORMS_HELD, name) if name == "norms held" else RULES[name].edge_rows(run):
        out[np.ix_(rows.targets.numpy(), rows.sources.numpy())] = rows.weights.double().numpy()
    return out


# -- one prompt, one set, the table --------------------------------------------------------------------------------


def figures(said: Mapping[str, Float[np.ndarray, " item"]], effect: Float[np.ndarray, " item"]) -> Figures:
    """Of every column both correlations, and the amount: mean |predicted| / mean |measured|, on which they do not
    depend."""
    return {
        name: {
            "pearson": correlation(column, effect),
            "spearman": rank_correlation(column, effect),
            "amount": float(np.abs(column).mean() / np.abs(effect).mean()),
        }
        for name, column in said.items()
    }


def prompt_figures(setting: Setting, others: Sequence[Recording], layers: Sequence[int], n: int) -> dict[str, Any]:
    """All figures of one prompt; `n` caps single features and edges."""
    say = predictors(setting, layers)
    out: dict[str, Any] = {"items": {}, "shape": {}, "noise_floor": 0.0}
    for kind, items in interventions(setting, others, layers, n).items():
        effect, noise = measured(setting, items)
        out[kind] = figures({name: predicted(predict, items) for name, predict in say.items()}, effect)
        out["items"][kind], out["shape"][kind] = len(items), shape(setting, items)
        out["noise_floor"] = max(noise, out["noise_floor"])
    run = make_run(setting, by_layer(setting, setting.scores.frame))
    graph = assemble(setting, run, len(run.index))
    edges, _ = measure_edges(setting, graph, n=n, seed=0)
    pairs = (edges["target"].to_numpy(), edges["source"].to_numpy())
    out["edges"] = figures(
        {name: edge_weights(run, name)[pairs] for name in COLUMNS if name not in STEPS}, edges["effect"].to_numpy()
    )
    out["items"]["edges"] = len(edges)
    return out | {"accepted": _accepted(setting)}


def _accepted(setting: Setting) -> dict[str, float]:
    """Spearman over a sample of all sites, the first included."""
    nodes, _ = measure_nodes(setting, n=CHECKED, seed=0)
    ose = score_features(setting.model, setting.recording, setting.targets, rule="ose").frame
    both = nodes.merge(ose[[*KEYS, "score"]].rename(columns={"score": "ose"}), on=KEYS, validate="one_to_one")
    return {
        "exact": rank_correlation(both["score"], both["effect"]),
        "ose": rank_correlation(both["ose"], both["effect"]),
    }


def measure(name: str, layers: Sequence[int] = LAYERS, n: int = FEATURES, prompts: int = 10) -> dict[str, Any]:
    """All figures of one set: means over the prompts, and each prompt's own."""
    exam = Exam.of(HookedModel.load("demo", name))
    asked = verification_prompts(exam)[:prompts]
    settings = [settle(exam.model, prompt, exam.model.host.tokenize(capital)[0]) for prompt, capital in asked]
    each = []
    for number, setting in enumerate(settings):
        print(f"{name}: prompt {number + 1} of {len(settings)}", file=sys.stderr, flush=True)
        others = [other.recording for other in settings if other is not setting]
        each.append(prompt_figures(setting, others, layers, n))
    return {"mean": _mean(each), "each": each, "prompts": [prompt for prompt, _ in asked]}


def _mean(parts: Sequence[Any]) -> Any:
    """The mean of each figure over all prompts, in nested dicts."""
    if isinstance(parts[0], dict):
        return {key: _mean([part[key] for part in parts]) for key in parts[0]}
    return mean(parts)


def bounds(sets: Mapping[str, Any]) -> dict[str, bool]:
    """Each acceptance figure, reached or not."""
    least = {"demo": {"exact": 0.88, "ose": 0.93}, "demo-dense": {"exact": 0.90, "ose": 0.95}}
    out = {}
    for name, found in sets.items():
        for rule, bound in least[name].items():
            out[f"{name}: Spearman of features, {rule} >= {bound}"] = found["mean"]["accepted"][rule] >= bound
        out[f"{name}: Spearman of edges, exact >= 0.9"] = found["mean"]["edges"]["exact"]["spearman"] >= 0.9
    return out


def markdown(found: Mapping[str, Any]) -> str:
    """The table as docs/rules.md has it."""
    lines = [f"| | items | size | cos | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 4) + "|"]
    for kind, items in found["items"].items():
        lies = [_number(value) for value in found["shape"].get(kind, {}).values()] or ["", ""]
        cells = [f"{items:.0f}", *lies, *(_cell(found[kind].get(name)) for name in COLUMNS)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "—"
    return "/".join(_number(figure[name]) for name in ("pearson", "spearman"))


def _number(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".").replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit status 1 if an acceptance figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS), help="whose sites are pooled")
    parser.add_argument("--items", type=int, default=FEATURES, help="most single features, and edges, per prompt")
    parser.add_argument("--prompts", type=int, default=10, help="how many of the ten; at least two, to resample from")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    sets = {name: measure(name, args.layers, args.items, args.prompts) for name in args.sets}
    kept = bounds(sets)
    if args.json:
        print(json.dumps({"sets": sets, "bounds": kept, "seconds": time.perf_counter() - started}))
    else:
        for name, found in sets.items():
            print(f"{name}, mean over {len(found['prompts'])} prompts: Pearson/Spearman\n\n{markdown(found['mean'])}\n")
        print(json.dumps({name: found["mean"]["accepted"] for name, found in sets.items()} | kept, indent=1))
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
