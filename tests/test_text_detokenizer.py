"""IncrementalDetokenizer: the stream equals the final text, however it is cut, and shows nothing that is "
"taken back."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text_tokenizers import TOKENIZERS
from tinyvllm.errors import RequestError, TokenizerError
from tinyvllm.text.detokenizer import IncrementalDetokenizer
from tinyvllm.text.token_bytes import TokenBytes
from tinyvllm.text.tokenizer import Tokenizer

LLAMA3 = Tokenizer(TOKENIZERS["byte_level"](), {"bos_token": "<|begin_of_text|>"})
IDS = st.lists(st.integers(0, LLAMA3.vocab_size + 3), max_size=40)
CUTS = st.lists(st.integers(1, 4), min_size=40, max_size=40)


def stream(tokenizer, ids, cuts=None, stop=(), **options):
    """Push `ids` in groups of the sizes `cuts`; returns (the pieces, the detokenizer)."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop, **options)
    pieces, position, cuts = [], 0, iter(cuts or [])
    while position < len(ids) and detokenizer.stop_reason is None:
        size = next(cuts, 1)
        pieces.append(detokenizer.push(ids[position : position + size]))
        position += size
    pieces.append(detokenizer.finish())
    return pieces, detokenizer


def first_stop(text, stop, include):
    """The definition, character by character: (text up to the stop string that is complete first, that "
    "string)."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


# ---- the stream equals the final text ----


@settings(max_examples=300, deadline=None)
@given(IDS, CUTS, st.booleans())
def test_any_ids_stream_to_what_decode_says(ids, cuts, skip):
    pieces, detokenizer = stream(LLAMA3, ids, cuts, skip_special_tokens=skip)
    assert "".join(pieces) == detokenizer.text == LLAMA3.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("athefox #.é😀€\n"), max_size=25), CUTS)
def test_texts_stream_to_themselves_with_every_kind_of_tokenizer(kind, text, cuts):
    tokenizer = Tokenizer(TOKENIZERS[kind]())
    ids = tokenizer.encode(text)
    pieces, detokenizer = stream(tokenizer, ids, cuts)
    assert "".join(pieces) == detokenizer.text == tokenizer.decode(ids)
    if not kind.startswith("metaspace"):  # whose decoder takes away every leading space
        assert detokenizer.text == text


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_stream_alike_however_they_are_cut(kind, data):
    tokenizer = Tokenizer(TOKENIZERS[kind]())
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=30))
    stop = data.draw(st.lists(st.sampled_from(["the", " ", "##", "fo", "\ufffd", "e#"]), max_size=2))
    one_by_one, first = stream(tokenizer, ids, stop=stop)
    together, second = stream(tokenizer, ids, [len(ids) or 1], stop=stop)
    assert "".join(one_by_one) == "".join(together) == first.text == second.text
    assert first.stop_reason == second.stop_reason


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("ab#😀é\n"), max_size=30),
    st.lists(st.text(st.sampled_from("ab#😀é"), min_size=1, max_size=4), max_size=4),
    CUTS,
    st.booleans(),
)
def test_stop_strings_cut_the_text_where_their_definition_says(text, stop, cuts, include):
    ids = LLAMA3.encode(text, add_special_tokens=False)
    pieces, detokenizer = stream(LLAMA3, ids, cuts, stop, include_stop_str_in_output=include)
    expected, reason = first_stop(text, stop, include)
    assert ("".join(pieces), detokenizer.text, detokenizer.stop_reason) == (expected, expected, reason)


# ---- examples ----


def test_an_emoji_comes_out_when_its_last_byte_is_there():
    ids = LLAMA3.encode("a😀b", add_special_tokens=False)
    assert [LLAMA3.id_to_bytes(i) for i in ids] == [b"a", b"\xf0", b"\x9f", b"\x98", b"\x80", b"b"]
    assert stream(LLAMA3, ids)[0] == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end():
    ids = LLAMA3.encode("a😀", add_special_tokens=False)[:-1]
    assert stream(LLAMA3, ids)[0] == ["a", "", "", "", "\ufffd"]


def test_bytes_that_never_make_a_character_do_not_hold_up_the_rest():
    bad = LLAMA3.token_to_id("\u00f0")  # 0xF0 begins four bytes, and what follows is text
    assert stream(LLAMA3, [bad, bad, *LLAMA3.encode("x", add_special_tokens=False)])[0] == [
        "", "\ufffd", "\ufffdx", ""]  # fmt: skip


def test_a_stop_string_over_several_tokens_is_held_back_and_dropped():
    ids = [LLAMA3.token_to_id(character) for character in ("Y", "#", "#", "N", "#", "#", "#", "Z")]
    pieces, detokenizer = stream(LLAMA3, ids, stop=["###"])
    assert pieces == ["Y", "", "", "##N", "", "", "", ""]
    assert (detokenizer.text, detokenizer.stop_reason) == ("Y##N", "###")


def test_a_possible_stop_string_that_never_completes_comes_at_the_end():
    pieces, detokenizer = stream(LLAMA3, LLAMA3.encode("a#", add_special_tokens=False), stop=["##"])
    assert pieces == ["a", "", "#"] and detokenizer.stop_reason is None


def test_nothing_comes_after_a_stop_string():
    detokenizer = LLAMA3.incremental_detokenizer("b")
    ids = LLAMA3.encode("abc", add_special_tokens=False)
    assert detokenizer.push(ids) == "a" and detokenizer.stop_reason == "b"
    assert detokenizer.push(ids) == "" and detokenizer.finish() == "" and detokenizer.text == "a"


@pytest.mark.parametrize("include, text", [(False, "a"), (True, "abb")])
def test_the_stop_string_is_kept_on_request(include, text):
    ids = LLAMA3.encode("abbc", add_special_tokens=False)
    assert stream(LLAMA3, ids, stop=["bb"], include_stop_str_in_output=include)[1].text == text


def test_of_two_stop_strings_the_one_complete_first_counts():
    ids = LLAMA3.encode("xabcd", add_special_tokens=False)
    for cuts in ([1] * 5, [5]):
        assert stream(LLAMA3, ids, cuts, stop=["abcd", "bc"])[1].stop_reason == "bc"
        assert stream(LLAMA3, ids, cuts, stop=["bc", "abc"])[1].text == "x"  # both end at c: the longer one


def test_special_tokens_are_text_only_on_request():
    ids = [*LLAMA3.encode("a"), LLAMA3.token_to_id("<|eot_id|>")]
    assert stream(LLAMA3, ids)[1].text == "a"
    assert stream(LLAMA3, ids, skip_special_tokens=False)[1].text == "<|begin_of_text|>a<|eot_id|>"
    # A special token inside a character is skipped, and the character is whole.
    emoji = LLAMA3.encode("😀", add_special_tokens=False)
    assert stream(LLAMA3, [*emoji[:2], *ids[-1:], *emoji[2:]])[1].text == "😀"


def test_a_stop_string_can_be_a_special_token_if_those_are_shown():
    ids = [*LLAMA3.encode("a", add_special_tokens=False), LLAMA3.token_to_id("<|eot_id|>")]
    assert stream(LLAMA3, ids, stop=["<|eot_id|>"], skip_special_tokens=False)[1].stop_reason == "<|eot_id|>"
    assert stream(LLAMA3, ids, stop=["<|eot_id|>"])[1].stop_reason is None


def test_a_continued_text_keeps_its_first_space():
    tokenizer = Tokenizer(TOKENIZERS["sentencepiece"]())
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    assert stream(tokenizer, ids)[1].text == "the fox"
    # The first token is the first that adds text: neither a special one nor an id without a token.
    late = [1, tokenizer.vocab_size + 7, *ids]
    assert stream(tokenizer, late)[1].text == tokenizer.decode(late) == "the fox"
    assert stream(tokenizer, ids, prompt_token_ids=[1, 2])[1].text == " the fox"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3]])
def test_a_stop_string_must_be_text(stop):
    with pytest.raises(RequestError, match="stop must be a non-empty string or a list of them"):
        if stop == "":
            stop = [stop]
        LLAMA3.incremental_detokenizer(stop)


def test_cost_is_linear_in_the_tokens_even_if_no_character_ever_completes():
    """Four times the tokens take about four times as long; a window that only grows would take sixteen."""

    def seconds(count):
        detokenizer = LLAMA3.incremental_detokenizer(["\ufffd" * 8 + "!"])
        bad = [LLAMA3.token_to_id("\u00f0")]
        start = time.process_time()
        for _ in range(count):
            detokenizer.push(bad)
        return time.process_time() - start

    seconds(100)
    small = min(seconds(5_000) for _ in range(3))
    large = min(seconds(20_000) for _ in range(3))
    assert large < 9 * small


def test_no_state_grows_with_the_text_but_the_text():
    detokenizer = LLAMA3.incremental_detokenizer(["zzzz"])
    for i in LLAMA3.encode("the fox " * 200, add_special_tokens=False):
        detokenizer.push([i])
        assert len(detokenizer._held) <= 3


# ---- token bytes ----


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_bytes_agree_with_the_library_token_by_token(kind):
    tokenizer = TOKENIZERS[kind]()
    token_bytes = TokenBytes(tokenizer)
    before = tokenizer.token_to_id("a")  # a token in front, so that no leading space is dropped
    for i in range(tokenizer.get_vocab_size()):
        expected = tokenizer.decode([before, i], skip_special_tokens=False).removeprefix("a")
        assert token_bytes(i).decode("utf-8", "replace") == expected
        alone = tokenizer.decode([i], skip_special_tokens=False)
        assert token_bytes(i, first=True).decode("utf-8", "replace") == alone


def test_every_byte_has_a_token_in_a_byte_level_vocabulary():
    single = {LLAMA3.id_to_bytes(i) for i in range(LLAMA3.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert LLAMA3.id_to_bytes(LLAMA3.vocab_size + 5) == b""


def test_a_decoder_of_another_kind_is_refused_by_name():
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    tokenizer = Library(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(
        TokenizerError, match=r"has the decoder none, which is not supported \(supported: ByteLevel"
    ):
        TokenBytes(tokenizer)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="has the decoder WordPiece"):
        TokenBytes(tokenizer)
