"""A few rows of x (up to 8) through the tensor cores, with the neighbours of the product fused in.

Decoding for a few requests is a race to read the weights, and between two products stand small operations that
would each cost a launch and a round trip through memory. So this kernel does, in one go,

    before   x = rms_norm(residual row) with the reference's roundings, if the product has a norm before it
    product  x @ weight.T: weights are the 16-row side of mma.sync, the rows of x its 8 columns
    after    one of     plain      out = bf16(product)
                        add        residual += bf16(product)
                        silu       out = silu(gate) * up
                        rope       turn query and key heads, write keys and values to the paged cache
             (few_rows_output.py)

How the weights flow: a tile is 16 rows of weight; a block's 8 warps share out its columns in chunks of 64, and
each lane holds 16 loads of 16 bytes under way all the time. As soon as a chunk is used, its registers are loaded
again with the chunk four further on, past the end of the tile into the next one. The first 16 loads are asked for
*before* the block waits for the kernel that makes x: while that one ends, this one's weights are already coming.

Where there are fewer tiles than multiprocessors, tiles are 8 rows (NARROW): twice as many blocks, which ask for twice
as much ahead of the wait. mma.sync still has 16 rows and 8 columns, of which x needs 4 at most, so both are used for
columns of weight: a lane's 16 bytes are words 0, 1, 2, 3 of its row, and

    rows 0 to 7     words 0 and 2 of the tile's rows        columns 0 to 3    words 0 and 2 of the rows of x
    rows 8 to 15    words 1 and 3 of the same               columns 4 to 7    words 1 and 3

The quarters in which like meets like are the product's two halves; the other two are of no use.

Two outputs that belong together, gate i and up i, or features i and i + D/2 of a head, come out in one lane: a
tile is then not 16 rows in a row but 8 and their 8 partners (`first_rows`).

Sums: a warp adds its chunks in ascending order, then the 8 warps are added in order, and then a narrow tile's halves;
the sum of squares of the norm is added in pieces of 256 columns. How many rows there are says only whether tiles are
narrow.

The simple versions are rms_norm.py, gemv.py, residual_add.py, silu_mul.py, rope.py and kv_cache.py, one after
the other.
"""

