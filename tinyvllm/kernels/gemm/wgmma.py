"""Large products on compute capability 9.0: wgmma fed by the copy engine, as prefill wants them.

    block     128 rows of x by BN rows of weight; 132 blocks stay and take tile after tile
    consumer  two warpgroups multiply 64 rows each, sums in registers (BN / 2 a thread), one product always under way;
              then round, lay the tile out in shared memory (stmatrix), and let the copy engine store it while the next
              tile begins
    producer  one thread of a ninth warp keeps STAGES boxes of either side on their way. One warp and not a warpgroup:
              288 threads may have 224 registers each, 384 only 168

The order of tiles matters for the L2 cache: blocks that run together work on 16 tiles of rows by some of columns, so
that what one fetches the others find there.

AFTER: "plain", "add" (the copy engine adds to the residual, rounding to nearest even as residual_add.py does) or
"silu": the BN rows of weight are BN / 2 of gate and their BN / 2 of up, and gate i and up i meet in one thread.

Rows and columns beyond the matrices are zeros on the way in, and not written on the way out.
The simple version is tensor_core.py.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, kernel
from tinyvllm.kernels.hopper import (
    barrier_arrive,
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers_ready,
    descriptor,
    emit,
    group_barrier,
    multiply_64,
    multiply_wait_all,
    multiply_wait_one,
    sequence,
    shared_to_engine,
    stores_commit,
    stores_done,
    stores_read,
    tensor_add,
    tensor_load,
    tensor_map_acquire,
    tensor_store,
    zeros,
)
from tinyvllm.kernels.ptx import (
    INLINE,
    block_index_x,
    dynamic_shared,
    grid_size_x,
    lane_index,
    let_next_kernel_start,
    thread_index,
    wait_for_previous_kernel,
)

if INLINE:
    from llvmlite import ir

__all__ = ["wgmma_kernel", "choose_width", "BM"]

BM, BK = 128, 64
CONSUMERS = 256
THREADS = CONSUMERS + 32
GROUP = 16  # tiles of rows that are worked on together
SIGNATURE = ("uint64",) * 3 + ("int32",) * 3


def choose_width(num_rows: int, num_outputs: int, after: str, num_multiprocessors: int) -> int:
    """BN: wide tiles where there are enough of them."""
    tiles = -(-num_rows // BM) * -(-num_outputs // 256)
    if after == "silu" or num_outputs >= 4096 and tiles >= num_multiprocessors:
        return 256
    if num_outputs % 192 == 0 and -(-num_rows // BM) * (num_outputs // 192) >= num_multiprocessors:
        return 192
    return 128


# $0 = two values of silu(gate) * up as a bf16 pair, gate in $1, $2, up in $3, $4, rounded as silu_mul.py does; the
# constants are -log2(e) and 1. One text, emitted as volatile: the compiler would otherwise do all pairs before it
# stores any, and run out of registers.
_GATED_PAIR = ("{ .reg .f32 g, h, u, v, e, f; .reg .b32 p; "
               "cvt.rn.bf16x2.f32 p, $2, $1; shl.b32 g, p, 16; and.b32 h, p, 0xffff0000; "
               "mul.f32 e, g, 0fBFB8AA3B; mul.f32 f, h, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; ex2.approx.ftz.f32 f, f; "
               "add.f32 e, e, 0f3F800000; add.f32 f, f, 0f3F800000; div.full.f32 g, g, e; div.full.f32 h, h, f; "
               "cvt.rn.bf16x2.f32 p, h, g; shl.b32 g, p, 16; and.b32 h, p, 0xffff0000; "
               "cvt.rn.bf16x2.f32 p, $4, $3; shl.b32 u, p, 16; and.b32 v, p, 0xffff0000; "
               "mul.f32 g, g, u; mul.f32 h, h, v; cvt.rn.bf16x2.f32 $0, h, g; }")


def _store_tile(BN: int, SILU: bool):
    """store(row address, lane // 16, lane % 8, sums): a warp's 16 rows as bf16, swizzled, 64 columns every 8 KiB.

    SILU: the first half of the columns is gate, the second up; what is stored is half as wide.
    """
    columns = BN // 2 if SILU else BN

    def build(builder, address, half, swizzle, sums):
        i32 = ir.IntType(32)
        places = []
        for pair in range(4):  # of 16-byte chunks in 128 bytes
            chunk = builder.xor(builder.add(half[0], ir.Constant(i32, 2 * pair)), swizzle[0])
            places.append(builder.add(address[0], builder.shl(chunk, ir.Constant(i32, 4))))
        for j in range(0, columns // 8, 2):
            packed = []
            for i in range(4 * j, 4 * j + 8, 2):
                pair, partners = sums[i:i + 2], sums[i + columns // 2:i + columns // 2 + 2]
                if SILU:
                    packed += emit(builder, _GATED_PAIR, "u32", "f32 f32 f32 f32", pair + partners, memory=True,
                                   volatile=True)
                else:
                    packed += emit(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", "u32", "f32 f32", pair)
            emit(builder, f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0+{j // 8 * 8192}], {{$1,$2,$3,$4}};", "",
                 "u32 " * 5, [places[j % 8 // 2], *packed], memory=True, volatile=True)
        return []

    return sequence("", f"u32 u32 u32 f32*{BN // 2}", build)


@functools.cache
def wgmma_kernel(BN: int, AFTER: str, DEPENDENT: bool = True):
    """The kernel for tiles of BN (128, 192 or 256) rows of weight. Grid: as many blocks as multiprocessors."""
    STAGE = (BM + BN) * 2 * BK
    SILU, ADD = AFTER == "silu", AFTER == "add"
    COLUMNS = BN // 2 if SILU else BN  # of a tile of the result
    STAGES = (220 * 1024 - COLUMNS * 256) // STAGE
    OUT = STAGES * STAGE  # a tile of bf16 a consumer: 64 rows
    BARRIERS = OUT + COLUMNS * 256
    SHARED = BARRIERS + 16 * STAGES
    COUNT = BN // 2
    multiply, wait_all, zero = multiply_64(BN), multiply_wait_all(COUNT), zeros(COUNT)
    store_tile = _store_tile(BN, SILU)

    @kernel(signature=SIGNATURE, max_threads=THREADS)
    def wgmma(x_map, weight_map, out_map, num_rows, num_outputs, depth):
        """num_outputs: rows of weight. Boxes: x BM rows, weight BN (silu: BN / 2) rows, out 64 rows."""
        thread, lane = thread_index(), lane_index()
        shared = dynamic_shared()
        arrived = np.uint32(shared + BARRIERS)
        freed = np.uint32(arrived + 8 * STAGES)
        if thread == 0:
            for i in range(STAGES):
                barrier_init(np.uint32(arrived + 8 * i), np.uint32(1))
                barrier_init(np.uint32(freed + 8 * i), np.uint32(8))
            barriers_ready()
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        cuda.syncthreads()
        row_tiles = np.uint32((np.uint32(num_rows) + (BM - 1)) // np.uint32(BM))
        column_tiles = np.uint32((np.uint32(num_outputs) + (BN - 1)) // np.uint32(BN))
        steps = np.uint32((np.uint32(depth) + (BK - 1)) // np.uint32(BK))
        num_tiles = np.uint32(row_tiles * column_tiles)
        per_group = np.uint32(GROUP * column_tiles)
        tile = block_index_x()
        stage, phase = np.uint32(0), np.uint32(0)
        if thread >= CONSUMERS:
            if thread == CONSUMERS:
                tensor_map_acquire(x_map)
                tensor_map_acquire(weight_map)
                while tile < num_tiles:
                    group = np.uint32(tile // per_group)
                    together = min(np.uint32(GROUP), np.uint32(row_tiles - group * GROUP))
                    inside = np.uint32(tile - group * per_group)
                    row = np.uint32((group * GROUP + inside % together) * BM)
                    column = np.uint32(np.uint32(inside // together) * COLUMNS)
                    k = np.uint32(0)
                    while k < steps:
                        barrier_wait(np.uint32(freed + 8 * stage), np.uint32(phase ^ np.uint32(1)))
                        barrier = np.uint32(arrived + 8 * stage)
                        to = np.uint32(shared + stage * STAGE)
                        barrier_expect(barrier, np.uint32(STAGE))
                        tensor_load(to, x_map, np.uint32(k * BK), row, barrier)
                        tensor_load(np.uint32(to + BM * 2 * BK), weight_map, np.uint32(k * BK), column, barrier)
                        if SILU:
                            tensor_load(np.uint32(to + (BM + BN // 2) * 2 * BK), weight_map, np.uint32(k * BK),
                                        np.uint32(column + np.uint32(num_outputs) // np.uint32(2)), barrier)
                        k = np.uint32(k + 1)
                        stage = np.uint32(stage + 1)
                        if stage == STAGES:
                            stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
                    tile = np.uint32(tile + grid_size_x())
        else:
            consumer, own = np.uint32(thread // np.uint32(128)), np.uint32(thread % np.uint32(128))
            result = np.uint32(shared + OUT + consumer * (COLUMNS * 128))
            own_row = np.uint32(np.uint32(own // np.uint32(32)) * 16 + lane % np.uint32(16))
            while tile < num_tiles:
                group = np.uint32(tile // per_group)
                together = min(np.uint32(GROUP), np.uint32(row_tiles - group * GROUP))
                inside = np.uint32(tile - group * per_group)
                row = np.uint32((group * GROUP + inside % together) * BM + consumer * 64)
                column = np.uint32(np.uint32(inside // together) * COLUMNS)
                sums = zero()
                k, used = np.uint32(0), np.uint32(0)
                while k < steps:
                    barrier_wait(np.uint32(arrived + 8 * stage), phase)
                    tiles = np.uint32(shared + stage * STAGE)
                    sums = multiply(sums, descriptor(np.uint32(tiles + consumer * (64 * 2 * BK))),
                                    descriptor(np.uint32(tiles + BM * 2 * BK)))
                    multiply_wait_one()
                    if k > 0 and lane == 0:
                        barrier_arrive(used)
                    used = np.uint32(freed + 8 * stage)
                    k = np.uint32(k + 1)
                    stage = np.uint32(stage + 1)
                    if stage == STAGES:
                        stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
                sums = wait_all(sums)
                if lane == 0:
                    barrier_arrive(used)
                if own == 0:
                    stores_read()  # the tile before has left shared memory
                group_barrier(np.uint32(consumer + 1))
                at = np.uint32(result + own_row * 128)
                store_tile(at, np.uint32(lane // np.uint32(16)), np.uint32(lane % np.uint32(8)), sums)
                shared_to_engine()
                group_barrier(np.uint32(consumer + 1))
                if own == 0:
                    for i in range(COLUMNS // 64):
                        if ADD:
                            tensor_add(out_map, np.uint32(column + i * 64), row, np.uint32(result + i * 8192))
                        else:
                            tensor_store(out_map, np.uint32(column + i * 64), row, np.uint32(result + i * 8192))
                    stores_commit()
                tile = np.uint32(tile + grid_size_x())
            if own == 0:
                stores_done()

    wgmma.threads, wgmma.shared_bytes = THREADS, SHARED
    wgmma.box_rows = BN // 2 if SILU else BN
    return wgmma
