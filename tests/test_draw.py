"""The sampler of many blocks a row (kernels/fused/draw.py) without a GPU: its kernels' own code, emulated.

Every token must be that of the NumPy twin, and so must every threshold be, which a token shows only by chance. Most
tests count few patterns with few threads, so that a row of some hundred logits already has crowds, full lists and
several parts; tests/gpu has the real sizes.
"""

import os

import numpy as np
import pytest

from tests.kernel_cases import fresh_rng, random_bf16, sampling_case

if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
    pytest.skip("the simulator has no inline PTX", allow_module_level=True)
pytest.importorskip("numba_cuda")

from tests.draw_emulator import FULL, TINY, DrawEmulator, sample_emulated  # noqa: E402
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16  # noqa: E402
from tinyvllm.kernels.fused import draw, key_bins, thresholds  # noqa: E402
from tinyvllm.kernels.fused.draw import make_plan  # noqa: E402
from tinyvllm.kernels.philox import philox_numpy, uniform_numpy  # noqa: E402
from tinyvllm.kernels.sampling import ordered_keys_numpy, sample_numpy  # noqa: E402


@pytest.fixture
def rng():
    return fresh_rng()


def smallest_kept(logits, temperature, top_k, top_p):
    """What the thresholds of a row must be, by sorting; infinity where nothing is to be drawn."""
    with np.errstate(invalid="ignore"):
        values = bf16_to_float32(logits).astype(np.float64)
    values = np.sort(values[values > -np.inf])[::-1]
    if not values.size or values[0] == np.inf:
        return np.inf
    if 0 < top_k < logits.size:
        values = values[values >= values[min(top_k, values.size) - 1]]
    if top_p < 1:
        mass = np.floor(np.exp(values / np.float64(temperature) - values[0] / np.float64(temperature)) * 2.0**40)
        enough = np.flatnonzero(np.cumsum(mass.astype(np.int64)) >= np.float64(top_p) * np.float64(mass.sum()))
        values = values[:enough[0] + 1]
    return values[-1]


def check(case, **how):
    logits, temperature, top_k, top_p, *_ = case
    rows, vocab_size = logits.shape
    expected, ids = np.full(rows, -7, np.int32), np.full(rows, -7, np.int32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        sample_numpy(expected, *case)
    found = sample_emulated(ids, *case, **how)
    for r in range(rows):
        about = f"row {r}: temperature {temperature[r]}, top_k {top_k[r]}, top_p {top_p[r]}"
        if temperature[r] > 0 and (0 < top_k[r] < vocab_size or top_p[r] < 1):
            smallest, values = smallest_kept(logits[r], temperature[r], top_k[r], top_p[r]), bf16_to_float32(logits[r])
            np.testing.assert_array_equal(values >= found[r], values >= np.float32(smallest), about)
        else:
            assert np.isnan(found[r]), f"{about}: nobody looks for a threshold here"
        assert ids[r] == expected[r], about


def kinds_of_logits(rng, vocab_size):
    """Rows that are hard in one way or another."""
    normal = random_bf16(rng, vocab_size, scale=2.5)
    signs = rng.choice(np.array([0, 0x8000], np.uint16), vocab_size)
    few = random_bf16(rng, 3, scale=4)
    spread = float32_to_bf16((rng.choice([-1, 1], vocab_size) * 2.0 ** rng.uniform(-40, 40, vocab_size))
                             .astype(np.float32))
    any_bits = rng.integers(0, 1 << 16, vocab_size).astype(np.uint16)
    some_odd = np.where(rng.random(vocab_size) < 0.1, any_bits, normal)
    one_far_out = normal.copy()
    one_far_out[rng.integers(vocab_size)] = 0x4170  # 15
    return {"normal": normal, "all equal": np.full(vocab_size, normal[0]), "zeros": signs, "few values": rng.choice(
                few, vocab_size), "tiny": random_bf16(rng, vocab_size, scale=1e-3), "huge": random_bf16(
                rng, vocab_size, scale=3e3), "spread": spread, "any bits": any_bits, "some odd": some_odd,
            "one far out": one_far_out, "negative": normal | 0x8000, "infinite": np.where(
                rng.random(vocab_size) < 0.01, np.uint16(0x7F80), any_bits), "masked": np.where(
                rng.random(vocab_size) < 0.97, np.uint16(0xFF80), normal), "largest": np.where(
                rng.random(vocab_size) < 0.5, np.uint16(0x7F7F), np.uint16(0xFF7F))}


CROWDS = ("all equal", "few values", "spread", "tiny", "largest")  # what long rows are tried with: they take longer


@pytest.mark.parametrize("kind, vocab_size, parts", [
    *((kind, 64, 8) for kind in kinds_of_logits(np.random.default_rng(0), 64)), *((kind, 640, 4) for kind in CROWDS)])
def test_thresholds_and_tokens_are_the_twin_s(rng, kind, vocab_size, parts, rows=6):
    """Short rows have parts without logits; long ones have crowds that no list holds."""
    logits = np.stack([kinds_of_logits(rng, vocab_size)[kind] for _ in range(rows)])
    check((logits, np.array([0, 0.05, 0.8, 0.8, 1, 2.5], np.float32),
           rng.choice([0, 0, 1, 2, 5, 50, vocab_size - 1, vocab_size], rows).astype(np.int32),
           rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 0.9999, 1], rows).astype(np.float32),
           rng.integers(0, 2**64, rows, dtype=np.uint64), rng.integers(0, 2**40, rows)),
          count_parts=parts, draw_parts=int(rng.integers(1, 5)))


