"""The linear layer on the CPU: register tiles over a packed weight.

    out[t, n] = bf16( sum over k of x[t, k] * weight[n, k]  +  bias[n] )

A *tile* is a small block of outputs, `rows` tokens by `panels` * 16 outputs, whose sums stay in vector registers while
one loop runs over the pairs of k (packing.py draws the layout). Each turn loads one vector a panel and, for each token,
two x values that are copied to all lanes, and does rows * panels multiply-add steps: with 8 x 2, ten loads feed
sixteen steps. With one token nothing can be reused, and the tile is 1 x 4: reading the weight is then all there is.

A step adds the two products of a pair to 16 sums. There are two kinds:

    dpbf16   vdpbf16ps, the bf16 dot-product instruction (avx512_bf16: AMD Zen 4 and 5, Intel since Cooper Lake).
             The order and rounding inside a step are the processor's, and it takes subnormal numbers for zero.
    plain    any processor: widen by shift and mask, then two multiply-adds in float32, k ascending. LLVM cuts the 16
             lanes into what the machine has (AVX2: two registers, NEON: four).

TINYVLLM_CPU_LINEAR = auto | dpbf16 | plain chooses; auto, the default, is dpbf16 where the processor has it.

Every tile forms each sum alike, from zero over ascending pairs, one step at a time and nothing shared between sums. So
out[t, n] has the same bits whatever the batch is, wherever the row stands in it and however many threads there are.

Source of the tiling: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
"""

import os
from typing import Callable, NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import codegen, config
from numba.extending import intrinsic

from tinyvllm.errors import ConfigError
from tinyvllm.kernels.bf16 import narrow, widen
from tinyvllm.kernels.gemm.packing import PANEL
from tinyvllm.kernels.jit import cpu_helper, cpu_jit, thread_count

__all__ = ["linear_cpu", "linear_plain_cpu", "linear_dpbf16_cpu", "processor_has"]

# A second thread pays from some 30 microseconds of work on: so many multiply-adds, or so many weights from memory.
PARALLEL_WORK = 8 << 20
PARALLEL_WEIGHTS = 1 << 20


# ---- one tile, as LLVM instructions ----

_I8P, _I32, _I64, _F32 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64), ir.FloatType()
_F32X16, _I32X16 = ir.VectorType(_F32, PANEL), ir.VectorType(_I32, PANEL)


