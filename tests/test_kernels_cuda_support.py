"""Without a GPU: the package imports everywhere, and a missing or too old GPU is refused in clear words."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tinyvllm.errors import DeviceError
from tinyvllm.kernels import cuda_support


def fake_cuda(available=True, capability=(9, 0), error=None):
    def is_available():
        if error:
            raise error
        return available

    device = SimpleNamespace(compute_capability=capability, name=b"Test GPU")
    return SimpleNamespace(is_available=is_available, cuda_error=lambda: "no driver",
                           get_current_device=lambda: device)


@pytest.fixture(autouse=True)
def no_simulator(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)


@pytest.mark.parametrize("cuda, words", [
    (fake_cuda(available=False), ["NVIDIA GPU and its driver", "no driver", 'device="cpu"']),
    (fake_cuda(error=RuntimeError("driver too\nold")), ["driver too old", 'device="cpu"']),
    (fake_cuda(capability=(7, 5)), ["Test GPU", "7.5", "need 8.0 or newer", 'device="cpu"']),
    (None, ["numba-cuda", "pip install", 'device="cpu"']),
], ids=["none", "broken driver", "too old", "no package"])
def test_a_gpu_that_cannot_be_used_is_refused_with_a_way_out(monkeypatch, cuda, words):
    monkeypatch.setattr(cuda_support, "cuda", cuda)
    with pytest.raises(DeviceError) as refusal:
        cuda_support.require_cuda()
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert not cuda_support.cuda_available()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_ampere_and_newer_are_accepted(monkeypatch, capability):
    monkeypatch.setattr(cuda_support, "cuda", fake_cuda(capability=capability))
    cuda_support.require_cuda()
    assert cuda_support.cuda_available()


def test_every_kernel_module_imports_and_the_cpu_runs_where_numba_cuda_is_missing():
    code = ("import sys\n"
            "sys.modules['numba_cuda'] = None  # import fails, as where it is not installed\n"
            "import numpy as np\n"
            "from tinyvllm.kernels import cuda_backend, cuda_support\n"
            "from tinyvllm.kernels.gemm import cublas, naive\n"
            "from tinyvllm.kernels.argmax import argmax_cpu, argmax_cuda\n"
            "out = np.zeros(1, np.int32)\n"
            "argmax_cpu(out, np.array([[0, 16256]], np.uint16))\n"
            "assert out[0] == 1 and not cuda_support.cuda_available()\n"
            "try:\n"
            "    argmax_cuda(out, np.zeros((1, 2), np.uint16))\n"
            "except cuda_support.DeviceError as error:\n"
            "    print(error)\n")
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "numba-cuda" in run.stdout


def test_cublas_is_an_option_and_anything_else_is_refused_by_name(monkeypatch):
    from tinyvllm.errors import ConfigError
    from tinyvllm.kernels import cuda_backend
    from tinyvllm.kernels.gemm.cublas import linear_cublas_cuda

    monkeypatch.delenv("TINYVLLM_CUDA_LINEAR", raising=False)
    assert cuda_backend.chosen_operations() == dict(cuda_backend.OPS)
    monkeypatch.setenv("TINYVLLM_CUDA_LINEAR", "cublas")
    assert cuda_backend.chosen_operations()["linear"] is linear_cublas_cuda
    monkeypatch.setenv("TINYVLLM_CUDA_LINEAR", "mkl")
    with pytest.raises(ConfigError, match="TINYVLLM_CUDA_LINEAR is 'mkl'; it can be tinyvllm or cublas"):
        cuda_backend.chosen_operations()
