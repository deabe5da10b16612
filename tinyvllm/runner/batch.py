"""From a scheduler's decision to the arrays that the kernels read.

    scheduled      A: 1 token at position 6     B: 3 tokens at positions 4, 5, 6
    input_ids        [ a6 | b4 b5 b6 ]
    positions        [  6 |  4  5  6 ]
    query_start_loc  [ 0,   1,         4 ]           where each request's rows begin
    seq_lens         [  7,  7 ]                      context after the step
    slot_mapping     [ block(A, 6) ... ]             block_id * block_size + offset: where K and V go
    logits_indices   [ 0, 3 ]                        each request's last row, if a token is to be sampled
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.model.llama import NOT_WATCHED, Batch, Watch


class BatchBuilder:
    """Fills staging arrays, allocated once for the largest batch, and hands them to the device."""

    def __init__(self, max_num_batched_tokens: int, max_num_seqs: int, max_blocks_per_seq: int, block_size: int,
                 allocate: Callable, upload: Callable):
        self.block_size = block_size
        sizes = {"input_ids": max_num_batched_tokens, "positions": max_num_batched_tokens,
                 "slot_mapping": max_num_batched_tokens, "block_tables": max_num_seqs * max_blocks_per_seq,
                 "seq_lens": max_num_seqs, "query_start_loc": max_num_seqs + 1, "logits_indices": max_num_seqs,
                 "watch_positions": max_num_batched_tokens}
        self.host = {name: np.zeros(size, np.int32) for name, size in sizes.items()}
        self.device = {name: allocate((size,), np.int32) for name, size in sizes.items()}
        self._upload = upload

    def build(self, output: SchedulerOutput, watch: Watch = NOT_WATCHED,
              decode_ids: Sequence[int] | None = None) -> Batch:
        """The step's Batch, on the device.

        watch: what to keep of it, its positions on the host. decode_ids: the tokens of those that have one to compute,
        if they are to be others than the requests' own.
        """
        host = self.host
        block_size = self.block_size
        width = max(len(s.block_ids) for s in output.scheduled)
        num_requests = len(output.scheduled)
        tables = host["block_tables"][:num_requests * width].reshape(num_requests, width)
        tables[:] = 0
        row = num_logits = 0
        for i, scheduled in enumerate(output.scheduled):
            start, count = scheduled.start, scheduled.num_scheduled_tokens
            stop = start + count
            tables[i, :len(scheduled.block_ids)] = scheduled.block_ids
            host["seq_lens"][i] = stop
            host["query_start_loc"][i] = row
            if count == 1:
                host["input_ids"][row] = scheduled.request.token_ids[start] if decode_ids is None else decode_ids[i]
                host["positions"][row] = start
                host["slot_mapping"][row] = scheduled.block_ids[start // block_size] * block_size + start % block_size
            else:
                positions = np.arange(start, stop, dtype=np.int32)
                host["input_ids"][row:row + count] = scheduled.request.token_ids[start:stop]
                host["positions"][row:row + count] = positions
                host["slot_mapping"][row:row + count] = (tables[i, positions // block_size] * block_size
                                                         + positions % block_size)
            row += count
            if scheduled.sample:
                host["logits_indices"][num_logits] = row - 1
                num_logits += 1
        host["query_start_loc"][num_requests] = row

        def device(name: str, count: int) -> Any:
            return self._upload(self.device[name], host[name][:count])

        return Batch(input_ids=device("input_ids", row), positions=device("positions", row),
                     slot_mapping=device("slot_mapping", row),
                     block_tables=self._upload(self.device["block_tables"], tables),
                     seq_lens=device("seq_lens", num_requests),
                     query_start_loc=device("query_start_loc", num_requests + 1),
                     logits_indices=device("logits_indices", num_logits), num_decodes=output.num_decodes,
                     watch=self._upload_watch(watch))

    def _upload_watch(self, watch: Watch) -> Watch:
        if not watch.positions.shape[0]:
            return watch
        return watch._replace(positions=self._upload(self.device["watch_positions"], watch.positions))
