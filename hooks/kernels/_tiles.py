"""Inner loops compiled by numba: dot products of a few vectors with a few rows of a table.

A tile computes the products of `LEFT` vectors with `ROWS` rows at once. Each number that is loaded is used three to
eight times, the sums stay in registers, and no row is copied. numba's own vectoriser does not keep such sums in
registers, so the tile is written in LLVM's vector types; everything around it is plain numba. Rows may be bf16: they
are widened when they are loaded. `rows_in_place` imports this file only where numba is installed. All compiled code is
in this one file, because numba's cache on disk does not notice changes in other files.
"""

from typing import no_type_check

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _lanes() -> int:
    """How many fp32 numbers a vector register holds; 0 if the tile does not support this CPU."""
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") and features.get("fma") else 0


LANES = _lanes()
LEFT, ROWS = 3, 8  # 24 sums: they fit into the 32 registers of a CPU with 16 lanes; with 8 lanes some are spilled
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTE = ir.IntType(8).as_pointer()


@no_type_check
def _make_tile(narrow: bool, lefts: int):
    """The intrinsic `tile(left, rows, ahead, share, count, out, stride)`: out[i, j] = sum_k left_i[k] rows_j[k].

    k < count. Meanwhile share / 2**16 of a row is prefetched from `ahead`.

    Args:
        narrow: whether rows are bf16.
        lefts: how many vectors. The outer loop is over them; each has one row of sums.
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
        left, rows, ahead, share, count, out, stride = args
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32")
        left = [b.inttoptr(b.extract_value(left, i), _BYTE) for i in range(lefts)]
        rows = [b.inttoptr(b.extract_value(rows, j), _BYTE) for j in range(ROWS)]
        fetch_type = ir.FunctionType(ir.VoidType(), [_BYTE, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(b.module, fetch_type, "llvm.prefetch.p0")
        ahead = b.inttoptr(ahead, _BYTE)
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        k = b.phi(_I64)
        sums = [[b.phi(vector) for _ in range(ROWS)] for _ in range(lefts)]
        xs = [load(b, vector, pointer, b.mul(k, _I64(4))) for pointer in left]
        new = [[None] * ROWS for _ in range(lefts)]
        for j, pointer in enumerate(rows):  # one row at a time, so that sums and vectors fit into the registers
            y = load_row(b, pointer, k)
            for i, x in enumerate(xs):
                new[i][j] = b.call(fma, [x, y, sums[i][j]])
        done = b.lshr(b.mul(b.mul(k, _I64(2 if narrow else 4)), share), _I64(16))
        b.call(fetch, [b.gep(ahead, [done]), _I32(0), _I32(2), _I32(1)])
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
    def tile(typing, left, rows, ahead, share, count, out, stride):
        pointers = (types.UniTuple(types.uintp, lefts), types.UniTuple(types.uintp, ROWS))
        return types.void(*pointers, types.uintp, types.intp, types.intp, types.uintp, types.intp), generate

    return tile


@no_type_check
def _sum_lanes(b, vectors):
    """The sum over the lanes of each vector, all sums as one vector. The number of vectors is a power of two: each step
    adds the halves of two neighbours."""
    width = lanes = vectors[0].type.count
    while width > 1:
        two = [(vectors[i], vectors[min(i + 1, len(vectors) - 1)]) for i in range(0, len(vectors), 2)]
        lanes = 2 * lanes if len(vectors) > 1 else lanes
        parts = ([n for n in range(lanes) if (n % width < width // 2) == low] for low in (True, False))
        low, high = (ir.Constant(ir.VectorType(_I32, len(part)), part) for part in parts)
        vectors = [b.fadd(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in two]
        lanes, width = vectors[0].type.count, width // 2
    return vectors[0]


_wide, _narrow = _make_tile(False, LEFT), _make_tile(True, LEFT)
_wide_2, _narrow_2 = _make_tile(False, 2), _make_tile(True, 2)  # for the last two vectors


@no_type_check
def _make_pointer(number, kind):
    """The intrinsic that turns an address into a pointer to numbers."""

    @no_type_check
    def generate(context, b, signature, args):
        return b.inttoptr(args[0], kind.as_pointer())

    @intrinsic
    @no_type_check
    def pointer(typing, address):
        return types.CPointer(number)(types.int64), generate

    return pointer


f32_at, i64_at = _make_pointer(types.float32, _F32), _make_pointer(types.int64, _I64)


@intrinsic
@no_type_check
def take_number(typing, counter):
    """Read a counter in memory and add one to it, atomically."""

    @no_type_check
    def generate(context, b, signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), _I64(1), "monotonic")

    return types.int64(types.int64), generate


@no_type_check
def given_type(numbers, places):
    """The record that compiled code gets: whole numbers, and addresses of contiguous arrays."""
    return np.dtype([(name, np.int64) for name in (*numbers, *places)])


@njit
@no_type_check
def dot_products(found, left, left_next, targets, base, next_row, row, begin, end, count, narrow):
    """found[i, j] = left_i · row_j for the nodes begin + j, over `count` numbers. left, base: addresses of the first
    vector and of the table's first row.

    Up to `ROWS` - 1 columns and `LEFT` - 1 rows after those of the block are overwritten.
    """
    found_at, found_next = found.ctypes.data, found.strides[0]
    # the next rows are prefetched meanwhile, in equal parts: one large prefetch would delay the other loads
    parts, bytes = max(1, -(-targets // LEFT) // ROWS), count * (2 if narrow else 4)
    share = (1 << 16) // parts
    for j in range(begin, end, ROWS):
        following, part = 0, 0
        last = end - j - 1  # a tile with fewer rows repeats its last row
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
            last, at = targets - i - 1, left + i * left_next
            lefts = (at, at + min(1, last) * left_next, at + min(2, last) * left_next)
            place, ahead = found_at + i * found_next + 4 * (j - begin), rows[0]
            if following < ROWS:
                ahead = base + row[min(j + ROWS + following, end - 1)] * next_row + part * bytes // parts
                part += 1
                if part == parts:
                    following, part = following + 1, 0
            if narrow and last == 1:
                _narrow_2((at, at + left_next), rows, ahead, share, count, place, found_next)
            elif narrow:
                _narrow(lefts, rows, ahead, share, count, place, found_next)
            elif last == 1:
                _wide_2((at, at + left_next), rows, ahead, share, count, place, found_next)
            else:
                _wide(lefts, rows, ahead, share, count, place, found_next)


@njit
@no_type_check
def _aligned(rows, columns):
    """An array whose rows are aligned to a vector register, if `columns` is a multiple of `LANES`."""
    room = np.empty(rows * columns + LANES, np.float32)
    skip = -room.ctypes.data // 4 % LANES
    return room[skip : skip + rows * columns].reshape(rows, columns)


NUMBERS = ("parts", "blocks", "most", "widest", "nodes", "sources", "inner", "next_row", "narrow", "chunk")
PLACES = ("taken", "bounds", "block", "out", "left", "table", "row")
GIVEN = given_type(NUMBERS, PLACES)


@njit
@no_type_check
def _add_blocks(given, begin_block, end_block, found):
    row, blocks = carray(i64_at(given.row), given.nodes), carray(i64_at(given.block), (given.blocks, 6))
    size, start = 2 if given.narrow else 4, begin_block
    while start < end_block:
        stop = start
        while stop < end_block and blocks[stop, 5] == blocks[start, 5]:
            stop += 1
        for k in range(0, given.inner, given.chunk):
            count, base = min(given.chunk, given.inner - k), given.table + k * size
            for n in range(start, stop):
                first, targets, begin, end, left_row, _ = blocks[n]
                left = given.left + 4 * (left_row * given.inner + k)
                dot_products(
                    found, left, 4 * given.inner, targets, base, given.next_row, row, begin, end, count, given.narrow
                )
                for i in range(targets):
                    into = carray(f32_at(given.out + 4 * ((first + i) * given.sources + begin)), end - begin)
                    for j in range(end - begin):
                        into[j] += found[i, j]
        start = stop


@cfunc(types.void(types.CPointer(from_dtype(GIVEN))), cache=True)
@no_type_check
def work(pointer):
    """What one thread of `rows_in_place.add_products` does: take part after part of the blocks until none is left."""
    given = carray(pointer, 1)[0]
    bounds = carray(i64_at(given.bounds), given.parts + 1)
    found = _aligned(given.most + LEFT, -(-given.widest // LANES) * LANES + LANES)
    part = take_number(given.taken)
    while part < given.parts:
        _add_blocks(given, bounds[part], bounds[part + 1], found)
        part = take_number(given.taken)


# -- edges through a block's attention ---------------------------------------------------------------------------------

HEAD_NUMBERS = (
    *("parts", "blocks", "most", "widest", "targets", "positions", "nodes", "sources", "inner", "next_row", "narrow"),
    *("chunk", "pairs", "heads", "group", "size", "fields", "norms", "key_norm", "d_model", "probes"),
)
HEAD_PLACES = (
    *("taken", "bounds", "block", "first", "out", "seen", "direct", "along", "activation", "scale", "row", "order"),
    *("table", "image", "weight", "vector", "cos", "sin", "gain", "unit", "unit_scale"),
)
GIVEN_HEADS = given_type(HEAD_NUMBERS, HEAD_PLACES)
FROZEN, EXACT = 1, 2  # key_norm; 0: there is none


@njit
@no_type_check
def _before_rotation(given, t, targets, left):
    """Gradients on the rotated keys → gradients on the keys before the rotation and before the head norm, if any."""
    heads, size = given.heads, given.size
    cos = carray(f32_at(given.cos), (given.positions, size))[t]
    sin = carray(f32_at(given.sin), (given.positions, size))[t]
    half = size // 2
    for i in range(targets):
        for h in range(heads):
            into = left[i, h * size : (h + 1) * size]
            for c in range(half):
                low, high = into[c], into[c + half]
                into[c] = low * cos[c] + high * sin[c + half]
                into[c + half] = high * cos[c + half] - low * sin[c]
            if given.key_norm:
                gain = carray(f32_at(given.gain), size)
                unit = carray(f32_at(given.unit), (given.positions, heads, size))[t, h]
                scale, mean = carray(f32_at(given.unit_scale), (given.positions, heads))[t, h], np.float32(0)
                for c in range(size):
                    into[c] *= gain[c]
                    mean += unit[c] * into[c]
                mean = mean / np.float32(size) if given.key_norm == EXACT else np.float32(0)
                for c in range(size):
                    into[c] = scale * (into[c] - unit[c] * mean)


@njit
@no_type_check
def _form(given, pair, t, first, targets, left):
    """v̄ (pair 0) or k̄ of some targets at position t: per key head h, sum_g weight[j, h, g, t] vector[j, h, g]."""
    heads, group, size = given.heads, given.group, given.size
    weights_at = carray(i64_at(given.weight), given.pairs)[pair]
    vectors_at = carray(i64_at(given.vector), given.pairs)[pair]
    for i in range(targets):
        for h in range(heads):
            part = ((first + i) * heads + h) * group
            into = carray(f32_at(left.ctypes.data + i * left.strides[0] + 4 * h * size), size)
            for g in range(group):
                weight = carray(f32_at(weights_at + 4 * ((part + g) * given.positions + t)), 1)[0]
                vector = carray(f32_at(vectors_at + 4 * (part + g) * size), size)
                if g == 0:
                    for c in range(size):
                        into[c] = weight * vector[c]
                else:
                    for c in range(size):
                        into[c] += weight * vector[c]
    if pair == 1:
        _before_rotation(given, t, targets, left)


@njit
@no_type_check
def _add_fields(given, pair, t, targets, left, found, few):
    """few[i, f] += v̄_i (pair 0) or k̄_i (pair 1) of target i at position t, times the image of field f there."""
    order, next_image = carray(i64_at(given.order), given.fields), 4 * given.positions * given.inner
    image = carray(i64_at(given.image), given.pairs)[pair] + 4 * t * given.inner
    for k in range(0, given.inner, given.chunk):
        count, at = min(given.chunk, given.inner - k), left.ctypes.data + 4 * k
        dot_products(
            found, at, left.strides[0], targets, image + 4 * k, next_image, order, 0, given.fields, count, False
        )
        for i in range(targets):
            for f in range(given.fields):
                few[i, f] += found[i, f]


@njit
@no_type_check
def _finish(given, into, t, begin, target, through):
    """Sums over values and keys → edges: times the norm's scale, minus the norm's response, plus the direct edges of
    targets at position t itself, times the activation."""
    firsts = carray(i64_at(given.first), given.positions + 1)
    direct = carray(f32_at(given.direct), (given.probes, given.nodes))
    activation, scale = carray(f32_at(given.activation), given.nodes), carray(f32_at(given.scale), given.positions)[t]
    if given.norms:
        stream, answer = direct[firsts[t + 1] - firsts[t]], -through / np.float32(given.d_model)
        for j in range(len(into)):
            into[j] += answer * stream[begin + j]
    if target < firsts[t + 1]:
        here = direct[target - firsts[t]]
        for j in range(len(into)):
            into[j] = activation[begin + j] * (scale * into[j] + here[begin + j])
    else:
        for j in range(len(into)):
            into[j] = activation[begin + j] * scale * into[j]


@njit
@no_type_check
def _fill_blocks(given, start, stop, left, found, few):
    """Fill the blocks `start` to `stop`, which have the same targets and the same position."""
    blocks, firsts = carray(i64_at(given.block), (given.blocks, 6)), carray(i64_at(given.first), given.positions + 1)
    tables, along = carray(i64_at(given.table), given.pairs), carray(f32_at(given.along), given.targets)
    row, size, sources = carray(i64_at(given.row), given.nodes), 2 if given.narrow else 4, given.sources
    seen = carray(f32_at(given.seen), (given.fields, given.targets, given.positions))
    first, targets, t = blocks[start, 0], blocks[start, 1], blocks[start, 5]
    chunks = -(-given.inner // given.chunk)
    for i in range(targets):
        for f in range(given.fields):
            few[i, f] = 0
    for number in range(given.pairs * chunks):
        pair, k, last = number // chunks, number % chunks * given.chunk, number == given.pairs * chunks - 1
        count, base = min(given.chunk, given.inner - k), tables[pair] + k * size
        if k == 0:
            _form(given, pair, t, first, targets, left)
            _add_fields(given, pair, t, targets, left, found, few)
        if last and given.norms:
            for i in range(min(targets, firsts[t + 1] - first)):  # targets at t itself
                few[i, given.fields - 1] += along[first + i]
        for n in range(start, stop):
            begin, end, at = blocks[n, 2], blocks[n, 3], left.ctypes.data + 4 * k
            dot_products(
                found, at, left.strides[0], targets, base, given.next_row, row, begin, end, count, given.narrow
            )
            for i in range(targets):
                into = carray(f32_at(given.out + 4 * ((first + i) * sources + begin)), end - begin)
                for j in range(end - begin):
                    into[j] = found[i, j] if number == 0 else into[j] + found[i, j]
                if last:
                    _finish(given, into, t, begin, first + i, few[i, given.fields - 1])
            if number == 0 and first == firsts[t]:  # a target has no edge from a later position
                for i in range(first):
                    into = carray(f32_at(given.out + 4 * (i * sources + begin)), end - begin)
                    for j in range(end - begin):
                        into[j] = 0
    for f in range(given.fields):
        for i in range(targets):
            seen[f, first + i, t] = few[i, f]


@cfunc(types.void(types.CPointer(from_dtype(GIVEN_HEADS))), cache=True)
@no_type_check
def work_heads(pointer):
    """What one thread of `circuits.edges.features.EdgesInPlace.put` does.

    What each name of `GIVEN_HEADS` means:

        block: its last column is the position t. Edges of its targets from nodes at t are filled in; targets before t
            get zeros.
        first: how many targets are before each position; the last entry is the number of targets.
        seen: products of v̄ and k̄ with the image of each field, [field target pos]; where norms respond, `along` is
            added to the last field.
        direct: products with the decoder rows at a position: of the gradients of the targets there, then of x̂ if norms
            respond.
        table, image: images of nodes, and of fields [field pos inner], in value space and in key space.
        weight, vector: v̄ and k̄ in factored form. cos, sin, gain, unit and unit_scale carry k̄ back to before rotation
            and head norm.
    """
    given = carray(pointer, 1)[0]
    bounds, blocks = carray(i64_at(given.bounds), given.parts + 1), carray(i64_at(given.block), (given.blocks, 6))
    # each row is one register longer than needed, so that neighbouring rows do not share the same sets of the cache
    left = _aligned(given.most + LEFT, given.inner + LANES)
    found = _aligned(given.most + LEFT, -(-max(given.widest, given.fields) // LANES) * LANES + LANES)
    few = np.empty((given.most, given.fields), np.float32)
    part = take_number(given.taken)
    while part < given.parts:
        start = bounds[part]
        while start < bounds[part + 1]:
            stop = start
            while (
                stop < bounds[part + 1] and blocks[stop, 0] == blocks[start, 0] and blocks[stop, 5] == blocks[start, 5]
            ):
                stop += 1
            _fill_blocks(given, start, stop, left, found, few)
            start = stop
        part = take_number(given.taken)