def test_all_combinations_of_parameters(rng):
    check(sampling_case(rng, 20, 520))


def test_the_bins_of_a_gpu(rng):
    """All 8192, over logits like a model's."""
    logits = random_bf16(rng, 3, 4096, scale=2.5)
    logits[2, ::50] = 0xFF80
    check((logits, np.array([0.8, 1, 0.7], np.float32), np.array([50, 0, 0], np.int32), np.array(
        [0.95, 0.95, 0.99], np.float32), rng.integers(0, 2**64, 3, dtype=np.uint64), rng.integers(0, 2**40, 3)),
          shape=FULL)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-31, 1e-3, 1e4, 3.4e38])
def test_temperatures_beyond_all_reason(rng, temperature):
    """Scores that float64 cannot tell apart, and bounds that float32 cannot hold."""
    logits = np.stack([kinds_of_logits(rng, 64)[kind] for kind in ("few values", "spread", "largest", "negative")])
    check((logits, np.full(4, temperature, np.float32), np.array([0, 3, 0, 0], np.int32), np.array(
        [1, 1, 0.5, 1], np.float32), rng.integers(0, 2**64, 4, dtype=np.uint64), rng.integers(0, 2**40, 4)))


def test_who_looks_again_finds_what_it_has_passed_over(rng):
    """Two logits in one thread's hands, whose scores are in another order than their bounds."""
    found = 0
    for _ in range(400):
        seed, position = rng.integers(0, 2**64, dtype=np.uint64), np.uint64(rng.integers(0, 2**40))
        u = uniform_numpy(seed, position, np.arange(2, dtype=np.uint64))
        x = bf16_to_float32(random_bf16(rng, 2)).astype(np.float64)
        bounds, scores = x - np.log(1 - u), x - np.log(-np.log(u))
        if np.argmax(bounds) != np.argmax(scores):
            found += 1
            logits = np.full((1, 64), 0xC2C8, np.uint16)  # -100
            logits[0, :2] = float32_to_bf16(x.astype(np.float32))
            check((logits, np.ones(1, np.float32), np.zeros(1, np.int32), np.ones(1, np.float32),
                   np.array([seed]), np.array([position]).astype(np.int64)))
        if found == 3:
            return
    raise AssertionError("no such pair: the bounds are no bounds, or too good")


# ---- its parts ----


def of_lanes(function, *columns):
    """A function of the kernels for 32 arguments at once, one a lane."""
    emulator, results = DrawEmulator(32, 0), [None] * 32
    function = emulator.translate(function)

    def call():
        with np.errstate(all="ignore"):
            lane = emulator.local.thread
            results[lane] = function(*(column[lane] for column in columns))

    emulator.run(call, ())
    return results


