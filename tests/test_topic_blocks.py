"""The block map's data against the engine's own books, after every step of runs with sharing, preemption, eviction."""

import random
import time
from concurrent.futures import Future

import numpy as np
import pytest

from tests.feed_stand_ins import Page, SteppedFeed, SteppedSource
from tests.toy import VOCAB
from tinyvllm import SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.errors import TinyVLLMError
from widgets.answers.blocks import MOST_TOKENS, block, kill_request
from widgets.feed import Feed
from widgets.frames import unpack
from widgets.topics.blocks import BlocksTopic


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens)


class Mirror:
    """What a page makes of the payloads."""

    def __init__(self):
        self.rows, self.tables = {}, {}

    def take(self, payload):
        data, arrays = payload.data, payload.arrays
        if "num_blocks" in data:
            self.rows, self.tables = {}, {}
            self.ref, self.filled, self.cached = (np.zeros(data["num_blocks"], int) for _ in range(3))
            self.owners = [()] * data["num_blocks"]
        ids = arrays.get("ids", np.arange(len(arrays["ref"])))
        self.ref[ids], self.filled[ids], self.cached[ids] = arrays["ref"], arrays["filled"], arrays["cached"]
        ends = np.cumsum(arrays["ref"])
        for i, end, ref in zip(ids, ends, arrays["ref"]):
            self.owners[i] = tuple(arrays["owners"][end - ref:end])
        for key in data.get("gone", []):
            del self.rows[key]
            self.tables.pop(key, None)
        for key, *row in data["rows"]:
            self.rows[key] = row
        at = 0
        for key, size in zip(data["table_keys"], arrays["table_sizes"]):
            self.tables[key] = arrays["tables"][at:at + size].tolist()
            at += size
        self.totals = data["totals"]


def assert_equals_engine(mirror, engine):
    manager, pool = engine.kv_cache_manager, engine.kv_cache_manager.pool
    alive = {r.request_id: r for r in [*engine.scheduler.running, *engine.scheduler.waiting]}
    names = {key: row[0] for key, row in mirror.rows.items()}
    assert mirror.ref.tolist() == [b.ref_cnt for b in pool.blocks]
    assert mirror.cached.tolist() == [b.block_hash is not None for b in pool.blocks]
    filled = [pool.block_size if b.block_hash is not None and not b.ref_cnt else 0 for b in pool.blocks]
    for name, ids in manager.req_to_block_ids.items():
        for i, block_id in enumerate(ids):
            have = min(pool.block_size, max(0, alive[name].num_computed_tokens - i * pool.block_size))
            filled[block_id] = max(filled[block_id], have)
    assert mirror.filled.tolist() == filled
    assert [sorted(names[k] for k in owners) for owners in mirror.owners] == \
        [sorted(name for name, ids in manager.req_to_block_ids.items() if b.block_id in ids) for b in pool.blocks]
    assert set(names.values()) == set(alive) and len(names) == len(alive)
    for key, (name, status, computed, tokens, most, _) in mirror.rows.items():
        request = alive[name]
        assert (status, computed, tokens, most) == \
            (request.status.value, request.num_computed_tokens, request.num_tokens, request.max_len)
        assert mirror.tables.get(key, []) == manager.block_ids(request)
    held = [b for b in pool.blocks if b.ref_cnt]
    assert mirror.totals["slots"] == len(held) * pool.block_size
    assert mirror.totals["filled"] == sum(filled[b.block_id] for b in held)
    assert mirror.totals["saved"] == sum(b.ref_cnt - 1 for b in held) * pool.block_size
    return any(b.ref_cnt > 1 for b in held), any(b.block_hash is not None and not b.ref_cnt for b in pool.blocks)


