"""Topic "race" and its answers, without a page: texts arrive whole, slots stay, counts add up, forks are forks."""

import time

import numpy as np
import pytest

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tests.toy import continuation, toy_engine
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.state import RequestState, Span
from tinyvllm.errors import RequestError
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from widgets.answers.race import every_request, fork, next_token
from widgets.feed import Feed
from widgets.topics.race import KEPT_TEXT, parent_of

KEY = "race{'shown': 4}"


class Reader:
    """What a page would know from the frames: slot -> card, with the text put together from the deltas."""

    def __init__(self, feed):
        self.feed, self.cards, self.totals, self.new_characters = feed, {}, None, 0

    def tick(self):
        before = len(self.feed.page.frames)
        self.feed.tick()
        if len(self.feed.page.frames) == before or KEY not in self.feed.page.frames[-1]["topics"]:
            return None
        self.feed.page.say({"op": "ack", "n": self.feed.page.frames[-1]["n"], "drawn": 0})
        mode, payload = self.feed.page.part(KEY)
        self.totals = payload.data["totals"]
        if mode == "snapshot":
            self.cards = {}
        for change in payload.data["cards"]:
            self.new_characters += len(change.get("text") or "") + len(change.get("new") or "")
            if change["id"] is None:
                del self.cards[change["slot"]]
            elif "text" in change:
                self.cards[change["slot"]] = dict(change)
            else:
                card = self.cards[change["slot"]]
                assert card["id"] == change["id"]
                card |= {**change, "text": card["text"] + change["new"]}
        return mode

    def by_id(self):
        return {card["id"]: card for card in self.cards.values()}


class ToyText:
    """A tokenizer for the toy: every token is its number and a space."""

    def incremental_detokenizer(self, stop=(), **_):
        detokenizer = type("D", (), {})()
        detokenizer.text, detokenizer.stop_reason = "", None

        def push(token_ids):
            new = "".join(f"{i} " for i in token_ids)
            detokenizer.text += new
            return new

        detokenizer.push, detokenizer.finish = push, lambda: ""
        return detokenizer


@pytest.fixture
def race():
    source = SteppedSource(num_blocks=64, max_num_seqs=4, tokenizer=ToyText())
    reader = Reader(SteppedFeed(source))
    reader.feed.page.ready("race", shown=4)
    return source, reader


def add(source, count, max_tokens=5, start=0):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [source.engine.add_request([(start + i + 1) % 50, 2, 3], params, f"r{start + i}") for i in range(count)]


def test_nothing_yet(race):
    _, reader = race
    assert reader.tick() == "snapshot" and reader.cards == {} and reader.totals["requests"] == 0
    assert reader.tick() is None  # and nothing more to say


def test_texts_arrive_whole_and_only_once(race):
    source, reader = race
    reader.tick()
    add(source, 3, max_tokens=9)
    modes = set()
    while source.engine.has_unfinished_requests():
        source.engine.step()
        modes.add(reader.tick())
    assert modes == {"delta"}
    for i in range(3):
        card = reader.by_id()[f"r{i}"]
        assert card["text"] == "".join(f"{t} " for t in continuation([i + 1, 2, 3], 9))
        assert card["tokens"] == 9 and card["status"] == "length"
    assert reader.new_characters == sum(len(card["text"]) for card in reader.cards.values())  # each character once
    assert reader.tick() is None or reader.totals["rate"] >= 0


def test_latencies_are_those_of_the_state(race):
    source, reader = race
    add(source, 1, max_tokens=4)
    while source.engine.has_unfinished_requests():
        source.engine.step()
        reader.tick()
    request, card = reader.feed.state.requests["r0"], reader.by_id()["r0"]
    gaps = request.itl_ns()
    assert len(gaps) == 3 and card["ttft"] == pytest.approx(request.ttft_ns / 1e6)
    assert card["itl"] == pytest.approx(np.mean(gaps) / 1e6) and card["last"] == pytest.approx(gaps[-1] / 1e6)
    assert card["rate"] == pytest.approx(4e9 / (request.token_ns[-1] - request.added_ns))


def test_the_rest_is_counted_and_takes_the_place_of_what_ended(race, monkeypatch):
    source, reader = race
    monkeypatch.setattr("widgets.topics.race.HOLD_NS", 0)
    add(source, 10)
    reader.tick()
    assert [reader.cards[i]["id"] for i in range(4)] == ["r0", "r1", "r2", "r3"]
    assert reader.totals | {"rate": 0} == {"requests": 10, "running": 0, "waiting": 10, "preempted": 0, "finished": 0,
                                           "rate": 0}
    seen = set()
    while source.engine.has_unfinished_requests():
        source.engine.step()
        before = reader.by_id()
        reader.tick()
        after = reader.by_id()
        seen |= set(after)
        slot_of = {card["id"]: slot for slot, card in reader.cards.items()}
        for request_id, card in before.items():  # nobody changes places, and only ended ones go
            if request_id in after:
                assert slot_of[request_id] == card["slot"]
            else:
                assert reader.feed.state.requests[request_id].status == "length"
    reader.tick()
    assert seen == {f"r{i}" for i in range(10)} and reader.totals["finished"] == 10 and len(reader.cards) == 4


