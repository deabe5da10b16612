"""Who and what a story is about, and how the text refers to them: first in full, from then on briefly."""

from dataclasses import dataclass

from tinyvllm.demo.fables.lexicon import GAITS, Weather, with_article

PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}


@dataclass
class Character:
    """Somebody in the story. `noun` or `name` may be missing, not both; `gender` is "he" or "she".

    Forms: "" (a reference: the full introduction at first mention), intro, a, call (what a friend says to
    them), went (a verb of motion), he, him, his, himself.
    """

    noun: str | None
    name: str | None
    gender: str
    adjective: str = ""
    gait: str = "walk"
    met: bool = False

    def intro(self) -> str:
        self.met = True
        if self.noun is None:
            return self.name
        full = with_article(f"{self.adjective} {self.noun}".strip())
        return f"{full} named {self.name}" if self.name else full

    def definite(self) -> str:
        """The plain reference used in answers: the name, or "the noun"."""
        return self.name or f"the {self.noun}"

    def form(self, form: str, rng) -> str:
        if form in PRONOUNS["he"]:
            return PRONOUNS[self.gender][form]
        if form == "went":
            verbs = GAITS[self.gait]
            return verbs[int(rng.random() * len(verbs))]
        if form == "call":
            return self.name or ("my friend", "friend", "dear friend")[int(rng.random() * 3)]
        if form == "intro" or (form in ("", "a") and not self.met):
            return self.intro()
        if form not in ("", "a"):
            raise ValueError(f"a character has no form {form!r}")
        draw = rng.random()  # drawn in every case, so that a retelling with another hero keeps its dice
        if self.noun is None or (self.name and draw < 0.7):
            return self.name
        return f"the {self.noun}"


@dataclass
class Thing:
    """The object of the story. Forms: "" (a reference), intro, a, they, it, its, this, that, is, was."""

    noun: str
    adjective: str = ""
    plural: bool = False
    use: str = "any"
    met: bool = False

    def indefinite(self, adjective: str = "") -> str:
        full = f"{adjective} {self.noun}".strip()
        return f"some {full}" if self.plural else with_article(full)

    def form(self, form: str, rng) -> str:
        if form == "intro" or (form == "" and not self.met):
            self.met = True
            return self.indefinite(self.adjective)
        if form == "":
            return f"the {self.noun}"
        if form == "a":
            return self.indefinite()
        return {
            "they": ("it", "they"), "it": ("it", "them"), "its": ("its", "their"),
            "this": ("this", "these"), "that": ("that", "those"), "is": ("is", "are"), "was": ("was", "were"),
        }[form][self.plural]  # fmt: skip


@dataclass
class Sky:
    """The story's weather. Forms: start, when, mid, end; a muted sky has nothing to say after the start."""

    weather: Weather
    muted: bool = False

    def form(self, form: str, rng) -> str:
        lines = getattr(self.weather, form)
        line = lines[int(rng.random() * len(lines))]
        return "" if self.muted and form in ("mid", "end") else line


@dataclass
class Place:
    """Where it happens: "" gives the phrase ("by the old mill"), "bare" the place itself ("the old mill")."""

    phrase: str

    def form(self, form: str, rng) -> str:
        if form == "":
            return self.phrase
        words = self.phrase.split(" ")
        if len(words) > 1 and words[1] in ("a", "an"):
            words[1] = "the"
        return " ".join(words[1:]) if len(words) > 1 else self.phrase
