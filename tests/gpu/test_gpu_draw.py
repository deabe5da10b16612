"""The sampler of many blocks a row on a GPU: the NumPy twin's tokens, whatever the logits and parameters are."""

import numpy as np
import pytest

from tests.gpu.arrays import to_device
from tests.kernel_cases import fresh_rng, random_bf16, sampling_case
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.kernels.sampling import sample_numpy

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not cuda_support.cuda_available() or cuda_support.simulated(),
                                 reason="needs a GPU")]
DTYPES = np.uint16, np.float32, np.int32, np.float32, np.uint64, np.int64  # of what is given to a sampler


@pytest.fixture
def rng():
    return fresh_rng()


@pytest.fixture(scope="module", params=[None, False], ids=["best", "sm_80"])
def fused(request):
    from tinyvllm.kernels.driver import Stream
    from tinyvllm.kernels.fused.operations import FusedOperations

    cuda_support.cuda.current_context()
    return FusedOperations(Stream(), hopper=request.param)


def poison_scratch(fused):
    """What a kernel forgets to write must not be right by chance."""
    for scratch in fused._scratch.values():
        scratch.copy_to_device(np.full(scratch.shape, np.nan, np.float32))


def check(fused, logits, temperature, top_k, top_p, seed, position):
    rows = len(logits)
    expected, ids = np.full(rows, -7, np.int32), to_device(np.full(rows, -7, np.int32))
    given = [np.asarray(x, dtype) for x, dtype in zip((logits, temperature, top_k, top_p, seed, position), DTYPES)]
    poison_scratch(fused)
    fused.sample(ids, *map(to_device, given))
    fused.stream.synchronize()
    sample_numpy(expected, *given)
    got = ids.copy_to_host()
    wrong = np.flatnonzero(got != expected)
    assert not wrong.size, [(r, got[r], expected[r], *(x[r] for x in given[1:])) for r in wrong[:5]]
    return got


def random_parameters(rng, rows, vocab_size):
    return (rng.choice([0, 0.1, 0.5, 0.8, 1, 1, 2.5], rows), rng.choice([0, 0, 1, 5, 50, 1000, vocab_size], rows),
            rng.choice([1, 1, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.9999], rows), rng.integers(0, 2**64, rows, dtype=np.uint64),
            rng.integers(0, 2**40, rows))


@pytest.mark.parametrize("vocab_size", [8, 64, 384, 2048, 4096, 32000])
@pytest.mark.parametrize("rows", [6, 64, 256])
def test_all_combinations_of_parameters(rng, fused, rows, vocab_size):
    check(fused, *sampling_case(rng, rows, vocab_size))


@pytest.mark.parametrize("rows", [1, 3, 33])
def test_a_wide_vocabulary(rng, fused, rows):
    for shift in (0, 12, -30):  # like a model's; all positive; all negative
        logits = rng.standard_normal((rows, 128256), np.float32) * np.float32(2.5) + np.float32(shift)
        check(fused, float32_to_bf16(logits), *random_parameters(rng, rows, 128256))


@pytest.mark.parametrize("rows", [64, 200, 256, 300])
def test_many_rows_of_a_wide_vocabulary_give_the_simple_kernel_s_tokens(rng, fused, rows):
    from tinyvllm.kernels.sampling import sample_cuda

    logits = np.resize(random_bf16(rng, 50, 128256, scale=2.5), (rows, 128256))
    logits[5::7] = random_bf16(rng, 1, 128256, scale=0.1)
    given = [to_device(np.asarray(x, dtype)) for x, dtype in zip(
        (logits, *random_parameters(rng, rows, 128256)), DTYPES)]
    ids, expected = (to_device(np.full(rows, -7, np.int32)) for _ in range(2))
    poison_scratch(fused)
    fused.sample(ids, *given)
    fused.stream.synchronize()
    sample_cuda(expected.numba(), *(x.numba() for x in given))
    np.testing.assert_array_equal(ids.copy_to_host(), expected.copy_to_host())


