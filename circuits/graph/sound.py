"""The checks of every graph, read from a file or made in memory: columns have one length, nodes are of known kinds and
occur once, edges lead to a higher level and not to an earlier position, numbers are finite, and facts fit the nodes.

Nothing is repaired. `parts` are the columns of a graph by name: `kind`, `layer`, `pos`, `feature` of the nodes,
`activation` and so on, `source`, `target` and so on of the edges.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Int

from circuits.graph.nodes import BIAS, ERROR, FEATURE, KINDS, NONE, REMAINDER, REST, TARGET, TOKEN
from hooks.errors import UserError, first_line
from hooks.files import shown
from hooks.types import FeatureAddress

NODE_NUMBERS = ("kind", "layer", "pos", "feature")
NODE_VALUES, NODE_EXTRA = ("activation", "score", "influence"), ("baseline", "total")
EDGE_NUMBERS, EDGE_VALUES = ("source", "target"), ("weight", "effect")
REQUIRED = (*NODE_NUMBERS, *NODE_VALUES, *EDGE_NUMBERS, *EDGE_VALUES)
NUMBERS = (*NODE_NUMBERS, *EDGE_NUMBERS)
EDGES = (*EDGE_NUMBERS, *EDGE_VALUES)
LARGEST = float(np.finfo(np.float32).max)  # numbers of a model are below this
MOST_LAYERS, MOST = 1 << 14, 1 << 31  # limits: of layers; of positions, features and targets
DEPTH = 32  # containers within containers
TEXT_LIMIT, VALUE_LIMIT = 8 << 20, 1_000_000  # of the facts as JSON: bytes, and values (up to 100 bytes each in memory)


def check_parts(parts: Mapping[str, Any], meta: Any) -> dict[str, Any]:
    """Refuse parts that are no graph.

    Returns:
        The facts in plain data.

    Raises:
        UserError: a column is missing or unknown, or has another shape, type or range; a node or edge occurs twice; an
            edge leads to a lower or to the same level, or to an earlier position; a number is NaN or infinite (only the
            norm of a folded rest may be NaN); `meta` is no plain data, or a fact has another type or does not fit the
            nodes.
    """
    _check_columns(parts)
    _check_nodes(parts)
    _check_edges(parts)
    _check_values(parts)
    facts = plain(meta)
    check_meta(facts)
    _check_fit(parts, facts)
    return facts


def check_size(text: bytes) -> None:
    """Refuse facts that would take too much memory when they are read. `text` is their JSON, or a header around it.

    Raises:
        UserError: it is too long, or holds too many values.
    """
    values = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    if len(text) > TEXT_LIMIT or values > VALUE_LIMIT:
        expected = f"JSON of at most {TEXT_LIMIT >> 20} MiB and {VALUE_LIMIT:,} values"
        raise UserError(
            "the facts of the graph are too many", expected=expected, found=f"{len(text):,} bytes, {values:,} values"
        )


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise UserError(f"{where} is not what a graph has", expected=expected, found=found)


def _check_columns(parts: Mapping[str, Any]) -> None:
    if missing := [name for name in REQUIRED if name not in parts]:
        _refuse("the table", f"the columns {', '.join(REQUIRED)}", f"no {', '.join(missing)}")
    if unknown := sorted(set(parts) - {*REQUIRED, *NODE_EXTRA}):
        _refuse("the table", f"no columns but {', '.join((*REQUIRED, *NODE_EXTRA))}", shown(unknown[0]))
    for name, column in parts.items():
        per, kinds, word = ("source", "edge") if name in EDGES else ("kind", "node"), *_type_of(name)
        shape = parts[per[0]].shape
        if len(shape) != 1 or column.shape != shape or column.dtype.kind not in kinds:
            wanted = f"{word}, one per {per[1]}: {list(shape[:1])}"
            _refuse(f"the column {name}", wanted, f"{column.dtype} {list(column.shape)}")


def _type_of(name: str) -> tuple[str, str]:
    """numpy's letters for the types a column may have, and the word for them."""
    return ("iu", "whole numbers") if name in NUMBERS else ("f", "floats")


def _first(hit: Bool[np.ndarray, " item"]) -> int | None:
    """The index of the first True; None without one."""
    return int(hit.argmax()) if hit.any() else None


