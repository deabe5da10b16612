"""LiveEngine: the engine in a thread of its own, so that a notebook stays free to look and to touch.

Cells return at once. What they ask for goes on a queue that the engine empties between two steps (see driver.py).

    notebook, widgets ── add, abort, pause, step, resume, speed, policy, reset, stop ──> commands
                                                                                          │ between steps
    EventLog <── events <── engine thread: drain commands, step, hand outputs on <────────┘
"""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from tinyvllm.config import POLICIES
from tinyvllm.engine.driver import Driver
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.listeners import ErrorCallback, Listeners, OutputCallback, TakenIds, outputs_of
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.engine.prompts import check_id
from tinyvllm.engine.recording import token_text
from tinyvllm.engine.request import Request
from tinyvllm.errors import ConfigError, RequestError, TinyVLLMError
from tinyvllm.outputs import EngineStats, RequestOutput
from tinyvllm.sampling_params import SamplingParams

RESET_TIMEOUT_S = 60.0  # so long a step and a reset may take, until who waits for them is told


class LiveEngine(Driver):
    """Drives the engine of an LLM from a background thread. The LLM refuses to be used directly meanwhile.

    llm: a tinyvllm.LLM. events: the log to emit into (default: a new one). steps_per_second: a speed limit for
    teaching; None is as fast as it goes. paused: start paused, to go on step by step.

    An LLM has one driver at a time: a second LiveEngine on it, as when a cell is run again, closes the first and ends
    its requests.

    Whatever asks for something right after a `reset` waits until that is done: only then is it known what can be had.
    """

    def __init__(self, llm: Any, *, events: EventLog | None = None, steps_per_second: float | None = None,
                 paused: bool = False):
        if not hasattr(llm, "memory_plan"):
            raise TypeError(f"a LiveEngine needs an LLM, as in LiveEngine(LLM('demo')), got {type(llm).__name__}")
        super().__init__(EventLog() if events is None else events, steps_per_second, paused)  # an empty log is False
        self.llm = llm
        self._listeners, self._ids = Listeners(), TakenIds()
        self._order = threading.Lock()  # what is known of ids changes in the order of the commands that change it
        self._num_resets = 0  # on their way
        self._take_over()
        llm.engine.listen(self.events)
        self._thread.start()

    def _take_over(self) -> None:
        before = self.llm._driver and self.llm._driver()
        if before is not None:
            before.close()
            if before._thread.is_alive():
                raise TinyVLLMError("the LiveEngine that this LLM had before is still in a step: try again in a moment")
        self.llm._driver = weakref.ref(self)

    # ---- what a notebook asks for: each returns at once ----

    def add(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt (text, token ids, ...) and return the request's id. Raises RequestError for a bad prompt."""
        self._check_alive()
        check_id(request_id)
        engine = self._engine_after_resets()
        request = engine.prepare(prompt, params, request_id)
        with self._order:
            while not self._ids.take(request):
                if request_id is not None:
                    raise RequestError(f"request id {request_id!r} is in use: choose another, or leave it out")
                request = engine.prepare(prompt, params)  # somebody chose that number for a name: the next one
            self._send(self._submit, request, engine)
        return request.request_id

    def chat(self, messages: list[dict[str, str]], params: SamplingParams | None = None) -> str:
        """Queue a conversation, rendered with the model's chat template."""
        return self.add(self.llm.chat_token_ids(messages), params)

    def abort(self, *request_ids: str) -> None:
        """End these requests; without ids, all of them. Unknown ids are ignored."""
        for request_id in request_ids:
            check_id(request_id, allowed=())
        with self._order:
            self._ids.free(request_ids or None)
            self._send(self._abort, request_ids)

    def set_policy(self, *, scheduling_policy: str | None = None, max_num_seqs: int | None = None,
                   max_num_batched_tokens: int | None = None) -> None:
        """Change how steps are scheduled, from the next one on, without losing a request.

        The limits can be lowered from, and raised back to, what the engine was made with: `reset` goes beyond.
        """
        self._engine_after_resets()
        plan = self.llm.memory_plan
        for name, value, most in (("max_num_seqs", max_num_seqs, plan.max_num_seqs),
                                  ("max_num_batched_tokens", max_num_batched_tokens, plan.max_num_batched_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise ConfigError(f"{name} can be 1 to {most} here, got {value!r}; more needs reset({name}=...)")
        if scheduling_policy not in (None, *POLICIES):
            allowed = " or ".join(map(repr, POLICIES))
            raise ConfigError(f"scheduling_policy must be {allowed}, got {scheduling_policy!r}")
        self._send(self._set_policy, scheduling_policy, max_num_seqs, max_num_batched_tokens)

    def reset(self, **changes: Any) -> None:
        """Forget every request and the whole cache, and begin anew with some options changed (see LLM.reset)."""
        self._check_open()
        if self.error is None:
            self._engine_after_resets()  # of two in a row, the second changes what the first has made
        self.llm.plan_reset(**changes)  # a change that cannot be is refused here, where the user is
        with self._order:
            self._ids.free()
            with self._lock:
                self._num_resets += 1
            self._send(self._reset, changes)

    def stop(self) -> None:
        """Abort every request. The engine stays, and takes new ones."""
        self.abort()

    def on_output(self, callback: OutputCallback, on_error: ErrorCallback | None = None) -> Callable[[], None]:
        """Call `callback(RequestOutput)` from the engine's thread for every token; returns a function that ends it.

        It may call this LiveEngine, but must not wait for it. on_error(error, request_id): called when the run fails
        or this LiveEngine is closed (request_id None), and for a request that the engine could not take after all.
        """
        if not callable(callback):
            raise TypeError(f"on_output takes a function that is called with each RequestOutput, got {callback!r}")
        return self._listeners.add(callback, on_error)

    @property
    def callback_error(self) -> BaseException | None:
        """The newest mistake of a callback, or refusal of a request that had been queued: the engine goes on."""
        return self._listeners.error

    @callback_error.setter
    def callback_error(self, error: BaseException | None) -> None:
        self._listeners.error = error

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """`async for out in live.stream(...)`: an output after every token. Leaving the loop aborts the request.

        Raises what `add` raises, and TinyVLLMError if the run fails meanwhile.
        """
        return outputs_of(self, prompt, params)

    def between_steps(self, look: Callable, *arguments: Any) -> Future:
        """Call look(llm, *arguments) in the engine's thread, before its next step, where nothing moves.

        Returns a Future of the result; an exception of `look` is the Future's and not the engine's. `llm.probe` has
        what there is to look at.
        """
        future: Future = Future()
        self._send(self._look, future, look, arguments)
        if self._is_over:
            self._refuse_looks()
        return future

    # ---- what it is doing ----

    @property
    def stats(self) -> EngineStats:
        return self._engine().stats

    @property
    def kind(self) -> str:
        """"cpu" or "cuda": where the engine computes. (A ReplayEngine's is "replay".)"""
        return self.llm.device

    def spare_s(self) -> float | None:
        """For so many seconds the engine's thread will likely wait for its device yet; 0 or less: it works; None: it
        computes itself. For threads that can choose when to work."""
        engine = self.llm.engine
        return None if engine is None else engine.pipeline.spare_s()

    def now_ns(self) -> int:
        """The time of this run, in nanoseconds: what an event that happened now would carry."""
        return time.perf_counter_ns()

    def token_text(self, token_id: int) -> str | None:
        """What a token stands for; None without a tokenizer, or for an id that it does not have."""
        return token_text(self.llm.tokenizer, token_id)

    def close(self) -> None:
        """End every request and the thread. The LLM can be used directly again."""
        super().close()

    def _describe(self) -> str:
        if self.llm.engine is None:
            return self.state
        return f"{self.state}, {self.stats.num_running} running, {self.stats.num_waiting} waiting"

    def _engine(self) -> LLMEngine:
        """The engine, for other threads: in the middle of a reset there is none."""
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while (engine := self.llm.engine) is None:
            if time.monotonic() > deadline or self.error is not None:
                self._check_alive()
                raise TinyVLLMError("the engine is still being reset: try again in a moment")
            time.sleep(0.001)
        return engine

    def _engine_after_resets(self) -> LLMEngine:
        """The engine that a command sent now will meet; in its own thread, which cannot wait for that, the present one.
        """
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while self._num_resets and not self.is_own_thread:
            self._check_open()
            if time.monotonic() > deadline:
                raise TinyVLLMError("the engine is still to be reset, after the step that is running: try again later")
            time.sleep(0.001)
        if self._num_resets == 0:
            self._check_alive()
        return self._engine()

    def _check_alive(self) -> None:
        self._check_open()
        if self.error is not None and not self._num_resets:
            raise TinyVLLMError(f"the engine stopped at an error ({type(self.error).__name__}: {self.error}); "
                                "reset() starts it afresh") from self.error

    # ---- the engine's thread ----

    def _has_work(self) -> bool:
        engine = self.llm.engine
        return engine is not None and engine.has_unfinished_requests()

    def _advance(self) -> float:
        if wait := self._seconds_until_due():
            return wait
        self._count_step()
        self._stepping = True
        try:
            # Nobody waits for what is under way but who wants it to stand still: at full speed nobody does.
            self._deliver(self.llm.engine.step(ahead=not (self._paused or self._interval)))
        finally:
            self._stepping = False
        return 0.0

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                self._ids.ended(output.request_id)
            self._listeners.tell(output)

    def _failed(self, error: BaseException) -> None:
        self._listeners.tell_error(error)

    def _submit(self, request: Request, engine: LLMEngine) -> None:
        try:
            if self.llm.engine is not engine:  # a reset came in between: what it was checked against is gone
                prompt = {"prompt": request.prompt, "prompt_token_ids": request.token_ids}
                self._ids.ended(request)
                request = self.llm.engine.prepare(prompt, request.params, request.request_id)
                self._ids.take(request)
            self.llm.engine.submit(request)
        except RequestError as error:
            self._ids.ended(request)
            self.callback_error = error
            self._listeners.tell_error(error, request.request_id)
        else:
            self._ids.submitted(request)

    def _set_paused(self, paused: bool) -> None:
        super()._set_paused(paused)
        if paused and self.llm.engine is not None:
            self._settle()

    def _settle(self) -> None:
        """End what is under way: who looks now sees the engine after a step, and not in two at once."""
        self.llm.engine.settle()
        self._deliver(self.llm.engine.take_pending())

    def _look(self, future: Future, look: Callable, arguments: tuple) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.error is None:
                self._settle()
            future.set_result(look(self.llm, *arguments))
        except BaseException as error:
            future.set_exception(error)

    def _refuse_looks(self) -> None:
        """The thread has ended: nobody must wait for it."""
        while True:
            try:
                command, arguments = self._commands.get_nowait()
            except queue.Empty:
                return
            if command == self._look and arguments[0].set_running_or_notify_cancel():
                arguments[0].set_exception(TinyVLLMError("this LiveEngine is closed: make a new one"))

    def _tell_again(self) -> None:
        self.llm.engine.listen(self.events)

    def _abort(self, request_ids: tuple[str, ...]) -> None:
        scheduler = self.llm.engine.scheduler
        everyone = [r.request_id for r in [*scheduler.running, *scheduler.waiting]]
        self.llm.engine.abort(request_ids or everyone)
        self._deliver(self.llm.engine.take_pending())

    def _end_all(self) -> None:
        """Abort everybody, as far as an engine that may have failed lets itself be told."""
        if self.llm.engine is not None:
            with contextlib.suppress(Exception):
                self._abort(())

    def _set_policy(self, policy: str | None, max_num_seqs: int | None, max_num_batched_tokens: int | None) -> None:
        scheduler = self.llm.engine.scheduler
        scheduler.policy = policy or scheduler.policy
        scheduler.max_num_seqs = max_num_seqs or scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max_num_batched_tokens or scheduler.max_num_batched_tokens
        self.events.emit("policy_changed", None, {
            "scheduling_policy": scheduler.policy, "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens})

    def _reset(self, changes: dict[str, Any]) -> None:
        self.error = None
        self._end_all()
        try:
            self.llm.reset(**changes)
        finally:  # also without the memory for it there is an engine: the one with the options before
            if self.llm.engine is not None:
                self.llm.engine.listen(self.events)
            with self._lock:
                self._num_resets -= 1

    def _ended(self) -> None:
        self._end_all()
        self._listeners.tell_error(TinyVLLMError("this LiveEngine is closed: make a new one"))
        with contextlib.suppress(Exception):  # of an engine that has failed
            self.llm.engine.listen(None)
        self._is_over = True  # before the last look at the queue: who sends after it looks for himself
        self._refuse_looks()
