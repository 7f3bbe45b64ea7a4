"""Products with rows where they lie: the plain formula in fp64, whatever the blocks, the threads and the registers."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conventions import run_of
from torch import Tensor

from circuits.assemble import settle
from circuits.attribution import RULES, _features, _middle
from circuits.attribution._room import Room
from hooks import rows
from hooks.rows import add_products, cut_blocks, usable

pytest.importorskip("numba")
if rows._tiles() is None:
    pytest.skip("a CPU without AVX2", allow_module_level=True)


def plain(out: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], row: Tensor, blocks: Tensor, column: Tensor, step: int,
          rank_one: tuple[Tensor, Tensor] | None) -> Tensor:  # fmt: skip
    """The formula of the module, number by number of each block."""
    out = out.double()
    for first, targets, begin, end, left_row, a_column, _ in blocks.tolist():
        nodes = slice(begin, end)
        found = sum(
            left.double()[left_row : left_row + targets * step : step] @ table.double()[row[nodes]].T
            for left, table in pairs
        )
        if rank_one is not None:
            found = found + rank_one[0].double()[first : first + targets, a_column, None] * rank_one[1].double()[nodes]
        out[first : first + targets, nodes] += column.double()[nodes] * found
    return out


class Case:
    """Random blocks that tile a random part of a random result."""

    def __init__(self, seed: int, targets: int, nodes: int, inner: int, step: int, pairs: int, narrow: bool) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if narrow else torch.float32
        self.out, self.column, self.step = self.random(targets, nodes), self.random(nodes), step
        self.row = torch.randint(37, (nodes,), generator=self.draw)
        self.rank_one = (self.random(targets, 3), self.random(nodes))
        self.pairs = [(self.random(targets * step, inner), self.random(37, inner).to(dtype)) for _ in range(pairs)]
        up, across = targets // 3, nodes // 2
        blocks = [  # first, targets, begin, end, row on the left, column of a, what neighbours share
            [0, up, 0, across, step - 1, 2, 0],
            [0, up, across, nodes, 0, 0, 0],
            [up, targets - up, across, nodes, up * step, 1, 1],
        ]
        self.blocks = cut_blocks(torch.tensor(blocks), step)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def run(self, *, ranked: bool = True, fresh: bool = False) -> Tensor:
        out, rank_one = self.out.clone(), self.rank_one if ranked else None
        add_products(
            out, self.pairs, self.row, self.blocks, column=self.column, step=self.step, rank_one=rank_one, fresh=fresh
        )
        return out

    def expected(self, *, ranked: bool = True) -> Tensor:
        rank_one = self.rank_one if ranked else None
        return plain(self.out, self.pairs, self.row, self.blocks, self.column, self.step, rank_one)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), targets=st.integers(1, 30), nodes=st.integers(1, 60), lanes=st.integers(1, 5),
    step=st.integers(1, 3), pairs=st.integers(1, 2), narrow=st.booleans(), ranked=st.booleans(),
)  # fmt: skip
def test_blocks_of_any_shape_are_the_formula(seed, targets, nodes, lanes, step, pairs, narrow, ranked):
    case = Case(seed, targets, nodes, 16 * lanes, step, pairs, narrow)
    # fp32 sums of at most 160 products of numbers around 1
    torch.testing.assert_close(case.run(ranked=ranked).double(), case.expected(ranked=ranked), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_blocks_are_cut_and_rows_are_met_in_parts(narrow):
    case = Case(3, 700, 600, 2 * rows.INNER + 48, 1, 2, narrow)
    assert len(case.blocks) > 3
    assert int(case.blocks[:, 1].max()) <= rows.MOST
    assert int((case.blocks[:, 3] - case.blocks[:, 2]).max()) <= rows.MOST
    torch.testing.assert_close(case.run().double(), case.expected(), atol=3e-3, rtol=1e-5)  # 4,192 products each


def test_what_stood_there_can_be_forgotten():
    case = Case(2, 20, 30, rows.INNER + 16, 1, 2, narrow=False)
    before, covered = case.out, torch.zeros_like(case.out)
    for first, targets, begin, end, *_ in case.blocks.tolist():
        covered[first : first + targets, begin:end] = 1
    fresh = case.run(fresh=True)
    assert torch.equal(fresh[covered == 0], before[covered == 0])
    torch.testing.assert_close(fresh + before * covered, case.run(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("team", [True, False], ids=["torch's threads", "our own"])
def test_the_same_bytes_on_any_number_of_threads(threads, team, monkeypatch):
    case, before = Case(1, 40, 300, 64, 2, 2, narrow=False), torch.get_num_threads()
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
    add_products(
        out, [(torch.ones(2, 16), torch.ones(4, 16))], torch.zeros(3, dtype=torch.int64), torch.empty(0, 7).long()
    )
    assert torch.equal(out, torch.ones(2, 3))


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
from hooks import _tiles
assert _tiles.LANES == 8
for narrow in (False, True):
    case = Case(5, 20, 50, 24, 2, 2, narrow)
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
    rows._tiles.cache_clear()
    try:
        assert not usable(LEFT, TABLE, MUCH)
    finally:
        monkeypatch.undo()
        rows._tiles.cache_clear()


# -- the engine's two ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["exact", "affine", "relp"])
@pytest.mark.parametrize("max_nodes", [None, 150])
def test_every_edge_is_the_same_both_ways(rule, max_nodes, demo_dense, monkeypatch):
    """Whole dictionaries and a few features of them; every target group of a graph."""
    text = "fact: the capital of the state containing Dallas is"
    used: list[type] = []

    def edges(way: type) -> list[Tensor]:
        def choose(sources: _features.Sources) -> object:
            tables = (sources.cut.transcoder.W_dec, *sources.images)
            assert all(usable(sources.same, table, rows.WORTH_IT) for table in tables)
            used.append(way)
            return way(sources)

        monkeypatch.setattr(_middle, "features_of", choose)
        run = run_of(settle(demo_dense, text), max_nodes)
        return [each.weights.clone() for each in RULES[rule].edge_rows(run)]

    for lying, gathered in zip(edges(_features.Lying), edges(_features.Gathered), strict=True):
        torch.testing.assert_close(lying, gathered, atol=1e-5 * float(gathered.abs().max()), rtol=1e-4)
    assert set(used) == {_features.Lying, _features.Gathered}


def test_large_graphs_take_the_faster_way_by_themselves(demo_dense, monkeypatch):
    monkeypatch.setattr(rows, "WORTH_IT", 1)
    built = []
    monkeypatch.setattr(_features.Lying, "__init__", lambda self, sources: built.append(sources) or 1 / 0)
    run = run_of(settle(demo_dense, "fact: the capital of the state containing Dallas is"), 50)
    with pytest.raises(ZeroDivisionError):
        list(RULES["exact"].edge_rows(run))
    assert built


def test_room_is_used_again_only_when_nobody_holds_it():
    room, like = Room(), torch.ones(1)
    first = room.empty((3, 4), like)
    place = first.data_ptr()
    view = first[1:].fill_(5)
    del first
    assert room.empty((3, 4), like).data_ptr() != place  # a view still holds it
    assert bool((view == 5).all())
    second = room.empty((3, 4), like)
    place = second.fill_(2).data_ptr()
    del second
    again = room.empty((2, 3), like)
    assert again.data_ptr() == place
    assert again.shape == (2, 3)
    assert room.empty((2,), like.double()).dtype == torch.float64
    assert room.empty((2,), like.to("meta")).device.type == "meta"
