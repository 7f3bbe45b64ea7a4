"""The inner loop of `hooks.rows`, compiled by numba: dot products of a few vectors with a few rows of a table.

A tile takes `LEFT` vectors and `ROWS` rows at once: each number that is loaded meets three to eight others, the sums
stay in registers, and no row is copied anywhere. numba's own vectoriser does not keep such sums in registers, so the
tile is written in LLVM's vector types; everything around it is plain numba. Rows may be bf16: they are widened as they
are loaded. Only imported where numba is installed (`hooks.rows`).
"""

from typing import no_type_check

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _lanes() -> int:
    """fp32 numbers in a vector register; 0: a CPU that the tile was not written for."""
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") and features.get("fma") else 0


LANES = _lanes()
LEFT, ROWS = 3, 8  # 24 sums of the 32 registers there are with 16 lanes; with 8 lanes some are spilled
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTE = ir.IntType(8).as_pointer()


@no_type_check
def _make_tile(narrow: bool):
    """The intrinsic `tile(left, rows, count, out, stride)`: out[i, j] = sum_k left_i[k] rows_j[k], k < count.

    Args:
        narrow: whether rows are bf16.
    """
    vector = ir.VectorType(_F32, LANES)

    @no_type_check
    def load(b, kind, pointer, offset):
        found = b.load(b.bitcast(b.gep(pointer, [offset]), kind.as_pointer()))
        found.align = 2 if kind.element is _I16 else 4
        return found

    @no_type_check
    def load_row(b, pointer, k):
        if not narrow:
            return load(b, vector, pointer, b.mul(k, _I64(4)))
        wide = ir.VectorType(_I32, LANES)
        bits = b.zext(load(b, ir.VectorType(_I16, LANES), pointer, b.mul(k, _I64(2))), wide)
        return b.bitcast(b.shl(bits, wide([16] * LANES)), vector)

    @no_type_check
    def generate(context, b, signature, args):
        left, rows, ahead, count, out, stride = args
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32")
        left = [b.inttoptr(b.extract_value(left, i), _BYTE) for i in range(LEFT)]
        rows = [b.inttoptr(b.extract_value(rows, j), _BYTE) for j in range(ROWS)]
        fetch_type = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(b.module, fetch_type, "llvm.prefetch.p0")
        ahead = b.inttoptr(ahead, _BYTE)
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        k = b.phi(_I64)
        sums = [[b.phi(vector) for _ in range(ROWS)] for _ in range(LEFT)]
        xs = [load(b, vector, pointer, b.mul(k, _I64(4))) for pointer in left]
        new = [[None] * ROWS for _ in range(LEFT)]
        for j, pointer in enumerate(rows):  # one row at a time, so that sums and vectors fit into the registers
            y = load_row(b, pointer, k)
            for i, x in enumerate(xs):
                new[i][j] = b.call(fma, [x, y, sums[i][j]])
        b.call(fetch, [b.gep(ahead, [b.mul(k, _I64(2 if narrow else 4))]), _I32(0), _I32(2), _I32(1)])
        following = b.add(k, _I64(LANES))
        k.add_incoming(_I64(0), before)
        k.add_incoming(following, loop)
        for row, increased in zip(sums, new):
            for total, then in zip(row, increased):
                total.add_incoming(vector([0.0] * LANES), before)
                total.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, count), loop, after)
        b.position_at_end(after)
        place = b.inttoptr(out, _BYTE)
        for i, row in enumerate(new):
            found = _sum_lanes(b, row)
            target = b.bitcast(b.gep(place, [b.mul(stride, _I64(i))]), found.type.as_pointer())
            b.store(found, target).align = 4
        return context.get_dummy_value()

    @intrinsic
    @no_type_check
    def tile(typing, left, rows, ahead, count, out, stride):
        pointers = (types.UniTuple(types.uintp, LEFT), types.UniTuple(types.uintp, ROWS))
        return types.void(*pointers, types.uintp, types.intp, types.uintp, types.intp), generate

    return tile


