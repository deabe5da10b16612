"""The feed: what reaches the page is what happened, in one message a frame, whoever comes late or falls behind."""

import threading
import time
from collections import deque

import numpy as np
import pytest

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tinyvllm import SamplingParams
from tinyvllm.engine.events import Event
from tinyvllm.errors import TinyVLLMError
from widgets.answers import ANSWERS, answers
from widgets.clock import ACK_TIMEOUT_S, FeedStats, Flow, LatencyClock
from widgets.feed import Feed
from widgets.frames import Packer, Payload, unpack
from widgets.topics import TOPICS, Topic, register


@register
class Counter(Topic):
    """Counts what it was given: enough to see every kind of loss and doubling."""

    name = "test-counter"

    def snapshot(self, state):
        self.seen = state.next_seq
        return Payload({"upto": state.next_seq}, {"used": np.array(sorted(state.block_owners), np.int32)})

    def delta(self, state, events):
        for event in events:  # what was told again for a recording is passed over: engine_config says how many
            assert event.seq == self.seen or self.feed.is_recording, "an event was lost or came twice"
            self.seen = event.seq + 1
        return Payload({"upto": self.seen}) if events else None


@register
class Broken(Topic):
    name = "test-broken"

    def snapshot(self, state):
        raise RuntimeError("a mistake in a picture")


@register
class Used(Topic):
    """The number of used blocks; it can be looked at as it was."""

    name, scrubbable = "test-used", True

    def snapshot(self, state):
        return Payload({"used": state.num_used_blocks, "step": state.steps[-1].step if state.steps else 0})


@answers("test-double")
def double(feed, number):
    if number < 0:
        raise TinyVLLMError("give a number of 0 or more")
    return {"result": 2 * number}


@answers("test-look")
def look(feed):
    return feed.look(lambda llm: {"blocks": llm.engine.kv_cache_manager.pool.num_blocks})


@pytest.fixture(autouse=True, scope="module")
def only_here():
    yield
    for name in ("test-counter", "test-broken", "test-used"):
        TOPICS.pop(name)
    for name in ("test-double", "test-look"):
        ANSWERS.pop(name)


def fed(**options):
    source = SteppedSource(**options)
    feed = SteppedFeed(source)
    feed.flow.interval_s = 0.0  # every frame asks
    for i in range(3):
        source.engine.add_request([1, 2, 3, 4, 5 + i], SamplingParams(temperature=0, max_tokens=12), f"r{i}")
    return source, feed, feed.page


def acknowledge(feed, n=None):
    feed.page.say({"op": "ack", "n": n or feed.page.frames[-1]["n"], "drawn": time.time() * 1e3})


def test_arrays_survive_the_way_to_the_page_and_back():
    packer = Packer()
    payloads = [Payload({"a": 1}, {"x": np.arange(5, dtype=np.uint8), "y": np.linspace(0, 1, 6).reshape(2, 3)}),
                Payload({}, {"empty": np.empty((0, 4), np.float32), "z": np.array([7], np.int16)})]
    parts = [packer.add(payload) for payload in payloads]
    buffers = packer.buffers()
    assert len(buffers) == 1
    for payload, part in zip(payloads, parts):
        again = unpack(part, buffers)
        assert again.data == payload.data
        for name, array in payload.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array)
            assert part["arrays"][name][1] % 8 == 0
    with pytest.raises(TypeError, match="int64"):
        Packer().add(Payload({}, {"t": np.arange(3)}))


def test_a_view_gets_a_snapshot_and_then_only_what_changed():
    source, feed, page = fed()
    page.ready("test-counter")
    feed.tick()
    assert page.part("test-counter")[0] == "snapshot"
    for _ in range(4):
        source.engine.step()
        acknowledge(feed)
        feed.tick()
        mode, payload = page.part("test-counter")
        assert mode == "delta" and payload.data["upto"] == source.events.next_seq
    assert feed.error is None
    used = source.engine.kv_cache_manager.pool
    assert feed.state.num_used_blocks == used.num_blocks - used.num_free_blocks


def test_one_message_a_frame_for_all_panels():
    source, feed, page = fed()
    for view in range(6):
        page.ready("test-counter", view=str(view), panel=view)
    feed.tick()
    assert len(page.frames) == 1 and len(page.frames[0]["topics"]) == 6 and len(page.frames[0]["buffers"]) <= 1


