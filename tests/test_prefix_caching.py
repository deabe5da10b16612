"""Prefix caching: what is shared, what must not be, and what is evicted first."""

from tests.toy import continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.block_pool import BlockPool, hash_block
from tinyvllm.engine.kv_cache_manager import KVCacheManager
from tinyvllm.engine.request import Request

SHARED = list(range(1, 13))  # three blocks of 4


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def finish(engine, prompt, name, max_tokens=3):
    engine.add_request(prompt, greedy(max_tokens), name)
    output = run(engine)[name]
    assert output.outputs[0].token_ids == continuation(prompt, max_tokens)
    return output


def test_a_second_request_takes_over_full_blocks_of_an_equal_prefix():
    engine = toy_engine(num_blocks=16)
    assert finish(engine, SHARED + [20], "a").num_cached_tokens == 0
    assert finish(engine, SHARED + [21, 22], "b").num_cached_tokens == 12
    assert engine.stats.prefix_cache_hits == 12 and engine.stats.prefix_cache_queries == 13 + 14


def test_a_fully_cached_prompt_still_computes_its_last_token():
    engine = toy_engine(num_blocks=16)
    finish(engine, SHARED, "a")
    assert finish(engine, SHARED, "b").num_cached_tokens == 8


def test_outputs_are_cached_too():
    engine = toy_engine(num_blocks=16)
    first = finish(engine, SHARED, "a", max_tokens=9)
    follow_up = SHARED + first.outputs[0].token_ids + [30]
    assert finish(engine, follow_up, "b").num_cached_tokens == 20


def test_the_same_block_after_another_parent_is_no_hit():
    engine = toy_engine(num_blocks=16)
    finish(engine, [1, 1, 1, 1] + SHARED, "a")
    assert finish(engine, [2, 2, 2, 2] + SHARED, "b").num_cached_tokens == 0


def test_equal_blocks_after_different_parents_are_both_kept():
    engine = toy_engine(num_blocks=32)
    one, two = [1, 1, 1, 1] + SHARED, [2, 2, 2, 2] + SHARED
    finish(engine, one, "a")
    finish(engine, two, "b")
    assert finish(engine, one, "c").num_cached_tokens == finish(engine, two, "d").num_cached_tokens == 12


def test_a_hash_collision_is_no_hit():
    engine = toy_engine(num_blocks=16)
    engine.kv_cache_manager.pool.hash_fn = lambda parent, tokens: b"the same for all"
    finish(engine, SHARED, "a")
    assert finish(engine, [9] * 12, "b").num_cached_tokens == 0


def test_what_follows_a_collision_is_not_published_under_the_other_one_s_hash():
    engine = toy_engine(num_blocks=32)
    engine.kv_cache_manager.pool.hash_fn = lambda parent, tokens: b"same" if parent == b"" else hash_block(parent, tokens)
    finish(engine, [1] * 4 + [7] * 4 + [8], "a")
    finish(engine, [2] * 4 + [9] * 4 + [8], "b")
    assert finish(engine, [1] * 4 + [9] * 4 + [8], "c").num_cached_tokens == 4


def test_a_block_is_not_findable_before_its_keys_are_written():
    engine = toy_engine(num_blocks=16, max_num_batched_tokens=8)
    engine.add_request(SHARED + [20], greedy(3), "a")
    engine.step()  # 8 of 13 tokens
    engine.add_request(SHARED + [20], greedy(3), "b")
    outputs = run(engine)
    assert outputs["b"].num_cached_tokens == 8
    assert outputs["b"].outputs[0].token_ids == outputs["a"].outputs[0].token_ids == continuation(SHARED + [20], 3)


def test_a_step_that_failed_publishes_nothing():
    engine = toy_engine(num_blocks=16, max_num_batched_tokens=64)
    engine.add_request(SHARED, greedy(3), "a")
    engine.runner.fail_next = True
    try:
        engine.step()
    except RuntimeError:
        pass
    assert not engine.kv_cache_manager.pool.cached_blocks


def test_two_equal_prompts_in_one_step_neither_crash_nor_leak():
    engine = toy_engine(num_blocks=16, max_num_batched_tokens=64)
    for name in "ab":
        engine.add_request(SHARED + [20], greedy(6), name)
    outputs = run(engine)
    assert outputs["a"].outputs[0].token_ids == outputs["b"].outputs[0].token_ids == continuation(SHARED + [20], 6)
    engine.kv_cache_manager.check()
    assert engine.stats.num_free_blocks == 16


def test_an_evicted_block_is_not_found_again():
    engine = toy_engine(num_blocks=4)
    finish(engine, SHARED, "a")
    finish(engine, [30] * 13, "b")  # needs all four blocks
    assert finish(engine, SHARED, "c").num_cached_tokens == 0


def test_eviction_takes_the_least_recently_used_and_the_tail_first():
    manager = KVCacheManager(6, 4)

    def hold(name, tokens):
        request = Request(name, tokens, greedy(1), max_len=100)
        found = manager.get_computed_blocks(request)
        manager.allocate_slots(request, request.num_tokens - 4 * len(found), found)
        request.num_computed_tokens = request.num_tokens
        manager.cache_full_blocks(request, request.num_computed_tokens)
        return request

    old, new = hold("old", list(range(12))), hold("new", list(range(20, 32)))
    tables = {r.request_id: list(manager.block_ids(r)) for r in (old, new)}
    manager.free(old)
    manager.free(new)
    order = [block.block_id for block in manager.pool.get_new_blocks(6)]
    assert order == tables["old"][::-1] + tables["new"][::-1]


def test_a_block_in_use_is_never_evicted():
    pool = BlockPool(2, 4)
    held, = pool.get_new_blocks(1)
    pool.cache_full_block(held, b"", [1, 2, 3, 4])
    pool.get_new_blocks(1)
    assert pool.num_free_blocks == 0 and pool.find(b"", [1, 2, 3, 4]) is held


def test_switched_off_nothing_is_shared():
    engine = toy_engine(num_blocks=16, enable_prefix_caching=False)
    finish(engine, SHARED, "a")
    assert finish(engine, SHARED, "b").num_cached_tokens == 0
    assert engine.stats.prefix_cache_queries == 0
