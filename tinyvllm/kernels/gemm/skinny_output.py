"""The way out of gemm/skinny.py: a tile of float32 sums becomes rows of bf16, and what follows the product is done.

When a product is finished, each block of a cluster has a tile of sums in shared memory, [row of x][row of weight]:
its part of the columns. Every block adds up 1 / SPLIT of the tile over all of them (distributed shared memory), four
neighbouring outputs of a row at a time and always in the same order, rounds the sums to bf16, and then does what comes
after the product (AFTER):

    "plain"   stores them
    "add"     adds them to the residual
    "silu"    the tile is BM / 2 rows of gate and the BM / 2 of up that belong to them: stores silu(gate) * up
    "rope"    the tile is one head or two: turns queries and keys by their positions' angles, stores the queries in the
              output, and keys and values in the cache, where their slots say

with the roundings that the operations have by themselves (residual_add.py, silu_mul.py, rope.py, kv_cache.py).
"""

import numpy as np

from tinyvllm.kernels.cuda_support import device_function
from tinyvllm.kernels.gemm.few_rows_output import LOG2_E
from tinyvllm.kernels.hopper import cluster_sum
from tinyvllm.kernels.ptx import (
    divide,
    exp2,
    high_bf16,
    load_8_bytes,
    load_i32,
    load_u32,
    low_bf16,
    pack_bf16,
    quotient,
    store_8_bytes,
    wait_for_previous_kernel,
)

__all__ = ["pitch", "store_tile"]


def pitch(BM: int) -> int:
    """Floats from one row of x to the next in a tile of sums: no bank conflicts."""
    return BM + 4


