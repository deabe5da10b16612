"""Traces: what is saved comes back, replays in time, scrubs, and opens in Perfetto."""

import gzip
import json
import time

import pytest

from tests.test_events import assert_state_equals_engine
from tests.toy import run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import Event, EventLog
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


HEADER = '{"format": "tinyvllm-trace", "version": 1}\n'


@pytest.mark.parametrize("content, message", [
    ("", "holds no events"),
    ("hello\n", "line 1: not an event"),
    ("[1,2]\n", "is not a tinyvllm-trace file"),
    ('{"format": "tinyvllm-trace", "version": 9}\n', "is of version 9; this tinyvllm reads version 1"),
    ('{"format": "tinyvllm-trace", "version": 1}\n', "holds no events"),
    ('{"format": "tinyvllm-trace", "version": 1}\n[0,1,"tok', "line 2: not an event"),
    ('{"format": "tinyvllm-trace", "version": 1}\n[0,1]\n', "line 2: not an event"),
    (HEADER + '[0,1,"engine_config",0,null,{},null]\n[1,2,"dance",0,null,null,null]\n',
     "line 3: .*unknown kind of event 'dance': this trace is from a newer version"),
    (HEADER + '[0,"soon","engine_config",0,null,{},null]\n', "line 2: .*its t_ns must be a whole number, got 'soon'"),
    (HEADER + '[0,1.5,"engine_config",0,null,{},null]\n', "line 2: .*its t_ns must be a whole number, got 1.5"),
    (HEADER + '[0,1,"engine_config",0,null,{},null]\n[1,2,"tokens",0,null,[["a",1]],null]\n', "line 3: not an event"),
    (HEADER + '[0,1,"engine_config",0,null,{},null]\n[1,2,"step_begun",1,null,3,7]\n', "line 3: not an event"),
    (HEADER + '[0,1,["engine_config"],0,null,{},null]\n', "line 2: not an event"),
    (HEADER + "[" * 100_000 + "\n", "line 2: not an event"),
])
def test_damaged_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(TraceError, match=message):
        Trace.load(path)


