"""The CPU's matrix products and attention against their NumPy twins, and the promise that a row's bits depend
on the row alone: not on its neighbours, its place, the chunk it came in, the cache or the number of threads.

The other CPU kernels are in test_kernels_pointwise_cpu.py.
"""

import math
import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest

from tests.kernel_cases import POISON, assert_close, attention_case, fresh_rng, poisoned, random_bf16, ulps
from tinyvllm.kernels import cpu_backend, numpy_backend
from tinyvllm.kernels.attention.cpu import attention_cpu
from tinyvllm.kernels.attention.numpy_twin import attention_numpy
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from tinyvllm.kernels.exp import exp_cpu
from tinyvllm.kernels.gemm import tile
from tinyvllm.kernels.gemm.cpu import NARROW, PARALLEL_WORK, WIDE, make_linear
from tinyvllm.kernels.gemm.packing import pack_linear, pack_rows, packed_shape, unpack_linear
from tinyvllm.model.llama import Batch, Buffers, Dims, KVCache, Weights, bind

NO_BIAS = np.zeros(0, np.uint16)
LINEARS = {"plain": make_linear(tile.PLAIN, WIDE), "narrow": make_linear(tile.PLAIN, NARROW)}
if tile.DPBF16 is not None:
    LINEARS["dpbf16"] = make_linear(tile.DPBF16, WIDE)


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(params=["plain", "narrow", "dpbf16"])
def linear(request):
    if request.param not in LINEARS:
        pytest.skip("this processor has no avx512_bf16")
    return LINEARS[request.param]


# ---- packing ----


@pytest.mark.parametrize("num_rows, num_columns", [(1, 1), (16, 2), (17, 3), (40, 31), (100, 64)])
def test_packing_is_the_documented_layout_and_comes_back(rng, num_rows, num_columns):
    weight = random_bf16(rng, num_rows, num_columns)
    packed = pack_linear(weight)
    assert packed.shape == packed_shape(num_rows, num_columns)
    seen = np.zeros(packed.shape, bool)
    for n in range(num_rows):
        for k in range(num_columns):
            place = n // 16, k // 2, 2 * (n % 16) + k % 2
            assert packed[place] == weight[n, k]
            seen[place] = True
    assert not packed[~seen].any()
    np.testing.assert_array_equal(unpack_linear(packed, num_rows, num_columns), weight)


def test_pieces_may_come_in_any_order_and_at_any_row(rng):
    weight = random_bf16(rng, 103, 21)
    packed = np.zeros(packed_shape(*weight.shape), np.uint16)
    borders = [0, 5, 21, 22, 64, 101, 103]
    for i in rng.permutation(len(borders) - 1):
        pack_rows(packed, borders[i], weight[borders[i]:borders[i + 1]])
    np.testing.assert_array_equal(packed, pack_linear(weight))
    frozen = weight[3:40]
    frozen.flags.writeable = False  # as a memory-mapped file is
    pack_rows(packed, 60, frozen)
    np.testing.assert_array_equal(unpack_linear(packed, 103, 21)[60:97], frozen)
    np.testing.assert_array_equal(unpack_linear(packed, 103, 21)[:60], weight[:60])


def test_rows_that_do_not_fit_are_refused(rng):
    packed = np.zeros(packed_shape(32, 8), np.uint16)
    for offset, num_columns in ((30, 8), (-1, 8), (0, 10)):
        with pytest.raises(ValueError, match="rows"):
            pack_rows(packed, offset, random_bf16(rng, 3, num_columns))
    with pytest.raises(TypeError, match="uint16"):
        pack_rows(packed, 0, np.zeros((3, 8), np.float32))
    assert not packed.any()


# ---- linear ----


@pytest.mark.parametrize("num_tokens, num_outputs, num_inputs", [
    (1, 1, 1), (1, 100, 37), (3, 17, 2), (5, 96, 63), (8, 33, 128), (13, 250, 96), (1, 500, 2048),
    (7, 64, 1000)])
