"""Floating-point formats in exact arithmetic: a pattern of bits is a fraction, and rounding is a decision on integers.

    sign   exponent field e        mantissa field m (M bits)
    s      0                       0                    zero
    s      0                       m > 0                subnormal    (-1)^s * m * 2^(1 - bias - M)
    s      1 .. all ones - 1       m                    normal       (-1)^s * (2^M + m) * 2^(e - bias - M)
    s      all ones                0                    infinity
    s      all ones                m > 0                NaN; the top bit of m says quiet, the rest is the payload

float8 e4m3 (the variant without infinities, as models use it) differs: only the pattern with all ones is NaN, and the
rest of the last exponent are ordinary numbers. static/formats.js is the same in JavaScript; a test compares the two.
Sources: IEEE 754-2019, sections 3.4 and 4.3; Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from tinyvllm.errors import TinyVLLMError

MAX_TEXT = 400  # characters of a number that somebody types
MAX_EXPONENT = 2000  # of ten or two, in such a text


@dataclass(frozen=True)
class Real:
    """What a pattern stands for, or what somebody typed: no format yet.

    kind: "finite", "infinity" or "nan". magnitude: of a finite number; zero keeps its sign in `negative`.
    payload: of a NaN, its mantissa field as a fraction of 1 (1/2 is the quiet bit alone).
    """

    kind: str
    negative: bool = False
    magnitude: Fraction = Fraction(0)
    payload: Fraction = Fraction(1, 2)

    @property
    def fraction(self) -> Fraction:
        """The number with its sign. Raises ValueError if it is not finite."""
        if self.kind != "finite":
            raise ValueError(f"{self.kind} is not a fraction")
        return -self.magnitude if self.negative else self.magnitude


@dataclass(frozen=True)
class Format:
    """A binary floating-point format. Patterns are integers from 0 to 2**num_bits - 1."""

    name: str
    title: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True

    @property
    def num_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Of two, of the smallest normal number; subnormals have it too."""
        return 1 - self.bias

    @property
    def sign_bit(self) -> int:
        return 1 << self.num_bits - 1

    @property
    def infinity(self) -> int | None:
        """The pattern of +infinity, None in a format that has none."""
        return (1 << self.exponent_bits) - 1 << self.mantissa_bits if self.has_infinity else None

    @property
    def nan(self) -> int:
        """The pattern of the plain quiet NaN."""
        return self.infinity | 1 << self.mantissa_bits - 1 if self.has_infinity else self.sign_bit - 1

    @property
    def largest(self) -> int:
        """The pattern of the largest finite number."""
        return self.infinity - 1 if self.has_infinity else self.sign_bit - 2

    def parts(self, bits: int) -> tuple[int, int, int]:
        """The fields (sign, exponent, mantissa) of a pattern."""
        self.check(bits)
        mask = (1 << self.mantissa_bits) - 1
        return bits >> self.num_bits - 1, bits >> self.mantissa_bits & (1 << self.exponent_bits) - 1, bits & mask

    def kind(self, bits: int) -> str:
        """"zero", "subnormal", "normal", "infinity" or "nan"."""
        _, exponent, mantissa = self.parts(bits)
        magnitude = bits & ~self.sign_bit
        if magnitude > self.largest:
            return "infinity" if magnitude == self.infinity else "nan"
        return "normal" if exponent else "subnormal" if mantissa else "zero"

    def integer_and_power(self, bits: int) -> tuple[int, int]:
        """(n, p) with magnitude = n * 2**p, as the fields say it: n has the hidden bit, p counts the ulp."""
        _, exponent, mantissa = self.parts(bits)
        hidden = 1 << self.mantissa_bits if exponent else 0
        return hidden | mantissa, max(exponent, 1) - self.bias - self.mantissa_bits

    def decode(self, bits: int) -> Real:
        """What a pattern stands for. Raises TinyVLLMError for a number that is no pattern of this format."""
        kind, negative = self.kind(bits), bool(bits & self.sign_bit)
        if kind == "nan":
            return Real("nan", negative, payload=Fraction(self.parts(bits)[2], 1 << self.mantissa_bits)
                        if self.has_infinity else Fraction(1, 2))
        if kind == "infinity":
            return Real("infinity", negative)
        integer, power = self.integer_and_power(bits)
        return Real("finite", negative, integer * two_to(power))

    def encode(self, real: Real, truncate: bool = False) -> int:
        """The pattern nearest to `real`, and of two that are equally near the one whose last bit is 0.

        truncate: the next one toward zero instead, which is what cutting bits off does. What lies beyond the largest
        number becomes infinity (where there is none: NaN) when rounding, the largest number when truncating.
        A NaN keeps what fits of its payload and becomes quiet.
        """
        sign = self.sign_bit if real.negative else 0
        if real.kind == "nan":
            return sign | self.nan | (int(real.payload * (1 << self.mantissa_bits)) if self.has_infinity else 0)
        if real.kind == "infinity":
            return sign | (self.infinity if self.has_infinity else self.nan)
        if not real.magnitude:
            return sign
        exponent = max(floor_log2(real.magnitude), self.min_exponent)
        steps = real.magnitude / two_to(exponent - self.mantissa_bits)  # in units of the last place
        whole = steps.numerator // steps.denominator
        if not truncate:
            rest = steps - whole
            whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1)
        # `whole` carries the hidden bit into the exponent field, and a rounding up of all ones one further.
        pattern = (exponent - self.min_exponent << self.mantissa_bits) + whole
        if pattern > self.largest:
            pattern = self.largest if truncate else self.infinity if self.has_infinity else self.nan
        return sign | pattern

    def neighbours(self, bits: int) -> tuple[int | None, int | None]:
        """The patterns of the next number below and above, None where there is none; both zeros count as one."""
        if self.kind(bits) == "nan":
            return None, None
        order = -(bits & ~self.sign_bit) if bits & self.sign_bit else bits
        last = self.largest + self.has_infinity
        return tuple(None if abs(n) > last else self.sign_bit | -n if n < 0 else n for n in (order - 1, order + 1))

    def ulp(self, bits: int) -> Fraction | None:
        """The unit in the last place: what the last mantissa bit is worth here. None for infinity and NaN."""
        return None if self.kind(bits) in ("infinity", "nan") else two_to(self.integer_and_power(bits)[1])

    def check(self, bits: int) -> None:
        """Raise TinyVLLMError unless `bits` is a pattern of this format."""
        if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits < 1 << self.num_bits:
            raise TinyVLLMError(f"a pattern of {self.title} is a whole number from 0 to {(1 << self.num_bits) - 1}, "
                                f"got {bits!r}")


