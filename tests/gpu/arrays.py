"""Arrays of the GPU's tests."""

import numpy as np

from tinyvllm.kernels.cuda_support import cuda


def to_device(array: np.ndarray):
    """A copy as a DeviceArray; an array without elements as it is, for numba has none such on a device."""
    from tinyvllm.kernels.device_array import DeviceArray

    return DeviceArray.of(cuda.to_device(np.ascontiguousarray(array)) if array.size else array)
