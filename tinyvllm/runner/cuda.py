"""An NVIDIA GPU as a backend: device arrays and numba.cuda kernels."""

import contextlib

import numpy as np

from tinyvllm.errors import OutOfDeviceMemoryError
from tinyvllm.kernels import cuda_backend
from tinyvllm.kernels.cuda_support import cuda, require_cuda
from tinyvllm.model import llama
from tinyvllm.units import format_bytes

_CUDA_ERROR_OUT_OF_MEMORY = 2


class CUDABackend:
    """Runs on the current CUDA device. enforce_eager is accepted for symmetry: kernels are launched one by one.

    Raises DeviceError, in the user's words, if there is no GPU, no driver, or its compute capability is too low.
    """

    name = "cuda"

    def __init__(self, enforce_eager: bool = False):
        require_cuda()
        self.operations = cuda_backend.chosen_operations()
        self.forward = llama.bind(self.operations)
        self.argmax, self.sample = self.operations["argmax"], self.operations["sample"]

    def linear_shape(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        return num_rows, num_columns

    def empty(self, shape, dtype):
        if 0 in shape:  # absent biases; numba cannot index a device array without elements, and no kernel reads them
            return np.empty(shape, dtype)
        try:
            return cuda.device_array(shape, dtype)
        except Exception as error:
            if getattr(error, "code", None) != _CUDA_ERROR_OUT_OF_MEMORY and "OUT_OF_MEMORY" not in str(error):
                raise
            wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
            free, total = self.memory_info()
            raise OutOfDeviceMemoryError(
                f"out of GPU memory: {format_bytes(wanted)} asked for, {format_bytes(free)} of {format_bytes(total)} "
                "free; close other programs on the GPU, or lower gpu_memory_utilization, num_blocks, "
                "max_num_batched_tokens or max_model_len") from None

    def zeros(self, shape, dtype):
        from numba.cuda.cudadrv import driver

        array = self.empty(shape, dtype)
        if array.nbytes:
            driver.device_memset(array, 0, array.nbytes)
        return array

    def put_linear(self, destination, row_offset, rows) -> None:
        self.put(destination, row_offset, rows)

    def read_linear(self, source, rows, columns) -> np.ndarray:
        if not rows.size or not columns.size:
            return np.empty((rows.size, columns.size), np.uint16)
        first, last = int(rows.min()), int(rows.max())
        return source[first:last + 1].copy_to_host()[np.ix_(rows - first, columns)]

    def write_linear(self, destination, row, column, bits) -> None:
        destination[row, column:column + 1].copy_to_device(np.array([bits], np.uint16))

    def put(self, destination, row_offset, rows) -> None:
        rows = np.ascontiguousarray(rows)
        destination[row_offset:row_offset + len(rows)].copy_to_device(rows)

    def upload(self, destination, host):
        view = destination[:host.size]
        view.copy_to_device(host.reshape(-1))
        return view.reshape(host.shape)

    def download(self, source) -> np.ndarray:
        return source.copy_to_host()

    def exclusive(self):
        return contextlib.nullcontext()  # one stream: one operation after the other

    def memory_info(self) -> tuple[int, int]:
        info = cuda.current_context().get_memory_info()
        return info.free, info.total
