"""The step of one short prompt as a CUDA graph, so that its first token does not wait for a hundred launches.

    launched one by one   host  build | launch launch launch ... launch |           GPU  ..k.k.k...k.k.k
    replayed              host  build | replay |                                    GPU  .kkkkkk

Where a GPU has work already, launches cost nothing: they run ahead of it. But a prompt that comes to an idle engine
finds it with nothing to do, and a layer of 32 rows takes less time to compute than to launch. Longer prompts keep the
GPU busy for longer than the host needs, and several, or one among requests that decode, are no longer one of a few
shapes: they are launched (model_runner.py).

The number of tokens is rounded up to a bucket. Tokens that are not there belong to no request: they have no slot in the
cache, attention passes them over, and no kernel mixes rows. All else that changes, the context of a prompt whose
beginning is cached already above all, is in the arrays.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.kernels.cuda_support import cuda
from tinyvllm.model.llama import Watch
from tinyvllm.runner.cuda_graphs import compute, replay

# Numbers of tokens. On an H200 the first token of 32 comes after 1.51 ms, launched 2.39; of 128 after 1.74 and 2.67.
BUCKETS = (16, 32, 48, 64, 96, 128)


class PromptGraphs:
    """Replays steps that compute the last, or only, tokens of one prompt and sample one.

    runner: a ModelRunner, whose buffers, inputs and cache the graphs refer to. backend: a CUDABackend with fused
    operations.
    """

    def __init__(self, runner: Any, backend: Any):
        self.runner, self.backend = weakref.proxy(runner), backend  # as in DecodeGraphs
        most = runner.buffers.residual.shape[0]
        self.buckets = [bucket for bucket in BUCKETS if bucket <= most]
        self.graphs: dict[tuple[int, bool, bool], Any] = {}  # tokens, greedy, batch-invariant
        self.last_graph = None  # that was replayed

    def can_run(self, output: SchedulerOutput, watch: Watch) -> bool:
        return (len(output.requests) == output.num_samples == 1 and not output.num_decodes
                and not watch.positions.shape[0] and bool(self.buckets) and output.counts[0] <= self.buckets[-1])

    def begin(self, output: SchedulerOutput) -> Callable[[], list[int]]:
        """Start the step; returns what waits for it and gives its token."""
        cuda.current_context()
        runner, request = self.runner, output.requests[0]
        bucket = self.buckets[bisect_left(self.buckets, int(output.counts[0]))]
        batch = runner.builder.build(output, room=(bucket, runner.max_blocks))
        parameters = None
        if request.params.temperature:
            parameters = runner.sampling_inputs.put([request], output.starts + output.counts)
        key = bucket, parameters is None, self.backend.fused.batch_invariant
        graph = replay(self.graphs, key, self.backend.fused.stream,
                       lambda: compute(runner, self.backend, batch, parameters))
        self.last_graph = graph or self.last_graph
        download = self.backend.download_later(runner.token_ids[:1])
        return lambda: download().tolist()
