"""The smallest logit that top-k and top-p keep, row by row, from the counts of key_bins.py.

Weights over bins, added up from the top until a target is reached: for top-k a bin weighs what it counts, for top-p its
count times the mass of its key, sampling.py's integers. One block a row, 8 bins a thread; who reaches the target is
found by the sums of warps, then of threads, then bin by bin. Where that is in a crowd, the list tells the numbers in it
apart; and where there are more of them than a list holds, the row itself is searched, as in sampling.py, bit by bit.
"""

import functools
import math

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.fused import key_bins
from tinyvllm.kernels.fused.key_bins import (
    LISTED,
    crowd_of_bin,
    crowd_of_key,
    has_threshold,
    key_of_bin,
    store_shared_u32,
)
from tinyvllm.kernels.ptx import (
    block_index_x,
    dynamic_shared,
    instruction,
    lane_index,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_f32,
    load_i32,
    load_u16,
    load_u32,
    low_bf16,
    store_f32,
    thread_index,
    wait_for_previous_kernel,
    warp_max,
)
from tinyvllm.kernels.sampling import INFINITE_KEY, LOWEST_KEY, ONE, _ordered_key_cuda

__all__ = ["find_kernel", "FIND_THREADS", "MOST_PARTS"]

FIND_THREADS = 1024
MOST_PARTS = 16  # of a row
SLOTS = MOST_PARTS * (LISTED + 1)

# So that the compiler does not lay out a loop of 8 with an exponential in it eight times: it is a number it cannot see.
eight = instruction("mov.u32 $0, 8;", "u32", "")
load_shared_u32 = instruction("ld.shared.b32 $0, [$1];", "u32", "u32", memory=True)
load_shared_u64 = instruction("ld.shared.b64 $0, [$1];", "u64", "u32", memory=True)
store_shared_u64 = instruction("st.shared.b64 [$0], $1;", "", "u32 u64", memory=True)
load_shared_f64 = instruction("ld.shared.f64 $0, [$1];", "f64", "u32", memory=True)
store_shared_f64 = instruction("st.shared.f64 [$0], $1;", "", "u32 f64", memory=True)
add_shared_u64 = instruction("red.shared.add.u64 [$0], $1;", "", "u32 u64", memory=True)
# from the lane so many further on (its own where there is none), from the lane of this number
shuffle_down_u64 = instruction(
    "{ .reg .b32 l, h; mov.b64 {l, h}, $1; shfl.sync.down.b32 l, l, $2, 31, 0xffffffff; "
    "shfl.sync.down.b32 h, h, $2, 31, 0xffffffff; mov.b64 $0, {l, h}; }", "u64", "u64 u32", volatile=True)
shuffle_from_u64 = instruction(
    "{ .reg .b32 l, h; mov.b64 {l, h}, $1; shfl.sync.idx.b32 l, l, $2, 31, 0xffffffff; "
    "shfl.sync.idx.b32 h, h, $2, 31, 0xffffffff; mov.b64 $0, {l, h}; }", "u64", "u64 u32", volatile=True)


@device_function
def _sum_from_here(value, lane):
    """Sum of this lane's value (u64) and those of the lanes after it."""
    for offset in (1, 2, 4, 8, 16):
        other = shuffle_down_u64(value, offset)
        if lane + offset < 32:
            value = np.uint64(value + other)
    return value


@device_function
def _value(key):
    bits = np.uint32(key - 0x8000) if key >= 0x8000 else np.uint32(0xFFFF - key)
    return np.float64(low_bf16(bits))


@device_function
def _weight(key, by_mass, shared):
    """Of one number: 1, or its mass. The temperature and z_max are at the beginning of shared memory."""
    if by_mass:
        z = _value(key) / load_shared_f64(shared)
        return np.uint64(np.int64(math.exp(z - load_shared_f64(np.uint32(shared + 8))) * ONE))
    return np.uint64(1)


