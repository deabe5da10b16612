"""Events: enough to rebuild the engine's state, bounded, numbered, and absent when nobody listens."""

import threading
import time

import pytest

from tests.toy import continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import KINDS, Event, EventLog
from tinyvllm.engine.state import EngineState


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
    assert state.cached_blocks == {block.block_id for block in pool.blocks if block.block_hash is not None}
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
    assert [s.batch for s in state.steps] == [[["a", 0, 4, False]], [["a", 4, 2, True]], [["a", 6, 1, True]],
                                              [["a", 7, 1, True]]]
    assert [s.step for s in state.steps] == [1, 2, 3, 4] and all(s.runner_ns > 0 for s in state.steps)


def test_a_reader_that_fell_behind_sees_the_gap():
    log = EventLog(capacity=10)
    for i in range(25):
        log.emit("token", "a", i)
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


def test_an_event_costs_microseconds():
    log = EventLog()
    start = time.perf_counter()
    for i in range(20_000):
        log.emit("token", "a", i, "x")
    assert (time.perf_counter() - start) / 20_000 < 20e-6  # about 1 us where measured; the limit forgives a busy machine


def test_a_reader_in_another_thread_misses_nothing_while_the_engine_writes():
    log, total, seen = EventLog(), 30_000, []
    writer = threading.Thread(target=lambda: [log.emit("token", "a", i) for i in range(total)])
    writer.start()
    while len(seen) < total:
        events, gap = log.read(len(seen))
        assert not gap
        seen += [event.a for event in events]
    writer.join()
    assert seen == list(range(total))
