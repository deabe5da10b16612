"""The wordings of story requests, as templates: {h} the hero, {o} the object, {n} its bare noun, {f} a
friend, {ask} one of ASKS, {finds} one of FINDS, {clause} one of CLAUSES, {w} any word, {x} any name.

Many wordings, also odd ones, so that the model finds hero and object in a sentence that it has never read.
"""

KIND = "[story|story|story|fable|tale|short story|little story|bedtime story|short fable|little tale|funny story|nice story]"
ASKS = [  # sentences that go on with "about ..."; the ones with "?" ask a question
    f"Tell me a {KIND}", f"Tell me a {KIND}", f"Tell me a {KIND}", f"Please tell me a {KIND}",
    f"Tell a {KIND}",
    f"Write a {KIND}", f"Write a {KIND}", f"Write me a {KIND}", f"Please write a {KIND}",
    f"I would like a {KIND}",
    f"I would like to hear a {KIND}", f"I want a {KIND}", f"Give me a {KIND}", f"Make up a {KIND}",
    f"Let me hear a {KIND}",
    f"Invent a {KIND}", f"Can you tell me a {KIND}?", f"Could you tell me a {KIND}?",
    f"Would you tell me a {KIND}?",
    f"A {KIND}", f"Can you write a {KIND}?", f"Do you know a {KIND}?", f"How about a {KIND}?",
    f"Hello! Tell me a {KIND}",
    f"Hi, please tell me a {KIND}", f"I'd love a {KIND}", f"One {KIND}, please,", f"Create a {KIND}",
    f"Now a {KIND}",
    f"We need a {KIND}", f"Read me a {KIND}", f"May I have a {KIND}?", f"Will you tell us a {KIND}?",
    f"Compose a {KIND}",
    f"Entertain me with a {KIND}", f"My son asks for a {KIND}", f"Time for a {KIND}",
    f"The children want a {KIND}",
    f"Tell us a {KIND}", f"Please make a {KIND}", f"I am in the mood for a {KIND}", f"Try to write a {KIND}",
]  # fmt: skip
FINDS = {
    "found": "[who finds|who finds|who finds|that finds|who found|who discovers|who comes across|finding|who picks up]",
    "given": "[who is given|who gets|who receives|who gets a present,]",
    "bought": "[who buys|who bought|who goes shopping and buys]",
    "made": "[who makes|who builds|who made]",
}
CLAUSES = [  # what else people say about a hero
    "who is afraid of the dark", "who wants a friend", "who cannot sleep", "who lives on the moon",
    "who is always late",
    "who loves to sing", "who has no friends", "who wants to fly", "who lost the way", "who likes to {w}",
    "who never {w}s",
    "who lives in {x}", "that dreams of the sea", "who wants to be brave", "who is too small", "who can talk",
    "from {x}",
    "that is very hungry", "who learns to swim", "with a big heart", "in love", "who works too much",
    "who hates {w}",
    "who wants to see the world", "with a {w}", "who goes to school", "who is lonely",
    "who must {w} every day",
]  # fmt: skip
BOTH = [
    *["{ask} about {h} {finds} {o}"] * 5, *["{ask} about {h} and {o}"] * 6, *["{ask} with {h} and {o}"] * 2,
    "{ask} about {h} with {o}", "{ask} about {h} {finds} {o} {place}", "{ask} about {h} and {o} {place}",
    "{ask} about {h} {finds} {o} that teaches {theme}", "{ask} about {theme}, with {h} and {o}",
    "{ask} about {h}, {f} and {o}", "{ask} about {h} and {f} who find {o}",
    "{ask} about {h} who meets {f} and finds {o}",
    "{ask} in which {h} finds {o}", "{ask}. The hero is {h}. There should be {o} in it",
    "{ask}. It should be about {h} and {o}",
    "{H} finds {o}. [Tell me the story|What happens next?|Tell me more]",
    "{H} and {o}", "{H}, {o}", "Hero: {h}. Object: {o}", "{h} + {o}", "story: {h}, {o}",
    "{ask} about {o} and {h}",
    "{ask} about how {h} found {o}", "{ask} where {h} finds {o}", "{ask} about {h} who has {o}",
    "{ask} about {h} who lost {o}", "{ask} about {h} and the lost {n}", "{ask} about {h} and the {n}",
    "{ask} about {h} {clause} and finds {o}", "{ask} about {h} {clause}, and about {o}",
    "{ask} about {h}, {o} and {theme}",
    "{ask}. The hero [is|should be|must be] {h}, and {o} [is|should be|must be] in it",
    "{ask}. Use {h} and {o}",
    "{ask}. The hero's part goes to {h}. Do not forget {o}", "{ask}. There are {h} and {o} in it",
    "{ask}! {H} and {o}!",
    "{ask}. I want {h} in it, and {o}", "What happens when {h} finds {o}?", "What would {h} do with {o}?",
    "Imagine {h} and {o}. [What happens?|Tell me the story.|Go on.]",
    "Suppose {h} finds {o}. [What then?|Tell me about it.]",
    "Words: {h}, {o}", "Topic: {h} and {o}", "Characters: {h}, {f}. Thing: {o}",
    "Who: {h}. What: {o}. Where: {place}",
    "I saw {h} with {o} [today|yesterday|in {x}]. {ask} about that",
    "I have an idea for a story: {h} finds {o}",
    "{ask} for my [son|girl|friend|class|mother]. [The hero is|It is about] {h}, and [there is|it needs] {o}",
    "There was once {h} who had {o}. [Go on|Tell me the rest]", "{ask} that has {h} and {o} in it",
    "{ask} [containing|including|featuring|using] {h} and {o}", "Let {h} find {o} and tell me what happens",
    "Let us talk about {h} and {o}. {ask}", "I am thinking of {h}. It has {o}. {ask}",
    "{ask} from these words: {h}, {o}",
    "{ask} about {o}. It belongs to {h}", "{ask} about {o} that {h} finds {place}",
    "{H} is looking for {o}. {ask} about it",
    "[My son|Grandma|The class|{X}] wants {h} and {o}. {ask}", "This time: {h} and {o}",
    "First {h}, then {o}: {ask}",
    "{ask}, one with {h} and one {n}", "{H} meets {f}. Then {o} turns up. {ask}",
    "Can you do something with {h} and {o}?",
]  # fmt: skip
HERO_ONLY = [
    *["{ask} about {h}"] * 5, "{ask} with {h}", "{ask} about {h} {place}", "{ask} about {h} and {f}",
    "{ask} about {h} and {f}",
    "{ask} about {h} that teaches {theme}", "{H}", "{ask} for my friend. It should be about {h}",
    "{ask} about {h} {clause}",
    "{ask} about {h} {clause}", "{ask} about {theme}, with {h} and {f}", "{ask}. The hero is {h}",
    "Imagine {h}. {ask}",
    "Who was {h}? {ask} about that", "{ask} about {theme} and {h}", "What does {h} do all day? {ask}",
    "{ask}. {H}, please",
]  # fmt: skip
THING_ONLY = [
    *["{ask} about {o}"] * 3, "{ask} with {o} in it", "{ask} about {o} {place}", "{ask} about the {n}",
    "Somebody finds {o}. {ask}",
    "{ask} about somebody who finds {o}", "{ask}. Put {o} in it", "{O}", "{ask} about {theme} and {o}",
]  # fmt: skip
NEITHER = ["{ask}", "{ask}", "{ask} about {theme}", "{ask} that teaches {theme}", "{ask} {place}",
    "{ask} about {f}",
           "{ask} for bedtime", "{ask}, any story"]  # fmt: skip
