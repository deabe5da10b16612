"""History: the state at any moment since, equal to applying the events anew, and quick for a long run."""

import random
import threading
import time

import pytest

from tests.toy import toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import Event, EventLog
from tinyvllm.engine.history import History, HistoryError
from tinyvllm.engine.state import EngineState

FIELDS = ("config", "requests", "steps", "block_owners", "cached_blocks", "profile")


def run_events(num_requests=40, seed=0):
    """Events of a run on a small cache, with arrivals, aborts and preemptions."""
    draw, engine, log = random.Random(seed), toy_engine(num_blocks=10), EventLog()
    engine.listen(log)
    names = []
    while names == [] or engine.has_unfinished_requests() or len(names) < num_requests:
        if len(names) < num_requests and draw.random() < 0.3:
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
            params = SamplingParams(temperature=0, max_tokens=draw.randrange(1, 12))
            names.append(engine.add_request(prompt, params))
        if names and draw.random() < 0.05:
            engine.abort(draw.choice(names))
        engine.step()
    return log.read()[0]


@pytest.fixture(scope="module")
def events():
    return run_events()


def plain(events) -> EngineState:
    state = EngineState()
    for event in events:
        state.apply(event)
    return state


def assert_same(a: EngineState, b: EngineState) -> None:
    for name in FIELDS:
        assert getattr(a, name) == getattr(b, name), name
    assert list(a.requests) == list(b.requests)


def filled(events, **options) -> History:
    history = History(**options)
    for event in events:
        assert history.apply(event)
    return history


@pytest.mark.parametrize("clock", [1, 10**5], ids=["fine clock", "coarse clock"])
def test_the_state_at_every_time_is_that_of_applying_the_events_anew(events, clock):
    events = [event._replace(t_ns=event.t_ns // clock * clock) for event in events]
    history, state = filled(events, chapter_work=40), EngineState()
    assert len(history._chapters) > 10
    for event, following in zip(events, [*events[1:], None]):
        state.apply(event)
        if following is None or following.t_ns > event.t_ns:
            assert_same(history.state_at(event.t_ns), state)
            if following is not None:
                assert_same(history.state_at(following.t_ns - 1), state)
    assert_same(history.state, plain(events))
    assert_same(history.state_at(2 * events[-1].t_ns), history.state)
    assert history.span_ns == (events[0].t_ns, events[-1].t_ns)


@pytest.mark.parametrize("seed", [0, 1])
def test_many_events_at_once_make_the_same_history(events, seed):
    draw, history, at = random.Random(seed), History(capacity=400, chapter_work=40), 0
    breaths = []
    while at < len(events):
        size = draw.choice([1, 5, 30])
        assert history.extend(events[at:at + size], lambda: breaths.append(1)) == events[at:at + size]
        at += size
    assert_same(history.state, plain(events))
    assert len(breaths) > 100 and len(history) < len(events)
    for event, following in zip(events[-len(history):], events[1 - len(history):]):
        if following.t_ns > event.t_ns:
            assert_same(history.state_at(event.t_ns), plain([e for e in events if e.t_ns <= event.t_ns]))
    first, last = history.steps
    for step in range(first + 1, last + 1, 5):
        assert_same(history.state_at_step(step), plain([event for event in events if event.step <= step]))


def test_up_to_an_unknown_kind_the_history_has_what_its_state_has(events):
    history, bad = History(), Event(events[10].seq, events[10].t_ns, "telepathy", 1, None, None, None)
    with pytest.raises(ValueError, match="telepathy"):
        history.extend([*events[:10], bad, *events[11:20]])
    assert len(history) == 10
    assert_same(history.state_at(events[9].t_ns), history.state)


def test_the_state_at_every_step_has_all_of_it_and_nothing_of_the_next(events):
    history = filled(events, chapter_work=40)
    last = max(event.step for event in events)
    assert history.steps == (0, last) and last > 60
    for step in range(last + 1):
        assert_same(history.state_at_step(step), plain([event for event in events if event.step <= step]))
    with pytest.raises(HistoryError, match=f"step {last + 1} is not in the history: it holds steps 0 to {last}"):
        history.state_at_step(last + 1)
    with pytest.raises(HistoryError, match="it holds none"):
        History().state_at_step(1)


def test_what_it_gives_is_the_caller_s_own(events):
    history = filled(events[:300], chapter_work=40)
    before = history.state_at(events[150].t_ns)
    again = history.state_at(events[150].t_ns)
    for event in events[151:300]:
        again.apply(event)
    again.block_owners.clear()
    assert_same(history.state_at(events[150].t_ns), before)
    assert_same(history.state, plain(events[:300]))


def test_a_state_and_its_clone_go_their_own_ways(events):
    for cut in range(0, len(events), 7):
        state = plain(events[:cut])
        clone = state.clone()
        assert_same(state, clone)
        for event in events[cut:]:
            clone.apply(event)
        assert_same(state, plain(events[:cut]))
        assert_same(clone, plain(events))


def test_the_oldest_events_go_and_the_rest_stays_right(events):
    history = History(capacity=200, chapter_work=40)
    for number, event in enumerate(events, start=1):
        history.apply(event)
        assert min(number, 200) <= len(history) <= 200 + 50
    kept = len(history)
    first, last = history.steps
    assert first > 1 and last == events[-1].step
    for step in (first, first + 1, last):
        assert_same(history.state_at_step(step), plain([event for event in events if event.step <= step]))
    for event in events[-kept::9]:
        assert_same(history.state_at(event.t_ns), plain([e for e in events if e.t_ns <= event.t_ns]))
    assert_same(history.state_at(0), plain(events[:-kept]))
    assert len(history._leaving) <= 50  # of chapters that are gone nothing stays
    with pytest.raises(HistoryError):
        history.state_at_step(first - 1)


def test_what_is_told_again_adds_nothing_and_after_a_gap_it_is_what_there_is():
    engine, log = toy_engine(num_blocks=10), EventLog()
    engine.listen(log)
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=9), "a")
    for _ in range(3):
        engine.step()
    first = log.next_seq
    engine.listen(log)  # tell again
    engine.step()
    events = log.read()[0]
    history = History(chapter_work=10)
    assert [history.apply(event) for event in events].count(False) == next(
        i for i, e in enumerate(events[first:]) if e.step == 4)
    assert_same(history.state, plain(events)), assert_same(history.state_at(events[-1].t_ns), history.state)
    assert_same(history.state_at_step(2), plain([event for event in events[:first] if event.step <= 2]))
    gap = History(chapter_work=10)
    for event in [*events[:5], *events[first - 2:]]:
        gap.apply(event)
    assert gap.state.gaps == first - 7 and gap.state.requests["a"].token_ids == history.state.requests["a"].token_ids
    assert_same(gap.state_at(events[-1].t_ns), gap.state)
    early = Event(events[-1].seq + 1, events[0].t_ns, "request_added", 4, "b", 3, 9)  # told with an earlier time
    gap.apply(early), gap.apply(early._replace(seq=early.seq + 1, request_id="c"))
    assert gap.span_ns[1] == events[-1].t_ns and "c" in gap.state_at(events[-1].t_ns).requests
    assert "b" not in gap.state_at(events[-1].t_ns - 1).requests