def _check_nodes(parts: Mapping[str, Any]) -> None:
    kind, layer, pos, feature = (parts[name] for name in NODE_NUMBERS)
    wrong = (kind < 0) | (kind >= len(KINDS))
    if (row := _first(wrong)) is not None:
        _refuse(f"the kind of node {row}", f"0 to {len(KINDS) - 1}", str(kind[row]))
    placed, addressed = np.isin(kind, (FEATURE, REST, ERROR)), np.isin(kind, (FEATURE, TARGET))
    at = placed | np.isin(kind, (TOKEN, TARGET))
    free = {"layer": kind == BIAS, "pos": np.zeros_like(at), "feature": kind == REMAINDER}
    most = {"layer": MOST_LAYERS, "pos": MOST, "feature": MOST}
    for name, column, has in (("layer", layer, placed), ("pos", pos, at), ("feature", feature, addressed)):
        fits = np.where(has, (column >= 0) & (column < most[name]), column == NONE)
        fits |= free[name] & (column >= NONE) & (column < MOST_LAYERS)
        if (row := _first(~fits)) is not None:
            wanted = f"0 to {most[name] - 1}" if has[row] or free[name][row] else f"none ({NONE})"
            _refuse(f"the {name} of node {row}, a {KINDS[kind[row]]}", wanted, str(column[row]))
    order = np.lexsort((feature, pos, layer, kind))
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in (kind, layer, pos, feature):
        same &= np.diff(column[order]) == 0
    if (row := _first(same)) is not None:
        first = order[row]
        what = f"a {KINDS[kind[first]]} at layer {layer[first]}, position {pos[first]}, number {feature[first]}"
        _refuse(f"node {order[row + 1]}", "every node once", f"{what}, which is node {first} too")


