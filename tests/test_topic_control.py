"""The control bar without a page: counters, arrivals, recording, replay, and everything that can be asked wrongly."""

import re
import threading
import time

import pytest

from tests.feed_stand_ins import Page, SteppedFeed, SteppedSource
from tinyvllm import SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from widgets.answers.control_bar import control
from widgets.arrivals import LiveArrivals
from widgets.control_bar import ControlBar
from widgets.controls import ControlError, Controls, trace_path
from widgets.feed import Feed
from widgets.topics.control_bar import ControlTopic

SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def until(condition, timeout=20.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


@pytest.fixture
def live(make_llm):
    with LiveEngine(make_llm()) as engine:
        yield engine


@pytest.fixture
def feed(live):
    feed = Feed(live, hub=Page())
    yield feed
    feed.close()


# ---- counters ----

def test_the_counters_are_the_engine_s(make_llm):
    source = SteppedSource(num_blocks=6)
    source.steps_per_second = None
    feed = SteppedFeed(source)
    feed.page.ready("control")
    for i in range(5):
        source.engine.add_request([1, 2, 3, 4, i], SamplingParams(temperature=0, max_tokens=9), str(i))
    told = {}
    preempted = False
    while source.engine.has_unfinished_requests():
        source.engine.step()
        feed.tick()
        feed.flow.acknowledged(10**9)
        if "control" in feed.page.frames[-1]["topics"]:
            told = feed.page.part("control")[1].data
        stats = source.engine.stats
        assert (told["running"], told["waiting"], told["finished"], told["preemptions"]) == \
            (stats.num_running, stats.num_waiting, stats.num_finished, stats.num_preemptions)
        preempted |= stats.num_preemptions > 0
    assert preempted and told["tokens_per_s"] == 45  # all of them within the last second


def test_tokens_per_second_falls_back_to_nothing_and_the_page_is_told_only_of_changes():
    source = SteppedSource()
    source.steps_per_second = None
    feed = SteppedFeed(source)
    topic = ControlTopic(feed)
    source.engine.add_request([1, 2, 3], SHORT, "a")
    while source.engine.has_unfinished_requests():
        source.engine.step()
    feed._pump()
    assert topic.snapshot(feed.state).data["tokens_per_s"] == 6
    assert topic.delta(feed.state, []) is None
    source.now_ns = lambda: time.perf_counter_ns() + 2 * 10**9
    assert topic.delta(feed.state, []).data["tokens_per_s"] == 0
    assert topic.delta(feed.state, []) is None


def test_a_policy_that_changes_is_an_event_and_keeps_history(feed, live):
    live.add("The river", SHORT)
    live.wait_idle()
    live.set_policy(scheduling_policy="static", max_num_seqs=3)
    until(lambda: feed.state.config.get("scheduling_policy") == "static")
    assert feed.state.config["max_num_seqs"] == 3 and feed.state.config["num_blocks"] == 128
    assert len(feed.state.requests) == 1


# ---- arrivals ----

def test_arrivals_come_at_the_rate_and_their_thread_ends(feed, live):
    controls = Controls.of(feed)
    controls.use(["The river", "The fox"], SHORT)
    control(feed, "arrivals", rate=100)
    until(lambda: controls.arrivals.sent >= 20)
    assert len(threads("tinyvllm-arrivals")) == 1
    control(feed, "arrivals", rate=0)
    until(lambda: not threads("tinyvllm-arrivals"))
    live.wait_idle()
    assert live.stats.num_finished == controls.arrivals.sent and controls.arrivals.error is None


def test_the_gaps_are_exponential_and_the_same_again():
    def counts(seconds):
        """How many have come after each tick of a clock of our own."""
        arrivals = LiveArrivals(lambda number: None, is_over=lambda: False, may_come=lambda: True, seed=3)
        arrivals._rate, seen = 50.0, []
        for _ in range(int(seconds / 0.01)):
            arrivals._bring_due(0.01)
            seen.append(arrivals.sent)
        return seen

    seen = counts(400)
    assert seen == counts(400)
    assert abs(seen[-1] / 20_000 - 1) < 0.03  # 50 a second; the standard deviation of the mean is 0.7%
    ticks = [b - a for a, b in zip([0, *seen], seen)]
    mean = sum(ticks) / len(ticks)
    variance = sum((n - mean) ** 2 for n in ticks) / len(ticks)
    assert abs(variance / mean - 1) < 0.05  # of a Poisson process these are equal; even gaps would give 0.5


def test_arrivals_wait_while_the_engine_is_paused_and_while_too_many_wait(feed, live, monkeypatch):
    controls = Controls.of(feed)
    controls.use(["The river"], SHORT)
    live.pause()
    until(lambda: live.state == "paused")
    control(feed, "arrivals", rate=200)
    time.sleep(0.15)
    assert controls.arrivals.sent == 0
    live.resume()
    until(lambda: controls.arrivals.sent > 5)
    monkeypatch.setattr("widgets.controls.MOST_WAITING", 0)
    time.sleep(0.1)
    sent = controls.arrivals.sent
    time.sleep(0.1)
    assert controls.arrivals.sent == sent


def test_a_bad_prompt_ends_the_arrivals_with_its_message_and_nothing_else(feed, live):
    controls = Controls.of(feed)
    controls.use([""], SHORT)
    live.llm.tokenizer.chat_template, template = None, live.llm.tokenizer.chat_template
    try:
        control(feed, "arrivals", rate=200)
        until(lambda: controls.arrivals.error is not None)
    finally:
        live.llm.tokenizer.chat_template = template
    assert "the prompt is empty" in str(controls.arrivals.error)
    until(lambda: not threads("tinyvllm-arrivals"))
    assert live.error is None and feed.error is None
    controls.use(["The river"], None)
    control(feed, "arrivals", rate=200)
    until(lambda: live.stats.num_finished > 2)


@pytest.mark.parametrize("end", ["feed", "engine"])
def test_no_thread_outlives_its_feed_or_engine(make_llm, end):
    live = LiveEngine(make_llm())
    feed = Feed(live, hub=Page())
    control(feed, "arrivals", rate=5)
    until(lambda: threads("tinyvllm-arrivals"))
    (feed if end == "feed" else live).close()
    until(lambda: not threads("tinyvllm-arrivals"))
    live.close()
    feed.close()
    until(lambda: feed._pump_thread._thread not in threading.enumerate())


def test_a_burst_and_the_same_texts_again_after_a_reset(feed, live):
    texts = []
    live.on_output(lambda o: texts.append((o.request_id, o.outputs[0].text)) if o.finished else None)
    Controls.of(feed).use(["The river", "The fox"], SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True))
    control(feed, "burst", count=6)
    live.wait_idle()
    first = sorted(text for _, text in texts)
    texts.clear()
    control(feed, "reset")
    control(feed, "burst", count=6)
    live.wait_idle()
    assert len(first) == 6 and sorted(text for _, text in texts) == first and len(set(first)) > 2


