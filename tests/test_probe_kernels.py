"""The probe's kernels on the CPU: against their NumPy twins, and against float64 written down independently."""

import numpy as np
import pytest

from tests.forward_case import forward_case
from tests.kernel_cases import POISON, attention_case, fresh_rng, poisoned, random_bf16
from tinyvllm.kernels import cpu_backend, numpy_backend
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.attention.pool import pool_uint8_cpu, pool_uint8_numpy
from tinyvllm.kernels.attention.rows import attention_rows_cpu, attention_rows_numpy
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.kernels.gemm.packing import pack_linear
from tinyvllm.kernels.keep_rows import keep_rows_cpu, keep_rows_numpy
from tinyvllm.model.llama import NOT_WATCHED, Buffers, KVCache, Watch, bind


@pytest.fixture
def rng():
    return fresh_rng()


# ---- keep_rows ----


def test_rows_are_kept_at_their_positions_and_nothing_else_is_touched(rng):
    source, positions = random_bf16(rng, 9, 50), np.array([-1, -1, 7, 8, 3, 10, -1, -1, -1], np.int32)
    for keep_rows in (keep_rows_numpy, keep_rows_cpu):
        kept = poisoned(3, 12, 40)
        keep_rows(kept, 1, source, positions)
        np.testing.assert_array_equal(kept[1, [7, 8, 3, 10]], source[2:6, :40])
        kept[1, [7, 8, 3, 10]] = POISON
        assert (kept == POISON).all()


def test_nothing_is_kept_when_nothing_is_watched(rng):
    for keep_rows in (keep_rows_numpy, keep_rows_cpu):
        keep_rows(NOT_WATCHED.queries, 5, random_bf16(rng, 2, 8), NOT_WATCHED.positions)
        kept = poisoned(1, 4, 8)
        keep_rows(kept, 0, random_bf16(rng, 2, 8), np.full(2, -1, np.int32))
        assert (kept == POISON).all()


@pytest.mark.parametrize("ops", [numpy_backend.OPS, cpu_backend.OPS], ids=["numpy", "cpu"])
def test_a_watched_forward_pass_keeps_queries_and_residual_stream_and_changes_no_bit(rng, ops):
    """What is kept of a chunk in the middle of a batch, against the pass of one layer more or fewer."""
    weights, cache, batch, dims = forward_case(rng, 4, 2, 8, layers=3, hidden=32, intermediate=48, vocab_size=50)
    embed = weights.embed
    if ops is cpu_backend.OPS:
        weights = weights._replace(
            embed=pack_linear(weights.embed), lm_head=pack_linear(weights.lm_head),
            **{name: np.stack([pack_linear(layer) for layer in getattr(weights, name)])
               for name in ("qkv", "o", "gate_up", "down")})
    tokens = len(batch.input_ids)
    row, count = 2, 9  # the third request of forward_case: 9 rows from its beginning
    positions = np.full(tokens, -1, np.int32)
    positions[row:row + count] = range(count)

    def run(layers, watch=NOT_WATCHED):
        sizes = Buffers(residual=32, hidden=32, qkv=(4 + 2 * 2) * 8, attn=32, gate_up=96, act=48, last=32, logits=50)
        buffers = Buffers(*(poisoned(tokens, width) for width in sizes))
        kv = KVCache(cache.copy(), cache[:, ::-1].copy())
        bind(ops)(weights, kv, batch._replace(watch=watch), buffers, dims._replace(num_layers=layers))
        return buffers

    watch = Watch(poisoned(3, 12, 32), poisoned(4, 12, 32), positions)
    whole = run(3, watch)
    np.testing.assert_array_equal(whole.logits, run(3).logits)
    for layers in (1, 2, 3):
        fewer = run(layers)
        # The last layer that ran left its rotated queries in buf.qkv, and in buf.residual what it handed on.
        np.testing.assert_array_equal(watch.queries[layers - 1, :count], fewer.qkv[row:row + count, :32])
        np.testing.assert_array_equal(watch.residual[layers, :count], fewer.residual[row:row + count])
    np.testing.assert_array_equal(watch.residual[0, :count], embed[batch.input_ids[row:row + count]])
    assert (watch.queries[:, count:] == POISON).all() and (watch.residual[:, count:] == POISON).all()


# ---- attention_rows ----


