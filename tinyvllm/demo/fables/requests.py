"""How people ask for a story: who and what it is about, from the grammar's lists or in words of their own.

`request(rng)` returns a Request: the user's sentence and the `tell` arguments that the answer must honor.
"""

from dataclasses import dataclass, field

from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.cast import Character, Thing
from tinyvllm.demo.fables.lexicon import (
    DRAWN_HEROES,
    HERE,
    HEROES,
    NAMES,
    OBJECTS,
    PLACES,
    THEMES,
    read_lines,
    with_article,
)  # fmt: skip
from tinyvllm.demo.fables.open_words import open_adjective, open_name, open_noun, open_word
from tinyvllm.demo.fables.story import cast_character, cast_thing, held_out, pick
from tinyvllm.demo.fables.template import capital, render

LOOSE_SHARE = (
    0.3  # of the requests with hero and object, those put together from sentences of words/loose.txt
)
PHRASES = read_lines(HERE / "words" / "phrases.txt")
LOOSE = read_lines(HERE / "words" / "loose.txt")
LOOSE["asks"] += ["", ""]  # now and then nobody asks


@dataclass
class Request:
    """The user's words, and what the story must take up."""

    text: str
    hero: Character | None = None
    thing: Thing | None = None
    tell: dict = field(default_factory=dict)  # the other arguments of story.tell
    is_open: bool = False  # some word of it is outside the grammar's lists


def asked_hero(rng, is_open: bool) -> tuple[Character, str]:
    """A hero somebody may ask for, and the phrase: "a fox", "Tilda", "my dog Rex", "a brave zorb"."""
    if is_open:
        swapped = rng.random() < 0.12  # a teapot can be a hero as well
        noun = pick(rng, OBJECTS) if swapped else open_noun(rng)
    else:
        noun = pick(rng, DRAWN_HEROES)
    name = (
        open_name(rng)
        if rng.random() < (0.6 if is_open else 0.15)
        else pick(rng, NAMES[pick(rng, ("he", "she"))])
    )
    if is_open and rng.random() < 0.35:  # only one of the two has to be new
        noun = pick(rng, DRAWN_HEROES) if rng.random() < 0.5 else noun
    adjective = (
        open_adjective(rng) if is_open and rng.random() < 0.3 else pick(rng, lexicon.ADJECTIVES["good"])
    )
    draw = rng.random()
    if draw < 0.5:
        hero = cast_character(rng, noun, named=0.35)
        return hero, with_article(noun)
    if draw < 0.62:
        hero = cast_character(rng, noun, adjective=adjective, named=0.35)
        return hero, with_article(f"{adjective} {noun}")
    if draw < 0.78:
        joint = pick(rng, ("named", "called", "named"))
        return cast_character(rng, noun, name), f"{with_article(noun)} {joint} {name}"
    if draw < 0.9:
        return cast_character(rng, None, name), name
    if draw < 0.95:
        return cast_character(rng, noun, name), f"{name} the {noun}"
    return cast_character(rng, noun, name, adjective=""), f"my {noun} {name}"


def asked_thing(rng, is_open: bool) -> tuple[Thing, str]:
    """An object somebody may ask for, and the phrase that asks: "a key", "an old key", "some marbles", "her
    key".
    """
    if is_open:
        noun = pick(rng, HEROES) if rng.random() < 0.08 else open_noun(rng)
        plural = rng.random() < 0.08
        noun = noun + "s" if plural else noun
    else:
        noun, plural = pick(rng, OBJECTS), None
    draw = rng.random()
    adjective = ""
    if draw < 0.25:
        adjective = open_adjective(rng) if is_open else pick(rng, lexicon.ADJECTIVES["thing"])
        thing = cast_thing(rng, noun, adjective=adjective, plural=plural)
    else:
        thing = cast_thing(rng, noun, plural=plural)
    phrase = thing.indefinite(adjective)
    if draw > 0.96:
        phrase = f"the {noun}"
    return thing, phrase


def asked_place(rng) -> str:
    """A place: mostly one of the list, else an invented one ("near the zorble", "in Quambia")."""
    if rng.random() < 0.7:
        return pick(rng, PLACES)
    start = pick(
        rng, ("in the", "near the", "under the", "behind the", "on the", "at the", "beside the", "in")
    )
    return f"{start} {open_noun(rng) if start != 'in' else open_word(rng).capitalize()}"


