"""Row-wise kernels with 16-byte accesses: 8 bf16 values a lane at a time. DEPTH, a multiple of 8, is a constant.

    gather_rows   out[t] = table[ids[t]]
    norm_rows     out[t] = rms_norm(x[number of row t]) * weight; the sum of squares in pieces of 256 columns, as
                  in gemm/few_rows.py, so that both give the same bits
    gate_rows     out[t] = silu(gate[t]) * up[t]
    add_rows      residual[t] += x[t]
    keep_rows     kept[positions[t]] = x[t], where positions[t] is not negative

The maths and the simple versions: embedding.py, rms_norm.py, silu_mul.py, residual_add.py, keep_rows.py.
"""

import functools
import math

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, kernel
from tinyvllm.kernels.gemm.few_rows import PIECE
from tinyvllm.kernels.gemm.few_rows_output import LOG2_E
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    dynamic_shared,
    exp2,
    high_bf16,
    lane_index,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_i32,
    load_shared_f32,
    load_u32,
    low_bf16,
    pack_bf16,
    shuffle_xor,
    store_16_bytes,
    store_shared_f32,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["gather_rows_kernel", "norm_rows_kernel", "gate_rows_kernel", "add_rows_kernel", "keep_rows_kernel",
           "column_blocks", "THREADS"]

THREADS = 256
WARPS = THREADS // 32


def column_blocks(depth: int) -> int:
    """Blocks along y for kernels in which a thread has 8 columns."""
    return ceil_div(depth, 8 * THREADS)


@functools.cache
def gather_rows_kernel(DEPTH: int, DEPENDENT: bool = False):
    @kernel(signature=("uint64",) * 3, max_threads=THREADS)
    def gather_rows(out, table, ids):
        """Block (x, y): row x, columns from 2048 y on."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        row, column = block_index_x(), np.uint32((block_index_y() * THREADS + thread_index()) * 8)
        if column < DEPTH:
            number = load_u32(ids + np.uint64(row) * np.uint64(4))
            a, b, c, d = load_16_bytes_cached(table + (np.uint64(number) * np.uint64(DEPTH) + np.uint64(column))
                                              * np.uint64(2))
            store_16_bytes(out + (np.uint64(row) * np.uint64(DEPTH) + np.uint64(column)) * np.uint64(2), a, b, c, d)

    return gather_rows


@functools.cache
def norm_rows_kernel(DEPTH: int, DEPENDENT: bool = False):
    PIECES = ceil_div(DEPTH, PIECE)
    ROUNDS = ceil_div(PIECES, WARPS)

    @kernel(signature=("uint64",) * 4 + ("float32",), max_threads=THREADS)
    def norm_rows(out, x, weight, row_numbers, eps):
        """A block a row. row_numbers: which rows of x (0: in order)."""
        thread, lane, row = thread_index(), lane_index(), block_index_x()
        warp = np.uint32(thread // np.uint32(32))
        shared = dynamic_shared()
        v = cuda.local.array((ROUNDS, 4), np.uint32)
        n = cuda.local.array((ROUNDS, 4), np.uint32)
        for i in range(ROUNDS):
            column = np.uint32((warp + i * WARPS) * PIECE + lane * 8)
            at = np.uint64(column if column < DEPTH else 0) * np.uint64(2)
            n[i, 0], n[i, 1], n[i, 2], n[i, 3] = load_16_bytes_cached(weight + at)
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        number = row
        if row_numbers != 0:
            number = load_u32(row_numbers + np.uint64(row) * np.uint64(4))
        for i in range(ROUNDS):
            column = np.uint32((warp + i * WARPS) * PIECE + lane * 8)
            v[i, 0], v[i, 1], v[i, 2], v[i, 3] = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
            if column < DEPTH:
                v[i, 0], v[i, 1], v[i, 2], v[i, 3] = load_16_bytes_cached(
                    x + (np.uint64(number) * np.uint64(DEPTH) + np.uint64(column)) * np.uint64(2))
            total = low_bf16(v[i, 0]) * low_bf16(v[i, 0]) + high_bf16(v[i, 0]) * high_bf16(v[i, 0])
            for j in range(1, 4):
                total = total + low_bf16(v[i, j]) * low_bf16(v[i, j]) + high_bf16(v[i, j]) * high_bf16(v[i, j])
            for offset in (16, 8, 4, 2, 1):
                total = total + shuffle_xor(total, offset)
            if lane == 0 and warp + i * WARPS < PIECES:
                store_shared_f32(np.uint32(shared + (warp + i * WARPS) * 4), total)
        cuda.syncthreads()
        total = np.float32(0)
        for i in range(PIECES):
            total = total + load_shared_f32(np.uint32(shared + i * 4))
        scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(DEPTH) + eps))
        for i in range(ROUNDS):
            column = np.uint32((warp + i * WARPS) * PIECE + lane * 8)
            if column < DEPTH:
                for j in range(4):
                    pair = pack_bf16(low_bf16(v[i, j]) * scale, high_bf16(v[i, j]) * scale)
                    v[i, j] = pack_bf16(low_bf16(n[i, j]) * low_bf16(pair), high_bf16(n[i, j]) * high_bf16(pair))
                store_16_bytes(out + (np.uint64(row) * np.uint64(DEPTH) + np.uint64(column)) * np.uint64(2),
                               v[i, 0], v[i, 1], v[i, 2], v[i, 3])

    norm_rows.shared_bytes = 4 * PIECES
    return norm_rows


@functools.cache
def gate_rows_kernel(DEPTH: int, DEPENDENT: bool = False):
    @kernel(signature=("uint64",) * 2, max_threads=THREADS)
    def gate_rows(out, gate_up):
        """out [rows, DEPTH], gate_up [rows, 2 DEPTH]. Block (x, y): row x, columns from 2048 y on."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        row, column = block_index_x(), np.uint32((block_index_y() * THREADS + thread_index()) * 8)
        if column < DEPTH:
            gate, up = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
            at = gate_up + (np.uint64(row) * np.uint64(2 * DEPTH) + np.uint64(column)) * np.uint64(2)
            gate[0], gate[1], gate[2], gate[3] = load_16_bytes_cached(at)
            up[0], up[1], up[2], up[3] = load_16_bytes_cached(at + np.uint64(2 * DEPTH))
            for j in range(4):
                low, high = low_bf16(gate[j]), high_bf16(gate[j])
                low = low / (np.float32(1) + exp2(low * np.float32(-LOG2_E)))
                high = high / (np.float32(1) + exp2(high * np.float32(-LOG2_E)))
                pair = pack_bf16(low, high)
                gate[j] = pack_bf16(low_bf16(pair) * low_bf16(up[j]), high_bf16(pair) * high_bf16(up[j]))
            store_16_bytes(out + (np.uint64(row) * np.uint64(DEPTH) + np.uint64(column)) * np.uint64(2),
                           gate[0], gate[1], gate[2], gate[3])

    return gate_rows


