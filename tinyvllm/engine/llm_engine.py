"""The engine: requests in, tokens and text out, one step at a time.

    step():   schedule -> run -> sample -> update -> emit

The engine owns policy and bookkeeping only. Numbers are made by a runner (engine/pipeline.py says what it must do) and
text by a tokenizer; tests put a toy in the place of either.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from tinyvllm.engine.event_rows import Rows
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.kv_cache_manager import KVCacheManager
from tinyvllm.engine.pipeline import Pipeline, Runner
from tinyvllm.engine.prompts import check_id, check_prompt, check_vocabulary, encode_prompt
from tinyvllm.engine.request import Request, RequestStatus
from tinyvllm.engine.scheduler import Scheduler
from tinyvllm.engine.snapshot import emit_snapshot
from tinyvllm.errors import RequestError
from tinyvllm.outputs import EngineStats, RequestOutput
from tinyvllm.sampling_params import SamplingParams


class LLMEngine:
    """Continuous batching over a runner.

    runner: computes steps. tokenizer: encodes prompts and decodes outputs, or None for token ids only.
    vocab_size: ids outside it are refused. eos_token_ids: end a request unless it ignores them.
    The other arguments are EngineConfig's, already resolved to numbers.
    """

    def __init__(self, runner: Runner, tokenizer: Any | None = None, *, vocab_size: int, eos_token_ids: Sequence[int],
                 num_blocks: int, block_size: int, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int,
                 enable_prefix_caching: bool = True, scheduling_policy: str = "continuous", use_kv_cache: bool = True,
                 seed: int = 0):
        self.events: EventLog | None = None  # see listen()
        self.runner = runner
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self.kv_cache_manager = KVCacheManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.kv_cache_manager, max_num_seqs=max_num_seqs,
                                   max_num_batched_tokens=max_num_batched_tokens, policy=scheduling_policy,
                                   use_kv_cache=use_kv_cache)
        self.pipeline = Pipeline(runner, self.scheduler)
        self.seed = seed
        self._request_counter = itertools.count()
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[str, Any] = {}
        self._pending: list[RequestOutput] = []  # made, but not handed to anybody yet
        self._all_emitted = True  # no running request has tokens that no output has reported yet
        self._new_tokens: list[tuple] = []  # (request_id, token id, text) not told to the listener yet
        self.num_finished = 0

    # ---- requests in ----

    def add_request(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt: text, a list of token ids, or {"prompt_token_ids": [...]}. Returns the request's id.

        Raises RequestError, in which case nothing has changed for anybody else.
        """
        return self.submit(self.prepare(prompt, params, request_id))

    def prepare(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> Request:
        """Check and encode a prompt, queueing nothing: any thread may call this. Raises RequestError."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling parameters must be a SamplingParams, got {type(params).__name__}")
        check_id(request_id)
        check_vocabulary("stop token id", params.stop_token_ids, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this engine has none: use stop_token_ids")
        text, token_ids = encode_prompt(prompt, self.tokenizer)
        self._check_prompt(token_ids)
        number = next(self._request_counter)
        while request_id is None and str(number) in self._requests:  # somebody chose that number for a name
            number = next(self._request_counter)
        seed = _request_seed(self.seed, number) if params.seed is None else params.seed % 2**64
        return Request(str(number) if request_id is None else request_id, token_ids, params, prompt=text,
                       eos_token_ids=self.eos_token_ids, max_len=self._max_len(), seed=seed)

    def submit(self, request: Request) -> str:
        """Queue a prepared request; returns its id. Only the thread that steps the engine may call this."""
        request_id = request.request_id
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use: choose another, or leave it out")
        if request.max_len > self._max_len():  # it was prepared before a reset that left less room
            self._check_prompt(request.token_ids)
            request.max_len = self._max_len()
        self._requests[request_id] = request
        if self.tokenizer is not None:
            self._detokenizers[request_id] = self.tokenizer.incremental_detokenizer(
                request.params.stop, prompt_token_ids=request.token_ids)
        self.scheduler.add_request(request)
        if self.events is not None:
            prompt_token_ids = request.token_ids[:request.num_prompt_tokens]
            self.events.emit("request_added", request_id, prompt_token_ids, request.max_len)
        return request_id

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests now, wherever they are; the next step() reports them as "abort". Unknown ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            request = self._requests.get(request_id)
            if request is not None:
                request.status = RequestStatus.FINISHED_ABORTED
                self._emit(request, time.perf_counter())

    def take_pending(self) -> list[RequestOutput]:
        """Outputs that the next step() would report, those of aborted requests above all, handed over now instead."""
        outputs, self._pending = self._pending, []
        return outputs

    def has_request(self, request_id: str) -> bool:
        """Whether a request is waiting, running, or has an output that nobody has taken yet."""
        return request_id in self._requests or any(output.request_id == request_id for output in self._pending)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests() or bool(self.pipeline.steps or self._pending)

    def listen(self, events: EventLog | None) -> None:
        """Emit events into this log from now on, beginning with what is there already; None stops it."""
        self.settle()  # also what an interrupted step has left: whoever listens now learns it with the rest
        is_told_again = events is not None and events is self.events
        for part in (self, self.pipeline, self.scheduler, self.kv_cache_manager, self.kv_cache_manager.pool):
            part.events = events
        if events is not None:
            emit_snapshot(self, events, is_told_again)

    def emitted_text(self, request_id: str) -> str:
        """The text of an unfinished request as far as it was told; "" without a tokenizer."""
        return self._detokenizers[request_id].text if request_id in self._detokenizers else ""

    # ---- one step ----

    def step(self, ahead: bool = False) -> list[RequestOutput]:
        """Schedule, run, update, emit; returns an output for every request that got a token or ended.

        ahead: give the runner the step after this one too, if it can be given it (see Runner), for speed. Without it
        all that was begun has ended afterwards, so that one can look; settle() ends it at any time.

        If the runner raises, the error goes to the caller and the books stay balanced: no token was counted as
        computed, so the next step() tries the same work again. Outputs that were made before an error, or before an
        interrupt from the keyboard, come with the next step.
        """
        pipeline = self.pipeline
        self._emit_new_tokens()  # none, unless the step before was interrupted
        if not pipeline.steps:
            pipeline.launch()
        if ahead and pipeline.runs_ahead:
            pipeline.launch_ahead()
        if pipeline.steps:
            self._take_in()
        return self.take_pending()

    def settle(self) -> None:
        """Wait for what is under way: nothing moves afterwards. Its outputs come with the next step()."""
        self._emit_new_tokens()
        while self.pipeline.steps:
            self._take_in()

    @property
    def num_steps(self) -> int:
        """Steps that ran."""
        return self.pipeline.num_steps

    @property
    def stats(self) -> EngineStats:
        """A snapshot, cheap enough for every step."""
        manager, scheduler, pipeline = self.kv_cache_manager, self.scheduler, self.pipeline
        return EngineStats(
            num_steps=pipeline.num_steps, num_running=len(scheduler.running), num_waiting=len(scheduler.waiting),
            num_finished=self.num_finished, kv_cache_usage=manager.pool.usage, num_blocks=manager.pool.num_blocks,
            num_free_blocks=manager.pool.num_free_blocks, num_prompt_tokens=pipeline.num_prompt_tokens,
            num_output_tokens=pipeline.num_output_tokens, num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=manager.prefix_cache_queries, prefix_cache_hits=manager.prefix_cache_hits,
            last_step_tokens=pipeline.last_step_tokens, running=[r.request_id for r in scheduler.running],
            waiting=[r.request_id for r in scheduler.waiting])

    # ---- details ----

    def _check_prompt(self, token_ids: list[int]) -> None:
        manager = self.kv_cache_manager
        check_prompt(token_ids, vocab_size=self.vocab_size, max_model_len=self.max_model_len,
                     num_blocks=manager.pool.num_blocks, block_size=manager.block_size)

    def _max_len(self) -> int:
        # A request that alone outgrows the pool could never be finished: it ends with "length" at that point.
        return min(self.max_model_len, self.kv_cache_manager.pool.num_blocks * self.kv_cache_manager.block_size)

    def _take_in(self) -> None:
        self._all_emitted = False
        self.pipeline.take_in()
        self._emit_new_tokens()
        self.pipeline.promote()

    def _emit_new_tokens(self) -> None:
        if not self._all_emitted:
            now = time.perf_counter()
            preempted = takewhile(lambda request: request.status is not RequestStatus.WAITING, self.scheduler.waiting)
            for request in [*self.scheduler.running, *preempted]:  # preempted while the step ran that gave it a token
                if request.num_prompt_tokens + request.num_emitted_tokens < len(request.token_ids):
                    self._emit(request, now)
            self._all_emitted = True
        self._tell_new_tokens()

    def _tell_new_tokens(self) -> None:
        """One event for the tokens of many requests: at 256 a step, one each would cost as much as the step."""
        if self._new_tokens:
            tokens, self._new_tokens = self._new_tokens, []
            if self.events is not None:
                self.events.emit("tokens", None, Rows(*zip(*tokens)))

    def _emit(self, request: Request, now: float) -> None:
        """Make an output of a request's state; if it has ended, let go of everything that belongs to it."""
        metrics = request.metrics
        first_new = request.num_prompt_tokens + request.num_emitted_tokens
        num_new = len(request.token_ids) - first_new
        if metrics.first_token_time is None and num_new:
            metrics.first_token_time = now
        detokenizer = self._detokenizers.get(request.request_id) if self._detokenizers else None
        new_text = "" if detokenizer is None else self._new_text(request, detokenizer, request.token_ids[first_new:])
        metrics.num_output_tokens = request.num_emitted_tokens = request.num_emitted_tokens + num_new
        request.token_times += [now] * num_new
        if self.events is not None:
            for i, token_id in enumerate(request.token_ids[first_new:], start=1):
                self._new_tokens.append((request.request_id, token_id, new_text if i == num_new else ""))
        is_finished = request.status.is_finished
        if is_finished:
            metrics.finished_time = now
            self._forget(request)
        text = "" if detokenizer is None else detokenizer.text
        self._pending.append(RequestOutput.after_step(request, is_finished, text, new_text))

    @staticmethod
    def _new_text(request: Request, detokenizer: Any, new_ids: list[int]) -> str:
        # A token that ends the request is not part of its text, as a stop string is not.
        text_ids = new_ids[:-1] if new_ids and request.status is RequestStatus.FINISHED_STOPPED else new_ids
        new_text = detokenizer.push(text_ids)
        if detokenizer.stop_reason is not None and request.status is not RequestStatus.FINISHED_ABORTED:
            # Also over "length": the text is complete, and ends where it was asked to.
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = detokenizer.stop_reason
        return new_text + detokenizer.finish() if request.status.is_finished else new_text

    def _forget(self, request: Request) -> None:
        self.num_finished += 1
        self._tell_new_tokens()  # its last token comes before its end
        self.scheduler.finish(request)
        request.token_times = []  # for snapshots of who runs; whoever keeps an output keeps its request
        if self.events is not None:
            self.events.emit("request_finished", request.request_id, request.finish_reason, request.num_output_tokens)
        del self._requests[request.request_id]
        self._detokenizers.pop(request.request_id, None)


def _request_seed(engine_seed: int, number: int) -> int:
    """A seed for a request that brings none: SplitMix64's output function over the engine's seed and a counter."""
    mask = 2**64 - 1
    z = (engine_seed * 0xD1342543DE82EF95 + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
