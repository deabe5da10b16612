"""Traces: what is saved comes back, replays in time, scrubs, and opens in Perfetto."""

import json
import time

import pytest

from tests.test_events import assert_state_equals_engine
from tests.toy import run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.trace import Trace, TraceError


@pytest.fixture(scope="module")
def recorded():
    """(engine, trace) of a run with preemptions, prefix hits and non-ASCII metadata."""
    engine, log = toy_engine(num_blocks=6), EventLog()
    engine.listen(log)
    for i in range(5):
        engine.add_request([1, 2, 3, 4, i], SamplingParams(temperature=0, max_tokens=9), f"r{i}")
    run(engine)
    events, _ = log.read()
    return engine, Trace(events, {"model": "toy", "note": "Grüße"})


def test_what_is_saved_comes_back(recorded, tmp_path):
    engine, trace = recorded
    again = Trace.load(trace.save(tmp_path / "run.jsonl"))
    assert again.events == trace.events and again.metadata == trace.metadata
    assert_state_equals_engine(again.state(), engine)
    assert {r.request_id: r.token_ids for r in again.state().requests.values()} == \
        {r.request_id: r.token_ids for r in trace.state().requests.values()}


def test_scrubbing_gives_the_state_at_that_time(recorded):
    _, trace = recorded
    middle = next(e for e in trace.events if e.kind == "request_preempted")
    state = trace.state(until_ns=middle.t_ns)
    assert state.requests[middle.request_id].status == "preempted" and state.next_seq == middle.seq + 1
    assert trace.state(until_ns=0).requests == {}


def test_replay_keeps_the_times(recorded):
    _, trace = recorded
    assert list(trace.replay(float("inf"))) == trace.events
    speed = trace.duration_s / 0.2  # so that it takes a fifth of a second
    start = time.perf_counter()
    assert sum(1 for _ in trace.replay(speed)) == len(trace)
    assert 0.19 < time.perf_counter() - start < 1.5
    with pytest.raises(ValueError, match="speed must be above 0"):
        next(trace.replay(0))


@pytest.mark.parametrize("content, message", [
    ("", "holds no events"),
    ("hello\n", "line 1: not an event"),
    ("[1,2]\n", "is not a tinyvllm-trace file"),
    ('{"format": "tinyvllm-trace", "version": 9}\n', "is of version 9; this tinyvllm reads version 1"),
    ('{"format": "tinyvllm-trace", "version": 1}\n', "holds no events"),
    ('{"format": "tinyvllm-trace", "version": 1}\n[0,1,"tok', "line 2: not an event"),
    ('{"format": "tinyvllm-trace", "version": 1}\n[0,1]\n', "line 2: not an event"),
])
def test_damaged_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(TraceError, match=message):
        Trace.load(path)


def test_the_chrome_form_follows_the_format_s_rules(recorded, tmp_path):
    """Rules of the Trace Event Format: phases, required fields by phase, times that do not overlap on one track."""
    _, trace = recorded
    data = json.loads(trace.to_chrome(tmp_path / "chrome.json").read_text())
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"} and data["displayTimeUnit"] in ("ms", "ns")
    tracks = {}
    for event in data["traceEvents"]:
        assert event["ph"] in "XCM" and isinstance(event["name"], str) and isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        else:
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(b[0] >= a[1] - 1e-3 for a, b in zip(spans, spans[1:])), "slices of one track overlap"
    steps = [e for e in data["traceEvents"] if e.get("cat") == "step"]
    assert len(steps) == len(trace.state().steps)
    blocks = [e["args"]["blocks"] for e in data["traceEvents"] if e["name"] == "KV blocks in use"]
    assert max(blocks) == 6 and blocks[-1] == 0
