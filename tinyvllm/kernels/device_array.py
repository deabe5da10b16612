"""A device array that is cheap to slice.

numba's own device arrays check and copy strides whenever they are sliced, 10 to 20 microseconds a time, and a
forward pass slices more than a hundred times. A `DeviceArray` is an address, a shape and an owner: slicing along the
first axis is one multiplication. It speaks `__cuda_array_interface__`, so numba's kernels take it too.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, pointer

__all__ = ["DeviceArray", "over_numba_arrays"]


class DeviceArray:
    """C-contiguous memory on the device. owner: what keeps the memory alive; of a part, the whole DeviceArray."""

    __slots__ = ("address", "shape", "dtype", "owner")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype, owner: Any):
        self.address, self.shape, self.dtype, self.owner = address, shape, dtype, owner

    @classmethod
    def of(cls, array: Any) -> "DeviceArray":
        """The same memory as a numba device array, or as a host array that has no elements."""
        if array.size == 0:
            return cls(0, array.shape, array.dtype, array)
        return cls(pointer(array), array.shape, array.dtype, array)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def device_ctypes_pointer(self):
        """What `pointer` asks numba's arrays for."""
        return _Address(self.address)

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "strides": None,
                "stream": None, "version": 3}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> "DeviceArray":
        """Along the first axis: a number, or a slice without a step; or numbers for the first axes, a slice at last."""
        if isinstance(index, tuple):
            part = self
            for number in index:
                part = part[number]
            return part
        length, rest = self.shape[0], self.shape[1:]
        owner = self.owner if isinstance(self.owner, DeviceArray) else self
        pitch = math.prod(rest) * self.dtype.itemsize
        if isinstance(index, slice):
            start, stop, step = index.indices(length)
            if step != 1:
                raise IndexError("a DeviceArray is sliced without a step")
            return DeviceArray(self.address + start * pitch, (max(0, stop - start), *rest), self.dtype, owner)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for an axis of {length}")
        return DeviceArray(self.address + index % length * pitch, rest, self.dtype, owner)

    def reshape(self, *shape) -> "DeviceArray":
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if math.prod(shape) != self.size:
            raise ValueError(f"cannot reshape {self.shape} to {shape}")
        owner = self.owner if isinstance(self.owner, DeviceArray) else self
        return DeviceArray(self.address, tuple(shape), self.dtype, owner)

    def numba(self):
        """The same memory as a numba device array; without elements, a host array."""
        return np.empty(self.shape, self.dtype) if self.size == 0 else cuda.as_cuda_array(self, sync=False)

    def copy_to_host(self) -> np.ndarray:
        """A copy on the host, after everything before it has run."""
        return self.numba().copy_to_host() if self.size else self.numba()

    def copy_to_device(self, host: np.ndarray) -> None:
        """Overwrite from a host array of the same shape."""
        if self.size:
            self.numba().copy_to_device(np.ascontiguousarray(host))


class _Address:
    """As ctypes has it: an address in `value`."""

    __slots__ = ("value",)

    def __init__(self, value: int):
        self.value = value


def over_numba_arrays(function: Callable) -> Callable:
    """A launch wrapper for numba's arrays (the simple kernels have those) as one that takes DeviceArrays."""

    def launch(*arguments):
        function(*(x.numba() if isinstance(x, DeviceArray) else x for x in arguments))

    return launch
