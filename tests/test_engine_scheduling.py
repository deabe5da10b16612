"""The scheduler's promises, on a toy model whose every output depends on every cached token."""

import pytest

from tests.toy import VOCAB, continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.request import Request
from tinyvllm.errors import RequestError


def greedy(max_tokens, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def tokens(output):
    return output.outputs[0].token_ids


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 11, 64])
def test_output_does_not_depend_on_how_the_prompt_is_chunked(budget):
    engine = toy_engine(max_num_batched_tokens=budget, max_num_seqs=1)
    engine.add_request(PROMPT, greedy(9), "a")
    assert tokens(run(engine)["a"]) == continuation(PROMPT, 9)
    first_batches = [count for batch in engine.runner.batches for (_, start, count) in batch if start < len(PROMPT)]
    assert first_batches[0] == min(budget, len(PROMPT)) and sum(first_batches) == len(PROMPT)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_prompts_that_end_at_and_around_a_block_boundary(length):
    engine = toy_engine(num_blocks=8)
    prompt = (PROMPT * 2)[:length]
    engine.add_request(prompt, greedy(12), "a")
    assert tokens(run(engine)["a"]) == continuation(prompt, 12)


def test_decodes_go_on_while_a_long_prompt_is_chunked():
    engine = toy_engine(num_blocks=64, max_num_batched_tokens=8)
    engine.add_request([1, 2], greedy(20), "short")
    engine.step()
    engine.add_request(list(range(30)), greedy(2), "long")
    for _ in range(4):
        engine.step()
    for batch in engine.runner.batches[1:5]:
        assert ("short", 1) in [(name, count) for name, _, count in batch], "the decode was starved"
        assert sum(count for _, _, count in batch) == 8, "the budget was not used"


def test_max_num_seqs_seats_are_refilled_as_soon_as_one_is_free():
    engine = toy_engine(num_blocks=64, max_num_seqs=2)
    for i in range(4):
        engine.add_request([i + 1], greedy(2 + 4 * (i == 0)), str(i))
    run(engine)
    together = [{name for name, _, _ in batch} for batch in engine.runner.batches]
    assert {"0", "2"} in together and {"0", "3"} in together


def test_static_policy_waits_for_the_whole_batch():
    engine = toy_engine(num_blocks=64, max_num_seqs=2, scheduling_policy="static")
    for i in range(4):
        engine.add_request([i + 1], greedy(2 + 4 * (i == 0)), str(i))
    outputs = run(engine)
    together = [{name for name, _, _ in batch} for batch in engine.runner.batches]
    assert not any({"0", "1"} & batch and {"2", "3"} & batch for batch in together)
    assert {"0"} in together, "the slot of the short request should stand idle"
    assert all(tokens(outputs[str(i)]) == continuation([i + 1], 2 + 4 * (i == 0)) for i in range(4))


def test_a_static_batch_is_chosen_by_seats_and_comes_in_as_the_budget_allows():
    engine = toy_engine(num_blocks=64, max_num_seqs=3, max_num_batched_tokens=8, scheduling_policy="static")
    for i in range(4):
        engine.add_request([i] * 6, greedy(12 if i == 0 else 3), str(i))
    for _ in range(2):
        engine.step()
    engine.add_request([7], greedy(2), "late")
    together = []
    while engine.has_unfinished_requests():
        engine.step()
        together.append({name for name, _, _ in engine.runner.batches[-1]})
    assert engine.runner.batches[0] == [("0", 0, 6), ("1", 0, 2)], "the budget holds for a static batch too"
    assert {"0", "1", "2"} in together, "all who waited and had a seat are in one batch"
    assert not any({"0", "1", "2"} & names and {"3", "late"} & names for names in together)
    assert {"3", "late"} in together, "the next batch is whoever waits when it begins"


def test_a_static_batch_is_what_the_pool_holds():
    engine = toy_engine(num_blocks=4, max_num_seqs=4, max_num_batched_tokens=16, scheduling_policy="static")
    for i in range(4):
        engine.add_request([i] * 6, greedy(2), str(i))
    together = []
    while engine.has_unfinished_requests():
        engine.step()
        together.append({name for name, _, _ in engine.runner.batches[-1]})
    assert together[0] == {"0", "1"} and {"2", "3"} in together
    assert not any({"0", "1"} & names and {"2", "3"} & names for names in together)