def test_a_finished_card_is_held_for_a_while(race):
    source, reader = race
    add(source, 4, max_tokens=1)
    add(source, 4, max_tokens=50, start=4)
    reader.tick()
    for _ in range(6):
        source.engine.step()
        reader.tick()
    assert [card["status"] for card in reader.cards.values()] == ["length"] * 4
    assert reader.totals["running"] == 4


def test_the_selected_request_always_has_a_card(race):
    source, reader = race
    add(source, 10)
    source.engine.step()
    reader.tick()
    reader.feed.page.selection = {**reader.feed.page.selection, "request": "r8"}
    reader.tick()
    assert "r8" in reader.by_id() and len(reader.cards) == 4
    while source.engine.has_unfinished_requests():
        source.engine.step()
        reader.tick()
        assert "r8" in reader.by_id()


def test_a_reset_empties_the_cards(race):
    source, reader = race
    add(source, 2)
    source.engine.step()
    reader.tick()
    assert len(reader.cards) == 2
    source.engine.listen(None)
    source.engine = toy_engine(tokenizer=ToyText())
    source.engine.listen(source.events)
    reader.tick()
    assert reader.cards == {} and reader.totals["requests"] == 0
    add(source, 1)
    reader.tick()
    assert reader.by_id()["r0"]["text"] == ""


def test_told_again_the_text_is_still_whole(race):
    source, reader = race
    add(source, 1, max_tokens=9)
    for _ in range(4):
        source.engine.step()
        reader.tick()
    source.tell_again()
    while source.engine.has_unfinished_requests():
        source.engine.step()
        reader.tick()
    assert reader.by_id()["r0"]["text"] == "".join(f"{t} " for t in continuation([1, 2, 3], 9))


def test_whoever_comes_late_sees_the_whole_text_and_that_it_decodes(race):
    source, _ = race
    add(source, 1, max_tokens=9)
    for _ in range(4):
        source.engine.step()
    source.events = EventLog()
    source.engine.listen(source.events)
    late = Reader(SteppedFeed(source))
    late.feed.page.ready("race", shown=4)
    late.tick()
    card = late.by_id()["r0"]
    assert card["text"] == "".join(f"{t} " for t in continuation([1, 2, 3], 4)) and card["status"] == "decode"


def test_a_snapshot_depends_on_the_state_alone(race):
    source, reader = race
    add(source, 6)
    for _ in range(3):
        source.engine.step()
        reader.tick()
    topic = reader.feed.subscriptions.topic(KEY)
    first, again = topic.snapshot(reader.feed.state).data, topic.snapshot(reader.feed.state).data
    assert first == again and first["cards"] and first["totals"]["rate"] > 0


def test_long_texts_are_cut_and_a_thousand_requests_are_no_burden(race):
    source, reader = race
    add(source, 1000, max_tokens=2)
    request = RequestState("long", 1, 10_000, 0, [1], status="running", text="x" * (KEPT_TEXT + 50),
                           spans=[Span("decode", 0)])
    request.token_ids, request.token_ns = [1], [5]
    reader.feed.tick()
    reader.feed.state.requests = {"long": request, **reader.feed.state.requests}
    reader.feed.state.unfinished = {"long": request, **reader.feed.state.unfinished}
    topic = type(reader.feed.subscriptions.topic(KEY))(reader.feed, shown=4)
    card = topic.snapshot(reader.feed.state).data["cards"][0]
    assert len(card["text"]) == KEPT_TEXT and card["cut"] == 50
    assert len(every_request(reader.feed)["requests"]) == 1001


def test_without_a_tokenizer_ids_stream(race):
    source = SteppedSource(num_blocks=64)
    source.token_text = lambda token_id: None
    reader = Reader(SteppedFeed(source))
    reader.feed.page.ready("race", shown=4)
    add(source, 1)
    while source.engine.has_unfinished_requests():
        source.engine.step()
        reader.tick()
    assert reader.by_id()["r0"]["text"].split() == [str(t) for t in continuation([1, 2, 3], 5)]


@pytest.mark.parametrize("child, prompt, expected", [
    ("3.1", [1, 2, 7, 8], "3"), ("3.1", [1, 9, 7], None), ("3.1", [1, 2], None), ("3.x", [1, 2, 7], None),
    ("4.1", [1, 2, 7], None), ("31", [1, 2, 7], None), ("3.1", None, None)])
def test_a_fork_is_known_by_its_name_and_its_prompt(child, prompt, expected):
    parent = RequestState("3", 2, 50, 0, [1, 2])
    request = RequestState(child, 4, 50, 0, prompt)
    assert parent_of(request, {"3": parent, child: request}) == expected


# ---- on the demo model ----


@pytest.fixture(scope="module")
def live():
    engine = LiveEngine(LLM("demo", use_tqdm=False, block_size=8, max_num_seqs=4), paused=True)
    yield engine
    engine.close()


