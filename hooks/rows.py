"""Products with rows of a table where they lie, on the CPU.

At 12 % density the features of one position are an eighth of a dictionary: gathering their rows costs as much as
multiplying by them, and a product with the whole dictionary is eight times what is asked for. `add_products` forms

    out[i, n] += column_n · (left_i · table[row_n] + a_i b_n)

for rectangles of (i, n), reading each row where it lies and writing each number once. It needs the optional package
numba (extra `cpu`) and a CPU with AVX2 or AVX-512; `usable` tells, and callers have another way.
"""

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger("hooks")

WORTH_IT = 1 << 28  # multiplications below which compiling, threads and lists of blocks cost more than they save
MOST = 256  # targets and nodes of a block: its results and what they are made of stay in a core's cache
PARTS = 16  # of the work for each thread, taken one after the other
INNER = 1024  # numbers of a row that are met at a time, so that eight rows stay next to the arithmetic


@cache
def _tiles() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        tiles = importlib.import_module("hooks._tiles")
    except (ImportError, RuntimeError) as error:  # a numba that does not fit NumPy, or nowhere to keep compiled code
        log.warning("numba cannot be used (%s): edges on the CPU are formed without it, more slowly", error)
        return None
    return tiles if tiles.LANES else None


def usable(left: Float[Tensor, "row d_model"], table: Float[Tensor, "feature inner"], multiplications: int) -> bool:
    """Whether `add_products` knows such vectors and this table, and whether so many multiplications are worth it."""
    known = left.dtype == torch.float32 and not left.requires_grad and multiplications >= WORTH_IT
    known = known and table.dtype in (torch.float32, torch.bfloat16) and table.stride(1) == 1
    if not known or not left.device.type == table.device.type == "cpu":
        return False
    tiles = _tiles()
    return tiles is not None and table.shape[1] > 0 and table.shape[1] % tiles.LANES == 0


def add_products(
    out: Float[Tensor, "target source"],
    pairs: Sequence[tuple[Float[Tensor, "row inner"], Float[Tensor, "feature inner"]]],
    row: Int[Tensor, " node"],
    blocks: Int[Tensor, "block 7"],
    *,
    column: Float[Tensor, " node"] | None = None,
    step: int = 1,
    rank_one: tuple[Float[Tensor, "target pos"], Float[Tensor, " node"]] | None = None,
    fresh: bool = False,
) -> None:
    """Add column_n (sum over pairs left_i · table[row_n] + a_i b_n) to out[i, n] for every (i, n) of some blocks.

    Every number is summed in one order, whatever the number of threads, of targets or of blocks.

    Args:
        out: changed in place; columns behind those of the nodes stay as they are.
        pairs: what lies left, and the table whose rows it meets.
        blocks: first target, number of targets, first node, end of the nodes, row on the left of the first target,
            column of a, and a number that neighbouring blocks share if they meet the same rows of the tables. Blocks
            do not overlap; at most `MOST` targets and nodes each (`cut_blocks`).
        column: ones if None.
        step: rows on the left from one target to the next.
        rank_one: a and b; nothing is added if None.
        fresh: whether what stands in the blocks' places is replaced, not added to.
    """
    tiles = _tiles()
    assert tiles is not None
    assert out.is_contiguous()
    if not len(blocks):
        return
    assert len({(table.dtype, table.stride()) for _, table in pairs}) == 1
    lefts, tables = [left.contiguous() for left, _ in pairs], [table for _, table in pairs]
    column = torch.ones(len(row)) if column is None else column.contiguous()
    a, b = (column, column) if rank_one is None else (each.contiguous() for each in rank_one)
    bounds = _parts(blocks, PARTS * torch.get_num_threads())
    numbers = {
        "parts": len(bounds) - 1,
        "most": int(blocks[:, 1].max()),
        "nodes": len(row),
        "sources": out.shape[1],
        "inner": lefts[0].shape[1],
        "step": step,
        "factors": rank_one is not None,
        "positions": 0 if rank_one is None else a.shape[1],
        "pairs": len(pairs),
        "next_row": tables[0].stride(0) * tables[0].element_size(),
        "narrow": tables[0].dtype == torch.bfloat16,
        "chunk": INNER,
        "fresh": fresh,
        "widest": int((blocks[:, 3] - blocks[:, 2]).max()),
    }
    arrays = {
        "taken": torch.zeros(1, dtype=torch.int64),
        "bounds": bounds,
        "blocks": blocks.contiguous(),
        "out": out,
        "left": torch.tensor([left.data_ptr() for left in lefts]),
        "table": torch.tensor([table.data_ptr() for table in tables]),
        "row": row.contiguous(),
        "column": column,
        "a": a,
        "b": b,
    }
    given = np.zeros(1, tiles.GIVEN)
    for name, value in (*numbers.items(), *((name, array.data_ptr()) for name, array in arrays.items())):
        given[name] = value
    _on_every_thread(tiles.work, given.ctypes.data)


def _parts(blocks: Int[Tensor, "block 7"], parts: int) -> Int[Tensor, " bound"]:
    """Where the blocks are divided into parts of about equal work."""
    work = (blocks[:, 1] * (blocks[:, 3] - blocks[:, 2])).cumsum(0)
    goals = work[-1] * torch.arange(1, parts) // parts
    ends = torch.tensor([0, len(blocks)])
    return torch.cat([ends[:1], torch.searchsorted(work, goals), ends[1:]])


def _on_every_thread(work: Any, address: int) -> None:
    """Run compiled code on each of torch's threads.

    Threads of our own would share the cores with torch's, which go on spinning for milliseconds after their last work.
    """
    threads, team = torch.get_num_threads(), _team()
    if team is not None:
        team(ctypes.c_void_p(work.address), ctypes.c_void_p(address), threads, 0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: work.ctypes(address), range(threads)))


@cache
def _team() -> Callable[..., None] | None:
    """The entry into the OpenMP runtime that this build of torch runs on; None where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None


def cut_blocks(blocks: Int[Tensor, "block 7"], step: int = 1) -> Int[Tensor, "_block 7"]:
    """Blocks of any size → blocks that `add_products` takes, in the same order."""
    sizes = -(-blocks[:, 1] // MOST)
    blocks, skip = blocks.repeat_interleave(sizes, 0), MOST * _within(sizes)
    first, count, begin, end, left_row, *others = blocks.T
    blocks = torch.stack([first + skip, (count - skip).clamp(max=MOST), begin, end, left_row + skip * step, *others], 1)
    sizes = -(-(blocks[:, 3] - blocks[:, 2]) // MOST)
    blocks, skip = blocks.repeat_interleave(sizes, 0), MOST * _within(sizes)
    first, count, begin, end, *others = blocks.T
    return torch.stack([first, count, begin + skip, end.minimum(begin + skip + MOST), *others], 1)


def _within(sizes: Int[Tensor, " block"]) -> Int[Tensor, " _block"]:
    """0, 1, ... size - 1 for each size."""
    starts = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