def test_preemption_recomputes_and_streams_every_token_once():
    engine = toy_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    prompts = {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10], "c": [11, 12, 13]}
    for name, prompt in prompts.items():
        engine.add_request(prompt, greedy(14), name)
    seen = {name: [] for name in prompts}
    while engine.has_unfinished_requests():
        batches, preemptions = len(engine.runner.batches), engine.stats.num_preemptions
        outputs = engine.step()
        if engine.stats.num_preemptions > preemptions and len(engine.runner.batches) > batches:
            waiting = set(engine.stats.waiting)
            assert waiting and not waiting & {name for name, _, _ in engine.runner.batches[-1]}, "admitted at once again"
        for output in outputs:
            assert len(tokens(output)) == len(seen[output.request_id]) + 1
            seen[output.request_id] = tokens(output)
        engine.kv_cache_manager.check()
    assert engine.stats.num_preemptions > 0
    assert seen == {name: continuation(prompt, 14) for name, prompt in prompts.items()}
    assert engine.stats.num_free_blocks == 6


def test_the_oldest_request_is_never_preempted():
    engine = toy_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    engine.add_request([1, 2, 3], greedy(18), "old")
    engine.add_request([4, 5, 6], greedy(18), "new")
    outputs = run(engine)
    assert outputs["old"].metrics.num_preemptions == 0 < outputs["new"].metrics.num_preemptions


def test_a_preempted_request_goes_on_before_later_arrivals():
    engine = toy_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    for name in ("first", "second"):
        engine.add_request([1, 2, 3, len(name)], greedy(16), name)
    for _ in range(3):
        engine.step()
    for i in range(4):
        engine.add_request([9, i], greedy(4), f"late {i}")
    order = []
    while engine.has_unfinished_requests():
        order += [output.request_id for output in engine.step() if output.finished]
    assert engine.stats.num_preemptions > 0
    assert order.index("second") < order.index("late 3")
    batches = [[name for name, _, _ in batch] for batch in engine.runner.batches]
    preempted_at = next(i for i, batch in enumerate(batches) if "second" not in batch)
    resumed_at = next(i for i, batch in enumerate(batches) if i > preempted_at and "second" in batch)
    assert not any(name.startswith("late") for batch in batches[preempted_at:resumed_at] for name in batch), \
        "a later arrival took the place of the preempted request"


def test_a_request_that_outgrows_the_whole_pool_ends_with_length():
    engine = toy_engine(num_blocks=2, block_size=4)
    engine.add_request([1, 2, 3], greedy(100), "a")
    output = run(engine)["a"]
    assert output.outputs[0].finish_reason == "length"
    assert tokens(output) == continuation([1, 2, 3], 5)


def test_one_block_a_sequence_is_a_contiguous_cache():
    engine = toy_engine(num_blocks=3, block_size=40, max_num_seqs=3, max_model_len=40)
    for i in range(5):
        engine.add_request(PROMPT[i:], greedy(20), str(i))
    outputs = run(engine)
    assert all(tokens(outputs[str(i)]) == continuation(PROMPT[i:], 20) for i in range(5))
    assert engine.stats.num_preemptions == 0


def test_without_a_kv_cache_every_step_recomputes_the_sequence():
    engine = toy_engine(max_num_batched_tokens=64, use_kv_cache=False, enable_prefix_caching=False)
    engine.add_request(PROMPT, greedy(4), "a")
    assert tokens(run(engine)["a"]) == continuation(PROMPT, 4)
    assert engine.runner.batches == [[("a", 0, len(PROMPT) + i)] for i in range(4)]


def test_without_a_kv_cache_a_chunked_prompt_still_ends():
    engine = toy_engine(max_num_batched_tokens=5, use_kv_cache=False, enable_prefix_caching=False)
    engine.add_request(PROMPT, greedy(4), "a")
    assert tokens(run(engine)["a"]) == continuation(PROMPT, 4)