@device_function
def _bin_weight(number, count, threshold, by_mass, shared, CROWDS_AT, SMALLEST, DENSE):
    """Of all that are in a bin and not below the threshold. At CROWDS_AT stands what the four crowds weigh."""
    crowd = crowd_of_bin(number, DENSE)
    if crowd < 4:
        return load_shared_u64(np.uint32(shared + CROWDS_AT + crowd * 8))
    key = key_of_bin(number, SMALLEST, DENSE)
    if key < threshold:
        return np.uint64(0)
    return np.uint64(np.uint64(count) * _weight(key, by_mass, shared))


@device_function
def _block_max(value, sums, lane, warp, WARPS):
    """Largest u32 of the block. sums: 8 bytes a warp of shared memory that nobody else is using."""
    value = warp_max(value)
    if lane == 0:
        store_shared_u32(np.uint32(sums + warp * 8), value)
    cuda.syncthreads()
    return warp_max(load_shared_u32(np.uint32(sums + lane * 8)) if lane < WARPS else np.uint32(0))


@device_function
def _row_weight(source, lowest, by_mass, shared, sums, vocab_size, lane, warp, THREADS):
    """Of all numbers of a row whose keys are not below `lowest`. Reads the row: for rows with many outliers."""
    own, i = np.uint64(0), thread_index()
    while i < vocab_size:
        key = _ordered_key_cuda(load_u16(source + np.uint64(i) * np.uint64(2)))
        if key >= lowest:
            own = np.uint64(own + _weight(np.uint32(key), by_mass, shared))
        i = np.uint32(i + THREADS)
    own = _sum_from_here(own, lane)
    cuda.syncthreads()
    if lane == 0:
        store_shared_u64(np.uint32(sums + warp * 8), own)
    cuda.syncthreads()
    own = load_shared_u64(np.uint32(sums + lane * 8)) if lane < THREADS // 32 else np.uint64(0)
    return shuffle_from_u64(_sum_from_here(own, lane), 0)


