"""Every CUDA kernel on a GPU against its NumPy twin: fresh random inputs, poisoned outputs, NaN never passes.

Run by `make gpu-test` on a machine with a GPU (compute capability 8.0 or newer); skipped elsewhere.
"""

import numpy as np
import pytest

from tests.kernel_cases import (
    POISON,
    assert_close,
    attention_case,
    fresh_rng,
    poisoned,
    random_bf16,
    sampling_case,
    ulps,
)
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.bf16 import bf16_to_float32

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(),
                                 reason="needs a GPU")]

cuda = cuda_support.cuda


@pytest.fixture
def rng():
    return fresh_rng()


def on_gpu(function, out, *arguments):
    """Run a launch wrapper on device copies; returns `out` (an array, or a tuple of in-and-out arrays) from
    the GPU."""
    outs = out if isinstance(out, tuple) else (out,)
    device_outs = [cuda.to_device(x) for x in outs]
    function(*device_outs, *(cuda.to_device(x) if isinstance(x, np.ndarray) else x for x in arguments))
    results = [x.copy_to_host() for x in device_outs]
    return tuple(results) if isinstance(out, tuple) else results[0]


def on_cpu(function, out, *arguments):
    outs = [x.copy() for x in (out if isinstance(out, tuple) else (out,))]
    function(*outs, *arguments)
    return tuple(outs) if isinstance(out, tuple) else outs[0]


# ---- pointwise: the same arithmetic and so the same bits, a step off where a library function is in it ----


@pytest.mark.parametrize("hidden", [1, 64, 130, 2048])
def test_gathers_copy_the_rows_asked_for(rng, hidden):
    from tinyvllm.kernels.embedding import embedding_cuda, embedding_numpy, gather_rows_cuda

    table, ids = random_bf16(rng, 101, hidden), rng.integers(0, 101, 7).astype(np.int32)
    expected = on_cpu(embedding_numpy, poisoned(7, hidden), ids, table)
    np.testing.assert_array_equal(on_gpu(embedding_cuda, poisoned(7, hidden), ids, table), expected)
    np.testing.assert_array_equal(on_gpu(gather_rows_cuda, poisoned(7, hidden), table, ids), expected)


@pytest.mark.parametrize("hidden", [8, 100, 256, 2048, 4099])
def test_rms_norm_matches_by_both_reductions(rng, hidden):
    from tinyvllm.kernels.rms_norm import (
        add_rms_norm_cuda,
        add_rms_norm_numpy,
        rms_norm_cuda,
        rms_norm_numpy,
        rms_norm_tree_cuda,
    )

    x, residual, weight = random_bf16(rng, 5, hidden), random_bf16(rng, 5, hidden), random_bf16(rng, hidden)
    expected = on_cpu(rms_norm_numpy, poisoned(5, hidden), x, weight, 1e-5)
    for norm in (rms_norm_cuda, rms_norm_tree_cuda):
        out = on_gpu(norm, poisoned(5, hidden), x, weight, 1e-5)
        assert ulps(out, expected) <= 2 and np.mean(out != expected) < 0.02
    # `out` is `x` itself, as in the forward pass
    expected, expected_residual = on_cpu(add_rms_norm_numpy, (poisoned(5, hidden), residual), x, weight, 1e-5)
    device_x, device_residual = cuda.to_device(x), cuda.to_device(residual)
    add_rms_norm_cuda(device_x, device_residual, device_x, cuda.to_device(weight), 1e-5)
    np.testing.assert_array_equal(device_residual.copy_to_host(), expected_residual)
    out = device_x.copy_to_host()
    assert ulps(out, expected) <= 2 and np.mean(out != expected) < 0.02


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(4, 2, 64), (3, 1, 80), (32, 8, 128)])
def test_rope_is_exact_also_far_from_position_zero(rng, num_heads, num_kv_heads, head_dim):
    from tinyvllm.kernels.rope import rope_cuda, rope_numpy

    qkv = random_bf16(rng, 9, (num_heads + 2 * num_kv_heads) * head_dim)
    positions = rng.integers(0, 12000, 9).astype(np.int32)
    cos_sin = random_bf16(rng, 12000, head_dim)
    arguments = positions, cos_sin, num_heads, num_kv_heads, head_dim
    np.testing.assert_array_equal(on_gpu(rope_cuda, qkv, *arguments), on_cpu(rope_numpy, qkv, *arguments))