def test_nothing_is_sent_when_nothing_happens_and_nothing_is_computed_that_nobody_sees():
    source, feed, page = fed()
    page.ready("test-counter", visible=False)
    source.engine.step()
    feed.tick()
    assert page.frames == []
    page.say({"op": "visible", "view": "v", "visible": True})
    feed.tick()
    assert page.part("test-counter")[0] == "snapshot"
    feed.tick()
    feed.tick()
    assert len(page.frames) == 1


def test_a_page_that_was_reloaded_is_whole_again():
    source, feed, page = fed()
    page.ready("test-counter", view="before")
    feed.tick()
    source.engine.step()
    page.ready("test-counter", view="after")  # the old page is gone without a word
    feed.tick()
    assert page.part("test-counter")[0] == "snapshot"


def test_two_frames_at_most_are_under_way_and_what_waited_comes_in_one():
    source, feed, page = fed()
    page.ready("test-counter")
    for _ in range(6):
        source.engine.step()
        feed.tick()
    assert len(page.frames) == 2
    acknowledge(feed, n=2)
    source.engine.step()
    feed.tick()  # Counter asserts that no event is missing
    assert len(page.frames) == 3 and feed.error is None
    assert page.part("test-counter")[1].data["upto"] == source.events.next_seq


def test_a_page_that_never_acknowledges_is_not_waited_for(monkeypatch):
    source, feed, page = fed()
    page.ready("test-counter")
    for _ in range(4):
        source.engine.step()
        feed.tick()
    assert len(page.frames) == 2
    later = time.monotonic() + ACK_TIMEOUT_S + 0.1
    monkeypatch.setattr("widgets.clock.time.monotonic", lambda: later)
    feed.tick()
    assert len(page.frames) == 3


@pytest.mark.parametrize("answers_after, asks, stops_at", [(0.1, range(4, 6), range(50, 57)),
                                                           (0.2, range(8, 12), range(44, 49))])
def test_few_frames_ask_for_an_answer(monkeypatch, answers_after, asks, stops_at):
    now, due = [100.0], deque()
    monkeypatch.setattr("widgets.clock.time.monotonic", lambda: now[0])
    flow, num_asked = Flow(interval_s=0.2), 0
    for frame in range(1, 41):  # two seconds at 20 frames a second, all of them answered, promptly or not
        assert not flow.is_congested()
        if flow.sent(frame):
            num_asked += 1
            due.append((frame, now[0] + answers_after))
        now[0] += 0.05
        while due and due[0][1] <= now[0] + 1e-6:
            flow.acknowledged(due.popleft()[0])
    assert num_asked in asks
    for frame in range(41, 70):  # now the page is silent
        if flow.is_congested():
            break
        flow.sent(frame)
        now[0] += 0.05
    assert flow.is_congested() and frame in stops_at
    now[0] += ACK_TIMEOUT_S
    assert not flow.is_congested()


def test_latency_is_taken_of_events_all_over_a_frame():
    clock, stats = LatencyClock(), FeedStats()
    start = time.perf_counter_ns()
    events = [Event(i, start + i * 1_000_000, "tokens", 1, None, [], None) for i in range(80)]
    clock.sent(1, events)
    clock.drawn(1, (start + clock._to_wall_ns) / 1e6 + 100, stats)
    assert len(stats.latency_ms) == 8 and max(stats.latency_ms) == pytest.approx(100, abs=0.01)
    assert stats.latency(0.5) == pytest.approx(60, abs=10.1)


def test_a_reader_that_fell_behind_asks_again_and_ends_up_with_the_truth():
    source, feed, page = fed(capacity=60)
    page.ready("test-counter")
    feed.tick()
    for _ in range(30):
        source.engine.step()
    for i in range(2):
        source.engine.add_request([9, 9, 9, i], SamplingParams(temperature=0, max_tokens=4), f"late{i}")
    source.engine.step()
    feed.tick()  # sees the gap
    assert feed.stats.gaps == 1 and source.told_again == 1
    acknowledge(feed)
    feed.tick()  # reads what was told again
    pool = source.engine.kv_cache_manager.pool
    assert feed.state.num_used_blocks == pool.num_blocks - pool.num_free_blocks
    assert set(feed.state.requests) >= {"late0", "late1"}
    assert feed.error is None and page.part("test-counter")[0] == "snapshot"


def test_a_mistake_in_one_picture_harms_no_other():
    source, feed, page = fed()
    page.ready("test-broken", view="bad")
    page.ready("test-counter", view="good")
    source.engine.step()
    feed.tick()
    assert set(page.frames[-1]["topics"]) == {"test-counter"}
    acknowledge(feed)
    source.engine.step()
    feed.tick()
    assert "a mistake in a picture" in page.frames[-1]["live"]["feed_error"]