def test_compressed_files_come_back_and_are_the_same_bytes_twice(recorded, tmp_path):
    _, trace = recorded
    plain, small = trace.save(tmp_path / "run.jsonl"), trace.save(str(tmp_path / "run.jsonl.gz"))
    assert gzip.decompress(small.read_bytes()) == plain.read_bytes() and small.stat().st_size < plain.stat().st_size / 2
    again = Trace.load(small)
    assert again.events == trace.events and again.metadata == trace.metadata
    time.sleep(1.1)  # gzip would note the second
    assert trace.save(tmp_path / "other.jsonl.GZ").read_bytes() == small.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_damaged_compressed_files_are_refused_in_words(recorded, tmp_path):
    _, trace = recorded
    path = trace.save(tmp_path / "run.jsonl.gz")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    for bad in (good[:len(good) // 2], good[:-4], good[:-8] + b"12345678", b"hello", bytes(flipped)):
        path.write_bytes(bad)
        with pytest.raises(TraceError, match="run.jsonl.gz, (after line|line)"):
            Trace.load(path)
    path.write_bytes(b"")
    with pytest.raises(TraceError, match="holds no events"):
        Trace.load(path)
    (tmp_path / "run.jsonl").write_bytes(good)
    with pytest.raises(TraceError, match="run.jsonl, line 1: not an event"):
        Trace.load(tmp_path / "run.jsonl")


def test_prompts_can_be_left_out(recorded, tmp_path):
    engine, trace = recorded
    said = sorted({i for r in trace.state().requests.values() for i in r.token_ids})
    trace = Trace(trace.events, {"vocabulary": {str(i): f"<{i}>" for i in {*said, 1, 2, 3, 4}}})
    again = Trace.load(trace.save(tmp_path / "run.jsonl", prompt_ids=False))
    assert [e.a for e in again.events if e.kind == "request_added"] == [5] * 5
    assert again.metadata == {"vocabulary": {str(i): f"<{i}>" for i in said}}
    state = again.state()
    assert_state_equals_engine(state, engine)
    assert all(r.prompt_token_ids is None and r.num_prompt_tokens == 5 for r in state.requests.values())
    assert trace.events[1].a == [1, 2, 3, 4, 0], "the trace itself was changed"


def test_what_cannot_be_written_is_said_and_loses_no_file(recorded, tmp_path):
    _, trace = recorded
    path = trace.save(tmp_path / "run.jsonl")
    good = path.read_bytes()
    odd = Event(1, 2, "request_added", 0, "a", {3}, 4)
    for bad, message in ((Trace(trace.events, {"when": time}), "the metadata cannot be written as JSON"),
                         (Trace(trace.events, {"version": 3}), "metadata cannot have the name 'version'"),
                         (Trace([*trace.events, odd]), "an event cannot be written as JSON")):
        with pytest.raises(TraceError, match=message):
            bad.save(path)
        assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TraceError, match="cannot be written as JSON"):
        Trace(trace.events, {"when": time}).to_chrome(path)
    assert path.read_bytes() == good


def test_any_request_id_can_be_saved(tmp_path):
    events = [Event(0, 1, "engine_config", 0, None, {}, None), Event(1, 2, "request_added", 0, "Grüße\ud800", 3, 4)]
    assert Trace.load(Trace(events).save(tmp_path / "run.jsonl.gz")).events == events


def test_a_full_disk_loses_no_file(recorded, tmp_path, monkeypatch):
    _, trace = recorded
    saved, chrome = trace.save(tmp_path / "run.jsonl"), trace.to_chrome(tmp_path / "chrome.json")
    good = saved.read_bytes(), chrome.read_bytes()
    opened = type(saved).open

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 300

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def full(self, mode="r", *more):
        file = opened(self, mode, *more)
        return Full(file) if "w" in mode else file

    monkeypatch.setattr(type(saved), "open", full)
    for write in (lambda: trace.save(saved), lambda: trace.to_chrome(chrome), lambda: trace.save(tmp_path / "x.gz")):
        with pytest.raises(OSError, match="No space left"):
            write()
    monkeypatch.undo()
    assert (saved.read_bytes(), chrome.read_bytes()) == good and set(tmp_path.iterdir()) == {saved, chrome}


def test_a_trace_with_lines_left_out_or_out_of_order_is_refused(recorded, tmp_path):
    _, trace = recorded
    lines = trace.save(tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    for bad, line in (([*lines[:9], *lines[10:]], 10), ([*lines[:9], lines[10], lines[9], *lines[11:]], 10),
                      ([*lines[:9], *lines[7:]], 10), ([lines[0], *lines[2:]], 2)):
        (tmp_path / "bad.jsonl").write_bytes(b"".join(bad))
        with pytest.raises(TraceError, match=f"bad.jsonl, line {line}: this does not follow from the lines before it"):
            Trace.load(tmp_path / "bad.jsonl")
    # But whoever fell behind, and was told the state anew, has a recording with a gap in its numbers.
    again = [event._replace(seq=event.seq + 1000) for event in trace.events]
    kept = Trace([*trace.events[:9], *again]).save(tmp_path / "gap.jsonl")
    assert len(Trace.load(kept)) == len(trace) + 9


def test_what_is_no_file_is_said_in_words(recorded, tmp_path):
    with pytest.raises(TraceError, match="is a folder: give the name of a trace file in it"):
        Trace.load(tmp_path)
    with pytest.raises(TypeError, match="a trace is a Trace, or the path of its file, got int"):
        Trace.load(5)


def test_what_comes_before_the_configuration_is_left_out(recorded):
    _, trace = recorded
    lost = [e for e in trace.events if e.kind == "tokens"][:2]
    assert Trace([*lost, *trace.events]).events == trace.events
    told_again = trace.events[0]._replace(b=len(trace) - 1)
    assert Trace([told_again, *trace.events[1:]]).events == trace.events


def test_the_chrome_form_shows_all_of_a_long_run_and_what_was_before_a_reset(tmp_path):
    events = [Event(0, 1000, "engine_config", 0, None, {}, None)]

    def add(kind, *what, step=0):
        events.append(Event(len(events), 1000 * (len(events) + 1), kind, step, *what))

    for life in range(2):
        for i in range(1500):  # more requests and steps than a class's state keeps
            add("request_added", f"r{i}", 1, 3)
            for step in range(4 * i, 4 * i + 4):
                add("step_begun", None, 1, [[f"r{i}", 0, 1, True]], step=step)
                add("step_ended", None, 500, None, step=step)
            add("request_finished", f"r{i}", "length", 2)
        if life == 0:
            add("engine_config", None, {}, None)
    data = json.loads(Trace(events).to_chrome(tmp_path / "chrome.json").read_text())["traceEvents"]
    assert sum(e.get("cat") == "step" for e in data) == 2 * 6000
    names = [(e["tid"], e["args"]["name"]) for e in data if e["name"] == "thread_name" and e["pid"] == 2]
    assert len(names) == 3000 == len({tid for tid, _ in names})


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
            start, length = int(event["ts"] * 1000), int(event["dur"] * 1000)  # nanoseconds, as Perfetto cuts them
            tracks.setdefault((event["pid"], event["tid"]), []).append((start, start + length))
    for spans in tracks.values():
        spans.sort()
        assert all(b[0] >= a[1] for a, b in zip(spans, spans[1:])), "slices of one track overlap"
    steps = [e for e in data["traceEvents"] if e.get("cat") == "step"]
    assert len(steps) == len(trace.state().steps)
    blocks = [e["args"]["blocks"] for e in data["traceEvents"] if e["name"] == "KV blocks in use"]
    assert max(blocks) == 6 and blocks[-1] == 0
