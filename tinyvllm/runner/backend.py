"""What a backend is: where arrays live, and the operations on them. The rest of the engine asks for nothing else."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np


class Backend(Protocol):
    """Memory and operations of one device. Arrays are NumPy arrays on the CPU and device arrays on a GPU.

    A backend may have more, which ModelRunner asks for: `eager_forward`, operations one by one where `forward` has a
    faster way; `fused`, not None if forward returns before the work is done; `staging(count)`, memory that uploads of
    a step's inputs are made from (runner/batch.py); `graphs(runner)`, what takes over decode steps and the steps of a
    short prompt (runner/cuda_graphs.py, runner/prompt_graphs.py), or (None, None).
    """

    name: str  # "cpu" or "cuda"
    operations: Mapping[str, Callable]  # one by one, by name: for model.llama.bind, and for looking (tinyvllm/probe)
    forward: Callable  # tinyvllm.model.llama.forward over these operations; it honours `batch.watch`
    argmax: Callable
    sample: Callable

    def linear_shape(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        """Shape in which `linear` keeps a [num_rows, num_columns] weight."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Uninitialised array. Raises OutOfDeviceMemoryError, with what was asked for and what is free."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any: ...

    def put_linear(self, destination: Any, row_offset: int, rows: np.ndarray) -> None:
        """Copy rows [n, K] of a linear weight into place, in this backend's layout."""

    def read_linear(self, source: Any, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Elements of a linear weight as the checkpoint has them: uint16 [len(rows), len(columns)], copied."""

    def write_linear(self, destination: Any, row: int, column: int, bits: int) -> None:
        """Replace one element of a linear weight."""

    def put(self, destination: Any, row_offset: int, rows: np.ndarray) -> None:
        """Copy a host array into destination[row_offset:row_offset + len(rows)]."""

    def upload(self, destination: Any, host: np.ndarray) -> Any:
        """Copy a host array to the front of a flat device buffer; returns the view that holds it, in host's shape."""

    def download(self, source: Any) -> np.ndarray:
        """Copy to the host, waiting for the device."""

    def exclusive(self) -> AbstractContextManager:
        """Operations are called in here, so that threads do not get into each other's way; `forward` does it itself."""

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes."""