def test_a_recorded_run_told_again_moves_no_step(events):
    history = filled(events[:200], chapter_work=40)
    config, *others = events[:200]
    again = [config._replace(b=len(others)), *others]
    for seq, event in enumerate(again, start=200):
        assert not history.apply(event._replace(seq=seq))
    assert_same(history.state_at_step(5), plain([event for event in events[:200] if event.step <= 5]))
    assert_same(history.state, plain(events[:200]))


def test_after_a_reset_steps_are_those_of_the_new_run(events):
    moved = events[-1].t_ns - events[0].t_ns + 10
    second = [e._replace(seq=e.seq + len(events), t_ns=e.t_ns + moved) for e in events[:100]]
    history = filled([*events, *second], chapter_work=40)
    assert history.steps == (0, events[99].step)
    with pytest.raises(HistoryError, match="it holds steps 0 to"):
        history.state_at_step(events[-1].step)
    assert_same(history.state_at(events[-1].t_ns), plain(events))  # by its time the old run is there still
    assert_same(history.state_at_step(3), plain([event for event in second if event.step <= 3]))


def test_a_recorded_run_that_begins_again_begins_a_new_history(events):
    history = filled(events, chapter_work=40)
    for event in events[:100]:
        history.apply(event._replace(seq=event.seq + len(events)))
    assert len(history) == 100
    assert_same(history.state, plain(events[:100]))
    assert_same(history.state_at(events[50].t_ns), plain([e for e in events[:100] if e.t_ns <= events[50].t_ns]))
    assert history.steps[1] == events[99].step and history.span_ns == (events[0].t_ns, events[99].t_ns)