def test_prompts_of_every_form(feed, live):
    Controls.of(feed).use(["The fox", [{"role": "user", "content": "Hello 🦊"}], [1, 5, 7],
                           {"prompt_token_ids": [1, 5, 7]}], SHORT)
    control(feed, "burst", count=8)
    live.wait_idle()
    assert live.stats.num_finished == 8


def test_a_bar_takes_prompts_and_refuses_what_are_none(live):
    bar = ControlBar(live, prompts="The fox", sampling_params=SHORT)
    assert Controls.of(bar.feed).prompts == ["The fox"] and Controls.of(bar.feed).params == SHORT
    for wrong in (dict(prompts=[]), dict(sampling_params={"max_tokens": 3})):
        with pytest.raises(ControlError):
            ControlBar(live, **wrong)
    bar.feed.close()


# ---- what can be wrong ----

@pytest.mark.parametrize("question, message", [
    (dict(do="fly"), "there is nothing called 'fly'"),
    (dict(do="step", count=0), "step needs a whole number of 1 or more, got 0"),
    (dict(do="step", count="ten"), "got 'ten'"),
    (dict(do="speed", steps_per_second=0), "above 0, or None for no limit, got 0"),
    (dict(do="rate", factor=2), "only a recorded run has a rate"),
    (dict(do="policy", max_num_batched_tokens=0), "max_num_batched_tokens can be 1 to 256 here, got 0"),
    (dict(do="policy", max_num_seqs="many"), "max_num_seqs can be 1 to 16 here, got 'many'"),
    (dict(do="policy", scheduling_policy="lottery"), "must be 'continuous' or 'static', got 'lottery'"),
    (dict(do="reset", block_size=0), "block_size must be a whole number of 1 or more, got 0"),
    (dict(do="reset", num_blocks=10**9), "does not fit into the .* that there are: lower num_blocks"),
    (dict(do="reset", use_kv_cache=False), "set enable_prefix_caching=False with it"),
    (dict(do="arrivals", rate=-1), "can be 0 \\(none\\) to 200 requests a second, got -1"),
    (dict(do="arrivals", rate="fast"), "got 'fast'"),
    (dict(do="arrivals", rate=float("nan")), "got nan"),
    (dict(do="burst", count=0), "a burst can be 1 to 1000 requests, got 0"),
    (dict(do="burst", count=2.5), "got 2.5"),
    (dict(do="save"), "nothing is being recorded"),
    (dict(do="replay"), "nothing was recorded yet"),
    (dict(do="replay", name="no such file"), "there is no trace file no such file"),
    (dict(do="live"), "there is no live engine to go back to"),
])
def test_what_is_wrong_is_refused_and_loses_nothing(feed, live, question, message):
    live.set_speed(200)
    request_id = live.add("The river", LONG)
    until(lambda: live.stats.num_output_tokens > 2)
    feed._on_message({"op": "ask", "id": "q", "what": "control", "args": question})
    answer = feed.hub.answers[-1]
    assert re.search(message, answer["error"]), answer
    before = live.stats.num_output_tokens
    until(lambda: live.stats.num_output_tokens > before)
    assert live.stats.running == [request_id] and live.error is None and not feed.closed
    assert live.stats.num_blocks == 128


