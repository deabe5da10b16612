"""Held-out chats and how they are marked: is the request taken up, does the answer end, stay varied, keep its
names?

Nothing here needs torch: `Exam` objects hold prompts, and `mark` looks at texts.
"""

import random
import re
from dataclasses import dataclass, field

from tinyvllm.demo.fables.documents import chat, tell_for
from tinyvllm.demo.fables.lexicon import GENDER_OF_NAME, HEROES, NAMES, OBJECTS, PLURAL, with_article
from tinyvllm.demo.fables.questions import questions
from tinyvllm.demo.fables.requests import request
from tinyvllm.demo.fables.story import held_out, pick, tell
from tinyvllm.demo.fables.tasks import some_words
from tinyvllm.demo.outside import OUTSIDE_HEROES, OUTSIDE_NAMES, OUTSIDE_OBJECTS

WORDINGS = [  # in the manner of the training text
    "Tell me a story about {h} who finds {o}.", "Tell me a story about {h} and {o}.",
    "Write a short fable about {h} and {o}.",
    "Can you tell me a story about {h} who finds {o}?", "Please tell me a bedtime story about {h} with {o}.",
    "I would like a story about {h} who finds {o}.", "{h} and {o}", "tell me a story about {h} who finds {o}",
]  # fmt: skip
NEW_WORDINGS = [  # sentences of a kind that the training text never has
    "I'd like you to come up with a nice story. Let the main character be {h}, and let there be {o} as well.",
    "My daughter wants to hear about {h} and {o}. Could you write something for her?",
    "Story time! Today: {h} and {o}!", "Think of {h}. Now think of {o}. Can you make a story of that?",
    "Make me smile with {h} and {o}, will you?",
    "Yesterday I met {h}. Later I noticed {o}. What is the tale behind it?",
    "Please produce a narrative whose protagonist is {h} and whose plot turns on {o}.",
    "Grandma is visiting. She adores {h}, and she has just acquired {o}. Surprise her with a fable.",
    "If {h} ever stumbled over {o}, how would that go?",
    "My homework: a story, hero {h}, must mention {o}. Help!",
    "You know {h}, right? Well, {h} just inherited {o}. Continue.", "Bedtime, so: {h}, {o}, action!",
]  # fmt: skip


@dataclass
class Exam:
    """One chat to answer: the messages so far, words that the answer must hold, or the one right answer."""

    messages: list[dict[str, str]]
    must_hold: list[str] = field(default_factory=list)
    right: str | None = None
    kind: str = ""


def _asked(rng, hero: str, name: str | None, thing: str, kind: str, wording: str = "") -> Exam:
    hero_phrase = (f"{with_article(hero)} named {name}" if hero else name) if name else with_article(hero)
    thing_phrase = f"some {thing}" if thing in PLURAL else with_article(thing)
    text = (wording or pick(rng, WORDINGS)).format(h=hero_phrase, o=thing_phrase)
    messages = [{"role": "user", "content": text[0].upper() + text[1:] if rng.random() < 0.9 else text}]
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    return Exam(messages, [word for word in (hero, name, thing) if word], kind=kind)


def grammar_pairs(count: int, seed: int = 11) -> list[Exam]:
    """Requests for pairs of listed nouns that training never showed together (story.held_out)."""
    rng = random.Random(seed)
    exams = []
    while len(exams) < count:
        hero, thing = rng.choice(HEROES), rng.choice(OBJECTS)
        if held_out(hero, thing):
            name = rng.choice(NAMES[rng.choice(("he", "she"))]) if rng.random() < 0.3 else None
            exams.append(_asked(rng, hero, name, thing, "with a name" if name else "without a name"))
    return exams


def outside_words(count: int, seed: int = 12) -> list[Exam]:
    """Requests with words that the grammar never has: as hero, as object, as both, and as names."""
    rng = random.Random(seed)
    exams = []
    for i in range(count):
        part = ("both", "both", "hero", "object", "name", "name only")[i % 6]
        hero = rng.choice(HEROES if part in ("object", "name") else OUTSIDE_HEROES)
        thing = rng.choice(OBJECTS if part in ("hero", "name") else OUTSIDE_OBJECTS)
        name = rng.choice(OUTSIDE_NAMES) if part.startswith("name") else None
        exams.append(_asked(rng, "" if part == "name only" else hero, name, thing, part))
    return exams