@pytest.mark.parametrize("position", [0, 1, 5])
def test_every_eos_id_ends_a_request_also_as_the_first_token(position):
    eos = continuation(PROMPT, 8)[position]
    stop_at = continuation(PROMPT, 8).index(eos)
    for eos_ids in ([eos], [VOCAB + 5, eos], (eos, VOCAB + 5)):
        engine = toy_engine(eos_token_ids=eos_ids)
        engine.add_request(PROMPT, greedy(8), "a")
        output = run(engine)["a"].outputs[0]
        assert (output.token_ids, output.finish_reason) == (continuation(PROMPT, 8)[:stop_at + 1], "stop")
        assert output.stop_reason is None


def test_ignore_eos_and_stop_token_ids():
    expected = continuation(PROMPT, 8)
    engine = toy_engine(eos_token_ids=[expected[1]])
    engine.add_request(PROMPT, greedy(8, ignore_eos=True), "on")
    engine.add_request(PROMPT, greedy(8, ignore_eos=True, stop_token_ids=[expected[2]]), "stop")
    outputs = run(engine)
    assert tokens(outputs["on"]) == expected and outputs["on"].outputs[0].finish_reason == "length"
    stop_at = expected.index(expected[2])
    assert tokens(outputs["stop"]) == expected[:stop_at + 1]
    assert outputs["stop"].outputs[0].stop_reason == expected[2]


def test_abort_waiting_and_running_requests_frees_their_blocks():
    engine = toy_engine(max_num_seqs=1)
    for name in "abc":
        engine.add_request(PROMPT, greedy(8), name)
    engine.step()
    engine.abort(["a", "c", "never heard of"])
    outputs = run(engine)
    assert {name: o.outputs[0].finish_reason for name, o in outputs.items()} == \
        {"a": "abort", "b": "length", "c": "abort"}
    assert tokens(outputs["a"]) == continuation(PROMPT, 1) and tokens(outputs["b"]) == continuation(PROMPT, 8)
    engine.kv_cache_manager.check()
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_a_step_that_fails_loses_nothing():
    engine = toy_engine()
    engine.add_request(PROMPT, greedy(6), "a")
    engine.step()
    engine.add_request(PROMPT[3:], greedy(6), "b")
    engine.runner.fail_next = True
    with pytest.raises(RuntimeError, match="fell over"):
        engine.step()
    engine.kv_cache_manager.check()
    outputs = run(engine)
    assert tokens(outputs["a"]) == continuation(PROMPT, 6) and tokens(outputs["b"]) == continuation(PROMPT[3:], 6)


BAD_PROMPTS = [
    ([], "prompt is empty"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ([1, VOCAB], rf"token id {VOCAB} is out of range.*0 to {VOCAB - 1}"),
    ([-1], "token id -1 is out of range"),
    ([1] * 32, r"32 tokens and the whole KV cache holds 32 \(8 blocks of 4\)"),
    ([1] * 2000, "2000 tokens, and max_model_len=1000"),
    ("words", "no tokenizer"),
    (3.5, "a prompt is text, a list of token ids"),
    ([1, "x"], "a prompt is text, a list of token ids"),
    ({"tokens": [1]}, "'prompt_token_ids'.*'tokens'"),
]


@pytest.mark.parametrize("prompt, message", BAD_PROMPTS, ids=[m[:25] for _, m in BAD_PROMPTS])
def test_a_bad_prompt_is_refused_in_plain_words_and_others_go_on(prompt, message):
    engine = toy_engine()
    engine.add_request(PROMPT, greedy(6), "good")
    engine.step()
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, greedy(4), "bad")
    assert engine.stats.num_waiting == 0
    assert tokens(run(engine)["good"]) == continuation(PROMPT, 6)


def test_other_refusals():
    engine = toy_engine()
    engine.add_request(PROMPT, greedy(6), "a")
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request(PROMPT, greedy(6), "a")
    with pytest.raises(RequestError, match="a request id is text, got list"):
        engine.add_request(PROMPT, greedy(6), ["b"])
    with pytest.raises(RequestError, match="must be a SamplingParams, got dict"):
        engine.add_request(PROMPT, {"temperature": 0})
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.add_request(PROMPT, greedy(6, stop="x"))


