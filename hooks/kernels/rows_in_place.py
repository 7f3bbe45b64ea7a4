"""Products with rows of a table, without copying the rows, on the CPU.

At 12 % density the features of one position are an eighth of a dictionary. Copying their rows costs as much as
multiplying by them, and a product with the whole dictionary is eight times the necessary work. `add_products` forms

    out[i, n] += left_i · table[row_n]

for rectangles of (i, n) and reads each row in place. It needs the optional package numba (extra `cpu`) and a CPU with
AVX2 or AVX-512. `usable` says whether both are there; if not, callers compute the same otherwise. `on_every_thread`
runs other code compiled with the same tiles (`hooks.kernels._tiles`).
"""

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger("hooks")

WORTH_IT = 1 << 28  # multiplications below which compiling, threads and lists of blocks cost more than they save
MOST = 256  # targets and nodes of a block, so that its operands and results stay in a core's cache
PARTS = 16  # parts of the work per thread; a thread takes the next part when it has done one
INNER = 1024  # numbers of a row that are multiplied at a time, so that eight rows stay in the fastest cache


@cache
def compiled() -> ModuleType | None:
    """The module with numba's compiled code; None where it cannot be used."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        tiles = importlib.import_module("hooks.kernels._tiles")
    except (ImportError, RuntimeError) as error:  # a numba that does not fit NumPy, or nowhere to keep compiled code
        log.warning("numba cannot be used (%s): edges on the CPU are formed without it, more slowly", error)
        return None
    return tiles if tiles.LANES else None


def usable(
    left: Float[Tensor, "row d_model"],
    table: Float[Tensor, "feature inner"],
    multiplications: int,
    worth: int | None = None,
) -> bool:
    """Whether `add_products` knows such vectors and this table, and whether so many multiplications are worth it."""
    known = left.dtype == torch.float32 and not left.requires_grad and multiplications >= (worth or WORTH_IT)
    known = known and table.dtype in (torch.float32, torch.bfloat16) and table.stride(1) == 1
    if not known or not left.device.type == table.device.type == "cpu":
        return False
    tiles = compiled()
    return tiles is not None and table.shape[1] > 0 and table.shape[1] % tiles.LANES == 0


def add_products(
    out: Float[Tensor, "target source"],
    left: Float[Tensor, "row inner"],
    table: Float[Tensor, "feature inner"],
    row: Int[Tensor, " node"],
    blocks: Int[Tensor, "block 6"],
) -> None:
    """Add left_i · table[row_n] to out[i, n] for every (i, n) of some blocks.

    Every number is summed in one order, whatever the number of threads, of targets or of blocks.

    Args:
        out: changed in place; columns after those of the nodes stay as they are.
        row: the row of the table that each node is.
        blocks: first target, number of targets, first node, end of the nodes, row on the left of the first target, and
            a number that neighbouring blocks share if they use about the same rows of the table. Blocks do not
            overlap; at most `MOST` targets and nodes each (`cut_blocks`).
    """
    tiles = compiled()
    assert tiles is not None
    assert out.is_contiguous()
    if not len(blocks):
        return
    numbers = {
        "blocks": len(blocks),
        "most": int(blocks[:, 1].max()),
        "widest": int((blocks[:, 3] - blocks[:, 2]).max()),
        "nodes": len(row),
        "sources": out.shape[1],
        "inner": left.shape[1],
        "next_row": table.stride(0) * table.element_size(),
        "narrow": table.dtype == torch.bfloat16,
        "chunk": INNER,
    }
    arrays = {"block": blocks.contiguous(), "out": out, "left": left.contiguous(), "row": row.contiguous()}
    work = blocks[:, 1] * (blocks[:, 3] - blocks[:, 2])
    on_every_thread(tiles.work, tiles.GIVEN, numbers, arrays | {"table": table}, work)


def products(x: Float[Tensor, "row inner"], table: Float[Tensor, "feature inner"]) -> Float[Tensor, "row feature"]:
    """`x @ table.T` with every row of the table where it is: a bf16 one is widened in registers, never stored."""
    blocks = _whole(len(x), len(table))
    out = torch.zeros(len(x), len(table))
    add_products(out, x, table, torch.arange(len(table)), blocks)
    return out


@lru_cache(64)
def _whole(targets: int, nodes: int) -> Int[Tensor, "block 6"]:
    """All targets with all nodes, as blocks for `add_products`."""
    start = torch.arange(0, nodes, MOST)
    zero = torch.zeros_like(start)
    every = torch.stack([zero, zero + targets, start, (start + MOST).clamp(max=nodes), zero, start // MOST], 1)
    return cut_blocks(every)


def on_every_thread(
    work: Any, kind: np.dtype, numbers: Mapping[str, int], arrays: Mapping[str, Tensor], each: Int[Tensor, " block"]
) -> None:
    """Run compiled code on each of torch's threads. Each takes part after part of some blocks until none is left.

    Threads of our own would compete with torch's threads, which keep spinning for milliseconds after their last work.

    Args:
        work: a function compiled by numba; its argument is the address of one record of type `kind`.
        numbers, arrays: entries of that record; "parts", "bounds" (where each part ends) and "taken" (how many parts
            are taken) are added here.
        each: the amount of work of each block; parts get about equal amounts.

    Raises:
        MemoryError: no thread could allocate memory for its results.
    """
    threads, team = torch.get_num_threads(), _team()
    bounds = _parts(each, PARTS * threads)
    held = {**arrays, "bounds": bounds, "taken": torch.zeros(1, dtype=torch.int64)}
    given = np.zeros(1, kind)
    places = ((name, array.data_ptr()) for name, array in held.items())
    for name, value in (*numbers.items(), ("parts", len(bounds) - 1), *places):
        given[name] = value
    if team is not None:
        team(ctypes.c_void_p(work.address), ctypes.c_void_p(given.ctypes.data), threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: work.ctypes(given.ctypes.data), range(threads)))
    # a thread that finds no part left has raised the counter once more; compiled code cannot raise an error itself
    if int(held["taken"]) < len(bounds):
        raise MemoryError("no thread could allocate the few MB that a block of edges takes")


def _parts(each: Int[Tensor, " block"], parts: int) -> Int[Tensor, " bound"]:
    """Indices of blocks at which parts of about equal work begin and end."""
    work = each.cumsum(0)
    goals = work[-1] * torch.arange(1, parts) // parts
    ends = torch.tensor([0, len(each)])
    return torch.cat([ends[:1], torch.searchsorted(work, goals), ends[1:]])


@cache
def _team() -> Callable[..., None] | None:
    """The function that starts a parallel region in torch's own OpenMP runtime; None where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None


def cut_blocks(blocks: Int[Tensor, "block 6"]) -> Int[Tensor, "_block 6"]:
    """Blocks of any size → blocks that `add_products` accepts, in the same order. All nodes of a group of targets stay
    next to each other."""
    sizes = -(-blocks[:, 1] // MOST)
    blocks, skip = blocks.repeat_interleave(sizes, 0), MOST * _within(sizes)
    first, count, begin, end, left_row, shared = blocks.T
    blocks = torch.stack([first + skip, (count - skip).clamp(max=MOST), begin, end, left_row + skip, shared], 1)
    sizes = (-(-(blocks[:, 3] - blocks[:, 2]) // MOST)).clamp(min=1)
    blocks, skip = blocks.repeat_interleave(sizes, 0), MOST * _within(sizes)
    first, count, begin, end, *others = blocks.T
    return torch.stack([first, count, begin + skip, end.minimum(begin + skip + MOST), *others], 1)


def _within(sizes: Int[Tensor, " block"]) -> Int[Tensor, " _block"]:
    """0, 1, ... size - 1 for each size."""
    starts = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
