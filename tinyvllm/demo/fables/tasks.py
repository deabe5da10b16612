"""Small instructions beside stories: repeat after me, opposites, counting, finding a word in a list."""

from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.lexicon import HERE, read_list
from tinyvllm.demo.fables.open_words import open_name, open_word
from tinyvllm.demo.fables.story import pick, tell
from tinyvllm.demo.fables.template import capital, render

Turn = tuple[str, str]
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
OPPOSITES = [pair.split("-") for pair in read_list(HERE / "words" / "opposites.txt")[""]]
COMMANDS = [
    "Repeat after me:", "Repeat after me:", "Repeat:", "Please repeat:", "Say this back to me:", "Say:",
    "Echo:", "Copy these words:", "Copy this:", "Repeat the following:", "Repeat exactly:", "Please say:",
]  # fmt: skip


def _listed_words() -> list[str]:
    single = [w for w in [*lexicon.HEROES, *lexicon.OBJECTS] if " " not in w]
    return single + lexicon.ADJECTIVES["good"] + lexicon.ADJECTIVES["thing"] + list(lexicon.GENDER_OF_NAME)


_WORDS = _listed_words()


def some_words(rng, count: int, open_share: float | None = None) -> list[str]:
    """`count` words: listed ones, open ones (chance `open_share`, by default 0, 1/3 or 1), now and then a
    name.
    """
    share = pick(rng, (0.0, 0.33, 1.0)) if open_share is None else open_share
    words = []
    for _ in range(count):
        word = open_word(rng) if rng.random() < share else pick(rng, _WORDS)
        words.append(open_name(rng) if share and rng.random() < 0.05 else word)
    return words


def _sentence(rng) -> str:
    """A sentence with open words in it, of the kinds that people ask a model to repeat."""
    a, b, c = (open_word(rng) if rng.random() < 0.5 else pick(rng, _WORDS) for _ in range(3))
    return render(pick(rng, (
        "The {a} sat on the {b}.", "My {a} likes {b} and {c}.", "I have {n} {a}s and one {b}.",
        "{Name} bought a {a} in {B}.",
        "{A}: {b}, {c}.", "Moral: {Name} is {a}.", "Note: the {a} {b} {c}", "Where is the {a} of {Name}?",
        "Never {a} a {b} without a {c}!", "We will {a} the {b} at {n} o'clock.",
        "{Name}, please {a} the {b}.", "{A} {b} {c}!", "The {a} {b} is in the {c}.", "Do you {a} my {b}?",
    )), {"a": a, "b": b, "c": c, "n": pick(rng, NUMBERS), "name": open_name(rng)}, rng)  # fmt: skip


def repeat(rng) -> list[Turn]:
    """Repeat-after-me: words, a sentence or a piece of a story, in the same line or on a line of its own."""
    draw = rng.random()
    if draw < 0.4:
        text = " ".join(some_words(rng, 1 + int(rng.random() * pick(rng, (3, 6, 12, 30)))))
    elif draw < 0.6:
        text = _sentence(rng)
    elif draw < 0.75:
        beats = tell(rng).beats
        start = int(rng.random() * (len(beats) - 1))
        text = " ".join(beats[start : start + 1 + int(rng.random() * 3)])
    elif draw < 0.9:
        text = ", ".join(some_words(rng, 2 + int(rng.random() * 8)))
    else:
        text = "".join(pick(rng, "0123456789") for _ in range(1 + int(rng.random() * 9)))
    if rng.random() < 0.3 and len(text) > 1:
        text = capital(text)
    if rng.random() < 0.12 and len(text) < 60:
        times = 2 + int(rng.random() * 3)
        word = ("twice", "three times", "four times")[times - 2]
        order = pick(
            rng, (f"Say this {word}: {text}", f"Repeat this {word}:\n{text}", f'Say "{text}" {word}.')
        )
        return [(order, "\n".join([text] * times))]
    if rng.random() < 0.12 and '"' not in text:
        return [(f'{pick(rng, ("Say", "Repeat", "Please say"))} "{text}"{pick(rng, (".", ""))}', text)]
    return [(f"{pick(rng, COMMANDS)}{pick(rng, (' ', ' ', ' ', chr(10), chr(10) * 2))}{text}", text)]


def small_task(rng) -> list[Turn]:
    """One short task with one right answer."""
    draw = rng.random()
    if draw < 0.35:
        pair = pick(rng, OPPOSITES)
        a, b = pair if rng.random() < 0.5 or pair[1] in ("light", "old", "short") else pair[::-1]
        a, b = ("hot", "cold") if a in ("light", "old", "short", "hard") else (a, b)
        asked = pick(
            rng, (f"What is the opposite of {a}?", f"Opposite of {a}?", f"Tell me the opposite of {a}.")
        )
        return [(asked, f"The opposite of {a} is {b}.")]
    if draw < 0.5:
        low = 1 + int(rng.random() * 12)
        high = low + 1 + int(rng.random() * (20 - low))
        return [
            (
                f"Count from {NUMBERS[low]} to {NUMBERS[high]}.",
                capital(", ".join(NUMBERS[low : high + 1])) + ".",
            )
        ]
    if draw < 0.6:
        i = 1 + int(rng.random() * 19)
        return [(f"What comes after {NUMBERS[i]}?", f"{capital(NUMBERS[i + 1])} comes after {NUMBERS[i]}.")]
    words = some_words(rng, 3 + int(rng.random() * 4))
    place, index = pick(rng, (("first", 0), ("last", -1), ("second", 1)))
    return [(f"What is the {place} word: {', '.join(words)}?", f"The {place} word is {words[index]}.")]
