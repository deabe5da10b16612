"""The CUDA driver, called directly: launches, streams, copies and graphs in microseconds of host time.

numba's own launch costs 30 to 60 microseconds, most of it spent on looking at its arguments. A step of a model is
more than a hundred launches, so on the hot path they go to the driver as they are: the kernel's handle, numbers
and addresses, about 4 microseconds each. A step that is the same every time goes into a *graph*: the driver keeps
the whole list of launches, and one call of 3 microseconds replays it.

    stream = Stream()
    launch(compiled_kernel, (blocks, 1, 1), threads, shared_bytes, stream, arguments)
    with stream.capture() as captured: ...launches...
    captured.graph.launch(stream)

Programmatic dependent launch (`dependent=True`, compute capability 9.0): the next kernel's blocks may start while
the last blocks of this one run, and wait at `griddepcontrol.wait` for its results. What does not depend on them,
reading weights above all, happens before that wait.

Everything here runs in numba's context of the current device. Errors raise RuntimeError with the driver's name.
"""

import contextlib
import ctypes
import functools
import math
import struct
import sys
import weakref
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

from tinyvllm.kernels.cuda_support import cuda

__all__ = ["Stream", "Graph", "CompiledKernel", "launch", "check", "driver", "pinned_buffer", "tensor_map_bytes",
           "Event"]

