"""Greetings, questions about the storyteller, and polite answers to what it cannot do."""

from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.lexicon import with_article
from tinyvllm.demo.fables.open_words import open_name, open_noun, open_word
from tinyvllm.demo.fables.story import pick
from tinyvllm.demo.fables.template import capital, render

Turn = tuple[str, str]
ABLE = "I can tell you a story about anyone and anything, answer questions about it, and repeat your words."
SYSTEM = ["You are a storyteller.", "You are a kind storyteller who tells short fables.",
    "You are a helpful assistant.",
          "You are a helpful assistant", "You tell stories for children.", "Answer briefly.",
          "You are tinyvllm's demo model.",
          "You are a friendly storyteller. Use the words that the user gives you.", "Be kind and helpful.",
          "You are a wise old owl who tells fables."]  # fmt: skip
TALK = [  # (what users say, as alternatives; what the model answers)
    ("Hello|Hello!|Hi|Hi!|Hey|Hi there|Hello there|Good day|hello|hi|hey there|Greetings|Hiya|Howdy",
     "[Hello!|Hi there!|Good day!] [Would you like to hear a story?|Shall I tell you a fable?|Who shall my story be about?]"),
    ("Good morning|Good morning!|Morning|good morning", "Good morning! It is a fine day for a story."),
    ("Good evening|Good evening!|good evening|Good evening to you",
        "Good evening! It is just the time for a story."),
    ("Good night|Good night.|Good night!|good night|Sleep well",
        "Good night! Sleep well, and dream of foxes."),
    ("Who are you?|What are you?|who are you|Tell me about yourself.|Introduce yourself.|What is your name?|Are you ChatGPT?",
     "I am a very small language model that tells fables. " + ABLE),
    ("What can you do?|Help|help|What can I ask you?|How does this work?|What do you know?|Can you help me?|What now?",
     ABLE + " Try: Tell me a story about a fox who finds a lantern."),
    ("Thank you|Thank you!|Thanks|thanks|Thanks a lot!|Thank you very much.|That was nice.|I liked that.|Great story!|Nice.",
     "[You are welcome!|I am glad that you liked it.] [Shall I tell you another one?|Come back for another story.]"),
    ("How are you?|How are you|How do you do?|Are you well?|how are you?|What's up?",
     "I am well, thank you. [Shall I tell you a story?|Who shall my next story be about?]"),
    ("Goodbye|Goodbye!|Bye|bye|See you|See you later.|Farewell",
        "Goodbye! Come back soon for another story."),
    ("Are you a person?|Are you human?|Are you alive?|Are you a robot?|Are you real?",
     "No, I am a very small language model that tells fables."),
    ("Who made you?|How were you made?|Where do you come from?|How were you trained?",
     "I was trained in a few minutes on fables that a small program made up."),
    ("How old are you?|Where do you live?|Do you like me?|Are you happy?|Do you sleep?|What do you eat?|Tell me a joke.",
     "I only know fables, I am afraid. [Shall I tell you one?|Who shall it be about?]"),
    ("No|No.|no thanks|No, thank you.|Stop|stop|Never mind.|Not now.",
        "That is all right. I am here when you want a story."),
    ("ok|Okay|OK|Fine.|Good.|Cool|I see.|Hm|Wow|?|...|test|Test",
        "[Shall I tell you a story?|Who shall my story be about?]"),
]  # fmt: skip
UNKNOWN = [  # {x} a noun phrase, {X}/{name} a proper name, {w} a word; what the model cannot do
    "What is {x}?", "What is the capital of {X}?", "Who is {X}?", "Who was {X}?", "Where is {X}?",
    "What does {w} mean?",
    "How do I [make|fix|buy|cook|open|clean|sell|find|build|use] {x}?", "Explain {w}.", "Explain {w} to me.",
    "Why is {w} so {w2}?",
    "Translate {w} into {X}.", "Write a [poem|song|letter|program|report|recipe|essay|speech|rap] about {w}.",
    "Define {w}.",
    "Write a [Python|computer|JavaScript] program.", "Write code that sorts a list.", "Who won the {w} game?",
    "What is the weather in {X}?", "What is the weather today?", "Tell me the news.", "Tell me about {X}.",
    "Tell me about {w}.",
    "Tell me [a fact|something] about {x}.", "What time is it?", "What day is it?", "How much does {x} cost?",
    "When was {X} born?",
    "What is the best {w}?", "Is {X} in {Y}?", "Are {w}s {w2}?", "Can you {w}?", "Can you {w} {x}?",
    "Do you know {X}?", "Do you like {w}?",
    "Solve {n} + {m}.", "What is {n} times {m}?", "What is {n} plus {m}?", "Calculate {n} / {m}.",
    "How many {w}s are there in {X}?",
    "Give me a recipe for {w}.", "List three {w}s.", "Summarize {X}.", "Who wrote {X}?", "Draw {x}.",
    "Play {w}.", "Sing {w}.",
    "Which {w} is the {w2}?", "Why?", "How?", "When?", "I am {w}.", "I like {w}.", "I have {x}.",
    "My name is {X}.", "{w}", "{X}", "{w} {w2}",
    "Should I {w} the {w2}?", "What happened in {n}?", "How far is {X} from {Y}?", "Where can I buy {x}?",
    "Let us {w}!", "I need {x}.",
]  # fmt: skip
_COMMON = ("history physics music ball chess science money time love war peace weather cooking math chemistry "
           "politics life art sports movies games computers trains history language reading school work health").split()  # fmt: skip


def greeting(rng) -> list[Turn]:
    """One exchange of small talk."""
    said, answer = pick(rng, TALK)
    words = pick(rng, said.split("|"))
    if words[-1] not in "?." and rng.random() < 0.2:
        name = pick(rng, ("my friend", "there", "storyteller", open_name(rng)))
        words = f"{words.rstrip('!')}, {name}{pick(rng, ('!', '.', ''))}"
    return [(words, render(answer, {}, rng))]


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
