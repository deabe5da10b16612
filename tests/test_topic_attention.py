"""AttentionScope's data: every byte is a weight, whoever asks late gets the same, and nobody is held up for it."""

import time

import numpy as np
import pytest

from tests.feed_stand_ins import SteppedFeed
from tests.llm_source import LLMSource, settle
from tinyvllm import SamplingParams
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.probe.vectors import head_vectors, softmax_rows
from widgets.attention_record import SIDE, AttentionRecord, ranges
from widgets.frames import unpack
from widgets.topics import attention as topic

PROMPT = list(range(20, 43))


def params(count):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(topic, "LOOKS_PER_SECOND", 10_000)
    monkeypatch.setattr(topic, "SHARE", 10_000)


@pytest.fixture
def source(make_llm):
    return LLMSource(make_llm(enable_prefix_caching=False))


@pytest.fixture
def feed(source):
    feed = SteppedFeed(source)
    feed.page.ready("attention")
    settle(feed, "attention")
    yield feed
    feed.close()
    assert feed.error is None


class Picture:
    """What a page makes of the frames: the JavaScript's rules in Python."""

    def __init__(self, feed):
        for frame in feed.page.frames:
            if "attention" in frame["topics"]:
                self.take(unpack(frame["topics"]["attention"], frame["buffers"]))

    def take(self, payload):
        data, arrays = payload.data, payload.arrays
        if data["whole"]:
            self.tokens, self.rows, self.thumbnails = [], {}, None
            if "extent" in data:
                self.thumbnails = arrays["thumbnails"].copy()
        elif "extent" in data:
            self.thumbnails[:, arrays["bins"]] = arrays["thumbnails"]
        self.data = data
        self.tokens[data["tokens_from"]:] = data["tokens"]
        at = 0
        for position in arrays.get("positions", []):
            self.rows[int(position)] = arrays["full"][at:at + position + 1]
            at += position + 1


def expected_rows(llm, layer, head):
    """{position: 255 * weight} of one head, from its queries and keys."""
    vectors = head_vectors(llm, layer, head)
    return {int(p): 255 * row[:p + 1] for p, row in zip(vectors.positions, softmax_rows(vectors))}


def assert_is_head(picture, llm, layer, head):
    expected = expected_rows(llm, layer, head)
    assert picture.rows.keys() == expected.keys() and expected
    for position, row in expected.items():
        assert np.abs(picture.rows[position] - row).max() <= 0.5 + 1e-3


# ---- the record ----


