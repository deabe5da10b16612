"""StepAnatomy's data: batches and times as the events have them, profiles summed by operation and never lost."""

import json

import numpy as np
import pytest

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tests.llm_source import LLMSource, settle
from tinyvllm import SamplingParams
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from widgets.frames import unpack
from widgets.topics.step_anatomy import Profiles

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROFILE = [["embed", -1, 100, 10, 0], ["proj", 0, 200, 1000, 4000], ["attn", 0, 50, 30, 60],
           ["proj", 1, 300, 1000, 4000], ["attn", 1, 70, 30, 60], ["head", -1, 500, 5000, 10000]]


@pytest.fixture
def source():
    return SteppedSource(num_blocks=64, max_num_batched_tokens=16)


@pytest.fixture
def feed(source):
    feed = SteppedFeed(source)
    feed.page.ready("step_anatomy")
    yield feed
    feed.close()
    assert feed.error is None


def last(feed):
    """All that the page knows: the last frame over those before it."""
    settle(feed, "step_anatomy")
    data, arrays = {}, {}
    for frame in feed.page.frames:
        if "step_anatomy" in frame["topics"]:
            payload = unpack(frame["topics"]["step_anatomy"], frame["buffers"])
            json.dumps(payload.data)  # nothing in it that JSON lacks
            data |= payload.data
            arrays = payload.arrays or arrays
    return data, arrays


def profile_next(source, operations=PROFILE, **about):
    """The next step of a toy engine emits a profile, from inside, as a real runner does."""
    execute = source.engine.runner.execute

    def with_profile(output):
        source.engine.runner.execute = execute
        tokens = execute(output)
        source.events.emit("step_profiled", None, operations, {"device": "a toy", "clock": "none", **about})
        return tokens

    source.engine.runner.execute = with_profile


def test_before_anything_has_run_there_is_nothing(feed):
    data, arrays = last(feed)
    assert data["step"] is None and data["profiles"] == [] and data["shown"] is None and arrays == {}


def test_the_newest_step_says_who_was_in_it(feed, source):
    source.engine.add_request([1] * 20, GREEDY, request_id="long")
    source.engine.add_request([2] * 3, GREEDY, request_id="short")
    for _ in range(4):
        source.engine.step()
        data, _ = last(feed)
        step = feed.state.steps[-1]
        events = [event for event in source.events.read()[0] if event.kind in ("step_begun", "step_ended")]
        assert data["step"]["step"] == step.step == data["newest"] and data["step"]["tokens"] == step.num_tokens
        assert [row[:3] for row in data["step"]["rows"]] == [list(row[:3]) for row in step.batch]
        assert data["step"]["runner"] == pytest.approx(events[-1].a / 1e6)
        if len(events) > 2:
            assert data["step"]["before"] == pytest.approx((events[-2].t_ns - events[-3].t_ns) / 1e6)
    kinds = {row[0]: row[4] for row in data["step"]["rows"]}
    assert kinds == {"long": "decode", "short": "decode"}


def test_prefill_and_decode_are_told_apart(feed, source):
    source.engine.add_request([1] * 3, GREEDY, request_id="first")
    source.engine.step()
    source.engine.add_request([2] * 40, GREEDY, request_id="second")
    source.engine.step()
    rows = {row[0]: (row[2], row[4]) for row in last(feed)[0]["step"]["rows"]}
    assert rows == {"first": (1, "decode"), "second": (15, "prefill")}


def test_a_selected_step_is_shown_and_let_go(feed, source):
    source.engine.add_request([1] * 5, GREEDY)
    for _ in range(5):
        source.engine.step()
    assert last(feed)[0]["step"]["step"] == 5
    feed.select(step=2)
    assert last(feed)[0]["step"]["step"] == 2
    feed.select(step=77)  # not there: the newest
    assert last(feed)[0]["step"]["step"] == 5
    feed.select(step=None)
    source.engine.step()
    assert last(feed)[0]["step"]["step"] == 6


def test_a_profile_is_summed_by_operation_and_laid_out_by_layer(feed, source):
    source.engine.add_request([1] * 5, GREEDY)
    profile_next(source, tokens=5, requests=1)
    source.engine.step()
    data, arrays = last(feed)
    shown = data["shown"]
    assert shown["names"] == ["embed", "proj", "attn", "head"] and shown["layers"] == 2 and shown["device"] == "a toy"
    assert arrays["ns"].tolist() == [[0, 0, 100], [200, 300, 0], [50, 70, 0], [0, 0, 500]]
    assert arrays["bytes"].tolist() == [10, 2000, 60, 5000] and arrays["flops"].tolist() == [0, 8000, 120, 10000]
    assert arrays["calls"].tolist() == [1, 2, 2, 1]
    dot, = data["profiles"]
    assert (dot["step"], dot["kind"], dot["ns"], dot["bytes"], dot["flops"]) == (1, "prefill", 1220, 7070, 18120)


