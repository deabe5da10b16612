"""Runs one scheduled step on a backend: build the batch, forward, sample. Only sampled token ids come back."""

from collections.abc import Callable, Sequence

import numpy as np

from tinyvllm.engine.request import Request
from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.llama import NOT_WATCHED, Buffers, Dims, KVCache, Watch, Weights
from tinyvllm.runner.backend import Backend
from tinyvllm.runner.batch import BatchBuilder, OneStaging
from tinyvllm.runner.sampling import SamplingInputs
from tinyvllm.runner.watch import RequestWatch


class ModelRunner:
    """Owns the device's persistent arrays: KV cache, activations of the largest batch, inputs of a step."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, *, num_blocks: int, block_size: int,
                 max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int):
        self.config = config
        self.weights = weights
        self.backend = backend
        self.dims = Dims(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
                         config.head_dim, block_size, config.head_dim ** -0.5, config.rms_norm_eps)
        # Zeroed once: kernels may read whole blocks and weigh what lies past a sequence's end with zero, and zero
        # times the NaN of uninitialised memory is NaN.
        shape = (config.num_hidden_layers, num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.kv_cache = KVCache(backend.zeros(shape, np.uint16), backend.zeros(shape, np.uint16))
        self.buffers = Buffers(**{name: backend.empty(shape, np.uint16) for name, shape in
                                  buffer_shapes(config, max_num_seqs, max_num_batched_tokens).items()})
        max_blocks = min(num_blocks, -(-max_model_len // block_size))
        self.builder = BatchBuilder(max_num_batched_tokens, max_num_seqs, max_blocks, block_size,
                                    backend.empty, backend.upload, getattr(backend, "staging", OneStaging))
        self.sampling_inputs = SamplingInputs(backend, max_num_seqs)
        self.token_ids = backend.empty((max_num_seqs,), np.int32)  # what was sampled last, on the device
        self.max_num_seqs, self.max_blocks = max_num_seqs, max_blocks
        # For who looks in between two steps (tinyvllm/probe):
        self.watch: RequestWatch | None = None  # keeps what one request's tokens look like on their way
        self.profiler = None  # has a backend's forward, argmax and sample, for the next step only, and `finish`
        self.last_sampled: list = []  # the requests whose logits are in buffers.logits, row by row
        # Launches return before the work is done: then a step can be begun before the one before it has been waited for
        # (engine/pipeline.py).
        self.runs_ahead = getattr(backend, "fused", None) is not None
        self._sampled: list = []  # the requests of the step that was begun last, as their rows in token_ids
        self._rows_before = -1 - np.arange(max_num_seqs, dtype=np.int32)  # input_ids of the same rows once more
        self._num_begun = 0
        self.eager = False  # launch the operations of model/llama.py one by one, also where there is a faster way
        self._graphs = self._prompt_graphs = None
        if hasattr(backend, "graphs"):
            self._graphs, self._prompt_graphs = backend.graphs(self)

    @property
    def begin(self) -> Callable[[SchedulerOutput], Callable[[], dict[str, int]]]:
        """What starts a step; not there where forward returns only when the work is done."""
        if getattr(self.backend, "fused", None) is None:
            raise AttributeError("this backend's steps cannot be begun and left to themselves")
        return self._begin

    def execute(self, output: SchedulerOutput) -> dict[str, int]:
        """Compute a step; returns request_id -> token for every scheduled request with `sample`."""
        return self._begin(output)()

    def _begin(self, output: SchedulerOutput) -> Callable[[], dict[str, int]]:
        """Start a step; returns what waits for it and gives execute's answer.

        Another may be begun before it is waited for, if arrays are on a GPU: what it needs of this one is taken there.
        """
        self.last_sampled = []
        self._num_begun += 1
        watch, number = self.watch, self._num_begun
        keep = NOT_WATCHED if watch is None else watch.enter(output)
        watched = None if watch is None else (watch.request, watch.step)
        requests = sampling_requests(output)
        looked_at = self.eager or self.profiler is not None
        if self._graphs is not None and not looked_at and self._graphs.can_run(output):
            finish = self._graphs.begin(output, keep)
        elif self._prompt_graphs is not None and not looked_at and self._prompt_graphs.can_run(output, keep):
            finish = self._prompt_graphs.begin(output)
        else:
            finish = self._launch(output, requests, keep)
        self._sampled = requests

        def wait() -> dict[str, int]:
            tokens = finish()
            if watch is not None:
                watch.leave(*watched)
            if number == self._num_begun:  # else the logits are already another step's
                self.last_sampled = requests
            return {request.request_id: token for request, token in zip(requests, tokens)}

        return wait

    def input_ids(self, output: SchedulerOutput) -> Sequence[int]:
        """The token that each request with one to compute has to compute; -1 - row for one that only the device knows:
        the step that was begun last has sampled it in that row."""
        if output.is_continued and output.requests is self._sampled:  # nearly always
            return self._rows_before[:output.num_decodes]
        rows: dict[str, int] | None = None
        ids = []
        for request, start in zip(output.requests[:output.num_decodes], output.starts.tolist()):
            if start < len(request.token_ids):
                ids.append(request.token_ids[start])
            else:
                if rows is None:
                    rows = {request.request_id: row for row, request in enumerate(self._sampled)}
                ids.append(-1 - rows[request.request_id])
        return ids

    def _launch(self, output: SchedulerOutput, sampled: list[Request], keep: Watch) -> Callable[[], list[int]]:
        """Start a step that is not replayed; returns what waits for what it samples: a token for each of `sampled`."""
        ids = self.input_ids(output)
        batch = self.builder.build(output, keep, ids)
        if min(ids, default=0) < 0:
            self.backend.take_sampled(batch.input_ids, self.token_ids)
        profiler, self.profiler = self.profiler, None
        compute = self.backend if profiler is None else profiler
        forward = getattr(self.backend, "eager_forward", compute.forward) if self.eager else compute.forward
        forward(self.weights, self.kv_cache, batch, self.buffers, self.dims)
        positions = (output.starts + output.counts)[output.samples]
        download = self._download(self.sample(sampled, positions, compute)) if sampled else None

        def wait() -> list[int]:
            tokens = download().tolist() if sampled else []
            if profiler is not None:
                profiler.finish(output, keep.positions)
            return tokens

        return wait

    def _download(self, token_ids) -> Callable[[], np.ndarray]:
        if hasattr(self, "begin"):
            return self.backend.download_later(token_ids)
        return lambda: self.backend.download(token_ids)

    def sample(self, sampled: list[Request], positions: np.ndarray, compute=None):
        """The next tokens of requests whose logits are the first rows of the buffer, on the device.

        positions: those that the tokens will have."""
        compute = self.backend if compute is None else compute
        num = len(sampled)
        token_ids, logits = self.token_ids[:num], self.buffers.logits[:num]
        if all(request.params.temperature == 0 for request in sampled):
            compute.argmax(token_ids, logits)
            return token_ids
        compute.sample(token_ids, logits, *self.sampling_inputs.put(sampled, positions))
        return token_ids


def sampling_requests(output: SchedulerOutput) -> list[Request]:
    """Those that get a token in a step, in its order."""
    if output.num_samples == len(output.requests):
        return output.requests
    return [request for request, sample in zip(output.requests, output.samples.tolist()) if sample]


def buffer_shapes(config: ModelConfig, max_num_seqs: int, max_num_batched_tokens: int) -> dict[str, tuple[int, int]]:
    """Shapes of the activation buffers (2 bytes an element)."""
    tokens, hidden = max_num_batched_tokens, config.hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return {"residual": (tokens, hidden), "hidden": (tokens, hidden), "qkv": (tokens, qkv),
            "attn": (tokens, config.num_attention_heads * config.head_dim),
            "gate_up": (tokens, 2 * config.intermediate_size), "act": (tokens, config.intermediate_size),
            "last": (max_num_seqs, hidden), "logits": (max_num_seqs, config.vocab_size)}
