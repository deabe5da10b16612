"""Batches of 9 to a few hundred rows on compute capability 9.0: wgmma with the sides swapped, and the sum cut up.

wgmma's 64 rows would be mostly empty if they were the rows of x. So the weights are the 64-row side (BM) and the rows
of x its columns (BN = 16 to 256): the product is computed transposed, and stored the right way round.

    producer   one thread keeps STAGES boxes of weight and of x on their way through the copy engine
    consumers  BM / 64 warpgroups multiply what has arrived, and free it

Too few tiles: with 2,048 outputs there are 32 of 64 rows for 132 multiprocessors. So SPLIT blocks of a *cluster* share
a tile, each with its part of the columns; they leave their float32 sums in shared memory, and each adds a part of
the tile over everybody's (distributed shared memory), always in the same order.

As in few_rows.py the first boxes of weight are asked for before the block waits for the kernel that makes x, and what
follows the product happens on the way out (AFTER): "plain", "add" to the residual, "silu" of gate times up,
"rope" and the cache write. A paired tile is BM / 2 rows of gate and the BM / 2 of up that belong to them; for "rope"
it is one head.

The simple version is tensor_core.py, then the operations by themselves.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.gemm.few_rows import LOG2_E
from tinyvllm.kernels.hopper import (
    barrier_arrive,
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers_ready,
    cluster_arrive,
    cluster_leave,
    cluster_sum,
    cluster_wait,
    descriptor,
    multiply_64,
    multiply_wait_all,
    multiply_wait_one,
    put_sums,
    tensor_load,
    tensor_load_once,
    tensor_map_acquire,
    zeros,
)
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    divide,
    dynamic_shared,
    exp2,
    high_bf16,
    lane_index,
    let_next_kernel_start,
    load_8_bytes,
    load_i32,
    load_u32,
    low_bf16,
    pack_bf16,
    quotient,
    store_8_bytes,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["skinny_kernel", "choose_shape", "MAX_ROWS"]

MAX_ROWS = 256
BK = 64  # columns a stage: 128 bytes a row
# weight map, x map, out; positions, slots, cos_sin, k_cache, v_cache; sizes
SIGNATURE = ("uint64",) * 8 + ("int32",) * 6


def choose_shape(num_rows: int, num_outputs: int, depth: int, head_dim: int, num_multiprocessors: int):
    """(BM, BN, STAGES, SPLIT, MIN_BLOCKS). head_dim: of "rope", whose tiles are heads; else 0."""
    BN = next(n for n in (16, 32, 64, 128, 256) if n >= min(num_rows, 256))
    wide = num_outputs >= 128 * num_multiprocessors  # the vocabulary
    BM = 128 if wide or head_dim == 128 else 64
    if BN == 256:
        if num_outputs < 64 * num_multiprocessors:
            BN = 128
        else:
            BM = 128
    blocks = -(-num_outputs // BM) * -(-num_rows // BN)
    SPLIT = next((s for s in (4, 2) if blocks * s <= num_multiprocessors and depth >= s * 8 * BK), 1)
    stage = (BM + BN) * 2 * BK
    small = BM + BN <= 192
    two = small and blocks * SPLIT > num_multiprocessors
    # At most half of a multiprocessor's shared memory, so that the next kernel can begin beside this one.
    STAGES = min(11, (110 if small else 200) * 1024 // stage)
    return BM, BN, STAGES, SPLIT, 2 if two else 1


@functools.cache
def skinny_kernel(BM: int, BN: int, STAGES: int, SPLIT: int, MIN_BLOCKS: int, AFTER: str, HEAD_DIM: int = 0):
    """The kernel for one shape of tile. Grid: (tiles * SPLIT, blocks of BN rows), clusters of SPLIT."""
    GROUPS = BM // 64
    CONSUMERS = 128 * GROUPS
    THREADS = CONSUMERS + 32
    STAGE, X_OFFSET = (BM + BN) * 2 * BK, BM * 2 * BK
    PITCH = BM + 4  # floats a row of x in the tile of sums: no bank conflicts
    PAIRED, ROPE, SILU, ADD = AFTER in ("silu", "rope"), AFTER == "rope", AFTER == "silu", AFTER == "add"
    OUTPUTS = BM // 2 if PAIRED else BM  # of a tile, a pair counted once
    UNITS = BN * OUTPUTS // 4  # a thread stores four outputs of a row at a time
    PER_BLOCK = UNITS // SPLIT
    SHARED = STAGES * STAGE + 16 * STAGES
    assert not ROPE or BM == HEAD_DIM
    assert UNITS % SPLIT == 0 and STAGES * STAGE >= BN * PITCH * 4
    multiply, wait_all, zero = multiply_64(BN), multiply_wait_all(BN // 2), zeros(BN // 2)
    put, add_blocks = put_sums(BN // 2, PITCH), cluster_sum(SPLIT)

    @device_function
    def load_weights(to, weight_map, column, first, num_outputs, barrier):
        if SILU:
            tensor_load_once(to, weight_map, column, np.uint32(first), barrier)
            tensor_load_once(np.uint32(to + X_OFFSET // 2), weight_map, column,
                             np.uint32(first + np.uint32(num_outputs) // np.uint32(2)), barrier)
        else:
            tensor_load_once(to, weight_map, column, np.uint32(first), barrier)

    @kernel(signature=SIGNATURE, max_threads=THREADS, min_blocks=MIN_BLOCKS)
    def skinny(weight_map, x_map, out, positions, slots, cos_sin, k_cache, v_cache, num_rows, num_outputs, depth,
               num_heads, num_kv_heads, block_size):
        """Maps: of the weight with boxes of BM (silu: BM / 2) rows, of x with boxes of BN."""
        thread, lane = thread_index(), lane_index()
        shared = dynamic_shared()
        rank = np.uint32(block_index_x() % np.uint32(SPLIT))
        tile = np.uint32(block_index_x() // np.uint32(SPLIT))
        first_row = np.uint32(block_index_y() * BN)
        first = np.uint32(tile * OUTPUTS) if SILU else np.uint32(tile * BM)
        arrived = np.uint32(shared + STAGES * STAGE)
        freed = np.uint32(arrived + 8 * STAGES)
        let_next_kernel_start()
        if thread == 0:
            for i in range(STAGES):
                barrier_init(np.uint32(arrived + 8 * i), np.uint32(1))
                barrier_init(np.uint32(freed + 8 * i), np.uint32(4 * GROUPS))
            barriers_ready()
        cuda.syncthreads()
        steps = np.uint32((np.uint32(depth) + BK - 1) // np.uint32(BK))
        k = np.uint32(np.uint32(rank * steps) // np.uint32(SPLIT))
        end = np.uint32(np.uint32((rank + 1) * steps) // np.uint32(SPLIT))
        stage, phase = np.uint32(0), np.uint32(0)
        if thread >= CONSUMERS:
            if thread == CONSUMERS:
                tensor_map_acquire(weight_map)
                tensor_map_acquire(x_map)
                filled = min(np.uint32(STAGES), np.uint32(end - k))
                i = np.uint32(0)
                while i < filled:  # weights do not depend on the kernel before
                    barrier_expect(np.uint32(arrived + 8 * i), np.uint32(STAGE))
                    load_weights(np.uint32(shared + i * STAGE), weight_map, np.uint32((k + i) * BK), first, num_outputs,
                                 np.uint32(arrived + 8 * i))
                    i = np.uint32(i + 1)
                wait_for_previous_kernel()
                i = np.uint32(0)
                while i < filled:
                    tensor_load(np.uint32(shared + i * STAGE + X_OFFSET), x_map, np.uint32((k + i) * BK), first_row,
                                np.uint32(arrived + 8 * i))
                    i = np.uint32(i + 1)
                k = np.uint32(k + filled)
                while k < end:
                    barrier_wait(np.uint32(freed + 8 * stage), phase)
                    barrier = np.uint32(arrived + 8 * stage)
                    to = np.uint32(shared + stage * STAGE)
                    barrier_expect(barrier, np.uint32(STAGE))
                    load_weights(to, weight_map, np.uint32(k * BK), first, num_outputs, barrier)
                    tensor_load(np.uint32(to + X_OFFSET), x_map, np.uint32(k * BK), first_row, barrier)
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
                if k > start and lane == 0:
                    barrier_arrive(used)
                used = np.uint32(freed + 8 * stage)
                k = np.uint32(k + 1)
                stage = np.uint32(stage + 1)
                if stage == STAGES:
                    stage, phase = np.uint32(0), np.uint32(phase ^ np.uint32(1))
            sums = wait_all(sums)
        cuda.syncthreads()  # all have been read: the stages' memory now takes the sums
        if thread < CONSUMERS:
            row = np.uint32(np.uint32(thread // np.uint32(32)) * 16 + lane // np.uint32(4))
            put(np.uint32(shared + ((lane % np.uint32(4)) * (2 * PITCH) + row) * 4), sums)
        if SPLIT > 1:
            cluster_arrive()
            cluster_wait()
        else:
            cuda.syncthreads()

        wait_for_previous_kernel()  # has long ended; this makes what it wrote visible here too
        unit = np.uint32(rank * PER_BLOCK + thread)
        while unit < rank * PER_BLOCK + PER_BLOCK:
            n = np.uint32(unit // np.uint32(OUTPUTS // 4))
            m = np.uint32((unit % np.uint32(OUTPUTS // 4)) * 4)
            row = np.uint32(first_row + n)
            at = np.uint32(shared + (n * PITCH + m) * 4)
            v = add_blocks(at)
            low, high = pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])
            if PAIRED:
                v = add_blocks(np.uint32(at + OUTPUTS * 4))
                low_2, high_2 = pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])
                if SILU:
                    half_outputs = np.uint32(num_outputs) // np.uint32(2)
                    if row < num_rows and first + m < half_outputs:
                        a, b, c, d = low_bf16(low), high_bf16(low), low_bf16(high), high_bf16(high)
                        low = pack_bf16(_silu(a), _silu(b))
                        high = pack_bf16(_silu(c), _silu(d))
                        low = pack_bf16(low_bf16(low) * low_bf16(low_2), high_bf16(low) * high_bf16(low_2))
                        high = pack_bf16(low_bf16(high) * low_bf16(high_2), high_bf16(high) * high_bf16(high_2))
                        store_8_bytes(out + (np.uint64(row) * np.uint64(half_outputs) + np.uint64(first + m))
                                      * np.uint64(2), low, high)
                elif row < num_rows:  # rope: the tile is head `tile`, features m.. and HEAD_DIM / 2 + m..
                    if tile < num_heads + num_kv_heads:
                        position = load_u32(positions + np.uint64(row) * np.uint64(4))
                        angle = cos_sin + np.uint64(position) * np.uint64(2 * HEAD_DIM) + np.uint64(m) * np.uint64(2)
                        c_0, c_1 = load_8_bytes(angle)
                        s_0, s_1 = load_8_bytes(angle + np.uint64(HEAD_DIM))
                        low, low_2 = _turn(low, low_2, c_0, s_0)
                        high, high_2 = _turn(high, high_2, c_1, s_1)
                    if tile < num_heads:
                        to = out + (np.uint64(row) * np.uint64(num_outputs) + np.uint64(first + m)) * np.uint64(2)
                        store_8_bytes(to, low, high)
                        store_8_bytes(to + np.uint64(HEAD_DIM), low_2, high_2)
                    else:
                        slot = load_i32(slots + np.uint64(row) * np.uint64(4))
                        if slot >= 0:
                            kv_head, cache = np.uint32(tile - num_heads), k_cache
                            if kv_head >= num_kv_heads:
                                kv_head, cache = np.uint32(kv_head - num_kv_heads), v_cache
                            block = np.uint32(divide(np.uint32(slot), block_size))
                            line = np.uint64((block * num_kv_heads + kv_head) * block_size + slot - block * block_size)
                            to = cache + (line * np.uint64(HEAD_DIM) + np.uint64(m)) * np.uint64(2)
                            store_8_bytes(to, low, high)
                            store_8_bytes(to + np.uint64(HEAD_DIM), low_2, high_2)
            elif row < num_rows and first + m < num_outputs:
                to = out + (np.uint64(row) * np.uint64(num_outputs) + np.uint64(first + m)) * np.uint64(2)
                if ADD:
                    r_0, r_1 = load_8_bytes(to)
                    low = pack_bf16(low_bf16(r_0) + low_bf16(low), high_bf16(r_0) + high_bf16(low))
                    high = pack_bf16(low_bf16(r_1) + low_bf16(high), high_bf16(r_1) + high_bf16(high))
                store_8_bytes(to, low, high)
            unit = np.uint32(unit + THREADS)
        if SPLIT > 1:
            cluster_leave()

    skinny.threads, skinny.shared_bytes = THREADS, SHARED
    skinny.box_rows = BM // 2 if SILU else BM
    return skinny


@device_function
def _silu(x):
    return quotient(x, np.float32(1) + exp2(x * np.float32(-LOG2_E)))


@device_function
def _turn(a, b, cos, sin):
    """Two pairs of features (a, b) by their angles, with the reference's roundings (rope.py); all bf16 pairs."""
    a_cos = pack_bf16(low_bf16(a) * low_bf16(cos), high_bf16(a) * high_bf16(cos))
    b_sin = pack_bf16(low_bf16(b) * low_bf16(sin), high_bf16(b) * high_bf16(sin))
    b_cos = pack_bf16(low_bf16(b) * low_bf16(cos), high_bf16(b) * high_bf16(cos))
    a_sin = pack_bf16(low_bf16(a) * low_bf16(sin), high_bf16(a) * high_bf16(sin))
    return (pack_bf16(low_bf16(a_cos) - low_bf16(b_sin), high_bf16(a_cos) - high_bf16(b_sin)),
            pack_bf16(low_bf16(b_cos) + low_bf16(a_sin), high_bf16(b_cos) + high_bf16(a_sin)))