def test_a_bar_without_an_engine_says_so():
    feed = Feed(None, hub=Page())
    with pytest.raises(ControlError, match="there is no engine behind this bar"):
        control(feed, "pause")


def test_reset_keeps_the_policy_that_was_set_and_begins_anew(feed, live):
    live.set_policy(scheduling_policy="static", max_num_seqs=2)
    until(lambda: feed.state.config.get("max_num_seqs") == 2)
    control(feed, "reset", block_size=4, enable_prefix_caching=False)
    live.wait_idle()
    until(lambda: feed.state.config.get("block_size") == 4)
    until(lambda: feed.state.config.get("max_num_seqs") == 2)
    scheduler = live.llm.engine.scheduler
    assert (scheduler.policy, scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == ("static", 2, 256)
    assert live.llm.engine.kv_cache_manager.enable_caching is False
    control(feed, "policy", max_num_seqs=16)  # what the engine was made with is still there
    control(feed, "reset", max_num_seqs=20)  # and a reset goes beyond
    until(lambda: feed.state.config.get("max_num_seqs") == 20)


def test_an_engine_that_failed_starts_afresh(feed, live):
    good = live.llm.runner.execute
    live.llm.runner.execute = lambda batch: 1 / 0
    control(feed, "burst", count=1)
    until(lambda: live.state == "failed")
    control(feed, "reset")
    until(lambda: live.error is None and live.state == "idle")
    assert live.llm.runner.execute != good
    control(feed, "burst", count=1)
    live.wait_idle()
    assert live.stats.num_finished == 1


# ---- recording and replay ----

def test_a_recording_is_saved_never_over_another_and_survives_a_bad_name(feed, live, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Controls.of(feed).use(["The river"], SHORT)
    for expected in ("mine.jsonl", "mine-2.jsonl"):
        control(feed, "record")
        control(feed, "burst", count=2)
        live.wait_idle()
        with pytest.raises(ControlError, match="could not be written to .*; it is kept: give another name"):
            control(feed, "save", name="no/such/folder/mine")
        told = control(feed, "save", name="mine.jsonl")
        assert told["path"] == expected
        trace = Trace.load(expected)
        assert len(trace) == told["events"] and trace.metadata["device"] == "cpu" and trace.metadata["vocabulary"]
        assert sum(r.finished_ns is not None for r in trace.state().requests.values()) == 2
    assert trace_path("").name == "run-1.jsonl" and trace_path("Grüße 🦊").name == "Grüße 🦊.jsonl"
    for name in ("a\0b", "..", "/"):
        with pytest.raises(ControlError, match="cannot be the name of a file"):
            trace_path(name)


def test_replay_in_the_place_of_the_live_engine_and_back(feed, live, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Controls.of(feed).use(["The river"], SHORT)
    control(feed, "record")
    control(feed, "burst", count=3)
    live.wait_idle()
    recorded = control(feed, "save", name="three")
    control(feed, "burst", count=2)
    live.wait_idle()
    until(lambda: len(feed.state.requests) == 5)
    history = feed.state
    control(feed, "replay")
    replay = feed.source
    assert replay.kind == "replay" and feed.live()["kind"] == "replay"
    control(feed, "rate", factor=1e9)
    until(lambda: sum(r.finished_ns is not None for r in feed.state.requests.values()) == 3)
    assert live.state == "paused"
    told = ControlTopic(feed).snapshot(feed.state).data
    assert set(told["cannot"]) == {"policy", "options", "arrivals", "record"} and told["can_go_back"]
    for question in (dict(do="burst", count=1), dict(do="arrivals", rate=1), dict(do="record"),
                     dict(do="policy", max_num_seqs=1), dict(do="reset", block_size=4)):
        with pytest.raises(TinyVLLMError, match="recorded run|recording"):
            control(feed, **question)
    control(feed, "reset")
    until(lambda: sum(r.finished_ns is not None for r in feed.state.requests.values()) == 3)
    control(feed, "replay", name="three")  # another one in its place: the first one's thread ends
    assert replay.state == "closed"
    control(feed, "live")
    assert feed.source is live and feed.state is history and not feed._put_aside
    live.resume()
    control(feed, "burst", count=1)
    until(lambda: sum(r.finished_ns is not None for r in feed.state.requests.values()) == 6)
    assert feed.state.gaps == 0 and recorded["steps"] > 3
    until(lambda: len(threads("tinyvllm-engine")) == 1)


def test_a_replay_ends_with_its_feed(make_llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with LiveEngine(make_llm()) as live:
        feed = Feed(live, hub=Page())
        control(feed, "record")
        control(feed, "burst", count=1)
        live.wait_idle()
        control(feed, "save", name="one")
        control(feed, "replay")
        replay = feed.source
        feed.close()
        assert replay.state == "closed"
        until(lambda: live.state == "paused")


def test_an_odd_rate_is_an_error_of_ours():
    arrivals = LiveArrivals(lambda n: None, is_over=lambda: False, may_come=lambda: True)
    with pytest.raises(ValueError, match="got True"):
        arrivals.set_rate(True)
    with pytest.raises(TinyVLLMError, match="1000000000"):
        arrivals.set_rate(1e9)
