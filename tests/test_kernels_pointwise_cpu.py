"""The small CPU kernels (numba.njit) against their NumPy twins: the same bits, or one step where a library
function is in it. Matrix products and attention have their own files."""

import numpy as np
import pytest

from tests.kernel_cases import POISON, fresh_rng, poisoned, random_bf16, sampling_case, ulps
from tinyvllm.kernels import argmax, embedding, kv_cache, residual_add, rms_norm, rope, sampling, silu_mul, softmax


@pytest.fixture
def rng():
    return fresh_rng()


def pack(table):
    """The CPU layout of a [V, H] table: element (v, h) at [v // 16, h // 2, 2 * (v % 16) + h % 2], zeros past
    V and H."""
    rows, columns = table.shape
    packed = np.zeros((-(-rows // 16), -(-columns // 2), 32), np.uint16)
    for v in range(rows):
        for h in range(columns):
            packed[v // 16, h // 2, 2 * (v % 16) + h % 2] = table[v, h]
    return packed


@pytest.mark.parametrize("vocab_size, hidden", [(33, 8), (16, 7), (1, 1), (50, 64)])
def test_embedding_reads_the_packed_table(rng, vocab_size, hidden):
    table, ids = random_bf16(rng, vocab_size, hidden), rng.integers(0, vocab_size, 6).astype(np.int32)
    out = poisoned(6, hidden)
    embedding.embedding_cpu(out, ids, pack(table))
    np.testing.assert_array_equal(out, table[ids])


def test_gather_rows(rng):
    x, indices, out = random_bf16(rng, 9, 5), np.array([8, 0, 8], np.int32), poisoned(3, 5)
    embedding.gather_rows_cpu(out, x, indices)
    np.testing.assert_array_equal(out, x[indices])
    embedding.gather_rows_cpu(out[:0], x, indices[:0])  # a step that samples nothing


@pytest.mark.parametrize("hidden", [1, 64, 130, 2048])
def test_rms_norm_with_and_without_the_residual(rng, hidden):
    x, residual = random_bf16(rng, 4, hidden, scale=5), random_bf16(rng, 4, hidden)
    weight = random_bf16(rng, hidden)
    out, expected = poisoned(4, hidden), poisoned(4, hidden)
    rms_norm.rms_norm_cpu(out, x, weight, 1e-5)
    rms_norm.rms_norm_numpy(expected, x, weight, 1e-5)
    assert ulps(out, expected) <= 2 and np.mean(out != expected) < 0.02
    expected_residual = residual.copy()
    rms_norm.add_rms_norm_numpy(expected, expected_residual, x, weight, 1e-5)
    rms_norm.add_rms_norm_cpu(x, residual, x, weight, 1e-5)  # out is x, as in the forward pass
    np.testing.assert_array_equal(residual, expected_residual)
    assert ulps(x, expected) <= 2 and np.mean(x != expected) < 0.02


def test_a_rows_norm_does_not_depend_on_the_batch(rng):
    x, weight = random_bf16(rng, 9, 333), random_bf16(rng, 333)
    whole, alone = poisoned(9, 333), poisoned(1, 333)
    rms_norm.rms_norm_cpu(whole, x, weight, 1e-5)
    for t in range(9):
        rms_norm.rms_norm_cpu(alone, x[t : t + 1], weight, 1e-5)
        np.testing.assert_array_equal(alone[0], whole[t])


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(4, 2, 64), (1, 1, 2), (3, 1, 80)])
def test_rope_and_write_kv(rng, num_heads, num_kv_heads, head_dim):
    qkv = random_bf16(rng, 5, (num_heads + 2 * num_kv_heads) * head_dim)
    expected = qkv.copy()
    arguments = (rng.integers(0, 9000, 5).astype(np.int32), random_bf16(rng, 9000, head_dim), num_heads,
                 num_kv_heads, head_dim)
    rope.rope_cpu(qkv, *arguments)
    rope.rope_numpy(expected, *arguments)
    np.testing.assert_array_equal(qkv, expected)

    caches, expected = ([poisoned(3, num_kv_heads, 4, head_dim) for _ in range(2)] for _ in range(2))
    arguments = qkv, np.array([11, 3, -1, 0, 6], np.int32), num_heads, num_kv_heads, head_dim, 4
    kv_cache.write_kv_cpu(*caches, *arguments)
    kv_cache.write_kv_numpy(*expected, *arguments)
    np.testing.assert_array_equal(caches, expected)
    assert (caches[0] == POISON).sum() >= 8 * num_kv_heads * head_dim  # eight slots stay untouched


def test_silu_mul_and_residual_add(rng):
    gate_up = random_bf16(rng, 3, 2 * 501, scale=20)
    gate_up[0, :4] = 0xC2C8, 0x42C8, 0xFF00, 0x8000  # -100, 100, a huge negative, -0
    out, expected = poisoned(3, 501), poisoned(3, 501)
    silu_mul.silu_mul_cpu(out, gate_up)
    silu_mul.silu_mul_numpy(expected, gate_up)
    assert ulps(out, expected) <= 1 and np.mean(out != expected) < 0.01
    residual, x = random_bf16(rng, 3, 77, scale=30), random_bf16(rng, 3, 77)
    expected = residual.copy()
    residual_add.residual_add_cpu(residual, x)
    residual_add.residual_add_numpy(expected, x)
    np.testing.assert_array_equal(residual, expected)


def test_nan_passes_through_every_pointwise_kernel(rng):
    x, weight = random_bf16(rng, 2, 64), random_bf16(rng, 64)
    x[1, 9] = POISON
    out = random_bf16(rng, 2, 64)
    rms_norm.rms_norm_cpu(out, x, weight, 1e-5)
    assert ulps(out[1], np.full(64, POISON, np.uint16)) == 0 and ulps(out[0], x[0]) < 1 << 16
    gate_up, out = np.concatenate([x, x], axis=1), random_bf16(rng, 2, 64)
    silu_mul.silu_mul_cpu(out, gate_up)
    assert np.flatnonzero((out[1] & 0x7FFF) > 0x7F80).tolist() == [9]


@pytest.mark.parametrize("columns", [1, 3, 1025])
def test_softmax_naive_and_online(rng, columns):
    x = rng.standard_normal((4, columns), dtype=np.float32) * 40
    expected = np.empty_like(x)
    softmax.softmax_numpy(expected, x)
    for kernel in (softmax.softmax_naive_cpu, softmax.softmax_online_cpu):
        out = np.full_like(x, np.nan)
        kernel(out, x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("vocab_size", [40, 1000, 30011])
def test_argmax_and_sample_give_the_twins_ids(rng, vocab_size):
    logits, *rest = sampling_case(rng, 48, vocab_size)
    ids, expected = np.full(48, -7, np.int32), np.full(48, -7, np.int32)
    argmax.argmax_cpu(ids, logits)
    argmax.argmax_numpy(expected, logits)
    np.testing.assert_array_equal(ids, expected)
    sampling.sample_cpu(ids, logits, *rest)
    sampling.sample_numpy(expected, logits, *rest)
    np.testing.assert_array_equal(ids, expected)
