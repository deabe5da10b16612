"""Tensor maps on the device: what the copy engine has to know of each matrix, made once a matrix and kept."""

import math

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, pointer
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.kernels.driver import Stream, tensor_map_bytes

__all__ = ["TensorMaps"]

MAP_BYTES = 128
MAPS_A_PAGE = 512


class TensorMaps:
    """Maps by address, shape and box. They describe addresses: a matrix elsewhere gets another map."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._pages = []
        self._addresses: dict[tuple[int, tuple[int, ...], tuple[int, ...]], int] = {}

    def of(self, matrix: DeviceArray, *box: int) -> int:
        """Address of the map of a matrix [rows, columns], with boxes of so many rows x 64; or of more axes, and all
        numbers of a box but the last, which is 64.

        The first rows of a buffer are mapped as the whole buffer, so that one map does for every number of rows:
        what is read beyond them is not used, and what is written beyond them is read by nobody.
        """
        shape, owner = matrix.shape, matrix.owner
        if (isinstance(owner, DeviceArray) and owner.address == matrix.address
                and math.prod(owner.shape[1:]) == math.prod(shape[1:])):
            shape = owner.shape[0], *shape[1:]
        key = matrix.address, shape, box
        address = self._addresses.get(key)
        if address is None:
            number = len(self._addresses) % MAPS_A_PAGE
            if number == 0:
                self._pages.append(cuda.device_array(MAPS_A_PAGE * MAP_BYTES, np.uint8))
            address = pointer(self._pages[-1]) + number * MAP_BYTES
            content = np.frombuffer(tensor_map_bytes(matrix.address, shape, (*box, 64)), np.uint8)
            self._stream.copy_to_device(address, content.ctypes.data, MAP_BYTES)
            self._stream.synchronize()
            self._addresses[key] = address
        return address
