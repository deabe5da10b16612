"""Random inputs for kernel tests, and the two ways in which bf16 results are compared.

Every case is drawn fresh from a generator that the test seeds from the system, and failures print the seed,
so that a kernel must compute the function and not one remembered example. Set TINYVLLM_TEST_SEED to repeat a
run.
"""

import os
import secrets

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16

POISON = 0x7FC0  # NaN: outputs hold it before a kernel runs, and so do cache slots that no one may read


def fresh_rng():
    """A generator with a seed of its own, printed (pytest shows it when the test fails)."""
    seed = int(os.environ.get("TINYVLLM_TEST_SEED", secrets.randbits(32)))
    print(f"TINYVLLM_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def random_bf16(rng, *shape, scale=1.0):
    """Normal values as bf16 bits."""
    return float32_to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))


def poisoned(*shape):
    return np.full(shape, POISON, np.uint16)


def relative_error(bits, reference_bits):
    """||a - b|| / ||b|| over widened values; NaN if anything is."""
    a, b = (bf16_to_float32(x).astype(np.float64) for x in (bits, reference_bits))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def ulps(bits, reference_bits):
    """Largest distance in steps of bf16. NaN against NaN is 0, against a number it is as far as can be."""
    a, b = (np.asarray(x).astype(np.int64) for x in (bits, reference_bits))
    a_nan, b_nan = (a & 0x7FFF) > 0x7F80, (b & 0x7FFF) > 0x7F80
    a, b = (np.where(x & 0x8000, -(x & 0x7FFF), x) for x in (a, b))
    distance = np.where(a_nan | b_nan, np.where(a_nan & b_nan, 0, 1 << 16), np.abs(a - b))
    return int(distance.max(initial=0))


def assert_close(bits, reference_bits, relative=4e-3):
    """By norm: a correctly rounded bf16 result is off by about 1.7e-3. NaN never passes."""
    assert bits.shape == reference_bits.shape and bits.dtype == np.uint16
    error = relative_error(bits, reference_bits)
    assert error <= relative, f"relative error {error:.2e}, allowed {relative:.0e}"  # false for NaN too


def attention_case(rng, num_heads, num_kv_heads, head_dim, block_size, contexts, rows, scale=None):
    """Arguments of `attention` after `out`, for requests with contexts[r] tokens of which rows[r] are query
    rows.

    Block ids are a random permutation; slots that belong to no token are NaN; block tables have spare columns
    that name a poisoned block.
    """
    contexts, rows = np.asarray(contexts, np.int32), np.asarray(rows, np.int32)
    blocks = -(-contexts // block_size)
    num_blocks = int(blocks.sum()) + 2
    order = rng.permutation(num_blocks).astype(np.int32)
    block_tables = np.full((len(contexts), int(blocks.max()) + 1), order[-1], np.int32)
    caches = [np.full((num_blocks, num_kv_heads, block_size, head_dim), POISON, np.uint16) for _ in range(2)]
    used = 0
    for r, (context, count) in enumerate(zip(contexts, blocks, strict=True)):
        block_tables[r, :count] = order[used : used + count]
        used += count
        position = np.arange(context)
        for cache in caches:
            cache[block_tables[r, position // block_size], :, position % block_size] = random_bf16(
                rng, int(context), num_kv_heads, head_dim)
    query_start_loc = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    num_decodes = 0  # the leading requests with one row
    while num_decodes < len(rows) and rows[num_decodes] == 1:
        num_decodes += 1
    qkv = random_bf16(rng, int(query_start_loc[-1]), (num_heads + 2 * num_kv_heads) * head_dim)
    return (qkv, *caches, block_tables, contexts, query_start_loc, num_decodes,
            head_dim**-0.5 if scale is None else scale, num_heads, num_kv_heads, head_dim, block_size)


def sampling_case(rng, rows, vocab_size):
    """Arguments of `sample` after `out_ids`, over all combinations that matter, odd logits included."""
    logits = random_bf16(rng, rows, vocab_size, scale=3)
    logits[0] = 0xFF80  # nothing above -infinity
    logits[1, ::3] = POISON
    logits[2, vocab_size // 2] = 0x7F80  # +infinity wins without a draw
    logits[3, : vocab_size // 2] = logits[3, 0]  # a wide tie
    logits[4] = POISON
    logits[5, ::2] = 0xFF80
    return (logits, rng.choice([0, 0.3, 1, 2.5], rows).astype(np.float32),
            rng.choice([0, 1, 3, 40, vocab_size + 5], rows).astype(np.int32),
            rng.choice([0, 0.1, 0.5, 0.9, 0.999, 1], rows).astype(np.float32),
            rng.integers(0, 2**64, rows, dtype=np.uint64), rng.integers(0, 2**40, rows))
