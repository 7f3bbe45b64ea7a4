"""Products with rows where they lie: the plain formula in fp64, whatever the blocks, the threads and the registers."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conventions import run_of
from torch import Tensor
from worlds import ARCHITECTURES, random_transcoder, word_tokenizer

from circuits.attribution import RULES
from circuits.building import Setting, settle
from circuits.edges import LocalRun
from circuits.edges import features as _features
from circuits.edges import one_block as _middle
from circuits.edges.buffer import Buffer
from circuits.edges.one_block import project
from hooks import HookedModel
from hooks.kernels import add_products, cut_blocks, usable
from hooks.kernels import rows_in_place as rows

pytest.importorskip("numba")
if rows.compiled() is None:
    pytest.skip("a CPU without AVX2", allow_module_level=True)


def plain(out: Tensor, left: Tensor, table: Tensor, row: Tensor, blocks: Tensor) -> Tensor:
    """The formula of the module, number by number of each block."""
    out = out.double()
    for first, targets, begin, end, left_row, _ in blocks.tolist():
        nodes = slice(begin, end)
        found = left.double()[left_row : left_row + targets] @ table.double()[row[nodes]].T
        out[first : first + targets, nodes] += found
    return out


class Case:
    """Random blocks that tile a random part of a random result."""

    def __init__(self, seed: int, targets: int, nodes: int, inner: int, narrow: bool) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if narrow else torch.float32
        self.out, self.row = self.random(targets, nodes), torch.randint(37, (nodes,), generator=self.draw)
        self.left, self.table = self.random(targets + 2, inner), self.random(37, inner).to(dtype)
        up, across = targets // 3, nodes // 2
        blocks = [  # first, targets, begin, end, row on the left, what neighbours share
            [0, up, 0, across, 2, 0],
            [0, up, across, nodes, 0, 0],
            [up, targets - up, across, nodes, up + 1, 1],
        ]
        self.blocks = cut_blocks(torch.tensor(blocks))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def run(self) -> Tensor:
        out = self.out.clone()
        add_products(out, self.left, self.table, self.row, self.blocks)
        return out

    def expected(self) -> Tensor:
        return plain(self.out, self.left, self.table, self.row, self.blocks)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), targets=st.integers(1, 30), nodes=st.integers(1, 60), lanes=st.integers(1, 5),
    narrow=st.booleans(),
)  # fmt: skip
def test_blocks_of_any_shape_are_the_formula(seed, targets, nodes, lanes, narrow):
    case = Case(seed, targets, nodes, 16 * lanes, narrow)
    # fp32 sums of at most 80 products of numbers around 1
    torch.testing.assert_close(case.run().double(), case.expected(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_are_cut_and_rows_are_met_in_parts(narrow):
    case = Case(3, 700, 600, 2 * rows.INNER + 48, narrow)
    assert len(case.blocks) > 3
    assert int(case.blocks[:, 1].max()) <= rows.MOST
    assert int((case.blocks[:, 3] - case.blocks[:, 2]).max()) <= rows.MOST
    torch.testing.assert_close(case.run().double(), case.expected(), atol=3e-3, rtol=1e-5)  # 2,096 products each


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("team", [True, False], ids=["torch's threads", "our own"])
def test_the_same_bytes_on_any_number_of_threads(threads, team, monkeypatch):
    case, before = Case(1, 40, 300, 64, narrow=False), torch.get_num_threads()
    expected = case.run()
    if not team:
        monkeypatch.setattr(rows, "_team", lambda: None)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(case.run(), expected)
    finally:
        torch.set_num_threads(before)


def test_no_blocks_change_nothing():
    out = torch.ones(2, 3)
    none = torch.empty(0, 6, dtype=torch.int64)
    add_products(out, torch.ones(2, 16), torch.ones(4, 16), torch.zeros(3, dtype=torch.int64), none)
    assert torch.equal(out, torch.ones(2, 3))


def test_work_that_nobody_did_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(rows, "_team", lambda: lambda *_: None)
    with pytest.raises(MemoryError, match="no thread"):
        Case(1, 40, 300, 64, narrow=False).run()


SMALL_REGISTERS = """
from llvmlite import binding
real = binding.get_host_cpu_features
def fewer():
    features = real()
    features.update({name: False for name in features if name.startswith("avx512")})
    return features
binding.get_host_cpu_features = fewer
import torch
from test_rows import Case
from hooks.kernels import _tiles
assert _tiles.LANES == 8
for narrow in (False, True):
    case = Case(5, 20, 50, 24, narrow)
    torch.testing.assert_close(case.run().double(), case.expected(), atol=1e-4, rtol=1e-5)
"""


def test_registers_of_eight_numbers_give_the_same(tmp_path):
    """What a CPU without AVX-512 runs; numba's cache does not know of the difference, so it gets its own."""
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    where = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SMALL_REGISTERS], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- where it may not be used -----------------------------------------------------------------------------------------

LEFT, TABLE, MUCH = torch.ones(2, 32), torch.ones(3, 32), rows.WORTH_IT


