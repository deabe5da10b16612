"""ReplayEngine: a recorded run behind LiveEngine's interface, in time, step by step, and once more."""

import time

import pytest

from tests.test_events import assert_state_equals_engine, catch_up
from tests.test_live_engine import until
from tests.toy import toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import Event, EventLog
from tinyvllm.engine.replay import ReplayEngine, ReplayError
from tinyvllm.engine.state import EngineState
from tinyvllm.engine.trace import Trace, TraceError
from tinyvllm.errors import ConfigError, TinyVLLMError


def record(num_requests=5, pause_s=0.0):
    """(engine, events, sequence number after each step) of a run with preemptions, prefix hits, arrivals, an abort."""
    engine, log = toy_engine(num_blocks=6), EventLog()
    engine.listen(log)
    for i in range(num_requests - 1):
        engine.add_request([1, 2, 3, 4, i], SamplingParams(temperature=0, max_tokens=9), f"r{i}")
    ends = []
    while engine.has_unfinished_requests():
        engine.step()
        ends.append(log.next_seq)
        if len(ends) == 4:
            engine.add_request([1, 2, 3, 4, 9], SamplingParams(temperature=0, max_tokens=9), "late")
        if len(ends) == 6:
            engine.abort("r1")
            engine.take_pending()
        time.sleep(pause_s)
    return engine, log.read()[0], ends


@pytest.fixture(scope="module")
def recorded():
    return record()


@pytest.fixture(scope="module")
def slow():
    """A trace with 10 ms between steps."""
    return Trace(record(pause_s=0.01)[1])


