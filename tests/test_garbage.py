"""Whole collections are held back while something generates, and come again afterwards, whoever set what."""

import gc
import threading
import weakref

import pytest

from tests.toy import AheadToyRunner, run, toy_engine
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.engine import garbage, pipeline
from tinyvllm.engine.garbage import MANY, MIDDLE, RARELY, WholeCollections, collect_young, no_whole_collections


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


class Link:
    pass


def cycles(count: int) -> list[weakref.ref]:
    found = []
    for _ in range(count):
        link = Link()
        link.link = link
        found.append(weakref.ref(link))
    return found


def test_young_ones_are_looked_through_when_there_is_time_for_it():
    gc.collect()
    gc.set_threshold(100_000, 10, 10)
    links = cycles(MANY)
    collect_young()
    assert all(link() for link in links)  # nobody holds anything back: Python does as it likes
    with no_whole_collections():
        collect_young()
        assert not any(link() for link in links)
        few = cycles(10)
        collect_young()
        assert all(link() for link in few)  # not worth it
    gc.collect()


def test_that_time_is_while_a_device_works(monkeypatch):
    working = []

    def look():
        working.append(engine.runner.begun - engine.runner.waited)

    monkeypatch.setattr(pipeline, "collect_young", look)
    engine = toy_engine(num_blocks=30, runner_type=AheadToyRunner)
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20))
    run(engine)
    assert len(working) == 20 and set(working[1:-1]) == {2}  # the step that is waited for, and the one behind it
    working.clear()
    engine = toy_engine(num_blocks=30)
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20))
    run(engine)
    assert not working  # it computes in Python's own time


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
