"""LiveEngine: commands between steps, at once; errors that end nothing but the run."""

import asyncio
import threading
import time

import pytest

from tests.test_events import assert_state_equals_engine, catch_up
from tinyvllm import SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.state import EngineState
from tinyvllm.errors import ConfigError, RequestError, TinyVLLMError

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def live(make_llm):
    with LiveEngine(make_llm()) as engine:
        yield engine


def until(condition, timeout=20.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def test_outputs_are_those_of_generate(make_llm):
    want = make_llm().generate(["The river", "The fox"], SHORT)
    finished = {}
    with LiveEngine(make_llm()) as live:
        live.on_output(lambda o: finished.update({o.request_id: o}) if o.finished else None)
        ids = [live.add("The river", SHORT), live.add("The fox", SHORT)]
        live.wait_idle()
    assert [finished[i].outputs[0].token_ids for i in ids] == [o.outputs[0].token_ids for o in want]


def test_every_call_returns_at_once_while_the_engine_runs(live):
    slowest = 0.0
    for call in (lambda: live.add("The river", LONG), live.pause, live.step, live.resume, lambda: live.set_speed(500),
                 lambda: live.set_policy(max_num_seqs=2), lambda: live.state, lambda: live.stats, live.stop):
        start = time.perf_counter()
        call()
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.15


def test_pause_step_and_resume(live):
    live.pause()
    live.add("The river", LONG, "a")
    until(lambda: live.state == "paused" and live.stats.num_waiting == 1)
    assert live.stats.num_steps == 0
    live.step(3)
    until(lambda: live.stats.num_steps == 3)
    time.sleep(0.05)
    assert live.stats.num_steps == 3 and live.state == "paused"
    live.resume()
    until(lambda: live.stats.num_steps > 10)


def test_stop_is_heard_within_150_ms(live):
    for _ in range(4):
        live.add("The river", LONG)
    until(lambda: live.stats.num_running == 4)
    start = time.perf_counter()
    live.stop()
    until(lambda: live.stats.num_running == 0 and live.stats.num_waiting == 0)
    assert time.perf_counter() - start < 0.15
    assert live.stats.num_free_blocks == live.stats.num_blocks and live.state == "idle"
    live.add("The fox", SHORT)
    live.wait_idle()


def test_stop_is_heard_also_under_a_slow_speed_limit(live):
    live.set_speed(0.5)
    live.add("The river", LONG)
    until(lambda: live.stats.num_running == 1)
    start = time.perf_counter()
    live.stop()
    until(lambda: live.stats.num_running == 0)
    assert time.perf_counter() - start < 0.15


def test_speed_limits_the_steps(live):
    live.set_speed(50)
    start = time.perf_counter()
    live.add("The river", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    live.wait_idle()
    assert 0.36 < time.perf_counter() - start < 3


def test_policy_changes_between_steps_without_losing_a_request(live):
    live.pause()
    for i in range(6):
        live.add(f"The river {i}", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    live.set_policy(max_num_seqs=2, scheduling_policy="static")
    live.step(4)
    until(lambda: live.stats.num_steps == 4)
    assert live.stats.num_running == 2
    live.set_policy(max_num_seqs=16, scheduling_policy="continuous")
    live.step()
    until(lambda: live.stats.num_running == 6)
    live.resume()
    live.wait_idle()
    assert live.stats.num_finished == 6
    for wrong, message in ((dict(max_num_seqs=99), r"max_num_seqs can be 1 to 16 here, got 99; more needs reset"),
                           (dict(scheduling_policy="lottery"), "must be 'continuous' or 'static', got 'lottery'")):
        with pytest.raises(ConfigError, match=message):
            live.set_policy(**wrong)


def test_reset_begins_anew_with_another_block_size(live):
    live.add("The river", LONG)
    live.reset(block_size=4, scheduling_policy="static")
    live.add("The fox", SHORT)
    live.wait_idle()
    assert live.stats.num_finished == 1 and live.stats.num_blocks == 128 * 16 // 4
    assert live.llm.engine.scheduler.policy == "static"
    with pytest.raises(ConfigError, match="'device' cannot be changed by a reset"):
        live.reset(device="cuda")
    with pytest.raises(ConfigError, match="block_size must be a whole number"):
        live.reset(block_size=0)
    assert live.error is None


def test_a_bad_prompt_is_refused_where_it_was_given_and_others_go_on(live):
    live.add("The river", LONG, "good")
    with pytest.raises(RequestError, match="the prompt is empty"):
        live.add("", SHORT)
    until(lambda: live.stats.num_output_tokens > 5)
    assert live.error is None


def test_an_engine_error_is_kept_told_and_survived(live):
    live.llm.runner.execute = lambda batch: 1 / 0
    live.add("The river", SHORT)
    until(lambda: live.state == "failed")
    assert isinstance(live.error, ZeroDivisionError) and "division by zero" in repr(live)
    with pytest.raises(TinyVLLMError, match=r"stopped at an error \(ZeroDivisionError.*reset\(\) starts it afresh"):
        live.add("The fox", SHORT)
    with pytest.raises(ZeroDivisionError):
        live.wait_idle()
    live.reset()
    until(lambda: live.error is None)
    live.add("The fox", SHORT)
    live.wait_idle()
    assert live.stats.num_finished == 1


def test_a_broken_callback_does_not_stop_the_engine(live):
    live.on_output(lambda output: 1 / 0)
    live.add("The river", SHORT)
    live.wait_idle()
    assert isinstance(live.callback_error, ZeroDivisionError) and live.stats.num_finished == 1


def test_async_stream_and_leaving_it_early(live, make_llm):
    async def use():
        texts = [output.outputs[0].new_text async for output in live.stream("The river", SHORT)]
        stream = live.stream("The river", LONG)
        async for _ in stream:
            break
        await stream.aclose()
        return "".join(texts)

    assert asyncio.run(use()) == make_llm().generate("The river", SHORT)[0].outputs[0].text
    live.wait_idle()
    assert live.stats.num_output_tokens < 400, "the stream that was left ran on"


def test_events_tell_the_state_also_from_another_thread(make_llm):
    log, state = EventLog(), EngineState()
    with LiveEngine(make_llm(num_blocks=12), events=log) as live:
        for i in range(6):
            live.add(f"The river {i} went on and on", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        while live.state == "running":
            catch_up(state, log)  # while the engine writes
        live.wait_idle()
        catch_up(state, log)
        assert_state_equals_engine(state, live.llm.engine)
    assert sum(len(r.token_ids) for r in state.requests.values()) == 240


def test_many_threads_may_add_and_abort(live):
    ids = []

    def use(n):
        for i in range(5):
            ids.append(live.add(f"The river {n} {i}", SHORT))
            if i % 2:
                live.abort(ids[-1])

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    live.wait_idle()
    assert len(set(ids)) == 20 and live.stats.num_finished == 20
    live.llm.engine.kv_cache_manager.check()


def test_closed_engines_say_so(make_llm):
    live = LiveEngine(make_llm())
    live.close()
    with pytest.raises(TinyVLLMError, match="closed: make a new one"):
        live.add("The river", SHORT)
    assert live.state == "closed" and live.llm.generate("The river", SHORT)


def test_looks_between_steps_always_get_an_answer(make_llm):
    with LiveEngine(make_llm()) as live:
        live.add("The river", LONG)
        until(lambda: live.stats.num_output_tokens > 3)
        steps = live.between_steps(lambda llm, more: llm.engine.num_steps + more, 1000).result(timeout=5)
        assert steps > 1003
        with pytest.raises(ZeroDivisionError):
            live.between_steps(lambda llm: 1 / 0).result(timeout=5)
        assert live.error is None
        cancelled = live.between_steps(time.sleep, 0)
        cancelled.cancel()
        slow = live.between_steps(lambda llm: time.sleep(0.2))  # the thread ends in it
        until(slow.running)
        late = [live.between_steps(lambda llm: 1) for _ in range(3)]
        live.close()
        late.append(live.between_steps(lambda llm: 1))
    assert slow.result(timeout=5) is None
    for future in late:
        try:
            assert future.result(timeout=5) == 1
        except TinyVLLMError as error:
            assert "this LiveEngine is closed: make a new one" in str(error)
    with pytest.raises(TinyVLLMError, match="this LiveEngine is closed"):
        late[-1].result()


def test_who_asks_during_the_last_step_is_not_left_waiting(make_llm):
    live = LiveEngine(make_llm())
    execute = live.llm.runner.execute
    live.llm.runner.execute = lambda batch: (time.sleep(0.3), execute(batch))[1]
    live.add("The river", LONG)
    until(lambda: live._stepping)
    look = live.between_steps(lambda llm: 1)
    live.close()
    with pytest.raises(TinyVLLMError, match="this LiveEngine is closed"):
        look.result(timeout=1)


def test_kind_time_and_texts_of_tokens(live):
    assert live.kind == "cpu"
    before = live.now_ns()
    live.add("The river", SHORT)
    live.wait_idle()
    times = [event.t_ns for event in live.events.read()[0] if event.kind == "step_ended"]
    assert before < times[0] <= times[-1] < live.now_ns() == pytest.approx(time.perf_counter_ns(), abs=1e9)
    tokenizer = live.llm.tokenizer
    ids = tokenizer.encode("The river", add_special_tokens=False)
    assert "".join(live.token_text(i) for i in ids) == "The river"
    assert live.token_text(10**6) is None and live.token_text(-1) is None
    part = next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(i) == b"\xe2")
    assert live.token_text(part) == "\ufffd"


def test_who_fell_behind_is_told_all_that_is_running_again_and_the_others_lose_nothing(live):
    whole = EngineState()
    live.add("The fox", SHORT, "done")
    live.wait_idle()
    live.add("The river", LONG, "a")
    until(lambda: live.stats.num_output_tokens > 20)
    live.pause()
    until(lambda: live.state == "paused" and not live._stepping)
    since = live.events.next_seq
    catch_up(whole, live.events)
    live.tell_again()
    until(lambda: live.events.next_seq > since)
    live.between_steps(lambda llm: None).result(timeout=5)
    late = EngineState()
    for event in live.events.read(since)[0]:
        late.apply(event)
    catch_up(whole, live.events)
    assert list(whole.requests) == ["done", "a"] and list(late.requests) == ["a"] and len(whole.steps) > 20
    a, known = late.requests["a"], whole.requests["a"]
    assert a.text == known.text != "" and a.token_ids == known.token_ids
    request = live.llm.engine.scheduler.running[0]
    assert a.added_ns == int(request.metrics.arrival_time * 1e9) <= known.added_ns, "when it came, not when it was told"
    assert a.token_ns == [int(t * 1e9) for t in request.token_times]
    assert all(made <= told for made, told in zip(a.token_ns, known.token_ns))
    live.resume()
    until(lambda: live.stats.num_output_tokens > 60)
    live.stop()
    live.wait_idle()
    for state in (late, whole):
        catch_up(state, live.events)
    assert late.requests["a"].text == whole.requests["a"].text


def test_what_was_asked_before_a_reset_that_leaves_less_room_still_ends(live):
    refused = []

    def once_more(output):  # in the engine's thread, in the middle of the reset: by the engine that is about to go
        if output.request_id == "first" and output.finished:
            live.add("The river went on and on", LONG, "a")
            live.add("The fox " * 40, SHORT, "b")  # no room for it any more

    live.on_output(once_more, lambda error, request_id: refused.append(request_id))
    live.add("The river", LONG, "first")
    live.reset(num_blocks=4)
    live.between_steps(lambda llm: None).result(10)
    live.wait_idle()
    assert live.error is None and live.stats.num_finished == 1 and refused == ["b"]
    assert isinstance(live.callback_error, RequestError) and "whole KV cache holds 64" in str(live.callback_error)
    state = EngineState()
    for event in live.events.read()[0]:
        state.apply(event)
    assert state.requests["a"].num_tokens == 64


def test_calls_during_a_reset_find_an_engine(live):
    make = live.llm._make_engine
    live.llm._make_engine = lambda: (time.sleep(0.2), make())
    live.reset(num_blocks=64)
    until(lambda: live.llm.engine is None)
    assert live.stats.num_blocks == 64 and "LiveEngine" in repr(live)
    live.add("The river", SHORT)
    live.wait_idle()
    assert live.stats.num_finished == 1


def test_a_second_live_engine_on_the_same_llm_takes_over(make_llm):
    llm = make_llm()
    first = LiveEngine(llm, steps_per_second=5)
    first.add([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
    while not first.stats.num_running:
        time.sleep(0.005)
    with LiveEngine(llm) as second:
        assert first.state == "closed" and second.stats.num_running == 0
        with pytest.raises(TinyVLLMError, match="closed"):
            first.add([1, 2, 3])
        request_id = second.add([4, 5, 6], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        second.wait_idle()
        assert second.error is None and request_id not in second.stats.running
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks
