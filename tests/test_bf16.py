"""bfloat16 conversion: every pattern, every kind of tie, against ml_dtypes; the njit and CUDA scalars agree."""

import numpy as np
import pytest
from numba import njit

from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16, narrow, round_to_bf16, widen

ml_dtypes = pytest.importorskip("ml_dtypes")
ALL = np.arange(65536, dtype=np.uint32).astype(np.uint16)
NAN = (ALL & 0x7FFF) > 0x7F80


def reference_narrow(values):
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def assert_same(ours, theirs):
    """Equal bits, but any NaN for any NaN of the same sign."""
    our_nan, their_nan = (ours & 0x7FFF) > 0x7F80, (theirs & 0x7FFF) > 0x7F80
    assert np.array_equal(our_nan, their_nan)
    assert np.array_equal(ours[~our_nan], theirs[~our_nan])


@njit
def narrow_all(values, out):
    for i in range(values.size):
        out[i] = narrow(values[i])


@njit
def widen_all(bits, out):
    for i in range(bits.size):
        out[i] = widen(bits[i])


def both_narrow(values):
    """float32_to_bf16's answer, after checking that the njit scalar gives the same."""
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty(values.size, np.uint16)
    narrow_all(values, out)
    assert np.array_equal(out, float32_to_bf16(values))
    return out


def test_widening_is_exact_for_all_65536_patterns():
    wide = bf16_to_float32(ALL)
    scalar = np.empty(65536, np.float32)
    widen_all(ALL, scalar)
    expected = ALL.view(ml_dtypes.bfloat16).astype(np.float32)
    for ours in (wide, scalar):
        assert np.array_equal(ours[~NAN], expected[~NAN]) and np.isnan(ours[NAN]).all()
        assert np.array_equal(np.signbit(ours), np.signbit(expected))


def test_all_65536_patterns_survive_the_round_trip():
    assert_same(both_narrow(bf16_to_float32(ALL)), ALL)


def test_every_tie_and_its_neighbours_round_as_the_standard_says():
    """Between each pattern and the next: a hair below the middle, the middle itself, a hair above; and the ends."""
    low = ALL[~NAN].astype(np.uint32) << 16
    for tail in (0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (low | np.uint32(tail)).view(np.float32)
        assert_same(both_narrow(values), reference_narrow(values))


def test_a_tie_goes_to_the_even_pattern():
    assert both_narrow([1.00390625, 1.01171875]).tolist() == [0x3F80, 0x3F82]  # 1 + 2^-8 down, 1 + 3 * 2^-8 up


def test_random_patterns_infinities_and_overflow():
    values = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    assert_same(both_narrow(values), reference_narrow(values))
    assert both_narrow([np.inf, -np.inf, 3.4e38, -3.4e38]).tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80]


def test_nan_stays_nan_even_if_its_payload_is_in_the_dropped_half():
    values = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(bf16_to_float32(both_narrow(values))).all()


def test_rounding_twice_changes_nothing_and_wrong_dtypes_are_refused():
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    assert np.array_equal(round_to_bf16(round_to_bf16(values)), round_to_bf16(values))
    with pytest.raises(TypeError, match="uint16 array, got float32"):
        bf16_to_float32(values)
