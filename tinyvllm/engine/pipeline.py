"""Steps on their way through the runner: scheduled, begun, waited for, taken in.

    host     schedule 1, 2 |  take in 1, schedule 3  |  take in 2, schedule 4  | ...
    device       ......... 1 ............ | 2 ............ | 3 ............

A runner that can is given the next step while it works on this one, so that it need never wait for Python. What step 1
sampled is then known to the device only when step 2 is scheduled; that it is one token is enough to know.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from tinyvllm.engine.event_rows import Rows
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.garbage import collect_young
from tinyvllm.engine.scheduler import Scheduler, SchedulerOutput


class Runner(Protocol):
    """What computes a step: writes K and V of every scheduled token, samples where asked.

    A runner may also have `begin(output)`, which starts a step and returns a function that waits for its tokens. One
    whose `runs_ahead` is True can be given a step before the one before it was waited for. In that step the token at
    position len(request.token_ids) may be asked for: it is the one that the step before has sampled for this request,
    and the runner takes it from there. A step that nobody needs any more is not waited for.
    """

    def execute(self, output: SchedulerOutput) -> dict[str, int]: ...


@dataclass(slots=True, eq=False)
class UnderWay:
    """A step that a runner has been given. wait: gives its tokens; tokens: these, once they are there."""

    number: int
    batch: SchedulerOutput
    wait: Callable[[], dict[str, int]]
    begun_ns: int = 0  # when the listener was told that it began; 0: not yet
    tokens: dict[str, int] | None = None

    def is_wanted(self) -> bool:
        """Whether somebody still needs its tokens."""
        return any(not request.status.is_finished for request in self.batch.requests)


class Pipeline:
    """Gives steps to a runner and takes in what comes of them. It keeps the books balanced when something raises: what
    was not taken in counts as not computed, and is scheduled again."""

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self.events: EventLog | None = None  # set by LLMEngine.listen
        self.runner, self.scheduler = runner, scheduler
        self.steps: deque[UnderWay] = deque()  # two at most: the one that runs, and the one behind it
        self.num_steps = self.num_prompt_tokens = self.num_output_tokens = 0
        self.last_step_tokens = 0
        self.begin = getattr(runner, "begin", None)
        self._names: tuple[list | None, tuple[str, ...]] = None, ()  # a batch's requests, and their ids
        self._wait_began = 0.0  # time.perf_counter(); 0: nothing is waited for
        self._usual_wait_s = 0.0

    @property
    def runs_ahead(self) -> bool:
        """Whether the runner can be given a step ahead. Without a KV cache a step needs every token, also the last."""
        return getattr(self.runner, "runs_ahead", False) and self.scheduler.use_kv_cache

    def spare_s(self) -> float | None:
        """For so many seconds a device that is waited for will likely work yet, and nobody here needs the interpreter;
        0 or less: somebody does. None: the runner computes in this process, and there is no such time. Any thread."""
        if not self.runs_ahead:
            return None
        began = self._wait_began
        return began + self._usual_wait_s - time.perf_counter() if began else 0.0

    def launch(self) -> None:
        """Schedule a step and give it to the runner, if there is something to do."""
        number = (self.steps[-1].number if self.steps else self.num_steps) + 1
        if self.events is not None:
            self.events.step = number  # the step that this scheduling belongs to
        batch = self.scheduler.schedule()
        if not batch.requests:
            return
        step = UnderWay(number, batch, lambda: self.runner.execute(batch))
        if not self.steps:
            self._tell_begun(step)
        if self.begin is not None:
            with self._telling_failure(step):
                step.wait = self.begin(batch)
        self.scheduler.advance(batch)
        self.steps.append(step)

    def launch_ahead(self) -> None:
        """Launch the step behind the one that runs."""
        if len(self.steps) == 1 and self.steps[0].tokens is None:
            try:
                self.launch()
            except Exception:  # it is tried again when its turn comes, and then the error is the caller's
                pass

    def take_in(self) -> None:
        """Wait for the oldest step; its requests have their tokens afterwards."""
        step = self.steps[0]
        if self.events is not None:
            self.events.step = step.number
        try:
            if step.tokens is None:
                with self._telling_failure(step):
                    step.tokens = self._wait(step)
                self._count(step)
            self.scheduler.update(step.batch, step.tokens)
        except BaseException:  # what was given to the runner since is built on this: all of it is scheduled again
            while self.steps and self.steps[-1].tokens is None:
                self.scheduler.take_back(self.steps.pop().batch)
            raise
        self.steps.popleft()

    def _wait(self, step: UnderWay) -> dict[str, int]:
        if not self.runs_ahead:
            return step.wait()
        collect_young()  # the device works meanwhile
        self._wait_began = began = time.perf_counter()
        try:
            return step.wait()
        finally:
            self._wait_began, waited = 0.0, time.perf_counter() - began
            # Soon shorter, slowly longer: a wait whose end another thread held up is no measure for the next.
            rises = 0 < self._usual_wait_s < waited
            self._usual_wait_s += (waited - self._usual_wait_s) / (8 if rises else 1)

    def promote(self) -> None:
        """All of the step before has been told: now that the one behind it runs, if anybody needs it."""
        if self.steps and not self.steps[0].begun_ns:
            if self.steps[0].is_wanted():
                self._tell_begun(self.steps[0])
            else:
                self.steps.popleft()

    def _tell_begun(self, step: UnderWay) -> None:
        step.begun_ns = time.perf_counter_ns()
        if self.events is not None:
            self.events.step = step.number
            rows = self._rows(step.batch)
            self.events.emit_at(step.begun_ns, "step_begun", None, sum(rows.columns[2]), rows)

    def _rows(self, batch: SchedulerOutput) -> Rows:
        """Of the requests that have not ended."""
        requests = batch.requests
        columns = [batch.starts.tolist(), batch.counts.tolist(), batch.samples.tolist()]
        if any(request.status.is_finished for request in requests):
            alive = [not request.status.is_finished for request in requests]
            requests, *columns = [list(compress(column, alive)) for column in (requests, *columns)]
            self._names = None, tuple(request.request_id for request in requests)
        elif requests is not self._names[0]:
            self._names = requests, tuple(request.request_id for request in requests)
        return Rows(self._names[1], *map(tuple, columns))

    @contextmanager
    def _telling_failure(self, step: UnderWay) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.events is not None and step.begun_ns:
                self.events.emit("step_failed", None, f"{type(error).__name__}: {error}")
            raise

    def _count(self, step: UnderWay) -> None:
        if self.events is not None:
            self.events.emit("step_ended", None, time.perf_counter_ns() - step.begun_ns)
        self.num_steps += 1
        batch = step.batch
        if batch.is_continued and batch.requests == self.scheduler.running:  # nobody has ended, and no prompt is left
            self.last_step_tokens = len(batch.requests)
            self.num_output_tokens += len(batch.requests)
            return
        self.last_step_tokens = 0
        columns = batch.requests, batch.starts.tolist(), batch.counts.tolist(), batch.samples.tolist()
        for request, start, count, sample in zip(*columns):
            if request.status.is_finished:  # while it ran
                continue
            self.last_step_tokens += count
            prompt_left = request.num_prompt_tokens - start
            if prompt_left > 0:
                self.num_prompt_tokens += min(prompt_left, count)
            self.num_output_tokens += sample
