"""What the GPU's benchmark launches at the real shape, without a GPU: every launch fits its kernel and the hardware.

FusedOperations are the real ones; device memory is addresses with nothing behind them, and instead of being launched a
kernel's arguments are packed as the driver would have them.
"""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from tests.bench_stand_ins import HostEvent, HostStream
from tinyvllm.bench import gpu_kernels, gpu_peers, gpu_timing
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.gpu_model import Bench
from tinyvllm.kernels import cuda_support
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.kernels.driver import _FORMATS
from tinyvllm.kernels.fused import operations

KIB = 1024


class Memory:
    """Hands out addresses."""

    def __init__(self):
        self.next, self.size = 1 << 40, 0

    def empty(self, shape, dtype):
        array = DeviceArray(self.next, tuple(shape), np.dtype(dtype), None)
        self.next += -(-array.nbytes // KIB) * KIB
        self.size += array.nbytes
        return array


class AddressBackend:
    """A CUDABackend whose memory is addresses."""

    name = "cuda"

    def __init__(self, fused, memory):
        self.fused, self.empty, self.zeros = fused, memory.empty, memory.empty
        self.upload = None

    def linear_shape(self, num_rows, num_columns):
        return num_rows, num_columns

    def put(self, destination, row_offset, rows):
        assert row_offset + len(rows) <= destination.shape[0] and rows.dtype == destination.dtype


@pytest.fixture
def launched(monkeypatch):
    """(kernel, grid, arguments) of every launch, checked as it is made."""
    made = []

    def launch(kernel, grid, threads, shared_bytes, stream, arguments, dependent=False, cluster=1):
        formats = "=" + "".join(_FORMATS[name] for name in kernel._signature)
        struct.pack(formats, *arguments)  # as many as the kernel takes, each of its type
        assert 1 <= grid[0] < 2**31 and 1 <= grid[1] < 2**16 and 1 <= grid[2] < 2**16 and grid[0] % cluster == 0
        assert 32 <= threads <= kernel.options["launch_bounds"][0] and 0 <= shared_bytes <= 227 * KIB
        made.append((kernel, grid, arguments))
        stream.run(lambda: None, ())

    monkeypatch.setattr(cuda_support.kernel, "direct",
                        property(lambda self: SimpleNamespace(launch=lambda *a, **k: launch(self, *a, **k))))
    monkeypatch.setattr(gpu_timing, "Event", HostEvent)
    return made


@pytest.fixture
def bench(launched, monkeypatch):
    memory = Memory()
    device = SimpleNamespace(MULTIPROCESSOR_COUNT=132)
    monkeypatch.setattr(operations, "cuda", SimpleNamespace(
        get_current_device=lambda: device, device_array=lambda size, dtype: memory.empty((size,), dtype)))
    monkeypatch.setattr(operations.TensorMaps, "of", lambda self, matrix, *box: matrix.address)
    fused = operations.FusedOperations(HostStream(), hopper=True)
    made = Bench(LLAMA_3_2_1B, backend=AddressBackend(fused, memory))
    made.memory = memory
    return made


def labels_of(figures):
    found = dict(figures)
    errors = {label: error for label, error in found.items() if isinstance(error, Exception)}
    assert not errors
    return found


def names(launched):
    return {kernel.__name__ for kernel, _, _ in launched}


def test_kernels_of_a_step_at_every_number_of_rows(bench, launched):
    found = labels_of(gpu_kernels.kernels(bench, 1))
    assert len(found) == 4 * 9 + 2 * 6
    assert {"few_rows", "skinny", "wgmma", "rope_write"} <= names(launched)


def test_products_alone_at_every_number_of_rows_write_all_their_outputs(bench, launched):
    found = labels_of(gpu_peers.products(bench, 1, None))
    assert len(found) == 5 * 9 and names(launched) == {"few_rows", "skinny", "wgmma"}
    for kernel, _, arguments in launched:
        rows, outputs, depth = arguments[-3:] if kernel.__name__ == "wgmma" else (None, None, None)
        if kernel.__name__ == "skinny":
            rows, outputs, depth = arguments[8:11]
            assert rows <= 1024
        if rows is not None:
            assert (outputs, depth) in {(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)}


def test_attention_and_the_reading_kernel(bench, launched):
    assert len(labels_of(gpu_kernels.ceiling(bench, 1))) == 1
    assert [grid[0] for _, grid, _ in launched] == [n * 132 for n in (8, 8, 16, 16, 32, 32)]
    launched.clear()
    assert len(labels_of(gpu_kernels.decode_attention(bench, 1))) == 2 * 4
    assert len(labels_of(gpu_peers.prefill_attention(bench, 1, None, None))) == 2
    assert "decode" in names(launched) and len(names(launched)) >= 2


def test_what_it_needs_of_a_gpu_fits_on_one(bench):
    list(gpu_peers.products(bench, 1, None))
    assert 15e9 < bench.memory.size < 24e9, "the module's docstring says about 20 GB"
