"""A step ahead: the runner is given the next step before this one's tokens are known, and nobody can tell."""

import time

import pytest

from tests.test_events import assert_state_equals_engine, catch_up
from tests.toy import AheadToyRunner, continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.state import EngineState


def greedy(max_tokens, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def ahead_engine(**options):
    return toy_engine(runner_type=AheadToyRunner, **options)


def tokens(output):
    return output.outputs[0].token_ids


PROMPTS = {str(i): [1, 2, 3, 4, 5, 6, 7, 8][:2 + i % 6] + [i] for i in range(9)}
OPTIONS = [dict(num_blocks=6), dict(num_blocks=40, max_num_batched_tokens=5), dict(num_blocks=40, max_num_seqs=3),
           dict(num_blocks=40, scheduling_policy="static", max_num_seqs=2), dict(num_blocks=7, block_size=1),
           dict(num_blocks=8, enable_prefix_caching=False, max_num_batched_tokens=64)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_request_gets_the_tokens_it_would_get_alone(options):
    engine = ahead_engine(**options)
    capacity = engine.kv_cache_manager.pool.num_blocks * engine.kv_cache_manager.block_size
    prompts = {name: prompt for name, prompt in PROMPTS.items() if len(prompt) + 9 <= capacity} or {"0": [1], "1": [2]}
    for name, prompt in prompts.items():
        engine.add_request(prompt, greedy(min(9, capacity - len(prompt))), name)
    outputs = run(engine)
    for name, prompt in prompts.items():
        assert tokens(outputs[name]) == continuation(prompt, min(9, capacity - len(prompt)))
    assert engine.runner.most_ahead == 2, "it never ran ahead"
    engine.kv_cache_manager.check()
    assert engine.stats.num_free_blocks == engine.stats.num_blocks and not engine.pipeline.steps


def test_the_same_steps_as_without_it():
    """What is known beforehand, lengths above all, is scheduled as if the tokens were there: no step more."""
    plain, ahead = toy_engine(num_blocks=40), ahead_engine(num_blocks=40)
    for engine in (plain, ahead):
        for name, prompt in PROMPTS.items():
            engine.add_request(prompt, greedy(3 + len(prompt)), name)
        run(engine)
    assert ahead.stats.num_output_tokens == plain.stats.num_output_tokens
    assert ahead.stats.num_prompt_tokens == plain.stats.num_prompt_tokens
    rows = [sorted(row for batch in engine.runner.batches for row in batch) for engine in (plain, ahead)]
    assert rows[0] == rows[1], "a token was computed twice, or for nobody"


def test_an_output_comes_with_the_step_that_made_it():
    engine = ahead_engine()
    engine.add_request([1, 2, 3], greedy(4), "a")
    for count in range(1, 5):
        (output,) = engine.step(ahead=True)
        assert tokens(output) == continuation([1, 2, 3], 4)[:count] and engine.num_steps == count
    assert output.finished and not engine.has_unfinished_requests()


def end_of(prompt, count):
    """An end-of-sequence id that the toy says at its count-th token, and not before."""
    said = continuation(prompt, count)
    assert said[-1] not in said[:-1]
    return said[-1]


def test_a_token_that_ends_a_request_costs_one_row_that_nobody_reads():
    prompt = [5, 6, 7]
    engine = ahead_engine(eos_token_ids=(end_of(prompt, 5),))
    engine.add_request(prompt, greedy(20), "a")
    outputs = run(engine)
    assert tokens(outputs["a"]) == continuation(prompt, 5) and outputs["a"].outputs[0].finish_reason == "stop"
    assert engine.num_steps == 5 and len(engine.runner.batches) == 6
    assert engine.stats.num_output_tokens == 5 and engine.stats.num_free_blocks == engine.stats.num_blocks


def test_the_end_of_one_request_does_not_disturb_the_others():
    prompts = {"short": [5, 6, 7], "long": [1, 2]}
    engine = ahead_engine(num_blocks=16, eos_token_ids=(end_of(prompts["short"], 5),))
    engine.add_request(prompts["short"], greedy(30), "short")
    engine.add_request(prompts["long"], greedy(30, ignore_eos=True), "long")
    outputs = run(engine)
    assert tokens(outputs["short"]) == continuation(prompts["short"], 5)
    assert tokens(outputs["long"]) == continuation(prompts["long"], 30)


def test_an_id_may_be_used_again_while_the_old_one_s_row_is_still_under_way():
    prompt = [5, 6, 7]
    engine = ahead_engine(num_blocks=16, eos_token_ids=(end_of(prompt, 5),))
    engine.add_request([9], greedy(25, ignore_eos=True), "other")
    engine.add_request(prompt, greedy(20), "a")
    while engine.has_request("a"):
        engine.step(ahead=True)
    engine.add_request([3, 3], greedy(8, ignore_eos=True), "a")
    outputs = run(engine)
    assert tokens(outputs["a"]) == continuation([3, 3], 8) and tokens(outputs["other"]) == continuation([9], 25)


def test_abort_while_its_next_step_is_under_way():
    engine = ahead_engine(num_blocks=16)
    for name in ("a", "b"):
        engine.add_request([4, len(name), ord(name) % 7], greedy(12), name)
    for _ in range(3):
        engine.step(ahead=True)
    assert len(engine.pipeline.steps) == 1
    engine.abort("a")
    engine.kv_cache_manager.check()
    outputs = run(engine)
    assert outputs["a"].outputs[0].finish_reason == "abort" and len(tokens(outputs["a"])) == 3
    assert tokens(outputs["b"]) == continuation([4, 1, ord("b") % 7], 12)
    assert engine.stats.num_free_blocks == 16


def test_who_is_preempted_while_a_token_of_its_is_under_way_keeps_the_token():
    engine = ahead_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    prompts = {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10], "c": [11, 12, 13]}
    for name, prompt in prompts.items():
        engine.add_request(prompt, greedy(14), name)
    seen = {name: [] for name in prompts}
    while engine.has_unfinished_requests():
        for output in engine.step(ahead=True):
            assert len(tokens(output)) == len(seen[output.request_id]) + 1
            seen[output.request_id] = tokens(output)
        engine.kv_cache_manager.check()
    assert engine.stats.num_preemptions > 0 and engine.runner.most_ahead == 2
    assert seen == {name: continuation(prompt, 14) for name, prompt in prompts.items()}


def test_settle_leaves_nothing_under_way_and_its_outputs_come_next():
    engine = ahead_engine()
    engine.add_request([1, 2, 3], greedy(6), "a")
    engine.step(ahead=True)
    assert engine.pipeline.steps
    engine.settle()
    assert not engine.pipeline.steps and engine.num_steps == 2
    request, = engine.scheduler.running
    assert request.num_pending == 0 and request.num_computed_tokens == len(request.token_ids) - 1
    outputs = engine.step(ahead=False)
    assert [len(tokens(output)) for output in outputs] == [2, 3] and not engine.pipeline.steps
    run(engine)


@pytest.mark.parametrize("when", ["begin", "wait"])
def test_a_failing_step_loses_no_token_and_no_block(when):
    engine, log, state = ahead_engine(num_blocks=16), EventLog(), EngineState()
    engine.listen(log)
    for name in ("a", "b"):
        engine.add_request([4, 5, ord(name) % 7], greedy(12), name)
    for _ in range(3):
        engine.step(ahead=True)
    if when == "begin":  # of the step after the one that is under way: it is tried again on its own
        engine.runner.fail_next = True
        engine.step(ahead=True)
        engine.runner.fail_next = True
        with pytest.raises(RuntimeError, match="fell over"):
            engine.step(ahead=True)
    else:
        engine.pipeline.steps[0].wait = broken
        with pytest.raises(RuntimeError, match="fell over"):
            engine.step(ahead=True)
    assert not engine.pipeline.steps
    catch_up(state, log)
    assert_state_equals_engine(state, engine)
    assert state.steps[-1].error == "RuntimeError: the device fell over"
    outputs = run(engine)
    assert all(tokens(outputs[name]) == continuation([4, 5, ord(name) % 7], 12) for name in ("a", "b"))
    assert engine.stats.num_free_blocks == 16


def broken():
    raise RuntimeError("the device fell over")


def test_an_interrupt_while_waiting_loses_nothing():
    engine = ahead_engine(num_blocks=16)
    engine.add_request([4, 5, 6], greedy(12), "a")
    for _ in range(3):
        engine.step(ahead=True)

    def interrupted():
        raise KeyboardInterrupt

    engine.pipeline.steps[0].wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step(ahead=True)
    assert tokens(run(engine)["a"]) == continuation([4, 5, 6], 12)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_who_listens_is_told_a_run_that_makes_sense(options):
    engine, log, state = ahead_engine(**options), EventLog(), EngineState()
    engine.listen(log)
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, greedy(9), name)
    while engine.has_unfinished_requests():
        engine.step(ahead=True)
        catch_up(state, log)
        pool = engine.kv_cache_manager.pool
        assert state.num_used_blocks == pool.num_blocks - pool.num_free_blocks
        if not engine.pipeline.steps:
            assert_state_equals_engine(state, engine)
    assert_state_equals_engine(state, engine)
    assert [step.step for step in state.steps] == list(range(1, engine.num_steps + 1))
    assert all(step.begin_ns < step.end_ns for step in state.steps)
    assert all(a.end_ns <= b.begin_ns for a, b in zip(state.steps, list(state.steps)[1:])), "one step at a time"
    assert {name: r.token_ids for name, r in state.requests.items()} == {
        name: continuation(prompt, 9) for name, prompt in PROMPTS.items()}