def test_linear_is_the_exact_product_rounded_once(rng, linear, num_tokens, num_outputs, num_inputs):
    x, weight = random_bf16(rng, num_tokens, num_inputs), random_bf16(rng, num_outputs, num_inputs)
    for bias in (NO_BIAS, random_bf16(rng, num_outputs, scale=3)):
        out = poisoned(num_tokens, num_outputs)
        linear(out, x, pack_linear(weight), bias)
        exact = bf16_to_float32(x).astype(np.float64) @ bf16_to_float32(weight).astype(np.float64).T
        exact += bf16_to_float32(bias) if bias.size else 0
        # A float32 sum of n terms is off by some sqrt(n) roundings of its largest partial sums; where that is
        # less than half a bf16 step of the result, the result is the right one or its neighbour.
        result, slack = bf16_to_float32(out).astype(np.float64), 2.0 ** -24 * 4 * num_inputs
        step = 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), 2.0 ** -100))) / 128
        assert (np.abs(result - exact) <= step / 2 + slack).all()
        if out.size > 200:
            assert (out == float32_to_bf16(exact)).mean() > 0.99


def test_a_rows_bits_do_not_depend_on_the_batch_or_its_place(rng, linear):
    x, weight, bias = random_bf16(rng, 512, 200), random_bf16(rng, 212, 200), random_bf16(rng, 212)
    packed = pack_linear(weight)
    alone = poisoned(512, 212)
    for t in range(512):
        linear(alone[t:t + 1], x[t:t + 1], packed, bias)
    assert ulps(alone[0], np.full(212, POISON, np.uint16)) > 0
    for num_tokens in (*range(1, 41), 100, 512):
        first = int(rng.integers(0, 513 - num_tokens))
        out = poisoned(num_tokens, 212)
        linear(out, x[first:first + num_tokens], packed, bias)
        np.testing.assert_array_equal(out, alone[first:first + num_tokens])
    order = rng.permutation(512)
    out = poisoned(512, 212)
    linear(out, np.ascontiguousarray(x[order]), packed, bias)
    np.testing.assert_array_equal(out, alone[order])


def test_the_number_of_threads_changes_nothing(rng, linear):
    x, weight = random_bf16(rng, 90, 384), random_bf16(rng, 400, 384)
    assert x.shape[0] * weight.size > PARALLEL_WORK, "the case is too small to be shared out"
    packed, results = pack_linear(weight), []
    try:
        for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(count)
            results.append(poisoned(90, 400))
            linear(results[-1], x, packed, NO_BIAS)
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert_close(results[0], _linear_twin(x, weight))


def test_nan_and_infinity_stay_in_their_row_and_column(rng, linear):
    x, weight = random_bf16(rng, 9, 30), random_bf16(rng, 40, 30)
    clean = poisoned(9, 40)
    linear(clean, x, pack_linear(weight), NO_BIAS)
    x[4, 7], weight[21, 3] = POISON, 0x7F80
    out = np.zeros((9, 40), np.uint16)
    linear(out, x, pack_linear(weight), NO_BIAS)
    values = bf16_to_float32(out)
    assert np.isnan(values[4]).all() and not np.isfinite(values[:, 21]).any()
    rest = np.ones((9, 40), bool)
    rest[4], rest[:, 21] = False, False
    np.testing.assert_array_equal(out[rest], clean[rest])


def test_weight_lanes_past_the_last_row_are_never_looked_at(rng, linear):
    x, weight = random_bf16(rng, 6, 32), random_bf16(rng, 35, 32)
    packed, out, expected = pack_linear(weight), poisoned(6, 35), poisoned(6, 35)
    linear(expected, x, packed, NO_BIAS)
    packed[2, :, 6:] = POISON
    linear(out, x, packed, NO_BIAS)
    np.testing.assert_array_equal(out, expected)


