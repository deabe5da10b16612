"""Whole collections are held back while something generates, and come again afterwards, whoever set what."""

import gc
import threading

import pytest

from tests.toy import toy_engine
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.engine import garbage
from tinyvllm.engine.garbage import MIDDLE, RARELY, WholeCollections, no_whole_collections


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)
    assert garbage._holders == 0


def test_they_are_held_back_until_the_last_one_lets_go():
    first, second = WholeCollections(), WholeCollections()
    first.hold_back(False)  # never held
    for who in (first, first, second):
        who.hold_back(True)
        assert gc.get_threshold() == (700, MIDDLE, RARELY)
    first.hold_back(False)
    first.hold_back(False)
    assert gc.get_threshold() == (700, MIDDLE, RARELY)
    second.hold_back(False)
    assert gc.get_threshold() == (700, 10, 10)


def test_an_error_lets_them_come_again():
    with pytest.raises(ValueError), no_whole_collections():
        raise ValueError
    assert gc.get_threshold() == (700, 10, 10)


def test_what_the_user_sets_meanwhile_stays():
    with no_whole_collections():
        gc.set_threshold(5000, 20, 30)
    assert gc.get_threshold() == (5000, 20, 30)
    with no_whole_collections():
        gc.set_threshold(1, 2, RARELY)
    assert gc.get_threshold() == (1, 2, 30)
    with no_whole_collections():
        gc.set_threshold(1, MIDDLE, 3)
    assert gc.get_threshold() == (1, 2, 3)


def test_a_run_that_would_have_had_some_has_none():
    """Cycles by the thousand, all of them kept: with the usual thresholds that brings whole collections."""
    def collections():
        before, kept = gc.get_stats()[2]["collections"], []
        for _ in range(400_000):
            kept.append([kept])
        return gc.get_stats()[2]["collections"] - before

    gc.collect()
    assert collections() > 0
    gc.collect()
    with no_whole_collections():
        assert collections() == 0


def test_generate_and_a_live_engine_hold_them_back_while_they_work(monkeypatch):
    seen = []
    llm = LLM(use_tqdm=False, device="cpu")
    inner = llm.engine.step
    llm.engine.step = lambda **options: (seen.append(gc.get_threshold()[2]), inner(**options))[1]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    llm.generate("Once upon a time", params)
    assert set(seen) == {RARELY} and gc.get_threshold()[2] == 10
    seen.clear()
    with LiveEngine(llm) as live:
        live.add("Once upon a time", params)
        live.wait_idle()
        assert seen and set(seen) == {RARELY}
        live.between_steps(lambda llm: None).result()
        live.between_steps(lambda llm: None).result()  # after the first the thread has looked whether there is work
        assert gc.get_threshold()[2] == 10
    assert gc.get_threshold()[2] == 10


def test_many_threads_leave_them_as_they_were():
    def work():
        for _ in range(300):
            with no_whole_collections():
                toy_engine()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.get_threshold() == (700, 10, 10)
