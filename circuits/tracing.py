"""`trace`: one prompt (or a pair) → one graph. Record, score, select, edges, verify, prune."""

import logging
from collections.abc import Sequence

import torch

from circuits.attribution import RULES
from circuits.building import ORDERS, Setting, assemble, by_layer, coverage, make_run, select, settle
from circuits.edges import WRITABLE, LocalRun
from circuits.graph import Graph, check_thresholds, prune
from circuits.targets import TargetLike, against_token, either
from circuits.verification import verify_in
from hooks.errors import UserError
from hooks.host import Prompt, measured
from hooks.memory import explained
from hooks.model import HookedModel
from hooks.whole import whole

log = logging.getLogger("circuits")

MOST_SAMPLED = 20_000
EDGE_BYTES = 24  # source, target and weight of one edge while a graph is built


@measured
@torch.inference_mode(False)  # tensors that are made in that mode have no gradients
def trace(
    model: HookedModel,
    prompt: Prompt,
    targets: TargetLike | Sequence[TargetLike] | None = None,
    *,
    target: TargetLike | Sequence[TargetLike] | None = None,
    against: str | int | None = None,
    counterfactual: Prompt | None = None,
    max_nodes: int | None = 10_000,
    select_by: str = "score",
    max_in_edges: int = 256,
    budget_bytes: int = 4 << 30,
    rule: str = "exact",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    sample: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Graph:
    """Explain a target by a graph of features, and measure how well the graph predicts interventions.

    Args:
        targets: what is explained. None (the model's own answer against the best other token), a token, or a class of
            `circuits.targets`: `Logit` (against a named token, at any position), `Mass` (next tokens by mass),
            `Answer` (several tokens), `Feature`, `Direction`, `Target`; or a list or tuple of these, with equal
            weights. A tuple of two tokens is still read as `Logit(answer, against)`, with a DeprecationWarning.
        target: another name of `targets`, as in other functions.
        against: the token that one answer is measured against, instead of the best other one.
        counterfactual: the other prompt of a pair, of the same length. Then nodes are *differences* between the two
            prompts, and the default target is this prompt's answer against the other's.
        max_nodes: how many features become nodes; the sum of all others is in the rest nodes. None: every active
            feature becomes a node, which is the complete graph.
        select_by: how they are chosen, see `circuits.building.choose_nodes`: score, total, ose, influence.
        max_in_edges: how many of the strongest edges into a node are kept. The normalisation of influence, the
            conservation and the remainder are computed from all edges.
        budget_bytes: memory for kept edges; if they do not fit, fewer edges per node are kept.
        rule: an attribution rule, a file in `circuits/attribution/`.
        node_threshold, edge_threshold: see `circuits.graph.pruning`; 1.0 keeps everything.
        sample: how many nodes and edges are verified by interventions; 0 skips the verification.
        seed: random seed of that sample.
        progress: show a bar on stderr.

    Raises:
        UserError: the rule is unknown, a number is out of range, the two prompts differ in length, or no write site is
            below the target.

    Examples:
        >>> from hooks import HookedModel
        >>> graph = trace(HookedModel.load("demo"), "fact: the capital of the state containing Dallas is")
        >>> graph.meta["targets"][0]["name"].startswith("' Austin'")
        True
    """
    check_options(rule, max_nodes, max_in_edges, node_threshold, edge_threshold, sample, seed, select_by)
    asked = against_token(either(targets, target), against)
    _check_convention(model)
    with explained("tracing", model.host.device_of(0), lambda: model.request(prompt), "trace"):
        setting = _settled(model, prompt, asked, counterfactual, rule)
        chosen = select(setting, max_nodes, select_by)
        run = make_run(setting, by_layer(setting, chosen))
        rows = sum(len(run.target_rows(number)) for number in run.groups)
        most = max(1, min(max_in_edges, budget_bytes // (EDGE_BYTES * rows)))
        if most < max_in_edges:
            log.warning(
                "keeping %d edges into each of %d nodes: more do not fit into %d bytes", most, rows, budget_bytes
            )
        graph = assemble(setting, run, most, progress=progress)
        graph = graph.with_meta(selection=coverage(setting, chosen, select_by), max_in_edges=most)
        if sample:
            check = verify_in(setting, graph, n=sample, seed=seed)
            graph = graph.with_meta(verification=check.summary(), verification_sample=check.sample())
    return prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)


@measured
@torch.inference_mode(False)
def prepare(
    model: HookedModel,
    prompt: Prompt,
    targets: TargetLike | Sequence[TargetLike] | None = None,
    *,
    target: TargetLike | Sequence[TargetLike] | None = None,
    against: str | int | None = None,
    counterfactual: Prompt | None = None,
    max_nodes: int | None = 10_000,
    select_by: str = "score",
    rule: str = "exact",
) -> LocalRun:
    """The steps of `trace` before the edges: record, score, select, number the nodes. Arguments as of `trace`.

    `RULES[rule].edge_rows(run)` then yields the raw edges group by group, from the targets down.

    Raises:
        UserError: as `trace`.
    """
    check_options(rule, max_nodes, 1, 1.0, 1.0, 0, 0, select_by)
    _check_convention(model)
    asked = against_token(either(targets, target), against)
    setting = _settled(model, prompt, asked, counterfactual, rule)
    return make_run(setting, by_layer(setting, select(setting, max_nodes, select_by)))


def _settled(
    model: HookedModel,
    prompt: Prompt,
    targets: TargetLike | Sequence[TargetLike] | None,
    counterfactual: Prompt | None,
    rule: str,
) -> Setting:
    setting = settle(model, prompt, targets, counterfactual=counterfactual, rule=rule)
    if setting.scores.frame.empty:
        raise UserError(
            "no feature is active on this prompt, so there is nothing to draw a graph of",
            expected="at least one active feature",
            where=model.store.name,
            repair="`circuits check` measures whether the set fits this model",
        )
    return setting


def check_options(
    rule: str,
    max_nodes: int | None,
    max_in_edges: int,
    node_threshold: float,
    edge_threshold: float,
    sample: int,
    seed: int,
    select_by: str = "score",
) -> None:
    """Refuse options that cannot be traced, before a model is loaded.

    Raises:
        UserError: the rule is unknown, or a number is out of range.
    """
    if rule not in RULES:
        raise UserError(f"unknown attribution rule {rule!r}", expected=", ".join(RULES), where="--rule")
    if select_by not in ORDERS:
        raise UserError(f"unknown order of selection {select_by!r}", expected=", ".join(ORDERS), where="--select")
    for name, value in (("max_nodes", max_nodes), ("max_in_edges", max_in_edges)):
        if value is not None and whole(value, name) < 1:
            raise UserError(f"{name} = {value} leaves nothing to draw", expected="at least 1")
    check_thresholds(node_threshold, edge_threshold)
    for name, value in (("sample", sample), ("seed", seed)):
        if whole(value, name) < 0:
            raise UserError(f"{name} = {value} is out of range", expected="at least 0")
    if sample > MOST_SAMPLED:  # the measured values are stored in the graph's file as text
        raise UserError(f"sample = {sample} is out of range", expected=f"at most {MOST_SAMPLED:,}")


def _check_convention(model: HookedModel) -> None:
    convention = model.store.convention
    read, write = convention.read.at(0), convention.write.at(0)
    if write.name not in WRITABLE or write.depth < read.depth:
        raise UserError(
            f"there is no graph for transcoders that read {convention.read} and write {convention.write}",
            expected=f"a write site at or above the read site, one of {', '.join(WRITABLE)}",
            repair="features, swap, ablate and steer work for this set as it is",
        )
    elsewhere = sum(part.is_meta for part in model.host.model.parameters())
    if elsewhere:
        raise UserError(
            "a graph needs the weights of every block, and some are kept outside the device",
            expected="a model that is wholly loaded",
            found=f"{elsewhere} offloaded tensors",
            repair="more devices, or a quantised model: `circuits check --plan` says what fits",
        )
    if convention.source == "undecided":
        raise UserError(
            "a check of these transcoders did not settle what they read and write, so no graph is built on a guess",
            expected="the sites, chosen by you",
            where=model.store.name,
            repair="--read SITE --write SITE; `circuits check` shows the candidates",
        )
    skipping = [layer for layer in model.store.layers if model.store.has_skip(layer)]
    if skipping:
        raise UserError(
            f"there is no graph for transcoders with a skip connection, as layer {skipping[0]} has",
            expected="all of the reconstruction to be features and a bias",
            repair="features, swap, ablate and steer work for this set as it is",
        )
