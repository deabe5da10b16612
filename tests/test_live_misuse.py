"""LiveEngine in rough hands: commands in any order and from any thread, wrong arguments, callbacks that do what they
should not, engines that fail. Nothing hangs, nothing is lost without a word, and a reset always works."""

import asyncio
import random
import sys
import threading
import time

import pytest

from tests.test_live_engine import LONG, SHORT, until
from tinyvllm import SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.errors import ConfigError, OutOfDeviceMemoryError, RequestError, TinyVLLMError


@pytest.fixture
def live(make_llm):
    with LiveEngine(make_llm()) as engine:
        yield engine


@pytest.fixture
def finished(live):
    """request_id -> its last output."""
    outputs = {}
    live.on_output(lambda output: outputs.update({output.request_id: output}) if output.finished else None)
    return outputs


# ---- a reset, and what is asked for at once ----


def test_whoever_adds_right_after_a_reset_meets_the_new_engine(live, finished):
    drawn = SamplingParams(temperature=1, max_tokens=12, ignore_eos=True)  # its seed comes from the request's number
    texts = set()
    for _ in range(5):
        live.add("The fox", SHORT)
        live.add("The fox", SHORT)
        live.reset()
        names = [live.add("The river", drawn), live.add("The river", drawn)]
        live.wait_idle()
        assert names == ["0", "1"]
        texts.add((finished["0"].outputs[0].text, finished["1"].outputs[0].text))
    assert len(texts) == 1 and live.callback_error is None


def test_right_after_a_reset_the_new_limits_hold(live):
    live.between_steps(lambda llm: time.sleep(0.1))  # the reset takes its time to come
    live.reset(num_blocks=4, max_num_seqs=32)
    live.set_policy(max_num_seqs=32)
    with pytest.raises(RequestError, match="whole KV cache holds 64"):
        live.add("The fox " * 40, SHORT)
    live.reset(num_blocks=64)
    live.reset(block_size=4)  # of 64 blocks of 16, not of 4
    live.add("The fox " * 40, SHORT)
    live.wait_idle()
    assert live.stats.num_finished == 1 and live.stats.num_blocks == 256 and live.error is None


def test_a_callback_may_reset_and_add(live, finished):
    asked = []

    def again(output):
        if output.request_id == "first" and output.finished:
            live.reset()
            asked.append(live.add("The fox", SHORT))

    live.on_output(again)
    live.add("The river", SHORT, "first")
    until(lambda: asked and asked[0] in finished)
    live.wait_idle()
    assert live.stats.num_finished == 1 and live.callback_error is None


def test_a_reset_works_whatever_happened(live, monkeypatch):
    make, failures = live.llm._make_engine, [RuntimeError("the driver is gone"), RuntimeError("still gone")]

    def fail_twice():
        if failures:
            raise failures.pop(0)
        make()

    monkeypatch.setattr(live.llm, "_make_engine", fail_twice)
    live.add("The river", LONG)
    live.reset()
    until(lambda: live.state == "failed")
    assert live.llm.engine is None and "still gone" in repr(live)
    with pytest.raises(TinyVLLMError, match=r"still gone\); reset\(\) starts it afresh"):
        live.add("The fox", SHORT)
    with pytest.raises(TinyVLLMError, match="still gone"):
        live.stats  # noqa: B018
    live.stop()
    live.pause()
    live.resume()
    live.tell_again()
    live.reset()
    live.add("The fox", SHORT)
    live.wait_idle()
    assert live.stats.num_finished == 1 and live.error is None


def test_a_reset_without_memory_leaves_an_engine_that_is_listened_to(live, monkeypatch):
    make, failures = live.llm._make_engine, [OutOfDeviceMemoryError("no room")]

    def fail_once():
        if failures:
            raise failures.pop()
        make()

    monkeypatch.setattr(live.llm, "_make_engine", fail_once)
    live.reset()
    until(lambda: live.state == "failed")
    assert live.llm.engine.events is live.events
    live.reset()
    live.add("The fox", SHORT)
    live.wait_idle()


# ---- ids ----


