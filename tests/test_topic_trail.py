"""Topic "trail" and TokenTrail's answers, without a page: the tokens are the tokenizer's, the slots the engine's."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.feed_stand_ins import SteppedFeed, SteppedSource
from tests.text_tokenizers import TOKENIZERS
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.errors import RequestError, TokenizerError
from tinyvllm.text.tokenizer import Tokenizer
from widgets.answers.trail import embedding_row, encode, merges
from widgets.feed import Feed
from widgets.vocabulary import describe_tokens


@pytest.fixture(scope="module")
def live():
    engine = LiveEngine(LLM("demo", use_tqdm=False))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def feed(live):
    feed = Feed(live, hub=SteppedFeed().hub)
    yield feed
    feed.close()


# ---- a text ----


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40), chat=st.booleans())
def test_tokens_and_pieces_are_the_tokenizers(feed, text, chat):
    tokenizer = feed.source.llm.tokenizer
    answer = encode(feed, text, chat)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat \
        else tokenizer.encode_prompt(text) if text else []
    assert [token[0] for token in answer["tokens"]] == expected and answer["count"] == len(expected)
    data = b""
    for token_id, shown, split, is_special, piece in answer["tokens"]:
        data += tokenizer.id_to_bytes(token_id)
        assert is_special == (token_id in tokenizer.special_ids)
        assert (bytes.fromhex(split) if split else shown.encode()) == tokenizer.id_to_bytes(token_id)
        assert bool(split) == ("\ufffd" in shown and tokenizer.id_to_bytes(token_id) != shown.encode())
        assert 0 <= piece < len(answer["pieces"])
    assert data.endswith(answer["rendered"].encode())


def test_split_characters_are_given_as_bytes(feed):
    tokens = encode(feed, "é😀")["tokens"]
    assert bytes.fromhex("".join(token[2] for token in tokens[1:])) == "é😀".encode() and tokens[1][1] == "\ufffd"


def test_many_tokens_are_counted_and_too_long_a_text_is_refused(feed):
    answer = encode(feed, "7 " * 3000)
    assert len(answer["tokens"]) == 1000 and answer["count"] > 3000
    with pytest.raises(RequestError, match="the text has 20,001 characters; up to 20,000"):
        encode(feed, "x" * 20_001)
    with pytest.raises(RequestError, match="lone surrogate"):
        encode(feed, "\ud800")


def test_merges_end_in_the_ids_of_the_piece(feed):
    answer = encode(feed, "The lantern! 😀 antidisestablishmentarianism")
    for number, (spelling, is_added) in enumerate(answer["pieces"]):
        if not is_added:
            ids = [token[0] for token in answer["tokens"] if token[4] == number]
            told = merges(feed, spelling)
            assert told["ids"] == ids and len(told["symbols"]) - len(told["merges"]) == len(ids)
            assert all(symbol in told["spelt"] for symbol in told["symbols"])


def test_a_token_by_itself_is_merged_from_its_bytes(feed):
    tokenizer = feed.source.llm.tokenizer
    for token_id in (0, 401, 1465, 2007):
        told = merges(feed, token_id=token_id)
        assert told["ids"] == [token_id] and len(told["merges"]) == len(tokenizer.id_to_bytes(token_id)) - 1
    assert merges(feed, token_id=tokenizer.bos_token_id)["symbols"] == []
    with pytest.raises(RequestError, match="this piece has 301 bytes; merges are shown for up to 300"):
        merges(feed, "a" * 301)


class Holder:
    """A feed's source that has an LLM with a tokenizer, or none."""

    def __init__(self, tokenizer):
        self.llm = type("L", (), {"tokenizer": tokenizer})()

    def token_text(self, token_id):
        return None