def rows_case(rng, num_heads, num_kv_heads, head_dim, block_size, context, num_layers=2):
    """(queries [L, P, Hq * D], k_cache [L, ...], block_table [blocks]): slots of no token are NaN."""
    cases = [attention_case(rng, num_heads, num_kv_heads, head_dim, block_size, [context], [1])
             for _ in range(num_layers)]
    table = cases[0][3][0]
    caches = []
    for _, k_cache, _, own_table, *_ in cases:  # every layer's keys under the first one's block table
        moved = poisoned(*k_cache.shape)
        used = -(-context // block_size)
        moved[table[:used]] = k_cache[own_table[0][:used]]
        caches.append(moved)
    queries = random_bf16(rng, num_layers, context + 3, num_heads * head_dim)
    return queries, np.stack(caches), table[:-(-context // block_size)].copy()


def exact_rows(queries, k_cache, table, layer, head, row, context, scale):
    """float64 weights of one row, straight from the formula: [context]."""
    block_size, head_dim = k_cache.shape[3:]
    kv_head = head // (queries.shape[2] // head_dim // k_cache.shape[2])
    q = bf16_to_float32(queries[layer, row, head * head_dim:(head + 1) * head_dim]).astype(np.float64)
    scores = np.full(context, -np.inf)
    for column in range(row + 1):
        key = bf16_to_float32(k_cache[layer, table[column // block_size], kv_head, column % block_size])
        scores[column] = scale * float(np.dot(q, key.astype(np.float64)))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), scores


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, block_size, context", [
    (1, 1, 4, 1, 1), (4, 2, 8, 4, 37), (8, 2, 32, 16, 150), (6, 1, 80, 5, 64), (3, 3, 16, 128, 65)])
@pytest.mark.parametrize("attention_rows", [attention_rows_numpy, attention_rows_cpu])
def test_attention_rows_are_the_softmax_of_the_cached_keys(rng, attention_rows, num_heads, num_kv_heads, head_dim,
                                                          block_size, context):
    queries, k_cache, table = rows_case(rng, num_heads, num_kv_heads, head_dim, block_size, context)
    scale = head_dim ** -0.5
    layers, heads = np.array([1, 0], np.int32), np.arange(num_heads, dtype=np.int32)[::-1].copy()
    rows = np.unique(np.r_[0, rng.integers(0, context, 5), context - 1]).astype(np.int32)
    out = np.full((2, num_heads, len(rows), context), np.nan, np.float32)
    statistics = np.full((2, num_heads, len(rows), 2), np.nan, np.float32)
    attention_rows(out, statistics, queries, k_cache, table, layers, heads, rows, scale)
    for i, layer in enumerate(layers):
        for j, head in enumerate(heads):
            for r, row in enumerate(rows):
                weights, scores = exact_rows(queries, k_cache, table, layer, head, row, context, scale)
                # float32 sums of D products: the score is off by some 1e-6, and the weight by that times itself.
                np.testing.assert_allclose(out[i, j, r], weights, rtol=2e-5, atol=1e-12)
                assert (out[i, j, r, row + 1:] == 0).all()
                np.testing.assert_allclose(statistics[i, j, r, 0], scores.max(), rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(statistics[i, j, r, 1], np.exp(scores - scores.max()).sum(), rtol=2e-5)


def test_attention_rows_are_the_weights_that_attention_applies(rng):
    """Times the values they give what the attention operation gives, to its rounding to bfloat16."""
    case = attention_case(rng, 4, 2, 16, 8, [50], [7])
    qkv, k_cache, v_cache, tables, *_ = case
    out = poisoned(7, 64)
    attention_numpy(out, *case)
    queries = poisoned(1, 50, 64)
    queries[0, 43:] = qkv[:, :64]
    weights = np.empty((1, 4, 7, 50), np.float32)
    attention_rows_cpu(weights, np.empty((1, 4, 7, 2), np.float32), queries, k_cache[None], tables[0, :7].copy(),
                       np.zeros(1, np.int32), np.arange(4, dtype=np.int32), np.arange(43, 50, dtype=np.int32), 16**-0.5)
    values = bf16_to_float32(v_cache[tables[0, :7]]).transpose(1, 0, 2, 3).reshape(2, -1, 16)[:, :50]
    for head in range(4):
        expected = weights[0, head].astype(np.float64) @ values[head // 2].astype(np.float64)
        got = bf16_to_float32(out[:, head * 16:(head + 1) * 16])
        np.testing.assert_allclose(got, expected, rtol=2.0**-8, atol=1e-6)


# ---- pool_uint8 ----


@pytest.mark.parametrize("columns, width", [(1, 1), (7, 7), (100, 10), (1023, 64), (65, 64), (5, 2)])
@pytest.mark.parametrize("pool_uint8", [pool_uint8_numpy, pool_uint8_cpu])
def test_pooling_keeps_the_largest_of_every_share(rng, pool_uint8, columns, width):
    weights = rng.random((6, columns), dtype=np.float32) ** 4
    weights[0], weights[1] = 0, 1
    weights[2, -1] = np.nan
    out = np.full((6, width), 77, np.uint8)
    pool_uint8(out, weights)
    borders = [c * columns // width for c in range(width + 1)]
    assert borders[0] == 0 and borders[-1] == columns  # no column is left out
    for n in (0, 1, 3, 4, 5):
        for c in range(width):
            largest = max(weights[n, borders[c]:borders[c + 1]].tolist())
            assert abs(int(out[n, c]) - 255 * largest) <= 0.5 + 1e-4
    assert (out[0] == 0).all() and (out[1] == 255).all() and out[2, -1] == 255


def test_the_twin_and_the_kernel_round_alike(rng):
    weights = (rng.integers(0, 511, (40, 60)) / 510).astype(np.float32)  # many halves
    outs = [np.zeros((40, 13), np.uint8) for _ in range(2)]
    pool_uint8_numpy(outs[0], weights)
    pool_uint8_cpu(outs[1], weights)
    np.testing.assert_array_equal(*outs)
