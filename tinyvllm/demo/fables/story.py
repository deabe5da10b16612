"""One fable: casts its roles, picks a plot, a problem and the weather that fit, and renders the beats in order.

What is found early is used late: the object's use picks the problem, and the ending takes up the object, the
place, the friend or the weather that came before.
"""

import re
import zlib
from dataclasses import dataclass

from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.cast import Character, Place, Sky, Thing
from tinyvllm.demo.fables.lexicon import (
    ADJECTIVES, GAIT_OF, GENDER_OF_NAME, HE, HEROES, MORALS, NAMES, OBJECTS, PLACES, PLOTS, PLOTS_OF, PLURAL, POOLS,
    PROBLEMS, SHE, THEMES, TIMES, USE_OF, VICTIMS, WEATHER, Plot, Problem,
)  # fmt: skip
from tinyvllm.demo.fables.template import capital, render

# Objects that the helper gives away, or that are eaten, cannot stand by the hero's door in the end.
CONSUMED = {"food", "gold", "any", "heal"}
NEUTRAL_WEATHER = ("sun", "breeze", "clouds", "leaves", "spring")
_CLASHES = {  # times of the year or day that a kind of weather cannot go with
    "snow": "spring|summer|autumn|May|harvest|longest", "frost": "spring|summer|autumn|May|harvest|longest",
    "heat": "winter|autumn|spring|evening|when the year", "spring": "winter|summer|autumn|harvest|longest|evening",
    "leaves": "winter|summer|spring|May|longest|when the year", "moon": "morning|afternoon|day|Monday|Sunday|harvest|May",
    "sun": "evening", "mist": "evening",
}  # fmt: skip
_OPTIONAL = {"{@wonder}": 0.25, "{@tension}": 0.35, "{@thanks}": 0.2, "{@take}": 0.25}
# A problem with its own weather keeps the story's sky quiet; some families call it by another name.


def held_out(hero: str, thing: str) -> bool:
    """Whether this pair of nouns is kept out of training (one pair in twenty), so that it can be asked for in tests."""
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

    @property
    def text(self) -> str:
        return " ".join(self.beats)


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def gender_of(noun: str | None, name: str | None, rng) -> str:
    """"he" or "she": by name, else by noun, else by the toss of a coin."""
    coin = "he" if rng.random() < 0.5 else "she"
    return GENDER_OF_NAME.get(name) or ("he" if noun in HE else "she" if noun in SHE else coin)


def cast_character(rng, noun=None, name=None, adjective=None, named=0.5, nouns=HEROES, flaw=0.2) -> Character:
    """A character with what is given, and the rest drawn: `named` is the chance of a name, `flaw` of a flaw."""
    drawn = pick(rng, nouns)
    if noun is None and name is None:
        noun = drawn
    gender = gender_of(noun, name, rng)
    new_name, wants_name = pick(rng, NAMES[gender]), rng.random() < named
    if name is None and wants_name:
        name = new_name
    trait = pick(rng, ADJECTIVES["flaw" if rng.random() < flaw else "good"])
    age = pick(rng, ADJECTIVES["age"])
    draw = rng.random()
    own = trait if draw < 0.6 else f"{trait} {age}" if draw < 0.7 else age if draw < 0.85 else ""
    return Character(noun, name, gender, own if adjective is None else adjective, GAIT_OF.get(noun, "walk"))


def cast_thing(rng, noun=None, adjective=None, plural=None) -> Thing:
    """The object: a drawn one, or the one given; a thing of no list is good for the problems of any object."""
    drawn, own = pick(rng, OBJECTS), pick(rng, ADJECTIVES["thing"])
    wants_adjective = rng.random() < 0.4
    noun = noun or drawn
    if adjective is None:
        adjective = own if wants_adjective and " " not in noun else ""
    return Thing(noun, adjective, (noun in PLURAL) if plural is None else plural, USE_OF.get(noun, "any"))


def _pick_plot(rng, theme: str | None, way: str) -> Plot:
    plots = PLOTS_OF[theme] if theme else PLOTS
    if way != "found":  # a bought or given object needs a plot that lets the hero come by it in that way
        plots = [p for p in plots if not p.found_only and "{@get}" in p.beats] or plots
    return pick(rng, plots)


