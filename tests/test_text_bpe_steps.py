"""The merges, one at a time, end in exactly the ids of the library."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from tests.model_files import tiny_tokenizer
from tests.text_tokenizers import TOKENIZERS
from tinyvllm.demo.show import PROMPTS
from tinyvllm.errors import TokenizerError
from tinyvllm.loader.resolve import resolve_model
from tinyvllm.text.bpe_steps import BpeSteps, Merge
from tinyvllm.text.tokenizer import Tokenizer as ModelTokenizer

DEMO = resolve_model("demo")
WORDS = ["The fox", " found a lantern", "don't", "na\u00efve \u00e9", "e\u0301", "日本語", "😀😀", "\n\n", "\r\n \t",
         "   ", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
         "\U0001f3f3\ufe0f\u200d\U0001f308", "12345678", "<|eot_id|>",
         "<|begin_of_text|>", "<|start_header_id|>user<|end_header_id|>", "<a b>", "Ġq", "\x00\x7f\x80", "\u2028",
         "\U0010ffff", "\u0627\u064e\u0644\u0652\u0639", "aaaaaaaa", "!!!???", "x=1;", "_", "\u017f", "\u0130"]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
                  st.text("ethn fox", max_size=40))


def rewritten(change):
    """The demo model's tokenizer with its description changed."""
    description = json.loads((DEMO / "tokenizer.json").read_text())
    change(description)
    return Tokenizer.from_str(json.dumps(description))


def ignoring_merges():
    return rewritten(lambda d: d["model"].update(ignore_merges=True))


def composing():
    tokenizer = rewritten(lambda d: None)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def as_gpt2():
    """A pre-tokenizer of one step, which puts a space in front."""
    tokenizer = tiny_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_tokens([AddedToken("<a b>", lstrip=True, rstrip=True)])
    return tokenizer


LIBRARIES = {"demo": rewritten(lambda d: None), "tiny": TOKENIZERS["byte_level"](), "ignoring": ignoring_merges(),
             "composing": composing(), "as_gpt2": as_gpt2()}
STEPS = {name: BpeSteps(library) for name, library in LIBRARIES.items()}


@pytest.mark.parametrize("name", LIBRARIES)
@given(text=TEXTS)
@example(text="")
@example(text="".join(WORDS))
def test_merging_step_by_step_ends_in_the_librarys_ids(name, text):
    for special in (False, True):
        assert STEPS[name].token_ids(text, special) == LIBRARIES[name].encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_whole_prompts_too(prompt):
    text = ModelTokenizer.from_folder(DEMO).render_chat([{"role": "user", "content": str(prompt)}])
    assert STEPS["demo"].token_ids(text) == LIBRARIES["demo"].encode(text, add_special_tokens=False).ids


@given(text=st.text(max_size=60).filter(lambda text: "<|" not in text))
def test_pieces_are_the_pre_tokenizers(text):
    expected = [piece for piece, _ in LIBRARIES["demo"].pre_tokenizer.pre_tokenize_str(text)]
    pieces = STEPS["demo"].pieces(text)
    assert [piece.spelling for piece in pieces] == expected and not any(piece.added for piece in pieces)
    assert b"".join(STEPS["demo"].to_bytes(piece.spelling) for piece in pieces) == text.encode()


@given(text=TEXTS)
def test_each_step_joins_one_pair_and_the_one_of_the_lowest_rank(text):
    steps = STEPS["demo"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(json.loads(LIBRARIES["demo"].to_str())["model"]["merges"])}
    for piece in steps.pieces(text):
        if piece.added:
            continue
        assert steps.symbols(piece.spelling, 0) == list(piece.spelling)
        merges = steps.merges(piece.spelling)
        for count, merge in enumerate(merges):
            before, after = steps.symbols(piece.spelling, count), steps.symbols(piece.spelling, count + 1)
            assert len(after) == len(before) - 1 and "".join(after) == piece.spelling
            assert (merge.left, merge.right) == tuple(before[merge.position:merge.position + 2])
            possible = [ranks[pair] for pair in itertools.pairwise(before) if pair in ranks]
            assert ranks[merge.left, merge.right] == merge.rank == min(possible)
        assert not any(pair in ranks for pair in itertools.pairwise(steps.symbols(piece.spelling)))


def test_a_word_by_hand():
    # "Ġf" is learnt 17th, "Ġfo" and "Ġfox" later.
    assert STEPS["demo"].merges("Ġfox") == [Merge(0, "Ġ", "f", 16), Merge(0, "Ġf", "o", 412),
                                               Merge(0, "Ġfo", "x", 1209)]
    assert STEPS["demo"].symbols("Ġfox", 1) == ["Ġf", "o", "x"] and STEPS["demo"].num_merges == 1784


def test_added_tokens_and_the_beginning_of_the_text_are_pieces_of_their_own():
    pieces = STEPS["demo"].pieces("a<|eot_id|>", add_special_tokens=True)
    assert [(piece.spelling, piece.added) for piece in pieces] == [("<|begin_of_text|>", True), ("a", False),
                                                                   ("<|eot_id|>", True)]


def test_a_piece_that_is_a_token_as_a_whole_needs_no_merges_where_they_are_ignored():
    steps = STEPS["ignoring"]
    assert steps.is_taken_whole("Ġfox") and steps.merges("Ġfox") == [] and steps.symbols("Ġfox", 0) == ["Ġfox"]
    assert not steps.is_taken_whole("Ġfoxglove") and steps.merges("Ġfoxglove")
    assert not STEPS["demo"].is_taken_whole("Ġfox")


def test_merges_may_be_written_in_the_older_way():
    old = rewritten(lambda d: d["model"].update(merges=[" ".join(pair) for pair in d["model"]["merges"]]))
    assert BpeSteps(old).merges("Ġlantern") == STEPS["demo"].merges("Ġlantern")


@pytest.mark.parametrize("make, reason", [
    (TOKENIZERS["sentencepiece"], "its pre-tokenizer is none, with no ByteLevel"),
    (TOKENIZERS["metaspace"], "its pre-tokenizer is Metaspace, with no ByteLevel"),
    (lambda: rewritten(lambda d: d["model"].update(dropout=0.1)), r"leaves merges out at random \(dropout 0.1\)"),
    (lambda: rewritten(lambda d: d["model"].update(continuing_subword_prefix="##", merges=[])),
     "insides or the ends of words"),
    (lambda: rewritten(lambda d: d.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})),
     "its model is WordLevel"),
    (lambda: rewritten(lambda d: d["model"].update(vocab={k: v for k, v in d["model"]["vocab"].items() if k != "ÿ"})),
     "no token for 1 of the 256 bytes"),
])
def test_other_kinds_are_refused_with_the_reason(make, reason):
    with pytest.raises(TokenizerError, match=f"cannot be shown step by step: .*{reason}"):
        BpeSteps(make(), "folder/tokenizer.json")
