"""The CPU as a backend: NumPy arrays and numba.njit kernels."""

import os

import numpy as np

from tinyvllm.errors import OutOfDeviceMemoryError
from tinyvllm.kernels import cpu_backend
from tinyvllm.kernels.gemm.packing import pack_rows, packed_place, packed_shape
from tinyvllm.units import format_bytes


class CPUBackend:
    """Runs on the host. enforce_eager: operations one by one from Python instead of one compiled function."""

    name = "cpu"

    def __init__(self, enforce_eager: bool = False):
        self.forward = cpu_backend.eager_forward() if enforce_eager else cpu_backend.compiled_forward()
        self.operations = cpu_backend.OPS
        self.argmax, self.sample = self.operations["argmax"], self.operations["sample"]

    def linear_shape(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        return packed_shape(num_rows, num_columns)

    def empty(self, shape, dtype) -> np.ndarray:
        return self._allocate(np.empty, shape, dtype)

    def zeros(self, shape, dtype) -> np.ndarray:
        return self._allocate(np.zeros, shape, dtype)

    def _allocate(self, make, shape, dtype):
        try:
            return make(shape, dtype)
        except MemoryError:
            wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise OutOfDeviceMemoryError(
                f"out of memory: {format_bytes(wanted)} asked for, {format_bytes(self.memory_info()[0])} free; "
                "lower max_model_len, max_num_seqs or num_blocks") from None

    def put_linear(self, destination, row_offset, rows) -> None:
        pack_rows(destination, row_offset, rows)

    def read_linear(self, source, rows, columns) -> np.ndarray:
        return source[packed_place(rows[:, None], columns[None, :])]

    def write_linear(self, destination, row, column, bits) -> None:
        destination[packed_place(row, column)] = bits

    def put(self, destination, row_offset, rows) -> None:
        destination[row_offset:row_offset + len(rows)] = rows

    def upload(self, destination, host):
        return host  # kernels read the staging buffer itself

    def download(self, source) -> np.ndarray:
        return source

    def exclusive(self):
        return cpu_backend.exclusive()

    def memory_info(self) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        try:
            total = page * os.sysconf("SC_PHYS_PAGES")
            free = page * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError, AttributeError):  # not every system tells; assume a small laptop
            return 4 << 30, 8 << 30
        try:  # Linux counts file pages that it would give up at once as used: MemAvailable says better
            with open("/proc/meminfo") as info:
                fields = dict(line.split(":", 1) for line in info)
            free = int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            pass
        return free, total
