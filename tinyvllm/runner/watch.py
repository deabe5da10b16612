"""Watching one request: what its tokens look like on their way through the layers, kept for who wants to see.

Attention forgets a query as soon as it is answered, and the residual stream of a step is overwritten by the next.
While a request is watched, the forward pass copies both aside (kernels/keep_rows.py), at the token's position:

    position             0   1   2   3   4   5   6   7
    prefix cache hit     #   #   #   #                     never computed here: nothing kept
    computed, watched                    o   o   o   .     kept; 7 comes with the next step

The keys need no keeping: they are in the paged cache. RequestWatch remembers the request's block table, also after
the request has ended, and which of its blocks somebody else has written into since.
"""

import numpy as np

from tinyvllm.engine.request import Request
from tinyvllm.engine.scheduler import ScheduledRequest, SchedulerOutput
from tinyvllm.model.llama import NOT_WATCHED, Dims, Watch
from tinyvllm.runner.backend import Backend


class RequestWatch:
    """Keeps query vectors and residual stream of the tokens of request `request_id` below position max_tokens.

    A ModelRunner calls `enter` before a step and `leave` after it; another may be entered in between. Its device arrays
    stay where they are: graphs refer to them. Raises OutOfDeviceMemoryError when made.
    """

    def __init__(self, request_id: str, max_tokens: int, dims: Dims, hidden_size: int, backend: Backend):
        self.request_id, self.max_tokens, self.block_size = request_id, max_tokens, dims.block_size
        layers, width = dims.num_layers, dims.num_heads * dims.head_dim
        self.queries = backend.empty((layers, max_tokens, width), np.uint16)
        self.residual = backend.empty((layers + 1, max_tokens, hidden_size), np.uint16)
        self._begin(None)

    def _begin(self, request: Request | None) -> None:
        self.request = request
        self.is_kept = np.zeros(self.max_tokens, bool)
        self.context = 0  # tokens whose keys and values are in the blocks
        self.block_ids: list[int] = []
        self._block_number: dict[int, int] = {}  # block_id -> its number in the request
        self.overwritten: dict[int, str] = {}  # number of a block -> the request that has written into it since
        self.step: tuple[int, int] | None = None  # first and last + 1 of its positions in the step entered last

    def enter(self, output: SchedulerOutput) -> Watch:
        """Which rows of a step to keep, and where; NOT_WATCHED if none. Its `positions` are on the host."""
        row, self.step = 0, None
        for scheduled in output.scheduled:
            if scheduled.request.request_id == self.request_id:
                break
            row += scheduled.num_scheduled_tokens
        else:  # whoever is computed holds its blocks: they can be written into only while it is not
            if self.block_ids:
                for scheduled in output.scheduled:
                    self._note_overwritten(scheduled)
            return NOT_WATCHED
        if scheduled.request is not self.request:  # the first time, or another request that got the same name
            self._begin(scheduled.request)
        if self.block_ids != scheduled.block_ids:  # after a preemption they are other ones
            self.block_ids = list(scheduled.block_ids)
            self._block_number = {block_id: number for number, block_id in enumerate(self.block_ids)}
        self.overwritten = {}
        self.context = start = scheduled.start
        self.step = start, start + scheduled.num_scheduled_tokens
        num_kept = min(self.step[1], self.max_tokens) - start
        if num_kept < 1:
            return NOT_WATCHED
        positions = np.full(output.total_num_scheduled_tokens, -1, np.int32)
        if num_kept == 1:
            positions[row] = start
        else:
            positions[row:row + num_kept] = np.arange(start, start + num_kept)
        return Watch(self.queries, self.residual, positions)

    def leave(self, request: Request | None, step: tuple[int, int] | None) -> None:
        """A step has run: what it computed is there. request, step: what they were when it was entered.

        Of a request that had ended before, because its last token ended it while this step was under way, nothing is
        kept: without a step ahead there would be nothing.
        """
        if step is not None and request is self.request and not request.status.is_finished:
            first, self.context = step
            self.is_kept[first:self.context] = True

    def _note_overwritten(self, scheduled: ScheduledRequest) -> None:
        last = scheduled.start + scheduled.num_scheduled_tokens - 1
        for block_id in scheduled.block_ids[scheduled.start // self.block_size:last // self.block_size + 1]:
            number = self._block_number.get(block_id)
            if number is not None:
                self.overwritten[number] = scheduled.request.request_id
