"""What BitLens asks of an engine: any live value by its address, a weight changed, a prompt run again, all put back."""

from fractions import Fraction

import numpy as np
import pytest

from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.errors import TinyVLLMError
from tinyvllm.kernels.bf16 import float32_to_bf16
from tinyvllm.loader.checkpoint import Checkpoint
from widgets import BitLens, Feed
from widgets.answers import ANSWERS
from widgets.answers.inspect import check_address, words

Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
FOX = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def live():
    with LiveEngine(LLM("demo", use_tqdm=False)) as engine:
        yield engine


@pytest.fixture
def feed(live):
    feed = Feed.of(live)
    yield feed
    live.between_steps(lambda llm: llm.probe.restore()).result(10)


def ask(feed, what, **args):
    answer = ANSWERS[what](feed, **args)
    return answer.result(20) if hasattr(answer, "result") else answer


def probe(live, function):
    return live.between_steps(lambda llm: function(llm.probe)).result(20)


def test_a_weight_is_the_file_s_own_bits(live, feed):

    bits = Checkpoint(live.llm.model_path).array(Q_PROJ)
    told = ask(feed, "inspect", kind="weight", name=Q_PROJ, row=12, column=40)
    assert told["bits"] == bits[12, 40] and told["format"] == "bf16"
    assert told["words"] == "layers.3.self_attn.q_proj.weight [12, 40]"
    assert told["editable"] and told["loaded"] is None and told["source"] == "model"
    norm = ask(feed, "inspect", kind="weight", name="model.norm.weight", row=7, column=None)
    assert norm["bits"] == Checkpoint(live.llm.model_path).array("model.norm.weight")[7]
    assert norm["words"] == "norm.weight [7]"


def test_every_other_kind_is_what_the_probe_says(live, feed):
    probe(live, lambda p: p.watch("seen"))
    live.add({"prompt_token_ids": live.llm.chat_token_ids([{"role": "user", "content": "Hello, owl!"}])},
             SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), "seen")
    live.wait_idle()
    position = probe(live, lambda p: p.kept)[-1]
    token = 17
    expected = probe(live, lambda p: {
        "query": int(p.attention_cell(2, 1, position, 0)["q_bits"][5]),
        "hidden": float32_to_bf16(p.hidden(position))[3, 9],
        "logit": float32_to_bf16(p.logits("seen"))[token],
        "key": int(p.kv(4, 0)[0][1, 2, 3]), "value": int(p.kv(4, 0)[1][1, 2, 3])})
    where = {"layer": 4, "block": 0, "head": 1, "offset": 2, "dim": 3}
    got = {
        "query": ask(feed, "inspect", kind="query", layer=2, head=1, position=position, dim=5),
        "hidden": ask(feed, "inspect", kind="hidden", layer=3, position=position, index=9),
        "logit": ask(feed, "inspect", kind="logit", request="seen", token=token),
        "key": ask(feed, "inspect", kind="kv", part="key", **where),
        "value": ask(feed, "inspect", kind="kv", part="value", **where)}
    assert {key: told["bits"] for key, told in got.items()} == expected
    assert not any(told["editable"] for told in got.values())
    assert len(set(expected.values())) > 3  # they are not all zero


@pytest.mark.parametrize("address, said", [
    ({"kind": "colour"}, "kind out of weight, kv"), ({}, "kind out of"),
    ({"kind": "weight", "name": "x"}, "row is missing"),
    ({"kind": "logit", "request": "0"}, "token is missing"),
    ({"kind": "weight", "name": "x", "row": 1, "head": 3}, "has no 'head'"),
    ({"kind": "kv", "part": "q", "layer": 0, "block": 0, "head": 0, "offset": 0, "dim": 0}, "'key' or 'value'"),
])
def test_an_address_that_says_too_little_or_too_much_is_refused(address, said):
    with pytest.raises(TinyVLLMError, match=said):
        check_address(address)


def test_addresses_that_lead_nowhere_are_refused_and_the_engine_goes_on(live, feed):
    for address in ({"kind": "weight", "name": "no.such", "row": 0, "column": 0},
                    {"kind": "weight", "name": Q_PROJ, "row": 10**6, "column": 0},
                    {"kind": "weight", "name": Q_PROJ, "row": 0, "column": None},
                    {"kind": "weight", "name": Q_PROJ, "row": "first", "column": 0},
                    {"kind": "kv", "part": "key", "layer": 0, "block": 0, "head": 99, "offset": 0, "dim": 0},
                    {"kind": "hidden", "layer": 0, "position": 2000, "index": 0},
                    {"kind": "logit", "request": "nobody", "token": 0}):
        with pytest.raises(TinyVLLMError):
            ask(feed, "inspect", **address)
    assert live.error is None and live.state == "idle"


def test_what_the_file_holds_is_enough_without_an_engine():
    told = ask(Feed(None), "inspect", kind="weight", name=Q_PROJ, row=1, column=2, format="bf16", bits=0x3F80,
               file="model.safetensors", offset=100)
    assert (told["bits"], told["source"], told["editable"]) == (0x3F80, "file", False)
    assert "no engine" in told["note"]
    assert told["words"] == words({"kind": "weight", "name": Q_PROJ, "row": 1, "column": 2})
    with pytest.raises(TinyVLLMError, match="no engine"):
        ask(Feed(None), "inspect", kind="weight", name=Q_PROJ, row=1, column=2)