@pytest.mark.parametrize("options", [dict(num_blocks=8), dict(num_blocks=24, max_num_seqs=6),
                                     dict(num_blocks=16, enable_prefix_caching=False),
                                     dict(num_blocks=16, enable_prefix_caching=False, use_kv_cache=False),
                                     dict(num_blocks=3, block_size=64, scheduling_policy="static")], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_the_map_is_the_pool_after_every_frame_of_a_storm(options, every):
    rng = random.Random(every)
    source = SteppedSource(**options)
    feed, mirror = SteppedFeed(source), Mirror()
    feed.page.ready("blocks")
    seen = {"shared": False, "cached": False, "evicted": False, "preempted": False, "aborted": False}
    for step in range(260):
        if step < 200 and rng.random() < 0.35:
            prompt = [1, 2, 3, 4, 5, 6, 7, 8][:rng.randint(1, 8)] + [rng.randrange(VOCAB)] * rng.randint(0, 4)
            # Ids come again, as they do when a notebook names its requests.
            name = f"r{rng.randrange(12)}"
            if not source.engine.has_request(name):
                source.engine.add_request(prompt, greedy(rng.randint(1, 20)), name)
        if rng.random() < 0.05 and source.engine.scheduler.running:
            source.engine.abort(source.engine.scheduler.running[0].request_id)
            seen["aborted"] = True
        source.engine.step()
        if step % every:
            continue
        feed.tick()
        feed._under_way.clear()
        assert feed.error is None
        if step == 90:
            source.tell_again()  # told again though nobody missed it: nothing may change
        for frame in feed.page.frames:
            if "blocks" in frame["topics"]:
                mirror.take(unpack(frame["topics"]["blocks"], frame["buffers"]))
        feed.page.frames.clear()
        shared, cached = assert_equals_engine(mirror, source.engine)
        seen["shared"] |= shared
        seen["cached"] |= cached
    kinds = {event.kind for event in source.events.read(0)[0]}
    seen["evicted"], seen["preempted"] = "blocks_evicted" in kinds, "request_preempted" in kinds
    caching = options.get("enable_prefix_caching", True)
    assert seen["aborted"] and (seen["shared"] and seen["cached"] and seen["evicted"] or not caching
                                or options.get("block_size") == 64)
    if options == dict(num_blocks=8):
        assert seen["preempted"]


def test_a_delta_holds_only_the_blocks_that_changed_and_nothing_is_sent_for_nothing():
    source = SteppedSource(num_blocks=2000, max_num_seqs=4)
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    source.engine.add_request(list(range(12)), greedy(40), "a")
    feed.tick()
    feed._under_way.clear()
    for _ in range(8):
        source.engine.step()
        feed.tick()
        feed._under_way.clear()
        mode, payload = feed.page.part("blocks")
        assert mode == "delta" and len(payload.arrays["ids"]) <= 3
    frames = len(feed.page.frames)
    feed.tick()
    assert len(feed.page.frames) == frames


@pytest.mark.parametrize("first", ["snapshot", "delta"])
def test_a_frame_in_the_middle_of_a_step_does_not_lose_its_end(first):
    source = SteppedSource(num_blocks=16)
    feed, mirror = SteppedFeed(source), Mirror()
    if first == "delta":
        feed.page.ready("blocks")
        feed.tick()
    execute = source.engine.runner.execute

    def look_meanwhile(batch):
        if "blocks" not in feed.subscriptions:
            feed.page.ready("blocks")
        feed.tick()
        feed._under_way.clear()
        return execute(batch)

    source.engine.runner.execute = look_meanwhile
    source.engine.add_request(list(range(10)), greedy(9), "a")
    for _ in range(3):
        source.engine.step()
    feed.tick()
    for frame in feed.page.frames:
        if "blocks" in frame["topics"]:
            mirror.take(unpack(frame["topics"]["blocks"], frame["buffers"]))
    assert_equals_engine(mirror, source.engine)


def test_snapshot_depends_on_the_state_it_is_given_alone():
    source = SteppedSource(num_blocks=16)
    feed = SteppedFeed(source)
    topic = BlocksTopic(feed)
    source.engine.add_request([1, 2, 3, 4, 5], greedy(9), "a")
    states = []
    for _ in range(6):
        source.engine.step()
        feed._pump()
        mirror = Mirror()
        mirror.take(topic.snapshot(feed.state))
        states.append((feed.state.clone(), mirror))
    for state, mirror in states:  # the past again
        again = Mirror()
        again.take(topic.snapshot(state))
        assert again.ref.tolist() == mirror.ref.tolist() and again.filled.tolist() == mirror.filled.tolist()
        assert [row[2] for row in again.rows.values()] == [row[2] for row in mirror.rows.values()]
    assert len({tuple(mirror.filled) for _, mirror in states}) == 6
    state = feed.state
    topic.snapshot(states[0][0])
    back = Mirror()
    back.take(topic.delta(state, []))  # from the past to now: all of it
    assert back.filled.tolist() == states[-1][1].filled.tolist()


def test_the_past_is_shown_while_the_cursor_stands_there_and_answers_speak_of_it():
    source = SteppedSource(num_blocks=16)
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    mirror, moments = Mirror(), []

    def frame():
        feed.tick()
        feed._under_way.clear()
        for told in feed.page.frames:
            if "blocks" in told["topics"]:
                mirror.take(unpack(told["topics"]["blocks"], told["buffers"]))
        feed.page.frames.clear()

    source.engine.add_request([1, 2, 3, 4, 5], greedy(30), "a")
    for _ in range(9):
        source.engine.step()
        frame()
        moments.append((feed.ms(source.now_ns()), mirror.ref.tolist(), mirror.filled.tolist(), dict(mirror.totals)))
    last = source.engine.kv_cache_manager.req_to_block_ids["a"][-1]
    assert block(feed, last)["filled"] > 0
    for at, ref, filled, totals in moments[::-2]:
        feed.hub.cursor = at
        source.engine.step()  # the run goes on meanwhile
        frame()
        assert (mirror.ref.tolist(), mirror.filled.tolist(), mirror.totals) == (ref, filled, totals)
    assert block(feed, last)["filled"] == 0 and block(feed, last)["owners"] == []
    feed.hub.cursor = None
    frame()
    assert_equals_engine(mirror, source.engine)
    source.engine.step()
    frame()
    assert_equals_engine(mirror, source.engine)


def test_a_block_of_the_past_is_not_said_to_hold_what_came_later():
    source = SteppedSource(num_blocks=2)
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    source.engine.add_request([1, 2, 3, 4, 5], greedy(3), "a")
    source.engine.step()
    feed.tick()
    then, table = feed.ms(source.now_ns()), list(source.engine.kv_cache_manager.req_to_block_ids["a"])
    copy, places = feed.state.clone(), dict(feed.state.block_places)
    source.engine.abort("a")
    source.engine.add_request([9, 8, 7, 6, 5], greedy(3), "b")  # its blocks are a's, in another order
    source.engine.step()
    feed.tick()
    assert source.engine.kv_cache_manager.req_to_block_ids["b"] == table[::-1]
    feed.hub.cursor = then
    feed._under_way.clear()
    feed.tick()
    told = [block(feed, block_id) for block_id in table]
    assert [t["owners"] for t in told] == [["a"], ["a"]] and [t["start"] for t in told] == [0, 4]
    assert [token for t in told for _, token, _ in t["tokens"]] == [1, 2, 3, 4, 5]
    assert copy.block_places == places != feed.state.block_places


def test_a_cache_that_is_forgotten_is_shown_so():
    source, mirror = SteppedSource(num_blocks=16), Mirror()
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    source.engine.add_request(list(range(12)), greedy(2), "a")
    while source.engine.has_unfinished_requests():
        source.engine.step()
    feed.tick()
    source.engine.kv_cache_manager.forget_cached()  # as after a change of weights
    feed.tick()
    for frame in feed.page.frames:
        mirror.take(unpack(frame["topics"]["blocks"], frame["buffers"]))
    assert len(feed.page.frames) == 2 and not mirror.cached.any()
    assert_equals_engine(mirror, source.engine)


def test_before_anything_was_told_there_is_an_empty_pool():
    topic = BlocksTopic(SteppedFeed(SteppedSource()))
    payload = topic.snapshot(topic.feed.state)
    assert payload.data["num_blocks"] == 0 and payload.data["rows"] == []


def test_a_thousand_requests_of_any_name():
    source = SteppedSource(num_blocks=8192, max_num_seqs=1000, max_num_batched_tokens=10**6)
    feed = SteppedFeed(source)
    feed.page.ready("blocks")
    for i in range(1000):
        source.engine.add_request([i % VOCAB, 1, 2, 3, 4], greedy(5), f"request 🦊 {i} " + "x" * (i % 50))
    source.engine.step()
    start = time.perf_counter()
    feed.tick()
    assert time.perf_counter() - start < 1.0  # about 0.03 s where measured
    mirror = Mirror()
    mirror.take(feed.page.part("blocks")[1])
    assert_equals_engine(mirror, source.engine)


# ---- one block ----

def test_a_block_tells_its_tokens_owners_and_whether_it_is_findable():
    source = SteppedSource(num_blocks=8)
    feed = SteppedFeed(source)
    engine, pool = source.engine, source.engine.kv_cache_manager.pool
    prompt = [9, 8, 7, 6, 5, 4, 3]
    engine.add_request(prompt, greedy(30), "a")
    engine.step()
    engine.add_request(prompt, greedy(30), "b")
    engine.step()
    feed._pump()
    first, second = engine.kv_cache_manager.req_to_block_ids["a"][:2]
    told = block(feed, first)
    assert (told["owners"], told["cached"], told["start"], told["filled"]) == (["a", "b"], True, 0, 4)
    assert told["tokens"] == [[i, t, f"<{t}>"] for i, t in enumerate(prompt[:4])] and told["known"]
    told = block(feed, second)
    assert told["owners"] == ["a"] and not told["cached"] or told["filled"] == 4
    assert [t[0] for t in told["tokens"]] == list(range(4, 4 + told["filled"]))
    engine.abort(["a", "b"])
    feed._pump()
    told = block(feed, first)
    assert told["owners"] == [] and told["last"] == "b" and told["cached"]
    assert [t[1] for t in told["tokens"]] == prompt[:4] == list(pool.blocks[first].token_ids)
    untouched = next(b.block_id for b in pool.blocks if b.block_id not in feed.state.block_places)
    told = block(feed, untouched)
    assert told["tokens"] == [] and not told["known"] and told["last"] is None
    for wrong in (-1, 8, "3", None, True, 2.0):
        with pytest.raises(TinyVLLMError, match="this pool has the blocks 0 to 7"):
            block(feed, wrong)


def test_a_block_filled_before_anybody_listened_is_looked_up_in_the_pool():
    source = SteppedSource(num_blocks=8)
    engine = source.engine
    engine.listen(None)
    engine.add_request(list(range(10)), greedy(1), "early")
    engine.step()
    source.events.__init__()
    engine.listen(source.events)
    feed = SteppedFeed(source)
    feed._pump()
    for parent_depth, cached in enumerate(engine.kv_cache_manager.pool.cached_blocks.values()):
        told = block(feed, cached.block_id)
        assert isinstance(told, Future)
        told = told.result(timeout=5)
        assert told["start"] == 4 * parent_depth and told["owners"] == []
        assert [t[:2] for t in told["tokens"]] == [[4 * parent_depth + i, t] for i, t in enumerate(cached.token_ids)]


def test_a_very_large_block_says_what_it_leaves_out():
    source = SteppedSource(num_blocks=2, block_size=2000, max_model_len=4000, max_num_batched_tokens=4000)
    source.engine.add_request([1] * 1500, greedy(4), "a")
    source.engine.step()
    feed = SteppedFeed(source)
    feed._pump()
    told = block(feed, 0)
    assert told["filled"] == 1500 and len(told["tokens"]) == MOST_TOKENS and told["left_out"] == 1500 - MOST_TOKENS


def test_a_killed_request_gives_its_blocks_back_and_others_go_on(make_llm):
    with LiveEngine(make_llm(), paused=True) as live:
        feed = Feed(live, hub=Page())
        for name in ("a", "b"):
            live.add("The river went on", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True), name)
        live.step(3)
        until = time.monotonic() + 20
        while live.stats.num_steps < 3 or "b" not in feed.state.requests:
            assert time.monotonic() < until
            time.sleep(0.005)
        kill_request(feed, "a")
        while live.stats.num_running == 2:
            assert time.monotonic() < until
            time.sleep(0.005)
        manager = live.llm.engine.kv_cache_manager
        manager.check()
        assert list(manager.req_to_block_ids) == ["b"] and live.error is None
        while feed.state.requests["a"].finished_ns is None:
            time.sleep(0.005)
        for gone in ("a", "nobody", ""):
            with pytest.raises(TinyVLLMError, match="is not running or waiting"):
                kill_request(feed, gone)
        feed.close()