def new_wordings(count: int, seed: int = 15) -> list[Exam]:
    """Requests in sentences that training never saw (NEW_WORDINGS); listed and outside words by turns."""
    rng = random.Random(seed)
    exams = []
    while len(exams) < count:
        wording = NEW_WORDINGS[len(exams) // 2 % len(NEW_WORDINGS)]
        if len(exams) % 2:
            hero, thing = rng.choice(OUTSIDE_HEROES), rng.choice(OUTSIDE_OBJECTS)
        else:
            hero, thing = rng.choice(HEROES), rng.choice(OBJECTS)
        if len(exams) % 2 or held_out(hero, thing):
            exams.append(_asked(rng, hero, None, thing, wording, wording))
    return exams


def story_questions(count: int, seed: int = 13) -> list[Exam]:
    """A chat whose first answer is a grammar story (a third of them with open words), then one question."""
    rng = random.Random(f"questions {seed}")
    exams = []
    while len(exams) < count:
        asked = request(rng, open_share=0.33)
        story = tell_for(rng, asked)
        for question, answer in questions(rng, story, 1):
            turns = chat([(asked.text, story.text), (question, answer)])
            exams.append(Exam(turns[:-1], right=answer, kind="open" if asked.is_open else "listed"))
    return exams


def repeats(count: int, seed: int = 14) -> list[Exam]:
    """Repeat-after-me: listed words, words that the grammar never has, and story sentences."""
    rng = random.Random(f"repeat {seed}")
    exams = []
    for i in range(count):
        kind = ("listed words", "outside words", "sentence")[i % 3]
        if kind == "listed words":
            text = " ".join(some_words(rng, rng.randint(1, 12), 0.0))
        elif kind == "outside words":
            text = " ".join(
                rng.choice(OUTSIDE_HEROES + OUTSIDE_OBJECTS + OUTSIDE_NAMES) for _ in range(rng.randint(1, 8))
            )
        else:
            text = rng.choice(tell(rng).beats)
        ask = rng.choice(
            ("Repeat after me: ", "Repeat after me:\n\n", "Say: ", "Please repeat: ", "Copy this:\n")
        )
        exams.append(Exam([{"role": "user", "content": ask + text}], right=text, kind=kind))
    return exams


def strange_requests() -> list[Exam]:
    """What the model cannot do, and greetings: the answer must be short, polite and say what it can do."""
    asked = [
        "What is the capital of France?", "Write a Python program that sorts a list.", "Hello!",
        "Hi, how are you doing today?",
        "Explain quantum physics to me.", "Who won the world cup?", "What can you do?",
        "Translate good morning into German.",
        "What is 17 times 23?", "How do I bake a cake?", "Who are you?", "Give me the news of today.",
        "What is a laptop?",
        "Should I invest in stocks?", "Write a haiku about autumn.", "Good evening, my friend!",
        "What is the meaning of life?",
        "Is it going to rain tomorrow?", "How tall is Mount Everest?", "Can you drive a car?",
    ]  # fmt: skip
    return [Exam([{"role": "user", "content": text}], kind="strange") for text in asked]


def holds(text: str, word: str) -> bool:
    """Whether `text` has `word` as a whole word, in any case."""
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


def distinct_share(text: str, n: int = 4) -> float:
    """Share of different n-grams among all n-grams of words: 1 if nothing is said twice, near 0 in a loop."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def likeness(texts: list[str], n: int = 4) -> float:
    """Mean share of n-grams that two answers to different requests have in common (Jaccard, over neighbors in
    the list): 0 where each request gets a story of its own, near 1 where greedy decoding tells everybody the
    same.
    """
    grams = []
    for text in texts:
        words = text.split()
        grams.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    pairs = [(a, b) for a, b in zip(grams, grams[1:], strict=False) if a and b]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / max(1, len(pairs))


def collapsed(text: str, ended: bool) -> bool:
    """A story that does not end, says one sentence three times, or repeats more than three tenths of its
    4-grams.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) > 2]
    return not ended or any(sentences.count(s) > 2 for s in set(sentences)) or distinct_share(text) < 0.7


_NAME = re.compile(r"[a-z,;]\"? ([A-Z][\w'-]+)")


def stray_names(text: str, request_text: str) -> list[str]:
    """Capitalized words in mid-sentence that nobody introduced: neither asked for nor "named ..." in the
    story.
    """
    introduced = (
        set(re.findall(r"named ([A-Z][\w'-]+)", text))
        | set(re.findall(r"[\w'-]+", request_text))
        | {"I", "I'd"}
    )
    introduced |= {"Monday", "Tuesday", "Sunday", "May", "April", "August", "Grandmother"}
    listed_hero_names = {word for word in re.findall(r"[\w'-]+", text[:400]) if word in GENDER_OF_NAME}
    known = {part for word in introduced | listed_hero_names for part in (word, word.removesuffix("'s"))}
    return [word for word in _NAME.findall(text) if word.removesuffix("'s") not in known]


def mark(exam: Exam, answer: str, ended: bool) -> dict[str, bool]:
    """The marks of one story answer."""
    asked = exam.messages[-1]["content"]
    return {
        "taken_up": all(holds(answer, word) for word in exam.must_hold),
        "ended": ended,
        "collapsed": collapsed(answer, ended),
        "names_consistent": not stray_names(answer, asked),
    }
