"""The memory of running, in addition to the weights, step by step as the code allocates it (docs/memory.md derives each
line).

T positions, B rows, S transcoder layers, L blocks; b bytes per number of the model, w bytes per number that is computed
in fp32 or fp64. A step allocates tensors that stay (`adds`) and tensors that are freed at its end (`passing`). A task's
peak is the largest sum of all that stays so far and what is temporary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from hooks.choices import ITEM
from hooks.effects import TOKENS_AT_ONCE
from hooks.kernels import CAST_BLOCK, CAST_CHUNK, CAST_TILE, FEW
from hooks.memory._shapes import ModelShape, SetShape

On = Literal["cuda", "cpu"]
Task = Literal["features", "generate", "sweep", "trace"]

# what `circuits` holds at once; a test keeps these equal to its own (docs/architecture.md says why they are repeated)
TARGETS_AT_ONCE, ENTRIES_AT_ONCE, STREAM_ENTRIES = 1024, 1 << 25, 1 << 26  # circuits/edges/factored.py
MOST_EDGES = (4 << 30) // 24  # kept in a graph, circuits/tracing.py
COPIES = 64  # of the prompt in a pass of the rule autograd, circuits/attribution/autograd.py
HELD_ROWS = 64  # of the prompt in a pass that verifies, circuits/edges/measured.py
POSITIONS_AT_ONCE, GATHERED = 8, 60  # circuits/edges/features.py
ACTIVE = 36  # bytes per active feature that scores keep: position (a column of pairs), feature, 3 fp32 numbers


@dataclass(frozen=True)
class Ask:
    """A request: what is to be run, and how.

    Attributes:
        dtype: of the model's computation.
        tokens: of the prompt.
        batch: prompts at once, in `features` and `generate`.
        new: tokens generated.
        nodes: features of a graph; None: every active one.
        sample: nodes and edges that `trace` verifies; 0: none.
        sweep_tokens: of a sweep's batch; it takes fewer where memory is short.
        on: the kind of device; kernels differ.
    """

    model: ModelShape
    coders: SetShape
    tokens: int
    dtype: str = "bfloat16"
    batch: int = 1
    new: int = 256
    nodes: int | None = 10_000
    max_in_edges: int = 256
    sample: int = 200
    sweep_tokens: int = TOKENS_AT_ONCE
    on: On = "cuda"

    @property
    def item(self) -> int:
        """b."""
        return ITEM[self.dtype]

    @property
    def wide(self) -> int:
        """w: fp32, or fp64 where the model is."""
        return max(4, self.item)

    @property
    def active(self) -> int:
        """Active features of the prompt: S T k."""
        return self.coders.layers * self.tokens * self.coders.k

    @property
    def chosen(self) -> int:
        """Features that become nodes."""
        return self.active if self.nodes is None else min(self.nodes, self.active)


@dataclass(frozen=True)
class Step:
    """One step of a task, in bytes.

    Attributes:
        adds: tensors that stay after the step, by name.
        passing: the largest temporary memory during the step.
    """

    name: str
    passing: int
    adds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """A task's steps, in order. No figure includes the weights of model and transcoders."""

    task: Task
    steps: tuple[Step, ...]

    @property
    def kept(self) -> int:
        """Bytes that stay until the end."""
        return sum(sum(step.adds.values()) for step in self.steps)

    @property
    def peaks(self) -> dict[str, int]:
        """The largest memory in use in each step."""
        totals = accumulate(sum(step.adds.values()) for step in self.steps)
        return {step.name: total + step.passing for step, total in zip(self.steps, totals, strict=True)}

    @property
    def peak(self) -> int:
        """The largest memory in use."""
        return max(self.peaks.values())

    @property
    def passing(self) -> int:
        """The largest temporary memory of any step."""
        return max(step.passing for step in self.steps)


def work(ask: Ask, task: Task, *, edges_by_autograd: bool = False) -> Work:
    """The steps of a task. `edges_by_autograd`: for a quantised model, whose weights the edge algebra cannot read."""
    if task == "trace":
        return Work(task, tuple(_trace(ask, edges_by_autograd)))
    steps = {"features": _record, "generate": _generate, "sweep": _sweep}[task](ask)
    return Work(task, tuple(steps))


# -- parts -----------------------------------------------------------------------------------------------------------