def test_an_id_that_the_engine_has_not_heard_of_yet_is_taken_all_the_same(live, finished):
    live.pause()
    assert live.add("The river", SHORT, "0") == "0"
    assert live.add("The fox", SHORT) == "1", "somebody chose that number for a name"
    live.add("The fox", SHORT, "a")
    with pytest.raises(RequestError, match="request id 'a' is in use: choose another, or leave it out"):
        live.add("The owl", SHORT, "a")
    live.abort("a")
    live.add("The owl", SHORT, "a")  # that comes after the end of the other
    live.resume()
    live.wait_idle()
    assert set(finished) == {"0", "1", "a"} and finished["a"].outputs[0].finish_reason == "length"
    live.add("The owl", LONG, "a")  # and again, once it has ended
    live.stop()
    live.add("The owl", LONG, "a")
    live.reset()
    live.add("The owl", SHORT, "a")
    live.wait_idle()
    assert live.callback_error is None and live.stats.num_finished == 1


@pytest.mark.parametrize("wrong", [5, ["a", "b"], b"a", "\ud83d"])
def test_ids_that_cannot_be_are_refused_and_the_others_go_on(live, wrong):
    live.add("The river", LONG)
    for use in (lambda: live.add("The fox", SHORT, wrong), lambda: live.abort(wrong), lambda: live.abort("0", wrong)):
        with pytest.raises(RequestError, match="a request id is (text, got|valid Unicode)"):
            use()
    until(lambda: live.stats.num_output_tokens > 5)
    assert live.error is None and live.stats.num_running == 1


def test_ids_and_prompts_may_be_any_text(live, finished):
    names = ["", "🦊", "<script>alert(1)</script>", "\u202e", "a\nb", "1.1", "x" * 10_000]
    for name in names:
        live.add(f"The river {name[:50]}.", SHORT, name)
    live.wait_idle()
    assert set(finished) == set(names) and live.callback_error is None


# ---- who waits for outputs ----


async def listen(live, seconds=10):
    async def read():
        return [output async for output in live.stream("The river", LONG)]

    return await asyncio.wait_for(read(), seconds)


def take_over(live):
    LiveEngine(live.llm).close()


@pytest.mark.parametrize("end", [LiveEngine.close, LiveEngine.stop, LiveEngine.reset, take_over])
def test_a_stream_ends_with_whatever_ends_its_request(live, end):
    live.set_speed(50)
    timer = threading.Timer(0.2, end, [live])
    timer.start()
    outputs = asyncio.run(listen(live))
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    timer.join()


def test_a_stream_of_a_run_that_fails_says_so(live):
    live.set_speed(50)
    threading.Timer(0.2, lambda: setattr(live.llm.runner, "execute", lambda batch: 1 / 0)).start()
    with pytest.raises(TinyVLLMError, match="request 0 got no further: division by zero"):
        asyncio.run(listen(live))
    with pytest.raises(TinyVLLMError, match=r"reset\(\) starts it afresh"):
        asyncio.run(listen(live))
    live.reset()
    live.add("The fox", SHORT)
    live.wait_idle()


def test_a_cancelled_stream_ends_its_request(live):
    live.set_speed(50)
    with pytest.raises(TimeoutError):
        asyncio.run(listen(live, 0.2))
    until(lambda: live.stats.num_finished == 1)
    assert live.stats.num_running == 0 and not live._listeners._all


# ---- callbacks ----


def test_what_callbacks_may_not_do_harms_nobody_else(live, finished):
    def wait(output):
        live.wait_idle()

    for callback, message in ((lambda output: sys.exit(3), "3"), (wait, "in a callback would wait for itself")):
        remove = live.on_output(callback)
        live.add("The river", SHORT)
        live.wait_idle(10)
        remove()
        assert message in str(live.callback_error)
    assert len(finished) == 2
    with pytest.raises(TypeError, match="on_output takes a function that is called with each RequestOutput, got None"):
        live.on_output(None)


def test_each_of_two_like_callbacks_is_removed_alone(live):
    seen = []
    first, second = live.on_output(seen.append), live.on_output(seen.append)
    first()
    live.add("The river", SHORT)
    live.wait_idle()
    assert len(seen) == 8
    second()
    live.add("The river", SHORT)
    live.wait_idle()
    assert len(seen) == 8


def test_a_callback_may_close(make_llm):
    live = LiveEngine(make_llm())
    live.on_output(lambda output: live.close())
    live.add("The river", LONG)
    until(lambda: live.state == "closed")
    live.close()
    assert live.callback_error is None and live.llm.engine.events is None and live.llm.generate("The fox", SHORT)


# ---- one engine, one driver ----


