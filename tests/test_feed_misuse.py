"""The feed in rough hands: pages that send nonsense, engines that are closed or have failed, wrong arguments. It goes
on for everybody else, and says what was wrong."""

import json
import threading
import time

import pytest

from tests.feed_stand_ins import Page, SteppedFeed, SteppedSource
from tests.test_live_engine import until
from tinyvllm import SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from widgets import BitLens, Dashboard, SchedulerTimeline, TensorFile, TokenRace
from widgets.answers.patch import generate_again
from widgets.controls import ControlError, Controls
from widgets.feed import Feed
from widgets.topics.control_bar import ControlTopic

SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def fed(**options):
    source = SteppedSource(**options)
    feed = SteppedFeed(source)
    for i in range(3):
        source.engine.add_request([1, 2, 3, 4, 5 + i], SHORT, f"r{i}")
    feed.page.ready("blocks")
    return source, feed, feed.page


NONSENSE = [
    None, 5, "x", [], {}, {"op": None}, {"op": "__init__"}, {"op": "tick"}, {"op": "ack"}, {"op": "ask"},
    {"op": "ack", "n": "x", "drawn": 1}, {"op": "ack", "n": 1, "drawn": "x"}, {"op": "ack", "n": 10**9, "drawn": None},
    {"op": "ask", "id": 1}, {"op": "ask", "id": 1, "what": ["x"]}, {"op": "ask", "id": 1, "what": "block", "args": [1]},
    {"op": "ready"}, {"op": "ready", "view": "q", "topic": "horoscope", "key": "h"},
    {"op": "ready", "view": "q", "topic": ["race"], "key": "h"},
    {"op": "ready", "view": "q", "topic": "race", "key": "h", "params": {"shown": "many"}},
    {"op": "ready", "view": "q", "topic": "race", "key": "h", "params": [1]},
    {"op": "ready", "view": "q", "topic": "race", "key": "h", "params": {"sign": 1}},
    {"op": "ready", "view": ["q"], "topic": "race", "key": ["h"]}, {"op": "visible"}, {"op": "visible", "view": "v"},
    {"op": "visible", "view": ["v"], "visible": 1}, {"op": "gone"}, {"op": "gone", "view": {}}]


@pytest.mark.parametrize("message", NONSENSE, ids=str)
def test_nonsense_from_one_page_takes_nothing_from_another(message):
    source, feed, page = fed()
    feed.tick()
    page.say(message)
    source.engine.step()
    feed.tick()
    mode, payload = page.part("blocks")
    assert mode == "delta" and payload.data["totals"]["slots"] == 4 * feed.state.num_used_blocks > 0


def test_a_frame_that_could_not_be_sent_is_made_up_for(monkeypatch):
    source, feed, page = fed()
    feed.tick()
    send = page.send
    monkeypatch.setattr(page, "send", lambda *a: 1 / 0)
    source.engine.step()
    with pytest.raises(ZeroDivisionError):
        feed.tick()
    monkeypatch.setattr(page, "send", send)
    feed.flow._asked.clear()
    source.engine.step()
    feed.tick()
    assert page.part("blocks")[0] == "snapshot"


def test_a_feed_that_comes_when_the_log_has_moved_on_begins_with_the_truth():
    source = SteppedSource(capacity=50)
    for i in range(20):
        source.engine.add_request([1, 2, 3, 4, i], SHORT)
    for _ in range(40):
        source.engine.step()
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    feed.tick()  # the source is asked, and answers
    feed.tick()
    pool = source.engine.kv_cache_manager.pool
    assert feed.state.config["num_blocks"] == pool.num_blocks and feed.stats.gaps == 0
    assert feed.state.num_used_blocks == pool.num_blocks - pool.num_free_blocks > 0
    assert feed.page.part("blocks")[1].data["num_blocks"] == pool.num_blocks


def test_a_closed_engine_is_shown_to_whoever_comes_late_or_looks_back(make_llm):
    live = LiveEngine(make_llm())
    page = Page()
    watchers = []
    page.observe = lambda handler, names: watchers.append(handler)
    feed = Feed(live, hub=page)
    live.add("The river", SHORT, "a")
    live.wait_idle()
    live.add("The river", LONG, "b")
    live.close()
    until(lambda: feed.closed)
    until(lambda: not feed._pump_thread._thread.is_alive())
    assert feed.state.requests["b"].status == "abort", "its end was told"
    page.ready("timeline")
    page.ready("race")
    assert page.frames[-1]["live"]["state"] == "closed" and page.part("race")[1].data["totals"]["finished"] == 2
    page.cursor = feed.ms(feed.state.steps[2].end_ns)
    watchers[0](None)  # as the hub tells it
    assert page.part("race")[1].data["totals"] == {**page.part("race")[1].data["totals"], "finished": 0, "running": 1}
    for _ in range(5):  # nobody answers any more, and that holds nothing back
        frames = len(page.frames)
        page.ready("race", view="reloaded")
        assert len(page.frames) == frames + 1
    late = Feed(live, hub=Page())
    until(lambda: late.closed)
    late.hub.ready("race")
    assert late.hub.part("race")[1].data["totals"]["finished"] == 2
    feed.close()
    page.ready("race", view="after")
    assert len(page.frames) == frames + 1, "a feed that was closed sends nothing"


@pytest.mark.parametrize("wrong", [dict(request=0), dict(request=["0"]), dict(layer=-1), dict(head=float("nan")),
                                   dict(token="x"), dict(step=1.5), dict(block=True), dict(colour=1)], ids=str)
