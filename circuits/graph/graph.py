"""The circuit: a frozen table of nodes, a frozen table of edges, and facts about them.

It is saved as one safetensors file (arrays, and one JSON text in the header), without pickle; the same graph gives the
same bytes. All of a file is checked before it becomes a graph (`circuits.graph.sound`).
"""

import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from circuits.graph.nodes import FEATURE, KINDS, NONE, NodeIndex
from circuits.graph.sound import NODE_EXTRA, NODE_NUMBERS, NUMBERS, REQUIRED, TEXT_LIMIT, check_parts, check_size, plain
from circuits.shown import drawn, unique
from hooks.errors import CheckpointError, UserError, first_line
from hooks.files import (
    HeaderEntry,
    check_safetensors,
    safetensors_header,
    safetensors_metadata,
    safetensors_tensors,
    shown,
    write_safetensors,
)
from hooks.renamed import Table

_VERSION = 1
_KEY = "qwen-circuits-graph"
_COLUMNS = tuple(name for name in REQUIRED if name not in NODE_NUMBERS)


@dataclass(frozen=True)
class Graph:
    """An attribution graph.

    Attributes:
        index: kind, layer, position and feature of each node.
        activation: a feature's activation, a target's value, the norm of a rest, error, bias or token vector.
        score: first-order contribution of the node to the (first) target, in logits: removing the node is predicted
            to lower the target by this much.
        influence: share of the first target that flows through the node, unsigned (`circuits.graph.influence`).
        source, target: of each edge, the rows of its two nodes, cause → effect.
        weight: contribution of the source to the target's pre-activation (or logit difference), in the target's units.
        effect: the same in logits of the first target: weight times the target node's own effect per unit. An edge into
            another target has the effect in that target's logits.
        meta: JSON-able facts: prompt, tokens, targets, rule, model, convention, verification.
        baseline: in a pair of prompts, the activation (or value) in the counterfactual; else None, which means 0.
        total: signed total effect along all paths of the graph before it was pruned (`circuits.graph.scores`); None if
            too many edges were left out to compute it.
    """

    index: NodeIndex
    activation: Float[np.ndarray, " node"]
    score: Float[np.ndarray, " node"]
    influence: Float[np.ndarray, " node"]
    source: Int[np.ndarray, " edge"]
    target: Int[np.ndarray, " edge"]
    weight: Float[np.ndarray, " edge"]
    effect: Float[np.ndarray, " edge"]
    meta: Mapping[str, Any] = field(default_factory=dict)
    baseline: Float[np.ndarray, " node"] | None = None
    total: Float[np.ndarray, " node"] | None = None

    @property
    def difference(self) -> Float[np.ndarray, " node"]:
        """The activation; in a pair of prompts, the activation minus the counterfactual's."""
        return self.activation if self.baseline is None else self.activation - self.baseline

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.index)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return len(self.source)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A unique name per node; a feature's is its address, such as `L3/99@8`."""
        return unique([self.index.name(row, self.target_names) for row in range(self.n_nodes)])

    @cached_property
    def target_names(self) -> tuple[str, ...]:
        """A unique name per target."""
        return unique([target["name"] for target in self.meta.get("targets", [])])

    @property
    def tokens(self) -> tuple[str, ...]:
        """The prompt's tokens as text; empty texts if the graph was made without them."""
        known = self.meta.get("tokens")
        return tuple(known) if known is not None else ("",) * (int(self.index.pos.max(initial=NONE)) + 1)

    def _extra(self) -> dict[str, Float[np.ndarray, " node"]]:
        """The columns that not every graph has."""
        return {name: column for name in NODE_EXTRA if (column := getattr(self, name)) is not None}

    def with_meta(self, **facts: Any) -> "Graph":
        """The same graph with additional facts."""
        return replace(self, meta={**self.meta, **facts})

    def subgraph(self, nodes: Int[np.ndarray, " row"], edges: Int[np.ndarray, " edge"]) -> "Graph":
        """Some nodes, and those of the given edges whose two nodes are among them."""
        place = np.full(self.n_nodes, NONE)
        place[nodes] = np.arange(len(nodes))
        edges = edges[(place[self.source[edges]] != NONE) & (place[self.target[edges]] != NONE)]
        return replace(
            self,
            index=self.index.take(nodes),
            activation=self.activation[nodes],
            score=self.score[nodes],
            influence=self.influence[nodes],
            source=place[self.source[edges]],
            target=place[self.target[edges]],
            weight=self.weight[edges],
            effect=self.effect[edges],
            **{name: column[nodes] for name, column in self._extra().items()},
        )

    def nodes_frame(self) -> pd.DataFrame:
        """The nodes as a table, strongest influence first."""
        tokens = self.tokens
        labels = self.meta.get("labels", {})
        frame = Table(
            {
                "name": self.names,
                "kind": [KINDS[kind] for kind in self.index.kind],
                "layer": self.index.layer,
                "pos": self.index.pos,
                "token": [tokens[pos] if 0 <= pos < len(tokens) else "" for pos in self.index.pos],
                "feature": np.where(self.index.kind == FEATURE, self.index.feature, NONE),
                "activation": self.activation,
                **self._extra(),
                "score": self.score,
                "influence": self.influence,
                "label": [labels.get(name, "") for name in self.names],
            }
        )
        return frame.sort_values(["influence", "name"], ascending=[False, True], ignore_index=True)

    def edges_frame(self) -> pd.DataFrame:
        """The edges as a table, strongest effect first."""
        frame = pd.DataFrame(
            {
                "source": [self.names[row] for row in self.source],
                "target": [self.names[row] for row in self.target],
                "weight": self.weight,
                "effect": self.effect,
            }
        )
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def to_networkx(self) -> nx.DiGraph:
        """A `networkx.DiGraph`: nodes by name with the columns of `nodes_frame`, edges with `weight` and `effect`.

        A node's `pos` is called `position` here, because Graphviz reads `pos` as a place on the page. Numbers that a
        node does not have (a token's layer, a bias's position) are left out.
        """
        graph = nx.DiGraph(prompt=self.meta.get("prompt", ""), rule=self.meta.get("rule", ""))
        for row in self.nodes_frame().rename(columns={"pos": "position"}).to_dict("records"):
            absent = [key for key in ("layer", "position", "feature") if row[key] == NONE]
            absent += [key for key, value in row.items() if isinstance(value, float) and np.isnan(value)]
            graph.add_node(row["name"], **{k: v for k, v in row.items() if k != "name" and k not in absent})
        graph.add_edges_from(
            (self.names[s], self.names[t], {"weight": float(w), "effect": float(e)})
            for s, t, w, e in zip(self.source, self.target, self.weight, self.effect, strict=True)
        )
        return graph

    def __repr__(self) -> str:
        """One line: what is explained, how large the graph is, by which rule, on which model."""
        facts = [f"{self.n_nodes:,} nodes", f"{self.n_edges:,} edges"]
        facts += [f"rule {self.meta['rule']}"] if self.meta.get("rule") else []
        facts += [f"model {self.meta['model']}"] if self.meta.get("model") else []
        targets = [*self.target_names[:3], *([f"{len(self.target_names) - 3} more"] if self.target_names[3:] else [])]
        return f"Graph({drawn(' + '.join(targets)) or 'no target'}: {', '.join(facts)})"

    def _repr_html_(self) -> str:
        """For notebooks: the text of `repr`, and the strongest features."""
        frame = self.nodes_frame()
        shown = frame[frame["kind"] == "feature"].head(10)[
            ["name", "token", "activation", "score", "influence", "label"]
        ]
        return f"<p>{html.escape(repr(self))}</p>{shown.to_html(index=False, float_format='{:.4g}'.format)}"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. NaN and infinities among the facts become null.

        Raises:
            OutputError: the file cannot be written.
            UserError: the graph is not sound, see `check_graph`.
        """
        check_graph(self)
        columns = {
            name: np.array(column, np.int64 if name in NUMBERS else np.float64)  # copied: two may be one array
            for name, column in _parts(self).items()
        }
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        facts = {"version": _VERSION, "meta": plain(self.meta)}
        text = json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)
        check_size(text.encode())
        write_safetensors(Path(path), tensors, {_KEY: text})

    @classmethod
    def load(cls, path: str | Path) -> "Graph":
        """Read a saved graph, and check all of it.

        Raises:
            CheckpointError: there is no such file, it is not a graph of this version, or `check_graph` refuses its
                content.
        """
        path = Path(path)
        if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
            raise CheckpointError(f"there is no graph file {path}", repair="write one with `circuits trace --out`")
        try:
            meta = _facts(path)
            parts = {name: _column(tensor) for name, tensor in safetensors_tensors(path).items()}
            facts = check_parts(parts, meta)
        except CheckpointError:
            raise
        except UserError as error:
            raise CheckpointError(
                f"{path.name} is not a sound graph: {error.problem}",
                expected=error.expected,
                found=error.found,
                where=str(path),
                repair="the file is damaged, or was not written by `circuits trace`: trace it again",
            ) from None
        index = NodeIndex(*(parts.pop(name) for name in NODE_NUMBERS))
        return cls(index=index, meta=facts, **parts)


def check_graph(graph: Graph) -> None:
    """Refuse a graph that contradicts itself. `Graph.load` and every export check the same.

    Raises:
        UserError: a column has another length, type or range; a node or an edge occurs twice; an edge leads to a lower
            or to the same level, or to an earlier position; a number is NaN or infinite (only the norm of a folded rest
            may be NaN); a fact in `meta` has another type, or does not fit the nodes.
    """
    check_parts(_parts(graph), graph.meta)


def _parts(graph: Graph) -> dict[str, np.ndarray]:
    """The columns by name."""
    columns = {name: getattr(graph.index, name) for name in NODE_NUMBERS}
    return columns | {name: getattr(graph, name) for name in _COLUMNS} | graph._extra()


_STORED = {True: ("I64", "I32"), False: ("F64", "F32")}  # dtypes of columns of whole numbers, and of other columns


def _facts(path: Path) -> Any:
    """The facts in a graph's file, after its header was checked: the version, and columns of numbers."""
    check_size(safetensors_header(path, TEXT_LIMIT))
    stored = check_safetensors(path)
    try:
        head = json.loads(safetensors_metadata(path).get(_KEY, "{}"), parse_constant=_unknown)
    except (ValueError, RecursionError) as error:
        raise UserError("the text of its facts is no JSON", expected="JSON", found=first_line(error)) from None
    missing = sorted({*REQUIRED, "meta"} - {*stored, *(head if isinstance(head, dict) else ())})
    version = head.get("version") if isinstance(head, dict) else None
    if type(version) is not int or version != _VERSION or missing:
        raise CheckpointError(
            f"{path.name} is not a graph of this version",
            expected=f"version {_VERSION}, written by `circuits trace`",
            found=f"version {shown(version)}" + (f", without {', '.join(missing)}" if missing else ""),
            where=str(path),
        )
    _check_stored(stored)
    return head["meta"]


def _unknown(constant: str) -> None:
    """Read NaN and infinity, which earlier files may have, as None."""


def _check_stored(stored: Mapping[str, HeaderEntry]) -> None:
    """Refuse columns that do not have one of the dtypes of `_STORED`, before they are read."""
    for name, column in stored.items():
        kinds = _STORED[name in NUMBERS]
        if name not in (*REQUIRED, *NODE_EXTRA) or column.dtype not in kinds or len(column.shape) != 1:
            raise UserError(
                f"the column {shown(name)} is not what a graph has",
                expected=f"columns {', '.join((*REQUIRED, *NODE_EXTRA))} of {' or '.join(kinds)}",
                found=f"{column.dtype} {list(column.shape)}",
            )


def _column(tensor: Shaped[Tensor, " row"]) -> Shaped[np.ndarray, " row"]:
    """A stored column, in a graph's own precision."""
    return tensor.numpy().astype(np.float64 if tensor.is_floating_point() else np.int64, copy=False)
