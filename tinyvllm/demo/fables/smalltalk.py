"""Greetings, questions about the storyteller, and polite answers to what it cannot do."""

from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.lexicon import HERE, read_lines, with_article
from tinyvllm.demo.fables.open_words import open_name, open_noun, open_word
from tinyvllm.demo.fables.story import pick
from tinyvllm.demo.fables.template import capital, render

Turn = tuple[str, str]
ABLE = "I can tell you a story about anyone and anything, answer questions about it, and repeat your words."
_LINES = read_lines(HERE / "words" / "smalltalk.txt")
TALK = [tuple(line.split(" => ")) for line in _LINES["talk"]]
UNKNOWN, SYSTEM, _COMMON = _LINES["unknown"], _LINES["system"], _LINES["common words"]


def greeting(rng) -> list[Turn]:
    """One exchange of small talk."""
    said, answer = pick(rng, TALK)
    words = pick(rng, said.split("|"))
    if words[-1] not in "?." and rng.random() < 0.2:
        name = pick(rng, ("my friend", "there", "storyteller", open_name(rng)))
        words = f"{words.rstrip('!')}, {name}{pick(rng, ('!', '.', ''))}"
    return [(words, render(answer, {"able": ABLE}, rng))]


def unknown(rng) -> list[Turn]:
    """A request that is not the model's business, and a short polite answer that says what it can do.

    Half of the answers to a question about a thing take the thing up: the model offers a story about it.
    """
    listed = rng.random() < 0.35
    noun = pick(rng, [*lexicon.OBJECTS, *lexicon.HEROES]) if listed else open_noun(rng)
    name = open_name(rng)
    word = pick(rng, _COMMON) if rng.random() < 0.3 else open_word(rng)
    scene = {
        "x": with_article(noun), "name": name, "w": word, "w2": open_word(rng), "y": open_name(rng),
        "n": str(int(rng.random() * 1000)), "m": str(int(rng.random() * 1000)),
    }  # fmt: skip
    template = pick(rng, UNKNOWN).replace("{X}", "{name}")
    subject = scene["x"] if "{x}" in template else name if "{name}" in template else None
    asked = render(template, scene, rng)
    draw = rng.random()
    if draw < 0.1:
        asked = asked[0].lower() + asked[1:]
    elif draw < 0.2:
        asked = asked.rstrip(".?!")
    elif draw < 0.35:
        asked = capital(asked)
    if subject and rng.random() < 0.6:
        answer = f"I only know fables, I am afraid. Shall I tell you a story about {subject}?"
    else:
        answer = "I do not know that, I am afraid. " + ABLE
    return [(asked, answer)]
