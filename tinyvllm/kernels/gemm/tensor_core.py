"""GEMM, step 3: tensor cores, fed by asynchronous copies.

A block owns an output tile of BM rows of x by BN rows of weight and walks along k in steps of 32. Three
things are new.

1. `mma`: a warp multiplies a 16 x 16 by a 16 x 8 tile in one instruction. Its operands live spread over the
registers of
   32 lanes (see ptx.py), and `ldmatrix` loads them from shared memory in just that arrangement. A warp keeps
   MT x NT of the 16 x 8 output tiles in registers, so that each operand it loads is used MT or NT times.

2. `cp.async`: a ring of STAGES tiles in shared memory. While the warps multiply stage s, the copies of the
next stages
   are under way, and nobody waits for memory as long as the ring is deep enough.

       copy       k0  k1  k2  k3  k4 ...    one barrier a step: it says that a stage has arrived for everyone
       multiply           k0  k1  k2 ...    and that everyone is done with the one that is now overwritten

3. Swizzle: a tile row of 32 values is 64 bytes, four chunks of 16. ldmatrix reads the same chunk of 8 rows at
once, and
   in a plain layout those rows sit 64 bytes apart, on top of each other in the 128 bytes of banks. So chunk c
   of row r is stored at place c ^ ((r // 2) % 4), which spreads any 8 rows over all banks.

Edges: rows beyond T or N and chunks beyond K are filled with zeros by the copy itself (it is asked for 0
bytes), and stores check their bounds. K must be a multiple of 8, so that every row starts on a 16-byte
boundary.

Each output is a sum over k in ascending steps of 16, whatever the tile shape: a row's result does not depend
on how many other rows there are, nor on which of the three shapes below was chosen.

Raw addresses (uint64) come in rather than arrays: array indexing would add bounds arithmetic to every access.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel, pointer
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    cp_async_16,
    cp_async_commit,
    cp_async_wait,
    dynamic_shared,
    lane_index,
    ldmatrix_x4,
    load_u16,
    low_bf16,
    mma_m16n8k16,
    pack_bf16,
    store_u16,
    store_u32,
    thread_index,
)

__all__ = ["linear_tensor_core_cuda", "tensor_core_kernel", "TILES", "choose_tile"]

BK = 32  # values of k a step: 64 bytes a row
ROW_BYTES = 2 * BK
SIGNATURE = ("uint64", "uint64", "uint64", "uint64", "int32", "int32", "int32")

# (BM, BN, warps along rows of x, warps along rows of weight, stages), largest first. Shared memory is
# STAGES * (BM + BN) * 64 bytes, and 48 KiB is what a launch gets without asking the driver for more.
TILES = ((128, 128, 2, 4, 3), (64, 64, 2, 2, 4), (32, 64, 2, 2, 6))
WANTED_BLOCKS = 128  # a large GPU has about this many multiprocessors; fewer blocks would leave some idle


def choose_tile(num_rows: int, num_outputs: int) -> tuple[int, int, int, int, int]:
    """The largest tile that still makes enough blocks; the smallest where none does."""
    for tile in TILES:
        blocks = ceil_div(num_rows, tile[0]) * ceil_div(num_outputs, tile[1])
        if num_rows > tile[0] // 2 and blocks >= WANTED_BLOCKS:
            return tile
    return TILES[-1]


@functools.cache
def tensor_core_kernel(BM: int, BN: int, WARPS_M: int, WARPS_N: int, STAGES: int):
    """The kernel for one tile shape; these numbers are constants in it, so that its loops are unrolled."""
    THREADS = 32 * WARPS_M * WARPS_N
    MT, NT = BM // WARPS_M // 16, BN // WARPS_N // 8  # mma tiles of a warp
    X_COPIES, W_COPIES = BM * 4 // THREADS, BN * 4 // THREADS  # 16-byte chunks a thread copies a step
    ROWS_A_PASS = THREADS // 4
    STAGE_BYTES = (BM + BN) * ROW_BYTES
    wait_for_oldest = cp_async_wait[STAGES - 2]

    @kernel(signature=SIGNATURE, max_threads=THREADS, min_blocks=2)
    def tensor_core_gemm(out, x, weight, bias, num_rows, num_outputs, depth):
        """out [num_rows, num_outputs] = x [num_rows, depth] @ weight [num_outputs, depth].T + bias (0:
        none)."""
        thread, lane = thread_index(), lane_index()
        warp_m, warp_n = (thread // 32) % WARPS_M, (thread // 32) // WARPS_M
        first_row, first_output = block_index_x() * BM, block_index_y() * BN
        shared = dynamic_shared()

        # ---- what this thread copies: chunk `chunk` of every ROWS_A_PASS-th row of either tile ----
        copy_row, chunk = thread // 4, thread % 4
        target = np.uint32(shared + copy_row * ROW_BYTES + (chunk ^ ((copy_row // 2) % 4)) * 16)
        pitch = np.uint64(depth) * np.uint64(2)
        x_source = cuda.local.array(X_COPIES, np.uint64)
        x_inside = cuda.local.array(X_COPIES, np.int32)
        w_source = cuda.local.array(W_COPIES, np.uint64)
        w_inside = cuda.local.array(W_COPIES, np.int32)
        for i in range(X_COPIES):
            row = first_row + copy_row + i * ROWS_A_PASS
            x_inside[i] = row < num_rows
            x_source[i] = x + np.uint64(min(row, num_rows - 1)) * pitch + np.uint64(chunk * 16)
        for i in range(W_COPIES):
            row = first_output + copy_row + i * ROWS_A_PASS
            w_inside[i] = row < num_outputs
            w_source[i] = weight + np.uint64(min(row, num_outputs - 1)) * pitch + np.uint64(chunk * 16)

        # ---- where this lane's ldmatrix rows are. The two 8-column halves of A belong to lanes 0-15 and ----
        # ---- 16-31, those of B to lanes 0-7, 16-23 and 8-15, 24-31 ----
        a_row = warp_m * (MT * 16) + lane % 16
        b_row = warp_n * (NT * 8) + lane % 8 + lane // 16 * 8
        a_address = np.uint32(shared + a_row * ROW_BYTES)
        b_address = np.uint32(shared + (BM + b_row) * ROW_BYTES)
        a_chunk, a_swizzle = lane // 16, (a_row // 2) % 4
        b_chunk, b_swizzle = (lane // 8) % 2, (b_row // 2) % 4

        acc = cuda.local.array((MT, NT, 4), np.float32)
        a = cuda.local.array((MT, 4), np.uint32)
        b = cuda.local.array((NT, 2), np.uint32)
        for i in range(MT):
            for j in range(NT):
                for c in range(4):
                    acc[i, j, c] = np.float32(0)

        steps = (depth + BK - 1) // BK
        # ---- fill all stages but one; a step beyond the end copies nothing but still counts as a group ----
        for stage in range(STAGES - 1):
            if stage < steps:
                size = 16 if stage * BK + chunk * 8 < depth else 0
                for i in range(X_COPIES):
                    cp_async_16(target + stage * STAGE_BYTES + i * ROWS_A_PASS * ROW_BYTES,
                                x_source[i] + np.uint64(stage * ROW_BYTES if size else 0), size * x_inside[i])
                for i in range(W_COPIES):
                    cp_async_16(target + stage * STAGE_BYTES + (BM + i * ROWS_A_PASS) * ROW_BYTES,
                                w_source[i] + np.uint64(stage * ROW_BYTES if size else 0), size * w_inside[i])
            cp_async_commit()

        read_stage, write_stage = np.uint32(0), np.uint32(STAGES - 1)
        for step in range(steps):
            wait_for_oldest()  # of this thread's copies, those for `step` have arrived
            cuda.syncthreads()  # everyone's have, and everyone is done with the stage that is filled next

            ahead = step + STAGES - 1
            if ahead < steps:
                size = 16 if ahead * BK + chunk * 8 < depth else 0
                offset = np.uint64(ahead * ROW_BYTES if size else 0)
                write_to = np.uint32(target + write_stage * STAGE_BYTES)
                for i in range(X_COPIES):
                    cp_async_16(write_to + i * ROWS_A_PASS * ROW_BYTES, x_source[i] + offset,
                                size * x_inside[i])
                for i in range(W_COPIES):
                    cp_async_16(write_to + (BM + i * ROWS_A_PASS) * ROW_BYTES, w_source[i] + offset,
                                size * w_inside[i])
            cp_async_commit()

            for half in range(BK // 16):  # the 32 values of k are two mma steps
                stage = read_stage * STAGE_BYTES
                a_from = np.uint32(a_address + stage + ((a_chunk + 2 * half) ^ a_swizzle) * 16)
                b_from = np.uint32(b_address + stage + ((b_chunk + 2 * half) ^ b_swizzle) * 16)
                for i in range(MT):
                    a[i, 0], a[i, 1], a[i, 2], a[i, 3] = ldmatrix_x4(a_from + i * 16 * ROW_BYTES)
                for j in range(0, NT, 2):
                    b[j, 0], b[j, 1], b[j + 1, 0], b[j + 1, 1] = ldmatrix_x4(b_from + j * 8 * ROW_BYTES)
                for i in range(MT):
                    for j in range(NT):
                        acc[i, j, 0], acc[i, j, 1], acc[i, j, 2], acc[i, j, 3] = mma_m16n8k16(
                            acc[i, j, 0], acc[i, j, 1], acc[i, j, 2], acc[i, j, 3],
                            a[i, 0], a[i, 1], a[i, 2], a[i, 3], b[j, 0], b[j, 1])
            read_stage = np.uint32(read_stage + 1) if read_stage + 1 < STAGES else np.uint32(0)
            write_stage = np.uint32(write_stage + 1) if write_stage + 1 < STAGES else np.uint32(0)

        # ---- bias, rounding, store: each lane holds two neighbours of rows g and g + 8 of every tile ----
        even = num_outputs % 2 == 0  # then two neighbours are one aligned 32-bit word
        for j in range(NT):
            column = first_output + warp_n * (NT * 8) + j * 8 + lane % 4 * 2
            bias_0, bias_1 = np.float32(0), np.float32(0)
            if bias != 0:
                if column < num_outputs:
                    bias_0 = low_bf16(load_u16(bias + np.uint64(column) * np.uint64(2)))
                if column + 1 < num_outputs:
                    bias_1 = low_bf16(load_u16(bias + np.uint64(column + 1) * np.uint64(2)))
            for i in range(MT):
                for half in range(2):
                    row = first_row + warp_m * (MT * 16) + i * 16 + lane // 4 + half * 8
                    if row < num_rows and column < num_outputs:
                        pair = pack_bf16(acc[i, j, 2 * half] + bias_0, acc[i, j, 2 * half + 1] + bias_1)
                        element = np.uint64(row) * np.uint64(num_outputs) + np.uint64(column)
                        address = out + element * np.uint64(2)
                        if even:
                            store_u32(address, pair)
                        else:
                            store_u16(address, pair)
                            if column + 1 < num_outputs:
                                store_u16(address + np.uint64(2), np.uint32(pair) >> np.uint32(16))

    tensor_core_gemm.threads = THREADS
    tensor_core_gemm.shared_bytes = STAGES * STAGE_BYTES
    return tensor_core_gemm


def linear_tensor_core_cuda(out, x, weight, bias, tile=None):
    """As linear_numpy, on device arrays; K a multiple of 8. tile: one of TILES, default by shape."""
    (num_rows, depth), num_outputs = x.shape, weight.shape[0]
    tile = tile or choose_tile(num_rows, num_outputs)
    gemm = tensor_core_kernel(*tile)
    grid = ceil_div(num_rows, tile[0]), ceil_div(num_outputs, tile[1])
    gemm[grid, gemm.threads, 0, gemm.shared_bytes](
        pointer(out), pointer(x), pointer(weight), pointer(bias) if bias.shape[0] else 0, num_rows,
        num_outputs, depth)