def block_pass(ask: Ask, tokens: int) -> int:
    """One block while it runs, without gradients: three vectors of the MLP (or the attention's, where they are larger),
    the stream before the block, in its middle, normed, and as its input, and the rotation."""
    m = ask.model
    inside = max(3 * m.d_ff, 3 * m.query + 4 * m.keyvalue)
    return tokens * ask.item * (inside + 4 * m.d_model + 2 * m.d_head)


def saved_graph(ask: Ask, tokens: int) -> int:
    """The tensors that autograd saves in one pass: per block the MLP's three vectors, queries, keys, values and the
    attention's result, the inputs of the two norms (in fp32), and the recorded stream. No weight has a gradient, so the
    inputs of linear maps are not saved."""
    m, b = ask.model, ask.item
    streams = 2 * m.d_model * b if b >= 4 else m.d_model * (b + 2 * 4)
    return m.n_layers * tokens * (b * (3 * m.d_ff + 2 * m.query + 2 * m.keyvalue) + streams)


def backward_pass(ask: Ask, tokens: int) -> int:
    """One pass with its autograd graph and the beginning of the backward pass: the gradients of the logits, and of one
    MLP."""
    m, b = ask.model, ask.item
    logits = tokens * m.d_vocab * b
    down = 3 * m.d_ff + m.d_model + 2 * m.d_head
    return saved_graph(ask, tokens) + max(2 * logits, logits + tokens * b * down)


def encoding(ask: Ask, tokens: int) -> int:
    """Pre-activations with and without their bias, and the normed stream; on CUDA the selection's running count
    (int64 per feature) and, for half-precision weights, a product in two parts."""
    s, w = ask.coders, max(4, ask.coders.item)
    if ask.on == "cpu":
        return tokens * w * (2 * s.d_features + s.d_model) + widened(ask, tokens, s.d_features * s.d_model, s.item)
    return tokens * ((w + 8 + 4) * s.d_features + w * s.d_model)


def decoding(ask: Ask, tokens: int) -> int:
    """Half-precision decoders: rows that are cast to fp32; on a CPU also a dense table of activations."""
    s = ask.coders
    if s.item >= 4:
        return 0
    if ask.on == "cpu":
        dense = tokens * (4 * min(s.d_features, tokens * s.k) + 3 * 8 * s.k)
        return dense + 3 * cast_rows(ask, s.d_features * s.d_model, s.item) // 2
    return 6 * min(CAST_CHUNK, tokens * s.k * s.d_model)


def logits(ask: Ask, tokens: int) -> tuple[int, int]:
    """Bytes of logits, and of temporary memory for them: CUDA multiplies half-precision matrices in two parts."""
    m = ask.model
    kept = tokens * m.d_vocab * ask.wide
    parts = 2 * kept if ask.on == "cuda" and ask.item < 4 else widened(ask, tokens, m.d_vocab * m.d_model, ask.item)
    return kept, parts + tokens * m.d_model * ask.wide


def cast_rows(ask: Ask, numbers: int, item: int, most: int = CAST_BLOCK) -> int:
    """The buffer into which a CPU casts rows of a half-precision matrix."""
    return 4 * min(most, numbers) if ask.on == "cpu" and item < 4 else 0


def widened(ask: Ask, tokens: int, numbers: int, item: int) -> int:
    """The same for a product with every row of a matrix: none for few tokens, whose rows are widened in registers."""
    return 0 if tokens <= FEW else cast_rows(ask, numbers, item, CAST_TILE)


def gathered(ask: Ask) -> int:
    """The same for products of the edge algebra: no matrix of a block is larger."""
    return cast_rows(ask, ask.model.d_model * ask.model.d_ff, ask.item, CAST_TILE)


# -- tasks -----------------------------------------------------------------------------------------------------------


def _record(ask: Ask, *, streams: bool = False) -> list[Step]:
    """One pass whose streams are kept, then layer by layer the features. `streams`: the streams before every block are
    kept too."""
    m, s, tokens = ask.model, ask.coders, ask.batch * ask.tokens
    sites = s.sites
    if streams:
        sites = m.n_layers + 1 + (0 if s.edges == "here" or s.same_site else sites)
    kept, passing = logits(ask, tokens)
    w = max(4, s.item)
    features = s.layers * tokens * (w * s.d_model + (w + 8) * s.k)
    return [
        Step("forward pass", block_pass(ask, tokens), {"streams": sites * tokens * m.d_model * ask.item}),
        Step("logits", passing, {"logits": kept}),
        Step("encode", max(encoding(ask, tokens), decoding(ask, tokens)), {"features, reconstructions": features}),
    ]


