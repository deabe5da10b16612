"""Batches of 5 to some hundred rows on compute capability 9.0: wgmma with the sides swapped, and the sum cut up.

wgmma's 64 rows would be mostly empty if they were the rows of x. So the weights are the 64-row side (BM) and the rows
of x its columns (BN = 16 to 256): the product is computed transposed, and stored the right way round.

    producer   one thread keeps STAGES boxes of weight and of x on their way through the copy engine
    consumers  BM / 64 warpgroups multiply what has arrived, and free it

Too few tiles: with 2,048 outputs there are 32 of 64 rows for 132 multiprocessors. So SPLIT blocks of a *cluster* share
a tile, each with its part of the columns; they leave their float32 sums in shared memory, and each adds a part of
the tile over everybody's (distributed shared memory), always in the same order.

Many rows: then it is the way from the L2 cache to shared memory that is narrow, and every tile of weights wants the
same x. So SHARE neighbouring tiles belong to one cluster, and each of their blocks asks for 1 / SHARE of the rows of
x, for all of them (multicast). A block may send only where everybody has freed the stage: consumers free it in all
blocks that send to them. `arrived` counts the bytes of a block itself, whoever sent them; they may even be
there before the block expects them.

As in few_rows.py the first boxes of weight are asked for before the block waits for the kernel that makes x. What
follows the product happens on the way out: skinny_output.py.

The simple version is tensor_core.py, then the operations by themselves.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, device_function, kernel
from tinyvllm.kernels.gemm.skinny_output import pitch, store_tile
from tinyvllm.kernels.hopper import (
    EVICT_FIRST,
    EVICT_NORMAL,
    barrier_arrive,
    barrier_arrive_in,
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers_ready,
    cluster_arrive,
    cluster_arrive_relaxed,
    cluster_leave,
    cluster_wait,
    descriptor,
    multiply_64,
    multiply_wait_all,
    multiply_wait_one,
    put_sums,
    tensor_load,
    tensor_load_for_all,
    tensor_load_hinted,
    tensor_map_acquire,
    zeros,
)
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    block_index_z,
    dynamic_shared,
    lane_index,
    let_next_kernel_start,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["skinny_kernel", "choose_shape", "choose_invariant_shape"]

MOST_SHARED = 226 << 10  # bytes of a multiprocessor's shared memory for stages
BK = 64  # columns a stage: 128 bytes a row
# weight map, x map, out; positions, slots, cos_sin, k_cache, v_cache; sizes
SIGNATURE = ("uint64",) * 8 + ("int32",) * 6


def choose_shape(num_rows: int, num_outputs: int, depth: int, head_dim: int, num_multiprocessors: int):
    """(BM, BN, STAGES, SPLIT, SHARE, MIN_BLOCKS), or None where wgmma.py is faster. head_dim: of "rope", whose tiles
    are heads; else 0.

    All by measurement, at Llama 3.2 1B's products on one H200. It is the bytes on their way from L2 that count: tiles
    as small as may be while all their blocks run at once, and as many stages as shared memory holds (qkv at 128 rows:
    7.1 us with 9, 9.1 with 4). To send x to several blocks at once (SHARE) gains only where a block waits for x most.
    """
    least = 128 if head_dim == 128 else 64  # rows of weight a tile

    def count(BM: int, BN: int) -> int:
        return ceil_div(num_outputs, BM) * ceil_div(num_rows, BN)

    def shape(BM: int, BN: int, SPLIT: int = 1, SHARE: int = 1, most_stages: int = 9):
        return BM, BN, min(most_stages, MOST_SHARED // ((BM + BN) * 2 * BK)), SPLIT, SHARE, 1

    wide = num_outputs >= 64 * num_multiprocessors
    if num_rows <= 32 or wide and num_rows <= 64:
        BN = next(n for n in (16, 32, 64) if n >= num_rows)
        BM = 128 if num_outputs >= 128 * num_multiprocessors else least
        blocks = count(BM, BN)
        SPLIT = next((s for s in (4, 2) if blocks * s <= num_multiprocessors and depth >= s * 8 * BK), 1)
        # Half of a multiprocessor's memory: there is room for a second block, or for the next kernel's first one.
        STAGES = min(11, (110 << 10) // ((BM + BN) * 2 * BK))
        return BM, BN, STAGES, SPLIT, 1, 2 if blocks * SPLIT > num_multiprocessors else 1
    if wide:
        BN = next((n for n in (96, 128, 192, 256) if n >= num_rows), 0)
        if BN:
            return shape(128, BN, SHARE=2 if BN == 192 else 1)
        return shape(192, 128) if num_rows <= 384 and not head_dim else None
    if num_rows <= 256:
        half = num_rows if num_rows <= 128 else ceil_div(num_rows, 2)
        BN = next(n for n in (64, 96, 128) if n >= half)
        if 64 < num_rows <= 128 and depth < 4096 and 2 * count(least, 64) <= num_multiprocessors:
            BN = 64  # two rows of short tiles: o at 128 rows 6.2 us, 7.5 with one
        SPLIT = 2 if 2 * count(least, BN) <= num_multiprocessors and depth >= 16 * BK else 1
        return shape(least, BN, SPLIT, most_stages=9 if BN > 64 else 12 if depth >= 4096 else 8)
    if depth >= 4096 and 2 * count(128, 128) <= num_multiprocessors:
        return shape(128, 128, SPLIT=2)  # down at 512 rows 29.3 us, 31.3 as 64 x 128
    tiles = ((64, 96), (64, 128), (128, 96), (128, 104), (128, 128), (192, 96), (192, 128))
    fitting = (tile for tile in tiles if count(*tile) <= num_multiprocessors and tile[0] % (head_dim or 1) == 0)
    return next((shape(*tile) for tile in fitting), None)


def choose_invariant_shape(num_rows: int, num_outputs: int, depth: int, head_dim: int, num_multiprocessors: int):
    """As choose_shape, for rows whose bits may not depend on their number: SPLIT does not, and nothing else changes the
    order in which a sum is added up. (wgmma.py adds it up in one piece.)"""
    SPLIT = choose_shape(64, num_outputs, depth, head_dim, num_multiprocessors)[3]
    if num_rows > 256 and SPLIT == 1 and not head_dim:
        return None
    BN = next(n for n in (16, 32, 64, 128) if n >= min(num_rows, 128))
    BM = 128 if head_dim == 128 or num_rows > 256 and not head_dim else 64
    return BM, BN, min(9, MOST_SHARED // ((BM + BN) * 2 * BK)), SPLIT, 1, 1


@functools.cache
def skinny_kernel(BM: int, BN: int, STAGES: int, SPLIT: int, SHARE: int, MIN_BLOCKS: int, AFTER: str,
                  HEAD_DIM: int = 0):
    """The kernel for one shape of tile. Grid: grid(); clusters of SPLIT * SHARE."""
    GROUPS = BM // 64
    CONSUMERS = 128 * GROUPS
    THREADS = CONSUMERS + 32
    STAGE, X_OFFSET = (BM + BN) * 2 * BK, BM * 2 * BK
    X_ROWS = BN // SHARE  # that a block asks for
    MASK = sum(1 << i * SPLIT for i in range(SHARE))  # the blocks of the first part of the columns
    SILU, PITCH = AFTER == "silu", pitch(BM)
    OUTPUTS = BM // 2 if SILU else BM  # rows from one tile to the next, of gate and up each
    SHARED = STAGES * STAGE + 16 * STAGES
    assert BM % 64 == 0 and BN % 8 == 0 and BN <= 256 and X_ROWS % 8 == 0 and SPLIT * SHARE <= 8 and SHARED <= 227 << 10
    assert STAGES * STAGE >= BN * PITCH * 4
    multiply, wait_all, zero = multiply_64(BN), multiply_wait_all(BN // 2), zeros(BN // 2)
    put, store = put_sums(BN // 2, PITCH), store_tile(BM, BN, SPLIT, THREADS, AFTER, HEAD_DIM)

    @device_function
    def load_weights(to, weight_map, column, first, num_outputs, barrier, hint):
        tensor_load_hinted(to, weight_map, column, np.uint32(first), barrier, hint)
        if SILU:
            tensor_load_hinted(np.uint32(to + X_OFFSET // 2), weight_map, column,
                               np.uint32(first + np.uint32(num_outputs) // np.uint32(2)), barrier, hint)

    @device_function
    def load_x(to, x_map, column, row, barrier, receivers):
        if SHARE > 1:
            tensor_load_for_all(to, x_map, column, row, barrier, receivers)
        else:
            tensor_load(to, x_map, column, row, barrier)

    @kernel(signature=SIGNATURE, max_threads=THREADS, min_blocks=MIN_BLOCKS)
    def skinny(weight_map, x_map, out, positions, slots, cos_sin, k_cache, v_cache, num_rows, num_outputs, depth,
               num_heads, num_kv_heads, block_size):
        """Maps: of the weight with boxes of BM (silu: BM / 2) rows, of x with boxes of BN / SHARE."""
        thread, lane = thread_index(), lane_index()
        shared = dynamic_shared()
        rank = np.uint32(block_index_x() % np.uint32(SPLIT))  # which part of the columns
        member = np.uint32(block_index_x() // np.uint32(SPLIT))  # which of the tiles that share x
        tile = np.uint32(block_index_z() * SHARE + member)
        first_row = np.uint32(block_index_y() * BN)
        first = np.uint32(tile * OUTPUTS)
        arrived = np.uint32(shared + STAGES * STAGE)
        freed = np.uint32(arrived + 8 * STAGES)
        let_next_kernel_start()
        if thread == 0:
            for i in range(STAGES):
                barrier_init(np.uint32(arrived + 8 * i), np.uint32(1))
                barrier_init(np.uint32(freed + 8 * i), np.uint32(4 * GROUPS * SHARE))
            barriers_ready()
        cuda.syncthreads()
        if SHARE > 1:
            cluster_arrive_relaxed()  # others may send here
        steps = np.uint32((np.uint32(depth) + BK - 1) // np.uint32(BK))
        k = np.uint32(np.uint32(rank * steps) // np.uint32(SPLIT))
        end = np.uint32(np.uint32((rank + 1) * steps) // np.uint32(SPLIT))
        filled = min(np.uint32(STAGES), np.uint32(end - k))
        stage, phase = np.uint32(0), np.uint32(0)
        if thread == CONSUMERS:
            tensor_map_acquire(weight_map)
            tensor_map_acquire(x_map)
            hint = np.uint64(EVICT_FIRST)
            if num_rows > BN:
                hint = np.uint64(EVICT_NORMAL)  # another block of rows reads the same weights
            i = np.uint32(0)
            while i < filled:  # weights do not depend on the kernel before
                barrier_expect(np.uint32(arrived + 8 * i), np.uint32(STAGE))
                load_weights(np.uint32(shared + i * STAGE), weight_map, np.uint32((k + i) * BK), first, num_outputs,
                             np.uint32(arrived + 8 * i), hint)
                i = np.uint32(i + 1)
        if SHARE > 1:
            cluster_wait()
        if thread >= CONSUMERS:
            if thread == CONSUMERS:
                x_offset = np.uint32(X_OFFSET + member * (X_ROWS * 2 * BK))
                x_row = np.uint32(first_row + member * X_ROWS)
                receivers = np.uint16(np.uint32(MASK) << rank)
                wait_for_previous_kernel()
                i = np.uint32(0)
                while i < filled:
                    load_x(np.uint32(shared + i * STAGE + x_offset), x_map, np.uint32((k + i) * BK), x_row,
                           np.uint32(arrived + 8 * i), receivers)
                    i = np.uint32(i + 1)
                k = np.uint32(k + filled)
                while k < end:
                    barrier_wait(np.uint32(freed + 8 * stage), phase)
                    barrier = np.uint32(arrived + 8 * stage)
                    to = np.uint32(shared + stage * STAGE)
                    barrier_expect(barrier, np.uint32(STAGE))
                    load_weights(to, weight_map, np.uint32(k * BK), first, num_outputs, barrier, hint)
                    load_x(np.uint32(to + x_offset), x_map, np.uint32(k * BK), x_row, barrier, receivers)
                    k = np.uint32(k + 1)
                    stage = np.uint32(stage + 1)
                    if stage == STAGES:
                        stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
        else:
            group = np.uint32(thread // np.uint32(128))
            sums = zero()
            start, used = k, np.uint32(0)
            while k < end:
                barrier_wait(np.uint32(arrived + 8 * stage), phase)
                tiles = np.uint32(shared + stage * STAGE)
                sums = multiply(sums, descriptor(np.uint32(tiles + group * (64 * 2 * BK))),
                                descriptor(np.uint32(tiles + X_OFFSET)))
                multiply_wait_one()  # the product before this one has ended: its stage is free
                if k > start and lane < SHARE:
                    if SHARE > 1:
                        barrier_arrive_in(used, np.uint32(rank + lane * SPLIT))  # in all blocks that send here
                    else:
                        barrier_arrive(used)
                used = np.uint32(freed + 8 * stage)
                k = np.uint32(k + 1)
                stage = np.uint32(stage + 1)
                if stage == STAGES:
                    stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
            sums = wait_all(sums)
        cuda.syncthreads()  # all have been read, and nothing is on its way: the stages' memory now takes the sums
        if thread < CONSUMERS:
            row = np.uint32(np.uint32(thread // np.uint32(32)) * 16 + lane // np.uint32(4))
            put(np.uint32(shared + ((lane % np.uint32(4)) * (2 * PITCH) + row) * 4), sums)
        if SPLIT > 1:
            cluster_arrive()
            cluster_wait()
        else:
            if SHARE > 1:
                cluster_arrive_relaxed()  # nothing more is sent or freed elsewhere
            cuda.syncthreads()

        store(np.uint32(shared), thread, rank, np.uint32(member * SPLIT), tile, first_row, out, positions, slots,
              cos_sin, k_cache, v_cache, num_rows, num_outputs, num_heads, num_kv_heads, block_size)
        if SPLIT > 1:
            cluster_leave()
        elif SHARE > 1:
            cluster_wait()  # nobody leaves while another may still send or free here

    skinny.tile, skinny.threads, skinny.shared_bytes = (BM, BN), THREADS, SHARED
    skinny.box_rows, skinny.x_rows, skinny.cluster = OUTPUTS, X_ROWS, SPLIT * SHARE
    skinny.grid = lambda num_rows, num_outputs: (SPLIT * SHARE, ceil_div(num_rows, BN),
                                                 ceil_div(num_outputs, BM * SHARE))
    return skinny