def test_the_environment_chooses_the_step():
    code = "from tinyvllm.kernels.gemm import tile; print(type(tile.STEP).__name__)"

    def choose(value):
        return subprocess.run([sys.executable, "-c", code], env={**os.environ, "TINYVLLM_CPU_LINEAR": value},
                              capture_output=True, text=True)

    assert choose("plain").stdout.strip() == "_PlainStep"
    assert choose("auto").stdout.strip() == ("_PlainStep" if tile.DPBF16 is None else "_Dpbf16Step")
    wrong = choose("fast")
    assert wrong.returncode
    assert "TINYVLLM_CPU_LINEAR is 'fast'; it can be auto, dpbf16 or plain" in wrong.stderr


def _linear_twin(x, weight):
    out = poisoned(x.shape[0], weight.shape[0])
    numpy_backend.OPS["linear"](out, x, weight, NO_BIAS)
    return out


# ---- exp ----


@numba.njit
def _exp_all(x, out):
    for i in range(x.shape[0]):
        out[i] = exp_cpu(x[i])


def test_exp_is_within_two_units_in_the_last_place(rng):
    x = np.concatenate([np.linspace(-87.3, 88.3, 100_001), rng.normal(0, 1e-3, 1000), [0.0, -0.0]])
    x = x.astype(np.float32)
    out = np.full_like(x, np.nan)
    _exp_all(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    x = np.array([-np.inf, -1e30, -88, 89, 1e30, np.inf, np.nan, 0], np.float32)
    out = np.full_like(x, 7)
    _exp_all(x, out)
    np.testing.assert_array_equal(out, [0, 0, 0, np.inf, np.inf, np.inf, np.nan, 1])


# ---- attention ----

SHAPES = [(8, 2, 32), (8, 2, 64), (6, 6, 80), (4, 1, 96), (5, 1, 128), (3, 3, 48), (2, 1, 6)]


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", SHAPES)
@pytest.mark.parametrize("block_size", [16, 5])
def test_attention_is_the_twins(rng, num_heads, num_kv_heads, head_dim, block_size):
    case = attention_case(rng, num_heads, num_kv_heads, head_dim, block_size,
                          contexts=(1, 2, 64, 65, 300, 1, 100, 131, 64), rows=(1, 1, 1, 1, 1, 1, 100, 66, 64))
    tokens = case[0].shape[0]
    out, expected = poisoned(tokens, num_heads * head_dim), poisoned(tokens, num_heads * head_dim)
    attention_cpu(out, *case)
    attention_numpy(expected, *case)
    assert_close(out, expected)
    # Where values cancel, the last bits of float32 sums show; elsewhere results agree to the rounding.
    difference = np.abs(bf16_to_float32(out) - bf16_to_float32(expected))
    assert (difference <= np.maximum(np.abs(bf16_to_float32(expected)) / 128, 1e-5)).all()
    assert (out == expected).mean() > 0.995


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(8, 2, 64), (3, 3, 80)])
def test_attention_gives_a_row_the_same_bits_alone_batched_chunked_and_cached(
        rng, num_heads, num_kv_heads, head_dim):
    length, block_size = 210, 16
    case = attention_case(rng, num_heads, num_kv_heads, head_dim, block_size, (length, 33), (length, 33))
    qkv, k_cache, v_cache, tables, _, _, _, *rest = case
    whole = poisoned(length + 33, num_heads * head_dim)
    attention_cpu(whole, *case)

    def rows(first, last):
        """Rows first .. last of the first request as a step of their own."""
        out = poisoned(last - first, num_heads * head_dim)
        count = last - first
        attention_cpu(out, np.ascontiguousarray(qkv[first:last]), k_cache, v_cache, tables[:1],
                      np.array([last], np.int32), np.array([0, count], np.int32), int(count == 1), *rest)
        return out

    for row in range(0, length, 7):
        np.testing.assert_array_equal(rows(row, row + 1), whole[row:row + 1])
    for chunk in (16, 37, 64, 100):
        for first in range(0, length, chunk):
            last = min(length, first + chunk)
            np.testing.assert_array_equal(rows(first, last), whole[first:last])
    # Other physical blocks, another block size, another place in the batch: the same bits.
    for new_size in (5, 64):
        blocks = -(-length // new_size)
        order = rng.permutation(blocks + 1).astype(np.int32)
        caches = [poisoned(blocks + 1, num_kv_heads, new_size, head_dim) for _ in range(2)]
        positions = np.arange(length)
        for new, old in zip(caches, (k_cache, v_cache), strict=True):
            new[order[positions // new_size], :, positions % new_size] = (
                old[tables[0, positions // block_size], :, positions % block_size])
        scale, *sizes, _ = rest
        batch = np.concatenate([qkv[50:51], qkv[:length]])
        out = poisoned(1 + length, num_heads * head_dim)
        attention_cpu(out, batch, *caches, np.stack([order[:blocks]] * 2), np.array([51, length], np.int32),
                      np.array([0, 1, 1 + length], np.int32), 1, scale, *sizes, new_size)
        np.testing.assert_array_equal(out[0], whole[50])
        np.testing.assert_array_equal(out[1:], whole[:length])


def test_attention_on_one_thread_has_the_same_bits(rng):
    case = attention_case(rng, 8, 2, 64, 16, (700, 300), (1, 300))
    results = []
    try:
        for count in (1, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(count)
            results.append(poisoned(301, 512))
            attention_cpu(results[-1], *case)
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    np.testing.assert_array_equal(*results)


def test_attention_survives_large_scores_and_shows_nan(rng):
    case = list(attention_case(rng, 4, 2, 32, 16, (150, 90), (1, 90)))
    case[0] = float32_to_bf16(bf16_to_float32(case[0]) * 100)  # exp of such scores overflows unless shifted
    out, expected = poisoned(91, 128), poisoned(91, 128)
    attention_cpu(out, *case)
    attention_numpy(expected, *case)
    assert_close(out, expected)
    case[1][case[3][1, 1], :, 4] = POISON  # key 20 of the second request
    attention_cpu(out, *case)
    values = bf16_to_float32(out)
    assert np.isfinite(values[:21]).all() and np.isnan(values[21:]).all()


# ---- the whole forward pass ----


def _model(rng, num_heads, num_kv_heads, head_dim, layers=3, hidden=96, intermediate=161, vocab_size=203,
           bias=True):
    """(plain weights, packed weights, Dims): the first for the twins, the second for the CPU."""
    def matrix(*shape):
        return random_bf16(rng, *shape, scale=1 / math.sqrt(shape[-1]))

    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    angles = np.arange(64)[:, None] * rng.uniform(0.01, 1, head_dim // 2)
    tables = {"embed": random_bf16(rng, vocab_size, hidden), "lm_head": matrix(vocab_size, hidden),
              "qkv": matrix(layers, qkv, hidden), "o": matrix(layers, hidden, num_heads * head_dim),
              "gate_up": matrix(layers, 2 * intermediate, hidden),
              "down": matrix(layers, hidden, intermediate)}
    widths = {"qkv_bias": qkv, "o_bias": hidden, "gate_up_bias": 2 * intermediate, "down_bias": hidden}
    vectors = {name: random_bf16(rng, layers, width if bias else 0) for name, width in widths.items()}
    vectors |= {name: random_bf16(rng, layers, hidden) for name in ("input_norm", "post_attention_norm")}
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    vectors |= {"final_norm": random_bf16(rng, hidden), "no_bias": NO_BIAS,
                "cos_sin": float32_to_bf16(cos_sin)}
    packed = {name: np.stack([pack_linear(x) for x in array]) if array.ndim == 3 else pack_linear(array)
              for name, array in tables.items()}
    dims = Dims(layers, num_heads, num_kv_heads, head_dim, 8, head_dim ** -0.5, 1e-5)
    return Weights(**tables, **vectors), Weights(**packed, **vectors), dims


class _Run:
    """Steps of a forward pass over one KV cache."""

    def __init__(self, forward, weights, dims, vocab_size=203, hidden=96, intermediate=161):
        shape = (dims.num_layers, 32, dims.num_kv_heads, dims.block_size, dims.head_dim)
        self.forward, self.weights, self.dims = forward, weights, dims
        self.kv = KVCache(np.zeros(shape, np.uint16), np.zeros(shape, np.uint16))
        qkv = (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim
        self.buffers = Buffers(poisoned(64, hidden), poisoned(64, hidden), poisoned(64, qkv),
                               poisoned(64, dims.num_heads * dims.head_dim), poisoned(64, 2 * intermediate),
                               poisoned(64, intermediate), poisoned(8, hidden), poisoned(8, vocab_size))

    def step(self, *requests):
        """requests: (block ids, token ids of the step, position of the first). Returns last rows' logits."""

        def int32(values):
            return np.array(values, np.int32)

        tables = np.zeros((len(requests), 8), np.int32)
        ids, positions, slots, lengths, starts = [], [], [], [], [0]
        for r, (blocks, tokens, start) in enumerate(requests):
            tables[r, :len(blocks)] = blocks
            for position, token in enumerate(tokens, start):
                ids.append(token)
                positions.append(position)
                slots.append(blocks[position // 8] * 8 + position % 8)
            lengths.append(start + len(tokens))
            starts.append(starts[-1] + len(tokens))
        batch = Batch(int32(ids), int32(positions), int32(slots), tables, int32(lengths), int32(starts),
                      int32(starts[1:]) - 1, sum(len(tokens) == 1 for _, tokens, _ in requests))
        self.forward(self.weights, self.kv, batch, self.buffers, self.dims)
        return self.buffers.logits[:len(requests)].copy()


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, bias", [(4, 2, 32, False), (3, 1, 80, True)])
def test_the_compiled_forward_is_the_eager_one_and_close_to_the_twins(
        rng, num_heads, num_kv_heads, head_dim, bias):
    plain, packed, dims = _model(rng, num_heads, num_kv_heads, head_dim, bias=bias)
    prompt, other = rng.integers(0, 203, 40).tolist(), rng.integers(0, 203, 9).tolist()
    steps = [[([3, 9, 1, 5, 7], prompt[:30], 0), ([2, 4], other[:4], 0)],
             [([2, 4], other[4:5], 4), ([3, 9, 1, 5, 7], prompt[30:], 30)]]
    runs = [_Run(forward, weights, dims) for forward, weights in (
        (cpu_backend.compiled_forward(), packed), (cpu_backend.eager_forward(), packed),
        (bind(numpy_backend.OPS), plain))]
    for step in steps:
        compiled, eager, twin = (run.step(*step) for run in runs)
        np.testing.assert_array_equal(compiled, eager)
        assert_close(compiled, twin, relative=2e-2)
    np.testing.assert_array_equal(runs[0].kv.k, runs[1].kv.k)


def test_logits_have_the_same_bits_alone_batched_shuffled_and_chunked(rng):
    _, packed, dims = _model(rng, 4, 2, 32)
    forward = cpu_backend.compiled_forward()
    prompt = rng.integers(0, 203, 37).tolist()
    expected, = _Run(forward, packed, dims).step(([3, 9, 1, 5, 7], prompt, 0))
    for chunk in (1, 7, 8, 9, 36):
        run = _Run(forward, packed, dims)
        for start in range(0, 37, chunk):
            logits, = run.step(([0, 2, 4, 6, 8], prompt[start:start + chunk], start))
        np.testing.assert_array_equal(logits, expected)
    others = [([20 + count, 1 + count], rng.integers(0, 203, count).tolist(), 0) for count in (1, 5, 11)]
    for place in range(4):
        requests = [*others[:place], ([13, 8, 14, 0, 30], prompt, 0), *others[place:]]
        np.testing.assert_array_equal(_Run(forward, packed, dims).step(*requests)[place], expected)


def test_two_python_threads_may_run_forward_passes_at_once(rng):
    _, packed, dims = _model(rng, 4, 2, 32)
    prompt = rng.integers(0, 203, 40).tolist()
    forward = cpu_backend.compiled_forward()
    expected = _Run(forward, packed, dims).step(([3, 9, 1, 5, 7], prompt, 0))
    results = []

    def work():
        run = _Run(forward, packed, dims)
        for _ in range(20):
            results.append(run.step(([3, 9, 1, 5, 7], prompt, 0)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60 and all((logits == expected).all() for logits in results)