@pytest.mark.parametrize("context, width", [(1, 1), (63, 63), (64, 64), (65, 65), (200, 200), (256, 256)])
def test_thumbnails_are_the_largest_of_their_cells(context, width):
    rng = np.random.default_rng(context)
    weights = np.tril(rng.integers(0, 256, (2, 3, context, context), np.uint8))
    record = AttentionRecord(2, 3, 1)
    order = rng.permutation(context)
    for part in np.array_split(order, 5):  # in any order, and with the context as it grew
        for position in part:
            seen = max(position + 1, context // 2)
            record.add(np.array([position]), weights[:, :, [position], :seen], seen)
    each = record.extent // SIDE
    padded = np.zeros((6, record.extent, record.extent), np.uint8)
    padded[:, :context, :context] = weights.reshape(6, context, context)
    assert record.extent >= context and (record.extent == SIDE or record.extent < 2 * context)
    assert (record.thumbnails == padded.reshape(6, SIDE, each, SIDE, each).max((2, 4))).all()
    assert record.num_rows == context


@pytest.mark.parametrize("context", [257, 300, 511, 700, 1024])
def test_columns_that_were_pooled_lose_no_weight_and_move_by_less_than_a_pixel(context):
    width, each = 4 * SIDE, 2 ** int(np.ceil(np.log2(context))) // SIDE
    rng = np.random.default_rng(context)
    record = AttentionRecord(1, 1, 1)
    for position in range(0, context, 37):
        row = np.zeros(context, np.uint8)
        spots = rng.choice(position + 1, min(3, position + 1), replace=False)
        row[spots] = rng.integers(1, 256, len(spots))
        pooled = np.array([row[c * context // width:(c + 1) * context // width].max() for c in range(width)], np.uint8)
        record.add(np.array([position]), pooled.reshape(1, 1, 1, -1), context)
        line = record.thumbnails[0, position // each]
        for spot in spots:
            assert line[spot // each] >= row[spot]
        near = {s // each + d for s in np.flatnonzero(row) for d in (-1, 0, 1)}
        assert set(np.flatnonzero(line)) <= near


def test_a_record_remembers_the_last_heads_only():
    record = AttentionRecord(4, 8, 2)
    record.add(np.array([0, 1]), np.zeros((4, 8, 2, 2), np.uint8), 2)
    for head in range(20):
        record.add_full(head // 8, head % 8, np.array([0]), np.full((1, 2), head, np.uint8))
    assert record.missing(0, 0).tolist() == [0, 1] and record.missing(2, 3).tolist() == [1]
    assert record.full(2, 3)[0].tolist() == [19]


def test_ranges():
    assert ranges(np.array([], int)) == []
    assert ranges(np.array([0, 1, 2, 5, 7, 8])) == [[0, 2], [5, 5], [7, 8]]


# ---- the topic ----


def test_every_row_of_the_head_in_focus_is_its_attention(feed, source):
    feed.select(layer=1, head=2)
    source.engine.add_request(PROMPT, params(9))
    for _ in range(4):
        source.run(steps=3)
        settle(feed, "attention")
    picture = Picture(feed)
    assert_is_head(picture, source.llm, 1, 2)
    assert sorted(picture.rows) == list(range(len(PROMPT) + 8))  # the last token was chosen and never computed
    request = feed.state.requests["0"]
    assert picture.tokens == [f"<{i}>" for i in [*PROMPT, *request.token_ids]]
    assert picture.data["rows"] == [[0, len(PROMPT) + 7]] and picture.data["note"] == ""


def test_thumbnails_of_all_heads_are_their_attention(feed, source):
    source.engine.add_request(PROMPT, params(9))
    source.run()
    settle(feed, "attention")
    picture, dims = Picture(feed), source.llm.runner.dims
    for layer in range(dims.num_layers):
        for head in range(dims.num_heads):
            thumbnail = picture.thumbnails[layer * dims.num_heads + head]
            for position, row in expected_rows(source.llm, layer, head).items():
                assert np.abs(thumbnail[position, :position + 1] - row).max() <= 0.5 + 1e-3
                assert not thumbnail[position, position + 1:].any()


def test_another_focus_gets_its_rows_also_after_the_request_has_ended(feed, source):
    source.engine.add_request(PROMPT, params(5))
    source.run()
    settle(feed, "attention")
    assert_is_head(Picture(feed), source.llm, 0, 0)
    feed.select(layer=1, head=3)
    settle(feed, "attention")
    assert_is_head(Picture(feed), source.llm, 1, 3)
    feed.select(layer=99, head=99)  # another model's selection
    settle(feed, "attention")
    dims = source.llm.runner.dims
    assert_is_head(Picture(feed), source.llm, dims.num_layers - 1, dims.num_heads - 1)


def test_who_comes_late_gets_what_the_others_have(feed, source):
    source.engine.add_request(PROMPT, params(7))
    for _ in range(3):
        source.run(steps=3)
        settle(feed, "attention")
    grown = Picture(feed)
    feed.page.ready("attention", view="late")  # a page was reloaded
    settle(feed, "attention")
    del feed.page.frames[:-1]
    late = Picture(feed)
    assert late.data["whole"] and late.tokens == grown.tokens and (late.thumbnails == grown.thumbnails).all()
    assert late.rows.keys() == grown.rows.keys()
    assert all((late.rows[p] == grown.rows[p]).all() for p in late.rows)


def test_a_map_outlives_its_blocks_and_says_that_its_numbers_have_gone(feed, source):
    feed.select(request="old")
    source.engine.add_request(PROMPT, params(5), request_id="old")
    source.run()
    settle(feed, "attention")
    before = Picture(feed)
    for i in range(40):  # others take all the blocks there are
        source.engine.add_request([i + 1] * 60, params(5))
    source.run()
    feed.select(head=1)
    settle(feed, "attention")
    after = Picture(feed)
    assert after.data["request"] == "old" and "gone" in after.data["note"]
    assert (after.thumbnails == before.thumbnails).all()
    feed.select(head=0)
    settle(feed, "attention")
    again = Picture(feed)
    assert {p: r.tolist() for p, r in again.rows.items()} == {p: r.tolist() for p, r in before.rows.items()}


def test_another_request_can_be_chosen_while_both_run(feed, source):
    for name in ("a", "b"):
        source.engine.add_request(PROMPT, params(30), request_id=name)
    source.run(steps=3)
    settle(feed, "attention")
    assert Picture(feed).data["request"] == "b"
    feed.select(request="a")
    settle(feed, "attention")  # the watch changes over
    source.run(steps=4)
    settle(feed, "attention")
    picture = Picture(feed)
    assert picture.data["request"] == "a" and source.llm.probe.watched == "a"
    assert sorted(picture.rows) == source.llm.probe.kept != []
    assert min(picture.rows) > len(PROMPT)  # those before were computed unwatched, and are not made up
    feed.select(request=None)
    source.run()
    settle(feed, "attention")


def test_rows_whose_keys_came_from_the_prefix_cache_are_missing_and_said_so(make_llm):
    source = LLMSource(make_llm(enable_prefix_caching=True))
    feed = SteppedFeed(source)
    feed.page.ready("attention")
    settle(feed, "attention")
    for _ in range(2):
        source.engine.add_request(PROMPT * 3, params(3))
        source.run()
        settle(feed, "attention")
    picture = Picture(feed)
    cached = feed.state.requests["1"].num_cached_tokens
    assert cached > 0 and picture.data["num_cached"] == cached
    assert picture.data["rows"] == [[cached, len(PROMPT) * 3 + 1]] and min(picture.rows) == cached


def test_a_look_ends_when_its_time_is_over_and_the_rest_comes_later(feed, source, monkeypatch):
    monkeypatch.setattr(topic, "BUDGET_S", 0.0)
    monkeypatch.setattr(topic, "IDLE_BUDGET_S", 0.0)
    source.engine.add_request(PROMPT * 4, params(3))
    source.run()
    seen = topic.look_at_rows(source.llm, topic.Wish(None, None, np.zeros(0, bool), np.zeros(0, bool), 0, 0))
    assert seen.more and 0 < sum(len(p) for p, _ in seen.rows) < len(PROMPT) * 4
    settle(feed, "attention", frames=300)
    assert Picture(feed).data["rows"] == [[0, len(PROMPT) * 4 + 1]]


def test_nothing_is_sent_and_no_look_taken_while_nothing_happens(feed, source, monkeypatch):
    source.engine.add_request(PROMPT, params(3))
    source.run()
    settle(feed, "attention")
    looks, frames = [], len(feed.page.frames)
    monkeypatch.setattr(source, "between_steps", lambda *a: looks.append(a))
    for _ in range(5):
        feed.tick()
    assert looks == [] and len(feed.page.frames) == frames


def test_out_of_sight_nothing_is_kept_after_a_while_and_at_the_end_at_once(feed, source, monkeypatch):
    monkeypatch.setattr(topic, "UNWATCH_AFTER_S", 0.05)
    source.engine.add_request(PROMPT, params(3))
    source.run(steps=1)
    settle(feed, "attention")
    feed.page.say({"op": "visible", "view": "v", "visible": False})
    feed.page.say({"op": "visible", "view": "v", "visible": True})  # a short look elsewhere
    settle(feed, "attention")
    time.sleep(0.15)
    assert source.llm.probe.watched == "0"
    feed.page.say({"op": "visible", "view": "v", "visible": False})
    time.sleep(0.15)
    assert source.llm.runner.watch is None
    feed.page.say({"op": "visible", "view": "v", "visible": True})
    settle(feed, "attention")
    assert source.llm.runner.watch is not None
    feed.page.say({"op": "gone", "view": "v"})
    assert source.llm.runner.watch is None
    source.run()


def test_the_tokens_are_the_same_looked_at_or_not(make_llm):
    outputs = []
    for looked_at in (False, True):
        source = LLMSource(make_llm())
        feed = SteppedFeed(source)
        if looked_at:
            feed.page.ready("attention")
        for i in range(3):
            source.engine.add_request(PROMPT[i:], params(12))
        while source.engine.has_unfinished_requests():
            source.run(steps=2)
            feed.tick()
            feed.page.say({"op": "ack", "n": 10**9, "drawn": 0})
        feed.tick()
        outputs.append({i: r.token_ids for i, r in feed.state.requests.items()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 3


def test_a_recording_says_calmly_that_it_has_none(source):
    source.engine.add_request(PROMPT, params(3))
    source.run()
    with ReplayEngine(Trace(source.events.read()[0]), rate=float("inf")) as replay:
        replay.wait_idle()
        feed = SteppedFeed(replay)
        feed.page.ready("attention")
        settle(feed, "attention")
        data = Picture(feed).data
        assert "not recorded" in data["note"] and data["requests"] == [] and feed.error is None
        feed.page.say({"op": "gone", "view": "v"})


def test_a_reset_engine_begins_with_an_empty_picture(feed, source):
    source.engine.add_request(PROMPT, params(3))
    source.run()
    settle(feed, "attention")
    source.llm.reset()
    source.engine = source.llm.engine
    source.engine.listen(source.events)
    settle(feed, "attention")
    assert Picture(feed).data["request"] is None
    source.engine.add_request(PROMPT[::-1], params(4))
    source.run()
    settle(feed, "attention")
    assert_is_head(Picture(feed), source.llm, 0, 0)


# ---- answers ----


def ask(feed, what, **args):
    feed.page.say({"op": "ask", "id": "x", "what": what, "args": args})
    answer = feed.page.answers[-1]
    return answer if "error" in answer else unpack(answer, answer["buffers"])


def test_the_arithmetic_of_a_cell_adds_up(feed, source):
    source.engine.add_request(PROMPT, params(5), request_id="r")
    source.run()
    settle(feed, "attention")
    row, column = len(PROMPT), 7
    cell = ask(feed, "attention_cell", request="r", layer=1, head=2, row=row, column=column)
    x, a = cell.data, cell.arrays
    assert np.allclose(a["q"] * a["k"], a["products"]) and abs(a["products"].sum() - x["dot"]) < 1e-4
    assert abs(x["dot"] * x["scale"] - x["score"]) < 1e-5 and not x["masked"]
    assert abs(np.exp(x["score"] - x["row_max"]) - x["exp"]) < 1e-5
    assert abs(a["exps"].sum() - x["denominator"]) < 1e-3 and abs(a["exps"][column] - x["exp"]) < 1e-4
    assert abs(x["weight"] - expected_rows(source.llm, 1, 2)[row][column] / 255) < 1e-5
    hidden = ask(feed, "attention_cell", request="r", layer=1, head=2, row=3, column=9).data
    assert hidden["masked"] and hidden["weight"] == 0


@pytest.mark.parametrize("causal, scaled", [(False, True), (True, False), (False, False)])
def test_what_if_is_the_softmax_of_the_same_numbers(feed, source, causal, scaled):
    source.engine.add_request(PROMPT, params(5), request_id="r")
    source.run()
    settle(feed, "attention")
    vectors = head_vectors(source.llm, 1, 3)
    scores = vectors.q.astype(np.float64) @ vectors.k.T.astype(np.float64) * (vectors.scale if scaled else 1)
    if causal:
        scores[np.arange(len(vectors.k)) > vectors.positions[:, None]] = -np.inf
    expected = np.exp(scores - scores.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    what = ask(feed, "attention_what_if", request="r", layer=1, head=3, causal=causal, scaled=scaled)
    assert np.abs(what.arrays["weights"] - 255 * expected).max() <= 0.5 + 1e-3
    for row, column in ((0, 0), (4, 2), *((row, row) for row in range(1, 20)), (4, 20)):
        cell = ask(feed, "attention_cell", request="r", layer=1, head=3, row=row, column=column, causal=causal,
                   scaled=scaled).data
        assert abs(cell["weight"] - expected[row, column]) < 1e-5 and cell["masked"] == (causal and column > row)
        assert cell["exp"] == pytest.approx(cell["weight"] * cell["denominator"], abs=1e-6)


def test_a_request_that_is_not_kept_any_more_is_answered_in_words(feed, source):
    for what in ("attention_cell", "attention_what_if"):
        args = {"row": 0, "column": 0} if what == "attention_cell" else {}
        answer = ask(feed, what, request="nobody", layer=0, head=0, **args)
        assert "'nobody'" in answer["error"] and "no longer kept" in answer["error"]


def test_a_look_that_compiled_its_kernel_does_not_keep_the_next_one_away(source, feed, monkeypatch):
    """The first look of a fresh installation takes seconds, and at its share of the time that would be minutes."""
    from concurrent.futures import Future

    monkeypatch.setattr(topic, "SHARE", 0.005)
    source.llm.engine.add_request(PROMPT, params(4), "a")
    assert source.state == "running"
    shown, look = feed.subscriptions.topic("attention"), Future()
    look.set_result(topic.Seen(None, took_s=30.0))
    shown._take(look, feed.state)
    assert 0 < shown._next_look - time.monotonic() <= topic.LONGEST_REST_S <= 1
    look = Future()
    look.set_result(topic.Seen(None, took_s=0.001))
    shown._next_look = 0.0
    shown._take(look, feed.state)
    assert 0.1 < shown._next_look - time.monotonic() <= 0.2, "an ordinary one takes its share"
