"""How numbers travel to the page: a JSON header and ONE binary buffer that all arrays of a message share.

    message = {..., "topics": {"blocks": {"mode": "delta", "data": {...}, "arrays": {"owner": ["<i4", 0, [64]]}}}}
    buffer  = the arrays one after the other, each beginning at a multiple of 8 bytes

An array's entry is [dtype, byte offset, shape]; kit.js makes a typed array of it without copying. 64-bit integers are
refused: JavaScript's numbers hold 53 bits, so times travel as float64 milliseconds since the feed's origin.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 8
_PADDING = bytes(ALIGNMENT)
DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<f8")


@dataclass
class Payload:
    """What a topic or an answer gives: data (anything that JSON can hold) and named NumPy arrays."""

    data: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Packer:
    """Collects the arrays of one message into one buffer."""

    def __init__(self):
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, payload: Payload) -> dict[str, Any]:
        """The JSON part of a payload; its arrays go into the buffer. Raises TypeError for a dtype outside DTYPES."""
        entries = {}
        for name, array in payload.arrays.items():
            dtype = array.dtype.str
            if dtype not in DTYPES:
                raise TypeError(f"array {name!r} has dtype {array.dtype}; the page can take {', '.join(DTYPES)}")
            entries[name] = [dtype, self._size, list(array.shape)]
            data = array.tobytes()  # row after row, whatever the array's layout
            self._parts.append(data)
            self._size += len(data)
            if padding := -len(data) % ALIGNMENT:
                self._parts.append(_PADDING[:padding])
                self._size += padding
        return {"data": payload.data, "arrays": entries}

    def buffers(self) -> list[bytes]:
        """The one buffer, or none if there were no arrays."""
        return [b"".join(self._parts)] if self._size else []


def unpack(part: dict[str, Any], buffers: list[bytes]) -> Payload:
    """The inverse of Packer.add, for tests and for readers that are not a page."""
    arrays = {}
    for name, (dtype, offset, shape) in part["arrays"].items():
        count = int(np.prod(shape))
        arrays[name] = (np.frombuffer(buffers[0], dtype, count, offset) if count else np.empty(0, dtype)).reshape(shape)
    return Payload(part["data"], arrays)