def test_write_kv_writes_its_slots_and_nothing_else(rng):
    from tinyvllm.kernels.kv_cache import write_kv_cuda, write_kv_numpy

    caches = poisoned(11, 3, 16, 48), poisoned(11, 3, 16, 48)
    slots = rng.permutation(11 * 16)[:20].astype(np.int32)
    slots[[3, 8]] = -1
    arguments = random_bf16(rng, 20, (6 + 2 * 3) * 48), slots, 6, 3, 48, 16
    for out, expected in zip(on_gpu(write_kv_cuda, caches, *arguments),
                             on_cpu(write_kv_numpy, caches, *arguments), strict=True):
        np.testing.assert_array_equal(out, expected)


def test_silu_mul_and_residual_add(rng):
    from tinyvllm.kernels.residual_add import residual_add_cuda, residual_add_numpy
    from tinyvllm.kernels.silu_mul import silu_mul_cuda, silu_mul_numpy

    gate_up = random_bf16(rng, 6, 2 * 1000, scale=20)
    gate_up[0, :4] = 0xC2C8, 0x42C8, 0xC7C8, 0x8000  # -100, 100, -1e5, -0
    out, expected = on_gpu(silu_mul_cuda, poisoned(6, 1000), gate_up), on_cpu(silu_mul_numpy,
                                                                              poisoned(6, 1000), gate_up)
    assert ulps(out, expected) <= 2 and np.mean(out != expected) < 0.01
    x, residual = random_bf16(rng, 6, 333), random_bf16(rng, 6, 333, scale=50)
    np.testing.assert_array_equal(on_gpu(residual_add_cuda, residual, x),
                                  on_cpu(residual_add_numpy, residual, x))


@pytest.mark.parametrize("columns", [1, 31, 1024, 5000])
def test_softmax_naive_and_online(rng, columns):
    from tinyvllm.kernels.softmax import softmax_naive_cuda, softmax_numpy, softmax_online_cuda

    x = rng.standard_normal((4, columns), dtype=np.float32) * 30
    x[1, columns // 2] = -np.inf if columns > 1 else 0
    expected = on_cpu(softmax_numpy, np.full_like(x, np.nan), x)
    for softmax in (softmax_naive_cuda, softmax_online_cuda):
        out = on_gpu(softmax, np.full_like(x, np.nan), x)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-7)


def test_widening_and_narrowing_on_the_device_agree_for_every_pattern():
    from tinyvllm.kernels.residual_add import residual_add_cuda, residual_add_numpy

    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    zero = np.full_like(bits, 0x8000)  # x + -0 = x, bit for bit, except that NaN may change its payload
    out, expected = on_gpu(residual_add_cuda, bits, zero), on_cpu(residual_add_numpy, bits, zero)
    nan = np.isnan(bf16_to_float32(bits))
    np.testing.assert_array_equal(out[~nan], expected[~nan])
    assert np.isnan(bf16_to_float32(out[nan])).all()


# ---- sampling ----


@pytest.mark.parametrize("vocab_size", [40, 1000, 128256])
def test_argmax_and_sample_give_the_twins_ids(rng, vocab_size):
    from tinyvllm.kernels.argmax import argmax_cuda, argmax_numpy
    from tinyvllm.kernels.sampling import sample_cuda, sample_numpy

    rows = 64 if vocab_size < 100000 else 16
    logits, *rest = sampling_case(rng, rows, vocab_size)
    ids = np.full(rows, -7, np.int32)
    np.testing.assert_array_equal(on_gpu(argmax_cuda, ids, logits), on_cpu(argmax_numpy, ids, logits))
    np.testing.assert_array_equal(on_gpu(sample_cuda, ids, logits, *rest),
                                  on_cpu(sample_numpy, ids, logits, *rest))


