"""Topic "timeline" and its answers, without a page: what the page knows is what the engine did, whatever happened."""

import math
import random

import pytest

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tests.toy import toy_engine
from tinyvllm import SamplingParams
from tinyvllm.errors import TinyVLLMError
from widgets.answers.timeline import timeline_request, timeline_step
from widgets.topics.timeline import KINDS, STATUSES

GREEDY = SamplingParams(temperature=0, max_tokens=6)


class Reader:
    """What a page would know from the frames, put together by the topic's rules."""

    def __init__(self, feed):
        self.feed, self.clears = feed, 0
        self.feed.page.ready("timeline")

    def tick(self):
        """One frame; returns its mode, or None if it brought nothing for the timeline."""
        before = len(self.feed.page.frames)
        self.feed.tick()
        if len(self.feed.page.frames) == before:
            return None
        self.feed.page.say({"op": "ack", "n": self.feed.page.frames[-1]["n"], "drawn": 0})
        if "timeline" not in self.feed.page.frames[-1]["topics"]:
            return None
        mode, payload = self.feed.page.part("timeline")
        self.take(payload)
        return mode

    def take(self, payload):
        if payload.data["clear"]:
            self.clears += 1
            self.steps, self.requests = [], {}
        arrays = payload.arrays
        steps = rows(arrays, "step", "step", "begin", "end", "prefill", "decode", "rows", "failed")
        if steps:
            self.steps = [s for s in self.steps if s[1] < steps[0][1]] + steps
        for number, request_id, prompt, added in payload.data["added"]:
            assert number not in self.requests, "a request was introduced twice"
            self.requests[number] = {"id": request_id, "prompt": prompt, "added": added, "spans": [], "chunks": []}
        for number, kind, begin, end in rows(arrays, "span", "request", "kind", "begin", "end"):
            known = self.requests[number]
            known["spans"] = [s for s in known["spans"] if s[1] < begin] + [(KINDS[kind], begin, end)]
        for number, step, begin, start, count in rows(arrays, "chunk", "request", "step", "begin", "start", "count"):
            known = self.requests[number]
            known["chunks"] = [c for c in known["chunks"] if c[1] < begin] + [(step, begin, start, count)]
        for number, *figures in rows(arrays, "request", "number", "tokens", "first", "cached", "preemptions", "status",
                                     "end"):
            self.requests[number]["figures"] = figures

    def by_id(self):
        return {known["id"]: known for known in self.requests.values()}  # the newest of an id


def rows(arrays, prefix, *names):
    return list(zip(*(arrays[f"{prefix}_{name}"].tolist() for name in names))) if f"{prefix}_{names[0]}" in arrays \
        else []


def same(a, b):
    return (math.isnan(a) and b is None) or a == b


def check_against_state(reader, feed):
    """Everything that the state knows, the page knows: no span, figure or step is missing, late or wrong."""
    state, known = feed.state, reader.by_id()
    assert set(known) >= set(state.requests)
    for request_id, request in state.requests.items():
        seen = known[request_id]
        assert (seen["prompt"], seen["added"]) == (request.num_prompt_tokens, feed.ms(request.added_ns))
        assert [s[0] for s in seen["spans"]] == [span.kind for span in request.spans]
        for (_, begin, end), span in zip(seen["spans"], request.spans):
            assert begin == feed.ms(span.start_ns)
            assert same(end, None if span.end_ns is None else feed.ms(span.end_ns))
        tokens, first, cached, preemptions, status, end = seen["figures"]
        assert (tokens, cached, preemptions, STATUSES[status]) == (
            len(request.token_ids), request.num_cached_tokens, request.num_preemptions, request.status)
        assert same(first, feed.ms(request.token_ns[0]) if request.token_ns else None)
        assert same(end, None if request.finished_ns is None else feed.ms(request.finished_ns))
    assert [s[0] for s in reader.steps[-len(state.steps):]] == [step.step for step in state.steps]
    for seen, step in zip(reader.steps[-len(state.steps):], state.steps):
        assert same(seen[2], None if step.end_ns is None else feed.ms(step.end_ns))
        assert seen[3] + seen[4] == step.num_tokens and seen[5] == len(step.batch)


def fed(**options):
    source = SteppedSource(**options)
    feed = SteppedFeed(source)
    return source, feed, Reader(feed)


