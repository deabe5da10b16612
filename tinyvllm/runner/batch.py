"""From a scheduler's decision to the arrays that the kernels read.

    scheduled      A: 1 token at position 6     B: 3 tokens at positions 4, 5, 6
    input_ids        [ a6 | b4 b5 b6 ]
    positions        [  6 |  4  5  6 ]
    query_start_loc  [ 0,   1,         4 ]           where each request's rows begin
    seq_lens         [  7,  7 ]                      context after the step
    slot_mapping     [ block(A, 6) ... ]             block_id * block_size + offset: where K and V go
    logits_indices   [ 0, 3 ]                        each request's last row, if a token is to be sampled

All of it is int32 and lies in one buffer, so that one copy takes it to the device.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.model.llama import NOT_WATCHED, Batch, Watch


class Staging(Protocol):
    """Host memory that steps are filled into. Where copies run later, there is more than one, to be taken in turn."""

    array: np.ndarray  # int32

    def take(self) -> "Staging":
        """The one to fill now: nobody reads from it any more."""

    def copying(self) -> None:
        """Its copy to the device has been asked for."""


class OneStaging:
    """For devices whose copies are over at once."""

    def __init__(self, count: int):
        self.array = np.zeros(count, np.int32)

    def take(self) -> "OneStaging":
        return self

    def copying(self) -> None:
        pass


class BatchBuilder:
    """Fills a staging buffer, allocated once for the largest batch, and hands it to the device.

    allocate, upload: the backend's. staging(count): room for so many numbers.
    """

    def __init__(self, max_num_batched_tokens: int, max_num_seqs: int, max_blocks_per_seq: int, block_size: int,
                 allocate: Callable, upload: Callable, staging: Callable[[int], Staging] = OneStaging):
        self.block_size = block_size
        self.size = 4 * max_num_batched_tokens + max_num_seqs * (max_blocks_per_seq + 3) + 1
        self._staging, self._device = staging(self.size), allocate((self.size,), np.int32)
        self._upload = upload

    def build(self, output: SchedulerOutput, watch: Watch = NOT_WATCHED,
              decode_ids: Sequence[int] | None = None, room: tuple[int, int] | None = None) -> Batch:
        """The step's Batch, on the device.

        watch: what to keep of it, its positions on the host. decode_ids: the tokens of those that have one to compute,
        if they are to be others than the requests' own. room: (tokens, blocks a request) that the arrays are made for,
        at least what the step has; the tokens that are not there have no slot. Two steps of as many requests in the
        same room have their arrays at the same addresses.
        """
        block_size, starts, counts, num_requests = self.block_size, output.starts, output.counts, len(output.requests)
        sizes = np.fromiter(map(len, output.block_ids), np.int32, num_requests)  # of the block tables
        num_tokens, num_logits = int(counts.sum()), int(np.count_nonzero(output.samples))
        tokens_made, width = room or (num_tokens, int(sizes.max()))
        shapes = {"input_ids": (tokens_made,), "positions": (tokens_made,), "slot_mapping": (tokens_made,),
                  "block_tables": (num_requests, width), "seq_lens": (num_requests,),
                  "query_start_loc": (num_requests + 1,), "logits_indices": (num_logits,)}
        if is_watched := watch.positions.shape[0] > 0:
            shapes["watch_positions"] = watch.positions.shape
        staging = self._staging.take()
        host, used = parts(staging.array, shapes)
        for name, missing in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            host[name][num_tokens:] = missing
            host[name] = host[name][:num_tokens]
        tables, rows, positions = host["block_tables"], host["query_start_loc"], host["positions"]
        tables[:] = 0
        tables[np.arange(width) < sizes[:, None]] = list(chain.from_iterable(output.block_ids))
        host["seq_lens"][:] = starts + counts
        rows[0], rows[1:] = 0, counts.cumsum()
        host["logits_indices"][:] = rows[1:][output.samples] - 1
        request_of = np.repeat(np.arange(num_requests), counts)  # of each token
        positions[:] = np.arange(num_tokens) + (starts - rows[:-1])[request_of]
        blocks = positions // block_size
        host["slot_mapping"][:] = tables[request_of, blocks] * block_size + (positions - blocks * block_size)
        token_ids = [] if decode_ids is None else list(decode_ids)
        for request, start, count in zip(output.requests[len(token_ids):], starts[len(token_ids):].tolist(),
                                         counts[len(token_ids):].tolist()):
            token_ids += request.token_ids[start:start + count]
        host["input_ids"][:] = token_ids
        if is_watched:
            host["watch_positions"][:] = watch.positions

        uploaded = self._upload(self._device, staging.array[:used])
        staging.copying()
        device, _ = parts(uploaded, shapes)
        if is_watched:
            watch = watch._replace(positions=device.pop("watch_positions"))
        return Batch(**device, num_decodes=output.num_decodes, watch=watch)


def parts(buffer: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], int]:
    """({name: its part of a flat buffer}, elements used), one after the other."""
    found, first = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name], first = buffer[first:first + size].reshape(shape), first + size
    return found, first