def test_a_view_that_goes_takes_its_topic_along():
    source, feed, page = fed()
    page.ready("test-counter", view="one")
    page.ready("test-counter", view="two")
    page.say({"op": "gone", "view": "one"})
    assert len(feed.subscriptions) == 1
    page.say({"op": "gone", "view": "two"})
    assert not feed.subscriptions


def test_questions_get_answers_or_the_reason_in_words():
    _, feed, page = fed()
    for i, (what, args) in enumerate([("test-double", {"number": 4}), ("test-double", {"number": -1}), ("nonsense", {}),
                                      ("test-look", {}), ("test-double", {"wrong": 1})]):
        page.say({"op": "ask", "id": str(i), "what": what, "args": args})
    replies = {answer["id"]: answer for answer in page.answers}
    assert replies["0"]["data"] == {"result": 8}
    assert replies["1"]["error"] == "give a number of 0 or more"
    assert "nobody knows an answer to 'nonsense'" in replies["2"]["error"]
    assert replies["3"]["data"]["blocks"] > 0
    assert "TypeError" in replies["4"]["error"]


def test_a_topic_that_does_not_exist_is_refused_by_name_and_nothing_ends():
    source, feed, page = fed()
    page.ready("horoscope")
    page.ready("test-counter")
    feed.tick()
    assert "a panel asked for 'horoscope'; there are " in page.frames[-1]["live"]["feed_error"]


def test_recording_gives_a_run_that_tells_the_same_story():
    from tinyvllm.engine.trace import Trace

    source, feed, page = fed()
    source.engine.step()
    feed.tick()
    feed.record()
    while source.engine.has_unfinished_requests():
        source.engine.step()
        feed.tick()
    trace = Trace(feed.stop_recording())
    assert trace.events[0].kind == "engine_config" and not feed.is_recording
    told = trace.state().requests
    assert {name: r.token_ids for name, r in told.items()} == \
        {name: r.token_ids for name, r in feed.state.requests.items()}
    with pytest.raises(TinyVLLMError, match="nothing is being recorded"):
        feed.stop_recording()


def test_the_cursor_shows_the_past_to_who_can_and_leaves_the_others_in_the_present():
    source, feed, page = fed()
    page.ready("test-used", view="past")
    page.ready("test-counter", view="now")
    told = []
    for _ in range(8):
        source.engine.step()
        feed.tick()
        acknowledge(feed)
        newest, = source.events.read(source.events.next_seq - 1)[0]
        told.append((feed.ms(newest.t_ns), page.part("test-used")[1].data))
    page.cursor, before = told[2]
    source.engine.step()
    feed.tick()
    acknowledge(feed)
    assert page.part("test-used") == ("snapshot", page.part("test-used")[1])
    assert page.part("test-used")[1].data == before and before != told[-1][1]
    assert page.part("test-counter")[1].data["upto"] == source.events.next_seq
    source.engine.step()
    feed.tick()
    acknowledge(feed)
    assert "test-used" not in page.frames[-1]["topics"]  # the past does not move
    page.cursor = None
    feed.tick()
    assert page.part("test-used")[1].data["step"] == source.engine.num_steps


def test_selection_is_checked_and_shared():
    _, feed, page = fed()
    feed.select(request="r1", layer=3)
    assert page.selection["request"] == "r1" and feed.selection["layer"] == 3
    with pytest.raises(ValueError, match="no 'colour' to select: it can be request, token"):
        feed.select(colour="red")


def test_an_engine_has_one_feed_and_wrong_things_are_named():
    source = SteppedSource()
    first = Feed.of(source)
    assert Feed.of(source) is first and Feed.of(first) is first
    first.close()
    assert not any(thread.name == "tinyvllm-feed" and thread is first._thread for thread in threading.enumerate())
    second = Feed.of(source)
    assert second is not first
    second.close()
    with pytest.raises(TypeError, match="needs a LiveEngine, a ReplayEngine or a Feed, got str"):
        Feed.of("demo")


def test_the_pump_keeps_up_by_itself():
    source = SteppedSource()
    feed = Feed(source, hub=SteppedFeed(None).page, frames_per_second=100)
    feed.hub.listen(feed._on_message)
    feed.hub.ready("test-counter")
    source.engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20), "a")
    while source.engine.has_unfinished_requests():
        source.engine.step()
        time.sleep(0.002)
    deadline = time.monotonic() + 5
    while feed.state.next_seq < source.events.next_seq and time.monotonic() < deadline:
        time.sleep(0.01)
    feed.close()
    assert feed.state.next_seq == source.events.next_seq and feed.error is None and feed.hub.frames