@functools.cache
def find_kernel(DEPENDENT: bool = False, SMALLEST: int = key_bins.SMALLEST, DENSE: int = key_bins.DENSE,
                BINS: int = key_bins.BINS):
    """BINS: 8 for each of the threads, at most 8192."""
    THREADS = BINS // 8
    WARPS = THREADS // 32
    COUNTS_AT = 16  # in shared memory, after temperature and z_max; then the lists, what those in them weigh, ...
    KEYS_AT = COUNTS_AT + 4 * BINS
    WEIGHTS_AT = KEYS_AT + 4 * SLOTS
    CROWDS_AT = WEIGHTS_AT + 8 * SLOTS
    SUMS_AT = CROWDS_AT + 4 * 8
    FOUND_AT = SUMS_AT + 8 * WARPS

    @kernel(signature=("uint64",) * 6 + ("int32", "int32"), max_threads=THREADS)
    def find(thresholds, records, logits, temperature, top_k, top_p, vocab_size, parts):
        """thresholds float32 [rows]: the smallest logit that is kept. A block a row; parts: a multiple of 4."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        thread, lane, row = thread_index(), lane_index(), block_index_x()
        warp = np.uint32(thread // np.uint32(32))
        if not has_threshold(temperature, top_k, top_p, row, vocab_size):
            return
        shared = dynamic_shared()
        keys, weights = np.uint32(shared + KEYS_AT), np.uint32(shared + WEIGHTS_AT)
        crowds, sums, found = np.uint32(shared + CROWDS_AT), np.uint32(shared + SUMS_AT), np.uint32(shared + FOUND_AT)
        counts = np.uint32(shared + COUNTS_AT + thread * 4)  # bin j of this thread: THREADS * 4 * j further on

        # 1. Add up the parts' counts.
        size = np.uint64(2 * BINS + 4 * (LISTED + 1))
        records += np.uint64(row) * np.uint64(parts) * size
        at = records + np.uint64(thread) * np.uint64(16)
        c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = np.uint32(0)
        part = 0
        while part < parts:
            a0, a1, a2, a3 = load_16_bytes_cached(at)
            b0, b1, b2, b3 = load_16_bytes_cached(at + size)
            d0, d1, d2, d3 = load_16_bytes_cached(at + size * np.uint64(2))
            e0, e1, e2, e3 = load_16_bytes_cached(at + size * np.uint64(3))
            c0, c1 = _add_counts(c0, c1, a0, b0, d0, e0)
            c2, c3 = _add_counts(c2, c3, a1, b1, d1, e1)
            c4, c5 = _add_counts(c4, c5, a2, b2, d2, e2)
            c6, c7 = _add_counts(c6, c7, a3, b3, d3, e3)
            at += size * np.uint64(4)
            part += 4
        for j, total in enumerate((c0, c1, c2, c3, c4, c5, c6, c7)):
            store_shared_u32(np.uint32(counts + THREADS * 4 * j), total)

        # 2. The largest key there is, and the lists.
        largest, crowding = np.uint32(0), np.uint32(0)  # crowding: 0 nobody, 1 all are listed, 2 not all are
        for j in range(8):
            number = np.uint32(thread * 8 + j)
            if load_shared_u32(np.uint32(counts + THREADS * 4 * j)) > 0 and crowd_of_bin(number, DENSE) == 4:
                largest = key_of_bin(number, SMALLEST, DENSE)
        slots = np.uint32(parts * (LISTED + 1))
        slot = thread
        while slot < slots:
            place = np.uint32(slot % np.uint32(LISTED + 1))
            listed = records + np.uint64(slot // np.uint32(LISTED + 1)) * size + np.uint64(2 * BINS)
            number, key = load_u32(listed), load_u32(listed + np.uint64(place) * np.uint64(4))
            if place == 0 or place > number:
                key = np.uint32(0)
            if number > 0:
                crowding = max(crowding, np.uint32(1) if number <= LISTED else np.uint32(2))
            store_shared_u32(np.uint32(keys + slot * 4), key)
            largest = max(largest, key)
            slot = np.uint32(slot + THREADS)
        largest = _block_max(largest, sums, lane, warp, WARPS)
        cuda.syncthreads()
        crowding = _block_max(crowding, sums, lane, warp, WARPS)
        source = logits + np.uint64(row) * np.uint64(vocab_size) * np.uint64(2)
        if crowding == 2:
            i = thread
            while i < vocab_size:
                largest = max(largest, np.uint32(_ordered_key_cuda(load_u16(source + np.uint64(i) * np.uint64(2)))))
                i = np.uint32(i + THREADS)
            cuda.syncthreads()
            largest = _block_max(largest, sums, lane, warp, WARPS)
        if largest == 0 or largest >= INFINITE_KEY:
            if thread == 0:  # infinity is kept, or nothing
                store_f32(thresholds + np.uint64(row) * np.uint64(4), np.float32(np.inf))
            return

        # 3. top-k, then top-p among what that keeps.
        if thread == 0:
            heat = np.float64(load_f32(temperature + np.uint64(row) * np.uint64(4)))
            store_shared_f64(shared, heat)
            store_shared_f64(np.uint32(shared + 8), _value(largest) / heat)
        cuda.syncthreads()
        threshold = np.uint32(LOWEST_KEY)
        for by_mass in range(2):
            k = load_i32(top_k + np.uint64(row) * np.uint64(4))
            p = np.float64(load_f32(top_p + np.uint64(row) * np.uint64(4)))
            wanted = p < 1 if by_mass else 0 < k < vocab_size
            if wanted and crowding == 2:
                known, target = np.uint32(0), np.float64(k)
                for digit in range(17):  # the first time for the total
                    bit = np.uint32(known | np.uint32(0x10000) >> np.uint32(digit))
                    total = _row_weight(source, max(bit, threshold) if digit else threshold, by_mass, shared, sums,
                                        vocab_size, lane, warp, THREADS)
                    if digit == 0:
                        if by_mass:
                            target = max(p * np.float64(total), np.float64(1))
                    elif np.float64(total) >= target:
                        known = bit
                threshold = max(known, threshold)
            elif wanted:
                cuda.syncthreads()  # nobody reads any more what the time before has left
                if crowding:
                    if thread < 4:
                        store_shared_u64(np.uint32(crowds + thread * 8), 0)
                    cuda.syncthreads()
                    slot = thread
                    while slot < slots:
                        key, weight = load_shared_u32(np.uint32(keys + slot * 4)), np.uint64(0)
                        if key >= threshold:
                            weight = _weight(key, by_mass, shared)
                            add_shared_u64(np.uint32(crowds + crowd_of_key(key, SMALLEST) * 8), weight)
                        store_shared_u64(np.uint32(weights + slot * 8), weight)
                        slot = np.uint32(slot + THREADS)
                    cuda.syncthreads()
                own, j = np.uint64(0), np.uint32(0)
                while j < eight():
                    count = load_shared_u32(np.uint32(counts + THREADS * 4 * j))
                    if count > 0:
                        own = np.uint64(own + _bin_weight(np.uint32(thread * 8 + j), count, threshold, by_mass, shared,
                                                          CROWDS_AT, SMALLEST, DENSE))
                    j = np.uint32(j + 1)
                reached = _sum_from_here(own, lane)
                if lane == 0:
                    store_shared_u64(np.uint32(sums + warp * 8), reached)
                cuda.syncthreads()
                of_warps = _sum_from_here(load_shared_u64(np.uint32(sums + lane * 8)) if lane < WARPS
                                          else np.uint64(0), lane)
                total = shuffle_from_u64(of_warps, 0)
                above = shuffle_from_u64(of_warps, np.uint32(warp + 1))
                if warp + 1 < WARPS:
                    reached = np.uint64(reached + above)
                # A target of 0 is reached by nothing at all; the most likely id is always kept.
                target = max(p * np.float64(total), np.float64(1)) if by_mass else np.float64(k)
                above = np.uint64(reached - own)
                if np.float64(above) < target and np.float64(reached) >= target:
                    store_shared_u32(found, np.uint32(thread * 8))
                    store_shared_u64(np.uint32(found + 8), above)
                if np.float64(total) >= target:  # else fewer than k: all of them stay
                    cuda.syncthreads()
                    number, own = np.uint32(load_shared_u32(found) + lane), np.uint64(0)  # a lane, a bin
                    above = load_shared_u64(np.uint32(found + 8))
                    if lane < 8:
                        place = np.uint32((number & 7) * THREADS + (number >> 3))
                        count = load_shared_u32(np.uint32(shared + COUNTS_AT + place * 4))
                        if count > 0:
                            own = _bin_weight(number, count, threshold, by_mass, shared, CROWDS_AT, SMALLEST, DENSE)
                    reached = np.uint64(above + _sum_from_here(own, lane))
                    last = warp_max(lane if np.float64(reached) >= target else np.uint32(0))
                    number = np.uint32(number - lane + last)
                    above = shuffle_from_u64(np.uint64(reached - own), last)
                    crowd = crowd_of_bin(number, DENSE)
                    if crowd == 4:
                        threshold = key_of_bin(number, SMALLEST, DENSE)
                    else:
                        best, slot = np.uint32(0), thread
                        while slot < slots:
                            key = load_shared_u32(np.uint32(keys + slot * 4))
                            if key >= threshold and crowd_of_key(key, SMALLEST) == crowd:
                                reached, other = above, np.uint32(0)
                                while other < slots:
                                    higher = load_shared_u32(np.uint32(keys + other * 4))
                                    if higher >= key and crowd_of_key(higher, SMALLEST) == crowd:
                                        reached = np.uint64(reached + load_shared_u64(np.uint32(weights + other * 8)))
                                    other = np.uint32(other + 1)
                                if np.float64(reached) >= target:
                                    best = max(best, key)
                            slot = np.uint32(slot + THREADS)
                        threshold = _block_max(best, sums, lane, warp, WARPS)
        if thread == 0:
            store_f32(thresholds + np.uint64(row) * np.uint64(4), np.float32(_value(threshold)))

    find.shared_bytes, find.threads = FOUND_AT + 16, THREADS
    return find


@device_function
def _add_counts(low, high, a, b, c, d):
    """Two counts, and four parts' pairs of them."""
    low = np.uint32(low + (a & 0xFFFF) + (b & 0xFFFF) + (c & 0xFFFF) + (d & 0xFFFF))
    return low, np.uint32(high + (a >> 16) + (b >> 16) + (c >> 16) + (d >> 16))
