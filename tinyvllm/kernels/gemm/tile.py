"""The inner loop of the CPU's matrix products: a tile of sums in vector registers, as LLVM instructions.

A *tile* is a small block of sums, `rows` inputs by `panels` * 16 outputs, that stays in registers while one
loop runs over the pairs of k (packing.py draws the layout of the weight):

    for each pair:   load one vector a panel                                   16 outputs x 2 values of k
                     for each row:  copy the row's two values to all lanes
                                    for each panel:  sums[row, panel] += both products        <- the step

With 8 rows x 2 panels, ten loads feed sixteen steps. There are two kinds of step:

    dpbf16   vdpbf16ps, the bf16 dot-product instruction (avx512_bf16: AMD Zen 4 and 5, Intel since Cooper
             Lake). The order and rounding inside a step are the processor's, and it takes subnormal numbers
             for zero.
    plain    any processor: widen by shift and mask, then two multiply-adds in float32, k ascending. LLVM cuts
             the 16 lanes into what the machine has (AVX2: two registers, NEON: four).

TINYVLLM_CPU_LINEAR = auto | dpbf16 | plain chooses; auto, the default, is dpbf16 where the processor has it.

Whatever the shape of the tile, each sum starts from zero and takes one step a pair, in ascending order, and
shares nothing with its neighbours. So it has the same bits in every tile, at every place.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
"""

import os
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import codegen, config
from numba.extending import intrinsic

from tinyvllm.errors import ConfigError
from tinyvllm.kernels.gemm.packing import PANEL
from tinyvllm.kernels.llvm import (
    F32,
    F32X16,
    I8P,
    I32,
    I32X16,
    I64,
    array_pointers,
    broadcast,
    counted_loop,
    element,
    function,
    load,
    store,
)

__all__ = ["make_tile", "pack_block", "processor_has", "DPBF16", "PLAIN", "STEP"]

PREFETCH = 4096  # bytes ahead in each panel: the processor's own prefetching stops at the end of a page


class _BFloat(ir.Type):
    """LLVM's bfloat type, which llvmlite has no class for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_BF16X32 = ir.VectorType(_BFloat(), 2 * PANEL)


# ---- the two steps ----


class _Dpbf16Step:
    """sums + x[2j] * w[2j] + x[2j + 1] * w[2j + 1] in 16 lanes, by one instruction."""

    def weights(self, builder, pairs):  # <16 x i32>: each lane holds two bf16 of one output
        return builder.bitcast(pairs, _BF16X32)

    def inputs(self, builder, pair):  # i32: two bf16 of one row
        return builder.bitcast(broadcast(builder, pair), _BF16X32)

    def add(self, builder, sums, x, w):
        dot = function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X16, [F32X16, _BF16X32, _BF16X32])
        return builder.call(dot, [sums, w, x])


class _PlainStep:
    """The same by shift, mask and two multiply-adds (fused where the processor can)."""

    def weights(self, builder, pairs):
        even = builder.shl(pairs, ir.Constant(I32X16, [16] * PANEL))
        odd = builder.and_(pairs, ir.Constant(I32X16, [0xFFFF0000] * PANEL))
        return [builder.bitcast(half, F32X16) for half in (even, odd)]

    def inputs(self, builder, pair):
        halves = builder.shl(pair, I32(16)), builder.and_(pair, I32(0xFFFF0000))
        return [broadcast(builder, builder.bitcast(half, F32)) for half in halves]

    def add(self, builder, sums, x, w):
        for x_half, w_half in zip(x, w, strict=True):
            product = builder.fmul(x_half, w_half, flags=("contract",))
            sums = builder.fadd(sums, product, flags=("contract",))
        return sums


def processor_has(feature: str) -> bool:
    """Whether numba may use an instruction set extension here, by LLVM's name for it (e.g. "avx512bf16")."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return f"+{feature}" in features.split(",")


PLAIN = _PlainStep()
DPBF16 = _Dpbf16Step() if processor_has("avx512bf16") else None


def _choose_step():
    wanted = os.environ.get("TINYVLLM_CPU_LINEAR", "auto")
    if wanted not in ("auto", "dpbf16", "plain"):
        raise ConfigError(f"TINYVLLM_CPU_LINEAR is {wanted!r}; it can be auto, dpbf16 or plain")
    if wanted == "dpbf16" and DPBF16 is None:
        raise ConfigError("TINYVLLM_CPU_LINEAR is dpbf16, and this processor has no avx512_bf16; "
                          "use auto or plain")
    return PLAIN if wanted == "plain" else DPBF16 or PLAIN


STEP = _choose_step()


# ---- the tile ----