def depth(kind: Int[np.ndarray, " node"], layer: Int[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """The level of each node: nodes without a layer are lowest, targets are highest."""
    return np.where(kind == TARGET, MOST_LAYERS, layer)


def _check_edges(parts: Mapping[str, Any]) -> None:
    source, target, kind, pos = (parts[name] for name in ("source", "target", "kind", "pos"))
    for name, column in (("source", source), ("target", target)):
        if (edge := _first((column < 0) | (column >= len(kind)))) is not None:
            _refuse(f"the {name} of edge {edge}", f"a node, 0 to {len(kind) - 1}", str(column[edge]))
    key = np.sort(target.astype(np.int64) * len(kind) + source)
    if (edge := _first(np.diff(key) == 0)) is not None:
        ends = key[edge] % len(kind), key[edge] // len(kind)
        _refuse("an edge", "one edge at most between two nodes", f"two from node {ends[0]} to node {ends[1]}")
    level = depth(kind, parts["layer"])
    wrong = ~np.isin(kind[target], (FEATURE, TARGET)) | (level[source] >= level[target])
    if (edge := _first(wrong)) is not None:
        low, high = (f"a {KINDS[kind[row]]} of layer {parts['layer'][row]}" for row in (source[edge], target[edge]))
        _refuse(f"edge {edge}", "a way up, into a feature or a target", f"from {low} into {high}")
    if (edge := _first((pos[target] != NONE) & (pos[source] > pos[target]))) is not None:
        found = f"from position {pos[source[edge]]} to {pos[target[edge]]}"
        _refuse(f"edge {edge}", "a position that sees its source", found)
    group = np.where(kind[target] == TARGET, NONE, parts["layer"][target])
    if (edge := _first((kind[source] == REMAINDER) & (parts["feature"][source] != group))) is not None:
        _refuse(f"edge {edge}", "a remainder of its own layer", f"the one of layer {parts['feature'][source[edge]]}")


def _check_values(parts: Mapping[str, Any]) -> None:
    folded = parts["kind"] == REST
    for name in (*NODE_VALUES, *NODE_EXTRA, *EDGE_VALUES):
        if name not in parts:
            continue
        column = parts[name]
        fits = np.abs(column) <= np.float64(LARGEST)  # False for NaN
        if name in ("activation", "baseline"):
            fits |= folded & np.isnan(column)
        if name == "influence":
            fits &= column >= 0
        if (row := _first(~fits)) is not None:
            wanted = "a finite number" + (", not below 0" if name == "influence" else "")
            _refuse(f"the {name} of {'edge' if name in EDGES else 'node'} {row}", wanted, f"{column[row]:.3g}")


def plain(data: Any, depth: int = 0) -> Any:
    """The same data as JSON values: lists for tuples, None where a number is NaN or infinite.

    Raises:
        UserError: a value is of no JSON type, a text is no Unicode, or containers are nested too deeply.
    """
    if depth > DEPTH:
        raise UserError("the facts of the graph are nested too deeply", expected=f"{DEPTH} levels at most")
    if isinstance(data, Mapping):
        return {_text(key): plain(value, depth + 1) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value, depth + 1) for value in data]
    if isinstance(data, str):
        return _text(data)
    if isinstance(data, float):
        return float(data) if np.isfinite(data) else None
    if isinstance(data, bool | None):
        return data
    if isinstance(data, int) and abs(data) < 1 << 63:
        return data
    raise UserError("a fact of the graph is not plain data", expected="what JSON has", found=shown(data))


def _text(text: Any) -> str:
    if isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    raise UserError("a text of the graph is not Unicode", expected="text without surrogates", found=ascii(text)[:80])


# ---- facts: the type of each. A `Fact` is a test and its description

Fact = tuple[Callable[[Any], bool], str]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _list_of(fact: Fact) -> Fact:
    return lambda value: isinstance(value, list) and all(map(fact[0], value)), f"a list, each {fact[1]}"


def _dict_of(fact: Fact) -> Fact:
    return lambda value: isinstance(value, dict) and all(map(fact[0], value.values())), f"a dict, each {fact[1]}"


TEXT: Fact = (lambda value: isinstance(value, str), "text")
COUNT: Fact = (_is_count, "a whole number from 0 up")
LAYER: Fact = (lambda value: _is_count(value) and value < MOST_LAYERS, f"a layer below {MOST_LAYERS}")
NUMBER: Fact = (_is_number, "a finite number")
FIGURE: Fact = (lambda value: value is None or _is_number(value), "a finite number, or null")
DICT: Fact = (lambda value: isinstance(value, dict), "a dict")

FACTS: dict[str, Fact] = {
    **dict.fromkeys(("prompt", "rule", "model", "transcoders", "fingerprint", "precision"), TEXT),
    **dict.fromkeys(("ids", "sinks"), _list_of(COUNT)),
    "tokens": _list_of(TEXT),
    "targets": _list_of(DICT),
    "convention": _dict_of(TEXT),
    "layers": _list_of(LAYER),
    "n_layers": COUNT,
    **dict.fromkeys(("max_in_edges", "folded"), COUNT),
    **dict.fromkeys(("remainder_share", "kept_weight"), FIGURE),
    **dict.fromkeys(("counterfactual", "conservation", "selection", "verification", "verification_sample"), DICT),
    "scores": _dict_of(FIGURE),
    "sites": _list_of(DICT),
    "pruning": _dict_of(NUMBER),
    "labels": _dict_of(TEXT),
    "supernodes": _dict_of(_list_of(TEXT)),
}
PAIR: dict[str, Fact] = {"prompt": TEXT, "ids": _list_of(COUNT)}
CONSERVATION: dict[str, Fact] = {"rule": TEXT, "max_rel_error": FIGURE}
TARGETS: dict[str, dict[str, Fact]] = {
    "logits": {"tokens": _list_of(COUNT), "coefficients": _list_of(NUMBER), "pos": COUNT, "mean": NUMBER},
    "feature": {"address": TEXT, "pos": COUNT},
    "direction": {"vector": _list_of(NUMBER), "site": DICT, "pos": COUNT},
}
SITE: dict[str, Fact] = {"name": TEXT, "layer": LAYER}
SHARES: dict[str, Fact] = {
    "layer": LAYER,
    **dict.fromkeys(("features", "errors", "biases"), NUMBER),
    "share": _dict_of(FIGURE),
    "difference_explained": FIGURE,
}
SHARED = ("features", "errors", "biases")
AGREEMENT: dict[str, Fact] = {
    **dict.fromkeys(("n", "n_left_out", "n_above_noise"), COUNT),
    **dict.fromkeys(("pearson", "spearman", "sign", "slope", "top_tenth", "top_20"), FIGURE),
}
VERIFICATION: dict[str, Fact] = {
    "metric": TEXT,
    **dict.fromkeys(("n", "n_edges"), COUNT),
    **dict.fromkeys(("node_pearson", "node_spearman", "logit_spearman", "edge_pearson", "edge_spearman"), FIGURE),
    **dict.fromkeys(("noise_floor", "edge_noise_floor"), FIGURE),
    **dict.fromkeys(("ablation", "doubling", "edge"), DICT),
}
SAMPLE: dict[str, Fact] = {"nodes": _dict_of(_list_of(FIGURE)), "edges": _dict_of(_list_of(FIGURE)),
                           "noise_floor": FIGURE, "edge_noise_floor": FIGURE}  # fmt: skip
SAMPLED = {"nodes": ("score", "effect", "doubled"), "edges": ("weight", "effect")}


def check_meta(meta: Any) -> None:
    """Refuse facts of a wrong type. `meta` is a result of `plain`; facts of unknown names may have any type.

    Raises:
        UserError: names the fact.
    """
    if not isinstance(meta, dict):
        _refuse("meta", "a dict", shown(meta))
    _check_facts("meta", meta, FACTS, needed=())
    for name, facts in (("counterfactual", PAIR), ("conservation", CONSERVATION), ("verification", VERIFICATION)):
        if name in meta:
            _check_facts(name, meta[name], facts)
    for part in ("ablation", "doubling", "edge") if "verification" in meta else ():
        _check_facts(f"verification, {part}", meta["verification"][part], AGREEMENT)
    for number, target in enumerate(meta.get("targets", ())):
        _check_target(f"target {number}", target)
    for number, site in enumerate(meta.get("sites", ())):
        _check_facts(f"site {number}", site, SHARES, needed=[name for name in SHARES if name != "difference_explained"])
        _check_facts(f"site {number}: share", site["share"], dict.fromkeys(SHARED, FIGURE))
    if "verification_sample" in meta:
        _check_sample(meta["verification_sample"])


def _check_facts(
    where: str, found: dict[str, Any], facts: Mapping[str, Fact], needed: Collection[str] | None = None
) -> None:
    for name in facts if needed is None else needed:
        if name not in found:
            _refuse(where, f"the fact {name}", "none")
    for name, (fits, kind) in facts.items():
        if name in found and not fits(found[name]):
            _refuse(f"{where}: {name}", kind, shown(found[name]))


def _check_target(where: str, target: dict[str, Any]) -> None:
    _check_facts(where, target, {"name": TEXT})
    _check_facts(where, target, {"weight": NUMBER}, needed=())
    kind = target.get("kind", "logits")
    if not isinstance(kind, str) or kind not in TARGETS:
        _refuse(f"{where}: kind", ", ".join(TARGETS), shown(kind))
    _check_facts(where, target, TARGETS[kind], needed=TARGETS[kind] if "kind" in target else ())
    tokens, coefficients = (target.get(name, []) for name in ("tokens", "coefficients"))
    if len(tokens) != len(coefficients):
        _refuse(where, "a coefficient per token", f"{len(coefficients)} for {len(tokens)} tokens")
    if kind == "direction":
        _check_facts(f"{where}: site", target["site"], SITE)
    if kind == "feature":
        try:
            FeatureAddress.parse(target["address"])
        except ValueError as error:
            _refuse(f"{where}: address", "such as L3/99@8", first_line(error))


def _check_sample(sample: dict[str, Any]) -> None:
    _check_facts("verification_sample", sample, SAMPLE)
    for part, names in SAMPLED.items():
        columns = [sample[part].get(name) for name in names]
        if None in columns or len({len(column) for column in columns if column is not None}) > 1:
            _refuse(f"verification_sample: {part}", f"{', '.join(names)}, of one length", shown(sample[part]))


def _check_fit(parts: Mapping[str, Any], meta: dict[str, Any]) -> None:
    """Refuse facts that contradict the nodes."""
    kind, layer, pos, feature = (parts[name] for name in NODE_NUMBERS)
    targets = meta.get("targets", [])
    rows = np.flatnonzero(kind == TARGET)
    if "targets" in meta and (feature[rows] >= len(targets)).any():
        _refuse("meta: targets", f"one for every target node, so {feature[rows].max() + 1}", str(len(targets)))
    for row in rows if targets else ():
        place = targets[feature[row]].get("pos", pos[row])
        if place != pos[row]:
            _refuse(f"target {feature[row]}", f"position {pos[row]}, where its node is", str(place))
    _check_positions(pos, meta)
    _check_layers(layer, meta)


def _check_positions(pos: Int[np.ndarray, " node"], meta: dict[str, Any]) -> None:
    lists = (meta.get("tokens"), meta.get("ids"), meta.get("counterfactual", {}).get("ids"))
    lengths = [len(found) for found in lists if found is not None]
    if len(set(lengths)) > 1:
        _refuse("meta: tokens and ids", "one of each per position", " and ".join(map(str, lengths)))
    for what, places in (("a node", pos), ("a sink", np.array(meta.get("sinks", []), dtype=np.int64))):
        if lengths and len(places) and places.max() >= lengths[0]:
            _refuse(f"the position of {what}", f"one of {lengths[0]} tokens", str(places.max()))


def _check_layers(layer: Int[np.ndarray, " node"], meta: dict[str, Any]) -> None:
    known = meta.get("layers")
    if known is not None and (strange := sorted(set(layer.tolist()) - {NONE, *known})):
        _refuse("the layer of a node", f"one of {', '.join(map(str, known[:80]))}", str(strange[0]))
    if "n_layers" in meta and len(layer) and layer.max() >= meta["n_layers"]:
        _refuse("the layer of a node", f"one of {meta['n_layers']}", str(layer.max()))