@pytest.mark.parametrize("where", ["update", "emit", "append"])
def test_an_interrupt_anywhere_in_a_step_loses_no_token_and_leaves_no_zombie(where, monkeypatch):
    engine = toy_engine(num_blocks=16)
    for name, count in (("short", 1), ("long", 6)):
        engine.add_request(PROMPT + [len(name)], greedy(count), name)
    target, attribute = {"update": (engine.scheduler, "update"), "emit": (engine, "_emit"),
                         "append": (Request, "append_output")}[where]
    original = getattr(target, attribute)

    def interrupted(*args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(target, attribute, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert getattr(target, attribute) == original
    outputs = run(engine, max_steps=50)
    assert tokens(outputs["short"]) == continuation(PROMPT + [5], 1)
    assert tokens(outputs["long"]) == continuation(PROMPT + [4], 6)
    engine.kv_cache_manager.check()
    assert engine.stats.num_free_blocks == 16 and not engine._requests


def test_counters_after_preemption_and_abort_are_exact():
    engine = toy_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64, enable_prefix_caching=False)
    for i in range(3):
        engine.add_request([1, 2, 3, 4, i], greedy(12), str(i))
    engine.step()
    engine.abort("2")
    run(engine)
    stats = engine.stats
    assert stats.num_finished == 3 and stats.num_preemptions == 1
    assert stats.num_output_tokens == 12 + 12 + 1
    assert stats.num_prompt_tokens == 3 * 5 + 5, "the preempted prompt is computed again"
    assert not engine._requests and not engine._detokenizers


def test_admission_waits_until_the_whole_prompt_has_room():
    engine = toy_engine(num_blocks=12, block_size=4, max_num_batched_tokens=8, enable_prefix_caching=False)
    engine.add_request([1, 2, 3], greedy(24), "decode")
    engine.step()
    engine.add_request(list(range(40)), greedy(2), "long")
    outputs = run(engine)
    assert tokens(outputs["long"]) == continuation(range(40), 2)
    # The decode may outgrow the room that was left; what must not be is chunk after chunk computed and thrown away.
    assert engine.stats.num_preemptions <= 1 and engine.stats.num_prompt_tokens <= 3 + 2 * 40


def test_the_first_admission_s_cached_tokens_are_what_is_reported():
    engine = toy_engine(num_blocks=6, block_size=4, max_num_batched_tokens=64)
    engine.add_request([1, 2, 3, 4, 5], greedy(16), "first")
    engine.add_request([6, 7, 8, 9, 10], greedy(16), "second")
    outputs = run(engine)
    assert outputs["second"].metrics.num_preemptions > 0 and engine.stats.prefix_cache_hits > 0
    assert outputs["second"].num_cached_tokens == 0


def test_each_output_has_metrics_of_its_own_time():
    engine = toy_engine()
    engine.add_request(PROMPT, greedy(4), "a")
    seen = []
    while engine.has_unfinished_requests():
        seen += engine.step()
    assert [o.metrics.num_output_tokens for o in seen] == [1, 2, 3, 4]
    assert [o.metrics.finished_time is not None for o in seen] == [False, False, False, True]


def test_names_and_automatic_numbers_do_not_collide():
    engine = toy_engine()
    engine.add_request(PROMPT, greedy(2), "1")
    assert engine.add_request(PROMPT, greedy(2)) != "1" and engine.add_request(PROMPT, greedy(2)) != "1"
    assert len(run(engine)) == 3


def test_an_eos_id_that_is_also_a_stop_id_counts_as_eos():
    eos = continuation(PROMPT, 1)[0]
    engine = toy_engine(eos_token_ids=[eos])
    engine.add_request(PROMPT, greedy(4, stop_token_ids=[eos]), "a")
    output = run(engine)["a"].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason is None


@pytest.mark.parametrize("seed", [-1, 2**64, 2**200])
def test_any_whole_number_is_a_seed(seed):
    engine = toy_engine()
    request = engine.prepare(PROMPT, SamplingParams(seed=seed))
    assert request.seed == seed % 2**64
