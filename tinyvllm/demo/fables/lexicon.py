"""The grammar's word lists, read once from words/*.txt, problems/*.txt, plots/*.txt and beats.txt.

A list file holds "[section]" headings and entries separated by commas; in a line file (one that holds whole
sentences) every line is an entry. "#" starts a comment line.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent

# How the members of a class move, as past-tense verbs that can stand before "along the road".
GAITS = {
    "scurry": ("scurried", "scampered", "hurried", "ran"),
    "plod": ("shuffled", "ambled", "plodded", "walked"),
    "hop": ("hopped", "bounded", "leaped", "hurried"),
    "fly": ("flew", "fluttered", "glided", "flew"),
    "waddle": ("waddled", "strutted", "hurried", "walked"),
    "trot": ("trotted", "walked", "hurried", "ambled"),
    "pad": ("trotted", "padded", "ran", "strolled"),
    "tramp": ("tramped", "wandered", "strode", "walked"),
    "crawl": ("crept", "crawled", "wandered", "made a slow way"),
    "swim": ("swam", "glided", "paddled", "splashed"),
    "walk": ("walked", "strolled", "wandered", "hurried"),
    "glide": ("walked", "wandered", "drifted", "went"),
}
# Who can fall into wells, climb trees and get stuck in the mud without a raised eyebrow.
EARTHBOUND = ("scurry", "plod", "hop", "trot", "pad", "walk")

_VOWEL_SOUND = re.compile(
    r"^(?:[aeio]|u(?!ni[^n]|s[eu]|k|t[eo]|r[aei]n)|ho(?:ur|nest|nor)|heir)", re.IGNORECASE
)


def a_or_an(noun_phrase: str) -> str:
    """The indefinite article for `noun_phrase`, by sound as far as spelling tells: an hour, a unicorn."""
    if re.match(r"(?:one|once|eu|ewe)", noun_phrase, re.IGNORECASE):
        return "a"
    return "an" if _VOWEL_SOUND.match(noun_phrase) else "a"


def with_article(noun_phrase: str) -> str:
    """`noun_phrase` behind its indefinite article."""
    return f"{a_or_an(noun_phrase)} {noun_phrase}"


def read_lines(path: Path) -> dict[str, list[str]]:
    """Sections of a line file: {section: [line, ...]}; lines before the first heading are section ""."""
    sections: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w[\w ]*)\]", line):
            name = heading.group(1)
        else:
            sections.setdefault(name, []).append(line)
    return sections


def read_list(path: Path) -> dict[str, list[str]]:
    """Sections of a list file: {section: [entry, ...]}, each entry once."""
    return {
        name: list(dict.fromkeys(entry.strip() for entry in " ".join(lines).split(",") if entry.strip()))
        for name, lines in read_lines(path).items()
    }


@dataclass(frozen=True)
class Problem:
    """One thing that can go wrong: templates over the roles v (in trouble), k (helper), w (fails), o
    (object).
    """

    use: str  # the family of objects that mend it
    short: str
    setup: str
    fail: str
    solve: str
    own_weather: str | None = None


def read_problems(folder: Path) -> dict[str, list[Problem]]:
    """{use: [Problem, ...]} from all files of `folder`; the mark in front of a line says which part it is."""
    part = {"-": "short", ">": "setup", "?": "fail", "!": "solve", "*": "own_weather"}
    problems: dict[str, list[Problem]] = {}
    for path in sorted(folder.glob("*.txt")):
        for use, lines in read_lines(path).items():
            blocks: list[dict[str, str]] = []
            for line in lines:
                if line[0] == "-":
                    blocks.append({})
                key = part[line[0]]
                text = line[1:].strip()
                if key == "fail" and not (text.startswith("[") and text.endswith("]")):
                    raise ValueError(f"{path.name}: a '?' line holds one [choice|of] sentences: {line!r}")
                blocks[-1][key] = text
            problems.setdefault(use, []).extend(Problem(use=use, **block) for block in blocks)
    return problems


@dataclass(frozen=True)
class Plot:
    """A row of beats (templates) under a theme; `cast` says who plays the problem's roles (see
    plots/1_*.txt).
    """

    theme: str
    title: str
    beats: tuple[str, ...]
    cast: dict[str, str] = field(default_factory=dict)
    found_only: bool = False
    keeps_object: bool = False


def read_plots(folder: Path) -> list[Plot]:
    """All plots of `folder`, in the order of the files."""
    plots: list[Plot] = []
    for path in sorted(folder.glob("*.txt")):
        for line in read_lines(path).get("", []):
            if line.startswith("= "):
                head, _, options = line[2:].partition("|")
                theme, title = (part.strip() for part in head.split(":"))
                words = options.split()
                cast = {"k": "h", "v": "v", "w": "f", "o": "o"} | dict(
                    w.split("=") for w in words if "=" in w
                )
                plots.append(Plot(theme, title, (), cast, "found" in words, "kept" in words))
            else:
                last = plots[-1]
                plots[-1] = Plot(
                    last.theme, last.title, (*last.beats, line), last.cast, last.found_only, last.keeps_object
                )
    return plots


@dataclass(frozen=True)
class Weather:
    """One kind of sky: sentences for the start, middle and end, a clause for "when ...", and the answer to
    "what?".
    """

    name: str
    start: list[str]
    when: list[str]
    mid: list[str]
    end: list[str]
    answer: str


def _read_weather(path: Path) -> list[Weather]:
    kinds = []
    for line in read_lines(path)[""]:
        name, *parts, answer = (part.strip() for part in line.split("|"))
        kinds.append(Weather(name, *([text.strip() for text in part.split(" / ")] for part in parts), answer))
    return kinds


_heroes = read_list(HERE / "words" / "heroes.txt")
HE, SHE = set(_heroes.pop("he")), set(_heroes.pop("she"))
GAIT_OF = {noun: gait for gait, nouns in _heroes.items() for noun in nouns}
HEROES = list(GAIT_OF)
# Nouns of fixed gender are drawn three times as often, so that their pronouns are learned.
DRAWN_HEROES = HEROES + 2 * [noun for noun in HEROES if noun in HE or noun in SHE]
VICTIMS = [noun for noun in DRAWN_HEROES if GAIT_OF[noun] in EARTHBOUND]
_objects = read_list(HERE / "words" / "objects.txt")
PLURAL = {entry[:-1] for entries in _objects.values() for entry in entries if entry.endswith("+")}
USE_OF = {entry.rstrip("+"): use for use, entries in _objects.items() for entry in entries}
OBJECTS = list(USE_OF)
PLACES = read_list(HERE / "words" / "places.txt")[""]
NAMES = {gender: names for gender, names in read_list(HERE / "words" / "names.txt").items()}
GENDER_OF_NAME = {name: gender for gender, names in NAMES.items() for name in names}
MORALS = read_lines(HERE / "words" / "morals.txt")
TIMES = read_list(HERE / "words" / "times.txt")
ADJECTIVES = read_list(HERE / "words" / "adjectives.txt")
WEATHER = _read_weather(HERE / "words" / "weather.txt")
POOLS = read_lines(HERE / "beats.txt")
PROBLEMS = read_problems(HERE / "problems")
PLOTS = read_plots(HERE / "plots")
THEMES = list(MORALS)
PLOTS_OF = {theme: [plot for plot in PLOTS if plot.theme == theme] for theme in THEMES}