def _generate(ask: Ask) -> list[Step]:
    m = ask.model
    cache = 2 * m.n_layers * ask.batch * (ask.tokens + ask.new) * m.keyvalue * ask.item
    one = cache // m.n_layers  # of one block: each step copies it, with one token more
    last = sum(logits(ask, ask.batch))
    steered = encoding(ask, ask.batch * ask.tokens)  # a steered layer needs all its pre-activations for exact TopK
    prompt = max(block_pass(ask, ask.batch * ask.tokens), steered)
    return [Step("prompt", prompt, {"keys and values": cache}), Step("next token", last + one)]


def _sweep(ask: Ask) -> list[Step]:
    """A recording that finds the features, a clean pass, and batches of rows with at most so many tokens in total."""
    m, T = ask.model, ask.tokens
    one = replace(ask, batch=1)
    kept, passing = logits(one, T)
    streams = (m.n_layers + 1) * T * m.d_model * ask.item
    clean = {
        "keys and values": 2 * m.n_layers * T * m.keyvalue * ask.item,
        "clean pass": streams + kept,
    }
    if ask.on == "cpu":
        clean["clean activations"] = ask.coders.layers * T * ask.coders.d_features * 8
    tokens = min(ask.sweep_tokens, ask.active * T)
    attention = tokens * 4 * (4 * m.query + 2 * m.keyvalue + 3 * m.n_heads * T)  # in fp32, whatever the model's dtype
    attention += tokens * ask.item * (2 * m.query + 2 * m.keyvalue + 3 * m.d_model)
    rows = tokens * m.d_model * 4 + max(block_pass(ask, tokens), attention)
    return [*_record(one), Step("clean pass", max(passing, block_pass(one, T)), clean), Step("rows", rows)]


