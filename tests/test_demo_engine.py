"""The embedded model through tinyvllm's own engine: it keeps its promises, and says what transformers says."""

import numpy as np
import pytest

from tests.golden.make_golden import golden_demo_chats
from tests.teacher_forcing import sequence_logits
from tinyvllm import LLM, SamplingParams
from tinyvllm.demo import exam
from tinyvllm.loader.resolve import demo_model_folder

GREEDY = SamplingParams(temperature=0, max_tokens=600)


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", device="cpu", use_tqdm=False)


def answer(llm, exams):
    outputs = llm.chat([e.messages for e in exams], GREEDY)
    return [exam.mark(e, o.outputs[0].text, o.outputs[0].finish_reason == "stop") for e, o in zip(exams, outputs)]


@pytest.mark.parametrize("make, promise", [(exam.grammar_pairs, 95), (exam.outside_words, 80)])
def test_held_out_chats_take_up_what_was_asked_for_and_end(llm, make, promise):
    """Other chats than those of scores.json (another seed)."""
    marks = answer(llm, make(100, seed=2026))
    assert sum(m["taken_up"] for m in marks) >= promise
    assert all(m["ended"] for m in marks)
    assert sum(m["collapsed"] for m in marks) <= 1


def test_stories_end_with_eot(llm):
    output, = llm.chat([{"role": "user", "content": "Tell me a story about a fox and a lantern."}], GREEDY)
    eot = llm.tokenizer.token_to_id("<|eot_id|>")
    assert output.outputs[0].token_ids[-1] == eot and eot in llm.model_config.eos_token_ids


def differing_choices(llm, chat: dict) -> tuple[np.ndarray, np.ndarray]:
    """Gaps between the oracle's two best logits at the tokens where ours differ, and what two ulp are there.

    Teacher-forced on the oracle's tokens, so that one tie does not hide what comes after it.
    """
    prompt, tokens = chat["prompt"].tolist(), chat["tokens"]
    ours = sequence_logits(llm, prompt + tokens.tolist()[:-1], [1024], last_rows=len(tokens))
    differs = ours.argmax(axis=1) != chat["choices"]
    return chat["gaps"][differs], 2 * 2.0**-8 * chat["best"][differs]


@pytest.fixture(scope="module")
def wide_llm():
    """One logits row a position, for teacher forcing."""
    return LLM("demo", device="cpu", use_tqdm=False, max_num_seqs=1024, max_num_batched_tokens=1024)


def test_greedy_choices_are_those_of_transformers(wide_llm):
    """Golden file: over twelve whole stories, ours differ only where the oracle's two best logits are all but tied.

    The model chooses among hundreds of equally good heroes, names and places, so such ties do occur.
    """
    chats = golden_demo_chats()
    gaps, two_ulp = map(np.concatenate, zip(*(differing_choices(wide_llm, chat) for chat in chats)))
    total = sum(len(chat["tokens"]) for chat in chats)
    assert total > 2000 and (gaps <= two_ulp).all()
    assert len(gaps) <= 0.01 * total, f"{len(gaps)} of {total} tokens differ"


def test_whole_stories_agree_as_often_as_transformers_agrees_with_itself(llm):
    """In bfloat16 a tie ends the likeness of two stories. Its own two attention implementations are the yardstick."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf_oracle import greedy_stories

    prompts = [llm.chat_token_ids(e.messages) for e in [*exam.grammar_pairs(6, seed=5), *exam.outside_words(6, seed=6)]]
    sdpa, eager = (greedy_stories(demo_model_folder(), prompts, attention) for attention in ("sdpa", "eager"))
    ours = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    their_likeness = sum(a == b for a, b in zip(sdpa, eager))
    our_likeness = max(sum(a == b for a, b in zip(ours, theirs)) for theirs in (sdpa, eager))
    assert our_likeness >= their_likeness - 1