# ---- matrix products ----

SHAPES = [(1, 64, 64), (5, 300, 72), (9, 1000, 256), (16, 33, 40), (33, 130, 200), (64, 2048, 512),
          (200, 511, 520), (300, 3072, 2048)]


def check_linear(rng, linear, rows, outputs, depth, with_bias):
    from tinyvllm.kernels.gemm.numpy_twin import linear_numpy

    x, weight = random_bf16(rng, rows, depth), random_bf16(rng, outputs, depth, scale=depth**-0.5)
    bias = random_bf16(rng, outputs if with_bias else 0)
    assert_close(on_gpu(linear, poisoned(rows, outputs), x, weight, bias),
                 on_cpu(linear_numpy, poisoned(rows, outputs), x, weight, bias))


@pytest.mark.parametrize("rows, outputs, depth", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_as_dispatched(rng, rows, outputs, depth, with_bias):
    from tinyvllm.kernels.gemm.cuda import linear_cuda

    check_linear(rng, linear_cuda, rows, outputs, depth, with_bias)


@pytest.mark.parametrize("rows, outputs, depth", [(1, 1, 1), (5, 300, 72), (33, 130, 203), (64, 65, 33)])
def test_linear_naive_and_tiled(rng, rows, outputs, depth):
    from tinyvllm.kernels.gemm.cuda import linear_cuda
    from tinyvllm.kernels.gemm.naive import linear_naive_cuda
    from tinyvllm.kernels.gemm.tiled import linear_tiled_cuda

    for linear in (linear_naive_cuda, linear_tiled_cuda, linear_cuda):
        check_linear(rng, linear, rows, outputs, depth, True)


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_linear_tensor_core_with_every_tile_at_every_edge(rng, tile):
    from tinyvllm.kernels.gemm.tensor_core import TILES, linear_tensor_core_cuda

    for rows, outputs, depth in SHAPES + [(127, 129, 8), (129, 127, 1000), (130, 256, 4096)]:
        check_linear(rng, lambda *a: linear_tensor_core_cuda(*a, tile=TILES[tile]), rows, outputs, depth,
                     True)


@pytest.mark.parametrize("rows", range(1, 9))
def test_linear_gemv_for_each_number_of_rows(rng, rows):
    from tinyvllm.kernels.gemm.gemv import linear_gemv_cuda

    for outputs, depth in ((1, 8), (77, 1032), (130, 2048), (2048, 8192)):
        check_linear(rng, linear_gemv_cuda, rows, outputs, depth, True)


def test_a_rows_product_does_not_depend_on_the_other_rows(rng):
    from tinyvllm.kernels.gemm.gemv import linear_gemv_cuda
    from tinyvllm.kernels.gemm.tensor_core import TILES, linear_tensor_core_cuda

    x, weight, no_bias = random_bf16(rng, 300, 1024), random_bf16(rng, 512, 1024), random_bf16(rng, 0)
    whole = on_gpu(linear_tensor_core_cuda, poisoned(300, 512), x, weight, no_bias)
    for tile in TILES:
        part = on_gpu(lambda *a, tile=tile: linear_tensor_core_cuda(*a, tile=tile), poisoned(7, 512),
                      x[40:47], weight, no_bias)
        np.testing.assert_array_equal(part, whole[40:47])
    eight = on_gpu(linear_gemv_cuda, poisoned(8, 512), x[:8], weight, no_bias)
    for rows in (1, 2, 3, 5):
        np.testing.assert_array_equal(on_gpu(linear_gemv_cuda, poisoned(rows, 512), x[:rows], weight,
                                             no_bias), eight[:rows])


def test_linear_by_cublas(rng):
    pytest.importorskip("nvmath")
    from tinyvllm.kernels.gemm.cublas import linear_cublas_cuda

    for rows, outputs, depth in SHAPES:
        for with_bias in (False, True):
            check_linear(rng, linear_cublas_cuda, rows, outputs, depth, with_bias)


# ---- attention ----

HEADS = [(4, 4, 32), (8, 2, 64), (3, 1, 80), (6, 2, 96), (32, 8, 64), (16, 2, 128), (20, 1, 64), (4, 2, 16),
         (2, 1, 112)]
ODD_HEADS = [(4, 2, 40), (2, 2, 72), (4, 1, 256)]  # what only the simple kernels take


@pytest.mark.parametrize("heads", HEADS + ODD_HEADS, ids=str)
@pytest.mark.parametrize("block_size", [16, 5])
def test_attention_in_a_mixed_batch(rng, heads, block_size):
    from tinyvllm.kernels.attention.cuda import attention_cuda
    from tinyvllm.kernels.attention.numpy_twin import attention_numpy

    contexts = [1, 17, 700, 256, 257, 5, 64, 65, 300, 129]
    # decodes; whole prompts; chunks; one lone row that is no decode
    rows = [1, 1, 1, 1, 1, 5, 64, 30, 1, 129]
    case = attention_case(rng, *heads, block_size, contexts, rows)
    out = poisoned(sum(rows), heads[0] * heads[2])
    assert_close(on_gpu(attention_cuda, out, *case), on_cpu(attention_numpy, out, *case))


@pytest.mark.parametrize("heads", HEADS[:4], ids=str)
def test_attention_simple_kernels(rng, heads):
    from tinyvllm.kernels.attention.decode_simple import decode_attention_simple_cuda
    from tinyvllm.kernels.attention.numpy_twin import attention_numpy
    from tinyvllm.kernels.attention.prefill_simple import prefill_attention_simple_cuda

    def simple(*arguments):
        decode_attention_simple_cuda(*arguments)
        prefill_attention_simple_cuda(*arguments)

    case = attention_case(rng, *heads, 16, [1, 33, 100, 8, 40], [1, 1, 1, 8, 11])
    out = poisoned(22, heads[0] * heads[2])
    assert_close(on_gpu(simple, out, *case), on_cpu(attention_numpy, out, *case))


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 2, 128)], ids=str)
def test_attention_with_large_scores_and_a_long_context(rng, heads):
    from tinyvllm.kernels.attention.cuda import attention_cuda
    from tinyvllm.kernels.attention.numpy_twin import attention_numpy

    case = attention_case(rng, *heads, 16, [9000, 4096, 3000], [1, 1, 70], scale=3.0)
    out = poisoned(72, heads[0] * heads[2])
    assert_close(on_gpu(attention_cuda, out, *case), on_cpu(attention_numpy, out, *case), relative=6e-3)


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 2, 128), (3, 1, 80)], ids=str)
def test_attention_of_a_row_does_not_depend_on_batch_or_chunk(rng, heads):
    from tinyvllm.kernels.attention.cuda import attention_cuda

    qkv, k, v, tables, lens, starts, decodes, scale, *sizes = attention_case(
        rng, *heads, 16, [600, 90, 500], [1, 1, 200])
    width = heads[0] * heads[2]
    whole = on_gpu(attention_cuda, poisoned(202, width), qkv, k, v, tables, lens, starts, decodes, scale,
                   *sizes)
    one = np.array([0, 1], np.int32)
    for r in range(2):  # each decode alone
        alone = on_gpu(attention_cuda, poisoned(1, width), qkv[r : r + 1], k, v, tables[r : r + 1],
                       lens[r : r + 1], one, 1, scale, *sizes)
        np.testing.assert_array_equal(alone, whole[r : r + 1])
    for first, last in ((0, 1), (1, 38), (38, 200)):  # the prompt in chunks
        chunk = on_gpu(attention_cuda, poisoned(last - first, width), qkv[2 + first : 2 + last], k, v,
                       tables[2:], np.array([300 + last], np.int32), np.array([0, last - first], np.int32), 0,
                       scale, *sizes)
        np.testing.assert_array_equal(chunk, whole[2 + first : 2 + last])