@pytest.mark.parametrize("seed", range(6))
def test_after_any_traffic_the_page_knows_what_the_runner_computed(seed):
    rng = random.Random(seed)
    source, feed, reader = fed(num_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=rng.choice((5, 16)))
    reader.tick()
    engine, alive, prompts = source.engine, [], {}
    for number in range(120):
        if rng.random() < 0.3:
            request_id = f"r{number}"
            prompts[request_id] = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
            engine.add_request(prompts[request_id], SamplingParams(temperature=0, max_tokens=rng.randrange(1, 15)),
                               request_id)
            alive.append(request_id)
        if alive and rng.random() < 0.05:
            engine.abort(rng.choice(alive))
        engine.step()
        if rng.random() < 0.4:
            reader.tick()
            check_against_state(reader, feed)
    reader.tick()
    check_against_state(reader, feed)
    assert engine.scheduler.num_preemptions, "a storm without preemption proves little"
    # The runner kept its own books: every row of every batch.
    assert len(reader.steps) == len(engine.runner.batches) == engine.num_steps
    chunks = {(known["id"], step, start, count) for known in reader.requests.values()
              for step, _, start, count in known["chunks"]}
    expected, prefill_tokens = set(), []
    for step, batch in enumerate(engine.runner.batches, start=1):
        pieces = {(r, step, start, count) for r, start, count in batch if count > 1 or start < len(prompts[r])}
        expected |= pieces
        prefill_tokens.append(sum(piece[3] for piece in pieces))
    assert chunks == expected
    assert [s[3] for s in reader.steps] == prefill_tokens
    assert [s[3] + s[4] for s in reader.steps] == [sum(row[2] for row in batch) for batch in engine.runner.batches]
    assert feed.error is None and reader.clears == 1


def test_a_delta_brings_what_is_new_and_nothing_else():
    source, feed, reader = fed(max_num_batched_tokens=8)
    source.engine.add_request([1] * 20, SamplingParams(temperature=0, max_tokens=40), "long")
    assert reader.tick() == "snapshot"
    for _ in range(10):
        source.engine.step()
        assert reader.tick() == "delta"
        _, payload = feed.page.part("timeline")
        assert payload.data["added"] == [] and len(payload.arrays["step_step"]) == 1
        assert len(payload.arrays.get("span_kind", ())) <= 2
    assert [c[2:] for c in reader.by_id()["long"]["chunks"]] == [(0, 8), (8, 8), (16, 4)]
    assert [s[0] for s in reader.by_id()["long"]["spans"]] == ["waiting", "prefill", "decode"]
    feed.page.frames.clear()
    for _ in range(5):
        assert reader.tick() is None


def test_an_open_step_is_told_again_when_it_has_ended():
    source, feed, reader = fed()
    source.engine.add_request([1, 2, 3], GREEDY, "a")
    execute, ticked = source.engine.runner.execute, []

    def look_meanwhile(output):
        ticked.append(reader.tick())
        assert math.isnan(reader.steps[-1][2])
        return execute(output)

    source.engine.runner.execute = look_meanwhile
    source.engine.step()
    source.engine.step()
    reader.tick()
    assert ticked == ["snapshot", "delta"] and len(reader.steps) == 2
    assert not any(math.isnan(s[2]) for s in reader.steps)
    assert len(reader.by_id()["a"]["chunks"]) == 1
    check_against_state(reader, feed)


def test_a_step_that_failed_and_was_tried_again_is_two_columns():
    source, feed, reader = fed()
    reader.tick()
    source.engine.add_request([1, 2, 3], GREEDY, "a")
    source.engine.runner.fail_next = True
    with pytest.raises(RuntimeError):
        source.engine.step()
    reader.tick()
    source.engine.step()
    reader.tick()
    assert [(s[0], s[6]) for s in reader.steps] == [(1, 1), (1, 0)]
    assert timeline_step(feed, 1)["errors"] == ["RuntimeError: the device fell over"]
    check_against_state(reader, feed)


def test_a_view_that_comes_back_gets_all_that_is_kept():
    source, feed, reader = fed(max_num_batched_tokens=8)
    for i in range(5):
        source.engine.add_request([i] * 15, GREEDY, f"r{i}")
    for _ in range(9):
        source.engine.step()
        reader.tick()
    before = (reader.steps, reader.by_id())
    feed.page.ready("timeline", view="after the reload")
    assert reader.tick() == "snapshot"
    check_against_state(reader, feed)
    again = (reader.steps, reader.by_id())
    assert again[0] == before[0]
    for request_id, known in before[1].items():
        assert known["chunks"] == again[1][request_id]["chunks"]
        assert [s[:2] for s in known["spans"]] == [s[:2] for s in again[1][request_id]["spans"]]


