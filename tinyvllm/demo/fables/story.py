"""One fable: casts its roles, picks a plot, a problem and the weather that fit, and renders the beats in
order.

What is found early is used late: the object's use picks the problem, and the ending takes up the object, the
place, the friend or the weather that came before.
"""

import re
import zlib
from dataclasses import dataclass

from tinyvllm.demo.fables.cast import Character, Place, Sky, Thing
from tinyvllm.demo.fables.lexicon import (
    ADJECTIVES,
    DRAWN_HEROES,
    GAIT_OF,
    GENDER_OF_NAME,
    HE,
    MORALS,
    NAMES,
    OBJECTS,
    PLACES,
    PLOTS,
    PLOTS_OF,
    PLURAL,
    POOLS,
    PROBLEMS,
    SHE,
    TIMES,
    USE_OF,
    VICTIMS,
    WEATHER,
    Plot,
    Problem,
)  # fmt: skip
from tinyvllm.demo.fables.taste import Taste, pick
from tinyvllm.demo.fables.template import capital, render

# Objects that the helper gives away, or that are eaten, cannot stand by the hero's door in the end.
CONSUMED = {"food", "gold", "any", "heal"}
NEUTRAL_WEATHER = ("sun", "breeze", "clouds", "leaves", "spring")
_CLASHES = {  # times of the year or day that a kind of weather cannot go with
    "snow": "spring|summer|autumn|May|harvest|longest", "frost": "spring|summer|autumn|May|harvest|longest",
    "heat": "winter|autumn|spring|evening|when the year",
    "spring": "winter|summer|autumn|harvest|longest|evening",
    "leaves": "winter|summer|spring|May|longest|when the year",
    "moon": "morning|afternoon|day|Monday|Sunday|harvest|May",
    "sun": "evening", "mist": "evening",
}  # fmt: skip
_OPTIONAL = {"{@wonder}": 0.25, "{@tension}": 0.35, "{@thanks}": 0.2, "{@take}": 0.25}
# Hero, friend and whoever is in trouble never share a noun or a drawn name: each has lists of its own.
_FRIENDS, _TROUBLED = sorted(set(VICTIMS))[0::2], sorted(set(VICTIMS))[1::2]


def held_out(hero: str, thing: str) -> bool:
    """Whether this pair of nouns is kept out of training (one pair in twenty), so that it can be asked for in
    tests.
    """
    return zlib.crc32(f"{hero}+{thing}".encode()) % 20 == 0


@dataclass
class Story:
    """A rendered fable and the facts that questions about it can ask for."""

    beats: list[str]
    hero: Character
    thing: Thing
    helper_thing: Thing  # what mended the problem (not `thing` where the plot traded it)
    friend: Character
    troubled: Character  # who was in trouble
    helper: Character
    place: str
    theme: str
    moral: str
    weather_answer: str
    trouble: str  # "the hare was lost in a dark cave"
    taste: Taste

    @property
    def text(self) -> str:
        return " ".join(self.beats)


def gender_of(noun: str | None, name: str | None, rng) -> str:
    """ "he" or "she": by name, else by noun, else by the toss of a coin."""
    coin = "he" if rng.random() < 0.5 else "she"
    return GENDER_OF_NAME.get(name) or ("he" if noun in HE else "she" if noun in SHE else coin)


def cast_character(
    rng,
    noun=None,
    name=None,
    adjective=None,
    named=0.5,
    nouns=DRAWN_HEROES,
    flaw=0.2,
    taste=None,
    part="hero",
) -> Character:
    """A character with what is given, and the rest drawn: `named` is the chance of a name, `flaw` of a flaw.

    `part` is hero, friend or troubled; each part draws from its own third of the names.
    """
    drawn = pick(rng, nouns)
    if noun is None and name is None:
        noun = drawn
    gender = gender_of(noun, name, rng)
    names = NAMES[gender][("hero", "friend", "troubled").index(part) :: 3]
    taste = taste or Taste(noun or name or "", "")
    new_name, wants_name = taste(rng, f"{part} name {gender}", names), rng.random() < named
    if name is None and wants_name:
        name = new_name
    trait = taste(rng, f"{part} trait", ADJECTIVES["flaw" if rng.random() < flaw else "good"])
    age = pick(rng, ADJECTIVES["age"])
    draw = rng.random()
    own = trait if draw < 0.6 else f"{trait} {age}" if draw < 0.7 else age if draw < 0.85 else ""
    return Character(noun, name, gender, own if adjective is None else adjective, GAIT_OF.get(noun, "walk"))


def cast_thing(rng, noun=None, adjective=None, plural=None) -> Thing:
    """The object: drawn or given; a thing of no list is good for the problems of any object."""
    drawn, own = pick(rng, OBJECTS), pick(rng, ADJECTIVES["thing"])
    wants_adjective = rng.random() < 0.4
    noun = noun or drawn
    if adjective is None:
        adjective = own if wants_adjective and " " not in noun else ""
    return Thing(noun, adjective, (noun in PLURAL) if plural is None else plural, USE_OF.get(noun, "any"))


def _pick_plot(rng, taste: Taste, theme: str | None, way: str, wants_place: bool) -> Plot:
    plots = PLOTS_OF[theme] if theme else PLOTS
    if wants_place:
        plots = [p for p in plots if any("{@get}" in beat or "{place}" in beat.lower() for beat in p.beats)]
    if way != "found":  # a bought or given object needs a plot that lets the hero come by it in that way
        plots = [p for p in plots if not p.found_only and "{@get}" in p.beats] or plots
    return taste(rng, "plot", plots)


