"""EngineState.apply_all: whatever events come, cut wherever, it leaves what `apply` leaves, one after the other."""

import random
from pathlib import Path

import pytest

from tests.toy import AheadToyRunner, ToyRunner, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine import state_runs
from tinyvllm.engine.events import Event, EventLog
from tinyvllm.engine.state import EngineState
from tinyvllm.engine.trace import Trace

TRACES = sorted((Path(__file__).parent.parent / "notebooks" / "traces").glob("*.jsonl.gz"))


def storm(seed: int, num_steps: int = 250, **options) -> list[Event]:
    """A toy engine's events: arrivals, aborts, failing steps, preemptions, steps ahead, state told again."""
    draw, log = random.Random(seed), EventLog()
    engine = toy_engine(runner_type=draw.choice([ToyRunner, AheadToyRunner]), **options)
    engine.listen(log)
    for _ in range(num_steps):
        if draw.random() < 0.25:
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=draw.randrange(1, 40)))
        if draw.random() < 0.02 and engine.scheduler.running:
            engine.abort(engine.scheduler.running[0].request_id)
        if draw.random() < 0.01:
            engine.listen(log)
        engine.runner.fail_next = draw.random() < 0.02
        try:
            engine.step(ahead=draw.random() < 0.8)
        except RuntimeError:
            pass
    return log.read()[0]


def pieces(events: list[Event], seed: int, longest: int = 200):
    draw, at = random.Random(seed), 0
    while at < len(events):
        size = draw.choice([1, 2, draw.randint(1, 20), draw.randint(1, longest)])
        yield events[at:at + size]
        at += size


def assert_applied_alike(events: list[Event], seed: int = 0, **options) -> EngineState:
    """Compare after every piece; returns the state at the end."""
    one, all_ = EngineState(**options), EngineState(**options)
    for piece in pieces(events, seed):
        expected = [event for event in piece if one.apply(event)]
        assert all_.apply_all(piece) == expected
        assert vars(all_) == vars(one)
    for name in ("requests", "unfinished", "block_owners", "_finished"):
        assert list(getattr(all_, name)) == list(getattr(one, name))  # in the same order
    return all_


def renumbered(events) -> list[Event]:
    return [event._replace(seq=seq) for seq, event in enumerate(events, start=events[0].seq)]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name)
def test_recorded_runs_come_out_the_same_wherever_they_are_cut(path):
    state = assert_applied_alike(Trace.load(path).events, seed=len(path.name), kept_steps=300, kept_requests=5)
    assert state.steps[-1].end_ns and len(state.requests) >= 5


@pytest.mark.parametrize("options", [
    dict(num_blocks=200, max_num_seqs=8), dict(num_blocks=9, max_num_seqs=5), dict(num_blocks=16, block_size=1),
    dict(num_blocks=40, max_num_batched_tokens=5), dict(num_blocks=30, scheduling_policy="static"),
    dict(num_blocks=30, use_kv_cache=False, enable_prefix_caching=False)], ids=str)
def test_storms_come_out_the_same(options):
    for seed in range(4):
        state = assert_applied_alike(storm(seed, **options), seed, kept_requests=7)
        assert len(state.steps) > 50


@pytest.mark.parametrize("seed", range(6))
def test_so_do_logs_with_something_missing_and_ids_that_nobody_knows(seed):
    draw = random.Random(seed)
    events = storm(seed, num_blocks=30, max_num_seqs=6)
    first, last = sorted(draw.sample(range(len(events)), 2))
    assert assert_applied_alike([*events[:first], *events[last:]], seed).gaps in (0, last - first)
    for lost in ("request_added", "request_scheduled", "request_finished", "step_begun", "step_ended", "tokens"):
        left = renumbered([event for event in events if event.kind != lost or draw.random() < 0.6])
        assert_applied_alike(left, seed)
    mixed = events[1:]
    for i in range(0, len(mixed) - 4, 4):  # as no engine tells it
        mixed[i:i + 4] = draw.sample(mixed[i:i + 4], 4)
    assert_applied_alike(renumbered([events[0], *mixed]), seed)


