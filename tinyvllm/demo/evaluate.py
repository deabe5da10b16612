"""Measure a demo model: `python -m tinyvllm.demo.evaluate --model model --out model/scores.json`.

Every figure is from chats, words and seeds that training never saw (exam.py), decoded greedily with
transformers in bfloat16 on a GPU or float32 on a CPU. On a CPU use fewer chats: --chats 24.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from tqdm.auto import tqdm

from tinyvllm.demo.extras import MissingExtraError, require

try:
    torch = require("torch", "transformers")
except MissingExtraError as error:
    if __name__ == "__main__":
        sys.exit(str(error))
    raise

from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402

from tinyvllm.demo import exam as ex  # noqa: E402
from tinyvllm.demo.probes import perplexity, random_token_scores, story_scores  # noqa: E402
from tinyvllm.demo.tokenizer_recipe import EOT  # noqa: E402

SAMPLES = [
    "Tell me a story about a fox who finds a lantern.",
    "Tell me a story about a robot named Zed and a lost key.",
    "Tell me a story about an astronaut who finds a guitar.",
    "Tell me a bedtime story about a dragon who is afraid of the dark.",
    "Write a short fable about a dentist and a skateboard.", "Tell me a story about Siobhan and a telephone.",
    "tell me a story about my cat Wojciech", "Tell me a story about courage.",
    "Can you tell me a story about a penguin and an umbrella?",
    "Tell me a story about a dinosaur named Blorp who finds a pizza.", "A mouse, a piano",
    "Tell me a story about friendship, with a bear and a bee.",
    "Tell me a story about a witch who finds a map in Paris.", "Tell me a story.",
    "Tell me a story about an old submarine.",
    "Tell me a story about a ballerina and a balloon.",
    "Write a tale about a small toaster that wants a friend.",
    "Tell me a story about a vampire who finds a bicycle under the bridge.",
    "Tell me a story about Captain Zoom and the golden banana.",
    "Hello!", "What is the capital of France?", "Repeat after me: the astronaut played the guitar on Mars",
    "What is the opposite of hot?",
    "Who are you?", "Write a poem about the sea.",
]  # fmt: skip


class Answerer:
    """Greedy answers of a model folder, in batches with left padding."""

    def __init__(self, folder: Path, device: str, batch: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = (
            LlamaForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager")
            .to(device)
            .eval()
        )
        self.fast = LlamaForCausalLM.from_pretrained(folder, dtype=kind).to(device).eval()
        self.batch, self.eot = batch, self.tokenizer.convert_tokens_to_ids(EOT)

    @torch.no_grad()
    def answers(self, chats: list[list[dict]], limit: int = 600, title: str = "") -> list[tuple[str, bool]]:
        """[(text, whether it ended with <|eot_id|>)] for chats of messages."""
        prompts = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats
        ]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list = [None] * len(prompts)
        for start in tqdm(range(0, len(order), self.batch), desc=title):
            chosen = order[start : start + self.batch]
            inputs = self.tokenizer(
                [prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
            )
            inputs = inputs.to(self.fast.device)
            ids = self.fast.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False,
                eos_token_id=self.eot,
                max_new_tokens=min(limit, 2048 - inputs.input_ids.shape[1]),
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            for i, row in zip(chosen, ids[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
                out[i] = (self.tokenizer.decode(row, skip_special_tokens=True), self.eot in row)
        return out


def percent(marks: list[bool]) -> float:
    return round(100 * sum(marks) / len(marks), 1)


def story_section(answerer: Answerer, exams: list[ex.Exam], title: str) -> tuple[dict, list[dict]]:
    """Marks of story requests, and the failures to look at."""
    answers = answerer.answers([e.messages for e in exams], title=title)
    marks = [ex.mark(e, text, ended) for e, (text, ended) in zip(exams, answers, strict=True)]
    by_kind = defaultdict(list)
    for e, m in zip(exams, marks, strict=True):
        by_kind[e.kind].append(m["taken_up"])
    section = {
        "chats": len(exams),
        "taken_up_percent": percent([m["taken_up"] for m in marks]),
        "taken_up_percent_by_kind": {kind: percent(values) for kind, values in by_kind.items()},
        "ended_by_itself_percent": percent([m["ended"] for m in marks]),
        "collapsed_percent": percent([m["collapsed"] for m in marks]),
        "names_consistent_percent": percent([m["names_consistent"] for m in marks]),
        "median_distinct_4grams": round(statistics.median(ex.distinct_share(t) for t, _ in answers), 3),
        "likeness_between_requests": round(ex.likeness([t for t, _ in answers]), 3),
        "median_words": statistics.median(len(t.split()) for t, _ in answers),
    }
    failures = [
        {"asked": e.messages[-1]["content"], "marks": m, "answer": text}
        for e, m, (text, _) in zip(exams, marks, answers, strict=True)
        if not m["taken_up"] or m["collapsed"] or not m["names_consistent"]
    ]
    return section, failures


def right_section(answerer: Answerer, exams: list[ex.Exam], title: str) -> tuple[dict, list[dict]]:
    """Share of answers that are right to the letter, in all and by kind."""
    answers = answerer.answers([e.messages for e in exams], limit=200, title=title)
    by_kind, failures = defaultdict(list), []
    for e, (text, ended) in zip(exams, answers, strict=True):
        right = ended and text.strip() == e.right.strip()
        by_kind[e.kind].append(right)
        if not right:
            failures.append({"asked": e.messages[-1]["content"], "right": e.right, "answer": text})
    everything = [mark for marks in by_kind.values() for mark in marks]
    section = {"chats": len(exams), "exact_percent": percent(everything),
               "exact_percent_by_kind": {kind: percent(marks) for kind,
                   marks in by_kind.items()}}  # fmt: skip
    return section, failures


def evaluate(folder: Path, chats: int, device: str, batch: int) -> tuple[dict, dict]:
    """(scores, failures) of the model in `folder`; `chats` is the number of chats per set."""
    begun = time.monotonic()
    answerer = Answerer(folder, device, batch)
    scores: dict = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "failures": {},
    }
    failures = {}
    scores["grammar_pairs"], failures["grammar_pairs"] = story_section(
        answerer, ex.grammar_pairs(chats), "listed words"
    )
    scores["outside_words"], failures["outside_words"] = story_section(
        answerer, ex.outside_words(chats), "outside words"
    )
    scores["new_wordings"], failures["new_wordings"] = story_section(
        answerer, ex.new_wordings(chats // 2), "new wordings"
    )
    scores["questions"], failures["questions"] = right_section(
        answerer, ex.story_questions(chats), "questions"
    )
    scores["repeat_after_me"], failures["repeat"] = right_section(
        answerer, ex.repeats(chats), "repeat after me"
    )
    strange = ex.strange_requests()
    answers = answerer.answers([e.messages for e in strange], limit=200, title="strange requests")
    polite = [ended and len(t) < 200 and ("story" in t or "fable" in t) for t, ended in answers]
    scores["strange_requests"] = {"chats": len(strange), "short_and_helpful_percent": percent(polite)}
    failures["strange_requests"] = [
        {"asked": e.messages[-1]["content"], "answer": t}
        for e, (t, _), ok in zip(strange, answers, polite, strict=True)
        if not ok
    ]
    model, tokenizer = answerer.model, answerer.tokenizer
    scores["held_out_perplexity"] = perplexity(model, tokenizer, max(8, min(40, chats // 5)))
    scores["heads_on_random_tokens"] = random_token_scores(model, model.config.vocab_size)
    scores["heads_on_stories"] = story_scores(model, tokenizer)
    replies = answerer.answers([[{"role": "user", "content": s}] for s in SAMPLES], title="samples")
    scores["samples"] = [{"user": s, "assistant": t} for s, (t, _) in zip(SAMPLES, replies, strict=True)]
    scores["failures"] = {name: len(found) for name, found in failures.items()}
    scores["seconds"] = round(time.monotonic() - begun, 1)
    return scores, failures


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tinyvllm.demo.evaluate", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parent / "model",
        help="model folder (default: the shipped one)",
    )
    p.add_argument("--out", type=Path, required=True, help="where to write scores.json")
    p.add_argument("--failures", type=Path, help="where to write the answers that failed (optional)")
    p.add_argument("--chats", type=int, default=300, help="chats per set (default 300)")
    p.add_argument("--batch", type=int, default=150, help="chats decoded at a time (default 150)")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    options = p.parse_args()
    scores, failures = evaluate(options.model, options.chats, options.device, options.batch)
    options.out.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.failures:
        options.failures.write_text(
            json.dumps(failures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps({k: v for k, v in scores.items() if k != "samples"}, indent=1))


if __name__ == "__main__":
    main()
