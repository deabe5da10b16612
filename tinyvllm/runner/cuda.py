"""An NVIDIA GPU as a backend: device memory and numba.cuda kernels, launched one by one or fused and replayed."""

import contextlib
from collections.abc import Callable

import numpy as np

from tinyvllm.errors import ConfigError, OutOfDeviceMemoryError
from tinyvllm.kernels import cuda_backend
from tinyvllm.kernels.cuda_support import cuda, require_cuda, simulated
from tinyvllm.kernels.device_array import DeviceArray, over_numba_arrays
from tinyvllm.model import llama
from tinyvllm.runner.batch import OneStaging
from tinyvllm.runner.pinned import PinnedPair
from tinyvllm.units import format_bytes

_CUDA_ERROR_OUT_OF_MEMORY = 2


class CUDABackend:
    """Runs on the current CUDA device.

    enforce_eager=True launches the operations of model/llama.py one by one through numba, so that one can look
    between them. Otherwise model/llama_fused.py runs where it can, on a stream of its own, and decode steps are
    replayed as graphs (runner/cuda_graphs.py).

    batch_invariant: see EngineConfig; only the fused operations can.

    Raises DeviceError, in the user's words, if there is no GPU, no driver, or its compute capability is too low, and
    ConfigError for options that exclude each other.
    """

    name = "cuda"

    def __init__(self, enforce_eager: bool = False, batch_invariant: bool = False):
        require_cuda()
        self.batch_invariant = batch_invariant
        operations = cuda_backend.chosen_operations()
        self._tokens: PinnedPair | None = None  # see download_later
        self._staging: PinnedPair | None = None
        self.fused = None  # the fused operations, if this backend has them; then arrays are DeviceArrays
        if enforce_eager or simulated() or cuda_backend.linear_was_chosen():
            if batch_invariant:
                raise ConfigError("batch_invariant=True needs the GPU's fused operations, which enforce_eager=True, "
                                  "TINYVLLM_CUDA_LINEAR and the simulator do without: choose one of the two")
            self._bind(operations)
        else:
            self._bind({name: over_numba_arrays(operation) for name, operation in operations.items()})
            self._fuse()

    def _bind(self, operations) -> None:
        self.operations = operations
        self.eager_forward = self.forward = llama.bind(operations)  # one by one, whatever else there is
        self.argmax, self.sample = operations["argmax"], operations["sample"]

    def _fuse(self) -> None:
        from tinyvllm.kernels.driver import Stream
        from tinyvllm.kernels.fused.operations import FusedOperations, can_choose, can_run
        from tinyvllm.model import llama_fused

        cuda.current_context()
        self.fused = fused = FusedOperations(Stream(), batch_invariant=self.batch_invariant)
        fused_forward, eager_forward = llama_fused.bind(fused.table), self.eager_forward
        eager_argmax, eager_sample = self.argmax, self.sample

        def forward(w, kv, batch, buf, dims):
            cuda.current_context()
            (fused_forward if can_run(w, dims) else eager_forward)(w, kv, batch, buf, dims)

        def argmax(ids, logits):
            cuda.current_context()
            if logits.shape[0]:
                (fused.argmax if can_choose(logits.shape[1]) else eager_argmax)(ids, logits)

        def sample(ids, logits, *parameters):
            cuda.current_context()
            if logits.shape[0]:
                (fused.sample if can_choose(logits.shape[1]) else eager_sample)(ids, logits, *parameters)

        self.forward, self.argmax, self.sample, self.take_sampled = forward, argmax, sample, fused.take_sampled

    def graphs(self, runner):
        """What replays a model runner's decode steps, and its short prompts; (None, None) if nothing can be."""
        from tinyvllm.kernels.fused.operations import can_choose, can_run
        from tinyvllm.runner.cuda_graphs import DecodeGraphs
        from tinyvllm.runner.prompt_graphs import PromptGraphs

        if self.fused is None or not (can_run(runner.weights, runner.dims) and can_choose(runner.config.vocab_size)):
            if self.batch_invariant:
                raise ConfigError("batch_invariant=True cannot be had on a GPU for this model (biases, or sizes that "
                                  "the fused operations do not have): leave it out, or use device='cpu'")
            return None, None
        return DecodeGraphs(runner, self), PromptGraphs(runner, self)

    def linear_shape(self, num_rows: int, num_columns: int) -> tuple[int, ...]:
        return num_rows, num_columns

    def empty(self, shape, dtype):
        array = self._allocate(shape, np.dtype(dtype))
        if self.fused is None:
            return array
        return DeviceArray.of(array)

    def _allocate(self, shape, dtype):
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
            driver.device_memset(array if self.fused is None else array.owner, 0, array.nbytes)
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
        cuda.current_context()  # a step may run in a thread that has not used the GPU yet
        if self.fused is None:
            view.copy_to_device(host.reshape(-1))
        elif host.size:
            host = np.ascontiguousarray(host)
            self.fused.stream.copy_to_device(view.address, host.ctypes.data, host.nbytes)
        return view.reshape(host.shape)

    def staging(self, count: int) -> PinnedPair | OneStaging:
        """Memory for a step's inputs: copies from it run while the host fills the inputs of the next step."""
        if self.fused is None:
            return OneStaging(count)
        if self._staging is None or self._staging.count < count:
            self._staging = PinnedPair(self.fused.stream, count)
        return self._staging

    def download(self, source) -> np.ndarray:
        if self.fused is None or not source.size:
            return source.copy_to_host()
        host = np.empty(source.shape, source.dtype)
        self.fused.stream.copy_to_host(host.ctypes.data, source.address, host.nbytes)
        self.fused.stream.synchronize()
        return host

    def download_later(self, source) -> Callable[[], np.ndarray]:
        """Put a copy of int32 numbers to the host on the stream; returns what waits for it and gives them."""
        if self._tokens is None or self._tokens.count < source.size:
            self._tokens = PinnedPair(self.fused.stream, max(1024, 2 * source.size))
        pinned = self._tokens.take()
        self.fused.stream.copy_to_host(pinned.array.ctypes.data, source.address, source.nbytes)
        pinned.copying()

        def wait() -> np.ndarray:
            pinned.wait()
            return pinned.array[:source.size]

        return wait

    def exclusive(self):
        return contextlib.nullcontext()  # one stream: one operation after the other

    def memory_info(self) -> tuple[int, int]:
        context = cuda.current_context()
        # numba gives memory back in bulk, later: until then a cache that has gone would still count as taken.
        pending = getattr(getattr(context, "memory_manager", None), "deallocations", None)
        if pending is not None:
            pending.clear()
        info = context.get_memory_info()
        return info.free, info.total
