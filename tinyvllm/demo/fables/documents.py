"""Documents of the training text: chats of all kinds, and stories as plain text.

rng = random.Random(7)
for _ in range(3):
    print(document(rng))
"""

from dataclasses import dataclass

from tinyvllm.demo.fables.lexicon import THEMES
from tinyvllm.demo.fables.questions import questions
from tinyvllm.demo.fables.requests import Request, asked_hero, asked_thing, request
from tinyvllm.demo.fables.smalltalk import SYSTEM, greeting, unknown
from tinyvllm.demo.fables.story import Story, held_out, pick, tell
from tinyvllm.demo.fables.tasks import repeat, small_task

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
# Shares of documents. "again" retells a story word by word or with one thing changed, as chat and as plain
# text: it keeps the copying heads awake in stories, not only in copy tasks.
MIX = {"story": 0.36, "talk": 0.2, "again": 0.09, "continue": 0.05, "read": 0.06, "plain": 0.04,
    "repeat": 0.1,
       "small": 0.04, "chatter": 0.06}  # fmt: skip


@dataclass
class Document:
    """One training text: a chat, or plain text (then `messages` is empty). `learn_user`: the loss counts the
    user's words too, because they hold a story rather than words that nobody could foresee."""

    kind: str
    messages: list[Message]
    text: str = ""
    learn_user: bool = False


def chat(turns: list[tuple[str, str]]) -> list[Message]:
    """[(user, assistant), ...] as messages."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def tell_for(rng, asked: Request) -> Story:
    return tell(rng, hero=asked.hero, thing=asked.thing, **asked.tell)


def _fresh(rng) -> Story:
    """A story for reading or continuing, half of them with an open hero or object."""
    hero = asked_hero(rng, True)[0] if rng.random() < 0.3 else None
    thing = asked_thing(rng, True)[0] if rng.random() < 0.3 else None
    if hero and thing and held_out(hero.noun, thing.noun):
        return _fresh(rng)
    return tell(rng, hero=hero, thing=thing)


def _story_turn(rng) -> tuple[Story, tuple[str, str]]:
    asked = request(rng)
    story = tell_for(rng, asked)
    return story, (asked.text, story.text)


def _talk(rng) -> list[tuple[str, str]]:
    """Several turns: stories, questions about them, wishes, small talk."""
    turns: list[tuple[str, str]] = greeting(rng) if rng.random() < 0.2 else []
    for _ in range(1 + int(rng.random() * 3)):
        draw = rng.random()
        if draw < 0.08:  # "Shall I tell you a story about a zorb?" - "Yes, please."
            turns += unknown(rng)
            hero, phrase = asked_hero(rng, rng.random() < 0.6)
            turns[-1] = (
                turns[-1][0],
                f"I only know fables, I am afraid. Shall I tell you a story about {phrase}?",
            )
            turns.append(
                (
                    pick(rng, ("Yes, please.", "Yes", "yes please", "Please do.", "Sure", "Okay")),
                    tell(rng, hero=hero).text,
                )
            )
        elif draw < 0.78:
            story, turn = _story_turn(rng)
            turns.append(turn)
            if turns[:-1] and rng.random() < 0.15:
                another = pick(
                    rng,
                    ("Another one, please.", "Tell me another one.", "One more!", "Another story", "Again!"),
                )
                turns[-1] = (another, _fresh(rng).text)
                continue
            turns += questions(rng, story, int(rng.random() * 4.5))
            if rng.random() < 0.15:
                turns += greeting(rng)
        else:
            turns += repeat(rng) if draw < 0.87 else small_task(rng) if draw < 0.93 else unknown(rng)
    return turns


def _again(rng) -> Document:
    """A story told again: word by word, or with the same dice and one other hero or object."""
    if rng.random() < 0.3:
        beats = _fresh(rng).beats
        start = int(rng.random() * (len(beats) - 2))
        text = " ".join(beats[start : start + 3 + int(rng.random() * 9)])
        return Document("again", [], "\n\n".join([text] * pick(rng, (2, 2, 3))))
    seed = rng.getrandbits(40)
    dice = type(rng)(seed)
    asked = request(dice)
    state = dice.getstate()
    story = tell_for(dice, asked)
    turns = [(asked.text, story.text)]
    if rng.random() < 0.35 or asked.hero is None:
        again = pick(
            rng,
            (
                "Tell it again, please.",
                "Tell me that story again.",
                "Once more, word for word.",
                "Repeat the story.",
            ),
        )
        return Document("again", chat([*turns, (again, story.text)]))
    while True:
        hero, phrase = asked_hero(rng, rng.random() < 0.5)
        if not held_out(hero.noun, story.thing.noun) and hero.noun not in (
            story.hero.noun,
            story.friend.noun,
            story.troubled.noun,
        ):
            break
    dice.setstate(state)
    if asked.thing:
        asked.thing.met = False
    if friend := asked.tell.get("friend"):
        friend.met = False
    other = tell(dice, hero=hero, thing=asked.thing, taste=story.taste, **asked.tell)
    change = pick(
        rng,
        (
            "Tell it again, but with {}.",
            "Now the same with {}.",
            "Tell it again with {} instead.",
            "Again, with {}.",
        ),
    )
    return Document("again", chat([*turns, (change.format(phrase), other.text)]))


def _continue(rng) -> list[tuple[str, str]]:
    beats = _fresh(rng).beats
    cut = 1 + int(rng.random() * max(1, len(beats) - 3))
    start = pick(
        rng, ("Continue this story: ", "Finish the story: ", "What happens next? ", "Go on: ", "Continue: ")
    )
    return [(start + " ".join(beats[:cut]), " ".join(beats[cut:]))]


def _read(rng) -> list[tuple[str, str]]:
    """A story in the user's own message, and questions about it."""
    story = _fresh(rng)
    asked = questions(rng, story, 1 + int(rng.random() * 4))
    return [(f"{story.text}\n\n{asked[0][0]}", asked[0][1]), *asked[1:]]


def document(rng, kind: str | None = None) -> Document:
    """Draw one document; `kind` is a key of MIX, or None for a draw by MIX's shares."""
    kind = kind or rng.choices(list(MIX), list(MIX.values()))[0]
    if kind == "plain":
        return Document(kind, [], _fresh(rng).text)
    if kind == "again":
        made = _again(rng)
    elif kind == "story":
        made = Document(kind, chat([_story_turn(rng)[1]]))
    elif kind == "talk":
        made = Document(kind, chat(_talk(rng)))
    elif kind == "continue":
        made = Document(kind, chat(_continue(rng)), learn_user=True)
    elif kind == "read":
        made = Document(kind, chat(_read(rng)), learn_user=True)
    elif kind == "repeat":
        made = Document(kind, chat([turn for _ in range(pick(rng, (1, 1, 2, 4))) for turn in repeat(rng)]))
    elif kind == "small":
        made = Document(kind, chat([turn for _ in range(pick(rng, (1, 2, 3))) for turn in small_task(rng)]))
    else:
        made = Document(
            kind,
            chat(
                [t for _ in range(pick(rng, (1, 1, 2))) for t in pick(rng, (greeting, unknown, unknown))(rng)]
            ),
        )
    if made.messages and rng.random() < 0.12:
        made.messages.insert(0, {"role": "system", "content": pick(rng, SYSTEM)})
    return made


__all__ = ["MIX", "THEMES", "Document", "chat", "document", "tell_for"]
