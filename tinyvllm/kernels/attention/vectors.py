"""Attention's inner loops on the CPU, as LLVM instructions (kernels/llvm.py says why).

A loop that looks for the largest of many floats, or adds them up, is one long chain in which each step waits
for the one before. LLVM must not rearrange it, since that changes rounding. Here the arrangement is fixed by
hand: 16 lanes first, then halves are folded onto each other until one is left.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tinyvllm.kernels.llvm import (
    F32,
    F32X16,
    I32,
    I64,
    LANES,
    array_pointers,
    broadcast,
    counted_loop,
    element,
    halves,
    load,
    store,
)

__all__ = ["row_max", "row_sum", "make_value_tile"]


def _fold(builder, vector, combine):
    while isinstance(vector.type, ir.VectorType) and vector.type.count > 1:
        vector = combine(builder, *halves(builder, vector))
    return builder.extract_element(vector, I32(0))


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _sum(builder, a, b):
    return builder.fadd(a, b)


def _row_reduction(combine):
    """reduction(matrix, row) of a row of a float32 matrix whose width is a multiple of 16, at least 32."""

    @intrinsic
    def reduction(typingctx, matrix, row):
        def codegen(context, builder, signature, args):
            (matrix,), ((_, width),) = array_pointers(context, builder, signature, args, 1)
            start = builder.gep(matrix, [element(builder, args[1], width, I64(0), 4)])

            def next_lanes(i, lanes):
                following = load(builder, F32X16, start, builder.mul(i, I64(4 * LANES)))
                return [combine(builder, lanes[0], following)]

            first = load(builder, F32X16, start, I64(0))
            lanes, = counted_loop(builder, I64(1), builder.udiv(width, I64(LANES)), [first], next_lanes)
            return _fold(builder, lanes, combine)

        return types.float32(matrix, types.intp), codegen

    return reduction


row_max = _row_reduction(_larger)  # NaN is passed over; NaN in the first 16 may be kept
row_sum = _row_reduction(_sum)


def make_value_tile(rows: int, vectors: int):
    """value_tile(acc, weights, values, row, last_row, first_key, end_key, column), for use inside njit.

    acc[row + m, column : column + 16 * vectors] += weights[row + m, keys] @ values[keys, the same columns]
    for m in 0 .. rows and keys first_key .. end_key (at least one) in ascending order, one multiply-add a
    key. All are float32 and C-contiguous. Rows past last_row repeat it.
    """

    @intrinsic
    def value_tile(typingctx, acc, weights, values, row, last_row, first_key, end_key, column):
        def codegen(context, builder, signature, args):
            (acc, weights, values), shapes = array_pointers(context, builder, signature, args, 3)
            acc_width, weights_width, values_width = (width for _, width in shapes)
            row, last_row, first_key, end_key, column = args[3:]
            indices = [builder.add(row, I64(m)) for m in range(rows)]
            indices = [builder.select(builder.icmp_signed("<", i, last_row), i, last_row) for i in indices]
            columns = [builder.add(column, I64(LANES * v)) for v in range(vectors)]
            places = [element(builder, i, acc_width, c, 4) for i in indices for c in columns]
            weight_starts = [builder.gep(weights, [element(builder, i, weights_width, I64(0), 4)])
                             for i in indices]

            def add_key(key, totals):
                offset = builder.mul(key, I64(4))
                w = [broadcast(builder, load(builder, F32, start, offset)) for start in weight_starts]
                v = [load(builder, F32X16, values, element(builder, key, values_width, c, 4))
                     for c in columns]
                products = [builder.fmul(weight, value, flags=("contract",)) for weight in w for value in v]
                return [builder.fadd(total, product, flags=("contract",))
                        for total, product in zip(totals, products, strict=True)]

            initial = [load(builder, F32X16, acc, place) for place in places]
            totals = counted_loop(builder, first_key, end_key, initial, add_key)
            for total, place in zip(totals, places, strict=True):
                store(builder, total, acc, place)
            return context.get_dummy_value()

        return types.void(acc, weights, values, *[types.intp] * 5), codegen

    return value_tile
