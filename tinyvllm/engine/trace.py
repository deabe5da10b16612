"""Traces: the events of a run as a file, to save, reload, replay, and look at in Perfetto.

The file is JSON Lines: a first line with the format's name and version and whatever the recorder wants to say of the
run (model, machine, versions), then one event a line as an array. It can be read with `head`, and a run of a class fits
into some hundred kilobytes.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from tinyvllm.errors import TinyVLLMError

FORMAT, VERSION = "tinyvllm-trace", 1


class TraceError(TinyVLLMError, ValueError):
    """A file that is not a trace, or one that is damaged."""


class Trace:
    """Events of one run, in order. metadata: anything that JSON can hold."""

    def __init__(self, events: Iterable[Event], metadata: dict[str, Any] | None = None):
        self.events = list(events)
        self.metadata = dict(metadata or {})

    def __len__(self) -> int:
        return len(self.events)

    @property
    def duration_s(self) -> float:
        """From the first event to the last, in seconds."""
        return (self.events[-1].t_ns - self.events[0].t_ns) / 1e9 if self.events else 0.0

    def state(self, until_ns: int | None = None) -> EngineState:
        """The engine's state after the last event, or after those up to a time: scrubbing back through a run."""
        state = EngineState()
        for event in self.events:
            if until_ns is not None and event.t_ns > until_ns:
                break
            state.apply(event)
        return state

    def replay(self, speed: float = 1.0) -> Iterator[Event]:
        """Yield the events at the times at which they happened, `speed` times as fast (infinity: at once)."""
        if not speed > 0:
            raise ValueError(f"speed must be above 0, got {speed}")
        start = time.perf_counter()
        for event in self.events:
            due = start + (event.t_ns - self.events[0].t_ns) / 1e9 / speed
            time.sleep(max(0.0, due - time.perf_counter()))
            yield event

    # ---- files ----

    def save(self, path: str | Path) -> Path:
        """Write the trace. The directory must exist."""
        path = Path(path)
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "version": VERSION, **self.metadata}) + "\n")
            for event in self.events:
                file.write(json.dumps(event, separators=(",", ":"), ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace. Raises TraceError, naming file and line, for anything that is none; FileNotFoundError."""
        path = Path(path)
        events = []
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                    if number == 1:
                        metadata = cls._check_header(path, value)
                    else:
                        events.append(Event(*value))
                except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as problem:
                    raise TraceError(f"{path}, line {number}: not an event of a trace ({problem})") from None
        if not events:
            raise TraceError(f"{path} holds no events: it is empty or was cut off")
        return cls(events, metadata)

    @staticmethod
    def _check_header(path: Path, header: Any) -> dict[str, Any]:
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise TraceError(f"{path} is not a {FORMAT} file: its first line must say so")
        if header.get("version") != VERSION:
            raise TraceError(f"{path} is of version {header.get('version')!r}; this tinyvllm reads version {VERSION}")
        return {name: value for name, value in header.items() if name not in ("format", "version")}

    # ---- Chrome / Perfetto ----

    def chrome_events(self) -> list[dict[str, Any]]:
        """The run in Chrome's trace event format: steps, the spans of each request, counters. Times in microseconds."""
        state = self.state()
        if not self.events:
            return []
        origin, end = self.events[0].t_ns, self.events[-1].t_ns

        def us(t_ns: int) -> float:
            return (t_ns - origin) / 1e3

        found = [_named("process_name", 1, 0, "engine"), _named("process_name", 2, 0, "requests"),
                 _named("thread_name", 1, 1, "steps")]
        for step in state.steps:
            found.append({"ph": "X", "pid": 1, "tid": 1, "name": f"step {step.step}", "cat": "step",
                          "ts": us(step.begin_ns), "dur": us(step.end_ns or end) - us(step.begin_ns),
                          "args": {"tokens": step.num_tokens, "requests": len(step.batch), "error": step.error}})
            found.append({"ph": "C", "pid": 1, "name": "tokens in the step", "ts": us(step.begin_ns),
                          "args": {"tokens": step.num_tokens}})
        for row, request in enumerate(state.requests.values(), start=1):
            found.append(_named("thread_name", 2, row, f"request {request.request_id}"))
            for span in request.spans:
                found.append({"ph": "X", "pid": 2, "tid": row, "name": span.kind, "cat": "request",
                              "ts": us(span.start_ns), "dur": us(span.end_ns or end) - us(span.start_ns),
                              "args": {"prompt tokens": request.num_prompt_tokens,
                                       "cached": request.num_cached_tokens}})
        return [*found, *self._used_blocks(us)]

    def to_chrome(self, path: str | Path) -> Path:
        """Write it for chrome://tracing or ui.perfetto.dev."""
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": self.chrome_events(), "displayTimeUnit": "ms",
                                    "otherData": self.metadata}), encoding="utf-8")
        return path

    def _used_blocks(self, us) -> Iterator[dict[str, Any]]:
        state = EngineState()
        for event in self.events:
            state.apply(event)
            if event.kind.startswith("blocks_"):
                yield {"ph": "C", "pid": 1, "name": "KV blocks in use", "ts": us(event.t_ns),
                       "args": {"blocks": state.num_used_blocks}}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