@functools.cache
def add_rows_kernel(DEPTH: int, DEPENDENT: bool = False):
    @kernel(signature=("uint64",) * 2, max_threads=THREADS)
    def add_rows(residual, x):
        """Both [rows, DEPTH]. Block (x, y): row x, columns from 2048 y on."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        row, column = block_index_x(), np.uint32((block_index_y() * THREADS + thread_index()) * 8)
        if column < DEPTH:
            r, v = cuda.local.array(4, np.uint32), cuda.local.array(4, np.uint32)
            at = (np.uint64(row) * np.uint64(DEPTH) + np.uint64(column)) * np.uint64(2)
            r[0], r[1], r[2], r[3] = load_16_bytes_cached(residual + at)
            v[0], v[1], v[2], v[3] = load_16_bytes_cached(x + at)
            for j in range(4):
                r[j] = pack_bf16(low_bf16(r[j]) + low_bf16(v[j]), high_bf16(r[j]) + high_bf16(v[j]))
            store_16_bytes(residual + at, r[0], r[1], r[2], r[3])

    return add_rows


@functools.cache
def keep_rows_kernel(WIDTH: int, DEPENDENT: bool = False, SHARED_PERCENT: int | None = None):
    """SHARED_PERCENT: as in attention/decode.py."""

    @kernel(signature=("uint64",) * 3 + ("int32",), max_threads=THREADS)
    def keep_rows(kept, x, positions, pitch):
        """kept [places, WIDTH]; x: rows of `pitch` elements, whose first WIDTH are kept. Block (x, y): as above."""
        if DEPENDENT:  # every block waits, also one that has nothing to do: who waits for this kernel relies on it
            let_next_kernel_start()
            wait_for_previous_kernel()
        row, column = block_index_x(), np.uint32((block_index_y() * THREADS + thread_index()) * 8)
        position = load_i32(positions + np.uint64(row) * np.uint64(4))
        if position >= 0 and column < WIDTH:
            a, b, c, d = load_16_bytes_cached(x + (np.uint64(row) * np.uint64(pitch) + np.uint64(column))
                                              * np.uint64(2))
            store_16_bytes(kept + (np.uint64(position) * np.uint64(WIDTH) + np.uint64(column)) * np.uint64(2),
                           a, b, c, d)

    keep_rows.shared_percent = SHARED_PERCENT
    return keep_rows
