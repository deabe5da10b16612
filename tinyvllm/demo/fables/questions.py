"""Short questions about a story just told, with the answers that its facts give."""

from tinyvllm.demo.fables.lexicon import HEROES, OBJECTS, with_article
from tinyvllm.demo.fables.story import Story, pick
from tinyvllm.demo.fables.template import capital, render

Turn = tuple[str, str]


def _scene(story: Story) -> dict[str, str]:
    hero, thing = story.hero, story.thing
    noun = hero.noun or hero.name
    return {
        "h": hero.definite(), "hn": f"the {hero.noun}" if hero.noun else hero.name, "noun": noun,
        "ha": with_article(hero.noun) if hero.noun else hero.name, "name": hero.name or "",
        "o": f"the {thing.noun}",
        "oa": thing.indefinite(), "tool": f"the {story.helper_thing.noun}", "place": story.place,
        "v": story.troubled.definite(), "k": story.helper.definite(), "trouble": story.trouble,
        "moral": story.moral,
        "trait": hero.adjective, "was": "were" if thing.plural else "was", "weather": story.weather_answer,
        "twas": "were" if story.helper_thing.plural else "was", "it": "them" if thing.plural else "it",
    }  # fmt: skip


_ALWAYS = [
    ("Who found {o}?", "{H} found {o}."), ("What did {h} find?", "{H} found {oa}."),
    ("What did {hn} find?", "{H} found {oa}."), ("Where {was} {o}?", "{O} {was} {place}."),
    ("Where did {h} find {o}?", "{H} found {it} {place}."), ("Who needed help?", "{V} needed help."),
    ("Who was in trouble?", "{V} was in trouble."), ("Who helped?", "{K} helped."),
    ("Who helped {v}?", "{K} helped {v}."),
    ("What went wrong?", "{Trouble}."), ("What was the problem?", "{Trouble}."),
    ("[What is the moral?|What is the moral of the story?|What do we learn?|What is the lesson?]", "{Moral}"),
    ("What helped {v}?", "{Tool} {twas} what helped {v}."), ("What did {k} use?", "{K} used {tool}."),
    ("[What was the weather like?|How was the weather?]", "{Weather}"),
    ("[Who is the story about?|Who is the hero?|Who was the hero of the story?]", "{who}"),
    ("[Sum up the story in one sentence.|What happened, in one sentence?|Give me a summary.]",
     "{H} found {oa}, and when {trouble}, {k} helped with {tool}."),
    ("[Give the story a title.|What is a good title?|What is the story called?]", "{Hn} and {o}"),
]  # fmt: skip


def questions(rng, story: Story, count: int) -> list[Turn]:
    """Up to `count` pairs (question, answer) about `story`, no question twice."""
    scene = _scene(story)
    options = list(_ALWAYS)
    if story.hero.name and story.hero.noun:
        scene["who"] = "It is about {ha} named {name}."
        options += [
            ("What was the name of {hn}?", "{Hn} was named {name}."),
            ("Who is {name}?", "{name} is {ha}."),
        ]
    else:
        scene["who"] = "It is about {ha}."
    scene["who"] = render(scene["who"], scene, rng)
    if story.hero.adjective and story.hero.noun:
        options.append(("[What was {hn} like?|How was {hn}?]", "{Hn} was {trait}."))
    other_thing, other_hero = pick(rng, OBJECTS), pick(rng, HEROES)
    if other_thing != story.thing.noun:
        scene["x"] = with_article(other_thing)
        options += 2 * [
            ("Did {h} find {x}?", "No, {h} found {oa}."),
            ("Did {h} find {oa}?", "Yes, {h} found {oa}."),
        ]
    if other_hero not in (story.hero.noun, story.friend.noun, story.troubled.noun):
        scene["y"] = with_article(other_hero)
        options += 2 * [
            ("Is the story about {y}?", "No, it is about {ha}."),
            ("Is the story about {ha}?", "Yes, it is about {ha}."),
        ]
    asked = []
    for _ in range(count):
        question, answer = options.pop(int(rng.random() * len(options)))
        question = capital(render(question, scene, rng))
        if question not in [q for q, _ in asked]:
            asked.append((question, capital(render(answer, scene, rng))))
    return asked
