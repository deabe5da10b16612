"""The lesson-grade CUDA kernels in numba's simulator, against their NumPy twins, at tiny sizes.

The simulator is chosen when numba is imported, so the checks run in a process of their own: this file starts
itself with NUMBA_ENABLE_CUDASIM=1, one process for all, and reports each check as a test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = {}


def check(function):
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def run(function, out, *arguments):
    """A launch wrapper on simulated device arrays; returns the outputs."""
    import numpy as np
    from numba import cuda

    outs = [cuda.to_device(x) for x in (out if isinstance(out, tuple) else (out,))]
    function(*outs, *(cuda.to_device(x) if isinstance(x, np.ndarray) else x for x in arguments))
    results = [x.copy_to_host() for x in outs]
    return results if isinstance(out, tuple) else results[0]


def same(cuda_function, numpy_function, out, *arguments, ulp=0):
    import numpy as np

    from tests.kernel_cases import ulps

    outs = out if isinstance(out, tuple) else (out,)
    expected = [x.copy() for x in outs]
    numpy_function(*expected, *arguments)
    for got, want in zip(run(cuda_function, outs, *arguments), expected, strict=True):
        assert ulps(got, want) <= ulp if got.dtype == np.uint16 else (got == want).all()


@check
def check_gathers(rng):
    import numpy as np

    from tests.kernel_cases import poisoned, random_bf16
    from tinyvllm.kernels import embedding as m

    table, ids = random_bf16(rng, 9, 40), np.array([3, 0, 8], np.int32)
    same(m.embedding_cuda, m.embedding_numpy, poisoned(3, 40), ids, table)
    same(m.gather_rows_cuda, m.gather_rows_numpy, poisoned(3, 40), table, ids)


@check
def check_rms_norm_by_a_tree_in_shared_memory(rng):
    from tests.kernel_cases import poisoned, random_bf16
    from tinyvllm.kernels import rms_norm as m

    x, residual, weight = random_bf16(rng, 3, 70), random_bf16(rng, 3, 70), random_bf16(rng, 70)
    same(m.rms_norm_tree_cuda, m.rms_norm_numpy, poisoned(3, 70), x, weight, 1e-5, ulp=2)
    same(m.add_rms_norm_cuda, m.add_rms_norm_numpy, (poisoned(3, 70), residual), x, weight, 1e-5, ulp=2)


@check
def check_rope_and_write_kv(rng):
    import numpy as np

    from tests.kernel_cases import poisoned, random_bf16
    from tinyvllm.kernels import kv_cache, rope

    qkv = random_bf16(rng, 3, (4 + 2 * 2) * 10)
    same(rope.rope_cuda, rope.rope_numpy, qkv, np.array([0, 7, 19], np.int32), random_bf16(rng, 20, 10), 4, 2,
         10)
    same(kv_cache.write_kv_cuda, kv_cache.write_kv_numpy, (poisoned(3, 2, 4, 10), poisoned(3, 2, 4, 10)), qkv,
         np.array([5, -1, 11], np.int32), 4, 2, 10, 4)


@check
def check_silu_mul_and_residual_add(rng):
    from tests.kernel_cases import poisoned, random_bf16
    from tinyvllm.kernels import residual_add, silu_mul

    same(silu_mul.silu_mul_cuda, silu_mul.silu_mul_numpy, poisoned(2, 40), random_bf16(rng, 2, 80, scale=9),
         ulp=1)
    same(residual_add.residual_add_cuda, residual_add.residual_add_numpy, random_bf16(rng, 3, 33),
         random_bf16(rng, 3, 33))


@check
def check_softmax_naive_and_online(rng):
    import numpy as np

    from tinyvllm.kernels import softmax as m

    for columns in (1, 33, 1100):
        x = rng.standard_normal((2, columns), dtype=np.float32) * 20
        expected = np.empty_like(x)
        m.softmax_numpy(expected, x)
        for kernel in (m.softmax_naive_cuda, m.softmax_online_cuda):
            np.testing.assert_allclose(run(kernel, np.full_like(x, np.nan), x), expected, rtol=1e-5,
                                       atol=1e-30)


@check
def check_argmax_and_sample(rng):
    import numpy as np

    from tests.kernel_cases import sampling_case
    from tinyvllm.kernels import argmax, sampling

    logits, *rest = sampling_case(rng, 12, 70)
    ids = np.full(12, -7, np.int32)
    same(argmax.argmax_cuda, argmax.argmax_numpy, ids, logits)
    same(sampling.sample_cuda, sampling.sample_numpy, ids, logits, *rest)


@check
def check_gemm_naive_and_tiled(rng):
    from tests.kernel_cases import assert_close, poisoned, random_bf16
    from tinyvllm.kernels.gemm import naive, tiled
    from tinyvllm.kernels.gemm.numpy_twin import linear_numpy

    for with_bias in (0, 1):
        arguments = random_bf16(rng, 5, 21), random_bf16(rng, 18, 21), random_bf16(rng, 18 * with_bias)
        expected = poisoned(5, 18)
        linear_numpy(expected, *arguments)
        for linear in (naive.linear_naive_cuda, tiled.linear_tiled_cuda):
            assert_close(run(linear, poisoned(5, 18), *arguments), expected)


@check
def check_attention_decode_and_prefill(rng):
    from tests.kernel_cases import assert_close, attention_case, poisoned
    from tinyvllm.kernels.attention.cuda import attention_cuda
    from tinyvllm.kernels.attention.numpy_twin import attention_numpy

    case = attention_case(rng, 2, 1, 6, 4, [9, 40, 10, 21], [1, 1, 10, 3])
    out, expected = poisoned(15, 12), poisoned(15, 12)
    attention_numpy(expected, *case)
    assert_close(run(attention_cuda, out, *case), expected)


@check
def check_rows_kept_for_the_probe(rng):
    import numpy as np

    from tests.kernel_cases import poisoned, random_bf16
    from tinyvllm.kernels import keep_rows as m

    for positions in ([], [-1, 3, 4, 0]):
        same(m.keep_rows_cuda, m.keep_rows_numpy, poisoned(2, 9, 40), 1, random_bf16(rng, 4, 50),
             np.array(positions, np.int32))


@check
def check_attention_rows_and_their_bytes(rng):
    import numpy as np

    from tests.test_probe_kernels import rows_case
    from tinyvllm.kernels.attention import pool, rows

    queries, k_cache, table = rows_case(rng, 4, 2, 6, 4, 45)
    arguments = (queries, k_cache, table, np.array([1, 0], np.int32), np.array([3, 1], np.int32),
                 np.array([0, 44, 17], np.int32), 6**-0.5)
    outs = np.full((2, 2, 3, 45), np.nan, np.float32), np.full((2, 2, 3, 2), np.nan, np.float32)
    expected = [x.copy() for x in outs]
    rows.attention_rows_numpy(*expected, *arguments)
    got = run(rows.attention_rows_cuda, outs, *arguments)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)
    weights = got[0].reshape(12, 45)
    weights[3, 20] = np.nan
    for width in (45, 7):
        same(pool.pool_uint8_cuda, pool.pool_uint8_numpy, np.zeros((12, width), np.uint8), weights)


@check
def check_a_whole_forward_pass(rng):
    from numba import cuda

    from tests.forward_case import forward_case, run_forward
    from tests.kernel_cases import assert_close
    from tinyvllm.kernels.cuda_backend import OPS
    from tinyvllm.kernels.numpy_backend import OPS as NUMPY_OPS

    case = forward_case(rng, 2, 1, 4, layers=1, hidden=16, intermediate=8, vocab_size=20, rows=(1, 2),
                        contexts=(5, 3))
    expected, expected_k = run_forward(case, NUMPY_OPS, lambda x: x.copy(), lambda x: x)
    logits, k = run_forward(case, OPS, cuda.to_device, lambda x: x.copy_to_host())
    assert_close(k, expected_k)
    assert_close(logits, expected, relative=1e-2)


def main():
    """Run every check, print one line each; failures with their traceback."""
    import traceback

    from tests.kernel_cases import fresh_rng

    for name, function in CHECKS.items():
        try:
            function(fresh_rng())
            print(f"PASSED {name}", flush=True)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED {name}", flush=True)


@pytest.fixture(scope="module")
def simulator_output():
    pytest.importorskip("numba_cuda")
    root = Path(__file__).resolve().parent.parent
    process = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.test_kernels_simulator"], cwd=root,
                             text=True, capture_output=True, timeout=600,
                             env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"})
    return process.stdout + process.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_simulator(simulator_output, name):
    assert f"PASSED {name}\n" in simulator_output, simulator_output


if __name__ == "__main__":
    main()
