"""The page's arithmetic is Python's: static/formats.js against number_formats.py, pattern by pattern."""

import random

import numpy as np
import pytest

from tests.browser.stage import Stage
from widgets.number_formats import FORMATS, Real, exact_decimal, parse, real_text, short_decimal
from widgets.panel import STATIC


@pytest.fixture(scope="module")
def page():
    """page(expression, argument): evaluates JavaScript that can see all of formats.js."""
    script = (STATIC / "formats.js").read_text(encoding="utf-8")
    with Stage() as stage:
        def evaluate(expression, argument=None):
            return stage.page.evaluate("([script, expression, argument]) => new Function('argument', script + "
                                       "';return (' + expression + ')(argument)')(argument)",
                                       [script, expression, argument])

        yield evaluate


# What a pattern says, in words and numbers that survive JSON: the same on both sides.
DESCRIBE = """([name, patterns]) => { const f = FORMATS[name]; return patterns.map((bits) => {
    const real = f.decode(bits), kind = f.kind(bits), isFinite = real.kind === "finite";
    return [kind, real.negative, isFinite ? `${real.num}/${real.den}` : null, f.parts(bits), f.neighbours(bits),
            f.ulpPower(bits), realText(real), f.encode(real), f.encode(real, true)]; }); }"""


def describe(number_format, bits):
    real, ulp = number_format.decode(bits), number_format.ulp(bits)
    fraction = f"{real.magnitude.numerator}/{real.magnitude.denominator}" if real.kind == "finite" else None
    power = None if ulp is None else ulp.numerator.bit_length() - ulp.denominator.bit_length()
    return [number_format.kind(bits), real.negative, fraction, list(number_format.parts(bits)),
            list(number_format.neighbours(bits)), power, real_text(real), number_format.encode(real),
            number_format.encode(real, truncate=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_patterns_say_the_same_in_the_page(page, name):
    """All patterns of the small formats; of float32 the special ones and 20,000 at random."""
    number_format = FORMATS[name]
    if number_format.num_bits <= 16:
        patterns = list(range(1 << number_format.num_bits))
    else:
        special = [0, 1, number_format.nan, number_format.infinity, number_format.largest, 0x7FFFFF, 0x800000,
                   0x7F800001]
        patterns = [b for s in special for b in (s, s | number_format.sign_bit)]
        patterns += np.random.default_rng(0).integers(0, 1 << 32, 20_000).tolist()
    theirs = page(DESCRIBE, [name, patterns])
    wrong = [(hex(bits), said) for bits, said in zip(patterns, theirs) if said != describe(number_format, bits)]
    assert len(theirs) == len(patterns) and not wrong, wrong[:3]


def typed_numbers():
    random.seed(0)
    texts = ["0", "-0", "0.1", "1/3", "-1/3", "2^-133", "2^-134", "3*2^-134", "2^-150", "65504", "65519.99", "65520",
             "3.4028235677973366e38", "1e400", "1e-400", "464", "464.0001", "448", "inf", "-inf", "nan", "-nan",
             "1.00390625", "1.01171875", ".5", "7.", "-3E-5", "\N{MINUS SIGN}2"]
    for _ in range(1500):
        texts.append(f"{random.choice('+- ')}{random.random() * 10}e{random.randint(-48, 40)}".strip())
        number_format = FORMATS[random.choice(list(FORMATS))]
        bits = random.randrange(number_format.largest)
        low, high = (number_format.decode(b).fraction for b in (bits, bits + 1))
        texts.append(real_text(Real("finite", random.random() < 0.5, (low + high) / 2)))  # a tie
    return texts


def test_typed_numbers_round_the_same_in_the_page(page):
    texts = typed_numbers()
    theirs = page("(texts) => texts.map((text) => { const real = parseReal(text);"
                  "return Object.values(FORMATS).flatMap((f) => [f.encode(real), f.encode(real, true)]); })", texts)
    for text, said in zip(texts, theirs):
        real = parse(text)
        assert said == [f.encode(real, truncate) for f in FORMATS.values() for truncate in (False, True)], text


def test_decimals_are_the_same_in_the_page(page):
    texts = [text for text in typed_numbers() if "n" not in text]
    theirs = page("(texts) => texts.map((text) => { const real = parseReal(text); return [shortDecimal(real), "
                  "shortDecimal(real, 4), realText(real), isDyadic(real.den) ? exactDecimal(real) : '', "
                  "approximately(real)]; })", texts)
    for text, (nine, four, again, exact, near) in zip(texts, theirs):
        real = parse(text)
        x = real.fraction
        assert (nine, four, again) == (short_decimal(x), short_decimal(x, 4), real_text(real)), text
        if x.denominator & (x.denominator - 1) == 0:
            assert exact == exact_decimal(x)
        if 1e-300 < abs(x) < 1e300:
            assert near == pytest.approx(float(x), rel=1e-15)


@pytest.mark.parametrize("text", ["", "abc", "1.2.3", "1/0", "1e99999999", "1e5000", "2^9999", "9" * 500, "1 2", "."])
def test_what_cannot_be_read_is_refused_in_the_same_words(page, text):
    said = page("(text) => { try { parseReal(text); return 'read'; } catch (e) { return e.message; } }", text)
    with pytest.raises(Exception) as refusal:
        parse(text)
    assert said == str(refusal.value)
