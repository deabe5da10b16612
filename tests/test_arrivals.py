"""Arrivals: the same traffic whenever it is asked for, and the same steps whenever it is served."""

import itertools

import pytest

from tinyvllm.engine.arrivals import Arrival, plain_ids, poisson_arrivals, poisson_stream, prompt_of, run_arrivals
from tinyvllm.engine.events import EventLog
from tinyvllm.errors import ConfigError, RequestError, TinyVLLMError


def batches(trace):
    return [(e.step, e.b) for e in trace.events if e.kind == "step_begun"]


def test_a_seed_gives_the_same_traffic_and_another_seed_other_traffic():
    assert poisson_arrivals(50, 0.5, seed=7) == poisson_arrivals(50, 0.5, seed=7)
    assert poisson_arrivals(50, 0.5, seed=7) != poisson_arrivals(50, 0.5, seed=8)
    assert poisson_arrivals(50, 0.5, seed=7)[:20] == list(itertools.islice(poisson_stream(0.5, seed=7), 20))
    assert poisson_arrivals(2, 0.2, seed=3)[0][:3] == (pytest.approx(1.3588115161683416), 42, 57)  # in any Python


def test_gaps_are_exponential_and_lengths_even_between_their_bounds():
    arrivals = poisson_arrivals(20_000, 4.0, prompt_tokens=(3, 5), output_tokens=(1, 10), seed=1)
    gaps = [b.at - a.at for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.03) and min(gaps) >= 0
    assert sum(g > mean for g in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)  # 1/e of them are above the mean
    assert {a.num_prompt_tokens for a in arrivals} == {3, 4, 5}
    assert {a.num_output_tokens for a in arrivals} == set(range(1, 11))
    assert sum(a.num_output_tokens for a in arrivals) / len(arrivals) == pytest.approx(5.5, abs=0.1)


def test_prompts_share_what_they_are_said_to_share():
    vocabulary = list(range(100, 1000))
    a, b = (prompt_of(Arrival(0, 20, 1, 8), vocabulary, seed) for seed in (1, 2))
    assert a[:8] == b[:8] and a[8:] != b[8:] and len(a) == 20 and set(a) <= set(vocabulary)
    assert a == prompt_of(Arrival(0, 20, 1, 8, seed=1), vocabulary, seed=5)
    assert prompt_of(Arrival(0, 3, 1, 8), vocabulary) == a[:3]  # more shared than there are


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": -1}, {"rate": float("nan")}, {"rate": "fast"},
                                     {"rate": True}, {"rate": 1, "prompt_tokens": (5, 4)},
                                     {"rate": 1, "output_tokens": (0, 4)}, {"rate": 1, "num_shared_tokens": -1}])
def test_traffic_that_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        poisson_stream(**options)


def test_a_run_has_the_same_steps_each_time_and_leaves_the_engine_as_it_was(llm):
    arrivals = poisson_arrivals(8, 0.3, prompt_tokens=(4, 40), output_tokens=(2, 20), seed=2)
    before = llm.memory_plan, llm.engine_config.scheduling_policy
    policy = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "num_blocks": 32}
    first, again = (run_arrivals(llm, arrivals, scheduling_policy="static", **policy) for _ in range(2))
    assert batches(first) == batches(again)
    assert batches(first) != batches(run_arrivals(llm, arrivals, **policy))
    assert (llm.memory_plan, llm.engine_config.scheduling_policy) == before
    assert llm.engine.events is None and not llm.engine.has_unfinished_requests()
    state = first.state()
    assert state.config["max_num_seqs"] == 3 and state.config["scheduling_policy"] == "static"
    assert first.metadata["policy"]["max_num_batched_tokens"] == 24
    for number, arrival in enumerate(arrivals):
        request = state.requests[str(number)]
        assert (request.num_prompt_tokens, len(request.token_ids), request.status) == (
            arrival.num_prompt_tokens, arrival.num_output_tokens, "length")


def test_an_arrival_at_step_n_is_there_before_the_step_after_and_idle_steps_are_told(llm):
    trace = run_arrivals(llm, [(50, 4, 2), (0, 4, 6), (3, 4, 2), (50.5, 4, 2)])
    added = {e.request_id: e.step for e in trace.events if e.kind == "request_added"}
    assert added == {"1": 0, "2": 3, "0": 6, "3": 7}  # so many steps had run
    first = {}
    for step, batch in batches(trace):
        for row in batch:
            first.setdefault(row[0], step)
    assert first == {"1": 1, "2": 4, "0": 7, "3": 8}
    assert trace.metadata["idle_steps"] == [[7, 44]]  # 6 steps ran, and the next arrival came at 50


def test_arrivals_by_the_clock_wait_for_it(llm):
    trace = run_arrivals(llm, [(0.0, 4, 2), (0.25, 4, 2)], unit="seconds")
    added = [e.t_ns for e in trace.events if e.kind == "request_added"]
    assert 0.24 < (added[1] - added[0]) / 1e9 < 5
    assert len(trace.state().requests) == 2 and trace.metadata["idle_steps"] == []


def test_prompts_hold_text_alone(llm):
    trace = run_arrivals(llm, [(0, 60, 1)])
    ids = next(e.a for e in trace.events if e.kind == "request_added")
    assert set(ids) <= set(plain_ids(llm)) and not set(ids) & set(llm.tokenizer.special_ids)


@pytest.mark.parametrize("arrival, message", [((0, 4), "is needed"), (("soon", 4, 4), "time of 0 or later"),
                                              ((-1, 4, 4), "time of 0 or later"), ((0, 0, 4), "1 or more"),
                                              ((0, 4, 2.5), "1 or more"), ((0, 4, 10**6), "max_model_len"),
                                              (7, "is needed")])
def test_an_arrival_that_cannot_be_is_named_and_nothing_runs(llm, arrival, message):
    steps = llm.engine.num_steps
    with pytest.raises(RequestError, match=f"arrival 1: .*{message}"):
        run_arrivals(llm, [(0, 4, 4), arrival])
    assert llm.engine.num_steps == steps


def test_a_run_that_cannot_begin_leaves_everything_as_it_was(llm):
    plan = llm.memory_plan
    with pytest.raises(ConfigError, match="cannot be changed"):
        run_arrivals(llm, [(0, 4, 4)], colour="red")
    with pytest.raises(ConfigError, match="unit must be"):
        run_arrivals(llm, [(0, 4, 4)], unit="years")
    with pytest.raises(RequestError, match="arrival 0: .*raise num_blocks"):
        run_arrivals(llm, [(0, 40, 40)], num_blocks=4)
    llm.engine.listen(EventLog())
    with pytest.raises(TinyVLLMError, match="listened to"):
        run_arrivals(llm, [(0, 4, 4)])
    llm.engine.listen(None)
    request_id = llm.engine.add_request([5, 6])
    with pytest.raises(TinyVLLMError, match="unfinished"):
        run_arrivals(llm, [(0, 4, 4)])
    llm.engine.abort(request_id)
    llm.engine.take_pending()
    assert llm.memory_plan == plan and llm.engine.events is None