def _pick_problem(rng, thing: Thing) -> Problem:
    use = thing.use if rng.random() < 0.85 else "any"
    return pick(rng, PROBLEMS[use])


def _pick_sky(rng, problem: Problem) -> Sky:
    kinds = [w for w in WEATHER if w.name in NEUTRAL_WEATHER] if problem.own_weather else WEATHER
    return Sky(pick(rng, kinds), muted=problem.own_weather is not None)


def _drawn_time(section: str, sky: Sky, used: set[str]):
    """A callable that draws a phrase of time, never the same twice, and none that clashes with the weather."""
    clash = re.compile(_CLASHES.get(sky.weather.name, "$^"))

    def draw(rng) -> str:
        options = [t for t in TIMES[section] if t not in used and not (section == "when" and clash.search(t))]
        phrase = pick(rng, options or ["one night"])
        used.add(phrase)
        return phrase

    return draw


def tell(
    rng, *, hero: Character | None = None, thing: Thing | None = None, friend: Character | None = None,
    place: str | None = None, theme: str | None = None, way: str = "found", length: str = "normal",
) -> Story:  # fmt: skip
    """Tell one story. What is not given is drawn; `way` is found, given, bought or made; `length` short or normal.

    Everything is drawn from `rng` in the same order whoever the hero is, so the same state tells the same story
    with another hero.
    """
    drawn_hero = cast_character(rng)
    drawn_thing = cast_thing(rng)
    while not (hero and thing) and held_out((hero or drawn_hero).noun, (thing or drawn_thing).noun):
        drawn_hero, drawn_thing = cast_character(rng), cast_thing(rng)  # what is drawn is never a held-out pair
    hero, thing = hero or drawn_hero, thing or drawn_thing
    others = [pick(rng, VICTIMS) for _ in range(6)]
    troubled_noun, friend_noun = [n for n in dict.fromkeys(others) if n != hero.noun][:2]
    other = cast_character(rng, troubled_noun, named=0.25, flaw=0.3)
    drawn_friend = cast_character(rng, friend_noun, named=0.25, flaw=0.4)
    friend = friend or drawn_friend
    while other.name in (hero.name, friend.name) and other.name:
        other.name = None
    if friend.name and friend.name == hero.name:
        friend.name = None
    plot = _pick_plot(rng, theme, way)
    uses = [u for u in PROBLEMS if u not in (thing.use, "any")]
    second = Thing(pick(rng, [o for o in OBJECTS if USE_OF[o] == pick(rng, uses)] or OBJECTS))
    second.use, second.plural = USE_OF[second.noun], second.noun in PLURAL
    roles = {"h": hero, "f": friend, "v": other, "o": thing, "o2": second}
    parts = {role: roles[actor] for role, actor in plot.cast.items()}
    problem = _pick_problem(rng, parts["o"])
    sky = _pick_sky(rng, problem)
    place = place or pick(rng, PLACES)
    moral = pick(rng, MORALS[plot.theme])
    keeps = plot.keeps_object or (parts["k"] is hero and parts["o"] is thing and problem.use not in CONSUMED)
    pools = dict(POOLS)
    pools["get"] = POOLS[way]
    pools["ending"] = POOLS["ending"] + POOLS["ending_kept"] if keeps else POOLS["ending"]
    used: set[str] = set()
    home = pick(rng, TIMES["home"])

    def told(template: str):
        return lambda dice: render(template, parts, dice)

    scene = roles | {
        "@": pools, "sky": sky, "place": Place(place), "when": _drawn_time("when", sky, used), "home": home,
        "later": _drawn_time("later", sky, used), "setup": told(problem.setup), "fail": told(problem.fail),
        "solve": told(problem.solve), "moral": moral,
        "label": lambda dice: pick(dice, ("The moral: ", "Moral: ", "The lesson is this: ", "And so we learn: ")),
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
        sky.weather.answer, trouble,
    )  # fmt: skip


__all__ = ["Story", "cast_character", "cast_thing", "held_out", "lexicon", "tell"]