@pytest.fixture
def feed(live):
    feed = Feed(live, hub=SteppedFeed().hub)
    live.resume()
    live.wait_idle()
    live.pause()
    yield feed
    live.abort()
    live.resume()
    live.wait_idle()
    feed.close()


def steps(live, feed, count):
    """Run so many steps and wait until the feed knows of them."""
    live.step(count)
    live.between_steps(lambda llm: None).result(10)  # it knows of them
    while live.state == "running":
        time.sleep(0.005)
    live.between_steps(lambda llm: None).result(10)  # the last step is over
    with feed.lock:
        feed.tick()


PARAMS = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=30)


def test_the_distribution_holds_all_logits_by_value(live, feed):
    request = live.add("Once upon a time", PARAMS)
    steps(live, feed, 3)
    answer = next_token(feed, request).result(10)()
    logits, tokens = live.between_steps(lambda llm: (llm.probe.logits(request),
                                                     list(llm.runner.last_sampled[0].token_ids))).result(10)
    data, keys, counts = answer.data, answer.arrays["keys"], answer.arrays["counts"]
    assert counts.sum() == len(logits) == data["vocab_size"] and (np.diff(keys.astype(int)) < 0).all()
    bits = np.where(keys >= 0x8000, keys - 0x8000, 0xFFFF - keys).astype(np.uint16)
    assert np.array_equal(np.repeat(bf16_to_float32(bits), counts), np.sort(logits)[::-1])
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:12]
    assert data["ids"][:12] == expected and data["chosen"] in data["ids"]
    keys_of_bits = {int(bit): int(key) for bit, key in zip(bits, keys)}
    bits_of_ids = float32_to_bf16(logits[data["ids"]])
    assert answer.arrays["top_keys"].tolist() == [keys_of_bits[int(bit)] for bit in bits_of_ids]
    assert data["position"] == len(tokens) - 1 and data["chosen"] == tokens[-1]
    assert (data["temperature"], data["top_k"], data["top_p"]) == (0.9, 40, 0.95)
    assert "Once upon a time".endswith(data["before"][:5]) or data["before"].startswith("<|begin")


def test_before_the_first_token_there_is_none(live, feed):
    request = live.add("Once upon a time", PARAMS)
    assert next_token(feed, request).result(10)().data["ids"] is None
    assert next_token(feed, "nobody").result(10)().data["ids"] is None


def finish(live, feed):
    live.resume()
    live.wait_idle()
    with feed.lock:
        feed.tick()
    live.pause()


@pytest.mark.parametrize("mode", ["fork", "force"])
def test_a_fork_goes_on_from_all_tokens_before_and_the_chosen_one(live, feed, mode):
    request = live.add("Once upon a time there was a fox who", PARAMS)
    steps(live, feed, 12)
    position = next_token(feed, request).result(10)().data["position"]
    child = fork(feed, request, position, 300, mode).result(10)["request"]
    finish(live, feed)
    parent, forked = feed.state.requests[request], feed.state.requests[child]
    tokens = parent.prompt_token_ids + parent.token_ids
    assert forked.prompt_token_ids == [*tokens[:position], 300] and child == f"{request}.1"
    assert parent_of(forked, feed.state.requests) == request
    assert forked.max_len == parent.max_len and forked.num_cached_tokens >= (position - 8) // 8 * 8 > 0
    assert parent.status == ("abort" if mode == "force" else "length") and forked.status in ("length", "stop")


def test_a_fork_with_the_token_that_was_chosen_says_the_same_again(live, feed):
    request = live.add("Once upon a time there was a fox who", PARAMS)
    steps(live, feed, 6)
    data = next_token(feed, request).result(10)().data
    finish(live, feed)
    child = fork(feed, request, data["position"], data["chosen"]).result(10)["request"]  # after its end, too
    finish(live, feed)
    parent, forked = feed.state.requests[request], feed.state.requests[child]
    assert forked.prompt_token_ids + forked.token_ids == parent.prompt_token_ids + parent.token_ids


def test_forks_of_one_moment_have_names_of_their_own(live, feed):
    request = live.add("Once upon a time", PARAMS)
    steps(live, feed, 3)
    position = next_token(feed, request).result(10)().data["position"]
    names = [fork(feed, request, position, token).result(10)["request"] for token in (300, 301, 302)]
    assert names == [f"{request}.{n}" for n in (1, 2, 3)]


def test_refusals_in_words(live, feed):
    request = live.add("Once upon a time", PARAMS)
    steps(live, feed, 2)
    with pytest.raises(RequestError, match="mode must be 'fork' or 'force', got 'both'"):
        fork(feed, request, 3, 300, "both")
    with pytest.raises(RequestError, match="there is no request 'nobody' any more"):
        fork(feed, "nobody", 3, 300)
    with pytest.raises(RequestError, match=r"chose its tokens at positions \d+ to \d+, not at 1"):
        fork(feed, request, 1, 300)
    with pytest.raises(RequestError, match="token id 99999 is out of range"):
        fork(feed, request, feed.state.requests[request].num_tokens - 1, 99999).result(10)
