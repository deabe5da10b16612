"""The NumPy twins against formulas written another way (float64, loops, sorting), and against torch where
installed.

The twins are the oracle of every compiled kernel, so they are held to definitions, not to other kernels.
"""

import numpy as np
import pytest

from tests.kernel_cases import attention_case, fresh_rng, poisoned, random_bf16, ulps
from tinyvllm.kernels.argmax import argmax_numpy
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from tinyvllm.kernels.embedding import embedding_numpy, gather_rows_numpy
from tinyvllm.kernels.gemm.numpy_twin import linear_numpy
from tinyvllm.kernels.kv_cache import write_kv_numpy
from tinyvllm.kernels.philox import philox_numpy, uniform_numpy
from tinyvllm.kernels.residual_add import residual_add_numpy
from tinyvllm.kernels.rms_norm import add_rms_norm_numpy, rms_norm_numpy
from tinyvllm.kernels.rope import rope_numpy
from tinyvllm.kernels.sampling import sample_numpy
from tinyvllm.kernels.silu_mul import silu_mul_numpy
from tinyvllm.kernels.softmax import softmax_numpy


@pytest.fixture
def rng():
    return fresh_rng()


def wide(bits):
    return bf16_to_float32(bits).astype(np.float64)


def as_torch(bits):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def from_torch(tensor):
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


# ---- norms, rope, activation: against float64, and bit for bit against torch's bf16 arithmetic ----


def test_rms_norm_is_within_two_roundings_of_float64(rng):
    x, weight = random_bf16(rng, 6, 300, scale=4), random_bf16(rng, 300)
    out = poisoned(6, 300)
    rms_norm_numpy(out, x, weight, 1e-5)
    exact = wide(weight) * wide(x) / np.sqrt(np.mean(wide(x) ** 2, axis=1, keepdims=True) + 1e-5)
    # 8 significant bits: 2**-8 a rounding
    assert np.all(np.abs(wide(out) - exact) <= (2 * 2**-8 + 2e-5) * np.abs(exact))


def test_rms_norm_rounds_before_the_weight_as_transformers_does(rng):
    x, weight = random_bf16(rng, 6, 300, scale=4), random_bf16(rng, 300)
    tx, tw = as_torch(x), as_torch(weight)
    import torch

    hidden = tx.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
    out = poisoned(6, 300)
    rms_norm_numpy(out, x, weight, 1e-5)
    expected = from_torch(tw * hidden.to(torch.bfloat16))
    # rsqrt and the sum's order may differ
    assert ulps(out, expected) <= 1 and np.mean(out != expected) < 0.01


def test_add_rms_norm_is_add_then_norm_also_in_place(rng):
    x, residual, weight = random_bf16(rng, 3, 64), random_bf16(rng, 3, 64), random_bf16(rng, 64)
    added, expected = residual.copy(), poisoned(3, 64)
    residual_add_numpy(added, x)
    rms_norm_numpy(expected, added, weight, 1e-6)
    add_rms_norm_numpy(x, residual, x, weight, 1e-6)
    np.testing.assert_array_equal(residual, added)
    np.testing.assert_array_equal(x, expected)


def test_residual_add_and_silu_mul_have_torchs_bits(rng):
    x, residual = random_bf16(rng, 5, 77, scale=9), random_bf16(rng, 5, 77)
    expected = from_torch(as_torch(residual) + as_torch(x))
    residual_add_numpy(residual, x)
    np.testing.assert_array_equal(residual, expected)

    import torch

    gate_up, out = random_bf16(rng, 5, 2 * 77, scale=6), poisoned(5, 77)
    silu_mul_numpy(out, gate_up)
    gate, up = as_torch(gate_up[:, :77].copy()), as_torch(gate_up[:, 77:].copy())
    expected = from_torch(torch.nn.functional.silu(gate) * up)
    assert ulps(out, expected) <= 1 and np.mean(out != expected) < 0.01