class _BFloat(ir.Type):
    """LLVM's bfloat type, which llvmlite has no class for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_BF16X32 = ir.VectorType(_BFloat(), 2 * PANEL)


def _broadcast(builder, scalar):
    """A vector with `scalar` in all 16 lanes."""
    undefined = ir.Constant(ir.VectorType(scalar.type, PANEL), ir.Undefined)
    vector = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(vector, undefined, ir.Constant(_I32X16, [0] * PANEL))


class Dpbf16Step:
    """sums + x[2j] * w[2j] + x[2j + 1] * w[2j + 1] in 16 lanes, by one instruction."""

    def weights(self, builder, pairs):  # <16 x i32>: each lane holds two bf16 of one output
        return builder.bitcast(pairs, _BF16X32)

    def inputs(self, builder, pair):  # i32: two bf16 of one token
        return builder.bitcast(_broadcast(builder, pair), _BF16X32)

    def add(self, builder, sums, x, w):
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_F32X16, [_F32X16, _BF16X32, _BF16X32]), name)
        return builder.call(function, [sums, w, x])


class PlainStep:
    """The same by shift, mask and two multiply-adds (fused where the processor can)."""

    def weights(self, builder, pairs):
        even = builder.shl(pairs, ir.Constant(_I32X16, [16] * PANEL))
        odd = builder.and_(pairs, ir.Constant(_I32X16, [0xFFFF0000] * PANEL))
        return [builder.bitcast(half, _F32X16) for half in (even, odd)]

    def inputs(self, builder, pair):
        halves = builder.shl(pair, _I32(16)), builder.and_(pair, _I32(0xFFFF0000))
        return [_broadcast(builder, builder.bitcast(half, _F32)) for half in halves]

    def add(self, builder, sums, x, w):
        for x_half, w_half in zip(x, w):
            product = builder.fmul(x_half, w_half, flags=("contract",))
            sums = builder.fadd(sums, product, flags=("contract",))
        return sums


def make_tile(rows: int, panels: int, step) -> Callable:
    """tile(sums, x, weight, row, panel): fill sums, float32 [rows * panels * 16] row by row, for use inside njit.

    x: uint16 [T, K], K even. weight: packed. Rows past the last token and panels past the last repeat the last one,
    so that edges need no tile of their own: their sums are there, and the caller leaves them.
    """

    @intrinsic
    def tile(typingctx, sums, x, weight, row, panel):
        def codegen(context, builder, signature, args):
            arrays = [context.make_array(kind)(context, builder, arg) for kind, arg in zip(signature.args, args[:3])]
            sums, x, weight = (builder.bitcast(array.data, _I8P) for array in arrays)
            num_rows, num_columns = (builder.extract_value(arrays[1].shape, i) for i in range(2))
            num_panels, num_pairs = (builder.extract_value(arrays[2].shape, i) for i in range(2))

            def load(kind, base, offset, align):
                value = builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()))
                value.align = align
                return value

            def starts(base, first, count, limit, size):  # addresses of `count` rows or panels of `size` bytes
                last = builder.sub(limit, _I64(1))
                for i in range(count):
                    index = builder.add(first, _I64(i))
                    index = builder.select(builder.icmp_signed("<", index, last), index, last)
                    yield builder.gep(base, [builder.mul(index, size)])

            x_starts = list(starts(x, args[3], rows, num_rows, builder.mul(num_columns, _I64(2))))
            w_starts = list(starts(weight, args[4], panels, num_panels, builder.mul(num_pairs, _I64(4 * PANEL))))
            cells = [(m, p) for m in range(rows) for p in range(panels)]

            before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            pair = builder.phi(_I64)
            totals = {cell: builder.phi(_F32X16) for cell in cells}
            w = [step.weights(builder, load(_I32X16, start, builder.mul(pair, _I64(4 * PANEL)), 2)) for start in w_starts]
            updated = {}
            for m, start in enumerate(x_starts):
                x_pair = step.inputs(builder, load(_I32, start, builder.mul(pair, _I64(4)), 2))
                for p in range(panels):
                    updated[m, p] = step.add(builder, totals[m, p], x_pair, w[p])
            next_pair = builder.add(pair, _I64(1))
            builder.cbranch(builder.icmp_signed("<", next_pair, num_pairs), loop, after)
            pair.add_incoming(_I64(0), before)
            pair.add_incoming(next_pair, loop)
            for cell in cells:
                totals[cell].add_incoming(ir.Constant(_F32X16, [0.0] * PANEL), before)
                totals[cell].add_incoming(updated[cell], loop)

            builder.position_at_end(after)
            for i, cell in enumerate(cells):
                place = builder.gep(sums, [_I64(4 * PANEL * i)])
                builder.store(updated[cell], builder.bitcast(place, _F32X16.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(sums, x, weight, types.intp, types.intp), codegen

    return tile


# ---- the operation ----


class Tiles(NamedTuple):
    """(rows, panels) of the tiles for one token, for up to `few` tokens, and for more."""

    one: tuple[int, int]
    few: tuple[int, int]
    many: tuple[int, int]


WIDE = Tiles(one=(1, 4), few=(4, 4), many=(8, 2))  # 32 vector registers of 512 bits
NARROW = Tiles(one=(1, 2), few=(4, 1), many=(4, 1))  # 16 of 256 bits, or 32 of 128


def make_linear(step, tiles: Tiles) -> Callable:
    """linear(out, x, weight, bias) with one kind of step."""
    tile_one, tile_few, tile_many = (make_tile(*shape, step) for shape in tiles)
    few_rows, many_rows = tiles.few[0], tiles.many[0]
    one_panels, few_panels, many_panels = (shape[1] for shape in tiles)
    cells = max(rows * panels for rows, panels in tiles) * PANEL

    @cpu_helper
    def store(out, sums, bias, row, num_rows, panel, num_panels):
        """Add the bias, round once, and leave the rows and columns that are past the end."""
        first = panel * PANEL
        width = num_panels * PANEL
        for m in range(min(num_rows, out.shape[0] - row)):
            for n in range(min(width, out.shape[1] - first)):
                value = sums[m * width + n]
                if bias.shape[0]:
                    value += widen(bias[first + n])
                out[row + m, first + n] = narrow(value)

    @cpu_helper
    def linear_panels(out, x, weight, bias, first, last):
        """The outputs of panels first .. last."""
        sums = np.empty(cells, np.float32)
        num_tokens = x.shape[0]
        if num_tokens == 1:
            for panel in range(first, last, one_panels):
                tile_one(sums, x, weight, 0, panel)
                store(out, sums, bias, 0, 1, panel, one_panels)
        elif num_tokens <= few_rows:
            for panel in range(first, last, few_panels):
                tile_few(sums, x, weight, 0, panel)
                store(out, sums, bias, 0, few_rows, panel, few_panels)
        else:
            for panel in range(first, last, many_panels):  # a panel stays in the cache while all tokens pass by
                for row in range(0, num_tokens, many_rows):
                    tile_many(sums, x, weight, row, panel)
                    store(out, sums, bias, row, many_rows, panel, many_panels)

    @cpu_helper
    def with_zero_column(x):
        padded = np.zeros((x.shape[0], x.shape[1] + 1), np.uint16)
        padded[:, :-1] = x
        return padded

    @cpu_jit(parallel=True)
    def linear(out, x, weight, bias):
        """out uint16 [T, N] from x uint16 [T, K], packed weight uint16 [ceil(N/16), ceil(K/2), 32], bias [N] or [0]."""
        num_panels = weight.shape[0]
        num_threads = thread_count()
        if x.shape[1] % 2:  # tiles read pairs (no model has an odd K: this need not be quick)
            linear_panels(out, with_zero_column(x), weight, bias, 0, num_panels)
        elif num_threads == 1 or (weight.size < PARALLEL_WEIGHTS and x.shape[0] * weight.size < PARALLEL_WORK):
            linear_panels(out, x, weight, bias, 0, num_panels)
        else:
            groups = (num_panels + one_panels - 1) // one_panels
            for thread in prange(num_threads):
                linear_panels(out, x, weight, bias, groups * thread // num_threads * one_panels,
                              min(num_panels, groups * (thread + 1) // num_threads * one_panels))

    return linear


def processor_has(feature: str) -> bool:
    """Whether numba may use an instruction set extension here, by LLVM's name for it (e.g. "avx512bf16")."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return f"+{feature}" in features.split(",")


linear_plain_cpu = make_linear(PlainStep(), WIDE if processor_has("avx512f") else NARROW)
linear_dpbf16_cpu = make_linear(Dpbf16Step(), WIDE) if processor_has("avx512bf16") else None


def _choose() -> Callable:
    wanted = os.environ.get("TINYVLLM_CPU_LINEAR", "auto")
    if wanted not in ("auto", "dpbf16", "plain"):
        raise ConfigError(f"TINYVLLM_CPU_LINEAR is {wanted!r}; it can be auto, dpbf16 or plain")
    if wanted == "dpbf16" and linear_dpbf16_cpu is None:
        raise ConfigError("TINYVLLM_CPU_LINEAR is dpbf16, and this processor has no avx512_bf16; use auto or plain")
    return linear_plain_cpu if wanted == "plain" else linear_dpbf16_cpu or linear_plain_cpu


linear_cpu = _choose()
