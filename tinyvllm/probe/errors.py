"""What the probe says when it is asked for something that is not there."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

from tinyvllm.errors import TinyVLLMError


class ProbeError(TinyVLLMError, ValueError):
    """Something was asked for that the engine does not have, or no longer has. Nothing has changed."""


def check_number(what: str, value: Any, count: int) -> int:
    """`value` as an int; ProbeError unless it is a whole number from 0 to count - 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < count:
        allowed = f"0 to {count - 1}" if count else "none here"
        raise ProbeError(f"{what} {value!r} is not there: it can be {allowed}")
    return int(value)


def check_numbers(what: str, values: Any, count: int) -> np.ndarray:
    """int32 array of `values`: None for all `count` of them, one number, or several."""
    if values is None:
        return np.arange(count, dtype=np.int32)
    several = values if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else [values]
    return np.array([check_number(what, value, count) for value in several], np.int32)
