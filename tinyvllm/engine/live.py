"""LiveEngine: the engine in a thread of its own, so that a notebook stays free to look and to touch.

Cells return at once. What they ask for goes on a queue that the engine empties between two steps:

    notebook, widgets ── add, abort, pause, step, resume, speed, policy, reset, stop ──> commands
                                                                                          │ between steps
    EventLog <── events <── engine thread: drain commands, step, hand outputs on <────────┘

An exception in the engine ends nothing but the run: it is kept in `error`, the state is "failed", and `reset` starts
afresh.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tinyvllm.config import POLICIES
from tinyvllm.engine.events import EventLog
from tinyvllm.errors import ConfigError, RequestError, TinyVLLMError
from tinyvllm.outputs import EngineStats, RequestOutput
from tinyvllm.sampling_params import SamplingParams

OutputCallback = Callable[[RequestOutput], None]


class LiveEngine:
    """Drives the engine of an LLM from a background thread. The LLM must not be used directly meanwhile.

    llm: a tinyvllm.LLM. events: the log to emit into (default: a new one). steps_per_second: a speed limit for
    teaching; None is as fast as it goes. paused: start paused, to go on step by step.

    Every method returns at once, except `wait_idle` and `close`, which are for scripts: in a notebook cell they keep
    the page from being served.
    """

    def __init__(self, llm: Any, *, events: EventLog | None = None, steps_per_second: float | None = None,
                 paused: bool = False):
        self.llm = llm
        self.events = EventLog() if events is None else events  # an empty log counts as False
        self.error: BaseException | None = None
        self.callback_error: BaseException | None = None
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._callbacks: list[OutputCallback] = []
        self._paused = paused
        self._steps_allowed = 0
        self._interval = _interval(steps_per_second)
        self._next_due = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._num_sent = self._num_done = 0  # commands
        self._stepping = False
        llm.engine.listen(self.events)
        self._thread = threading.Thread(target=self._run, name="tinyvllm-engine", daemon=True)
        self._thread.start()

    # ---- what a notebook asks for: each returns at once ----

    def add(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt (text, token ids, ...) and return the request's id. Raises RequestError for a bad prompt."""
        self._check_alive()
        request = self.llm.engine.prepare(prompt, params, request_id)
        self._send(self._submit, request)
        return request.request_id

    def chat(self, messages: list[dict[str, str]], params: SamplingParams | None = None) -> str:
        """Queue a conversation, rendered with the model's chat template."""
        return self.add(self.llm.chat_token_ids(messages), params)

    def abort(self, *request_ids: str) -> None:
        """End these requests; without ids, all of them."""
        self._send(self._abort, request_ids)

    def pause(self) -> None:
        """Stop after the step that is running."""
        self._send(self._set_paused, True)

    def resume(self) -> None:
        """Go on."""
        self._send(self._set_paused, False)

    def step(self, count: int = 1) -> None:
        """Run so many steps and be paused again."""
        if not isinstance(count, int) or count < 1:
            raise ConfigError(f"step needs a whole number of 1 or more, got {count!r}")
        self._send(self._allow_steps, count)

    def set_speed(self, steps_per_second: float | None) -> None:
        """At most so many steps a second; None for no limit."""
        self._send(self._set_interval, _interval(steps_per_second))

    def set_policy(self, *, scheduling_policy: str | None = None, max_num_seqs: int | None = None,
                   max_num_batched_tokens: int | None = None) -> None:
        """Change how steps are scheduled, from the next one on, without losing a request.

        The limits can be lowered from, and raised back to, what the engine was made with: `reset` goes beyond.
        """
        plan = self.llm.memory_plan
        for name, value, most in (("max_num_seqs", max_num_seqs, plan.max_num_seqs),
                                  ("max_num_batched_tokens", max_num_batched_tokens, plan.max_num_batched_tokens)):
            if value is not None and not (isinstance(value, int) and 1 <= value <= most):
                raise ConfigError(f"{name} can be 1 to {most} here, got {value!r}; more needs reset({name}=...)")
        if scheduling_policy not in (None, *POLICIES):
            allowed = " or ".join(map(repr, POLICIES))
            raise ConfigError(f"scheduling_policy must be {allowed}, got {scheduling_policy!r}")
        self._send(self._set_policy, scheduling_policy, max_num_seqs, max_num_batched_tokens)

    def reset(self, **changes: Any) -> None:
        """Forget every request and the whole cache, and begin anew with some options changed (see LLM.reset)."""
        if self._closed:
            raise TinyVLLMError("this LiveEngine is closed: make a new one")
        self.llm.plan_reset(**changes)  # a change that cannot be is refused here, where the user is
        self._send(self._reset, changes)

    def stop(self) -> None:
        """Abort every request. The engine stays, and takes new ones."""
        self.abort()

    def on_output(self, callback: OutputCallback) -> Callable[[], None]:
        """Call `callback(RequestOutput)` from the engine's thread for every token; returns a function that ends it."""
        self._callbacks = [*self._callbacks, callback]  # replaced, not changed: the engine may be walking over it

        def remove() -> None:
            self._callbacks = [c for c in self._callbacks if c is not callback]

        return remove

    async def stream(self, prompt: Any, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """`async for out in live.stream(...)`: an output after every token. Leaving the loop aborts the request."""
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue()
        request_id = None

        def take(output: RequestOutput) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        remove, finished = self.on_output(take), False
        try:
            request_id = self.add(prompt, params)
            while not finished:
                output = await outputs.get()
                if output.request_id == request_id:
                    finished = output.finished
                    yield output
        finally:
            remove()
            if request_id is not None and not finished:
                self.abort(request_id)

    # ---- what it is doing ----

    @property
    def state(self) -> str:
        """"running", "paused", "idle" (nothing to do), "failed" (see `error`) or "closed"."""
        if self._closed:
            return "closed"
        if self.error is not None:
            return "failed"
        if self._paused and not self._steps_allowed:
            return "paused"
        return "idle" if self._is_idle() else "running"

    @property
    def stats(self) -> EngineStats:
        return self.llm.engine.stats

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until every request has ended. Raises the engine's error, or TimeoutError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.error is not None:
                raise self.error
            if self._is_idle():
                return
            time.sleep(0.005)
        raise TimeoutError(f"requests are still running after {timeout:g} s (state: {self.state})")

    def close(self) -> None:
        """End the thread. The LLM can be used directly again."""
        if not self._closed:
            self._closed = True
            self._send(lambda: None)
            self._thread.join(timeout=30)
            self.llm.engine.listen(None)

    def __enter__(self) -> "LiveEngine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        trouble = f", error: {self.error}" if self.error is not None else ""
        return f"LiveEngine({self.state}, {self.stats.num_running} running, {self.stats.num_waiting} waiting{trouble})"

    def _check_alive(self) -> None:
        if self._closed:
            raise TinyVLLMError("this LiveEngine is closed: make a new one")
        if self.error is not None:
            raise TinyVLLMError(f"the engine stopped at an error ({type(self.error).__name__}: {self.error}); "
                                "reset() starts it afresh") from self.error

    def _is_idle(self) -> bool:
        """Every command carried out, every request ended, every output handed on. The order of the questions counts."""
        return (self._num_sent == self._num_done and not self.llm.engine.has_unfinished_requests()
                and not self._stepping)

    def _send(self, command: Callable, *arguments: Any) -> None:
        with self._lock:
            self._num_sent += 1
        self._commands.put((command, arguments))

    # ---- the engine's thread ----

    def _run(self) -> None:
        while not self._closed:
            try:
                self._drain(wait=self._nothing_to_do())
                if not self._closed and not self._nothing_to_do() and self._is_due():
                    self._step()
            except Exception as error:  # the run is over, the notebook and this thread are not
                self.error = error

    def _nothing_to_do(self) -> bool:
        if self.error is not None or not self.llm.engine.has_unfinished_requests():
            return True
        return self._paused and not self._steps_allowed

    def _drain(self, wait: bool) -> None:
        """Run the commands that have come; with `wait`, wait for the first."""
        while True:
            try:
                command, arguments = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                command(*arguments)
            finally:
                self._num_done += 1

    def _is_due(self) -> bool:
        """Under a speed limit: wait for the next step's time, or for a command, whichever comes first."""
        delay = self._next_due - time.perf_counter()
        if self._interval and delay > 0:
            time.sleep(min(delay, 0.02))  # short: Stop must be heard
            return False
        self._next_due = time.perf_counter() + self._interval
        return True

    def _step(self) -> None:
        if self._steps_allowed:
            self._steps_allowed -= 1
        self._stepping = True
        try:
            self._deliver(self.llm.engine.step())
        finally:
            self._stepping = False

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            for callback in self._callbacks:
                try:
                    callback(output)
                except Exception as error:  # a listener's mistake is not the engine's
                    self.callback_error = error

    def _submit(self, request: Any) -> None:
        try:
            self.llm.engine.submit(request)
        except RequestError as error:  # two with one id: the second is dropped, and says so
            self.callback_error = error

    def _abort(self, request_ids: tuple[str, ...]) -> None:
        scheduler = self.llm.engine.scheduler
        everyone = [r.request_id for r in [*scheduler.running, *scheduler.waiting]]
        self.llm.engine.abort(request_ids or everyone)
        self._deliver(self.llm.engine.take_pending())

    def _set_paused(self, paused: bool) -> None:
        self._paused, self._steps_allowed = paused, 0

    def _allow_steps(self, count: int) -> None:
        self._paused = True
        self._steps_allowed += count

    def _set_interval(self, interval: float) -> None:
        self._interval, self._next_due = interval, 0.0

    def _set_policy(self, policy: str | None, max_num_seqs: int | None, max_num_batched_tokens: int | None) -> None:
        scheduler = self.llm.engine.scheduler
        scheduler.policy = policy or scheduler.policy
        scheduler.max_num_seqs = max_num_seqs or scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max_num_batched_tokens or scheduler.max_num_batched_tokens

    def _reset(self, changes: dict[str, Any]) -> None:
        self.error = None
        self._abort(())
        self.llm.reset(**changes)
        self.llm.engine.listen(self.events)


def _interval(steps_per_second: float | None) -> float:
    if steps_per_second is None:
        return 0.0
    if isinstance(steps_per_second, bool) or not isinstance(steps_per_second, (int, float)) or not steps_per_second > 0:
        raise ConfigError(f"the speed must be a number of steps a second above 0, or None for no limit, "
                          f"got {steps_per_second!r}")
    return 1.0 / steps_per_second
