"""What is kept of a watched request, and for how long: also through chunks, preemptions, failures and its own end."""

import threading

import numpy as np
import pytest

from tests.probe_case import GREEDY, OTHERS, PROMPT, exact_attention, run, run_to_end
from tinyvllm import LiveEngine, SamplingParams
from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.probe import ProbeError


def test_tokens_before_watch_and_from_the_prefix_cache_are_reported_as_not_kept(make_llm):
    llm = make_llm(block_size=8)
    engine, probe = llm.engine, llm.probe
    engine.add_request(PROMPT, GREEDY, "it")
    engine.step(), engine.step()
    assert probe.watched is None and probe.kept == [] and probe.context == 0
    probe.watch("it")
    assert probe.watched == "it" and probe.kept == []
    with pytest.raises(ProbeError, match="nothing of request 'it' has been computed since watch"):
        probe.attention([0])
    engine.step(), engine.step()
    computed = len(PROMPT) + 3
    assert probe.kept == [computed - 2, computed - 1] and probe.context == computed
    with pytest.raises(ProbeError, match="position 3 of request 'it' was not kept: it was computed before watch"):
        probe.attention([computed - 1, 3])
    with pytest.raises(ProbeError, match="position 3 .* was not kept"):
        probe.hidden(3)
    exact, *_ = exact_attention(llm, llm.runner.watch.queries, llm.runner.watch.block_ids, 0, 1, computed - 1)
    np.testing.assert_allclose(probe.attention(computed - 1, 0, 1)[0, 0, 0], exact, rtol=2e-5, atol=1e-12)
    run_to_end(engine)

    probe.watch("again")
    engine.add_request(PROMPT, GREEDY, "again")
    engine.step()
    assert probe.kept == list(range(len(PROMPT) // 8 * 8, len(PROMPT)))  # the full blocks were found
    run_to_end(engine)
    probe.unwatch()
    assert probe.watched is None and llm.runner.watch is None
    with pytest.raises(ProbeError, match="no request is watched"):
        probe.attention([0])


def test_attention_outlives_the_request_until_its_blocks_are_taken(make_llm):
    llm = make_llm(block_size=4, num_blocks=24)
    probe = llm.probe
    probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    run_to_end(llm.engine)
    before = probe.attention(probe.kept)
    assert not llm.engine.has_request("it")
    np.testing.assert_array_equal(probe.attention(probe.kept), before)
    llm.engine.add_request([1] * 30, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), "greedy")
    lost = []
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        # Blocks go from the tail: what lies before the first lost one must stay the same, to the bit.
        shown = [row for row in probe.kept if not any(4 * number <= row for number in llm.runner.watch.overwritten)]
        lost.append(len(probe.kept) - len(shown))
        np.testing.assert_array_equal(probe.attention(shown), before[:, :, :len(shown)])
    assert lost[0] == 0 and 0 < lost[-1] < len(before[0, 0])
    with pytest.raises(ProbeError, match=r"the keys of request 'it' at positions \d+ to \d+ are gone: request 'greedy' "
                                         r"has been given their block \d+; rows before them can still be shown"):
        probe.attention(probe.kept[-1])
    with pytest.raises(ProbeError, match="are gone"):
        probe.attention_cell(0, 0, 3, probe.context - 1)  # a key that this row does not even see
    assert probe.attention_cell(0, 0, 3, 2)["weight"] == before[0, 0, 3, 2]


def test_a_preempted_request_is_kept_again_as_it_is_computed_again(make_llm):
    """The one admitted last: it gives its blocks away and gets others."""
    llm = make_llm(num_blocks=7, max_num_seqs=3, enable_prefix_caching=False)
    overwritten = set()
    tokens = run(llm, "third", until=lambda llm: overwritten.update(llm.runner.watch.overwritten))
    assert llm.runner.watch.request.metrics.num_preemptions > 0 and overwritten
    roomy = make_llm()
    assert tokens == run(roomy, "third")
    assert llm.probe.kept == roomy.probe.kept
    np.testing.assert_array_equal(llm.probe.attention([40, 2]), roomy.probe.attention([40, 2]))


def test_only_the_first_max_tokens_are_kept(make_llm):
    llm, whole = make_llm(), make_llm()
    run(whole)
    llm.probe.watch("it", max_tokens=10)
    assert llm.runner.watch.queries.shape[1] == llm.runner.watch.residual.shape[1] == 10
    llm.engine.add_request(PROMPT, GREEDY, "it")
    run_to_end(llm.engine)
    assert llm.probe.kept == list(range(10)) and llm.probe.context == len(PROMPT) + 11
    for name in ("queries", "residual"):
        np.testing.assert_array_equal(getattr(llm.runner.watch, name), getattr(whole.runner.watch, name)[:, :10])
    assert llm.probe.attention([9]).shape[-1] == len(PROMPT) + 11
    with pytest.raises(ProbeError, match="watch.. keeps the first 10 positions; watch it with a larger max_tokens"):
        llm.probe.attention([10])


@pytest.fixture
def failing_step(monkeypatch):
    """failing_step(llm): a step of it in which the forward pass breaks."""

    def fail(llm):
        with monkeypatch.context() as patch:
            patch.setattr(llm.runner.backend, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.engine.step()

    return fail


def test_a_step_that_fails_is_not_taken_for_computed(make_llm, failing_step):
    llm = make_llm()
    llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.add_request(OTHERS[1], GREEDY, "other")
    failing_step(llm)
    assert llm.probe.kept == [] and llm.probe.logits("it") is None
    llm.engine.step()
    assert llm.probe.kept == list(range(len(PROMPT))) and llm.probe.logits("other") is not None
    failing_step(llm)
    assert llm.probe.kept == list(range(len(PROMPT))) and llm.probe.logits("other") is None
    llm.engine.abort("it")  # so that it is in no later step
    llm.engine.step()
    assert llm.probe.kept == list(range(len(PROMPT)))


def test_nothing_of_new_blocks_is_shown_before_they_are_written(make_llm, failing_step):
    """Preempted, admitted again with other blocks, and then the step fails."""
    llm = make_llm(enable_prefix_caching=False)
    llm.probe.watch("it")
    llm.engine.add_request(PROMPT, GREEDY, "it")
    llm.engine.step()
    scheduler = llm.engine.scheduler
    scheduler._preempt(scheduler.running.pop(), SchedulerOutput())
    failing_step(llm)
    assert llm.probe.context == 0 and llm.probe.kept == []
    llm.engine.step()
    assert llm.probe.kept == list(range(len(PROMPT) + 1))


def test_a_request_of_the_same_name_begins_anew(make_llm):
    llm = make_llm()
    llm.probe.watch("it")
    for kept in (range(len(PROMPT)), range(32, len(PROMPT))):  # the second time, two blocks are found in the cache
        llm.engine.add_request(PROMPT, GREEDY, "it")
        llm.engine.step()
        assert llm.probe.kept == list(kept)
        run_to_end(llm.engine)


def test_a_reset_ends_the_watch(make_llm):
    llm = make_llm()
    probe = llm.probe
    run(llm)
    llm.reset(block_size=8)
    assert llm.probe is probe and probe.watched is None and probe.kept == [] and probe.logits("it") is None
    run(llm)
    assert probe.kept == list(range(len(PROMPT) + 11))


def test_whoever_looks_has_no_step_begun_ahead_of_what_was_told(make_llm, monkeypatch):
    llm, asked = make_llm(), []
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda ahead=False: (asked.append(ahead), step(ahead))[1])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    list(llm.stream(PROMPT, params))
    assert set(asked) == {True}
    asked.clear()
    assert llm.probe.watched is None
    list(llm.stream(PROMPT, params))
    assert set(asked) == {False}


def test_a_look_beside_a_live_engine_does_not_step_it(make_llm, monkeypatch):
    llm = make_llm()
    with LiveEngine(llm, paused=True) as live:
        request = live.add(PROMPT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        settled, settle = [], llm.engine.settle
        monkeypatch.setattr(llm.engine, "settle", lambda: (settled.append(threading.current_thread()), settle())[1])
        live.step()
        live.between_steps(lambda llm: llm.probe.top(request, 2)).result()
        assert settled and threading.current_thread() not in settled
        llm.probe.top(request, 2)
        assert threading.current_thread() not in settled
