"""Events from files: all that an engine says passes, and nothing that would surprise a picture."""

import json
import random

import pytest

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tinyvllm import SamplingParams
from tinyvllm.engine.event_check import check_event
from tinyvllm.engine.events import KINDS, Event
from tinyvllm.engine.trace import Trace, TraceError
from widgets.comparison import measure

TOPICS = ("blocks", "timeline", "race", "trail", "step_anatomy", "control")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A trace file of a run with preemptions, aborts, a failed step, a change of policy and a state told again."""
    source = SteppedSource(num_blocks=7)
    engine, log = source.engine, source.events
    for i in range(6):
        engine.add_request([1, 2, 3, 4, i], SamplingParams(temperature=0, max_tokens=9 + i), str(i))
    while engine.has_unfinished_requests():
        engine.step()
        if engine.num_steps == 6:
            engine.abort("3")
            source.tell_again()
            log.emit("policy_changed", None, {"max_num_seqs": 3})
            log.emit("step_profiled", None, [["linear", 0, 1000, 64, 128], ["argmax", -1, 10.5, 0, 0]], {"clock": "x"})
            engine.runner.fail_next = True
            with pytest.raises(RuntimeError):
                engine.step()
    events = log.read()[0]
    assert {event.kind for event in events} >= set(KINDS) - {"blocks_shared"}
    path = Trace(events).save(tmp_path_factory.mktemp("run") / "run.jsonl")
    assert Trace.load(path).events[1:] == Trace(events).events[1:], "what an engine says was refused"
    return path.read_text().splitlines()


def use_all(trace):
    """Everything that is made of a trace; raises what any of it stumbles over."""
    source = SteppedSource()
    source.engine.listen(None)
    source.steps_per_second = None
    source.tell_again = lambda: None
    source.events.__init__()
    feed = SteppedFeed(source)
    for topic in TOPICS:
        feed.page.ready(topic, view=topic)
    for number, event in enumerate(trace.events):
        source.events.step = event.step
        source.events.emit_at(*event[1:3], *event[4:])
        if number % 10 == 9 or number == len(trace) - 1:
            feed.flow._asked.clear()
            feed.tick()
    if feed.error is not None:
        raise feed.error
    measure(trace)


WRONG = (None, -1, 0, 5, 10**30, -10**18, 1.5, True, "x", "", [], [1], ["x"], {}, [[1, 2]], [["a", 1, "t"]],
         [["a", 0, 1, True]], "engine_config", "tokens", {"num_blocks": "x"}, {"block_size": 0})


def test_whatever_one_changes_in_a_trace_is_refused_or_harms_no_picture(lines, tmp_path):
    draw, outcomes = random.Random(1), {"refused": 0, "shown": 0}
    head, *events = lines
    for _ in range(700):
        changed = [json.loads(line) for line in events]
        event = draw.choice(changed[1:])
        event[draw.randrange(7)] = draw.choice(WRONG)
        path = tmp_path / "run.jsonl"
        path.write_text("\n".join([head, *map(json.dumps, changed)]) + "\n")
        try:
            trace = Trace.load(path)
        except TraceError as error:
            assert "run.jsonl, line " in str(error)
            outcomes["refused"] += 1
        else:
            use_all(trace)  # names the event, if it stumbles
            outcomes["shown"] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize("event, message", [
    (Event(0, 0, "tokens", 0, None, [["a", 1, "t"]], ["soon"]), "'tokens' cannot say"),
    (Event(0, 0, "step_begun", 0, None, 7, [["a", 0, 2, True]]), "'step_begun' cannot say '7'"),
    (Event(0, 0, "request_finished", 0, "a", "bored", 3), "'request_finished' cannot say 'bored'"),
    (Event(0, 0, "request_added", 0, None, 3, 4), "'request_added' cannot be of the request None"),
    (Event(0, 2**70, "step_ended", 0, None, 3, None), "cannot all be right"),
    (Event(0, 1.5, "step_ended", 0, None, 3, None), "its t_ns must be a whole number, got 1.5")])
def test_what_is_wrong_is_said(event, message):
    with pytest.raises(ValueError, match=message):
        check_event(event)