def test_a_weight_is_changed_and_put_back_bit_by_bit(live, feed):
    before = probe(live, lambda p: p.weight(Q_PROJ))
    old = int(before[12, 40])
    told = ask(feed, "set_weight", name=Q_PROJ, row=12, column=40, bits=old ^ 0x8000)
    assert (told["old"], told["bits"], told["patches"]) == (old, old ^ 0x8000, 1)
    seen = ask(feed, "inspect", kind="weight", name=Q_PROJ, row=12, column=40)
    assert (seen["bits"], seen["loaded"], seen["patches"]) == (old ^ 0x8000, old, 1)
    assert ask(feed, "restore_weights") == {"restored": 1}
    assert np.array_equal(probe(live, lambda p: p.weight(Q_PROJ)), before)
    assert ask(feed, "inspect", kind="weight", name=Q_PROJ, row=12, column=40)["loaded"] is None


def test_generating_again_shows_the_change_and_restoring_ends_it(live, feed):
    before = ask(feed, "generate_again", prompt=FOX, max_tokens=40)
    live_text = live.llm.tokenizer.decode(live.llm.chat_token_ids([{"role": "user", "content": FOX}]))
    assert before["prompt"] == FOX and before["patches"] == 0 and FOX in live_text and before["text"]
    for row in range(4):
        ask(feed, "set_weight", name="model.norm.weight", row=row, column=None, bits=0x4600)
    after = ask(feed, "generate_again", prompt=FOX, max_tokens=40)
    assert after["text"] != before["text"] and after["patches"] == 4
    ask(feed, "restore_weights")
    again = ask(feed, "generate_again", prompt=FOX, max_tokens=40)
    assert again["text"] == before["text"] and again["patches"] == 0


def test_no_prompt_means_the_newest_once_more(live, feed):
    live.add("Once upon a time", SamplingParams(temperature=0, max_tokens=30), "newest")
    live.wait_idle()
    feed.tick()  # the feed's state has heard of it
    expected, = [r for r in feed.state.requests.values() if r.request_id == "newest"]
    told = ask(feed, "generate_again", max_tokens=30)
    assert told["text"] == expected.text and "Once upon a time" in told["prompt"]


def test_generating_is_refused_in_words_where_it_cannot_be(live):
    with pytest.raises(TinyVLLMError, match="no engine behind"):
        ask(Feed(None), "generate_again", prompt="x")
    fresh = LiveEngine(live.llm)
    try:
        with pytest.raises(TinyVLLMError, match="nothing has run yet"):
            ask(Feed.of(fresh), "generate_again")
    finally:
        fresh._feed.close()
        fresh.close()
        live.llm.engine.listen(live.events)


def test_the_lens_of_a_notebook():
    lens = BitLens()
    assert (lens.value, lens.bits, lens.format) == ("0.1", 0x3DCD, "bf16")
    lens.format = "fp16"
    assert lens.bits == 0x2E66 and lens.value == "0.1"
    lens.bits = 0x3C01
    assert lens.value == "1.0009765625" and lens.real.fraction == Fraction(1025, 1024)
    lens.value = np.float32(0.1)
    assert lens.value == "0.100000001490116119384765625"
    lens.value = Fraction(1, 3)
    assert lens.value == "1/3" and lens.summary == "BitLens: 1/3 in float16 is 0 01101 0101010101 = 0.333251953125"
    assert BitLens(value=1e300).bits == 0x7F80 and BitLens(bits=np.uint16(0x7FC1)).value == "nan"
    assert BitLens(value=-0.0).bits == 0x8000 and BitLens(value=np.float32("-inf")).bits == 0xFF80
    assert BitLens(format="e4m3").formats == ["bf16", "fp16", "fp32", "e4m3"]


@pytest.mark.parametrize("options, said", [
    ({"value": "seven"}, "not a number"), ({"value": [1]}, "got list"), ({"bits": 65536}, "0 to 65535"),
    ({"bits": -1}, "0 to 65535"), ({"format": "bf15"}, "one of bf16"), ({"value": 1, "bits": 1}, "not both"),
    ({"value": True}, "got bool"),
])
def test_a_lens_refuses_what_it_cannot_show(options, said):
    with pytest.raises(TinyVLLMError, match=said):
        BitLens(**options)


def test_feed_inspect_opens_the_lens_and_checks_the_address():
    feed = Feed(None)
    feed.inspect("weight", name="model.norm.weight", row=3)
    first = feed.hub.inspected
    assert first["row"] == 3 and first["column"] is None and first["n"] > 0
    with pytest.raises(TinyVLLMError, match="needs request, token"):
        feed.inspect("logit", request="0")
    assert feed.hub.inspected == first
    assert BitLens(feed, value=2).shown["seen"] == first["n"]  # a lens with a number of its own keeps it