@no_type_check
def _sum_lanes(b, vectors):
    """The sum over the lanes of each of a power of two of vectors, as one vector: neighbours are halved together."""
    width = lanes = vectors[0].type.count
    while width > 1:
        two = [(vectors[i], vectors[min(i + 1, len(vectors) - 1)]) for i in range(0, len(vectors), 2)]
        lanes = 2 * lanes if len(vectors) > 1 else lanes
        parts = ([n for n in range(lanes) if (n % width < width // 2) == low] for low in (True, False))
        low, high = (ir.Constant(ir.VectorType(_I32, len(part)), part) for part in parts)
        vectors = [b.fadd(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in two]
        lanes, width = vectors[0].type.count, width // 2
    return vectors[0]


_wide, _narrow = _make_tile(False), _make_tile(True)


@no_type_check
def _make_pointer(number, kind):
    """The intrinsic that takes an address for a pointer to numbers."""

    @no_type_check
    def generate(context, b, signature, args):
        return b.inttoptr(args[0], kind.as_pointer())

    @intrinsic
    @no_type_check
    def pointer(typing, address):
        return types.CPointer(number)(types.int64), generate

    return pointer


_f32, _i64 = _make_pointer(types.float32, _F32), _make_pointer(types.int64, _I64)


@intrinsic
@no_type_check
def _take_number(typing, counter):
    """Read a counter in memory and raise it, in one step that no other thread comes between."""

    @no_type_check
    def generate(context, b, signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), _I64(1), "monotonic")

    return types.int64(types.int64), generate


NUMBERS = (
    "parts",
    "most",
    "nodes",
    "sources",
    "inner",
    "step",
    "factors",
    "positions",
    "pairs",
    "next_row",
    "narrow",
    "chunk",
    "fresh",
    "widest",
)
PLACES = ("taken", "bounds", "blocks", "out", "left", "table", "row", "column", "a", "b")
GIVEN = np.dtype([(name, np.int64) for name in (*NUMBERS, *PLACES)])  # what `work` is given; places are addresses


@njit
@no_type_check
def _add_blocks(given, begin_block, end_block, room):
    row, column = carray(_i64(given.row), given.nodes), carray(_f32(given.column), given.nodes)
    lefts_at, tables_at = carray(_i64(given.left), given.pairs), carray(_i64(given.table), given.pairs)
    b, next_row, size = carray(_f32(given.b), given.nodes), given.next_row, 2 if given.narrow else 4
    left_next, room_at, room_next = 4 * given.inner * given.step, room.ctypes.data, room.strides[0]
    start = begin_block
    while start < end_block:
        group, stop = carray(_i64(given.blocks + 56 * start), 7)[6], start
        while stop < end_block and carray(_i64(given.blocks + 56 * stop), 7)[6] == group:
            stop += 1
        chunks = -(-given.inner // given.chunk)
        for number in range(given.pairs * chunks):
            pair, k = number // chunks, number % chunks * given.chunk
            count, base = min(given.chunk, given.inner - k), tables_at[pair] + k * size
            for n in range(start, stop):
                first, targets, begin, end, left_row, a_column, _ = carray(_i64(given.blocks + 56 * n), 7)
                left_at = lefts_at[pair] + 4 * (left_row * given.inner + k)
                for j in range(begin, end, ROWS):
                    last = end - j - 1  # a short tile meets its last row several times over
                    rows = (
                        base + row[j] * next_row,
                        base + row[j + min(1, last)] * next_row,
                        base + row[j + min(2, last)] * next_row,
                        base + row[j + min(3, last)] * next_row,
                        base + row[j + min(4, last)] * next_row,
                        base + row[j + min(5, last)] * next_row,
                        base + row[j + min(6, last)] * next_row,
                        base + row[j + min(7, last)] * next_row,
                    )
                    for i in range(0, targets, LEFT):
                        last, at = targets - i - 1, left_at + i * left_next
                        lefts = (at, at + min(1, last) * left_next, at + min(2, last) * left_next)
                        place, ahead = room_at + i * room_next + 4 * (j - begin), rows[0]
                        if i < LEFT * ROWS:  # one of the next rows, to be fetched meanwhile
                            ahead = base + row[min(j + ROWS + i // LEFT, end - 1)] * next_row
                        if given.narrow:
                            _narrow(lefts, rows, ahead, count, place, room_next)
                        else:
                            _wide(lefts, rows, ahead, count, place, room_next)
                for i in range(targets):
                    factor, found = np.float32(0), room[i]
                    if number == 0 and given.factors:
                        factor = carray(_f32(given.a + 4 * ((first + i) * given.positions + a_column)), 1)[0]
                    into = carray(_f32(given.out + 4 * ((first + i) * given.sources + begin)), end - begin)
                    if number == 0 and given.fresh:
                        for j in range(end - begin):
                            into[j] = column[begin + j] * (found[j] + factor * b[begin + j])
                    else:
                        for j in range(end - begin):
                            into[j] += column[begin + j] * (found[j] + factor * b[begin + j])
        start = stop


@cfunc(types.void(types.CPointer(from_dtype(GIVEN))), cache=True)
@no_type_check
def work(pointer):
    """`hooks.rows.add_products` for one thread of several: take part after part of the blocks until none is left."""
    given = carray(pointer, 1)[0]
    bounds = carray(_i64(given.bounds), given.parts + 1)
    room = np.empty((given.most + LEFT, given.widest + ROWS), np.float32)
    part = _take_number(given.taken)
    while part < given.parts:
        _add_blocks(given, bounds[part], bounds[part + 1], room)
        part = _take_number(given.taken)