def test_a_nan_in_the_cache_reaches_the_output(rng):
    from tinyvllm.kernels.attention.cuda import attention_cuda

    case = list(attention_case(rng, 4, 2, 64, 16, [300, 80], [1, 80]))
    case[1] = case[1].copy()
    case[1][case[3][0, 4], 1, 3, 7] = POISON  # one key of the first request's second key head
    out = bf16_to_float32(on_gpu(attention_cuda, poisoned(81, 4 * 64), *case)).reshape(81, 4, 64)
    assert np.isnan(out[0, 2:]).all() and np.isfinite(out[0, :2]).all() and np.isfinite(out[1:]).all()


# ---- the whole forward pass ----


@pytest.mark.parametrize("heads", [(4, 2, 64), (6, 2, 80), (8, 1, 32)], ids=str)
def test_forward_pass_over_cuda_matches_the_numpy_twins(rng, heads):
    from tests.forward_case import forward_case, run_forward
    from tinyvllm.kernels.cuda_backend import OPS
    from tinyvllm.kernels.numpy_backend import OPS as NUMPY_OPS

    case = forward_case(rng, *heads)
    expected, expected_k = run_forward(case, NUMPY_OPS, lambda x: x.copy(), lambda x: x)
    # Absent biases stay on the host, as in runner/cuda.py: numba cannot index device arrays without elements.
    logits, k = run_forward(case, OPS, lambda x: cuda.to_device(x) if x.size else x,
                            lambda x: x.copy_to_host())
    assert_close(k, expected_k, relative=2e-2)
    assert_close(logits, expected, relative=2e-2)