def long_run(num_events=200_000, batch=8, prompt=20, output=100):
    """Events as an engine emits them: `batch` requests at a time, five events a step and nine a request."""
    events, step, waiting, names = [], 0, 0, []

    def emit(kind, request_id=None, a=None, b=None):
        events.append(Event(len(events), 1000 * len(events), kind, step, request_id, a, b))

    emit("engine_config", None, {"use_kv_cache": True})
    while len(events) < num_events:
        step += 1
        while len(names) < batch:
            name, waiting = str(waiting), waiting + 1
            names.append([name, 0, output - (waiting * 7) % 60])
            emit("request_added", name, list(range(prompt)), prompt + output)
            emit("blocks_allocated", name, list(range(100 * (waiting % 90), 100 * (waiting % 90) + 8)))
            emit("request_scheduled", name, 0, 0)
        rows = tuple((n, 0, prompt, True) if done == 0 else (n, prompt + done - 1, 1, True) for n, done, _ in names)
        emit("step_begun", None, len(rows), rows)
        emit("step_ended", None, 1000)
        emit("block_cached", names[0][0], step % 9000, 0)
        emit("tokens", None, tuple((n, 7, " fox") for n, *_ in names))
        for row in names:
            row[1] += 1
        for row in [row for row in names if row[1] >= row[2]]:
            names.remove(row)
            number = int(row[0]) + 1
            emit("blocks_freed", row[0], list(range(100 * (number % 90), 100 * (number % 90) + 8)))
            emit("request_finished", row[0], "length", row[2])
    return events[:num_events]


def test_any_moment_of_a_long_run_is_there_in_a_blink():
    events = long_run()
    history, draw = filled(events), random.Random(1)
    longest = 0.0
    moments = [draw.randrange(len(events)) for _ in range(20)]
    chapters = list(history._chapters)
    moments += [chapter.first - 2 for chapter in chapters[1:]]  # the most to apply anew
    for index in moments:
        longest = max(longest, _timed(history.state_at, events[index].t_ns))
    assert longest < 0.05, f"{longest * 1e3:.0f} ms"  # 5 ms where measured
    index = moments[0]
    assert_same(history.state_at(events[index].t_ns), plain(events[:index + 1]))


def _timed(function, *arguments) -> float:
    """Seconds of this thread, whatever else the machine does; the best of three."""
    found = []
    for _ in range(3):
        start = time.thread_time()
        function(*arguments)
        found.append(time.thread_time() - start)
    return min(found)


def test_one_thread_writes_while_others_look_back(events):
    history, errors, done = History(capacity=300, chapter_work=40), [], threading.Event()

    def look():
        draw = random.Random(2)
        while not done.is_set():
            try:
                history.state_at(draw.choice(events).t_ns)
                if history.steps:
                    history.state_at_step(history.steps[1])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    [t.start() for t in threads]
    for event in events:
        history.apply(event)
    done.set()
    [t.join() for t in threads]
    assert not errors and len(history) >= 300
    assert_same(history.state_at(events[-1].t_ns), plain(events))


def test_large_batches_are_kept_for_a_shorter_time(events):
    """So many events are little with 8 requests, and gigabytes with 256."""
    whole = filled(events, chapter_work=40)
    bounded = filled(events, chapter_work=40, kept_work=400)
    assert len(whole) == len(events) and len(bounded) < len(events) / 2
    assert sum(chapter.work for chapter in bounded._chapters) < 400 + 3 * 40 + 60  # chapters end as a whole
    assert_same(bounded.state, whole.state)
    first = bounded.span_ns[0]
    for event in [event for event in events if event.t_ns > first][::20]:
        assert_same(bounded.state_at(event.t_ns), whole.state_at(event.t_ns))


def test_a_chapter_of_a_large_pool_copies_next_to_nothing_of_it():
    """As plain dicts its blocks took 10 ms a chapter, in which no other thread ran, and 19 MB."""
    events = [Event(0, 0, "engine_config", 0, None, {"num_blocks": 240_000, "block_size": 16}, None)]
    for i in range(2000):
        name, blocks = str(i), list(range(i * 120, (i + 1) * 120))
        for kind, a, b in (("request_added", 8, 9), ("blocks_allocated", blocks, None), ("block_cached", blocks, None),
                           ("blocks_freed", blocks, None), ("request_finished", "length", 1)):
            events.append(Event(len(events), len(events), kind, 0, name, a, b))
    history = History(chapter_work=10**9)
    history.extend(events)
    state = history.state
    assert len(state.block_places) == len(state.cached_blocks) == 240_000
    took = _timed(history._chapter, state)
    assert took < 0.003, f"{took * 1e3:.1f} ms"  # 0.2 ms where measured
    copy = state.clone()
    assert copy.cached_blocks == state.cached_blocks
    state.apply(Event(len(events), len(events), "blocks_evicted", 0, None, [7, 239_999], None))
    assert len(state.cached_blocks) == 239_998 and 7 in copy.cached_blocks and 7 not in state.cached_blocks
