"""Choices that lean on the words of the request, so that greedy decoding tells a different story to each of
them.

Were every opening, place and plot equally likely whoever the hero is, the most likely story would be one and
the same for all requests. So each choice has a favorite that depends on one letter of the hero or of the
object: nearly half of the time it is taken, otherwise all options are alike. A letter is enough to tell
hundreds of requests apart, and a word that no list holds has letters too.
"""

import zlib
from typing import Any

FAVOR = 0.45
# Which letter a choice leans on: the first or last of the hero's last word (h0, h1) or of the object's (o0,
# o1).
LEANS_ON = {
    "open": "h0", "when": "h1", "home": "h1", "sky": "h1", "place": "o1", "get": "h0", "wonder": "o0",
    "take": "o1",
    "plot": "o0", "meet": "h1", "tension": "h0", "idea": "o1", "thanks": "h0", "ending": "o0",
    "ending_friend": "h0",
    "later": "h0", "troubled": "h0", "friend": "o0", "moral": "h1", "label": "o1", "problem": "h1",
    "hero": "h0",
}  # fmt: skip


def pick(rng, options: Any) -> Any:
    """One of `options`, each as likely."""
    return options[int(rng.random() * len(options))]


class Taste:
    """The favorites of one hero and object: `taste(rng, choice, options)` picks one of `options`."""

    def __init__(self, hero: str, thing: str):
        heads = {"h": (hero.split() or [""])[-1], "o": (thing.split() or [""])[-1]}
        self.letters = {
            f"{who}{at}": word[:1] if at == 0 else word[-1:] for who, word in heads.items() for at in (0, 1)
        }

    def __call__(self, rng, choice: str, options: Any) -> Any:
        letter = self.letters[LEANS_ON.get(choice, LEANS_ON.get(choice.split()[0], "h0"))].lower()
        lean, index = rng.random(), int(rng.random() * len(options))  # two draws either way, see story.tell
        if lean < FAVOR:
            index = zlib.crc32(f"{choice} {letter}".encode()) % len(options)
        return options[index]
