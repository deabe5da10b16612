"""How often each logit occurs in a row: what top-k and top-p need to know, counted by many blocks.

sampling.py orders bf16 patterns as integers, its keys. Here they are counted, one bin a pattern, for the patterns that
logits have in practice, and the bins stand in the order of the numbers (D = DENSE):

    bin        0      1 ............ D     D+1    D+2   D+3    D+4 ............ 2D+3   2D+4    2D+5
    patterns  -big   -2^11 ... -2^-20   -tiny     0    tiny   2^-20 ... 2^11     big   infinity

What is too small or too big stands in a crowd, a bin of many patterns, and in a list as well: a row has next to none of
those. A part of a row, one block's, leaves a record: BINS counts of 16 bits, then LISTED + 1 numbers of 32 bits: how
many stood in crowds, and the keys of the first LISTED of them. thresholds.py takes it from there.
"""

import functools

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, device_function, kernel
from tinyvllm.kernels.ptx import (
    block_index_x,
    block_index_y,
    dynamic_shared,
    grid_size_x,
    instruction,
    let_next_kernel_start,
    load_16_bytes_cached,
    load_f32,
    load_i32,
    load_shared_16_bytes,
    store_16_bytes,
    store_shared_16_bytes,
    thread_index,
    wait_for_previous_kernel,
)

__all__ = ["count_kernel", "record_bytes", "has_threshold", "key_of_bin", "bin_of_crowd", "crowd_of_bin",
           "crowd_of_key", "BINS", "DENSE", "SMALLEST", "LISTED", "MOST_VECTORS", "COUNT_THREADS"]

COUNT_THREADS = 512
SMALLEST = (127 - 20) << 7  # the pattern of 2**-20: from here on a bin each
DENSE = 31 << 7  # so many patterns of each sign
BINS = 8192  # 2 * DENSE + 6, rounded up
LISTED = 63
MOST_VECTORS = 8191  # of 8 logits, in a part: a count has 16 bits
INFINITY = 0x7F80

add_one_shared = instruction("red.shared.add.u32 [$0], 1;", "", "u32", memory=True)
take_number_shared = instruction("atom.shared.add.u32 $0, [$1], 1;", "u32", "u32", memory=True)  # what was there
store_shared_u32 = instruction("st.shared.b32 [$0], $1;", "", "u32 u32", memory=True)


def record_bytes(bins: int = BINS) -> int:
    """Size of a part's record, a multiple of 16."""
    return 2 * bins + 4 * (LISTED + 1)


# ---- which bin is whose: see above ----


@device_function
def key_of_bin(number, SMALLEST, DENSE):
    """The key of a bin that is no crowd."""
    if number == DENSE + 2:
        return np.uint32(0x8000)
    if number == 2 * DENSE + 5:
        return np.uint32(0x8000 + INFINITY)
    if number > DENSE + 2:
        return np.uint32(0x8000 + SMALLEST + number - (DENSE + 4))
    return np.uint32(0x7FFF - SMALLEST - DENSE + number)


@device_function
def bin_of_crowd(crowd, DENSE):
    """crowd: 0 to 3 in the order of their numbers."""
    if crowd == 0:
        return np.uint32(0)
    if crowd == 3:
        return np.uint32(2 * DENSE + 4)
    return np.uint32(DENSE - 1 + 2 * crowd)


@device_function
def crowd_of_bin(number, DENSE):
    """4: a bin of its own."""
    if number == 0:
        return np.uint32(0)
    if number == 2 * DENSE + 4:
        return np.uint32(3)
    if number == DENSE + 1 or number == DENSE + 3:
        return np.uint32((number - DENSE + 1) >> 1)
    return np.uint32(4)


@device_function
def crowd_of_key(key, SMALLEST):
    """key: of a number that is in a crowd."""
    if key >= 0x8000:
        return np.uint32(2) if key - 0x8000 < SMALLEST else np.uint32(3)
    return np.uint32(1) if 0x7FFF - key < SMALLEST else np.uint32(0)


@device_function
def has_threshold(temperature, top_k, top_p, row, vocab_size):
    """Whether a row's parameters may leave any of the vocabulary out. Addresses, as everywhere."""
    at = np.uint64(row) * np.uint64(4)
    k = load_i32(top_k + at)
    return load_f32(temperature + at) > 0 and (load_f32(top_p + at) < 1 or (k > 0 and k < vocab_size))