BEFORE = [  # said before the request; nothing of it belongs in the story
    "It is raining outside.", "I cannot sleep.", "My son loves stories.", "We have five minutes.",
    "I am bored.", "Good evening.",
    "It is my birthday.", "Listen.", "I have an idea.", "Okay,", "So,", "{X} is here.", "I had a {w} day.",
    "I like {w}.", "Hey.",
    "You are a storyteller.", "Last night I dreamed of {w}.", "We were in {x} today.", "School was {w}.",
    "Be so kind.", "Well,",
    "I am {x}.", "My name is {x}.", "It is late.", "Thank you for coming.", "I need your help.",
    "Let us begin.", "Once more.",
    "I know that you are small, but try this.", "The {w} is {w}.",
]  # fmt: skip
AFTER = [
    "Thank you!", "Thanks.", "Make it nice.", "It should be short.", "With a happy ending.", "If you can.",
    "For my class.",
    "Before I go to bed.", "Take your time.", "I am {x}, by the way.", "Do not make it too sad.",
    "My {w} will like it.",
    "In a few sentences, please.", "It is for {x}.", "I am listening.", "Can you do that?",
    "Would you do that for me?", "Go.",
    "It may be {w}.", "We will read it in {x}.",
]  # fmt: skip

# Loose requests: one sentence brings the hero, another the object, a third asks. Any verb may be a word that
# nobody knows ({v} is now and then an open word), so that the model looks for the hero and the object, not
# for fixed phrases.
VERBS = (
    "saw|heard of|drew|dreamed of|like|love|know|remember|wish for|talked about|played with|imagined|painted|want|need|"
    "chose|picked|asked for|suggested|found|sang of|read about|wrote about|spoke of|looked at|laughed about|collect|visited|"
    "greeted|waited for|missed|described|bought|carried|hid|lost|sold|caught|thanked|followed"
).split("|")
SUBJECTS = (
    "I|I|I|we|my son|grandpa|the teacher|somebody|the children|everyone|my brother|you|they|my aunt|a friend of mine|"
    "our class|the baby|people"
).split("|")
WHEN = (
    "today|once|last night|on Monday|at school|a while ago|this morning|in the park|on the bus|in my dream|at noon|"
    "last week|in the evening|every day|sometimes|often|at home|on the way"
).split("|")
HERO_SENTENCES = [
    "{S} {v} {h}.", "{S} {v} {h} {t}.", "{T} {s} {v} {h}.", "{V} {h}.", "Now {v} {h}.", "Please {v} {h}.",
    "Take {h}.",
    "Start with {h}.", "Pick {h} as the hero.", "Make {h} the hero.", "Let the hero be {h}.", "Let it be {h}.",
    "Choose {h} for the lead.", "The leading part: {h}.", "The star is {h}.", "{H} is my favorite.", "{H} comes first.",
    "{H}!", "There is {h}.", "It begins with {h}.", "Give the first part to {h}.", "Let the {w} be {h}.", "The {w} {w} is {h}.",
    "My {w} is {h}.", "Say hello to {h}.", "Here is {h}.", "This is about {h}.", "Who is it about? {H}.", "I {v} you to {v} {h}.",
]  # fmt: skip
THING_SENTENCES = [
    "{S} {v} {o}.", "{S} {v} {o} {t}.", "{T} {s} {v} {o}.", "{V} {o}.", "Then {v} {o}.", "Also {o}.", "Add {o}.", "Include {o}.",
    "It needs {o}.", "Put {o} in.", "Do not leave out {o}.", "{O} must come up.", "There should be {o}.", "Let there be {o}.",
    "Let {o} appear.", "And {o}!", "{O} too.", "Then comes {o}.", "Let the {w} be {o}.", "The {w} is {o}.", "It has {o}.",
    "Beside it lies {o}.", "Bring in {o}.", "And let {o} be in it as well.", "With {o}, please.", "It ends with {o}.",
]  # fmt: skip
BOTH_SENTENCES = [
    "{S} {v} {h} and {o}.", "{S} {v} {h} and {o} {t}.", "{T} {s} {v} {h} and {o}.", "{V} {h} and {o}.", "{H} and {o}!",
    "{H} with {o}.", "{S} {v} {h}, and {s} {v} {o}.", "{S} {v} {h}, and then {o}.", "Let the {w} be {h}, and let {o} be there.",
    "{S} {v} to {v} about {h} and {o}.", "{V} me with {h} and {o}.", "{W} {w}! Now: {h} and {o}!", "Make {h} the hero, and add {o}.",
    "{T}: {h} and {o}.", "Use {h} as the {w} and {o} as the {w}.", "{S} {v} {h} because of {o}.", "{H}, and also {o}.",
]  # fmt: skip
LOOSE_ASKS = [
    "{ask}.", "{ask} about that.", "{ask} of that.", "{ask} with both.", "Can you [make|write|tell|spin|{v}] [a story|something|a fable]"
    " [of|from|out of|about|with] [that|it|these|them|both]?", "What story is [there|in that|in it]?", "Turn it into a story.",
    "Write that down as a story.", "Your turn.", "Go.", "Tell me.", "Make it a story.", "What happens?", "What was that about?",
    "Can you {v} a story?", "Could you [write|tell|make] something?", "What is the story?", "{V} me a story.", "What do you make of it?",
    "I am listening.", "How does it go?", "Will you {v} it for [me|us|her|him]?", "Now tell it.", "", "",
]  # fmt: skip