def test_a_reset_clears_and_a_gap_is_survived():
    source, feed, reader = fed()
    for i in range(3):
        source.engine.add_request([i] * 5, GREEDY, f"r{i}")
    for _ in range(4):
        source.engine.step()
    reader.tick()
    assert reader.steps
    source.engine = toy_engine()  # what LLM.reset does: a new engine that tells into the same log
    source.engine.listen(source.events)
    reader.tick()
    assert reader.steps == [] and reader.requests == {}
    source.engine.add_request([1, 2], GREEDY, "after")
    source.engine.step()
    reader.tick()
    assert list(reader.by_id()) == ["after"] and len(reader.steps) == 1
    check_against_state(reader, feed)

    small, feed, reader = fed(capacity=40, num_blocks=64)
    small.engine.add_request([1] * 8, SamplingParams(temperature=0, max_tokens=90), "r")
    reader.tick()
    for _ in range(60):
        small.engine.step()
    for _ in range(4):
        reader.tick()
        small.engine.step()
    reader.tick()
    assert small.told_again == 1 and feed.stats.gaps == 1
    check_against_state(reader, feed)
    assert reader.steps[-1][0] == small.engine.num_steps


def test_state_told_again_for_another_reader_changes_nothing_here():
    source, feed, reader = fed()
    source.engine.add_request([1] * 9, SamplingParams(temperature=0, max_tokens=30), "a")
    for _ in range(5):
        source.engine.step()
    reader.tick()
    before = reader.steps, reader.by_id()["a"]["spans"], reader.by_id()["a"]["chunks"]
    source.tell_again()
    reader.tick()
    source.engine.step()
    reader.tick()
    check_against_state(reader, feed)
    assert reader.steps[:-1] == before[0] and reader.by_id()["a"]["chunks"] == before[2]
    assert reader.by_id()["a"]["spans"][:2] == before[1][:2] and reader.clears == 1


def test_an_id_that_is_used_again_is_another_bar():
    source, feed, reader = fed()
    for _ in range(2):
        source.engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=2), "same")
        while source.engine.has_unfinished_requests():
            source.engine.step()
        reader.tick()
    assert [known["id"] for known in reader.requests.values()] == ["same", "same"]
    assert all(STATUSES[known["figures"][4]] == "length" for known in reader.requests.values())
    assert len(next(iter(reader.requests.values()))["chunks"]) == 1


def test_without_a_kv_cache_every_step_computes_the_whole_sequence_again():
    source, feed, reader = fed(use_kv_cache=False, enable_prefix_caching=False, max_num_batched_tokens=64)
    source.engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4), "a")
    while source.engine.has_unfinished_requests():
        source.engine.step()
    reader.tick()
    assert [c[2:] for c in reader.by_id()["a"]["chunks"]] == [(0, 3), (0, 4), (0, 5), (0, 6)]


def test_the_answer_to_a_clicked_step_is_its_batch():
    source, feed, reader = fed(max_num_batched_tokens=8)
    source.engine.add_request([1] * 3, SamplingParams(temperature=0, max_tokens=9), "a")
    source.engine.step()
    source.engine.add_request([2] * 20, GREEDY, "my-request-🦊")
    source.engine.step()
    reader.tick()
    step = timeline_step(feed, 2)
    assert step["rows"] == [["a", 3, 1, "decode", True], ["my-request-🦊", 0, 7, "prefill", False]]
    assert step["tokens"] == 8 == step["budget"] and step["end"] > step["begin"] and step["errors"] == []
    assert 0 < step["runner"] <= step["end"] - step["begin"] + 1e-6
    with pytest.raises(TinyVLLMError, match="step 99 is not kept: there have been 2"):
        timeline_step(feed, 99)


def test_the_answer_to_a_clicked_request_is_its_figures():
    source, feed, reader = fed(num_blocks=16)
    prompt = [3] * 9
    for request_id in ("first", "second"):
        source.engine.add_request(prompt, GREEDY, request_id)
        while source.engine.has_unfinished_requests():
            source.engine.step()
    reader.tick()
    found, state = timeline_request(feed, "second"), feed.state.requests["second"]
    assert (found["prompt"], found["cached"], found["output"], found["status"]) == (9, 8, 6, "length")
    assert found["ttft"] == (state.token_ns[0] - state.added_ns) / 1e6
    assert found["itl"]["count"] == 5 and 0 < found["waited"] < found["ttft"]
    mean = (state.token_ns[-1] - state.token_ns[0]) / 5 / 1e6
    assert found["itl"]["mean"] == pytest.approx(mean) and found["itl"]["max"] >= found["itl"]["p95"]
    source.engine.add_request(prompt, GREEDY, "waits")
    reader.tick()
    assert timeline_request(feed, "waits")["ttft"] is None
    with pytest.raises(TinyVLLMError, match="'nobody' is not known"):
        timeline_request(feed, "nobody")