def test_silu_mul_at_the_ends_of_the_range():
    gate_up = float32_to_bf16(np.array([[-1e30, -200, 0, 200, 1e30, 2, 2, 2, 2, 2]], np.float32))
    out = poisoned(1, 5)
    silu_mul_numpy(out, gate_up)
    np.testing.assert_array_equal(bf16_to_float32(out)[0], float32_to_float([-0.0, -0.0, 0, 400, 2e30]))


def float32_to_float(values):
    return bf16_to_float32(float32_to_bf16(np.array(values, np.float32)))


def test_rope_turns_pairs_half_a_head_apart_by_the_positions_angle(rng):
    head_dim, position = 16, 500
    frequencies = 1 / 10000 ** (np.arange(8) / 8)
    angles = np.arange(600)[:, None] * frequencies
    cos_sin = float32_to_bf16(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    qkv = random_bf16(rng, 1, (2 + 2 * 1) * head_dim)
    out = qkv.copy()
    rope_numpy(out, np.array([position], np.int32), cos_sin, 2, 1, head_dim)
    for head in range(3):
        before, after = (wide(x[0, head * 16 : head * 16 + 16]) for x in (qkv, out))
        turned = (before[:8] + 1j * before[8:]) * np.exp(1j * position * frequencies)
        np.testing.assert_allclose(after[:8] + 1j * after[8:], turned, atol=0.03 * np.abs(turned).max())
    np.testing.assert_array_equal(out[0, 3 * 16 :], qkv[0, 3 * 16 :])  # values are left alone


def test_rope_has_the_bits_of_transformers_rotate_half(rng):
    import importlib

    pytest.importorskip("torch")
    torch = importlib.import_module("torch")
    qkv, cos_sin = random_bf16(rng, 4, 3 * 32), random_bf16(rng, 50, 32)
    positions = np.array([0, 7, 31, 49], np.int32)
    x = as_torch(qkv[:, :32].copy())
    table = as_torch(cos_sin[positions])
    cos, sin = torch.cat([table[:, :16]] * 2, -1), torch.cat([table[:, 16:]] * 2, -1)
    rotated = torch.cat([-x[:, 16:], x[:, :16]], -1)
    expected = from_torch(x * cos + rotated * sin)
    rope_numpy(qkv, positions, cos_sin, 1, 1, 32)
    np.testing.assert_array_equal(qkv[:, :32], expected)


# ---- gathers, cache ----


def test_gathers_pick_rows(rng):
    table, ids = random_bf16(rng, 9, 5), np.array([3, 3, 0, 8], np.int32)
    for gather in (embedding_numpy, lambda out, ids, table: gather_rows_numpy(out, table, ids)):
        out = poisoned(4, 5)
        gather(out, ids, table)
        assert all((out[i] == table[ids[i]]).all() for i in range(4))


def test_write_kv_puts_each_token_in_its_slot_and_skips_padding(rng):
    k, v = poisoned(4, 2, 3, 8), poisoned(4, 2, 3, 8)
    qkv, slots = random_bf16(rng, 4, (3 + 4) * 8), np.array([7, -1, 0, 11], np.int32)
    write_kv_numpy(k, v, qkv, slots, 3, 2, 8, 3)
    expected_k, expected_v = poisoned(4, 2, 3, 8), poisoned(4, 2, 3, 8)
    for t, slot in enumerate(slots):
        for head in range(2):
            if slot >= 0:
                expected_k[slot // 3, head, slot % 3] = qkv[t, (3 + head) * 8 : (4 + head) * 8]
                expected_v[slot // 3, head, slot % 3] = qkv[t, (5 + head) * 8 : (6 + head) * 8]
    np.testing.assert_array_equal(k, expected_k)
    np.testing.assert_array_equal(v, expected_v)


# ---- linear, attention, softmax ----


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_float64_rounded(rng, with_bias):
    x, weight, bias = random_bf16(rng, 4, 90), random_bf16(rng, 7, 90), random_bf16(rng,
                                                                                    7 if with_bias else 0)
    out = poisoned(4, 7)
    linear_numpy(out, x, weight, bias)
    exact = wide(x) @ wide(weight).T + (wide(bias) if with_bias else 0)
    np.testing.assert_allclose(wide(out), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, block_size",
                         [(4, 2, 8, 4), (3, 3, 10, 1), (6, 1, 16, 7)])
def test_attention_is_the_textbook_loop(rng, num_heads, num_kv_heads, head_dim, block_size):
    contexts, rows = [5, 9, 9, 3, 14], [1, 1, 9, 2, 6]
    case = attention_case(rng, num_heads, num_kv_heads, head_dim, block_size, contexts, rows)
    qkv, k_cache, v_cache, tables, lens, starts, _, scale, *_ = case
    out = poisoned(sum(rows), num_heads * head_dim)
    attention_numpy(out, *case)
    for r, context in enumerate(contexts):
        slots = [(tables[r, p // block_size], p % block_size) for p in range(context)]
        for i in range(rows[r]):
            t, position = starts[r] + i, context - rows[r] + i
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                q = wide(qkv[t, head * head_dim : (head + 1) * head_dim])
                seen = slots[: position + 1]
                keys = np.array([wide(k_cache[block, kv_head, offset]) for block, offset in seen])
                values = np.array([wide(v_cache[block, kv_head, offset]) for block, offset in seen])
                scores = keys @ q * scale
                weights = np.exp(scores - scores.max())
                expected = weights @ values / weights.sum()
                np.testing.assert_allclose(wide(out[t, head * head_dim : (head + 1) * head_dim]), expected,
                                           rtol=2**-8, atol=1e-5)


def test_attention_agrees_with_torch(rng):
    pytest.importorskip("torch")
    import torch

    case = attention_case(rng, 4, 2, 16, 4, [13], [13])
    qkv = as_torch(case[0]).float()
    q = qkv[:, : 4 * 16].reshape(13, 4, 16).transpose(0, 1)
    blocks = case[3][0, :4]
    k, v = (as_torch(c[blocks]).float().permute(1, 0, 2, 3).reshape(2, -1, 16)[:, :13].repeat_interleave(2, 0)
            for c in case[1:3])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = poisoned(13, 64)
    attention_numpy(out, *case)
    np.testing.assert_allclose(bf16_to_float32(out), expected.transpose(0, 1).reshape(13, 64).numpy(),
                               rtol=2**-8, atol=1e-5)


def test_softmax_sums_to_one_and_survives_large_inputs(rng):
    x = rng.standard_normal((3, 2000), dtype=np.float32) * 500
    out = np.full_like(x, np.nan)
    softmax_numpy(out, x)
    exact = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(out, exact / exact.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-30)


# ---- random numbers and sampling ----


# the known answers published with the algorithm (Random123)
@pytest.mark.parametrize("counter, key, words",
                         [([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
                          ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
                          ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
                           "d16cfe09 94fdcceb 5001e420 24126ea1"),])
def test_philox_gives_the_published_answers(counter, key, words):
    result = philox_numpy(*(np.uint64(x) for x in counter + key))
    assert " ".join(f"{int(word):08x}" for word in result) == words


def test_uniform_numbers_are_inside_the_open_interval_and_even(rng):
    u = uniform_numpy(rng.integers(0, 2**64, dtype=np.uint64), np.uint64(3),
                      np.arange(200_000, dtype=np.uint64))
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, 100, (0, 1))[0]
    assert np.sum((counts - 2000) ** 2 / 2000) < 99 + 6 * np.sqrt(2 * 99)  # chi-square, six sigma


def test_argmax_ties_go_to_the_lowest_id_and_nan_never_wins():
    rows = [[1, 3, 3, 2], [np.nan, 1, np.nan, 1], [-np.inf, -np.inf, -5, -np.inf], [np.nan] * 4,
            [-np.inf] * 4, [0, -0.0, 0, -1], [-0.0, 0, 0, -1], [1, np.inf, np.inf, np.nan]]
    out = np.full(len(rows), -7, np.int32)
    argmax_numpy(out, float32_to_bf16(np.array(rows, np.float32)))
    assert out.tolist() == [1, 1, 2, 0, 0, 0, 0, 1]


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seeds=range(4000), position=17):
    n = len(seeds)
    out = np.full(n, -7, np.int32)
    rows = np.tile(float32_to_bf16(np.array([logits], np.float32)), (n, 1))
    sample_numpy(out, rows, np.full(n, temperature, np.float32), np.full(n, top_k, np.int32),
                 np.full(n, top_p, np.float32), np.array(seeds, np.uint64), np.full(n, position))
    return out


def kept(logits, **parameters):
    return sorted(set(draw(logits, **parameters).tolist()))


LOGITS = [2.0, 1.0, 3.0, 1.0, 0.0, -1.0]  # softmax: .216 .079 .586 .079 .029 .011; 1 and 3 tie


def test_draws_follow_the_softmax():
    for temperature in (0.5, 1.0, 2.0):
        counts = np.bincount(draw(LOGITS, temperature), minlength=6)
        p = np.exp(np.array(LOGITS) / temperature)
        expected = p / p.sum() * 4000
        assert np.sum((counts - expected) ** 2 / expected) < 30  # 5 degrees of freedom: one in 70,000


@pytest.mark.parametrize("parameters, ids", [
    (dict(temperature=0), [2]), (dict(top_k=1), [2]), (dict(top_k=2), [0, 2]),
    (dict(top_k=3), [0, 1, 2, 3]),  # ids 1 and 3 tie for third place: both stay
    (dict(top_k=6), [0, 1, 2, 3, 4, 5]), (dict(top_k=100), [0, 1, 2, 3, 4, 5]),
    (dict(top_p=0.0), [2]), (dict(top_p=0.58), [2]), (dict(top_p=0.59), [0, 2]), (dict(top_p=0.8), [0, 2]),
    (dict(top_p=0.81), [0, 1, 2, 3]),  # the tie again: .881 would do, .960 is kept
    (dict(top_p=0.97), [0, 1, 2, 3, 4]), (dict(top_p=1.0), [0, 1, 2, 3, 4, 5]),
    (dict(top_k=2, top_p=0.72), [2]),  # renormalised after top-k: id 2 alone has .731
    (dict(top_k=2, top_p=0.74), [0, 2]),
    (dict(temperature=0.1, top_p=0.99), [2]),  # temperature comes first
])
def test_what_temperature_top_k_and_top_p_keep(parameters, ids):
    assert kept(LOGITS, **parameters) == ids


def test_a_draw_depends_on_seed_and_position_and_not_on_its_row(rng):
    logits = random_bf16(rng, 1, 50).repeat(40, 0)
    seeds, positions = rng.integers(0, 2**64, 40, dtype=np.uint64), rng.integers(0, 2**40, 40)

    def sample(order):
        out = np.zeros(len(order), np.int32)
        ones = np.ones(len(order), np.float32)
        sample_numpy(out, logits[order], ones, np.zeros(len(order), np.int32), ones, seeds[order],
                     positions[order])
        return out

    order = rng.permutation(40)
    together = sample(np.arange(40))
    np.testing.assert_array_equal(sample(order), together[order])
    np.testing.assert_array_equal(np.concatenate([sample(np.array([i])) for i in range(40)]), together)
    assert len(set(together.tolist())) > 5  # seeds matter
    positions = positions + 2**33
    assert (sample(np.arange(40)) != together).any()  # so do positions, high bits included


def test_logits_without_a_number_or_with_infinity_fall_back_to_argmax():
    nan, inf = float("nan"), float("inf")
    assert kept([nan, nan, nan]) == [0] and kept([-inf, -inf]) == [0]
    assert kept([1, inf, nan]) == [1] and kept([1, nan, -inf, 1]) == [0, 3]