def test_other_tokenizers_give_tokens_without_merges():
    holder = type("F", (), {"source": Holder(Tokenizer(TOKENIZERS["sentencepiece"]()))})()
    answer = encode(holder, "the fox é")
    assert [token[0] for token in answer["tokens"]] == holder.source.llm.tokenizer.encode_prompt("the fox é")
    assert "cannot be shown step by step" in answer["refusal"] and answer["tokens"][1][4] is None
    with pytest.raises(TokenizerError, match="byte-level BPE, the kind that GPT-2 and Llama 3 have"):
        merges(holder, "the")


def test_without_a_tokenizer_it_says_so():
    for feed in (type("F", (), {"source": Holder(None)})(), SteppedFeed(SteppedSource()), SteppedFeed()):
        with pytest.raises(TokenizerError, match="there is no tokenizer behind this panel"):
            encode(feed, "the fox")
    assert describe_tokens(SteppedFeed(SteppedSource()), [3, 3]) == [["<3>", "", False]] * 2


def test_a_token_that_is_not_in_the_vocabulary_is_shown_as_unknown(feed):
    assert describe_tokens(feed, [2047, 5_000_000]) == [["<|python_tag|>", "", True], [None, "", False]]


def test_the_embedding_row_is_the_files(feed):
    path = feed.source.llm.model_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:8 + size])["model.embed_tokens.weight"]
    start, end = entry["data_offsets"]
    table = np.frombuffer(data[8 + size + start:8 + size + end], np.uint16).reshape(entry["shape"])
    for token_id in (0, 1465, 2047):
        answer = embedding_row(feed, token_id).result(10)
        assert np.array_equal(answer.arrays["bits"], table[token_id, :8])
        assert (answer.data["rows"], answer.data["columns"]) == table.shape


# ---- a request ----


def test_deltas_add_up_to_the_request():
    source = SteppedSource(num_blocks=64, block_size=4, max_num_batched_tokens=1)
    feed = SteppedFeed(source)
    feed.page.ready("trail")
    feed.tick()
    assert feed.page.part("trail")[1].data["request"] is None
    source.engine.add_request([1, 2, 3, 4, 5], SamplingParams(temperature=0, max_tokens=9), "a")
    feed.page.selection = {**feed.page.selection, "request": "a"}
    ids, blocks, sizes, computed = [], [], [], None
    while True:
        before = len(feed.page.frames)
        feed.tick()
        if len(feed.page.frames) > before and "trail" in feed.page.frames[-1]["topics"]:
            feed.page.say({"op": "ack", "n": feed.page.frames[-1]["n"], "drawn": 0})
            payload = feed.page.part("trail")[1]
            ids = [] if payload.data["begins"] else ids
            ids += payload.arrays["ids"].tolist()
            sizes.append(len(payload.arrays["ids"]))
            blocks = payload.arrays["blocks"].tolist() if "blocks" in payload.arrays else blocks
            request = feed.state.requests["a"]
            assert ids == request.prompt_token_ids + request.token_ids and blocks == request.block_ids
            computed = payload.data["computed"]
            assert payload.data["block_size"] == 4
            assert len(payload.data["tokens"]) == len(payload.arrays["ids"])
        assert computed == feed.state.requests["a"].num_computed_tokens
        if not source.engine.has_unfinished_requests():
            break
        source.engine.step()
    assert sizes[0] == 5 and sum(sizes) == 14 and max(sizes[1:]) == 1  # the prompt once, then one at a time
    feed.page.selection = {**feed.page.selection, "request": "nobody"}
    feed.tick()
    assert feed.page.part("trail")[1].data["request"] is None


def test_a_recording_without_the_prompts_ids_says_so():
    feed = SteppedFeed(SteppedSource())
    feed.page.ready("trail")
    feed.source.events.emit("request_added", "a", 7, 20)
    feed.page.selection = {**feed.page.selection, "request": "a"}
    feed.tick()
    data = feed.page.part("trail")[1].data
    assert (data["prompt"], data["is_prompt_recorded"], data["tokens"]) == (7, False, [])
