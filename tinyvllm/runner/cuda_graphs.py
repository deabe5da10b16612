"""Decode steps as CUDA graphs: the whole step, more than a hundred launches, replayed by one call.

A graph is a fixed list of launches with fixed addresses and sizes, so

    - inputs live at fixed places: a pinned host buffer (two in turn), one device buffer, one copy a step
    - the number of requests is rounded up to a bucket. Rows beyond the real ones have no context and no slot (their
      results are not read, and no kernel mixes rows)
    - block tables have the width of a bucket too: attention's grid is made for the longest context in it

A step can be begun while the one before it runs: input_ids that only the GPU knows yet are named by their rows in what
it has sampled last, and every graph begins by looking them up (kernels/fused/take_sampled.py).

A graph is captured when its pair of buckets first comes up: that step is launched one by one, and recorded for the
next time. What is captured is model/llama_fused.py itself; there is no second copy of the model here. A step with a
watched request has graphs of its own, which also keep its rows; they end with the memory that they keep them in.

    inputs   | sampling parameters | input_ids | positions | slot_mapping | seq_lens | watch_positions | order |
             | block_tables |

(int32, for one pair of buckets; sampling parameters as in runner/sampling.py). A step whose requests are all greedy
ends with argmax, any other one with a draw: neither looks at the parameters on the host. `order`, the rows from the
longest context to the shortest, is for attention where contexts are uneven (kernels/attention/decode_registers.py).
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.kernels.attention.decode import SPLIT
from tinyvllm.kernels.attention.decode_registers import NO_HINTS, Hints, unevenness
from tinyvllm.kernels.cuda_support import ceil_div, cuda
from tinyvllm.kernels.device_array import DeviceArray
from tinyvllm.kernels.driver import Graph, Stream
from tinyvllm.model.llama import NOT_WATCHED, Batch, Watch
from tinyvllm.runner.block_tables import BlockTables
from tinyvllm.runner.pinned import Pinned, PinnedPair
from tinyvllm.runner.sampling import NUMBERS, SamplingParameters, fill, fill_positions, parameters_in

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # numbers of requests
COLUMNS = ("input_ids", "positions", "slot_mapping", "seq_lens", "watch_positions", "order")
INT32 = np.dtype(np.int32)


class DecodeGraphs:
    """Replays steps in which every request has one token to compute and one to sample.

    runner: a ModelRunner, whose buffers and cache the graphs refer to. backend: a CUDABackend with fused operations.
    """

    def __init__(self, runner: Any, backend: Any):
        self.runner, self.backend = weakref.proxy(runner), backend  # it has these: in a circle nobody would be let go
        self.stream = backend.fused.stream
        self.block_size = runner.dims.block_size
        # Beyond the last bucket, in steps of 64: batches that large spend their time in arithmetic, not in launches.
        most = min(runner.max_num_seqs, runner.buffers.residual.shape[0])
        buckets = [*BUCKETS, *range(BUCKETS[-1] + 64, most + 64, 64)]
        self.buckets = sorted({min(bucket, most) for bucket in buckets if bucket < most + 64})
        self.max_blocks = runner.max_blocks
        size = self.buckets[-1] * (NUMBERS + len(COLUMNS) + self._width(self.max_blocks))
        self._inputs = PinnedPair(self.stream, size)
        self._tables = BlockTables(self.buckets[-1], self.max_blocks, self.block_size)
        self._inputs_on_device = backend.empty((size,), np.int32)
        self._indices = backend.empty((self.buckets[-1] + 1,), np.int32)
        backend.put(self._indices, 0, np.arange(self.buckets[-1] + 1, dtype=np.int32))
        self._graphs: dict[tuple, Any] = {}  # requests, width, greedy, watched, unevenness, invariant
        self._kept_in: tuple | None = None  # the memory that graphs of watched steps were captured for
        self._requests: list | None = None  # of the step that was begun last; whether none of them draws; their order
        self._greedy, self._order = True, np.arange(self.buckets[-1], dtype=np.int32)
        self.last_graph = None  # that was replayed, for measurements

    def can_run(self, output: SchedulerOutput) -> bool:
        return output.only_decodes and 0 < output.num_decodes <= self.buckets[-1]

    def begin(self, output: SchedulerOutput, watch: Watch = NOT_WATCHED) -> Callable[[], list[int]]:
        """Start the step; returns what waits for it and gives a token for each of output.requests.

        watch: what to keep of the step, its positions on the host.
        """
        cuda.current_context()
        count = len(output.requests)
        bucket = self.buckets[bisect_left(self.buckets, count)]
        longest = int(output.starts.max()) + 1
        width = self._width(ceil_div(longest, self.block_size))
        uneven = unevenness(longest, int(output.starts.sum()) + count, count, self.runner.dims.num_kv_heads,
                            self.backend.fused.num_multiprocessors)
        if output.requests is not self._requests:
            self._greedy = not any(request.params.temperature for request in output.requests)
            self._order[:count] = np.argsort(-output.starts, kind="stable")  # they all grow alike: it stays
            self._order[count:] = range(count, len(self._order))
            self._requests = output.requests
        greedy, watched = self._greedy, self._prepare_to_keep(watch)
        inputs = self._inputs.take()
        used = self._fill(inputs, output, watch, bucket, width, greedy)
        self.stream.copy_to_device(self._inputs_on_device.address, inputs.address, 4 * used)
        inputs.copying()

        def launch() -> None:
            batch, order = self._batch(bucket, width, watch)
            fused.hints = Hints(order if uneven else None, uneven == 2)
            try:
                self.backend.take_sampled(batch.input_ids, self.runner.token_ids)
                compute(self.runner, self.backend, batch,
                        None if greedy else parameters_in(self._inputs_on_device, bucket))
            finally:
                fused.hints = NO_HINTS

        fused = self.backend.fused
        key = bucket, width, greedy, watched, uneven, fused.batch_invariant
        self.last_graph = replay(self._graphs, key, self.stream, launch) or self.last_graph
        download = self.backend.download_later(self.runner.token_ids[:count])
        return lambda: download().tolist()

    # ---- details ----

    def _width(self, blocks: int) -> int:
        """Columns of the block tables: room for a power of two of attention's parts."""
        parts = ceil_div(blocks * self.block_size, SPLIT)
        return ceil_div((1 << (parts - 1).bit_length()) * SPLIT, self.block_size)

    def _prepare_to_keep(self, watch: Watch) -> bool:
        """Whether a step is watched; graphs that would keep its rows in other memory than its own are let go."""
        if not watch.positions.shape[0]:
            return False
        kept_in = watch.queries.address, watch.residual.address, watch.residual.shape
        if kept_in != self._kept_in:
            self._kept_in = kept_in
            self._graphs = {key: graph for key, graph in self._graphs.items() if not key[3]}
        return True

    def _fill(self, inputs: Pinned, output: SchedulerOutput, watch: Watch, bucket: int, width: int,
              greedy: bool) -> int:
        """Write the step's inputs into a pinned buffer; returns how many numbers.

        Of the buffer: shape is the pair of buckets that it is laid out for, parts are its arrays then, requests are
        whose sampling parameters it holds.
        """
        count, starts = len(output.requests), output.starts
        first_table = (NUMBERS + len(COLUMNS)) * bucket
        if inputs.shape != (bucket, width):
            columns = inputs.array[NUMBERS * bucket:first_table].reshape(len(COLUMNS), bucket)
            tables = inputs.array[first_table:first_table + bucket * width].reshape(bucket, width)
            columns[:] = 0
            tables[:] = 0  # also where no table reaches: whatever is read of them is a block
            inputs.parts, inputs.requests = (columns, tables, parameters_in(inputs.array, bucket)), []
            inputs.shape = bucket, width
        columns, tables, parameters = inputs.parts
        next_starts = starts + np.int32(1)
        columns[0, :count] = self.runner.input_ids(output)
        columns[1, :count] = starts
        columns[2, :count] = self._tables.slots(output.block_ids, starts)
        columns[3, :count] = next_starts
        columns[2, count:], columns[3, count:] = -1, 0  # rows that are not there: no slot, no context
        if watch.positions.shape[0]:
            columns[4, :count], columns[4, count:] = watch.positions, -1
        columns[5] = self._order[:bucket]
        if not greedy:
            if output.requests == inputs.requests:
                fill_positions(parameters, next_starts)
            else:
                inputs.requests = []
                fill(parameters, output.requests, next_starts)
                inputs.requests = output.requests
        filled = min(width, self._tables.array.shape[1])
        tables[:count, :filled] = self._tables.array[:count, :filled]
        return first_table + count * width

    def _batch(self, bucket: int, width: int, watch: Watch) -> tuple[Batch, DeviceArray]:
        """The step's inputs on the device, and their order."""
        inputs = self._inputs_on_device
        address = inputs.address + 4 * NUMBERS * bucket

        def part(offset: int, *shape: int) -> DeviceArray:
            return DeviceArray(address + 4 * offset, shape, INT32, inputs)

        columns = {name: part(i * bucket, bucket) for i, name in enumerate(COLUMNS)}
        positions, order = columns.pop("watch_positions"), columns.pop("order")
        if watch.positions.shape[0]:
            watch = watch._replace(positions=positions)
        return Batch(**columns, block_tables=part(len(COLUMNS) * bucket, bucket, width),
                     query_start_loc=self._indices[:bucket + 1], logits_indices=self._indices[:bucket],
                     num_decodes=bucket, watch=watch), order


def compute(runner: Any, backend: Any, batch: Batch, parameters: SamplingParameters | None) -> None:
    """A step's forward pass and, from its logits, tokens for the first rows of runner.token_ids.

    parameters: of these rows, on the device; None: they are all greedy.
    """
    backend.forward(runner.weights, runner.kv_cache, batch, runner.buffers, runner.dims)
    count = batch.logits_indices.shape[0]
    token_ids, logits = runner.token_ids[:count], runner.buffers.logits[:count]
    if parameters is None:
        backend.argmax(token_ids, logits)
    else:
        backend.sample(token_ids, logits, *parameters)


def replay(graphs: dict, key: tuple, stream: Stream, launch: Callable[[], None]) -> Graph | None:
    """Replay graphs[key] and return it; or else launch, capture that for the next time, and return None."""
    graph = graphs.get(key)
    if graph is not None:
        graph.launch(stream)
    else:
        launch()
        with stream.capture() as captured:
            launch()
        graphs[key] = captured.graph
    return graph