def test_random_words_are_philox_s(rng):
    seeds = np.array([0, 2**64 - 1, *rng.integers(0, 2**64, 30, dtype=np.uint64)], np.uint64)
    positions = np.array([0, 2**63 - 1, *rng.integers(0, 2**40, 30)], np.uint64)
    ids = rng.integers(0, 2**18, 32).astype(np.uint32)
    rows = of_lanes(draw.row_words, positions, seeds)
    got = of_lanes(draw.random_words, ids, rows)
    low, word = np.uint64(2**32 - 1), np.uint64(32)
    expected = philox_numpy(ids.astype(np.uint64), positions & low, positions >> word, np.uint64(0), seeds & low,
                            seeds >> word)[:2]
    assert [tuple(map(int, words)) for words in got] == list(zip(*(words.tolist() for words in expected)))


def test_bounds_are_bounds(rng):
    """Over scores of all sizes; and tight where scores win, that is where u is near 1."""
    for near_one in (False, True) * 4:
        seed, position = rng.integers(0, 2**64, dtype=np.uint64), np.uint64(rng.integers(0, 2**40))
        u = uniform_numpy(seed, position, np.arange(1 << 15, dtype=np.uint64))
        ids = (np.argsort(u)[-32:] if near_one else rng.integers(0, 1 << 15, 32)).astype(np.uint32)
        x = bf16_to_float32(random_bf16(rng, 32, scale=1 if near_one else float(rng.choice([1, 10, 1000]))))
        heat = rng.choice([0.5, 0.8, 1, 7] if near_one else [0.01, 1, 7], 32).astype(np.float32).astype(np.float64)
        scale = (draw.LOG2_E / heat).astype(np.float32)
        rows = of_lanes(draw.row_words, [position] * 32, [seed] * 32)
        bounds = np.array(of_lanes(draw._bound, x, ids, scale, scale * np.float32(2.0**-20), rows), np.float64)
        scores = (x.astype(np.float64) / heat - np.log(-np.log(u[ids]))) * draw.LOG2_E - 32
        assert (bounds > scores - 1e-4).all()
        assert not near_one or (bounds < scores + 0.01).all()


def test_keys_and_bins_are_in_the_order_of_the_numbers():
    for shape in (TINY, FULL):
        bins = range(1, 2 * shape.DENSE + 6)
        dense = [n for n in bins if key_bins.crowd_of_bin.py_func(n, shape.DENSE) == 4]
        keys = [int(key_bins.key_of_bin.py_func(n, shape.SMALLEST, shape.DENSE)) for n in dense]
        assert keys == sorted(keys) and len(set(keys)) == 2 * shape.DENSE + 2 and keys[-1] == 0xFF80
        of_pattern = ordered_keys_numpy(np.arange(1 << 16, dtype=np.uint16))
        crowded = sorted(set(of_pattern[of_pattern >= 0x80].tolist()) - set(keys))
        numbers = [int(key_bins.crowd_of_key.py_func(k, shape.SMALLEST)) for k in crowded]
        assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2, 3}
        for crowd in range(4):
            its_bin = int(key_bins.bin_of_crowd.py_func(crowd, shape.DENSE))
            assert key_bins.crowd_of_bin.py_func(its_bin, shape.DENSE) == crowd
            its_keys = [k for k, number in zip(crowded, numbers) if number == crowd]
            assert all(k < its_keys[0] for n, k in zip(dense, keys) if n < its_bin)
            assert all(k > its_keys[-1] for n, k in zip(dense, keys) if n > its_bin)


@pytest.mark.parametrize("vocab_size", [8, 512, 32000, 128256, 151936, 262144, draw.MOST_COLUMNS])
def test_plans_cover_every_row_once_and_no_count_overflows(vocab_size):
    for rows in (1, 2, 7, 32, 100, 256, 257, 1024):
        plan = make_plan(rows, vocab_size, 132)
        vectors = vocab_size // 8
        assert plan.count_parts % 4 == 0 and plan.count_parts <= thresholds.MOST_PARTS
        assert plan.count_vectors <= key_bins.MOST_VECTORS
        for parts, each in ((plan.count_parts, plan.count_vectors), (plan.draw_parts, plan.draw_vectors)):
            assert parts * each >= vectors
        assert plan.thresholds_at % 16 == 0 and plan.parts_at % 16 == 0
        assert plan.parts_at - plan.thresholds_at >= 4 * rows
        assert plan.scratch_bytes - plan.parts_at == 16 * rows * plan.draw_parts
