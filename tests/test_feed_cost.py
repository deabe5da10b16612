"""What the feed costs the engine, counted and not timed: lines of Python, switches, threads, frames."""

import random
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

import widgets.pump as pump_module
from tests.feed_stand_ins import Page, SteppedFeed, SteppedSource
from tests.toy import VOCAB
from tinyvllm import SamplingParams
from tinyvllm.engine.live import LiveEngine
from widgets.answers.base import ANSWERS, answers
from widgets.attention_record import SIDE, AttentionRecord
from widgets.feed import Feed
from widgets.pace import (
    DEVICE_SWITCH_S,
    FRAMES_OF_MANY,
    MANY_TOPICS,
    SHARE,
    SLOWEST_S,
    SWITCH_S,
    Pace,
    Switches,
    switches,
)
from widgets.pump import LOOK_S, PATIENCE_S, PAUSE_S, PIECE_S, SHORT_PAUSE_S

TOPICS = ("control", "timeline", "blocks", "race", "attention", "step_anatomy")


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def lines_of(function) -> int:
    """How many lines of Python a call runs through, every turn of a loop counted."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return count


def feed_after(num_finished: int, topics=TOPICS) -> tuple[SteppedSource, SteppedFeed]:
    """A feed of four running requests, after so many others have ended."""
    source = SteppedSource(num_blocks=400, max_num_seqs=8)
    source.steps_per_second = None
    feed = SteppedFeed(source)
    for topic in topics:
        feed.page.ready(topic, view=topic)
    for i in range(num_finished):
        source.engine.add_request([1, 2, i % VOCAB], greedy(2))
    while source.engine.has_unfinished_requests():
        source.engine.step()
    for i in range(4):
        source.engine.add_request([3, 4, i], greedy(200))
    for _ in range(12):
        frame(source, feed)
    return source, feed


def frame(source, feed, steps=1):
    for _ in range(steps):
        source.engine.step()
    feed.tick()
    feed.flow.acknowledged(10**9)
    assert feed.error is None


@pytest.mark.parametrize("topic", [*TOPICS, "all"])
def test_a_frame_is_no_more_work_after_a_thousand_requests_than_after_ten(topic):
    counts = []
    for num_finished in (16, 900):
        source, feed = feed_after(num_finished, TOPICS if topic == "all" else (topic,))
        source.now_ns = lambda ahead=10**10: time.perf_counter_ns() + ahead  # the last second is long past
        frame(source, feed)
        counts.append(min(lines_of(lambda: frame(source, feed)) for _ in range(3)))  # noqa: B023
    assert counts[1] < 1.3 * counts[0], counts


def test_a_step_more_in_a_frame_costs_a_few_lines_for_each_event():
    source, feed = feed_after(0)
    frame(source, feed)
    before = source.events.next_seq
    few, seq_few = lines_of(lambda: frame(source, feed, 2)), source.events.next_seq
    many = lines_of(lambda: frame(source, feed, 42))
    events = (source.events.next_seq - seq_few) - (seq_few - before)
    engine = lines_of(lambda: [source.engine.step() for _ in range(40)])
    assert (many - few - engine) / events < 60  # of four requests each


def test_the_counts_of_the_state_are_those_of_its_requests():
    rng, source = random.Random(5), SteppedSource(num_blocks=9, max_num_seqs=5)
    feed = SteppedFeed(source)
    feed.state.kept_requests = 7
    seen = Counter()
    for step in range(400):
        name = f"r{rng.randrange(30)}"
        if rng.random() < 0.3 and not source.engine.has_request(name):
            source.engine.add_request([1, 2, 3, 4, 5][:rng.randint(1, 5)], greedy(rng.randint(1, 12)), name)
        if rng.random() < 0.04 and source.engine.scheduler.running:
            source.engine.abort(source.engine.scheduler.running[0].request_id)
        source.engine.step()
        if step == 250:
            feed.state._pass_over = -1  # as after a gap: what is told again is taken in anew
            source.tell_again()
        feed.tick()
        for state in (feed.state, feed.state.clone()):
            requests = list(state.requests.values())
            assert list(state.unfinished.values()) == [r for r in requests if r.finished_ns is None]
            assert +state.counts == Counter(r.status for r in requests)
            assert state.num_preempted == sum(span.kind == "preempted" for r in requests for span in r.spans)
            assert state.num_cached_tokens == sum(r.num_cached_tokens for r in requests)
            ended = list(state.finished_newest_first())
            assert ended == sorted(ended, key=lambda r: -r.finished_ns)
            assert len(ended) + len(state.unfinished) == len(requests)
        seen["preempted"] += state.num_preempted
        seen["cached"] += state.num_cached_tokens
        seen["forgotten"] += len(ended) == 7
    assert min(seen[what] for what in ("preempted", "cached", "forgotten")) > 0


def test_a_thumbnail_of_twice_the_tokens_has_the_largest_of_four_pixels():
    record, rng = AttentionRecord(2, 3, 1), np.random.default_rng(0)
    before = record.thumbnails[:] = rng.integers(0, 256, record.thumbnails.shape, np.uint8)
    expected = before.copy().reshape(6, SIDE // 2, 2, SIDE // 2, 2).max(axis=(2, 4))
    record._double()
    assert np.array_equal(record.thumbnails[:, :SIDE // 2, :SIDE // 2], expected)
    assert not record.thumbnails[:, SIDE // 2:].any() and not record.thumbnails[:, :, SIDE // 2:].any()


# ---- pace ----

def test_many_pictures_come_less_often_and_dear_ones_even_less():
    pace = Pace(20)
    assert pace.interval_s(1) == pace.interval_s(MANY_TOPICS - 1) == 1 / 20
    assert pace.interval_s(MANY_TOPICS) == 1 / FRAMES_OF_MANY > 1 / 20
    for _ in range(60):
        pace.spent(0.004)
    assert pace.interval_s(MANY_TOPICS) == pytest.approx(0.004 / SHARE, rel=0.01)
    for _ in range(60):
        pace.spent(0.1)
    assert pace.interval_s(1) == SLOWEST_S
    assert Pace(5).interval_s(6) == 1 / 5


def test_one_snapshot_does_not_slow_the_frames_after_it():
    pace = Pace(20)
    for _ in range(60):
        pace.spent(0.0005)
    pace.spent(0.5)
    assert pace.interval_s(6) == 1 / FRAMES_OF_MANY


def test_the_switch_interval_is_short_while_anybody_wants_it_and_then_what_it_was():
    switches_, before = Switches(), sys.getswitchinterval()
    a, b = object(), object()
    try:
        for who, wanted, interval in ((a, None, before), (a, 0.001, 0.001), (b, 0.0005, 0.0005), (a, None, 0.0005),
                                      (a, None, 0.0005), (b, 0.002, 0.002), (b, None, before)):
            switches_.quick(who, wanted)
            assert sys.getswitchinterval() == pytest.approx(interval)
        sys.setswitchinterval(0.0001)
        switches_.quick(a, 0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.0001, abs=3e-6)  # never longer than it was
        switches_.quick(a, None)
        assert sys.getswitchinterval() == pytest.approx(0.0001, abs=3e-6)
    finally:
        sys.setswitchinterval(before)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def test_only_an_engine_at_full_speed_that_is_shown_makes_switches_quick(make_llm):
    before = sys.getswitchinterval()
    with LiveEngine(make_llm()) as live:
        feed = Feed(live, hub=Page(), frames_per_second=100)
        live.on_output(lambda output: live.add([1, 2, 3], greedy(200)) if output.finished else None)
        live.add([1, 2, 3], greedy(200))
        time.sleep(0.1)
        assert sys.getswitchinterval() == before  # nobody looks
        feed.hub.ready("timeline")
        until(lambda: sys.getswitchinterval() == pytest.approx(SWITCH_S))
        live.set_speed(50)
        until(lambda: sys.getswitchinterval() == pytest.approx(before))
        live.set_speed(None)
        until(lambda: sys.getswitchinterval() == pytest.approx(SWITCH_S))
        feed.close()
        assert sys.getswitchinterval() == pytest.approx(before) and not switches._wanted


class Clock:
    """The time module, for a thread that works when the test says so."""

    def __init__(self):
        self.worked = self.now = 0.0
        self.pauses: list[float] = []

    def thread_time(self) -> float:
        return self.worked

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.worked += seconds
        self.now += seconds


@pytest.fixture
def pump_and_clock(monkeypatch):
    """A pump whose thread is the test's, of an engine that runs; and its clock."""
    clock, source = Clock(), SteppedSource()
    monkeypatch.setattr(pump_module, "time", clock)
    source.engine.add_request([1, 2, 3], greedy(9))
    pump = SteppedFeed(source)._pump_thread
    pump._thread = threading.current_thread()
    return pump, clock


