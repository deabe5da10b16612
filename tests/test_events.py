"""Events: enough to rebuild the engine's state, bounded, numbered, and absent when nobody listens."""

import gc
import threading
import time

import pytest

from tests.toy import continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import KINDS, Event, EventLog
from tinyvllm.engine.state import KEPT_REQUESTS, KEPT_STEPS, EngineState


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def assert_state_equals_engine(state: EngineState, engine) -> None:
    """Everything that both know must be the same."""
    pool, scheduler = engine.kv_cache_manager.pool, engine.scheduler
    assert state.gaps == 0
    assert {b: sorted(owners) for b, owners in state.block_owners.items()} == {
        block.block_id: sorted(name for name, ids in engine.kv_cache_manager.req_to_block_ids.items()
                               if block.block_id in ids) for block in pool.blocks if block.ref_cnt}
    assert state.num_used_blocks == pool.num_blocks - pool.num_free_blocks
    assert set(state.cached_blocks) == {block.block_id for block in pool.blocks if block.block_hash is not None}
    alive = [*scheduler.running, *scheduler.waiting]
    statuses = {r.request_id: r.status for r in state.requests.values() if r.finished_ns is None}
    assert statuses == {r.request_id: r.status.value for r in alive}
    for request in alive:
        told = state.requests[request.request_id]
        assert told.num_computed_tokens == request.num_computed_tokens
        assert told.token_ids == request.output_token_ids
        assert told.block_ids == engine.kv_cache_manager.block_ids(request)
        assert told.num_preemptions == request.metrics.num_preemptions or told.status == "preempted"


def catch_up(state, log) -> None:
    events, gap = log.read(state.next_seq)
    assert not gap
    for event in events:
        assert event.kind in KINDS
        state.apply(event)


