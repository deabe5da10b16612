"""Who computes how many tokens in the next step.

One budget of tokens a step (max_num_batched_tokens) is handed out: first to running requests, in order of arrival,
then to waiting ones, as far as budget, seats (max_num_seqs) and free blocks go. A request takes what it lacks
(num_tokens - num_computed_tokens): one token when it is generating, many when its prompt is new; a prompt larger
than what is left of the budget takes a chunk and goes on next step, beside everybody's decoding.

When a running request finds no free block, the one admitted last gives all of its own back and waits at the front
of the queue; its tokens are recomputed later (and its finished prefix blocks may well still be cached).
"""

import time
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, repeat

import numpy as np

from tinyvllm.engine.events import EventLog
from tinyvllm.engine.kv_cache_manager import KVCacheManager
from tinyvllm.engine.request import Request, RequestStatus


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step."""

    request: Request
    num_scheduled_tokens: int
    start: int  # position of the first of them: num_computed_tokens before the step
    block_ids: list[int]
    sample: bool  # the last of them is the request's last token: its logits choose the next one


@dataclass(eq=False)
class SchedulerOutput:
    """One step's batch, column by column: row i of each is one request's share. Requests with a single token to compute
    come first (num_decodes of them). The columns of a step are never changed, and steps may share them.
    """

    requests: list[Request] = field(default_factory=list)
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # position of the first token computed
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # how many are
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # see ScheduledRequest.sample
    block_ids: list[list[int]] = field(default_factory=list)  # the manager's own lists, which grow
    num_decodes: int = 0
    num_samples: int = 0
    total_num_scheduled_tokens: int = 0
    preempted: list[Request] = field(default_factory=list)
    is_continued: bool = False  # every row computes what the same row of the step before, still under way, samples
    room: int = 0  # tokens that every request may still get after the one that it gets in this step
    num_taken_in: int = 0  # rows, by Scheduler.update

    @property
    def only_decodes(self) -> bool:
        """Whether every row computes one token and samples the next one."""
        return self.num_decodes == self.num_samples == len(self.requests)

    @cached_property
    def scheduled(self) -> list[ScheduledRequest]:
        """The same row by row, for who looks at single ones."""
        return list(map(ScheduledRequest, self.requests, self.counts.tolist(), self.starts.tolist(), self.block_ids,
                        self.samples.tolist()))


class Scheduler:
    """Queues, admission and preemption. It knows tokens by count only: no kernels, no text.

    policy "continuous": admit whenever there is room. "static": the way batches were served before continuous
    batching, kept for comparison. When nobody runs any more, those who wait now and find a seat are the next batch; it
    comes in as the token budget allows, and nobody else does until all of it has ended.
    use_kv_cache=False: forget what was computed after every sampled token, so that each step recomputes the whole
    sequence; kept for the lesson on why a cache exists.
    """

    def __init__(self, kv_cache_manager: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int,
                 policy: str = "continuous", use_kv_cache: bool = True):
        self.events: EventLog | None = None  # set by LLMEngine.listen
        self.kv_cache_manager = kv_cache_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.policy = policy
        self.use_kv_cache = use_kv_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self._last: SchedulerOutput | None = None  # what was scheduled last, if the next step may have the same rows
        self._batch_left = 0  # policy "static": so many of the waiting ones still belong to the batch
        self.num_preemptions = 0

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> SchedulerOutput:
        """Hand out one step's token budget. Allocates blocks; computes nothing.

        A step may still be under way (see `advance`): what it samples counts as tokens that are there.
        """
        return self._same_rows_again() or self._hand_out()

    def _same_rows_again(self) -> SchedulerOutput | None:
        """What `_hand_out` would come to where everybody who runs was in the step before, got a token there and goes on
        for another one, and nobody can join them: most steps. None where that is not so."""
        last, count, block_size = self._last, len(self.running), self.kv_cache_manager.block_size
        if (last is None or last.room < 1 or last.requests != self.running or count > self.max_num_batched_tokens
                or self.waiting and count < self.max_num_seqs):
            return None
        starts = last.starts + np.int32(1)
        for row in (starts % block_size == 0).nonzero()[0].tolist():
            if self.kv_cache_manager.allocate_slots(self.running[row], 1) is None:
                return None  # somebody has to give way
        return SchedulerOutput(last.requests, starts, last.counts, last.samples, last.block_ids, count, count, count,
                               is_continued=last.num_taken_in == 0, room=last.room - 1)

    def _hand_out(self) -> SchedulerOutput:
        output = SchedulerOutput()
        shares: list[tuple[Request, int]] = []  # in order of admission
        budget = self.max_num_batched_tokens
        manager, block_ids = self.kv_cache_manager, self.kv_cache_manager.req_to_block_ids

        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_tokens = len(request.token_ids) + request.num_pending
            if request.num_pending and num_tokens >= request.max_len:  # the step under way gives it its last token
                index += 1
                continue
            num_new = num_tokens - request.num_computed_tokens
            if num_new == 0:  # an interrupt came before its token was appended
                request.num_computed_tokens -= 1
                num_new = 1
            if num_new > budget:
                num_new = budget
            held = len(block_ids[request.request_id]) * manager.block_size
            while request.num_computed_tokens + num_new > held and manager.allocate_slots(request, num_new) is None:
                victim = self.running.pop()  # admitted last; not scheduled yet, since we walk in order of admission
                self._preempt(victim, output)
                if victim is request:
                    break
            else:
                shares.append((request, num_new))
                budget -= num_new
                index += 1

        if not self.running:
            self._batch_left = min(len(self.waiting), self.max_num_seqs)
        if output.preempted:  # the batch is what fits
            self._batch_left = 0
        is_static = self.policy == "static"
        while (self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not output.preempted
               and (self._batch_left > 0 or not is_static)):
            request = self.waiting[0]
            computed_blocks = manager.get_computed_blocks(request)
            num_cached = len(computed_blocks) * manager.block_size
            num_new = min(request.num_tokens - num_cached, budget)
            # Room for its first chunk is not enough: it would soon be preempted, and what it computed lost.
            if self.running and not manager.has_room_for(request, computed_blocks):
                self._batch_left = 0
                break
            if manager.allocate_slots(request, num_new, computed_blocks) is None:
                break
            if manager.enable_caching:
                manager.record_lookup(request.num_tokens, num_cached)
            self.waiting.popleft()
            request.num_computed_tokens = num_cached
            request.status = RequestStatus.RUNNING
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = request.metrics.num_cached_tokens = num_cached
                request.metrics.first_scheduled_time = time.perf_counter()
            self.running.append(request)
            self._batch_left -= 1
            shares.append((request, num_new))
            budget -= num_new
            if self.events is not None:
                self.events.emit("request_scheduled", request.request_id, num_cached, request.metrics.num_preemptions)

        rows = [share for share in shares if share[1] == 1]
        output.num_decodes = len(rows)
        rows += [share for share in shares if share[1] != 1]
        requests = output.requests = [request for request, _ in rows]
        starts = [request.num_computed_tokens for request in requests]
        missing = [len(request.token_ids) + request.num_pending - start for request, start in zip(requests, starts)]
        output.starts, output.counts = np.array(starts, np.int32), np.array([count for _, count in rows], np.int32)
        output.samples = output.counts == np.array(missing, np.int32)
        output.num_samples = int(output.samples.sum())
        output.block_ids = [block_ids[request.request_id] for request in requests]
        output.total_num_scheduled_tokens = self.max_num_batched_tokens - budget
        output.room = min([request.max_len - start - 2 for request, start in zip(requests, starts)], default=0)
        return output

    def advance(self, output: SchedulerOutput) -> None:
        """Take a step as computed: it is under way, and the next one can be scheduled."""
        self._last = None
        for request, count, sample in zip(output.requests, output.counts.tolist(), output.samples.tolist()):
            request.num_computed_tokens += count
            request.num_pending += sample
        if output.only_decodes and self.use_kv_cache:
            self._last = output

    def take_back(self, output: SchedulerOutput) -> None:
        """A step that was under way came to nothing: it is to be scheduled again. The latest one first."""
        self._last = None
        for request, count, sample in zip(output.requests, output.counts.tolist(), output.samples.tolist()):
            request.num_pending -= sample
            if request.status is RequestStatus.RUNNING:
                request.num_computed_tokens -= count

    def update(self, output: SchedulerOutput, sampled_token_ids: dict[str, int]) -> None:
        """Take in a step that ran: publish full blocks, append tokens.

        sampled_token_ids: request_id -> token, for every request that samples. A request that has ended since the step
        began gets none; one that was preempted since gets its token and computes it later.
        """
        last, self._last = self._last, None  # after an interrupt the rows do not stand alike any more
        running, manager = RequestStatus.RUNNING, self.kv_cache_manager
        publish = repeat(0)  # so many computed tokens' blocks, where one more has become full
        if manager.enable_caching:
            ends = output.starts + output.counts
            publish = np.where(ends % manager.block_size < output.counts, ends, 0).tolist()
        rows = zip(output.requests, publish, output.samples.tolist())
        for request, num_computed, sample in islice(rows, output.num_taken_in, None):  # the rest, after an interrupt
            output.num_taken_in += 1
            request.num_pending -= sample
            if request.status is running:
                if num_computed:
                    manager.cache_full_blocks(request, num_computed)
            elif request.status.is_finished:
                continue
            if sample:
                request.append_output(sampled_token_ids[request.request_id])
                if not self.use_kv_cache:
                    request.num_computed_tokens = 0
        self._last = last

    def finish(self, request: Request, status: RequestStatus | None = None) -> None:
        """Remove a request from wherever it is and free its blocks. status: set it too, if it has not ended yet."""
        if not request.status.is_finished and status is not None:
            request.status = status
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.kv_cache_manager.free(request)

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        self.kv_cache_manager.free(request)
        if self.events is not None:
            self.events.emit("request_preempted", request.request_id, request.num_computed_tokens)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        output.preempted.append(request)