@pytest.fixture
def replay():
    """replay(trace, **options): a ReplayEngine that is closed afterwards."""
    made = []

    def make(*arguments, **options):
        made.append(ReplayEngine(*arguments, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def without_seq(events):
    return [event[1:] for event in events]


def shown(engine):
    return without_seq(engine.events.read()[0])


def test_everything_is_emitted_again_with_its_own_time_and_step(recorded, replay):
    engine, events, _ = recorded
    replayed = replay(Trace(events), rate=float("inf"))
    replayed.wait_idle()
    assert shown(replayed) == without_seq(events) and replayed.state == "idle"
    assert [event.seq for event in replayed.events.read()[0]] == list(range(len(events)))
    assert replayed.now_ns() == events[-1].t_ns
    state = EngineState()
    catch_up(state, replayed.events)
    assert_state_equals_engine(state, engine)


def test_distances_are_the_recorded_ones_divided_by_the_rate(slow, replay):
    for rate in (1, 2, 0.5):
        start = time.perf_counter()
        engine = replay(slow, rate=rate)
        while engine.state == "running":
            now, count = engine.now_ns(), len(engine.events)
            elapsed = time.perf_counter() - start
            assert (slow.events[count - 1].t_ns - slow.events[0].t_ns) / 1e9 / rate <= elapsed, "before its time"
            assert slow.events[0].t_ns <= now <= slow.events[min(count, len(slow) - 1)].t_ns, "past what is to come"
            time.sleep(0.0005)
        took = time.perf_counter() - start
        assert slow.duration_s / rate <= took < slow.duration_s / rate + 5  # a busy machine is late
        assert len(engine.events) == len(slow)


def test_the_clock_goes_at_the_rate_and_stops_with_the_replay(slow, replay):
    gap = Trace([*slow.events[:2], slow.events[2]._replace(t_ns=slow.events[1].t_ns + 10**12)])
    engine = replay(gap, rate=2)
    start, real = engine.now_ns(), time.perf_counter_ns()
    time.sleep(0.1)
    gained, real = engine.now_ns() - start, time.perf_counter_ns() - real
    assert 0.19e9 < gained <= 2 * real + 1e6
    engine.pause()
    until(lambda: engine.state == "paused")
    stands = engine.now_ns()
    time.sleep(0.02)
    assert engine.now_ns() == stands and len(engine.events) == 2  # it does not wait for what is far off
    engine.resume()
    until(lambda: engine.now_ns() > stands + 10**7)
    engine.set_rate(10**4)
    engine.wait_idle(20)
    assert engine.now_ns() == gap.events[-1].t_ns


def test_a_paused_replay_shows_whole_steps_as_a_paused_engine_does(recorded, replay):
    _, events, ends = recorded
    engine = replay(Trace(events), paused=True)
    until(lambda: len(engine.events) == 5)  # the configuration and four arrivals
    assert engine.state == "paused"
    outside = ("request_added", "request_finished", "blocks_freed")
    for number, end in enumerate(ends, start=1):
        engine.step()
        until(lambda end=end: len(engine.events) >= end and engine.state != "running")
        extra = events[end:len(engine.events)]
        assert {event.kind for event in extra} <= set(outside), "it went into the next step's scheduling"
        state = Trace(engine.events.read()[0]).state()
        assert state.steps[-1].step == number and state.steps[-1].end_ns is not None
        if number == 4:
            assert state.requests["late"].status == "waiting"
        if number == 6:
            assert state.requests["r1"].status == "abort"
    assert len(engine.events) == len(events) and engine.state == "idle"


def test_several_steps_at_once_and_on_from_there(recorded, replay):
    _, events, ends = recorded
    engine = replay(Trace(events), paused=True)
    engine.step(3)
    until(lambda: engine.state == "paused" and len(engine.events) >= ends[2])
    assert engine.now_ns() == events[len(engine.events) - 1].t_ns
    time.sleep(0.02)
    assert Trace(engine.events.read()[0]).state().steps[-1].step == 3
    engine.resume()
    engine.wait_idle()
    assert shown(engine) == without_seq(events)
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ConfigError, match="whole number of 1 or more"):
            engine.step(wrong)


def test_pausing_in_the_middle_of_a_step_finishes_it(slow, replay):
    middles = [i for i, event in enumerate(slow.events) if event.kind == "step_begun"]
    far = slow.events[middles[2]].t_ns
    # The third step takes a thousand seconds.
    stretched = [e if e.seq <= middles[2] else e._replace(t_ns=e.t_ns + 10**12) for e in slow.events]
    engine = replay(Trace(stretched), rate=10)
    until(lambda: len(engine.events) == middles[2] + 1)
    for call in (engine.pause, engine.pause):
        call()
        until(lambda: engine.state == "paused")
        steps = Trace(engine.events.read()[0]).state().steps
        assert len(steps) == 3 and steps[-1].end_ns is not None and engine.now_ns() > far
    count = len(engine.events)
    engine.resume()
    until(lambda: len(engine.events) > count)
    engine.reset()
    since = engine.events.next_seq
    until(lambda: len(engine.events.read(since)[0]) == middles[2] + 1)
    engine.step(2)  # it ends the step first
    until(lambda: engine.state == "paused" and len(engine.events.read(since)[0]) >= middles[4])
    assert len(Trace(engine.events.read(since)[0]).state().steps) == 5


def far_away(events, count, *more):
    """A trace of so many events, and then, a thousand seconds later, others."""
    later = events[count - 1].t_ns + 10**12
    return Trace([*events[:count], *(Event(count + i, later, *what) for i, what in enumerate(more))])


@pytest.mark.parametrize("more", [
    [("request_added", 2, "x", 3, 9)],
    [("request_finished", 2, "r1", "abort", 1)],
    [("blocks_freed", 2, "r1", [1], None), ("request_finished", 2, "r1", "abort", 1)],
    [("engine_config", 0, None, {}, None)],
], ids=lambda more: more[0][0])
def test_pausing_after_a_step_does_not_hasten_what_came_long_after(recorded, replay, more):
    _, events, ends = recorded
    engine = replay(far_away(events, ends[1], *more), rate=10)
    until(lambda: len(engine.events) == ends[1])
    engine.pause()
    until(lambda: engine.state == "paused")
    stands = engine.now_ns()
    assert len(engine.events) == ends[1] and stands < events[ends[1] - 1].t_ns + 5 * 10**11
    engine.set_rate(1000)
    time.sleep(0.02)
    assert engine.now_ns() == stands, "a new rate sets a paused clock going"
    engine.step()
    until(lambda: len(engine.events) == ends[1] + len(more))


def test_a_reset_in_a_recorded_run_is_no_step(recorded, replay):
    _, events, ends = recorded
    once = events[:ends[3]]
    moved = [e._replace(seq=e.seq + len(once), t_ns=e.t_ns + once[-1].t_ns) for e in once]
    engine = replay(Trace([*once, *moved]), paused=True)
    engine.step(4)
    until(lambda: engine.state == "paused" and len(engine.events) >= len(once) + 5)
    time.sleep(0.02)
    assert len(engine.events) == len(once) + 5  # the second run's configuration and four arrivals
    engine.step()
    until(lambda: engine.state == "paused" and len(engine.events) > len(once) + 5)
    assert Trace(engine.events.read()[0]).state().steps[-1].step == 1


def test_under_a_speed_limit_a_step_takes_as_long_as_it_took(replay):
    events = [Event(0, 0, "engine_config", 0, None, {}, None)]
    for step in range(1, 4):  # every 50 ms a step of 40 ms
        for t_ms, kind, a, b in ((50, "step_begun", 0, []), (90, "step_ended", 1, None)):
            events.append(Event(len(events), (50 * step + t_ms) * 10**6, kind, step, None, a, b))
    log, times = EventLog(), []
    emit_at = log.emit_at
    log.emit_at = lambda *event: (times.append(time.perf_counter()), emit_at(*event))
    replay(Trace(events), events=log, steps_per_second=5).wait_idle()
    for begun in (1, 3, 5):
        assert times[begun + 1] - times[begun] > 0.03
    assert times[3] - times[1] > 0.18 and times[5] - times[3] > 0.18


def test_the_slowest_rate_is_still_heard(slow, replay):
    engine = replay(slow, rate=1e-15)
    until(lambda: len(engine.events) > 0)
    time.sleep(0.05)
    assert engine.state == "running" and engine.error is None
    engine.set_rate(float("inf"))
    engine.wait_idle(5)


def test_speed_limits_the_steps_and_never_hastens_them(slow, replay):
    steps = sum(event.kind == "step_begun" for event in slow.events)
    start = time.perf_counter()
    replay(slow, steps_per_second=40).wait_idle()  # recorded at about 90
    assert (steps - 1) / 40 <= time.perf_counter() - start < steps / 40 + 5
    start = time.perf_counter()
    replay(slow, steps_per_second=10_000).wait_idle()
    assert time.perf_counter() - start >= slow.duration_s


def test_lifting_the_limit_does_not_hasten_what_was_held_back(slow, replay):
    engine = replay(slow, steps_per_second=0.5)
    until(lambda: len(engine.events) > 8)
    time.sleep(0.3)  # the second step is due long since, were it not for the limit
    start, reached = time.perf_counter(), engine.now_ns()
    engine.set_speed(None)
    engine.wait_idle()
    assert time.perf_counter() - start >= (slow.events[-1].t_ns - reached) / 1e9
    with pytest.raises(ConfigError, match="number of steps a second above 0"):
        engine.set_speed(0)


def test_stop_ends_it_where_it_is_and_reset_begins_again(recorded, replay):
    _, events, ends = recorded
    engine = replay(Trace(events), paused=True)
    engine.step(2)
    until(lambda: engine.state == "paused" and len(engine.events) >= ends[1])
    engine.stop()
    engine.wait_idle()
    count = len(engine.events)
    assert engine.state == "idle" and ends[1] <= count < ends[2]
    for call in (engine.resume, engine.step, engine.pause):
        call()
    engine.wait_idle()
    assert len(engine.events) == count and engine.now_ns() == events[count - 1].t_ns
    engine.reset()
    engine.resume()
    engine.set_rate(float("inf"))
    engine.wait_idle()
    assert shown(engine)[count:] == without_seq(events)
    state = EngineState()
    catch_up(state, engine.events)
    assert [s.step for s in state.steps] == [s.step for s in Trace(events).state().steps]
    with pytest.raises(ReplayError, match="recorded run: reset cannot change block_size in it"):
        engine.reset(block_size=4)


def test_stop_is_heard_while_it_waits_for_a_far_event(slow, replay):
    far = [*slow.events[:3], slow.events[3]._replace(t_ns=slow.events[2].t_ns + 10**12)]
    engine = replay(Trace(far))
    until(lambda: len(engine.events) == 3)
    start = time.perf_counter()
    engine.stop()
    engine.wait_idle()
    assert time.perf_counter() - start < 0.15
    engine.reset()
    start = time.perf_counter()
    engine.close()
    assert time.perf_counter() - start < 0.15 and engine.state == "closed"


def test_telling_again_what_has_not_begun_tells_nothing(recorded, replay):
    engine = replay(Trace(recorded[1]), rate=float("inf"))
    for _ in range(100):
        engine.reset(), engine.tell_again()
    engine.wait_idle()
    assert all(e.b is None or e.b >= 0 for e in engine.events.read()[0] if e.kind == "engine_config")
    state = EngineState()
    catch_up(state, engine.events)
    assert state.requests == Trace(recorded[1]).state().requests


def test_whoever_fell_behind_is_told_again(recorded, replay):
    _, events, _ = recorded
    engine = replay(Trace(events), paused=True)
    engine.step(5)
    until(lambda: engine.state == "paused" and len(engine.events) > 20)
    whole = EngineState()
    catch_up(whole, engine.events)
    since = engine.events.next_seq
    engine.tell_again()
    until(lambda: engine.events.next_seq == 2 * since)
    known = {name: id(request) for name, request in whole.requests.items()}
    catch_up(whole, engine.events)
    assert {name: id(request) for name, request in whole.requests.items()} == known, "who knows it was told anew"
    again, late = engine.events.read(since)[0], EngineState()
    assert again[0].kind == "engine_config" and again[-1].t_ns == engine.now_ns()
    for event in again:
        late.apply(event)
    assert late.requests == whole.requests and late.steps == whole.steps and late.config == whole.config
    assert late.block_owners == whole.block_owners and late.cached_blocks == whole.cached_blocks
    engine.resume()
    engine.set_rate(float("inf"))
    engine.wait_idle()
    catch_up(late, engine.events)
    assert late.requests == Trace(events).state().requests


REFUSED = {"add": ("x",), "chat": ([],), "stream": ("x",), "abort": ("0",), "set_policy": (), "on_output": (print,)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_running_engine_is_refused_in_plain_words(recorded, replay, name):
    engine = replay(Trace(recorded[1]), paused=True)
    with pytest.raises(TinyVLLMError, match="this is a recorded run: .*use a LiveEngine"):
        getattr(engine, name)(*REFUSED[name])
    assert engine.error is None


def test_looking_into_the_model_is_refused_by_the_future(recorded, replay):
    future = replay(Trace(recorded[1]), paused=True).between_steps(print)
    with pytest.raises(TinyVLLMError, match="this is a recorded run: there is no model"):
        future.result(timeout=1)


def test_texts_of_tokens_come_from_the_recording(recorded, replay):
    engine = replay(Trace(recorded[1], {"vocabulary": {"7": " fox"}, "model": "toy"}), paused=True)
    assert engine.token_text(7) == " fox" and engine.token_text(8) is None
    assert engine.metadata["model"] == "toy" and engine.kind == "replay"
    assert replay(Trace(recorded[1]), paused=True).token_text(7) is None


def test_it_opens_files_and_refuses_nonsense(recorded, replay, tmp_path):
    path = Trace(recorded[1]).save(tmp_path / "run.jsonl")
    engine = replay(path, rate=float("inf"))
    engine.wait_idle()
    assert shown(engine) == without_seq(recorded[1])
    for rate in (0, -1, float("nan"), "2", True, None):
        with pytest.raises(ConfigError, match="rate must be a number above 0"):
            ReplayEngine(path, rate=rate)
    with pytest.raises(ConfigError, match="rate must be a number above 0"):
        engine.set_rate(0)
    with pytest.raises(TraceError, match="holds no events"):
        ReplayEngine(Trace([]))
    engine.close()
    with pytest.raises(TinyVLLMError, match="this ReplayEngine is closed: make a new one"):
        engine.reset()


def test_a_trace_without_steps_replays_too(replay):
    events = [Event(0, 10, "engine_config", 0, None, {}, None), Event(1, 20, "request_added", 0, "a", 3, 9)]
    engine = replay(Trace(events), paused=True)
    until(lambda: len(engine.events) == 2)
    engine.step()
    until(lambda: engine.state == "idle")
    assert engine.now_ns() == 20