import functools
import math

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel
from tinyvllm.kernels.gemm.few_rows_output import first_rows_of_tile, store_sums
from tinyvllm.kernels.ptx import (
    block_index_x,
    dynamic_shared,
    grid_size_x,
    high_bf16,
    lane_index,
    let_next_kernel_start,
    load_16_bytes,
    load_16_bytes_cached,
    load_shared_16_bytes,
    load_shared_f32,
    load_shared_u32,
    load_u32,
    low_bf16,
    mma_m16n8k16,
    pack_bf16,
    shuffle_xor,
    store_shared_16_bytes,
    store_shared_f32,
    store_shared_two_f32,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["few_rows_kernel", "num_tiles", "can_be_narrow", "MAX_ROWS", "PIECE"]

MAX_ROWS = 8
WARPS = 8
THREADS = 32 * WARPS
# Loads under way are kept in the first-level cache until they arrive, so it has to be large. On an H200 a step of
# Llama 3.2 1B takes 724 us with 33% of that memory shared, 729 with 25%; earlier 728 with 25%, 1057 with 100%.
SHARED_PERCENT = {1: 33, 2: 33, 4: 50}
CHUNK = 64  # columns of a warp's step: two 16-byte loads a lane and row
PIECE = 256  # columns of one partial sum of squares: 32 lanes of 8
# out, x, weight; norm weight, row numbers; positions, slots, cos_sin, k_cache, v_cache; sizes
SIGNATURE = ("uint64",) * 10 + ("int32",) * 6 + ("float32",)


@functools.cache
def few_rows_kernel(ROWS: int, DEPTH: int, NORM: bool, AFTER: str, HEAD_DIM: int = 0, DEPENDENT: bool = False,
                    NARROW: bool = False):
    """The kernel for up to ROWS rows (1, 2, 4 or 8) of DEPTH columns, a multiple of 8; HEAD_DIM: for "rope". NARROW:
    tiles of 8 rows of weight; see can_be_narrow."""
    COLUMNS = 2 * CHUNK if NARROW else CHUNK  # of a warp's step
    # Steps under way: all that registers hold where they are asked for ahead of time, else what hides latency.
    RING = min(4 if DEPENDENT else 2, ceil_div(DEPTH, COLUMNS * WARPS))
    GROUPS = ceil_div(DEPTH, COLUMNS * WARPS * RING)  # rounds of the ring a tile
    PADDED = GROUPS * RING * WARPS * COLUMNS
    PITCH = 2 * PADDED + 64  # bytes a row of x in shared memory: neighbours start 16 banks apart
    PIECES = ceil_div(DEPTH, PIECE)
    WARPS_A_ROW = WARPS // ROWS
    NORM_LOADS = ceil_div(PADDED, 8 * THREADS)
    ROW_LOADS = ceil_div(ceil_div(PADDED, PIECE), WARPS_A_ROW)
    NORM_ROUNDS = ceil_div(PIECES, WARPS_A_ROW)
    SUMS = ROWS * PITCH  # offsets in shared memory
    NORM_WEIGHT = SUMS + 2 * WARPS * 16 * 8 * 4
    SQUARES = NORM_WEIGHT + (2 * PADDED if NORM else 0)
    SHARED = SQUARES + (ROWS * PIECES * 4 if NORM else 0)

    EVEN = DEPTH == PADDED  # then no load can be past the end
    FURTHER = CHUNK * 2 if NARROW else 0  # bytes from what a lane loads first of a step to what it loads second
    assert not NARROW or EVEN and ROWS <= 4

    first_rows, store = first_rows_of_tile(AFTER, HEAD_DIM, NARROW), store_sums(WARPS, AFTER, HEAD_DIM, NARROW)

    @kernel(signature=SIGNATURE, max_threads=THREADS, min_blocks=2)
    def few_rows(out, x, weight, norm_weight, row_numbers, positions, slots, cos_sin, k_cache, v_cache,
                 num_rows, num_outputs, num_tiles, num_heads, num_kv_heads, block_size, eps):
        """num_outputs: rows of weight; row_numbers: which rows of x (0: in order). Block b takes tiles b, b + grid."""
        thread, lane = thread_index(), lane_index()
        warp, g, q = np.uint32(thread // np.uint32(32)), np.uint32(lane // np.uint32(4)), np.uint32(lane % np.uint32(4))
        shared = dynamic_shared()
        tile, last_row = block_index_x(), np.uint32(num_outputs - 1)
        pitch = np.uint64(2 * DEPTH)
        if DEPENDENT:
            let_next_kernel_start()

        # ---- the weights of the first chunks, before anything else ----
        w = cuda.local.array((RING, 2, 2, 4), np.uint32)
        own_column = np.uint32(warp * COLUMNS + q * 8)
        first, second = first_rows(tile, num_outputs)
        row_0 = weight + np.uint64(min(np.uint32(first + g), last_row)) * pitch + np.uint64(own_column * 2)
        row_1 = weight + np.uint64(min(np.uint32(second + g), last_row)) * pitch + np.uint64(own_column * 2 + FURTHER)
        for r in range(RING):
            for h in range(2):
                offset = np.uint64((r * WARPS * COLUMNS + h * 32) * 2)
                if not EVEN:  # past the end x is 0: any weight will do
                    if own_column + r * WARPS * COLUMNS + h * 32 >= DEPTH:
                        offset = np.uint64(0) - np.uint64(own_column * 2)
                w[r, 0, h, 0], w[r, 0, h, 1], w[r, 0, h, 2], w[r, 0, h, 3] = load_16_bytes(row_0 + offset)
                w[r, 1, h, 0], w[r, 1, h, 1], w[r, 1, h, 2], w[r, 1, h, 3] = load_16_bytes(row_1 + offset)
        if NORM:
            for i in range(NORM_LOADS):
                column = np.uint32((thread + i * THREADS) * 8)
                if column < DEPTH:
                    a, b, c, d = load_16_bytes_cached(norm_weight + np.uint64(column) * np.uint64(2))
                    store_shared_16_bytes(np.uint32(shared + NORM_WEIGHT + column * 2), a, b, c, d)
        if DEPENDENT:
            wait_for_previous_kernel()

        # ---- x to shared memory, a row to WARPS_A_ROW warps; zeros past the end ----
        own_row, part = np.uint32(warp // np.uint32(WARPS_A_ROW)), np.uint32(warp % np.uint32(WARPS_A_ROW))
        number = min(np.uint32(own_row), np.uint32(num_rows - 1))
        if row_numbers != 0:
            number = load_u32(row_numbers + np.uint64(number) * np.uint64(4))
        x_row = x + np.uint64(number) * pitch
        own = np.uint32(shared + own_row * PITCH)
        for i in range(ROW_LOADS):
            piece = np.uint32(part + i * WARPS_A_ROW)
            column = np.uint32(piece * PIECE + lane * 8)
            if column < PADDED:
                a, b, c, d = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
                if column < DEPTH:
                    a, b, c, d = load_16_bytes_cached(x_row + np.uint64(column) * np.uint64(2))
                store_shared_16_bytes(np.uint32(own + column * 2), a, b, c, d)
                if NORM:
                    total = low_bf16(a) * low_bf16(a) + high_bf16(a) * high_bf16(a)
                    total = total + low_bf16(b) * low_bf16(b) + high_bf16(b) * high_bf16(b)
                    total = total + low_bf16(c) * low_bf16(c) + high_bf16(c) * high_bf16(c)
                    total = total + low_bf16(d) * low_bf16(d) + high_bf16(d) * high_bf16(d)
                    for offset in (16, 8, 4, 2, 1):
                        total = total + shuffle_xor(total, offset)
                    if lane == 0 and piece < PIECES:
                        store_shared_f32(np.uint32(shared + SQUARES + (own_row * PIECES + piece) * 4), total)
        cuda.syncthreads()
        if NORM:
            total = np.float32(0)
            for i in range(PIECES):
                total = total + load_shared_f32(np.uint32(shared + SQUARES + (own_row * PIECES + i) * 4))
            scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(DEPTH) + eps))
            xs, ns = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
            for i in range(NORM_ROUNDS):
                column = np.uint32((part + i * WARPS_A_ROW) * PIECE + lane * 8)
                if column < DEPTH:
                    at = np.uint32(own + column * 2)
                    xs[0], xs[1], xs[2], xs[3] = load_shared_16_bytes(at)
                    ns[0], ns[1], ns[2], ns[3] = load_shared_16_bytes(np.uint32(shared + NORM_WEIGHT + column * 2))
                    for j in range(4):
                        pair = pack_bf16(low_bf16(xs[j]) * scale, high_bf16(xs[j]) * scale)
                        xs[j] = pack_bf16(low_bf16(ns[j]) * low_bf16(pair), high_bf16(ns[j]) * high_bf16(pair))
                    store_shared_16_bytes(at, xs[0], xs[1], xs[2], xs[3])
            cuda.syncthreads()

        # ---- tiles ----
        x_row, word = g, np.uint32(0)
        if NARROW:
            x_row, word = np.uint32(g % np.uint32(4)), np.uint32(g // np.uint32(4))
        x_from = np.uint32(shared + min(x_row, np.uint32(ROWS - 1)) * PITCH + own_column * 2 + word * 4)
        acc = cuda.local.array(4, np.float32)
        xs = cuda.local.array((2, 4), np.uint32)
        buffer = np.uint32(0)
        while tile < num_tiles:
            next_tile = np.uint32(tile + grid_size_x())
            more = next_tile < num_tiles
            for c in range(4):
                acc[c] = np.float32(0)
            for group in range(GROUPS):
                for r in range(RING):
                    at = np.uint32(x_from + (group * RING + r) * (WARPS * COLUMNS * 2))
                    if NARROW:
                        for i in range(2):
                            for h in range(2):
                                x_at = np.uint32(at + i * FURTHER + h * 64)
                                acc[0], acc[1], acc[2], acc[3] = mma_m16n8k16(
                                    acc[0], acc[1], acc[2], acc[3], w[r, i, h, 0], w[r, i, h, 1], w[r, i, h, 2],
                                    w[r, i, h, 3], load_shared_u32(x_at), load_shared_u32(np.uint32(x_at + 8)))
                    else:
                        for h in range(2):
                            xs[h, 0], xs[h, 1], xs[h, 2], xs[h, 3] = load_shared_16_bytes(np.uint32(at + h * 64))
                        for h in range(2):
                            # k is permuted, alike on both sides: a lane's 16 bytes are its share of two mma steps
                            for s in range(2):
                                acc[0], acc[1], acc[2], acc[3] = mma_m16n8k16(
                                    acc[0], acc[1], acc[2], acc[3], w[r, 0, h, 2 * s], w[r, 1, h, 2 * s],
                                    w[r, 0, h, 2 * s + 1], w[r, 1, h, 2 * s + 1], xs[h, 2 * s], xs[h, 2 * s + 1])
                    # the ring goes on: further along this tile, or at the start of the next one
                    if r == 0 and group == GROUPS - 1 and more:
                        first, second = first_rows(next_tile, num_outputs)
                        row_0 = weight + np.uint64(min(np.uint32(first + g), last_row)) * pitch
                        row_1 = weight + np.uint64(min(np.uint32(second + g), last_row)) * pitch
                        row_0, row_1 = row_0 + np.uint64(own_column * 2), row_1 + np.uint64(own_column * 2 + FURTHER)
                    if group < GROUPS - 1 or more:
                        for h in range(2):
                            ahead = ((group + 1) % GROUPS * RING + r) * WARPS * COLUMNS + h * 32
                            offset = np.uint64(ahead * 2)
                            if not EVEN:
                                if own_column + ahead >= DEPTH:
                                    offset = np.uint64(0) - np.uint64(own_column * 2)
                            w[r, 0, h, 0], w[r, 0, h, 1], w[r, 0, h, 2], w[r, 0, h, 3] = load_16_bytes(row_0 + offset)
                            w[r, 1, h, 0], w[r, 1, h, 1], w[r, 1, h, 2], w[r, 1, h, 3] = load_16_bytes(row_1 + offset)

            # ---- add the warps; two buffers take turns, so one barrier a tile is enough ----
            sums = np.uint32(shared + SUMS + buffer * (WARPS * 16 * 8 * 4))
            store_shared_two_f32(np.uint32(sums + ((warp * 16 + g) * 8 + 2 * q) * 4), acc[0], acc[1])
            store_shared_two_f32(np.uint32(sums + ((warp * 16 + g + 8) * 8 + 2 * q) * 4), acc[2], acc[3])
            cuda.syncthreads()
            buffer = np.uint32(1 - buffer)
            store(sums, thread, tile, out, positions, slots, cos_sin, k_cache, v_cache, num_rows, num_outputs,
                  num_heads, num_kv_heads, block_size)
            tile = next_tile

    few_rows.threads, few_rows.shared_bytes, few_rows.narrow = THREADS, SHARED, NARROW
    few_rows.shared_percent = SHARED_PERCENT.get(ROWS)
    return few_rows


def num_tiles(after: str, num_outputs: int, narrow: bool = False) -> int:
    """Tiles of 16 rows of weight, or of 8 pairs; narrow: of 8 rows."""
    if narrow:
        return ceil_div(num_outputs, 8)
    return ceil_div(num_outputs // 2, 8) if after == "silu" else ceil_div(num_outputs, 16)


def can_be_narrow(num_rows: int, depth: int, after: str, num_outputs: int, num_multiprocessors: int) -> bool:
    """Whether narrow tiles are possible, and faster: of deep rows, which a block cannot ask for as a whole ahead of its
    wait (those of 2,048 columns it can), and where all blocks then run at once.

    On an H200 a step of Llama 3.2 1B takes 739 us with 16 rows a tile, 721 with 8 rows a tile of the products of 8,192
    columns; with those of 2,048 columns narrow too it is 3% longer.
    """
    return (after in ("add", "plain") and num_rows <= 2 and depth > 4 * CHUNK * WARPS
            and depth % (8 * CHUNK * WARPS) == 0 and num_tiles(after, num_outputs) <= num_multiprocessors)
