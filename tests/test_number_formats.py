"""Number formats: exact decoding and rounding, against ml_dtypes and NumPy over every pattern there is."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyvllm.errors import TinyVLLMError
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from widgets.number_formats import (
    FORMATS,
    Real,
    exact_decimal,
    floor_log2,
    parse,
    real_text,
    short_decimal,
    two_to,
)

BF16, FP16, FP32 = FORMATS["bf16"], FORMATS["fp16"], FORMATS["fp32"]
PEERS = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn,
         "e5m2": ml_dtypes.float8_e5m2}
SMALL = ["bf16", "fp16", "e4m3", "e5m2"]  # every pattern of these can be tried
fp32_patterns = st.integers(0, 2**32 - 1)


def peer_values(name):
    """Every pattern of a format, and its value as float64 by NumPy or ml_dtypes."""
    dtype = np.dtype(PEERS[name])
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return patterns, patterns.view(dtype).astype(np.float64)


def peer_bits(name, value):
    """float64 -> the pattern that the peer rounds it to."""
    dtype = np.dtype(PEERS[name])
    with np.errstate(over="ignore"):
        return int(np.float64(value).astype(dtype).view(f"u{dtype.itemsize}"))


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_stands_for_what_the_peer_says(name):
    number_format = FORMATS[name]
    for bits, value in zip(*(array.tolist() for array in peer_values(name))):
        real = number_format.decode(bits)
        if np.isnan(value):
            assert real.kind == "nan"
        elif np.isinf(value):
            assert real.kind == "infinity" and real.negative == (value < 0)
        else:
            assert real.fraction == Fraction(value) and real.negative == bool(np.signbit(value)), hex(bits)


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_survives_the_round_trip_both_ways_of_rounding(name):
    number_format = FORMATS[name]
    for bits in range(1 << number_format.num_bits):
        real = number_format.decode(bits)
        for truncate in (False, True):
            again = number_format.encode(real, truncate)
            if real.kind == "nan":  # a conversion makes it quiet and loses nothing else
                assert again == bits | number_format.nan
            else:
                assert again == bits


@pytest.mark.parametrize("name", SMALL)
def test_between_every_two_neighbours_rounding_does_what_the_peer_does(name):
    """The middle, and a hair to each side of it: exact in float64 for all of these formats."""
    number_format = FORMATS[name]
    step = 1 if number_format.num_bits == 8 else 7
    for bits in range(0, number_format.largest, step):
        low, high = (number_format.decode(b).fraction for b in (bits, bits + 1))
        middle, hair = (low + high) / 2, (high - low) / 64
        for x in (middle - hair, middle, middle + hair, -middle):
            expected = peer_bits(name, float(x))
            assert number_format.encode(Real("finite", x < 0, abs(x))) == expected, (hex(bits), float(x))
            truncated = bits | (number_format.sign_bit if x < 0 else 0)
            assert number_format.encode(Real("finite", x < 0, abs(x)), truncate=True) == truncated


@pytest.mark.parametrize("name", list(PEERS))
def test_beyond_the_largest_number(name):
    """A tie between the largest number and the next that would be is where infinity begins."""
    number_format = FORMATS[name]
    largest = number_format.decode(number_format.largest).fraction
    edge = largest + number_format.ulp(number_format.largest) / 2
    for x in (edge - two_to(-200), edge, edge + two_to(-200), edge * 10):
        ours = number_format.encode(Real("finite", False, x))
        if x == edge and name == "e4m3":
            assert ours == number_format.largest  # its largest number is even
        elif x < edge:
            assert ours == number_format.largest
        else:
            assert number_format.decode(ours).kind == ("infinity" if number_format.has_infinity else "nan")
        assert number_format.encode(Real("finite", False, x), truncate=True) == number_format.largest
    assert peer_bits(name, float(edge)) == number_format.encode(Real("finite", False, edge))


@settings(max_examples=1000, deadline=None)
@given(fp32_patterns)
@example(0x7F7FFFFF)
@example(0x00000001)
@example(0x7F810000)
def test_float32_rounds_to_bfloat16_as_the_engine_does(bits):
    value = np.array([bits], np.uint32).view(np.float32)
    assert BF16.encode(FP32.decode(bits)) == float32_to_bf16(value)[0]
    if not np.isnan(value[0]):
        assert BF16.encode(FP32.decode(bits), truncate=True) == bits >> 16


@settings(max_examples=1000, deadline=None)
@given(fp32_patterns)
def test_float32_patterns(bits):
    value = np.array([bits], np.uint32).view(np.float32)[0]
    real = FP32.decode(bits)
    if np.isnan(value):
        assert real.kind == "nan"
    elif np.isinf(value):
        assert real == Real("infinity", bool(value < 0))
    else:
        assert real.fraction == Fraction(float(value)) and FP32.encode(real) == bits


@settings(max_examples=500, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_float64_rounds_to_float32_and_float16_as_numpy_does(value):
    for name in ("fp32", "fp16"):
        assert FORMATS[name].encode(parse(repr(value))) == peer_bits(name, value)


@pytest.mark.parametrize("name", list(PEERS))
def test_neighbours_are_what_nextafter_says_and_ulp_is_their_distance(name):
    number_format, dtype = FORMATS[name], np.dtype(PEERS[name])
    patterns = np.random.default_rng(0).integers(0, 1 << number_format.num_bits, 500)
    for bits in [*patterns.tolist(), 0, number_format.sign_bit, 1, number_format.sign_bit + 1, number_format.largest]:
        below, above = number_format.neighbours(bits)
        value = np.array([bits], f"u{dtype.itemsize}").view(dtype)
        if np.isnan(value.astype(np.float32)[0]):
            assert (below, above) == (None, None)
            continue
        end = np.inf if number_format.has_infinity else 448.0
        for ours, toward in ((below, -end), (above, end)):
            with np.errstate(over="ignore"):
                theirs = np.nextafter(value, np.array([toward], np.float32).astype(dtype))
            if ours is None:
                assert np.isinf(value[0]) or name == "e4m3"
            else:
                expected = number_format.decode(int(theirs.view(f"u{dtype.itemsize}")[0]))
                assert (number_format.decode(ours).kind, number_format.decode(ours).magnitude) \
                    == (expected.kind, expected.magnitude)
                assert ours & ~number_format.sign_bit == 0 or number_format.decode(ours) == expected  # the sign of zero
        if 0 < bits < number_format.largest and number_format.kind(bits) != "infinity":
            assert number_format.decode(above).fraction - number_format.decode(bits).fraction == number_format.ulp(bits)


def test_kinds_of_the_special_patterns():
    for number_format in FORMATS.values():
        assert number_format.kind(0) == number_format.kind(number_format.sign_bit) == "zero"
        assert number_format.kind(1) == "subnormal"
        assert number_format.kind(1 << number_format.mantissa_bits) == "normal"
        assert number_format.kind(number_format.nan) == "nan"
        if number_format.has_infinity:
            assert number_format.kind(number_format.infinity) == "infinity"
    assert BF16.parts(0xC0A0) == (1, 0x81, 0x20)
    assert BF16.integer_and_power(0xC0A0) == (0xA0, -5)


def test_what_can_be_typed_is_read_exactly():
    assert parse("0.1").magnitude == Fraction(1, 10)
    assert parse(" -3E-5 ").fraction == Fraction(-3, 100000)
    assert parse("1/3").magnitude == Fraction(1, 3)
    assert parse("2^-133").magnitude == Fraction(1, 2**133)
    assert parse("-205*2^-11").fraction == Fraction(-205, 2048)
    assert parse(".5") == parse("0.5") == parse("+5e-1")
    assert parse("7.") == parse("7")
    assert parse("-0") == Real("finite", True)
    assert parse("-inf") == Real("infinity", True)
    assert parse("nan").kind == "nan"


@pytest.mark.parametrize("text", ["", "abc", "1.2.3", "0x10", "1/0", "1e99999999", "1e5000", "2^9999", "9" * 500, "½",
                                  "1 2", "--1", ".", "e5", "٣"])
def test_what_cannot_be_read_is_refused_in_words(text):
    with pytest.raises(TinyVLLMError, match="write 0.1|divides by zero"):
        parse(text)


@pytest.mark.parametrize("bits", [-1, 65536, 1.5, True, "3"])
def test_what_is_no_pattern_is_refused(bits):
    with pytest.raises(TinyVLLMError, match="bfloat16 is a whole number from 0 to 65535"):
        BF16.decode(bits)


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_decimals_are_right(value):
    x = Fraction(value)
    assert Fraction(exact_decimal(x)) == x
    assert two_to(floor_log2(x)) <= x < two_to(floor_log2(x) + 1)
    assert float(short_decimal(x, 17)) == value
    assert float(short_decimal(x, 6)) == float(f"{value:.5e}")
    assert parse(real_text(Real("finite", False, x))).magnitude == x


def test_short_decimals_look_as_one_would_write_them():
    said = {"0.1": "0.1", "2048": "2048", "1/3": "0.333333333", "-1e-20": "-1e-20", "123456789012": "1.23456789e11",
            "0.00001": "0.00001", "0.000001": "1e-6", "999999999.9": "1e9", "100": "100"}
    for text, expected in said.items():
        assert short_decimal(parse(text).fraction) == expected


def test_all_of_bfloat16_agrees_with_the_kernels_own_widening():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    wide = bf16_to_float32(bits).view(np.uint32)
    assert all(FP32.encode(BF16.decode(b)) == w for b, w in zip(bits.tolist(), wide.tolist())
               if BF16.kind(b) != "nan")