def test_a_frame_pauses_after_every_piece_and_for_less_when_its_news_are_getting_old(pump_and_clock):
    pump, clock = pump_and_clock

    def tick():
        for _ in range(100):
            clock.work(PIECE_S / 4)
            pump.breathe()

    pump._feed.tick = tick
    pump._frame()
    assert 20 <= len(clock.pauses) <= 25  # 100 / 4, some less for what is left of a piece
    assert set(clock.pauses) == {PAUSE_S}
    clock.pauses.clear()
    pump._feed.tick = lambda: [tick() for _ in range(10)]
    pump._frame()
    assert clock.pauses == sorted(clock.pauses, reverse=True) and set(clock.pauses) == {PAUSE_S, SHORT_PAUSE_S}
    assert clock.pauses.count(PAUSE_S) == pytest.approx(PATIENCE_S / PAUSE_S, abs=1)
    for who in (lambda: setattr(pump, "_thread", None), lambda: pump._feed.source.engine.abort("0")):
        clock.pauses.clear()
        who()
        while pump._feed.source.state == "running" and pump._thread is not None:
            pump._feed.source.engine.step()
        tick()
        assert not clock.pauses  # in another's thread; while no engine runs
        pump._thread = threading.current_thread()


def test_a_frame_is_made_while_a_device_works(pump_and_clock):
    """Of each millisecond the device works 0.8, and the engine needs the interpreter in the rest of it."""
    pump, clock = pump_and_clock
    needed = []

    def spare_s():
        return max(0.0, 0.0008 - clock.now % 0.001)

    def tick():
        for _ in range(800):
            before = clock.now % 0.001
            clock.work(0.00001)
            needed.append(before >= 0.0008)
            pump.breathe()

    pump._feed.source.spare_s = spare_s
    pump._feed.tick = tick
    pump._frame()
    assert sum(needed) <= 6  # the first piece began whenever it did; 160 of 800 without a look at the device
    assert max(clock.pauses) <= SHORT_PAUSE_S and clock.now < 0.008 / 0.6
    pump._feed.source.spare_s = lambda: 0.0  # an engine that never waits, and news that become old
    needed.clear()
    clock.pauses.clear()
    pump._frame()
    assert 0.008 / PIECE_S * 0.8 < len(clock.pauses) < 0.008 / PIECE_S * 6  # still done, piece by piece


