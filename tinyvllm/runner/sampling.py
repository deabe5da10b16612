"""Sampling parameters of a step on their way to the device: numbers of 32 bits in one buffer.

    | seed | position | temperature | top_k | top_p |        of every request: 2 + 2 + 1 + 1 + 1 numbers

Where a step is put on a stream and left to itself, they go in one copy from page-locked memory, taken in turn: the step
before may not have read its own yet. Elsewhere a copy is over at once, and each is an array of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from tinyvllm.engine.request import Request
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.runner.backend import Backend
from tinyvllm.runner.pinned import PinnedPair

NUMBERS = 7  # a request


class SamplingParameters(NamedTuple):
    """In the order in which a backend's `sample` takes them; one element a request."""

    temperature: Any  # float32; 0: the most likely token
    top_k: Any  # int32; 0: off
    top_p: Any  # float32; 1: off
    seed: Any  # uint64
    position: Any  # int64: the one that the sampled token will have


DTYPES = SamplingParameters(*map(np.dtype, (np.float32, np.int32, np.float32, np.uint64, np.int64)))
_FIRST = SamplingParameters(4, 5, 6, 0, 2)  # where each begins, in numbers a request: 8 bytes at multiples of 8


def parameters_in(buffer: Any, num_rows: int) -> SamplingParameters:
    """Those of so many requests at the beginning of a flat int32 array, whether NumPy's or a DeviceArray."""
    found = []
    for first, dtype in zip(_FIRST, DTYPES):
        numbers = dtype.itemsize // 4 * num_rows
        part = buffer[first * num_rows:first * num_rows + numbers]
        found.append(DeviceArray(part.address, (num_rows,), dtype, part.owner) if isinstance(part, DeviceArray)
                     else part.view(dtype))
    return SamplingParameters(*found)


def fill(parameters: SamplingParameters, requests: list[Request], positions: np.ndarray) -> None:
    """What the requests ask for; positions: those of the sampled tokens. Rows beyond theirs choose the most likely
    token, which costs least."""
    count = len(requests)
    parameters.temperature[:count] = [request.params.temperature for request in requests]
    parameters.temperature[count:] = 0
    parameters.top_k[:count] = [request.params.top_k for request in requests]
    parameters.top_p[:count] = [request.params.top_p for request in requests]
    parameters.seed[:count] = np.array([request.seed for request in requests], np.uint64)
    fill_positions(parameters, positions)


def fill_positions(parameters: SamplingParameters, positions: np.ndarray) -> None:
    """All that changes from step to step of the same requests."""
    parameters.position[:len(positions)] = positions


class SamplingInputs:
    """A backend's memory for them, for steps that are launched one by one."""

    def __init__(self, backend: Backend, max_num_seqs: int):
        self._backend, self._count = backend, NUMBERS * max_num_seqs
        self._fused = getattr(backend, "fused", None)
        self._pinned: PinnedPair | None = None  # from the first draw on
        if self._fused is not None:
            self._device = backend.empty((self._count,), np.int32)
        else:
            self._host = np.zeros(self._count, np.int32)
            self._device = SamplingParameters(*(backend.empty((max_num_seqs,), dtype) for dtype in DTYPES))

    def put(self, requests: list[Request], positions: np.ndarray) -> SamplingParameters:
        """On the device; arguments as of `fill`."""
        count = len(requests)
        if self._fused is None:
            host = parameters_in(self._host, count)
            fill(host, requests, positions)
            return SamplingParameters(*map(self._backend.upload, self._device, host))
        if self._pinned is None:
            self._pinned = PinnedPair(self._fused.stream, self._count)
        pinned = self._pinned.take()
        fill(parameters_in(pinned.array, count), requests, positions)
        device = self._backend.upload(self._device, pinned.array[:NUMBERS * count])
        pinned.copying()
        return parameters_in(device, count)
