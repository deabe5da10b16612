"""What the GPU's benchmark needs of a GPU and of torch on one, in host memory: NumPy twins, a stream, a clock.

Device memory is host memory behind DeviceArrays, so that slices and shapes are those of the real thing; a graph is the
list of calls that were made with the addresses of then.
"""

import contextlib
import time
from types import SimpleNamespace

import numpy as np

from tests.host_memory import HostMemory, view
from tinyvllm.bench.gpu_peers import TorchPeer
from tinyvllm.kernels import numpy_backend
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from tinyvllm.kernels.fused import numpy_twin

TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": [2]}


class HostStream:
    """A Stream that runs what it is given at once, or records it; `replays` counts launches of graphs."""

    def __init__(self):
        self.calls, self.replays = None, 0

    def run(self, function, arguments):
        if self.calls is None:
            function(*map(view, arguments))
        else:
            self.calls.append((function, arguments))

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def capture(self):
        self.calls = calls = []
        captured = SimpleNamespace()
        yield captured
        self.calls = None

        def launch(stream):
            stream.replays += 1
            for call in calls:
                stream.run(*call)

        captured.graph = SimpleNamespace(launch=launch, calls=calls)


class HostEvent:
    """An Event of the host's clock."""

    def record(self, stream):
        self.at = time.perf_counter()

    def milliseconds_since(self, earlier):
        return 1e3 * (self.at - earlier.at)


class HostFused:
    """FusedOperations over the NumPy twins."""

    num_multiprocessors = 4

    def __init__(self):
        self.stream = HostStream()
        operations = {**numpy_twin.OPS, "argmax": numpy_backend.OPS["argmax"]}
        for name, operation in operations.items():
            setattr(self, name, lambda *arguments, operation=operation: self.stream.run(operation, arguments))

    def _few_rows(self, x, num_outputs, norm, after):
        return "few" if x.shape[0] <= 4 else None

    def _run_few_rows(self, kernel, after, out, x, weight):
        self._linear(out, x, weight)

    def _linear(self, out, x, weight):
        def multiply(out, x, weight):
            out[...] = float32_to_bf16(bf16_to_float32(x) @ bf16_to_float32(weight).T)

        self.stream.run(multiply, (out, x, weight))


class HostBackend(HostMemory):
    """As much of a CUDABackend as single kernels need."""

    name = "cuda"

    def __init__(self):
        self.fused = HostFused()

    def linear_shape(self, num_rows, num_columns):
        return num_rows, num_columns

    def upload(self, destination, host):
        raise AssertionError("no step is run here")


class HostPeer(TorchPeer):
    """torch on the CPU."""

    device = "cpu"

    def __init__(self):
        import torch

        self.torch = torch

    def tensor(self, array):
        return self.torch.from_numpy(view(array).view(np.int16)).view(self.torch.bfloat16)

    def synchronize(self):
        pass

    def capture(self, launch):
        launch()
        return launch

    def milliseconds(self, run):
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