# ---- counting ----


@device_function
def _count(bits, bins, listed, SMALLEST, DENSE):
    """One logit into its bin. bins, listed: in shared memory."""
    magnitude = np.uint32(bits & 0x7FFF)
    place = np.uint32(magnitude - np.uint32(SMALLEST))
    if place < DENSE:
        number = np.uint32(DENSE - place) if bits >= 0x8000 else np.uint32(DENSE + 4 + place)
        add_one_shared(np.uint32(bins + number * 4))
    elif magnitude <= INFINITY and bits != 0x8000 + INFINITY:  # neither NaN nor -infinity
        number = np.uint32(DENSE + 2)
        if magnitude == INFINITY:
            number = np.uint32(2 * DENSE + 5)
        elif magnitude != 0:
            key = np.uint32(0x7FFF - magnitude) if bits >= 0x8000 else np.uint32(0x8000 + magnitude)
            number = bin_of_crowd(crowd_of_key(key, SMALLEST), DENSE)
            position = take_number_shared(listed)
            if position < LISTED:
                store_shared_u32(np.uint32(listed + 4 + position * 4), key)
        add_one_shared(np.uint32(bins + number * 4))


@functools.cache
def count_kernel(DEPENDENT: bool = False, SMALLEST: int = SMALLEST, DENSE: int = DENSE, BINS: int = BINS,
                 THREADS: int = COUNT_THREADS):
    """BINS: a multiple of 8, at least 2 * DENSE + 6."""
    SHARED_BYTES = 4 * BINS + 4 * (LISTED + 1)

    @kernel(signature=("uint64",) * 5 + ("int32", "int32"), max_threads=THREADS, min_blocks=2048 // THREADS)
    def count(records, logits, temperature, top_k, top_p, vocab_size, num_vectors):
        """Block (x, y): part x of row y, num_vectors times 8 logits. Rows that need no threshold have no records."""
        if DEPENDENT:
            let_next_kernel_start()
            wait_for_previous_kernel()
        thread, part, row = thread_index(), block_index_x(), block_index_y()
        if not has_threshold(temperature, top_k, top_p, row, vocab_size):
            return
        bins = dynamic_shared()
        place = thread
        while place < SHARED_BYTES // 16:
            store_shared_16_bytes(np.uint32(bins + place * 16), 0, 0, 0, 0)
            place = np.uint32(place + THREADS)
        cuda.syncthreads()

        listed = np.uint32(bins + 4 * BINS)
        source = logits + np.uint64(row) * np.uint64(vocab_size) * np.uint64(2)
        vector = np.uint32(part * num_vectors + thread)
        end = min(np.uint32((part + 1) * num_vectors), np.uint32(vocab_size) >> 3)
        while vector < end:
            words = load_16_bytes_cached(source + np.uint64(vector) * np.uint64(16))
            for word in words:
                _count(np.uint32(word & 0xFFFF), bins, listed, SMALLEST, DENSE)
                _count(np.uint32(word >> 16), bins, listed, SMALLEST, DENSE)
            vector = np.uint32(vector + THREADS)
        cuda.syncthreads()

        size = np.uint64(2 * BINS + 4 * (LISTED + 1))
        record = records + (np.uint64(row) * np.uint64(grid_size_x()) + np.uint64(part)) * size
        place = thread
        while place < BINS // 8:
            a, b, c, d = load_shared_16_bytes(np.uint32(bins + place * 32))
            e, f, g, h = load_shared_16_bytes(np.uint32(bins + place * 32 + 16))
            to = record + np.uint64(place) * np.uint64(16)
            store_16_bytes(to, a | b << 16, c | d << 16, e | f << 16, g | h << 16)
            place = np.uint32(place + THREADS)
        if thread < (LISTED + 1) // 4:
            a, b, c, d = load_shared_16_bytes(np.uint32(listed + thread * 16))
            store_16_bytes(record + np.uint64(2 * BINS) + np.uint64(thread) * np.uint64(16), a, b, c, d)

    count.shared_bytes = SHARED_BYTES
    return count