def _trace(ask: Ask, by_autograd: bool) -> list[Step]:
    m, s, T = ask.model, ask.coders, ask.tokens
    one = replace(ask, batch=1)
    steps = _record(one, streams=True)
    if by_autograd:
        back, gradients = backward_pass(one, T), s.layers * T * m.d_model * ask.item
    else:
        back, gradients = _walk(ask), s.layers * T * m.d_model * ask.wide
        steps.append(Step("blocks", gathered(ask), {"what blocks computed": _stack(ask)}))
    steps.append(Step("score", back, {"gradients, scores": gradients + ACTIVE * ask.active}))
    rows = s.layers * T * 2 * m.d_model * ask.wide
    steps.append(Step("lay out", 4 * T * m.d_model * ask.wide, {"rest and error": rows + 20 * ask.chosen}))
    if by_autograd:
        copies = min(COPIES, _targets(ask))
        found = 2 * 4 * ask.chosen * (_targets(ask) + 2 * T + 1)  # all edges of the groups that share a pass
        steps.append(Step("edges", backward_pass(one, copies * T) + found))
    else:
        kept = _kept_edges(ask)
        steps += [Step("edges", _edges(ask) + kept, _tables(ask)), Step("keep", 2 * kept)]
    if ask.sample:
        tokens = min(HELD_ROWS, 2 * ask.sample + 2 * ask.sample // 15 + 1) * T  # one row in 16 is left as it is
        held = block_pass(one, tokens) + 2 * tokens * m.d_model * ask.item
        steps.append(Step("verify", max(back, held)))
    return steps


def _stack(ask: Ask) -> int:
    """`circuits.edges.stack.record_stack`, in fp32; the streams themselves are copied only in half precision."""
    m, T = ask.model, ask.tokens
    streams = m.d_model * (1 if ask.item >= 4 else 2)
    per_token = streams + m.query + 4 * m.keyvalue + 2 * m.d_ff + m.n_heads * T + 2
    return m.n_layers * T * per_token * ask.wide


def _walk(ask: Ask) -> int:
    """The gradient of one metric at every position while it is carried down the blocks: the larger of what an MLP and
    an attention take."""
    m, T = ask.model, ask.tokens
    mlp = T * (4 * m.d_ff + 4 * m.d_model)
    attention = T * (3 * m.n_heads * T + 4 * m.query + 4 * m.keyvalue + 4 * m.d_model)
    return ask.wide * max(mlp, attention) + gathered(ask)


def _targets(ask: Ask) -> int:
    """The mean number of nodes per layer."""
    return -(-ask.chosen // ask.coders.layers)


def _tables(ask: Ask) -> dict[str, int]:
    """Images of whole dictionaries in key and value space, which the store keeps once half of a dictionary is used."""
    s = ask.coders
    whole = s.edges == "middle" and 2 * _targets(ask) > s.d_features
    return {"images": s.layers * 2 * s.d_features * ask.model.keyvalue * ask.item} if whole else {}


def _kept_edges(ask: Ask) -> int:
    """The strongest edges of every node, in host memory: two numbers of 8 bytes and one of 4. A layer that reads the
    embedding has edges from tokens alone."""
    if ask.on == "cuda":
        return 0
    nodes, most = _targets(ask), min(ask.max_in_edges, MOST_EDGES // ask.chosen)
    above = ask.chosen - (nodes if ask.coders.edges != "walk" else 0)
    return 20 * (above * min(most, nodes + 2 * ask.tokens + 1) + (ask.chosen - above) * min(most, ask.tokens + 1))


def _edges(ask: Ask) -> int:
    """The edges into some targets of one layer: the largest of what the MLP, the attention and the products take."""
    m, s, T, w = ask.model, ask.coders, ask.tokens, ask.wide
    if s.edges == "walk":
        return gathered(ask) + _everywhere(ask)
    nodes = _targets(ask)
    sources = nodes + 2 * T + 1
    n = min(nodes, TARGETS_AT_ONCE, max(1, ENTRIES_AT_ONCE // sources))
    out = 3 * n * sources * w  # the edges, their absolute values, and one of the products they are summed from
    if s.edges == "here":
        return gathered(ask) + out + 4 * n * m.d_model * w
    slopes = T * m.d_ff * w
    mlp = max(5 * slopes, 2 * slopes + w * n * (3 * m.d_ff + 6 * m.d_model))
    attention = w * n * (4 * m.n_heads * T + 3 * m.query + m.d_model)
    held = w * n * (2 * m.n_heads * T + 3 * m.query + 2 * m.d_model + POSITIONS_AT_ONCE * m.keyvalue * 5 + 4 * T)
    images = 2 * w * min(nodes, s.d_features) * m.keyvalue + 4 * T * w * (m.d_model + 2 * m.keyvalue)
    probes = n + T
    met = probes * s.d_features if probes * s.d_features < GATHERED * nodes else 0
    return gathered(ask) + images + max(mlp, attention, held + out + w * (probes * m.d_model + met))


def _everywhere(ask: Ask) -> int:
    """Gradients at every position, carried through one attention; and through one MLP, if layers lack a transcoder.

    Half of a graph's nodes are chosen by score alone, so a layer may have one and a half times the mean number.
    """
    m, s, T, w = ask.model, ask.coders, ask.tokens, ask.wide
    nodes = 3 * _targets(ask) // 2
    sources = (s.layers + 1) // 2 * (nodes + 2 * T + 1)
    n = min(nodes, TARGETS_AT_ONCE, ENTRIES_AT_ONCE // sources + 1, STREAM_ENTRIES // (T * m.d_model) + 1)
    after = 6 * m.d_model + 2 * m.query + 2 * m.keyvalue
    inside = 2 * m.d_model + 4 * m.query + 3 * m.keyvalue + 3 * m.n_heads * T
    mlp = 2 * m.d_ff + 4 * m.d_model if s.layers < m.n_layers - 1 else 0
    return w * (n * T * max(after, inside, mlp) + 3 * n * sources + 2 * T * m.d_ff)


def host_tables(ask: Ask, task: Task) -> int:
    """About how much host memory `trace` and `sweep` use for tables and graphs in pandas and NumPy."""
    if task == "trace":
        return 6 * 8 * 4 * ask.active + 100 * min(ask.chosen * ask.max_in_edges, MOST_EDGES)
    return 8 * 16 * ask.active if task == "sweep" else 0


def tasks() -> Sequence[Task]:
    """All tasks, the one with the least memory first."""
    return ("features", "generate", "sweep", "trace")