def test_who_begins_to_listen_in_the_middle_finds_nothing_under_way():
    engine, state = ahead_engine(num_blocks=16), EngineState()
    engine.add_request([1, 2, 3], greedy(12), "a")
    for _ in range(3):
        engine.step(ahead=True)
    log = EventLog()
    engine.listen(log)
    catch_up(state, log)
    assert_state_equals_engine(state, engine)
    run(engine)
    catch_up(state, log)
    assert state.requests["a"].token_ids == continuation([1, 2, 3], 12)


def test_without_a_kv_cache_there_is_no_step_ahead():
    engine = ahead_engine(use_kv_cache=False, enable_prefix_caching=False)
    engine.add_request([1, 2, 3], greedy(6), "a")
    assert tokens(run(engine)["a"]) == continuation([1, 2, 3], 6) and engine.runner.most_ahead == 1


def test_others_are_told_how_long_it_will_wait():
    spare, fails = [], []

    class SlowRunner(AheadToyRunner):
        def begin(self, output):
            inner = super().begin(output)

            def wait():
                spare.append(engine.pipeline.spare_s())
                time.sleep(0.005)
                spare.append(engine.pipeline.spare_s())
                time.sleep(0.015)
                if fails:
                    raise KeyboardInterrupt
                return inner()

            return wait

    engine = toy_engine(num_blocks=30, runner_type=SlowRunner)
    engine.add_request([1, 2, 3], greedy(6))
    assert engine.pipeline.spare_s() == 0.0
    run(engine)
    begins, later = spare[2::2], spare[3::2]  # of the first wait nothing can be known
    assert len(begins) == 5 and min(begins) > 0.015 and all(a - b > 0.0049 for a, b in zip(begins, later))
    assert engine.pipeline.spare_s() == 0.0
    engine.add_request([1, 2, 3], greedy(6))
    fails.append(True)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    assert engine.pipeline.spare_s() == 0.0
    assert toy_engine().pipeline.spare_s() is None  # it computes in Python's own time