@pytest.mark.parametrize(
    ("left", "table", "work"),
    [
        (LEFT, TABLE, MUCH - 1),
        (LEFT.double(), TABLE, MUCH),
        (LEFT, TABLE.double(), MUCH),
        (LEFT, TABLE.half(), MUCH),
        (LEFT, torch.ones(3, 40), MUCH),
        (LEFT, torch.ones(32, 3).T, MUCH),
        (LEFT.to("meta"), TABLE, MUCH),
        (LEFT, TABLE.to("meta"), MUCH),
        (LEFT.clone().requires_grad_(), TABLE, MUCH),
    ],
)
def test_it_knows_what_it_does_not_know(left, table, work):
    assert usable(LEFT, TABLE, MUCH)
    assert usable(LEFT, TABLE.bfloat16(), MUCH)
    assert not usable(left, table, work)


def test_without_numba_there_is_the_other_way(monkeypatch):
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    rows.compiled.cache_clear()
    try:
        assert not usable(LEFT, TABLE, MUCH)
    finally:
        monkeypatch.undo()
        rows.compiled.cache_clear()


# -- the engine's two ways --------------------------------------------------------------------------------------------

TEXT = "fact: the capital of the state containing Dallas is"


@cache
def setting(kind: str, dtype: torch.dtype) -> Setting:
    """Three random blocks with grouped queries and transcoders on a random prompt."""
    make_config, make_model = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, initializer_range=0.15,
    )  # fmt: skip
    model = make_model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    coders = [random_transcoder(layer, 48, k=24, dtype=dtype) for layer in range(3)]
    hooked = HookedModel.from_model(model.to(dtype), word_tokenizer(), coders)
    return settle(hooked, "w1 w2 w9 w4 w2 w7 w1")


def edges_by(way: type, run: LocalRun, rule: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every block of edges of a graph, each formed in one way."""
    used = []

    def choose(sources: _features.Sources) -> object:
        assert all(
            usable(sources.same, table, rows.WORTH_IT) for table in (sources.cut.transcoder.W_dec, *sources.images)
        )
        used.append(sources)
        return way(sources)

    with monkeypatch.context() as patch:
        patch.setattr(_middle, "features_of", choose)
        found = [each.weights.clone() for each in RULES[rule].edge_rows(run)]
    assert used
    return found


def assert_same_both_ways(run: LocalRun, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lying, gathered = (edges_by(way, run, rule, monkeypatch) for way in (_features.EdgesInPlace, _features.Gathered))
    for ours, plain_way in zip(lying, gathered, strict=True):
        torch.testing.assert_close(ours, plain_way, atol=1e-5 * float(plain_way.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("rule", ["exact", "affine", "relp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_edge_is_the_same_both_ways(kind, dtype, rule, monkeypatch):
    """Norms held or not, patterns held or not, keys normed or not; whole dictionaries and a few features of them."""
    whole = run_of(setting(kind, dtype))
    for run in (whole, run_of(setting(kind, dtype), 40)):
        assert_same_both_ways(run, rule, monkeypatch)
    tables = project(whole.model.store, whole.cuts[0], whole.stack.blocks[0], RULES[rule].RULE).images
    assert all(table.dtype == dtype for table in tables)  # half precision was met


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_many_small_blocks_give_the_same(kind, monkeypatch):
    """Targets, nodes, numbers of a row and features in several parts each, on more threads than there are cores."""
    run = run_of(setting(kind, torch.float32))
    whole = edges_by(_features.EdgesInPlace, run, "exact", monkeypatch)
    monkeypatch.setattr(rows, "MOST", 5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            for one, other in zip(whole, edges_by(_features.EdgesInPlace, run, "exact", monkeypatch), strict=True):
                assert torch.equal(one, other)  # however blocks are cut
    finally:
        torch.set_num_threads(before)
    for place, name, value in ((rows, "INNER", 16), (_features, "INNER", 16), (_features, "FEATURES_AT_ONCE", 7)):
        monkeypatch.setattr(place, name, value)
    assert_same_both_ways(run, "exact", monkeypatch)


@pytest.mark.parametrize("max_nodes", [None, 150])
def test_a_graph_of_the_demo_is_the_same_both_ways(max_nodes, demo_dense, monkeypatch):
    assert_same_both_ways(run_of(settle(demo_dense, TEXT), max_nodes), "exact", monkeypatch)


def test_positions_without_features_still_have_rest_and_error(monkeypatch):
    """One feature in all of the prompt: rest and error of every other position are met all the same."""
    assert_same_both_ways(run_of(setting("qwen2", torch.float32), 3), "exact", monkeypatch)


def test_large_graphs_take_the_faster_way_by_themselves(demo_dense, monkeypatch):
    monkeypatch.setattr(rows, "WORTH_IT", 1)
    built = []
    monkeypatch.setattr(_features.EdgesInPlace, "__init__", lambda self, sources: built.append(sources) or 1 / 0)
    run = run_of(settle(demo_dense, TEXT), 50)
    with pytest.raises(ZeroDivisionError):
        list(RULES["exact"].edge_rows(run))
    assert built


def test_a_buffer_is_used_again_only_when_no_tensor_uses_it():
    buffer, like = Buffer(), torch.ones(1)
    first = buffer.empty((3, 4), like)
    place = first.data_ptr()
    view = first[1:].fill_(5)
    del first
    assert buffer.empty((3, 4), like).data_ptr() != place  # a view still holds it
    assert bool((view == 5).all())
    second = buffer.empty((3, 4), like)
    place = second.fill_(2).data_ptr()
    del second
    again = buffer.empty((2, 3), like)
    assert again.data_ptr() == place
    assert again.shape == (2, 3)
    assert buffer.empty((2,), like.double()).dtype == torch.float64
    assert buffer.empty((2,), like.to("meta")).device.type == "meta"
