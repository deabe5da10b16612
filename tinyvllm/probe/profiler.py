"""A step with a clock around each operation.

StepProfiler takes a backend's place for one step of a ModelRunner. The operations are those of every step, called one
by one, so the tokens are the same; the step only takes longer. Each part runs without the clock first: that has
everything compiled, loaded and in place, and does no harm, because a forward pass that runs twice writes the same
keys, values and logits.

On the CPU the clock is time.perf_counter_ns, read before and after each call, less what calling a kernel from Python
costs (a third of a microsecond: as much as a small model's smallest operations take). On a GPU it is CUDA events
between the operations. Kernels are launched from Python more slowly than small ones run, and a GPU that waits for its
next kernel would have the wait counted as work; so it is first given something to spin on until all are queued up.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinyvllm.bench.environment import processor_name
from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.kernels.jit import cpu_jit
from tinyvllm.model import llama
from tinyvllm.model.config import ModelConfig
from tinyvllm.probe.cost import StepShape, step_costs
from tinyvllm.runner.backend import Backend


class StepProfile(NamedTuple):
    """Where a step's time went: `a` and `b` of the event "step_profiled"."""

    operations: list[list]  # [name, layer or -1, nanoseconds, bytes, flops] each, in order (see cost.py)
    about: dict[str, Any]  # "device", "clock", and the batch: "tokens", "requests"


class StepProfiler:
    """Runs one step's forward pass and choice of tokens with a clock; then calls on_done(StepProfile)."""

    def __init__(self, config: ModelConfig, backend: Backend, on_done: Callable[[StepProfile], None]):
        self._config, self._backend, self._on_done = config, backend, on_done
        self._clock = _CudaClock() if backend.name == "cuda" else _HostClock()
        self._greedy = True

    def forward(self, w, kv, batch, buf, dims) -> None:
        operations = self._backend.operations
        timed = {name: self._timed(name) for name in llama.OP_NAMES}
        if not batch.watch.positions.shape[0]:  # called, and nothing to do
            timed["keep_rows"] = operations["keep_rows"]
        with self._backend.exclusive():
            self._clock.prepare(lambda: llama.bind(operations)(w, kv, batch, buf, dims))
            llama.bind(timed)(w, kv, batch, buf, dims)

    def argmax(self, *arguments) -> None:
        self._choose("argmax", arguments)

    def sample(self, *arguments) -> None:
        self._greedy = False
        self._choose("sample", arguments)

    def _choose(self, name: str, arguments: tuple) -> None:
        with self._backend.exclusive():
            self._clock.prepare(lambda: self._backend.operations[name](*arguments))
            self._timed(name)(*arguments)

    def finish(self, output: SchedulerOutput, kept: np.ndarray) -> None:
        """The step has run: read the clock, put times and costs side by side. kept: where the step's tokens went that
        the watch kept, -1 for others; empty if nobody watched."""
        rows = tuple((s.num_scheduled_tokens, s.start + s.num_scheduled_tokens) for s in output.scheduled)
        num_kept = int((kept >= 0).sum()) if kept.size else None
        shape = StepShape(rows, sum(s.sample for s in output.scheduled), self._greedy, num_kept)
        times, costs = self._clock.read(), step_costs(self._config, shape)
        if [name for name, _ in times] != [cost.operation for cost in costs]:
            raise RuntimeError("probe/cost.py lists other operations than the step has run: model/llama.py has changed")
        operations = [[cost.name, cost.layer, ns, cost.bytes, cost.flops] for cost, (_, ns) in zip(costs, times)]
        self._on_done(StepProfile(operations, {"device": self._clock.device, "clock": self._clock.name,
                                               "tokens": shape.num_tokens, "requests": len(rows)}))

    def _timed(self, name: str) -> Callable:
        operation, clock = self._backend.operations[name], self._clock

        def timed(*arguments):
            clock.time(name, operation, arguments)

        return timed


@cpu_jit
def _nothing(*arguments):
    """Takes the time that it takes to call a kernel with these arguments."""


class _HostClock:
    """time.perf_counter_ns around each call."""

    name = "time.perf_counter_ns"

    def __init__(self):
        self.device = processor_name()
        self._times: list[tuple[str, int]] = []

    def prepare(self, rehearse: Callable[[], None]) -> None:
        rehearse()

    def time(self, name: str, operation: Callable, arguments: tuple) -> None:
        calling = min(_took(_nothing, arguments) for _ in range(3))
        self._times.append((name, max(0, _took(operation, arguments) - calling)))

    def read(self) -> list[tuple[str, int]]:
        return self._times


def _took(function: Callable, arguments: tuple) -> int:
    start = time.perf_counter_ns()
    function(*arguments)
    return time.perf_counter_ns() - start


class _CudaClock:
    """CUDA events before and after each operation, while the host runs ahead of the GPU."""

    name = "CUDA events"

    def __init__(self):
        from tinyvllm.kernels.cuda_support import cuda, device_name  # here: the CPU needs none of it

        self._cuda, self.device = cuda, device_name()
        self._events: list[tuple[str, Any, Any]] = []

    def prepare(self, rehearse: Callable[[], None]) -> None:
        """Twice: the first time compiles, the second tells how long the host takes to queue it all up."""
        from tinyvllm.kernels.spin import spin_cuda

        rehearse()
        start = time.perf_counter()
        rehearse()
        queueing = time.perf_counter() - start
        self._cuda.synchronize()
        spin_cuda(min(0.5, 0.002 + 3 * queueing))  # recording events takes the host a little longer

    def time(self, name: str, operation: Callable, arguments: tuple) -> None:
        start, end = self._cuda.event(), self._cuda.event()
        start.record()
        operation(*arguments)
        end.record()
        self._events.append((name, start, end))

    def read(self) -> list[tuple[str, int]]:
        self._cuda.synchronize()
        return [(name, round(1e6 * start.elapsed_time(end))) for name, start, end in self._events]