OPTIONS = [dict(num_blocks=6), dict(num_blocks=16), dict(num_blocks=16, scheduling_policy="static", max_num_seqs=2),
           dict(num_blocks=16, use_kv_cache=False, enable_prefix_caching=False),
           dict(num_blocks=16, enable_prefix_caching=False, max_num_batched_tokens=5)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("listen_at", [0, 3])
def test_the_state_told_by_events_is_the_engine_s_own_after_every_step(options, listen_at):
    engine = toy_engine(**options)
    log, state = EventLog(), EngineState()
    prompts = {str(i): [1, 2, 3, 4, 5, 6][:3 + i % 4] + [i] for i in range(7)}
    for name, prompt in prompts.items():
        engine.add_request(prompt, greedy(8 + len(prompt) % 3), name)
    for step in range(500):
        if step == listen_at:
            engine.listen(log)
        if not engine.has_unfinished_requests():
            break
        if step == 5:
            engine.abort("4")
        engine.step()
        if step >= listen_at:
            catch_up(state, log)
            assert_state_equals_engine(state, engine)
    assert not engine.has_unfinished_requests()
    for name, request in state.requests.items():
        assert request.finished_ns is not None and all(span.end_ns for span in request.spans)
        if name != "4":
            assert request.token_ids == continuation(prompts[name], 8 + len(prompts[name]) % 3)
    if options == dict(num_blocks=6):
        assert any(span.kind == "preempted" for r in state.requests.values() for span in r.spans)


def test_a_failed_step_is_told_and_nothing_was_computed():
    engine, log, state = toy_engine(), EventLog(), EngineState()
    engine.listen(log)
    engine.add_request([1, 2, 3], greedy(4), "a")
    engine.runner.fail_next = True
    with pytest.raises(RuntimeError):
        engine.step()
    catch_up(state, log)
    assert state.steps[-1].error == "RuntimeError: the device fell over"
    assert_state_equals_engine(state, engine)
    run(engine)
    catch_up(state, log)
    assert state.requests["a"].token_ids == continuation([1, 2, 3], 4)


def test_times_and_steps():
    engine, log, state = toy_engine(max_num_batched_tokens=4, max_num_seqs=2), EventLog(), EngineState()
    engine.listen(log)
    engine.add_request([1, 2, 3, 4, 5, 6], greedy(3), "a")
    run(engine)
    catch_up(state, log)
    request = state.requests["a"]
    assert [span.kind for span in request.spans] == ["waiting", "prefill", "decode"]
    assert request.ttft_ns > 0 and len(request.itl_ns()) == 2 and min(request.itl_ns()) > 0
    assert [s.batch for s in state.steps] == [(("a", 0, 4, False),), (("a", 4, 2, True),), (("a", 6, 1, True),),
                                              (("a", 7, 1, True),)]
    assert [s.step for s in state.steps] == [1, 2, 3, 4] and all(s.runner_ns > 0 for s in state.steps)


def test_a_reader_that_fell_behind_sees_the_gap():
    log = EventLog(capacity=10)
    for i in range(25):
        log.emit("tokens", "a", i)
    events, gap = log.read(0)
    assert gap and [e.seq for e in events] == list(range(15, 25))
    events, gap = log.read(22)
    assert not gap and [e.a for e in events] == [22, 23, 24]
    assert log.read(25) == ([], False)


def test_nothing_is_recorded_after_listening_stopped():
    engine, log = toy_engine(), EventLog()
    engine.listen(log)
    engine.add_request([1, 2, 3], greedy(4), "a")
    count = len(log)
    engine.listen(None)
    run(engine)
    assert len(log) == count


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind of event 'dance'"):
        EngineState().apply(Event(0, 0, "dance", 0, None, None, None))


def told(log, since=0) -> EngineState:
    """A state made of the events from `since` on."""
    state = EngineState()
    for event in log.read(since)[0]:
        state.apply(event)
    return state


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_told_again_is_the_same_for_who_missed_it_and_nothing_new_for_who_did_not(options):
    engine, log, whole, seen = toy_engine(**options), EventLog(), EngineState(), []
    engine.listen(log)
    for i in range(7):
        engine.add_request([1, 2, 3, 4, 5, 6][:3 + i % 4] + [i], greedy(8 + i % 3), str(i))
    while engine.has_unfinished_requests():
        engine.step()
        since = log.next_seq
        engine.listen(log)
        late = told(log, since)
        assert_state_equals_engine(late, engine)
        catch_up(whole, log)
        for name, request in late.requests.items():
            known = whole.requests[name]
            assert request.num_cached_tokens == known.num_cached_tokens and request.max_len == known.max_len
            assert request.num_preemptions == known.num_preemptions
            assert request.prompt_token_ids == known.prompt_token_ids
            assert request.added_ns <= known.added_ns  # these are the real times, and not that of the telling
            for before, real, retold in zip([known.added_ns, *known.token_ns], known.token_ns, request.token_ns):
                assert before < retold <= real
            seen.append(request)
    assert_state_equals_engine(whole, engine)
    assert len(whole.steps) > 8 and len(whole.requests) == 7, "its history is gone"
    assert any(r.num_preemptions for r in seen) == (options == dict(num_blocks=6))


def test_an_idle_engine_told_again_takes_nothing_from_who_knows_it():
    engine, log = toy_engine(enable_prefix_caching=False), EventLog()
    engine.listen(log)
    engine.add_request([1, 2, 3], greedy(4), "a")
    run(engine)
    engine.listen(log)
    assert told(log).requests["a"].token_ids == continuation([1, 2, 3], 4)


def test_after_a_gap_nothing_is_believed_until_the_configuration():
    engine, log, state = toy_engine(), EventLog(), EngineState()
    engine.listen(log)
    engine.add_request([1, 2, 3], greedy(20), "a")
    engine.step(), engine.step()
    events = log.read()[0]
    for event in [*events[:3], *events[6:]]:
        assert state.apply(event) == (event.seq < 3)
    assert state.gaps == 3
    engine.listen(log)
    for event in log.read(state.next_seq)[0]:
        assert state.apply(event)
    state.gaps = 0
    assert_state_equals_engine(state, engine)


def test_a_new_configuration_clears_everything():
    engine, log = toy_engine(), EventLog()
    engine.listen(log)
    engine.add_request([1, 2, 3, 4, 5], greedy(4), "a")
    run(engine)
    log.emit("step_profiled", None, [["linear", 0, 1, 2, 3]], {"clock": "cpu"})
    assert told(log).profile and told(log).steps and told(log).cached_blocks
    toy_engine(num_blocks=3).listen(log)
    state = told(log)
    assert state.config["num_blocks"] == 3 and not (state.requests or state.steps or state.block_owners)
    assert not state.cached_blocks and state.profile is None


@pytest.mark.parametrize("where", ["_emit", "_tell_new_tokens"])
def test_a_step_that_was_interrupted_is_told_once(where):
    engine, first, second = toy_engine(), EventLog(), EventLog()
    engine.listen(first)
    engine.add_request([1, 2, 3], greedy(6), "a")
    engine.step()

    def interrupt(*_):
        if where == "_emit" or engine._new_tokens:
            raise KeyboardInterrupt

    setattr(engine, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    delattr(engine, where)
    engine.listen(second)
    run(engine)
    assert told(first).requests["a"].token_ids == continuation([1, 2, 3], 6)[:2], "all that happened while it listened"
    assert told(second).requests["a"].token_ids == continuation([1, 2, 3], 6)


def test_the_state_is_bounded_and_forgets_no_running_request():
    log, count = EventLog(10**6), 3 * KEPT_REQUESTS
    log.emit("engine_config", None, {})
    log.emit("request_added", "oldest", 3, 9)
    for i in range(count):
        log.step = i
        name = str(i)
        log.emit("request_added", name, [1, 2], 9)
        log.emit("blocks_allocated", name, [i])
        for _ in range(3):
            log.emit("step_begun", None, 1, [["oldest", i, 1, True], [name, 0, 1, True]])
            log.emit("step_ended", None, 1)
        log.emit("tokens", None, [["oldest", 5, "x"], [name, 5, "x"]])
        log.emit("blocks_freed", name, [i])
        log.emit("request_finished", name, "length", 1)
    log.emit("request_added", "late", 3, 9)
    state = told(log)
    assert len(state.steps) == KEPT_STEPS and not state.block_owners
    assert list(state.requests) == ["oldest", *map(str, range(count - KEPT_REQUESTS, count)), "late"]
    assert len(state.requests["oldest"].token_ids) == count
    everything = EngineState(kept_steps=None, kept_requests=None)
    for event in log.read()[0]:
        everything.apply(event)
    assert len(everything.requests) == count + 2 and len(everything.steps) == 3 * count


def test_a_name_that_is_used_again_is_a_new_request_and_not_forgotten_for_the_old_one():
    log = EventLog(10**6)
    log.emit("engine_config", None, {})
    for name in ["again", "b", "again", *map(str, range(KEPT_REQUESTS - 1))]:
        log.emit("request_added", name, 2, 9)
        if name != "again" or len(log) == 2:
            log.emit("request_finished", name, "stop", 0)
    state = told(log)
    assert state.requests["again"].status == "waiting" and list(state.requests)[:2] == ["b", "again"]


def test_events_of_requests_that_were_forgotten_end_nothing():
    log = EventLog()
    log.emit("step_ended", None, 5), log.emit("step_failed", None, "x")
    log.emit("engine_config", None, {})
    for kind, a, b in (("request_scheduled", 0, 0), ("request_preempted", 3, None), ("blocks_allocated", [1], None),
                       ("blocks_shared", [2], None), ("block_cached", 1, 0), ("blocks_freed", [1, 2, 3], None),
                       ("tokens", [["gone", 5, "x"]], None), ("step_begun", 1, [["gone", 0, 1, True]]),
                       ("step_ended", 5, None), ("request_finished", "stop", 1)):
        log.emit(kind, "gone", a, b)
    state = told(log)
    assert not state.requests and not state.block_owners and state.steps[-1].end_ns


def test_a_late_reader_gets_everything_while_the_engine_writes_without_pause():
    log, done = EventLog(50_000), threading.Event()
    for i in range(50_000):
        log.emit("tokens", "a", i)

    def write():
        while not done.is_set():
            log.emit("tokens", "a", log.next_seq)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        start = time.perf_counter()
        for _ in range(10):
            events, gap = log.read(0)
            assert gap and len(events) == 50_000 and events[-1].seq - events[0].seq == 49_999
        assert time.perf_counter() - start < 10
    finally:
        done.set()
        writer.join()


def test_the_rows_of_events_are_nothing_for_the_garbage_collector():
    engine, log = toy_engine(num_blocks=64, max_num_seqs=16, max_num_batched_tokens=64), EventLog()
    engine.listen(log)
    for _ in range(16):
        engine.add_request([1, 2, 3], greedy(9))
    run(engine)
    engine.listen(log)
    rows = [{"tokens": e.a, "step_begun": e.b}[e.kind] for e in log.read()[0] if e.kind in ("tokens", "step_begun")]
    gc.collect()
    assert sum(map(len, rows)) > 250
    assert not any(gc.is_tracked(column) for some in rows for column in some.columns)
    assert not hasattr(rows[0], "__dict__"), "one object an event, however many rows"


def test_an_event_can_have_happened_at_another_time():
    log = EventLog()
    log.step = 7
    log.emit_at(42, "tokens", None, [["a", 1, "x"]])
    assert log.read()[0] == [Event(0, 42, "tokens", 7, None, [["a", 1, "x"]], None)] and log.next_seq == 1


def test_applying_an_event_costs_microseconds():
    engine, log = toy_engine(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=64), EventLog()
    engine.listen(log)
    for i in range(64):
        engine.add_request([i % 7, 2, 3], greedy(40))
    run(engine)
    events = log.read()[0]
    best = 1.0
    for _ in range(5):
        state, start = EngineState(), time.perf_counter()
        for event in events:
            state.apply(event)
        best = min(best, time.perf_counter() - start)
    assert best / len(events) < 20e-6  # 1 to 2 us where measured


def test_an_event_costs_microseconds():
    log = EventLog()
    start = time.perf_counter()
    for i in range(20_000):
        log.emit("tokens", "a", i, "x")
    assert (time.perf_counter() - start) / 20_000 < 20e-6  # 1 us where measured; the limit forgives a busy machine


def test_a_reader_in_another_thread_misses_nothing_while_the_engine_writes():
    log, total, seen = EventLog(), 30_000, []
    writer = threading.Thread(target=lambda: [log.emit("tokens", "a", i) for i in range(total)])
    writer.start()
    while len(seen) < total:
        events, gap = log.read(len(seen))
        assert not gap
        seen += [event.a for event in events]
    writer.join()
    assert seen == list(range(total))


@pytest.mark.parametrize("waiting", [0, 300])
def test_who_asks_to_be_told_again_finds_the_beginning_however_much_is_told(waiting):
    """A pool as large as a GPU's took more events than a log holds: it was told again and again, and nothing else."""
    engine, log = toy_engine(num_blocks=2000, block_size=4, max_num_seqs=50, max_num_batched_tokens=400), EventLog(100)
    for i in range(100):
        engine.add_request([i % 50, i // 50, *range(30)], greedy(2), str(i))
    run(engine)
    for i in range(waiting):
        engine.add_request([i % 50, 3], greedy(2), f"w{i}")
    engine.listen(log)
    for _ in range(2):
        engine.listen(log)  # once more
        events, _ = log.read()
        first = next(i for i in reversed(range(len(events))) if events[i].kind == "engine_config")
        assert events[first].b == len(events) - first - 1 == waiting + 1
        state = EngineState()
        for event in events[first:]:
            state.apply(event)
        assert len(state.cached_blocks) > 500 and state.counts["waiting"] == waiting
        assert_state_equals_engine(state, engine)