def store_tile(BM: int, BN: int, SPLIT: int, THREADS: int, AFTER: str, HEAD_DIM: int):
    """A function for the kernel: store(shared, thread, rank, first_block, tile, first_row, out, positions, slots,
    cos_sin, k_cache, v_cache, num_rows, num_outputs, num_heads, num_kv_heads, block_size).

    All threads of a block call it when all sums of its cluster are there. shared: address of the sums; rank: this
    block's among the SPLIT that have a part of this tile, of which first_block is the first one's rank in the cluster;
    tile, first_row: where the tile is in the product. out [num_rows, num_outputs], for "silu" half as wide;
    positions, slots int32 [num_rows]; cos_sin [positions, HEAD_DIM]; caches [blocks, num_kv_heads, block_size,
    HEAD_DIM]; all bf16 but those two, given as addresses. The last three numbers, and addresses but out, are of "rope".
    """
    PAIRED, ROPE, SILU, ADD = AFTER in ("silu", "rope"), AFTER == "rope", AFTER == "silu", AFTER == "add"
    PITCH = pitch(BM)
    OUTPUTS = BM // 2 if PAIRED else BM  # of a tile, a pair counted once
    PARTNER = HEAD_DIM // 2 if ROPE else OUTPUTS  # rows of weight from an output to the other one of its pair
    HEADS = BM // HEAD_DIM if ROPE else 1  # of a tile
    APART = PARTNER // 2 if ROPE else OUTPUTS // 2  # a thread stores two times four outputs of a row, so far apart
    LANES = APART // 4  # threads for a row of a head
    UNITS = BN * HEADS * LANES
    PER_BLOCK = UNITS // SPLIT
    FIRST = OUTPUTS if SILU else BM  # rows from one tile to the next
    assert not ROPE or BM % HEAD_DIM == 0
    assert UNITS % SPLIT == 0
    add_blocks = cluster_sum(SPLIT, APART * 4)

    @device_function
    def store(shared, thread, rank, first_block, tile, first_row, out, positions, slots, cos_sin, k_cache, v_cache,
              num_rows, num_outputs, num_heads, num_kv_heads, block_size):
        first = np.uint32(tile * FIRST)
        wait_for_previous_kernel()  # has long ended; this makes what it wrote visible here too
        unit = np.uint32(rank * PER_BLOCK + thread)
        while unit < rank * PER_BLOCK + PER_BLOCK:
            n = np.uint32(unit // np.uint32(HEADS * LANES))
            place = np.uint32(unit % np.uint32(HEADS * LANES))
            head = np.uint32(place // np.uint32(LANES))  # of the tile
            m = np.uint32((place % np.uint32(LANES)) * 4)  # of the head; for all but rope there is one
            row = np.uint32(first_row + n)
            at = np.uint32(shared + (n * PITCH + head * (2 * PARTNER) + m) * 4)
            v = add_blocks(at, first_block)
            a, b = pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])
            c, d = pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])
            if PAIRED:
                v = add_blocks(np.uint32(at + PARTNER * 4), first_block)
                a_2, b_2 = pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])
                c_2, d_2 = pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])
                if SILU:
                    half_outputs = np.uint32(num_outputs) // np.uint32(2)
                    to = out + (np.uint64(row) * np.uint64(half_outputs) + np.uint64(first + m)) * np.uint64(2)
                    if row < num_rows and first + m < half_outputs:
                        store_8_bytes(to, _gate(a, a_2), _gate(b, b_2))
                    if row < num_rows and first + m + APART < half_outputs:
                        store_8_bytes(to + np.uint64(2 * APART), _gate(c, c_2), _gate(d, d_2))
                else:
                    head = np.uint32(tile * HEADS + head)  # of the model: features m.. and HEAD_DIM / 2 + m..
                    if row < num_rows and head < num_heads + num_kv_heads:
                        position = load_u32(positions + np.uint64(row) * np.uint64(4))
                        angle = cos_sin + np.uint64(position) * np.uint64(2 * HEAD_DIM) + np.uint64(m) * np.uint64(2)
                        cos_a, cos_b = load_8_bytes(angle)
                        cos_c, cos_d = load_8_bytes(angle + np.uint64(2 * APART))
                        sin_a, sin_b = load_8_bytes(angle + np.uint64(HEAD_DIM))
                        sin_c, sin_d = load_8_bytes(angle + np.uint64(HEAD_DIM + 2 * APART))
                        a, a_2 = _turn(a, a_2, cos_a, sin_a)
                        b, b_2 = _turn(b, b_2, cos_b, sin_b)
                        c, c_2 = _turn(c, c_2, cos_c, sin_c)
                        d, d_2 = _turn(d, d_2, cos_d, sin_d)
                    stored = row < num_rows and head < num_heads + 2 * num_kv_heads
                    to = out + (np.uint64(row) * np.uint64(num_outputs) + np.uint64(head * HEAD_DIM)) * np.uint64(2)
                    if stored and head >= num_heads:
                        slot = load_i32(slots + np.uint64(row) * np.uint64(4))
                        stored = slot >= 0
                        if stored:
                            kv_head, cache = np.uint32(head - num_heads), k_cache
                            if kv_head >= num_kv_heads:
                                kv_head, cache = np.uint32(kv_head - num_kv_heads), v_cache
                            block = np.uint32(divide(np.uint32(slot), block_size))
                            line = np.uint64((block * num_kv_heads + kv_head) * block_size + slot - block * block_size)
                            to = cache + line * np.uint64(2 * HEAD_DIM)
                    if stored:
                        to = to + np.uint64(m) * np.uint64(2)
                        store_8_bytes(to, a, b)
                        store_8_bytes(to + np.uint64(2 * APART), c, d)
                        store_8_bytes(to + np.uint64(HEAD_DIM), a_2, b_2)
                        store_8_bytes(to + np.uint64(HEAD_DIM + 2 * APART), c_2, d_2)
            elif row < num_rows and first + m < num_outputs:
                to = out + (np.uint64(row) * np.uint64(num_outputs) + np.uint64(first + m)) * np.uint64(2)
                further = to + np.uint64(2 * APART)
                both = first + m + APART < num_outputs
                if ADD:
                    if not both:
                        further = to  # read twice, so that all loads are under way together
                    r_0, r_1 = load_8_bytes(to)
                    r_2, r_3 = load_8_bytes(further)
                    a, b, c, d = _add(a, r_0), _add(b, r_1), _add(c, r_2), _add(d, r_3)
                store_8_bytes(to, a, b)
                if both:
                    store_8_bytes(further, c, d)
            unit = np.uint32(unit + THREADS)

    return store


@device_function
def _add(a, b):
    """Two pairs of bf16."""
    return pack_bf16(low_bf16(b) + low_bf16(a), high_bf16(b) + high_bf16(a))


@device_function
def _gate(gate, up):
    """silu(gate) * up of two pairs of bf16, with the reference's roundings."""
    gated = pack_bf16(_silu(low_bf16(gate)), _silu(high_bf16(gate)))
    return pack_bf16(low_bf16(gated) * low_bf16(up), high_bf16(gated) * high_bf16(up))


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
