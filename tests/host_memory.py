"""Device memory in host memory: what stands in for a GPU's arrays where a test has no GPU.

Arrays are DeviceArrays, so that slices, shapes and addresses are those of the real thing.
"""

import ctypes

import numpy as np

from tinyvllm.kernels.device_array import DeviceArray


def view(array):
    """The NumPy array over a DeviceArray's memory; anything else as it is."""
    if not isinstance(array, DeviceArray):
        return array
    if not array.size:
        return np.empty(array.shape, array.dtype)
    memory = (ctypes.c_char * array.nbytes).from_address(array.address)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


class HostMemory:
    """A backend's memory; what nobody has written holds 77."""

    def empty(self, shape, dtype):
        array = np.full(shape, 77, dtype)
        return DeviceArray(array.ctypes.data, tuple(shape), array.dtype, array)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        view(array)[...] = 0
        return array

    def put(self, destination, row_offset, rows):
        view(destination)[row_offset:row_offset + len(rows)] = rows