def request(rng, open_share: float = 0.45) -> Request:
    """A request for a story. With chance `open_share` its hero, its object or both are outside the lists.

    Held-out pairs of listed nouns (story.held_out) are never asked for.
    """
    is_open = rng.random() < open_share
    which = rng.random()  # of an open request: hero and object 1/2, only the hero 1/4, only the object 1/4
    hero, hero_phrase = asked_hero(rng, is_open and which < 0.75)
    thing, thing_phrase = asked_thing(rng, is_open and (which < 0.5 or which >= 0.75))
    if held_out(hero.noun, thing.noun):
        return request(rng, open_share)
    friend, friend_phrase = asked_hero(rng, is_open and rng.random() < 0.3)
    theme, place = pick(rng, THEMES), asked_place(rng)
    way = pick(rng, ("found",) * 7 + ("given", "bought", "made"))
    ask = render(pick(rng, PHRASES["asks"]), {"kind": lambda dice: pick(dice, PHRASES["kinds"])}, rng)
    draw = rng.random()
    section = "both" if draw < 0.72 or is_open else "hero only" if draw < 0.85 else "thing only"
    if draw >= 0.93 and not is_open:
        section = "neither"
    if is_open and draw < 0.12:
        section = "hero only" if which < 0.75 else "thing only"
    loose = section == "both" and rng.random() < LOOSE_SHARE
    pattern = _loose(rng) if loose else pick(rng, PHRASES[section])
    if "{f}" in pattern and (friend.noun == hero.noun or (friend.name and friend.name == hero.name)):
        return request(rng, open_share)
    scene = {
        "ask": ask.rstrip("?"), "h": hero_phrase, "o": thing_phrase, "n": thing.noun, "f": friend_phrase,
        "theme": theme, "place": place, "finds": lambda dice: pick(dice, PHRASES[f"finds {way}"]),
        "clause": lambda dice: render(pick(dice, PHRASES["clauses"]), {"w": open_word, "x": open_name}, dice),
        "w": lambda dice: open_word(dice) if dice.random() < 0.4 else pick(dice, LOOSE["words"]),
        "x": open_name,
        "v": lambda dice: open_word(dice) if dice.random() < 0.15 else pick(dice, LOOSE["verbs"]),
        "s": lambda dice: open_name(dice) if dice.random() < 0.1 else pick(dice, LOOSE["subjects"]),
        "t": lambda dice: pick(dice, LOOSE["times"]),
    }  # fmt: skip
    text = _finish(
        rng, render(pattern, scene, rng), "?" if "?" in ask else "." if "{ask}" in pattern else "", scene
    )
    arguments: dict = {"length": "short" if "short" in text or "little" in text else "normal"}
    if "{place}" in pattern:
        arguments["place"] = place
    if "{theme}" in pattern:
        arguments["theme"] = theme
    if "{finds}" in pattern:
        arguments["way"] = way
    if "{f}" in pattern:
        named = with_article(f"{friend.adjective} {friend.noun}")
        friend.adjective = friend.adjective if friend_phrase.startswith(named) else ""
        arguments["friend"] = friend
    asks_hero, asks_thing = "{h}" in pattern.lower(), "{o}" in pattern.lower() or "{n}" in pattern
    return Request(text, hero if asks_hero else None, thing if asks_thing else None, arguments, is_open)


def _loose(rng) -> str:
    """A pattern of sentences: the hero, the object, and an ask before or after them."""
    if rng.random() < 0.5:
        middle = pick(rng, LOOSE["both"])
    else:
        middle = f"{pick(rng, LOOSE['hero'])} {pick(rng, LOOSE['thing'])}"
    ask = pick(rng, LOOSE["asks"])
    return f"{ask} {middle}" if rng.random() < 0.3 else f"{middle} {ask}"


def _finish(rng, text: str, mark: str, scene: dict) -> str:
    """Punctuate a request and, now and then, put words around it or write it carelessly."""
    text = text.replace(",.", ".").replace(",!", "!")
    if text[-1] not in ".?!":
        text += mark if rng.random() < 0.85 else ""
    draw = rng.random()
    if draw < 0.08:
        return text[0].lower() + text[1:]
    text = capital(text)
    if draw < 0.12 and "?" not in text:
        return text.rstrip(".") + ", please."
    if draw < 0.14 and text[-1] not in "?!":
        return text.rstrip(".") + "!"
    if draw < 0.26:
        return f"{render(pick(rng, PHRASES['before']), scene, rng)} {text}"
    if draw < 0.34:
        stop = "" if text[-1] in ".?!" else "."
        return f"{text}{stop} {render(pick(rng, PHRASES['after']), scene, rng)}"
    return text
