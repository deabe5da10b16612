"""The draw of sampling.py over a wide vocabulary: the same tokens, with many blocks a row, in four kernels.

    1. count   key_bins.py     part by part: how often each bf16 pattern occurs      only rows with top-k or top-p
    2. find    thresholds.py   row by row: the smallest logit that is kept           only those
    3. draw                    part by part: the best score z + g among what is kept
    4. choose                  row by row: the best of its parts

A score needs Philox and two logarithms in float64, and only the largest counts. Since -log u >= 1 - u,

    score = z - log(-log u) <= z - log(1 - u)

and that bound is cheap in float32, from the upper 32 bits of u. So a thread looks at bounds only, and computes one
score, that of its largest bound. The best score of the block then says what else could still win: only a thread whose
second largest bound is not below it looks at its logits again, with the help of its warp. Bounds are generous by more
than all that is rounded on the way, so nothing that could win is passed over, and the score that wins is sampling.py's.

Greedy rows (temperature 0) take part: there a logit is its own score. Larger wins, then the lower id: as everywhere.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from tinyvllm.kernels.cuda_support import ceil_div, cuda, device_function, kernel
from tinyvllm.kernels.fused.key_bins import MOST_VECTORS, has_threshold, record_bytes, store_shared_u32
from tinyvllm.kernels.fused.thresholds import MOST_PARTS, load_shared_u32, load_shared_u64, store_shared_u64
from tinyvllm.kernels.philox import KEY_STEP_0, KEY_STEP_1, LOW, MULTIPLIER_0, MULTIPLIER_1, WORD
from tinyvllm.kernels.ptx import (
    ballot,
    block_index_x,
    block_index_y,
    count_bits,
    dynamic_shared,
    grid_size_x,
    high_bf16,
    instruction,
    lane_index,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_f32,
    load_u16,
    low_bf16,
    maximum,
    store_16_bytes,
    store_u32,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["draw_kernel", "choose_kernel", "row_words", "random_words", "Plan", "make_plan", "DRAW_THREADS",
           "MOST_COLUMNS"]

DRAW_THREADS = 256
MOST_COLUMNS = 8 * MOST_VECTORS * MOST_PARTS  # of logits; a multiple of 8
LOG2_E = math.log2(math.e)
LOWEST = np.float32(-3.3895313892515355e38)  # the smallest finite bf16
STEEPEST = np.float32(1e30)  # 1 / temperature from which float32 is no help

# (low, high) halves of a product
multiply = instruction("{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }", "u32 u32", "u32 u32")
log2 = instruction("lg2.approx.ftz.f32 $0, $1;", "f32", "f32")
load_u64 = instruction("ld.global.b64 $0, [$1];", "u64", "u64", memory=True)
bits_of_f64 = instruction("mov.b64 $0, $1;", "u64", "f64")
f64_of_bits = instruction("mov.b64 $0, $1;", "f64", "u64")
shuffle_xor_u32 = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "u32", "u32 u32", volatile=True)


class Plan(NamedTuple):
    """How rows are divided among blocks, and where in scratch memory what is (bytes from its start)."""

    count_parts: int  # a multiple of 4
    count_vectors: int  # of 8 logits, in a part
    draw_parts: int
    draw_vectors: int
    thresholds_at: int
    parts_at: int
    scratch_bytes: int


@functools.lru_cache(maxsize=64)
def make_plan(num_rows: int, vocab_size: int, num_multiprocessors: int) -> Plan:
    """vocab_size: at most MOST_COLUMNS. Enough blocks to fill the multiprocessors; more only cost more."""
    vectors = vocab_size // 8
    most = 4 * num_multiprocessors // num_rows
    count_parts = min(MOST_PARTS, max(4, 4 * ceil_div(vectors, 4 * MOST_VECTORS), most // 4 * 4))
    draw_parts = max(1, min(ceil_div(vectors, DRAW_THREADS), most))
    thresholds_at = num_rows * count_parts * record_bytes()
    parts_at = thresholds_at + ceil_div(4 * num_rows, 16) * 16
    return Plan(count_parts, ceil_div(vectors, count_parts), draw_parts, ceil_div(vectors, draw_parts), thresholds_at,
                parts_at, parts_at + 16 * num_rows * draw_parts)


@device_function
def row_words(position, seed):
    """What is the same for all ids of a row in philox.py: six u32 for random_words."""
    k0, k1 = np.uint32(seed & LOW), np.uint32(seed >> WORD)
    c1, c0 = multiply(MULTIPLIER_1, np.uint32(position >> WORD))
    c3, c2 = multiply(MULTIPLIER_0, np.uint32(c0 ^ np.uint32(position & LOW) ^ k0))
    k2, k3 = np.uint32(k0 + np.uint32(KEY_STEP_0)), np.uint32(k1 + np.uint32(KEY_STEP_1))
    return k1, np.uint32(c1 ^ k2), np.uint32(c2 ^ k3), c3, k2, k3


@device_function
def random_words(token_id, row):
    """philox.py's first two words: what two of its ten rounds leave of the id, then the others."""
    c3, c2 = multiply(MULTIPLIER_0, token_id)
    c1, c0 = multiply(MULTIPLIER_1, np.uint32(c2 ^ row[0]))
    c0, c2, c3 = np.uint32(c0 ^ row[1]), np.uint32(c3 ^ row[2]), row[3]
    k0, k1 = row[4], row[5]
    for _ in range(8):
        k0, k1 = np.uint32(k0 + np.uint32(KEY_STEP_0)), np.uint32(k1 + np.uint32(KEY_STEP_1))
        low_0, high_0 = multiply(MULTIPLIER_0, c0)
        low_1, high_1 = multiply(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = np.uint32(high_1 ^ c1 ^ k0), low_1, np.uint32(high_0 ^ c3 ^ k1), low_0
    return c0, c1


@device_function
def _score(x, token_id, heat, row):
    """sampling.py's. row: row_words."""
    w0, w1 = random_words(token_id, row)
    u = (np.float64((np.uint64(w1) << WORD | np.uint64(w0)) >> np.uint64(12)) + 0.5) * 2.0**-52
    return np.float64(x) / heat - math.log(-math.log(u))


@device_function
def _bound(x, token_id, scale, slack, row):
    """At least log2(e) * _score - 32. scale: log2(e) / temperature; slack: scale * 2**-20."""
    rest = np.float32(np.uint32(0xFFFFFFFF) - random_words(token_id, row)[1])  # (1 - u) * 2**32
    return maximum(x * scale + abs(x) * slack - log2(rest), LOWEST)


@device_function
def _ordered(score):
    """float64 as u64 in the order of the numbers, all above 0; -0 and +0 alike."""
    bits = bits_of_f64(score + 0.0)
    return ~bits if bits >> np.uint64(63) else bits | np.uint64(1 << 63)


@device_function
def _better_of_lanes(order, token_id):
    """The best (order, id) of the warp, in every lane."""
    for lanes in (16, 8, 4, 2, 1):
        low = shuffle_xor_u32(np.uint32(order & LOW), lanes)
        high = shuffle_xor_u32(np.uint32(order >> WORD), lanes)
        other, other_id = np.uint64(high) << WORD | np.uint64(low), shuffle_xor_u32(token_id, lanes)
        if other > order or (other == order and other_id < token_id):
            order, token_id = other, other_id
    return order, token_id


@device_function
def _better_of_block(order, token_id, shared, lane, warp, WARPS):
    """The same of the block. shared: 16 bytes a warp."""
    order, token_id = _better_of_lanes(order, token_id)
    if lane == 0:
        store_shared_u64(np.uint32(shared + warp * 16), order)
        store_shared_u32(np.uint32(shared + warp * 16 + 8), token_id)
    cuda.syncthreads()
    order, token_id = np.uint64(0), np.uint32(0)
    if lane < WARPS:
        order = load_shared_u64(np.uint32(shared + lane * 16))
        token_id = load_shared_u32(np.uint32(shared + lane * 16 + 8))
    return _better_of_lanes(order, token_id)


@functools.cache
def draw_kernel(DEPENDENT: bool = False, THREADS: int = DRAW_THREADS):
    WARPS = THREADS // 32

    @kernel(signature=("uint64",) * 8 + ("int32", "int32"), max_threads=THREADS, min_blocks=1024 // THREADS)
    def draw(parts, thresholds, logits, temperature, top_k, top_p, seeds, positions, vocab_size, num_vectors):
        """parts [rows, grid x] of 16 bytes: the best score in order (u64, 0: none), its id. Block (x, y): part x of row
        y, num_vectors times 8 logits."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        thread, lane, part, row = thread_index(), lane_index(), block_index_x(), block_index_y()
        warp = np.uint32(thread // np.uint32(32))
        heat = np.float64(load_f32(temperature + np.uint64(row) * np.uint64(4)))
        lowest = LOWEST  # NaN and -infinity are never kept
        if has_threshold(temperature, top_k, top_p, row, vocab_size):
            lowest = load_f32(thresholds + np.uint64(row) * np.uint64(4))
        at = np.uint64(row) * np.uint64(8)
        words = row_words(load_u64(positions + at), load_u64(seeds + at))
        scale = np.float32(0)
        if heat > 0:
            scale = np.float32(LOG2_E / heat)
        steep = scale > STEEPEST
        if steep:
            scale = np.float32(0)
        slack = scale * np.float32(2.0**-20)

        # 1. The largest bound of this thread, and the second largest.
        source = logits + np.uint64(row) * np.uint64(vocab_size) * np.uint64(2)
        first, end = np.uint32(part * num_vectors), min(np.uint32((part + 1) * num_vectors), np.uint32(vocab_size) >> 3)
        largest, second, best_id = np.float32(-np.inf), np.float32(-np.inf), np.uint32(0)
        vector = np.uint32(first + thread)
        while vector < end:
            a, b, c, d = load_16_bytes_cached(source + np.uint64(vector) * np.uint64(16))
            token_id, past = np.uint32(vector * 8), np.uint32(vector * 8 + 8)
            while token_id < past:
                x = low_bf16(a)
                for _ in range(2):
                    if x >= lowest:
                        bound = x
                        if heat > 0:
                            bound = _bound(x, token_id, scale, slack, words)
                        if bound > largest:
                            largest, second, best_id = bound, largest, token_id
                        elif bound > second:
                            second = bound
                    x, token_id = high_bf16(a), np.uint32(token_id + 1)
                a, b, c = b, c, d
            vector = np.uint32(vector + THREADS)

        # 2. Its score, and the best one of the block.
        order = np.uint64(0)
        if largest > np.float32(-np.inf):
            score = np.float64(largest)
            if heat > 0:
                x = low_bf16(load_u16(source + np.uint64(best_id) * np.uint64(2)))
                score = _score(x, best_id, heat, words)
            order = _ordered(score)
        shared = dynamic_shared()
        order, best_id = _better_of_block(order, best_id, shared, lane, warp, WARPS)

        # 3. What else could be better: see the bounds again, of every thread whose second one is not below that.
        if heat > 0:
            reached = f64_of_bits(order & np.uint64((1 << 63) - 1) if order >> np.uint64(63) else ~order) * LOG2_E
            least = np.float32(reached - abs(reached) * 2.0**-20 - 32.002)
            if steep:
                least = np.float32(-np.inf)
            again = ballot(np.uint32(1) if second > np.float32(-np.inf) and not second < least else np.uint32(0))
            while again:
                other = count_bits((again & (~again + np.uint32(1))) - np.uint32(1))
                again = np.uint32(again & (again - np.uint32(1)))
                vector = np.uint32(first + warp * 32 + other + lane * THREADS)  # one of that lane's vectors each
                while vector < end:
                    token_id, past = np.uint32(vector * 8), np.uint32(vector * 8 + 8)
                    while token_id < past:
                        x = low_bf16(load_u16(source + np.uint64(token_id) * np.uint64(2)))
                        if x >= lowest and not _bound(x, token_id, scale, slack, words) < least:
                            another = _ordered(_score(x, token_id, heat, words))
                            if another > order or (another == order and token_id < best_id):
                                order, best_id = another, token_id
                        token_id = np.uint32(token_id + 1)
                    vector = np.uint32(vector + 32 * THREADS)
            order, best_id = _better_of_block(order, best_id, np.uint32(shared + 16 * WARPS), lane, warp, WARPS)
        if thread == 0:
            number = np.uint64(row) * np.uint64(grid_size_x()) + np.uint64(part)
            store_16_bytes(parts + number * np.uint64(16), np.uint32(order & LOW), np.uint32(order >> WORD), best_id, 0)

    draw.shared_bytes = 2 * 16 * WARPS
    return draw


@functools.cache
def choose_kernel(DEPENDENT: bool = False):
    @kernel(signature=("uint64", "uint64", "int32"), max_threads=32)
    def choose(ids, parts, num_parts):
        """ids int32 [rows]. A warp a row."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        row, part = block_index_x(), lane_index()
        order, token_id = np.uint64(0), np.uint32(0)
        while part < num_parts:
            at = parts + (np.uint64(row) * np.uint64(num_parts) + np.uint64(part)) * np.uint64(16)
            low, high, other_id, _ = load_16_bytes_cached(at)
            other = np.uint64(high) << WORD | np.uint64(low)
            if other > order or (other == order and other_id < token_id):
                order, token_id = other, other_id
            part = np.uint32(part + 32)
        order, token_id = _better_of_lanes(order, token_id)
        if lane_index() == 0:
            store_u32(ids + np.uint64(row) * np.uint64(4), token_id)

    return choose