def _pick_problem(rng, taste: Taste, thing: Thing) -> Problem:
    use = thing.use if rng.random() < 0.85 else "any"
    return taste(rng, f"problem {use}", PROBLEMS[use])


def _pick_sky(rng, taste: Taste, problem: Problem) -> Sky:
    kinds = [w for w in WEATHER if w.name in NEUTRAL_WEATHER] if problem.own_weather else WEATHER
    return Sky(taste(rng, "sky", kinds), muted=problem.own_weather is not None)


def _drawn_time(section: str, taste: Taste, sky: Sky, used: set[str]):
    """A callable that draws a phrase of time: none twice, and none that clashes with the weather."""
    clash = re.compile(_CLASHES.get(sky.weather.name, "$^"))

    def draw(rng) -> str:
        options = [t for t in TIMES[section] if t not in used and not (section == "when" and clash.search(t))]
        phrase = taste(rng, section, options or ["one night"])
        used.add(phrase)
        return phrase

    return draw


def tell(
    rng, *, hero: Character | None = None, thing: Thing | None = None, friend: Character | None = None,
    place: str | None = None, theme: str | None = None, way: str = "found", length: str = "normal",
    taste: Taste | None = None,
) -> Story:  # fmt: skip
    """Tell one story. What is not given is drawn; `way` is found, given, bought or made; `length` short or
    normal.

    Everything is drawn from `rng` in the same order whoever the hero is, so the same state and the first
    telling's `taste` tell the same story with another hero.
    """
    drawn_hero = cast_character(rng)
    drawn_thing = cast_thing(rng)
    while not (hero and thing) and held_out((hero or drawn_hero).noun, (thing or drawn_thing).noun):
        drawn_hero, drawn_thing = (
            cast_character(rng),
            cast_thing(rng),
        )  # what is drawn is never a held-out pair
    hero, thing = hero or drawn_hero, thing or drawn_thing
    taste = taste or Taste(hero.noun or hero.name, thing.noun)
    troubled_noun = taste(rng, "troubled", [n for n in _TROUBLED if n != hero.noun])
    friend_noun = taste(rng, "friend", [n for n in _FRIENDS if n != hero.noun])
    other = cast_character(rng, troubled_noun, named=0.25, flaw=0.3, taste=taste, part="troubled")
    drawn_friend = cast_character(rng, friend_noun, named=0.25, flaw=0.4, taste=taste, part="friend")
    friend = friend or drawn_friend
    for character in (other, drawn_friend):
        if character.name in (hero.name, friend.name) and character is not friend:
            character.name = None
    if friend.name and friend.name == hero.name:
        (friend if friend.noun else hero).name = None
    plot = _pick_plot(rng, taste, theme, way, place is not None)
    use = pick(rng, [u for u in PROBLEMS if u not in (thing.use, "any")])
    second = Thing(pick(rng, [o for o in OBJECTS if USE_OF[o] == use]))
    second.use, second.plural = USE_OF[second.noun], second.noun in PLURAL
    roles = {"h": hero, "f": friend, "v": other, "o": thing, "o2": second}
    parts = {role: roles[actor] for role, actor in plot.cast.items()}
    problem = _pick_problem(rng, taste, parts["o"])
    sky = _pick_sky(rng, taste, problem)
    drawn_place = taste(rng, "place", PLACES)
    place = place or drawn_place
    moral = taste(rng, f"moral {plot.theme}", MORALS[plot.theme])
    keeps = plot.keeps_object or (parts["k"] is hero and parts["o"] is thing and problem.use not in CONSUMED)
    pools = dict(POOLS)
    pools["get"] = POOLS[way]
    pools["ending"] = POOLS["ending"] + POOLS["ending_kept"] if keeps else POOLS["ending"]
    used: set[str] = set()
    home = taste(rng, "home", TIMES["home"])

    def told(template: str):
        return lambda dice: render(template, parts, dice)

    scene = roles | {
        "@": lambda pool, dice: taste(dice, pool, pools[pool]), "sky": sky, "place": Place(place),
        "when": _drawn_time("when", taste, sky, used), "home": home,
        "later": _drawn_time("later", taste, sky, used), "setup": told(problem.setup),
        "fail": told(problem.fail),
        "solve": told(problem.solve), "moral": moral,
        "label": lambda dice: taste(dice, "label",
            ("The moral: ", "Moral: ", "The lesson is this: ", "And so we learn: ")),
    }  # fmt: skip
    beats = []
    for beat in plot.beats:
        draw = rng.random()
        chance = _OPTIONAL.get(beat, 0.0)
        if draw < (chance + 0.65 if chance and length == "short" else chance):
            continue
        if text := render(beat, scene, rng):
            beats.append(capital(text))
    beats.append(render("{@moral}", scene, rng))
    trouble = render(problem.short, {**parts, "v": parts["v"].definite()}, rng)
    return Story(
        beats, hero, thing, parts["o"], friend, parts["v"], parts["k"], place, plot.theme, moral,
        sky.weather.answer, trouble, taste,
    )  # fmt: skip


__all__ = ["Story", "Taste", "cast_character", "cast_thing", "held_out", "pick", "tell"]