FORMATS = {f.name: f for f in (
    Format("bf16", "bfloat16", 8, 7), Format("fp16", "float16", 5, 10), Format("fp32", "float32", 8, 23),
    Format("e4m3", "float8 e4m3", 4, 3, has_infinity=False), Format("e5m2", "float8 e5m2", 5, 2))}


def two_to(power: int) -> Fraction:
    """2**power, exactly."""
    return Fraction(1 << power) if power >= 0 else Fraction(1, 1 << -power)


def floor_log2(x: Fraction) -> int:
    """The largest e with 2**e <= x, for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if two_to(e) <= x else e - 1


_DECIMAL = re.compile(r"([+-]?)(?=\.?\d)(\d*)(?:\.(\d*))?(?:e([+-]?\d{1,6}))?")
_FRACTION = re.compile(r"([+-]?)(\d+)/(\d+)")
_POWER = re.compile(r"([+-]?)(?:(\d+)\*)?2\^([+-]?\d{1,6})")


def parse(text: str) -> Real:
    """A number as somebody types it: 0.1, -3e-5, 1/3, 2^-133, 205*2^-11, inf, nan. Exact: nothing is rounded here.

    Raises TinyVLLMError that says what can be typed.
    """
    said = text.strip().lower().replace("_", "").replace("\N{MINUS SIGN}", "-")
    refusal = TinyVLLMError(f"{text[:60]!r} is not a number here: write 0.1, -3e-5, 1/3, 2^-133, inf or nan")
    if len(said) > MAX_TEXT or not said.isascii():
        raise refusal
    if special := re.fullmatch(r"([+-]?)(inf|infinity|nan)", said):
        return Real("nan" if special[2] == "nan" else "infinity", special[1] == "-")
    if found := _DECIMAL.fullmatch(said):
        sign, digits, decimals, exponent = found[1], found[2], found[3] or "", int(found[4] or 0)
        magnitude = Fraction(int(digits + decimals), 10 ** len(decimals))
        if abs(exponent) > MAX_EXPONENT:
            raise refusal
        magnitude *= Fraction(10) ** exponent
    elif found := _FRACTION.fullmatch(said):
        if not int(found[3]):
            raise TinyVLLMError(f"{text[:60]!r} divides by zero")
        sign, magnitude = found[1], Fraction(int(found[2]), int(found[3]))
    elif (found := _POWER.fullmatch(said)) and abs(int(found[3])) <= MAX_EXPONENT:
        sign, magnitude = found[1], int(found[2] or 1) * two_to(int(found[3]))
    else:
        raise refusal
    return Real("finite", sign == "-", magnitude)


def exact_decimal(x: Fraction) -> str:
    """All decimal digits of a fraction whose denominator is a power of two (there are always finitely many)."""
    places = x.denominator.bit_length() - 1
    if x.denominator != 1 << places:
        raise ValueError(f"{x} has no end as a decimal")
    digits = str(abs(x.numerator) * 5**places).rjust(places + 1, "0")
    text = digits if not places else f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")
    return "-" + text if x < 0 else text


def short_decimal(x: Fraction, digits: int = 9) -> str:
    """A decimal of so many significant digits, correctly rounded (ties to even), without zeros at its end."""
    if not x:
        return "0"
    sign, x = "-" if x < 0 else "", abs(x)
    exponent = len(str(x.numerator)) - len(str(x.denominator))
    exponent -= x < Fraction(10) ** exponent
    whole = round(x / Fraction(10) ** (exponent - digits + 1))
    if whole == 10**digits:
        whole, exponent = whole // 10, exponent + 1
    text = str(whole)
    if -5 <= exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{text}".rstrip("0")
    point = exponent + 1 if 0 <= exponent < digits else 1
    number = f"{text[:point]}.{text[point:]}".rstrip("0").rstrip(".")
    return sign + number + ("" if 0 <= exponent < digits else f"e{exponent}")


def real_text(real: Real, digits: int = 30) -> str:
    """A number in words that `parse` reads back: exactly if it has an end, short enough; else as a product."""
    sign = "-" if real.negative else ""
    if real.kind != "finite":
        return sign + {"infinity": "inf", "nan": "nan"}[real.kind]
    x = real.magnitude
    if x.denominator & x.denominator - 1:
        return f"{sign}{x.numerator}/{x.denominator}"
    decimal = exact_decimal(x)
    if len(decimal) <= digits:
        return sign + decimal
    power = -(x.denominator.bit_length() - 1) or (x.numerator & -x.numerator).bit_length() - 1
    return f"{sign}{x.numerator if power < 0 else x.numerator >> power}*2^{power}"