KINDS = {"all equal": lambda rng, n: np.full(n, 0x40A0, np.uint16),
         "zeros": lambda rng, n: rng.choice(np.array([0, 0x8000], np.uint16), n),
         "few values": lambda rng, n: rng.choice(random_bf16(rng, 3), n),
         "tiny": lambda rng, n: random_bf16(rng, n, scale=1e-8),
         "nearly flat": lambda rng, n: random_bf16(rng, n, scale=1e-5),
         "huge": lambda rng, n: random_bf16(rng, n, scale=1e5),
         "any bits": lambda rng, n: rng.integers(0, 1 << 16, n).astype(np.uint16),
         "a few odd": lambda rng, n: np.where(rng.random(n) < 2e-4, rng.integers(0, 1 << 16, n), random_bf16(rng, n))
                                       .astype(np.uint16) & 0xBFFF,
         "one certain": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 0x4220, random_bf16(rng, n))
                                         .astype(np.uint16),
         "masked": lambda rng, n: np.where(rng.random(n) < 0.99, 0xFF80, random_bf16(rng, n)).astype(np.uint16),
         "infinite": lambda rng, n: np.where(rng.random(n) < 1e-4, 0x7F80, random_bf16(rng, n)).astype(np.uint16),
         "nothing": lambda rng, n: rng.choice(np.array([0x7FC0, 0xFF80], np.uint16), n)}


@pytest.mark.parametrize("vocab_size", [512, 128256])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_hard_in_one_way_or_another(rng, fused, kind, vocab_size):
    rows = 12 if vocab_size < 1000 else 4
    logits = np.stack([KINDS[kind](rng, vocab_size) for _ in range(rows)])
    parameters = random_parameters(rng, rows, vocab_size)
    check(fused, logits, *parameters)
    check(fused, logits, *(np.full(rows, x) for x in (1, 0, 1)), *parameters[3:])
    check(fused, logits, *(np.full(rows, x) for x in (0.8, 50, 0.95)), *parameters[3:])


@pytest.mark.parametrize("temperature", [1e-45, 1e-31, 1e-3, 1e4, 3.4e38])
def test_temperatures_beyond_all_reason(rng, fused, temperature):
    logits = np.stack([random_bf16(rng, 4096, scale=scale) for scale in (1e-8, 1, 1, 1e20)])
    logits[1] = rng.choice(logits[2, :5], 4096)
    check(fused, logits, np.full(4, temperature), [0, 3, 0, 0], [1, 1, 0.5, 1], *random_parameters(rng, 4, 4096)[3:])


def test_draws_follow_the_probabilities(rng, fused):
    """A thousand positions of eight logits that differ: how often each comes is what softmax says."""
    logits = np.full((1000, 128), 0xFF80, np.uint16)
    values = np.linspace(-1, 2, 8, dtype=np.float32)
    logits[:, 40:48] = float32_to_bf16(values)
    ids = check(fused, logits, np.ones(1000), np.zeros(1000), np.ones(1000), np.full(1000, 5), np.arange(1000))
    share = np.bincount(ids - 40, minlength=8) / 1000
    expected = np.exp(values) / np.exp(values).sum()
    assert np.abs(share - expected).max() < 0.06


def test_a_captured_draw_follows_parameters_that_change(rng, fused):
    """Nothing of them is in the graph."""
    from tinyvllm.bench.gpu_timing import capture

    rows, vocab_size = 9, 128256
    given = [random_bf16(rng, rows, vocab_size), *random_parameters(rng, rows, vocab_size)]
    given = [np.asarray(x, dtype) for x, dtype in zip(given, DTYPES)]
    device, ids = [to_device(x) for x in given], to_device(np.full(rows, -7, np.int32))
    graph = capture(fused.stream, lambda: fused.sample(ids, *device))
    for _ in range(4):
        given[1:] = [np.asarray(x, old.dtype) for x, old in zip(random_parameters(rng, rows, vocab_size), given[1:])]
        for there, here in zip(device, given):
            there.copy_to_device(here)
        ids.copy_to_device(np.full(rows, -7, np.int32))
        poison_scratch(fused)
        cuda_support.cuda.synchronize()
        graph.launch(fused.stream)
        fused.stream.synchronize()
        expected = np.full(rows, -7, np.int32)
        sample_numpy(expected, *given)
        np.testing.assert_array_equal(ids.copy_to_host(), expected)
