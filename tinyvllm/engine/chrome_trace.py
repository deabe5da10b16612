"""A run in Chrome's trace event format, for ui.perfetto.dev and chrome://tracing.

Process 1 is the engine: a track of its steps, and counters. Process 2 has a track for each request, with its spans. A
reset in the middle begins new tracks. Times are microseconds since the first event.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState, StepState

_ENGINE, _REQUESTS, _STEPS = 1, 2, 1  # processes, and the engine's only track


def chrome_events(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Trace events: "M" names, "X" slices, "C" counters."""
    if not events:
        return
    origin = min(event.t_ns for event in events)
    yield _named("process_name", _ENGINE, 0, "engine")
    yield _named("process_name", _REQUESTS, 0, "requests")
    yield _named("thread_name", _ENGINE, _STEPS, "steps")
    state, num_rows, reached = EngineState(None, None), 0, origin
    for event in events:
        steps, requests = state.steps, state.requests
        is_new = state.apply(event)
        if is_new and event.kind == "engine_config":  # which forgets all that was
            yield from _slices(steps, requests.values(), num_rows, origin, reached)
            num_rows += len(requests)
        reached = max(reached, event.t_ns)
        if is_new and event.kind.startswith("blocks_"):
            yield _counter("KV blocks in use", event.t_ns - origin, "blocks", state.num_used_blocks)
    yield from _slices(state.steps, state.requests.values(), num_rows, origin, reached)


def _slices(steps: Iterable[StepState], requests: Iterable[RequestState], num_rows: int, origin: int,
            end: int) -> Iterator[dict[str, Any]]:
    """Steps and requests; what had no end goes on to `end`."""
    for step in steps:
        about = {"tokens": step.num_tokens, "requests": len(step.batch)}
        if step.error:
            about["error"] = step.error
        yield _slice(_STEPS, _ENGINE, f"step {step.step}", "step", step.begin_ns - origin,
                     (step.end_ns or end) - step.begin_ns, about)
        yield _counter("tokens in the step", step.begin_ns - origin, "tokens", step.num_tokens)
    for row, request in enumerate(requests, start=num_rows + 1):
        yield _named("thread_name", _REQUESTS, row, f"request {request.request_id}")
        about = {"prompt tokens": request.num_prompt_tokens, "cached": request.num_cached_tokens}
        for span in request.spans:
            yield _slice(row, _REQUESTS, span.kind, "request", span.start_ns - origin,
                         (span.end_ns or end) - span.start_ns, about)


def _slice(tid: int, pid: int, name: str, category: str, start_ns: int, length_ns: int,
           about: dict[str, Any]) -> dict[str, Any]:
    # Readers cut microseconds to whole nanoseconds, and drop slices of one track that overlap: so two less.
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "cat": category, "ts": start_ns / 1e3,
            "dur": max(0, length_ns - 2) / 1e3, "args": about}


def _counter(name: str, t_ns: int, unit: str, value: int) -> dict[str, Any]:
    return {"ph": "C", "pid": _ENGINE, "name": name, "ts": t_ns / 1e3, "args": {unit: value}}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
