"""Topic "timeline": every request's spans and prefill chunks, and every step with its tokens, as they come.

A snapshot has what the state still keeps, a delta what is new. Strings travel once: a request has a number on the page
from then on. The arrays, one row each:

    step_*    step (number), begin, end (NaN: running), prefill, decode (tokens), rows (of the batch), failed
    span_*    request (number), kind (index into KINDS), begin, end (NaN: open)
    chunk_*   request (number), step, begin (of that step), start (position), count: the prefill chunks
    request_* number, tokens (of the output), first (time of the first token; NaN: none yet), cached, preemptions,
              status (index into STATUSES), end (NaN: not finished)

Steps, spans and chunks of a delta take the place of those that begin at the same time or later.
"""

from typing import Any

import numpy as np

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState, StepState
from widgets.frames import Payload
from widgets.topics.base import Topic, register

KINDS = ("waiting", "prefill", "decode", "preempted")
STATUSES = ("waiting", "running", "preempted", "stop", "length", "abort")

STEP = (("step", "<u4"), ("begin", "<f8"), ("end", "<f8"), ("prefill", "<u4"), ("decode", "<u4"), ("rows", "<u4"),
        ("failed", "|u1"))
SPAN = (("request", "<u4"), ("kind", "|u1"), ("begin", "<f8"), ("end", "<f8"))
CHUNK = (("request", "<u4"), ("step", "<u4"), ("begin", "<f8"), ("start", "<u4"), ("count", "<u4"))
REQUEST = (("number", "<u4"), ("tokens", "<u4"), ("first", "<f8"), ("cached", "<u4"), ("preemptions", "<u4"),
           ("status", "|u1"), ("end", "<f8"))


class Known:
    """A request that the page knows: its number there, and which of its spans need not be told again."""

    def __init__(self, number: int, added_ns: int):
        self.number, self.added_ns = number, added_ns
        self.settled = 0  # spans before this one are closed, and told
        self.num_tokens = 0  # as they were told
        self.told_open = False  # the one at `settled` has been told, as open


@register
class TimelineTopic(Topic):
    """The Gantt of a run. It shows all of it also while the feed's cursor looks at the past."""

    name = "timeline"

    def __init__(self, feed: Any, **params: Any):
        super().__init__(feed, **params)
        self._begin_again()

    def snapshot(self, state: EngineState) -> Payload:
        self._begin_again()
        self._of = state.requests
        return self._payload(state, list(state.steps), list(state.requests.values()), clear=True)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        if state.requests is not self._of:  # the engine was reset, or told all anew after a gap
            return self.snapshot(state)
        begun = sum(event[2] == "step_begun" for event in events)
        # However many steps there were: who has more tokens than a frame ago, and who had an event of his own.
        touched = {event[4] for event in events if event[2].startswith("request_")}
        self.feed.breathe()
        for name, request in state.unfinished.items():
            known = self._known.get(name)
            if known is None or known.num_tokens != len(request.token_ids):
                touched.add(name)
        fresh = min(len(state.steps), begun + self._step_is_open)
        if not fresh and not touched:
            return None
        steps = [state.steps[i] for i in range(-fresh, 0)]
        return self._payload(state, steps, [state.requests[i] for i in touched if i in state.requests], clear=False)

    # ---- details ----

    def _begin_again(self) -> None:
        self._known: dict[str, Known] = {}
        self._of: dict[str, RequestState] | None = None  # the requests that the page was told of
        self._numbers = 0
        self._step_is_open = False

    def _payload(self, state: EngineState, steps: list[StepState], requests: list[RequestState],
                 clear: bool) -> Payload:
        requests = sorted(requests, key=lambda r: r.added_ns)
        added, spans = [], []
        for i, request in enumerate(requests):
            if i % 16 == 0:
                self.feed.breathe()
            known = self._known.get(request.request_id)
            if known is None or known.added_ns != request.added_ns:  # an id that is used again is another request
                known = self._known[request.request_id] = Known(self._numbers, request.added_ns)
                self._numbers += 1
                added.append([known.number, request.request_id, request.num_prompt_tokens,
                              self.feed.ms(request.added_ns)])
            spans += self._new_spans(request)
        self.feed.breathe()
        step_rows, chunks = [], []
        for i, step in enumerate(steps, 1):
            if i % 64 == 0:
                self.feed.breathe()
            row, pieces = self._step(step, state)
            step_rows.append(row)
            chunks += pieces
        self._step_is_open = bool(state.steps) and state.steps[-1].end_ns is None
        arrays = {}
        for prefix, columns, rows in (("step", STEP, step_rows), ("span", SPAN, spans), ("chunk", CHUNK, chunks),
                                      ("request", REQUEST, [self._figures(request) for request in requests])):
            arrays |= self._columns(prefix, columns, rows)
            self.feed.breathe()
        for request in requests:
            if request.finished_ns is not None:
                self._known.pop(request.request_id, None)  # nothing more will come of it
        return Payload({"clear": clear, "added": added}, arrays)

    def _new_spans(self, request: RequestState) -> list[tuple]:
        known, spans = self._known[request.request_id], request.spans
        is_open = spans[-1].end_ns is None
        if known.told_open and is_open and known.settled == len(spans) - 1:
            return []
        rows = [(known.number, KINDS.index(span.kind), span.start_ns, span.end_ns)
                for span in spans[known.settled:]]
        known.settled, known.told_open = len(spans) - is_open, is_open
        return rows

    def _step(self, step: StepState, state: EngineState) -> tuple[tuple, list[tuple]]:
        prefills, begin = step.prefills, step.begin_ns
        if not prefills:  # nearly all steps are of this kind
            return (step.step, begin, step.end_ns, 0, step.num_tokens, len(step.batch), step.error is not None), []
        num_prefill = sum(row[2] for row in prefills)
        chunks = [(self._known[request_id].number, step.step, begin, start, count)
                  for request_id, start, count, _ in prefills
                  if request_id in self._known and state.requests[request_id].added_ns <= begin]
        return (step.step, begin, step.end_ns, num_prefill, step.num_tokens - num_prefill, len(step.batch),
                step.error is not None), chunks

    def _figures(self, request: RequestState) -> tuple:
        known, num_tokens = self._known[request.request_id], len(request.token_ids)
        known.num_tokens = num_tokens
        return (known.number, num_tokens, request.token_ns[0] if num_tokens else None, request.num_cached_tokens,
                request.num_preemptions, STATUSES.index(request.status), request.finished_ns)

    def _columns(self, prefix: str, columns: tuple[tuple[str, str], ...], rows: list[tuple]) -> dict[str, np.ndarray]:
        """Rows as arrays. Columns of float64 are times: nanoseconds, or None."""
        if not rows:
            return {}
        return {f"{prefix}_{name}": self.feed.all_ms(values) if dtype == "<f8" else np.array(values, dtype)
                for (name, dtype), values in zip(columns, zip(*rows))}