def test_an_llm_that_is_driven_refuses_to_be_used_directly(make_llm):
    llm = make_llm()
    stream = llm.stream("The fox", LONG)
    next(stream)
    live = LiveEngine(llm, steps_per_second=50)
    live.add("The river", LONG)
    for use in (lambda: llm.generate("The fox", SHORT), lambda: next(stream), llm.reset,
                lambda: llm.chat([{"role": "user", "content": "Hello"}], SHORT), lambda: llm.stream("The fox", SHORT)):
        with pytest.raises(TinyVLLMError, match=r"a LiveEngine drives this LLM: use its add\(\).* or close\(\) it"):
            use()
    live.add("The fox", SHORT)
    until(lambda: live.stats.num_output_tokens > 8)
    assert live.error is None
    live.close()
    assert llm.engine.stats.num_running == 0, "requests of a closed engine are nobody's"
    assert llm.generate("The fox", SHORT)[0].finished
    llm.reset()


def test_waiting_for_a_closed_engine_is_no_wait(make_llm):
    live = LiveEngine(make_llm(), paused=True)
    live.add("The river", LONG)
    until(lambda: live.stats.num_waiting == 1)
    live.close()
    start = time.perf_counter()
    live.wait_idle()  # its requests ended with it
    assert time.perf_counter() - start < 5
    for call in (lambda: live.add("The river", LONG), live.reset, lambda: live.between_steps(print).result(5)):
        with pytest.raises(TinyVLLMError, match="this LiveEngine is closed: make a new one"):
            call()


@pytest.mark.parametrize("wrong", ["demo", None, 5])
def test_only_an_llm_can_be_driven(wrong):
    with pytest.raises(TypeError, match=r"a LiveEngine needs an LLM, as in LiveEngine\(LLM\('demo'\)\), got"):
        LiveEngine(wrong)


def test_speeds_and_limits_that_cannot_be(live):
    live.set_speed(10**400)  # as good as none
    assert live.steps_per_second is None
    for use in (lambda: live.set_speed(float("nan")), lambda: live.set_speed(0), lambda: live.set_speed(True),
                lambda: live.set_policy(max_num_seqs=True), lambda: live.step(0), lambda: live.step(2.0)):
        with pytest.raises(ConfigError):
            use()


def test_a_storm_of_commands_from_many_threads_leaves_a_sound_engine(make_llm):
    live, trouble = LiveEngine(make_llm(num_blocks=24, max_num_seqs=4)), []
    end = time.monotonic() + 3

    def listener(output):
        if random.random() < 0.02:
            live.abort(output.request_id)
            live.add("The fox", SHORT)
        elif random.random() < 0.02:
            raise ValueError("a mistake")

    live.on_output(listener)

    async def read():
        live.resume()
        async for _ in live.stream("The river", SHORT):
            if random.random() < 0.1:
                return

    def use(seed):
        draw = random.Random(seed)
        commands = [lambda: live.add("x " * draw.randint(1, 40), SHORT)] * 6 + [
            live.pause, live.resume, live.resume, live.stop, live.tell_again, lambda: live.step(draw.randint(1, 4)),
            lambda: live.add("The owl", SHORT, draw.choice("ab")), lambda: live.reset(num_blocks=draw.choice((16, 32))),
            lambda: live.set_policy(max_num_seqs=draw.randint(1, 4)), lambda: repr(live), lambda: live.abort("a", "b"),
            lambda: live.between_steps(lambda llm: llm.engine.kv_cache_manager.check()).result(20),
            lambda: live.between_steps(lambda llm: setattr(llm.runner, "execute", None) if draw.random() < 0.05 else 0),
            lambda: asyncio.run(asyncio.wait_for(read(), 20))]
        while time.monotonic() < end:
            try:
                draw.choice(commands)()
            except TimeoutError:
                if not live._paused:
                    trouble.append("a stream hangs")
            except TinyVLLMError as error:
                if "stopped at an error" in str(error):
                    live.reset()
            except BaseException as error:
                trouble.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    assert not trouble and not any(t.is_alive() for t in threads)
    live.resume()
    live.reset()
    live.add("The fox", SHORT)
    live.wait_idle()
    live.between_steps(lambda llm: llm.engine.kv_cache_manager.check()).result(10)
    assert not live._ids._taken and not live._ids._submitted and live.stats.num_free_blocks == live.stats.num_blocks
    live.close()