def test_what_cannot_be_selected(wrong):
    _, feed, page = fed()
    before = feed.selection
    with pytest.raises(ValueError, match="selected by|to select"):
        feed.select(**wrong)
    assert feed.selection == before
    with pytest.raises(TinyVLLMError, match="has a kind out of"):
        feed.inspect(["weight"])


def test_recording_says_what_is_wrong(tmp_path):
    with pytest.raises(TinyVLLMError, match="no engine here to record"):
        Feed(None).record()
    source, feed, _ = fed()
    feed.record()
    with pytest.raises(TinyVLLMError, match="a recording is going on: stop it first"):
        feed.record()
    assert len(feed.stop_recording()) > 3, "the first one goes on"
    with pytest.raises(TypeError, match="got NoneType for SteppedSource"):
        feed.switch_to(None)
    source.tell_again = lambda: None  # as an engine that has not come to it yet
    feed.record()
    with pytest.raises(ControlError, match="said nothing since the recording began"):
        Controls(feed).stop_recording(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ControlError, match="the name of a trace file is text, got int"):
        Controls(feed).replay(5)
    for prompts, message in ((5, "got int"), ([], "prompts is empty")):
        with pytest.raises(ControlError, match=message):
            Controls(feed).use(prompts, None)
    one = Controls(feed)
    one.use({"prompt_token_ids": [1, 2]}, None)
    assert one.prompts == [{"prompt_token_ids": [1, 2]}]


@pytest.mark.parametrize("end", [LiveEngine.close, lambda live: setattr(live.llm.runner, "execute", None)])
def test_a_text_that_will_not_be_finished_is_not_waited_for(make_llm, end):
    with LiveEngine(make_llm(), steps_per_second=50) as live:
        feed = SteppedFeed(live)
        answer = generate_again(feed, "The river", 300)
        threading.Timer(0.1, end, [live]).start()
        try:
            assert answer.result(10)["finish_reason"] == "abort"  # closing ends requests as a stop does
        except TinyVLLMError as error:
            assert "the text was not finished: " in str(error)
        assert not live._listeners._all


# ---- panels ----


@pytest.fixture
def recorded():
    source = SteppedSource()
    source.engine.add_request([1, 2, 3], SHORT, "a")
    while source.engine.has_unfinished_requests():
        source.engine.step()
    return Trace(source.events.read()[0])


def test_a_recorded_run_has_a_dashboard_too(recorded):
    with ReplayEngine(recorded, paused=True) as replay:
        dashboard = Dashboard(replay)
        assert dashboard["KVBlockMap"].feed.source is replay and "TensorFile" not in dashboard._panels
        with pytest.raises(TinyVLLMError, match="a recorded run has no model file"):
            Dashboard(replay, panels=["TensorFile"])
        assert list(Dashboard(replay, panels="TokenRace")._panels) == ["TokenRace"]
        dashboard.feed.close()


def test_a_recorded_run_at_once_is_told_in_numbers_that_json_has(recorded):
    with ReplayEngine(recorded, rate=float("inf"), paused=True) as replay:
        told = ControlTopic(SteppedFeed(replay)).snapshot(Feed(None).state).data
        assert json.dumps(told, allow_nan=False) and told["rate"] == 1e9


def test_wrong_arguments_of_panels_are_said_in_words():
    nan = float("nan")
    for make in (lambda: BitLens(scale=nan), lambda: SchedulerTimeline(window=nan), lambda: TokenRace(temperature=nan)):
        with pytest.raises(ValueError, match="must be a finite number, got nan"):
            make()
    with pytest.raises(TypeError, match="a panel needs a LiveEngine, a ReplayEngine or a Feed, got int"):
        TensorFile(5)


def test_memory_stays_bounded_over_many_short_requests():
    """What is kept of requests that have ended has a limit everywhere: in the state, the history, every topic."""
    import gc
    import tracemalloc

    source = SteppedSource(capacity=2000, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64)
    source.steps_per_second = None
    feed = SteppedFeed(source)
    feed._reader.history.capacity = feed._reader.history.chapter_work = 2000
    feed._reader.history.state.kept_requests = 50
    feed._reader.history.state.steps = type(feed.state.steps)(maxlen=100)
    topics = ("blocks", "timeline", "race", "trail", "step_anatomy", "control", "live_numbers")
    for topic in topics:
        feed.page.ready(topic, view=topic)

    def serve(count):
        for number in range(count):
            source.engine.add_request([1 + number % 40, 2, 3], SamplingParams(temperature=0, max_tokens=3))
            while source.engine.stats.num_waiting + source.engine.stats.num_running > 6:
                source.engine.step()
                source.engine.runner.batches.clear()
                feed.flow._asked.clear()
                feed.tick()
                feed.page.frames.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        full = serve(1500)
        assert serve(1500) - full < 300_000, "what 1,500 requests leave behind"
    finally:
        tracemalloc.stop()
    assert feed.error is None and len(feed.state.requests) < 70


def test_time_moves_for_the_closed(make_llm):
    """Closing is quick also while panels watch: nobody waits for the other."""
    live = LiveEngine(make_llm(), paused=True)
    feed = Feed(live, hub=Page())
    for topic in ("blocks", "timeline", "attention"):
        feed.hub.ready(topic, view=topic)
    live.add("The river", LONG)
    start = time.perf_counter()
    live.close()
    feed.close()
    assert time.perf_counter() - start < 5
