"""Sizes of prefill_wgmma.py's tiles, and where everything is in a block's shared memory.

    queries    two buffers of ROWS rows                  D values a row: HALVES parts of 64, one behind the other
    keys       STAGES tiles of KEYS rows, PAGES pages each          "
    values     the same                                             "
    barriers   8 bytes each: a pair of "has arrived" and a pair of "is free" for the queries; then STAGES of either
               for the keys, and for the values
    entries    two of 32 bytes: what the queries in a buffer are

A row of shared memory is 64 values, 128 bytes; a head_dim of 128 takes two parts, because 128 bytes is what the
swizzle works on. All tiles begin at multiples of 1024 bytes, where its pattern begins.
"""

from typing import NamedTuple

__all__ = ["Layout", "make_layout", "choose_shape", "can_run"]


class Layout(NamedTuple):
    """Constants of a kernel; sizes in bytes, places in bytes from the beginning of shared memory."""

    D: int  # head_dim
    GROUP: int  # query heads a key head
    BLOCK: int  # tokens a page
    CONSUMERS: int  # warpgroups that compute
    KEYS: int  # a tile
    STAGES: int
    HALVES: int
    ROWS: int  # of queries, 64 a warpgroup
    TOKENS: int  # of queries; rows from TOKENS * GROUP on are idle
    PAGES: int  # a tile of keys
    BOX: int  # size of half a page
    QUERY_HALF: int
    QUERIES: int  # size of a buffer
    KEY_HALF: int
    MATRIX: int  # size of a tile of keys, or of values
    KEYS_AT: int
    VALUES_AT: int
    Q_ARRIVED: int
    Q_FREED: int
    K_ARRIVED: int
    K_FREED: int
    V_ARRIVED: int
    V_FREED: int
    ENTRIES_AT: int
    SHARED: int  # size of it all
    PRODUCER: int  # the producer's first thread
    THREADS: int


def make_layout(D: int, GROUP: int, BLOCK: int, CONSUMERS: int, KEYS: int, STAGES: int) -> Layout:
    """See Layout."""
    halves, rows, row = D // 64, 64 * CONSUMERS, 128
    tokens, pages = rows // GROUP, KEYS // BLOCK
    query_half, key_half = rows * row, KEYS * row
    queries, matrix = halves * query_half, halves * key_half
    values_at = 2 * queries + STAGES * matrix
    barriers, ring = values_at + STAGES * matrix, 8 * STAGES
    entries = barriers + 32 + 4 * ring
    assert halves * pages <= 32, "a lane of the producer asks for half a page"
    return Layout(D, GROUP, BLOCK, CONSUMERS, KEYS, STAGES, halves, rows, tokens, pages, BLOCK * row, query_half,
                  queries, key_half, matrix, 2 * queries, values_at, barriers, barriers + 16, barriers + 32,
                  barriers + 32 + ring, barriers + 32 + 2 * ring, barriers + 32 + 3 * ring, entries, entries + 64,
                  128 * CONSUMERS, 128 * CONSUMERS + 32)


def choose_shape(head_dim: int, block_size: int = 16) -> tuple[int, int, int, int]:
    """(CONSUMERS, KEYS, STAGES, blocks a multiprocessor).

    What limits it is registers, of which a lane has 152 with three warpgroups and 224 with two, and needs KEYS / 2 for
    scores, KEYS / 4 for weights and head_dim / 2 for outputs, and some for the rest; then shared memory. Of each tile
    of keys 64 rows of queries a warpgroup make use, and each tile of queries costs a beginning and an end. At head_dim
    64, TFLOP/s on an H200 for 16 prompts of 1,024, 4 of 4,096 and 64 of 256 tokens:

        three warpgroups of 80 keys 334, 430, 118; of 64 keys 322, 407, 118; two of 96 316, 380, 111; of 128
        323, 408, 109; one of 128, twice a multiprocessor 307, 420, 105
    """
    if head_dim == 64:
        return 3, 80 if 80 % block_size == 0 else 64, 6, 1
    return 2, 96 if 96 % block_size == 0 else 64, 3, 1


def can_run(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> bool:
    """Whether heads are whole halves, a tile holds a token with its heads, and pages tile the tiles of keys."""
    if head_dim not in (64, 128):
        return False
    consumers, keys, _, _ = choose_shape(head_dim, block_size)
    return num_heads // num_kv_heads <= 64 * consumers and block_size % 8 == 0 and keys % block_size == 0