def test_several_profiles_are_kept_and_marked_by_what_their_step_did(feed, source):
    source.engine.add_request([1] * 5, GREEDY)
    profile_next(source)
    source.engine.step()
    profile_next(source)
    source.engine.step()
    source.engine.add_request([2] * 5, GREEDY)
    profile_next(source)
    source.engine.step()
    data, _ = last(feed)
    assert [(p["step"], p["kind"]) for p in data["profiles"]] == [(1, "prefill"), (2, "decode"), (3, "mixed")]
    assert data["shown"]["step"] == 3
    feed.select(step=2)
    assert last(feed)[0]["shown"]["step"] == 2
    source.engine.step()
    feed.select(step=4)  # that one was not taken apart: the newest that was
    assert last(feed)[0]["shown"]["step"] == 3


def test_profiles_are_found_again_by_who_comes_late(feed, source):
    source.engine.add_request([1] * 5, GREEDY)
    feed.page.say({"op": "visible", "view": "v", "visible": False})
    profile_next(source)
    source.engine.step()
    feed.tick()
    feed.page.say({"op": "visible", "view": "v", "visible": True})
    assert [p["step"] for p in last(feed)[0]["profiles"]] == [1]
    feed.page.say({"op": "gone", "view": "v"})
    profile_next(source)
    source.engine.step()
    feed.tick()
    feed.page.frames.clear()
    feed.page.ready("step_anatomy", view="later")
    data, arrays = last(feed)
    assert [p["step"] for p in data["profiles"]] == [1, 2] and arrays["ns"].sum() == 1220


def test_a_profile_that_is_read_twice_is_one_profile(source):
    source.engine.add_request([1] * 5, GREEDY)
    profile_next(source)
    source.engine.step()
    profiles = Profiles(source.events)
    profiles.update()  # a view became visible: the log was read ahead of the feed
    profiles.update(source.events.read()[0])
    assert len(profiles.found) == 1


def test_the_past_shows_only_what_had_happened(feed, source):
    source.engine.add_request([1] * 5, GREEDY)
    for _ in range(3):
        profile_next(source)
        source.engine.step()
    settle(feed, "step_anatomy")
    feed.hub.cursor = feed.ms(feed.state.steps[1].end_ns) + 1e-6
    data, _ = last(feed)
    assert data["step"]["step"] == 2 and [p["step"] for p in data["profiles"]] == [1, 2]
    feed.hub.cursor = None
    data, _ = last(feed)
    assert data["step"]["step"] == 3 and len(data["profiles"]) == 3


def test_a_recorded_run_shows_its_profiles_and_its_roofs(source, tmp_path):
    roofs = {"device": "x", "bandwidth": 1e10, "cache_bandwidth": 2e10, "peak": 1e12, "arithmetic": "y"}
    source.engine.add_request([1] * 5, GREEDY)
    profile_next(source, ceilings=roofs)
    source.engine.step()
    path = tmp_path / "run"
    Trace(source.events.read()[0]).save(path)
    with ReplayEngine(Trace.load(path), rate=float("inf")) as replay:
        replay.wait_idle()
        feed = SteppedFeed(replay)
        feed.page.ready("step_anatomy")
        data, arrays = last(feed)
        assert data["roofs"] == roofs and data["step"]["step"] == 1 and arrays["ns"].sum() == 1220
        feed.page.say({"op": "ask", "id": "x", "what": "profile_next_step", "args": {}})
        assert "recorded" in feed.page.answers[-1]["error"]
        feed.close()


def test_a_real_step_taken_apart_is_what_the_probe_measured(make_llm):
    source = LLMSource(make_llm())
    feed = SteppedFeed(source)
    feed.page.ready("step_anatomy")
    source.engine.add_request(list(range(20, 40)), GREEDY)
    for kind in ("prefill", "decode"):
        feed.page.say({"op": "ask", "id": "x", "what": "profile_next_step", "args": {}})
        assert feed.page.answers[-1]["data"] == {"requests": 1}
        source.run(steps=1)
        data, arrays = last(feed)
        profile = source.llm.probe.last_profile
        assert data["profiles"][-1]["kind"] == kind
        assert arrays["ns"].sum() == sum(row[2] for row in profile.operations) > 0
        assert arrays["bytes"].sum() == sum(row[3] for row in profile.operations)
        assert arrays["flops"].sum() == sum(row[4] for row in profile.operations)
        assert data["shown"]["layers"] == source.llm.runner.dims.num_layers
        assert np.count_nonzero(arrays["ns"][data["shown"]["names"].index("attention")]) == data["shown"]["layers"]
    assert data["roofs"] == source.llm.probe.ceilings()._asdict()  # they stand in the event: a recording has them too
    prefill, decode = data["profiles"]
    assert prefill["flops"] / prefill["bytes"] > 2 * decode["flops"] / decode["bytes"]  # the lesson of the roofline
    source.run()
    assert feed.error is None


def test_the_roofs_are_those_of_this_machine(make_llm):
    feed = SteppedFeed(LLMSource(make_llm()))
    feed.page.say({"op": "ask", "id": "x", "what": "ceilings", "args": {}})
    roofs = feed.page.answers[-1]["data"]
    assert roofs["peak"] > roofs["bandwidth"] > 1e8 and roofs["cache_bandwidth"] >= roofs["bandwidth"]