def steady(names="abc", num_steps=30) -> list[Event]:
    events = []

    def emit(kind, request_id=None, a=None, b=None):
        events.append(Event(len(events), 10 * len(events), kind, 0, request_id, a, b))

    emit("engine_config", None, {"use_kv_cache": True})
    for name in names:
        emit("request_added", name, 3, 100)
        emit("request_scheduled", name, 0, 0)
    for step in range(num_steps):
        emit("step_begun", None, len(names), tuple((name, 3 + step, 1, True) for name in names))
        emit("step_ended", None, 7)
        emit("tokens", None, tuple((name, step, f" {step}") for name in names))
    return events


def changed(events, index, **changes):
    events = list(events)
    events[index] = events[index]._replace(**changes)
    return events


def test_steps_that_are_not_what_they_seem_to_be_break_a_run():
    events = steady()
    begun = [i for i, event in enumerate(events) if event.kind == "step_begun"]
    tokens = [i for i, event in enumerate(events) if event.kind == "tokens"]
    for rows in ((("a", 9, 3, True), ("b", 9, 1, True), ("c", 9, 1, True)), (("a", 9, 1, True),), (),
                 (("a", 9, 1, True), ("b", 9, 1, True), ("c", 9, 1, True), ("x", 1, 1, True))):
        assert_applied_alike(changed(events, begun[7], a=sum(row[2] for row in rows), b=rows))
    for rows in ((("a", 3, 1, True), ("b", 3, 0, True), ("c", 3, 2, True)), (("a", 1, 1, True),) * 3,
                 (("a", 3, 1, True), ("b", 2, 1, True), ("x", 3, 1, True))):
        for ends in range(1, 6):  # it begins or ends a run with what no engine tells
            assert_applied_alike(changed(events[:begun[ends]], begun[0], b=rows))
            assert_applied_alike(changed(events[:begun[ends]], begun[ends - 1], b=rows))
    twice = (("a", 50, "x"), ("a", 51, "y"), ("b", 52, ""))
    for i in tokens[7:9]:  # one request with two tokens, in two events that are alike otherwise
        events = changed(events, i, a=twice)
    state = assert_applied_alike(events)
    assert state.requests["a"].token_ids[6:13] == [6, 50, 51, 50, 51, 9, 10]
    assert_applied_alike(changed(events, tokens[9], b=[1, 2, 3]))
    assert_applied_alike(changed(events, tokens[9], a=()))
    events.insert(begun[9] + 1, Event(0, 0, "step_failed", 0, None, "it fell over", None))
    assert assert_applied_alike(renumbered(events)).steps[9].error == "it fell over"


def test_an_unknown_kind_is_refused_and_what_came_before_it_counts():
    events, state = steady(num_steps=3), EngineState()
    with pytest.raises(ValueError, match="unknown kind of event 'dance'"):
        state.apply_all([*events, Event(len(events), 0, "dance", 0, None, None, None)])
    assert len(state.steps) == 3 and state.apply_all([]) == []


def test_a_run_is_taken_in_at_once(monkeypatch):
    events, visits = steady(num_steps=20), []
    monkeypatch.setattr(EngineState, "_tokens", lambda *_: visits.append("tokens"))
    monkeypatch.setattr(EngineState, "_step_begun", lambda *_: visits.append("begun"))
    monkeypatch.setattr(EngineState, "_step_ended", lambda *_: visits.append("ended"))
    state = EngineState()
    state.apply_all(events[:1])
    state.apply_all(events[1:])
    assert not visits and len(state.requests["b"].token_ids) == len(state.steps) == 20
    assert state_runs.are_usual(state, [events[-1]._replace(seq=len(events))])