_PROGRAMMATIC_STREAM_SERIALIZATION, _CLUSTER_DIMENSION = 6, 4  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9  # CUfunction_attribute
_CAPTURE_RELAXED = 2  # CUstreamCaptureMode
_FORMATS = {"uint64": "Q", "int64": "q", "int32": "i4x", "uint32": "I4x", "float32": "f4x"}  # 8 bytes an argument
PLAIN_SHARED_BYTES = 48 * 1024  # more has to be asked for


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_uint), ("pad", c_uint), ("value", c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint), ("stream", c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", c_uint)]


@functools.cache
def driver():
    """The driver's library. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def check(code: int, what: str) -> None:
    """Raise RuntimeError unless the driver's answer is success."""
    if code:
        name = c_char_p()
        driver().cuGetErrorName(code, byref(name))
        raise RuntimeError(f"CUDA: {what} failed with {(name.value or b'error').decode()} ({code})")


class Stream:
    """A queue of work on the current device, ordered with numba's default stream on both sides."""

    def __init__(self):
        handle = c_void_p()
        check(driver().cuStreamCreate(byref(handle), 0), "creating a stream")
        self.handle = handle

    def synchronize(self) -> None:
        """Wait until all that is on it has run; from any thread."""
        cuda.current_context()
        check(driver().cuStreamSynchronize(self.handle), "the work of a step")

    def copy_to_device(self, address: int, host_address: int, size: int) -> None:
        """Pageable memory may be overwritten as soon as this returns, pinned memory when the copy has run."""
        check(driver().cuMemcpyHtoDAsync_v2(c_uint64(address), c_void_p(host_address), c_size_t(size), self.handle),
              "copying to the GPU")

    def copy_to_host(self, host_address: int, address: int, size: int) -> None:
        check(driver().cuMemcpyDtoHAsync_v2(c_void_p(host_address), c_uint64(address), c_size_t(size), self.handle),
              "copying from the GPU")

    @contextlib.contextmanager
    def capture(self):
        """Record launches instead of running them; `graph` of what this yields is set on leaving."""
        check(driver().cuStreamBeginCapture_v2(self.handle, _CAPTURE_RELAXED), "beginning a graph")
        recorded, captured = c_void_p(), _Captured()
        try:
            yield captured
        finally:
            code = driver().cuStreamEndCapture(self.handle, byref(recorded))
        check(code, "ending a graph")
        captured.graph = Graph(recorded)


class _Captured:
    graph: "Graph"


class Graph:
    """An executable graph. It refers to the addresses that it was captured with: keep that memory."""

    def __init__(self, recorded: c_void_p):
        self._executable = c_void_p()
        try:
            check(driver().cuGraphInstantiateWithFlags(byref(self._executable), recorded, c_uint64(0)),
                  "instantiating a graph")
        finally:
            driver().cuGraphDestroy(recorded)

    def launch(self, stream: Stream) -> None:
        check(driver().cuGraphLaunch(self._executable, stream.handle), "launching a graph")

    def __del__(self):
        if self._executable.value and sys is not None and not sys.is_finalizing():
            driver().cuGraphExecDestroy(self._executable)


class Event:
    """A point in a stream, with a time."""

    def __init__(self):
        self.handle = c_void_p()
        check(driver().cuEventCreate(byref(self.handle), 0), "creating an event")

    def record(self, stream: Stream) -> None:
        check(driver().cuEventRecord(self.handle, stream.handle), "recording an event")

    def synchronize(self) -> None:
        """Wait until what was on the stream before it has run; from any thread."""
        cuda.current_context()  # a thread that has not used the GPU yet has none
        check(driver().cuEventSynchronize(self.handle), "the work of a step")

    def milliseconds_since(self, earlier: "Event") -> float:
        """Waits for this event."""
        elapsed = ctypes.c_float()
        self.synchronize()
        check(driver().cuEventElapsedTime(byref(elapsed), earlier.handle, self.handle), "reading an event")
        return elapsed.value

    def __del__(self):
        if self.handle.value and sys is not None and not sys.is_finalizing():
            driver().cuEventDestroy_v2(self.handle)


class CompiledKernel:
    """A kernel on the device, with its argument buffer laid out once; `launch` fills and fires it.

    handle: its CUkernel; argument_types: names as in cuda_support.kernel. Not for two threads at once.
    shared_percent: how much of a multiprocessor's fast memory should be shared memory, the rest being cache; None
    leaves it to the driver.
    """

    def __init__(self, handle: int, argument_types: tuple[str, ...], shared_percent: int | None = None):
        function = c_void_p()
        check(driver().cuKernelGetFunction(byref(function), c_void_p(handle)), "looking up a kernel")
        self.function = function
        if shared_percent is not None:
            check(driver().cuFuncSetAttribute(function, c_int(_PREFERRED_SHARED_MEMORY_CARVEOUT),
                                              c_int(shared_percent)), "dividing shared memory and cache")
        self._pack = struct.Struct("=" + "".join(_FORMATS[name] for name in argument_types)).pack_into
        self._arguments = (c_char * max(8, 8 * len(argument_types)))()
        start = ctypes.addressof(self._arguments)
        self._pointers = (c_void_p * max(1, len(argument_types)))(*(start + 8 * i for i in range(len(argument_types))))
        self._attributes = (_Attribute * 2)()
        self._config = _LaunchConfig()
        self._config.attributes = self._attributes
        self._shared_bytes = PLAIN_SHARED_BYTES

    def launch(self, grid, threads: int, shared_bytes: int, stream: Stream, arguments, dependent: bool = False,
               cluster: int = 1) -> None:
        """grid: (x, y, z) blocks; cluster: blocks along x that share a cluster; dependent: see the module."""
        if shared_bytes > self._shared_bytes:
            check(driver().cuFuncSetAttribute(self.function, c_int(_MAX_DYNAMIC_SHARED_SIZE_BYTES),
                                              c_int(shared_bytes)), "asking for shared memory")
            self._shared_bytes = shared_bytes
        self._pack(self._arguments, 0, *arguments)
        config, count = self._config, 0
        config.grid[:] = grid
        config.block[:] = threads, 1, 1
        config.shared_bytes, config.stream = shared_bytes, stream.handle
        if dependent:
            self._attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
            self._attributes[count].value[0] = 1
            count += 1
        if cluster > 1:
            self._attributes[count].id = _CLUSTER_DIMENSION
            self._attributes[count].value[:3] = cluster, 1, 1
            count += 1
        config.num_attributes = count
        code = driver().cuLaunchKernelEx(byref(config), self.function, self._pointers, None)
        if code:
            check(code, "launching a kernel")


def launch(kernel, grid, threads: int, shared_bytes: int, stream: Stream, arguments, dependent: bool = False,
           cluster: int = 1) -> None:
    """Launch a PTX-grade cuda_support.kernel, compiling it at its first use."""
    kernel.direct.launch(grid, threads, shared_bytes, stream, arguments, dependent, cluster)


def pinned_buffer(size: int, last_use: Event):
    """A ctypes buffer of page-locked memory, which the GPU copies from and to without a detour.

    It goes back to the system with the last array that looks into it, once `last_use` has passed on the GPU.
    """
    address = c_void_p()
    check(driver().cuMemHostAlloc(byref(address), c_size_t(size), 0), "allocating pinned memory")
    buffer = (c_char * size).from_address(address.value)
    weakref.finalize(buffer, _free_pinned, address, last_use).atexit = False  # by then the driver may be gone
    return buffer


def _free_pinned(address: c_void_p, last_use: Event) -> None:
    if not sys.is_finalizing():
        last_use.synchronize()  # of one that was never recorded: returns at once
        check(driver().cuMemFreeHost(address), "giving pinned memory back")


def tensor_map_bytes(address: int, shape: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The 128 bytes that describe a C-contiguous bf16 array to the tensor copy engine (TMA).

    A copy brings `box` values (at most 256 along an axis, 64 along the last) into shared memory, swizzled over 128
    bytes; what lies outside the array reads as zero and is not written.
    """
    axes = len(shape)
    pitches = [2 * math.prod(shape[axis + 1:]) for axis in range(axes - 1)]  # bytes; the engine's axes run backwards
    opaque = (c_uint64 * 32)()
    aligned = (ctypes.addressof(opaque) + 63) // 64 * 64  # the driver wants 64-byte alignment
    bf16, none, swizzle_128, promote_256 = 9, 0, 3, 3
    check(driver().cuTensorMapEncodeTiled(
        c_void_p(aligned), c_int(bf16), c_uint(axes), c_void_p(address), (c_uint64 * axes)(*reversed(shape)),
        (c_uint64 * (axes - 1))(*reversed(pitches)), (c_uint * axes)(*reversed(box)), (c_uint * axes)(*[1] * axes),
        c_int(none), c_int(swizzle_128), c_int(promote_256), c_int(none)), "describing an array to the copy engine")
    return ctypes.string_at(aligned, 128)