def test_a_step_that_samples_nothing_and_absent_biases_run(rng):
    """The runner's arrays, views of no elements included: numba is particular about those."""
    from tinyvllm.kernels.cuda_backend import OPS
    from tinyvllm.runner.cuda import CUDABackend

    backend = CUDABackend()
    bias = backend.empty((3, 0), np.uint16)[1]
    x = cuda.to_device(random_bf16(rng, 11, 33))
    for rows, depth in ((1, 32), (11, 32), (11, 33)):  # gemv, tensor core, tiled
        out = cuda.to_device(poisoned(rows, 7))
        weight = cuda.to_device(random_bf16(rng, 7, depth))
        OPS["linear"](out, cuda.to_device(random_bf16(rng, rows, depth)), weight, bias)
        assert np.isfinite(bf16_to_float32(out.copy_to_host())).all()
    empty = backend.upload(backend.empty((8,), np.int32), np.zeros(0, np.int32))
    assert empty.shape == (0,)
    OPS["gather_rows"](x[:0], x, empty)
    OPS["linear"](cuda.to_device(poisoned(4, 7))[:0], x[:0], weight, bias)
    OPS["argmax"](empty, x[:0])


def test_kernels_come_from_disk_in_the_next_process(tmp_path):
    """A second process neither compiles nor assembles: the cache's files are the same ones."""
    import os
    import subprocess
    import sys

    code = ("import numpy as np\n"
            "from tinyvllm.kernels.cuda_support import cuda\n"
            "from tinyvllm.kernels.gemm.cuda import linear_cuda\n"
            "from tinyvllm.kernels.gemm import gemv\n"
            "from tinyvllm.kernels.argmax import argmax_cuda, _argmax_kernel\n"
            "x = cuda.to_device(np.full((1, 64), 0x3f80, np.uint16))\n"
             "out = cuda.to_device(np.zeros((1, 64), np.uint16))\n"
            "linear_cuda(out, x, cuda.to_device(np.full((64, 64), 0x3f80, np.uint16)), x[:0].reshape(0))\n"
            "ids = cuda.to_device(np.zeros(1, np.int32)); argmax_cuda(ids, out)\n"
            "assert (out.copy_to_host() == 0x4280).all(), out.copy_to_host()\n"
            "for k in (gemv.gemv_kernel(1), _argmax_kernel):\n"
            "    stats = k.compiled.stats\n"
             "    print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))\n")
    environment = {**os.environ, "TINYVLLM_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            for _ in range(2)]
    for run in runs:
        assert run.returncode == 0, run.stderr
    assert runs[0].stdout.split() == ["0", "1", "0", "1"]
    assert runs[1].stdout.split() == ["1", "0", "1", "0"]
