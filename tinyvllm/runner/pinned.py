"""Page-locked memory that the GPU copies from and to while the host goes on: two buffers, used in turn.

    step        1   2   3   4
    buffer      A   B   A   B      the host fills A for step 3 only once step 1's copy has run
"""

import numpy as np

from tinyvllm.kernels.driver import Event, Stream, pinned_buffer


class Pinned:
    """One of the buffers. array: int32, on the host, at `address`; shape, parts, requests: for whoever fills it to
    remember how."""

    def __init__(self, stream: Stream, count: int):
        self._stream, self._event, self._in_use = stream, Event(), False
        self.array = np.frombuffer(pinned_buffer(4 * count, self._event), np.int32)
        self.address = self.array.ctypes.data
        self.shape: tuple[int, ...] = ()
        self.parts: tuple = ()
        self.requests: list = []

    def copying(self) -> None:
        """The copy was put on the stream: the memory is the GPU's until it has run."""
        self._event.record(self._stream)
        self._in_use = True

    def wait(self) -> None:
        """Until the copy has run."""
        if self._in_use:
            self._event.synchronize()
            self._in_use = False


class PinnedPair:
    """Two buffers of `count` numbers of 32 bits, for copies on a stream."""

    def __init__(self, stream: Stream, count: int):
        self.count = count
        self._buffers = [Pinned(stream, count), Pinned(stream, count)]

    def take(self) -> Pinned:
        """The one that was not taken last, once its copy has run."""
        self._buffers.reverse()
        self._buffers[0].wait()
        return self._buffers[0]
