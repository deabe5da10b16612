"""Which backend: the GPU if there is a usable one, else the CPU; or exactly what was asked for."""

from tinyvllm.errors import DeviceError
from tinyvllm.runner.backend import Backend


def make_backend(device: str = "auto", enforce_eager: bool = False, batch_invariant: bool = False) -> Backend:
    """The backend for "auto", "cuda" or "cpu". Raises DeviceError if "cuda" was asked for and cannot be had, and
    ConfigError for options that exclude each other on a GPU. The CPU's sums never depend on the batch.

    Backends are imported here, not above: the CPU path must work where numba.cuda cannot even be imported.
    """
    if device in ("auto", "cuda"):
        try:
            from tinyvllm.runner.cuda import CUDABackend

            return CUDABackend(enforce_eager, batch_invariant)
        except DeviceError:
            if device == "cuda":
                raise
    from tinyvllm.runner.cpu import CPUBackend

    return CPUBackend(enforce_eager)
