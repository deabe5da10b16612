"""Traces: the events of a run as a file, to save, reload, replay, and look at in Perfetto.

The file is JSON Lines: a first line with the format's name and version and whatever the recorder wants to say of the
run (model, machine, versions: recording.py), then one event a line as an array. It can be read with `head`, and a run
of a class fits into some hundred kilobytes. With a name that ends in .gz it is compressed, to about a quarter.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinyvllm.engine.chrome_trace import chrome_events
from tinyvllm.engine.event_check import check_event
from tinyvllm.engine.event_rows import Rows, columns_of
from tinyvllm.engine.events import Event
from tinyvllm.engine.recording import token_ids_in
from tinyvllm.engine.state import EngineState
from tinyvllm.errors import TinyVLLMError

FORMAT, VERSION = "tinyvllm-trace", 1


class TraceError(TinyVLLMError, ValueError):
    """A file that is not a trace, or one that is damaged; or what cannot be written as one."""


class Trace:
    """Events of one run, in order. metadata: anything that JSON can hold, under names other than format and version.

    What comes before the first engine_config is left out: nothing can be made of it.
    """

    def __init__(self, events: Iterable[Event], metadata: dict[str, Any] | None = None):
        events = list(events)
        first = next((i for i, event in enumerate(events) if event.kind == "engine_config"), None)
        if first is not None:
            events = [events[first]._replace(b=None), *events[first + 1:]]  # here nothing is told again
        self.events: list[Event] = events
        self.metadata = dict(metadata or {})

    def __len__(self) -> int:
        return len(self.events)

    @property
    def duration_s(self) -> float:
        """From the first event to the last, in seconds."""
        return (self.events[-1].t_ns - self.events[0].t_ns) / 1e9 if self.events else 0.0

    def state(self, until_ns: int | None = None) -> EngineState:
        """The engine's state after the last event, or after those up to a time, with every step and request."""
        state = EngineState(kept_steps=None, kept_requests=None)
        for event in self.events:
            if until_ns is not None and event.t_ns > until_ns:
                break
            state.apply(event)
        return state

    # ---- files ----

    def save(self, path: str | Path, prompt_ids: bool = True) -> Path:
        """Write the trace; the same trace gives the same bytes. The directory must exist.

        prompt_ids=False keeps of each prompt only how many tokens it has, for a file to give away. Raises TraceError
        for what cannot be written, OSError; a file that is there already is replaced only by a whole one.
        """
        return _write(path, (self if prompt_ids else self._without_prompts())._lines())

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace. Raises TraceError, naming file and line, for anything that is none; FileNotFoundError."""
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"a trace is a Trace, or the path of its file, got {type(path).__name__}")
        path = Path(path)
        if path.is_dir():
            raise TraceError(f"{path} is a folder: give the name of a trace file in it")
        metadata, events, state, number, has_begun = {}, [], EngineState(), 0, False
        try:
            with _open(path, "rb", _is_compressed(path)) as file:
                for number, line in enumerate(file, start=1):
                    if number == 1:
                        metadata = _check_header(path, _parse(line))
                    else:
                        events.append(_event(line))
                        state.apply(events[-1])  # an event that does not fit must not surprise a widget later
                        has_begun |= events[-1].kind == "engine_config"
                        if (state.gaps or not has_begun) and events[-1].kind != "engine_config":
                            raise TraceError(f"{path}, line {number}: this does not follow from the lines before it: "
                                             "some were left out, or are not in their order")
                        state.gaps = 0  # but where somebody fell behind, and was told the state anew
        except TraceError:
            raise
        except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
            raise TraceError(f"{path}, after line {number}: the compressed file is damaged or was cut off, or is "
                             f"not compressed at all ({problem})") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as problem:
            about = problem if isinstance(problem, ValueError) else f"{type(problem).__name__}: {problem}"
            raise TraceError(f"{path}, line {number}: not an event of a trace ({about})") from None
        if not events:
            raise TraceError(f"{path} holds no events: it is empty or was cut off")
        return cls(events, metadata)

    def _lines(self) -> Iterator[bytes]:
        reserved = sorted({"format", "version"} & self.metadata.keys())
        if reserved:
            raise TraceError(f"metadata cannot have the name {reserved[0]!r}, which the file itself needs")
        yield _json({"format": FORMAT, "version": VERSION, **self.metadata}, "the metadata")
        for event in self.events:
            yield _json(event, "an event")

    def _without_prompts(self) -> "Trace":
        events = [event._replace(a=len(event.a)) if event.kind == "request_added" and isinstance(event.a, list)
                  else event for event in self.events]
        metadata = self.metadata
        if "vocabulary" in metadata:  # of the prompts' tokens it would tell all but the order
            kept = set(map(str, token_ids_in(events)))
            metadata = {**metadata, "vocabulary": {i: t for i, t in metadata["vocabulary"].items() if i in kept}}
        return Trace(events, metadata)

    # ---- Chrome / Perfetto ----

    def to_chrome(self, path: str | Path) -> Path:
        """Write it for ui.perfetto.dev or chrome://tracing: steps, the spans of each request, counters."""
        about = {name: value for name, value in self.metadata.items() if name != "vocabulary"}
        return _write(path, [_json({"traceEvents": list(chrome_events(self.events)), "displayTimeUnit": "ms",
                                    "otherData": about})])


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _write(path: str | Path, lines: Iterable[bytes]) -> Path:
    """A file that is there already is replaced only by a whole one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with _open(part, "wb", _is_compressed(path)) as file:
            for line in lines:
                file.write(line)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


@contextlib.contextmanager
def _open(path: Path, mode: str, compressed: bool) -> Iterator[Any]:
    """The file, as bytes. Of time and name nothing goes into a compressed one: the same trace, the same bytes."""
    with path.open(mode) as raw:
        if not compressed:
            yield raw
            return
        with gzip.GzipFile(filename="", mode=mode, fileobj=raw, mtime=0) as file:
            yield file


def _json(value: Any, what: str = "this trace") -> bytes:
    """One line. Raises TraceError for what JSON cannot hold."""
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_as_list)
        try:
            return f"{text}\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot hold and JSON can
            return f"{json.dumps(value, separators=(',', ':'), default=_as_list)}\n".encode()
    except (RecursionError, TypeError, ValueError) as problem:
        raise TraceError(f"{what} cannot be written as JSON ({problem}): {str(value)[:200]}") from None


def _as_list(value: Any) -> list:
    if isinstance(value, Rows):
        return [*value]
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _parse(line: bytes) -> Any:
    return json.loads(line.decode())


def _event(line: bytes) -> Event:
    event = Event(*_parse(line))
    check_event(event)
    if event.kind == "tokens":
        return event._replace(a=_rows(event.a))
    if event.kind == "step_begun":
        return event._replace(b=_rows(event.b))
    return event


def _rows(rows: list) -> Rows | tuple:
    return Rows(*columns_of(rows)) if rows else ()


def _check_header(path: Path, header: Any) -> dict[str, Any]:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{path} is not a {FORMAT} file: its first line must say so")
    if header.get("version") != VERSION:
        raise TraceError(f"{path} is of version {header.get('version')!r}; this tinyvllm reads version {VERSION}")
    return {name: value for name, value in header.items() if name not in ("format", "version")}
