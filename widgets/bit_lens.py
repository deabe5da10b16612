"""BitLens: one number as bits, side by side in the formats that models are made of."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import traitlets

from tinyvllm.errors import TinyVLLMError
from widgets.number_formats import FORMATS, Real, parse, real_text
from widgets.panel import Panel


class BitLens(Panel, script=("formats.js", "number_line.js", "bit_patch.js", "bit_lens.js")):
    """Bits to toggle, the number they stand for, its neighbours, and what rounding does to a decimal.

    source: a LiveEngine or a Feed: then it shows whatever is clicked in the other panels, and can change weights of the
    running model. None: a lens of its own.
    value: a number or its text ("0.1", "1/3", "2^-133", "nan"), or bits: a pattern of `format`. Both can be set later,
    and read back after somebody has toggled.
    prompt, max_tokens: what "generate again" runs, after a weight was changed; no prompt means the newest one again.
    formats: which are shown: of "bf16", "fp16", "fp32", "e4m3", "e5m2". format: the one that is taken apart.
    """

    formats = traitlets.List(traitlets.Enum(list(FORMATS)), default_value=["bf16", "fp16", "fp32"],
                             minlen=1).tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    max_tokens = traitlets.Int(60, min=1).tag(sync=True)
    # One trait for what belongs together: format, bits, value (as text, exact), and the address it came from.
    shown = traitlets.Dict().tag(sync=True)

    def __init__(self, source: Any = None, value: Any = None, bits: int | None = None, format: str = "bf16",
                 **traits: Any):
        super().__init__(source, **traits)
        if value is not None and bits is not None:
            raise TinyVLLMError("give a value or bits, not both")
        _known(format)
        is_default = value is None and bits is None
        # What was inspected before a lens that was given a number of its own is not what it should show.
        seen = 0 if is_default else self.hub.inspected.get("n", 0)
        text = "0.1" if is_default else None if value is None else number_text(value)
        self._show(format, parse(text) if bits is None else None, bits, text, seen=seen)
        if format not in self.formats:
            self.formats = [*self.formats, format]

    @property
    def format(self) -> str:
        """The format that is taken apart. Setting it rounds the value anew."""
        return self.shown["format"]

    @format.setter
    def format(self, name: str) -> None:
        _known(name)
        self._show(name, parse(self.value), None, self.value)
        if name not in self.formats:
            self.formats = [*self.formats, name]

    @property
    def bits(self) -> int:
        """The pattern in `format`, as toggled in the page."""
        return self.shown["bits"]

    @bits.setter
    def bits(self, bits: int) -> None:
        self._show(self.format, None, bits, None)

    @property
    def value(self) -> str:
        """The number that is being looked at, exact, as text: what was typed, or what the toggled bits stand for."""
        return self.shown["value"]

    @value.setter
    def value(self, value: Any) -> None:
        text = number_text(value)
        self._show(self.format, parse(text), None, text)

    @property
    def real(self) -> Real:
        """What the bits stand for, exactly."""
        return FORMATS[self.format].decode(self.bits)

    def _show(self, name: str, real: Real | None, bits: int | None, text: str | None, seen: int | None = None) -> None:
        number_format = FORMATS[name]
        if bits is None:
            bits = number_format.encode(real)
        else:
            bits = int(bits) if isinstance(bits, np.integer) else bits
            text = real_text(number_format.decode(bits))
        seen = self.shown.get("seen", 0) if seen is None else seen
        self.shown = {"format": name, "bits": bits, "value": text, "address": None, "seen": seen}

    @traitlets.observe("shown")
    def _summarise(self, _: Any) -> None:
        number_format = FORMATS[self.format]
        pattern = f"{self.bits:0{number_format.num_bits}b}"
        m = number_format.mantissa_bits
        fields = f"{pattern[0]} {pattern[1:-m]} {pattern[-m:]}"
        self.summary = f"BitLens: {self.value} in {number_format.title} is {fields} = {real_text(self.real)}"


def number_text(value: Any) -> str:
    """A number of any type as text that says exactly it. Raises TinyVLLMError for what is no number."""
    if isinstance(value, str):
        parse(value)
        return value.strip()
    if isinstance(value, np.floating):  # of a narrow type: what its bits stand for, not its short name
        return real_text(parse(str(value))) if not np.isfinite(value) else _exact_text(value)
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction, Decimal)):
        raise TinyVLLMError(f"a value is a number or its text, got {type(value).__name__}")
    text = repr(value) if isinstance(value, float) else str(value)
    parse(text)  # one that is too long is refused here
    return text


def _exact_text(value: np.floating) -> str:
    numerator, denominator = value.as_integer_ratio()
    return real_text(Real("finite", bool(np.signbit(value)), Fraction(abs(numerator), denominator)))


def _known(name: str) -> None:
    if name not in FORMATS:
        raise TinyVLLMError(f"format is one of {', '.join(FORMATS)}, got {name!r}")