@pytest.mark.parametrize("waits_s, begun_s", [(0.0008, 0.0003), (0.00045, 0.0001)])
def test_a_frame_is_sent_where_the_device_s_wait_has_room_for_it(pump_and_clock, waits_s, begun_s):
    """Sending takes 0.2 ms, passing it on 0.3. begun_s: so far into a wait it may begin; where none is long enough, at
    the beginning of one."""
    pump, clock = pump_and_clock
    pump._feed.source.spare_s = lambda: max(0.0, waits_s - clock.now % 0.001)
    begun = []
    for _ in range(60):
        clock.now += 0.000737
        with pump.sending():
            begun.append(clock.now % 0.001)
            clock.work(0.0002)
    assert pump._send_s == pytest.approx(0.0002, rel=0.01)
    assert max(begun[30:]) < begun_s + 2 * LOOK_S
    assert set(clock.pauses) == {LOOK_S}
    clock.pauses.clear()
    pump._feed.source.spare_s = lambda: None  # an engine that computes itself
    with pump.sending():
        assert not clock.pauses
    pump._feed.source.spare_s = lambda: 0.0  # one that never waits, now: it is sent all the same
    with pump.sending():
        assert sum(clock.pauses) <= PATIENCE_S / 2


def test_only_the_interpreter_of_a_device_s_engine_is_handed_on_at_once(make_llm):
    before = sys.getswitchinterval()
    with LiveEngine(make_llm()) as live:
        live.spare_s = lambda: 0.0
        feed = Feed(live, hub=Page(), frames_per_second=100)
        live.on_output(lambda output: live.add([1, 2, 3], greedy(200)) if output.finished else None)
        live.add([1, 2, 3], greedy(200))
        feed.hub.ready("timeline")
        until(lambda: sys.getswitchinterval() == pytest.approx(DEVICE_SWITCH_S, abs=2e-6))
        feed.close()
        assert sys.getswitchinterval() == pytest.approx(before)


def test_the_reading_of_events_makes_no_frames_rarer(pump_and_clock):
    pump, clock = pump_and_clock

    def tick():
        clock.work(0.011)
        pump._feed.stats.read_s += 0.010

    pump._feed.tick = tick
    for _ in range(60):
        pump._frame()
    assert pump.pace.cost_s == pytest.approx(0.001, rel=0.01) and pump._feed.stats.pump_s == pytest.approx(0.66)
    del pump._feed.tick
    before = pump._feed.stats.read_s
    pump._feed.source.engine.step()
    pump._feed.tick()
    assert pump._feed.stats.read_s > before


# ---- whose thread does what ----

def test_what_a_look_brought_is_prepared_and_sent_in_the_pump_s_thread(make_llm):
    where = {}

    def looked(llm):
        where["look"] = threading.current_thread().name

        def finish():
            where["finish"] = threading.current_thread().name
            return {"number": 7}

        return finish

    class Noting(Page):
        def send(self, content, buffers=None):
            if content["type"] == "answer":
                where["send"] = threading.current_thread().name
            super().send(content, buffers)

    answers("test.looked")(lambda feed: feed.look(looked))
    try:
        with LiveEngine(make_llm()) as live:
            feed = Feed(live, hub=Noting())
            feed.hub.say({"op": "ask", "id": "q", "what": "test.looked", "args": {}})
            until(lambda: feed.hub.answers)
            feed.close()
            assert where == {"look": "tinyvllm-engine", "finish": "tinyvllm-feed", "send": "tinyvllm-feed"}
            assert feed.hub.answers[0]["data"] == {"number": 7}
            feed.hub.say({"op": "ask", "id": "r", "what": "test.looked", "args": {}})  # closed: still answered
            until(lambda: len(feed.hub.answers) == 2)
    finally:
        del ANSWERS["test.looked"]


def test_answers_do_not_wait_for_the_next_frame():
    feed = Feed(SteppedSource(), hub=Page(), frames_per_second=0.2)
    done = threading.Event()
    time.sleep(0.05)
    feed.later(done.set)
    assert done.wait(2)
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 2