def make_tile(rows: int, panels: int, step) -> Callable:
    """tile(sums, x, weight, row, panel, to_row, to_column), for use inside njit.

    Fills sums[to_row : to_row + rows, to_column : to_column + 16 * panels] (float32, C-contiguous) with the
    products of x[row : row + rows] (uint16 [T, K], K even) and the packed weight's panels from `panel` on.
    Rows past the last one of x, and panels past the last one, repeat the last: edges need no tile of their
    own, the caller leaves what is too much.
    """

    @intrinsic
    def tile(typingctx, sums, x, weight, row, panel, to_row, to_column):
        def codegen(context, builder, signature, args):
            (sums, x, weight), shapes = array_pointers(context, builder, signature, args, 3)
            (_, sums_width), (num_rows, num_columns), (num_panels, num_pairs, _) = shapes
            row, panel, to_row, to_column = args[3:]

            def starts(base, first, count, limit, size):  # addresses of `count` things of `size` bytes
                last = builder.sub(limit, I64(1))
                for i in range(count):
                    index = builder.add(first, I64(i))
                    index = builder.select(builder.icmp_signed("<", index, last), index, last)
                    yield builder.gep(base, [builder.mul(index, size)])

            x_starts = list(starts(x, row, rows, num_rows, builder.mul(num_columns, I64(2))))
            w_starts = list(starts(weight, panel, panels, num_panels, builder.mul(num_pairs, I64(4 * PANEL))))
            cells = [(m, p) for m in range(rows) for p in range(panels)]

            prefetch = function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [I8P, I32, I32, I32])

            def add_pair(pair, totals):
                w_offset, x_offset = builder.mul(pair, I64(4 * PANEL)), builder.mul(pair, I64(4))
                for start in w_starts:  # for reading, into the nearest cache, data
                    ahead = builder.gep(start, [builder.add(w_offset, I64(PREFETCH))])
                    builder.call(prefetch, [ahead, I32(0), I32(3), I32(1)])
                w = [step.weights(builder, load(builder, I32X16, start, w_offset, 2)) for start in w_starts]
                x = [step.inputs(builder, load(builder, I32, start, x_offset, 2)) for start in x_starts]
                return [step.add(builder, total, x[m], w[p])
                        for total, (m, p) in zip(totals, cells, strict=True)]

            zeros = [ir.Constant(F32X16, [0.0] * PANEL)] * len(cells)
            totals = counted_loop(builder, I64(0), num_pairs, zeros, add_pair)
            for total, (m, p) in zip(totals, cells, strict=True):
                row, column = builder.add(to_row, I64(m)), builder.add(to_column, I64(PANEL * p))
                store(builder, total, sums, element(builder, row, sums_width, column, 4))
            return context.get_dummy_value()

        index = types.intp
        return types.void(sums, x, weight, index, index, index, index), codegen

    return tile


@intrinsic
def pack_block(typingctx, packed, rows, panel, pair):
    """Pack 16 rows x 8 pairs: packed[panel, pair : pair + 8] from rows[16 * panel : 16 * panel + 16].

    rows: uint16 [N, K], K even. A transposition of 32-bit words in registers: interleaving rows r and r + 8,
    then the results of r and r + 4, of r and r + 2, and of r and r + 1, brings all sixteen values of a column
    together, in order:

        r: a0 a1 ..   r + 8: b0 b1 ..   ->   a0 b0 a1 b1 ..   ->   four rows a column -> eight -> sixteen
    """

    def codegen(context, builder, signature, args):
        (packed, rows), ((_, num_pairs, _), (_, width)) = array_pointers(context, builder, signature, args, 2)
        row_pairs = builder.udiv(width, I64(2))
        panel, pair = args[2:]

        def interleave(a, b, first, count):
            pattern = [index for i in range(first, first + count) for index in (i, a.type.count + i)]
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * count), pattern))

        first_row = builder.mul(panel, I64(PANEL))
        loaded = []
        for r in range(PANEL):
            offset = element(builder, builder.add(first_row, I64(r)), row_pairs, pair, 4)
            loaded.append(load(builder, ir.VectorType(I32, 8), rows, offset, 2))
        # After each round: groups[r] holds, in one vector or several, whole columns of rows r, r + distance,
        # ...
        groups = [[interleave(loaded[r], loaded[r + 8], 0, 8)] for r in range(8)]
        for distance in (4, 2, 1):
            groups = [[interleave(a, b, first, 8)
                       for a, b in zip(groups[r], groups[r + distance], strict=True) for first in (0, 8)]
                      for r in range(distance)]
        start = builder.add(builder.mul(panel, num_pairs), pair)
        for column, vector in enumerate(groups[0]):
            store(builder, vector, packed, builder.mul(builder.add(start, I64(column)), I64(4 * PANEL)), 2)
        return context.get_dummy_value()

    return types.void(packed, rows, types.intp, types.intp), codegen
