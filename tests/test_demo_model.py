"""The embedded demo model keeps its promises: grammar, tokenizer, files, measured scores, and a live
re-check.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvllm.demo import exam
from tinyvllm.demo.extras import MissingExtraError, require
from tinyvllm.demo.fables import lexicon
from tinyvllm.demo.fables.documents import MIX, document, tell_for
from tinyvllm.demo.fables.lexicon import a_or_an
from tinyvllm.demo.fables.requests import request
from tinyvllm.demo.fables.story import cast_character, cast_thing, held_out, tell
from tinyvllm.demo.fables.taste import Taste
from tinyvllm.demo.fables.template import TemplateError, parse, render
from tinyvllm.demo.outside import OUTSIDE_WORDS

MODEL = Path(__file__).parent.parent / "tinyvllm" / "demo" / "model"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def scores() -> dict:
    return json.loads((MODEL / "scores.json").read_text(encoding="utf-8"))


def texts_of(made) -> list[str]:
    return [m["content"] for m in made.messages] or [made.text]


# ---- the grammar ----


def test_the_grammar_is_as_rich_as_promised():
    assert len(lexicon.HEROES) >= 5 * 104
    assert len(lexicon.OBJECTS) >= 5 * 98
    assert len(lexicon.PLACES) >= 5 * 42
    assert sum(map(len, lexicon.PROBLEMS.values())) >= 5 * 32
    assert len(lexicon.PLOTS) >= 5 * 10
    assert sum(map(len, lexicon.MORALS.values())) >= 5 * 40


def test_every_use_has_problems_and_every_theme_has_plots():
    assert set(lexicon.USE_OF.values()) == set(lexicon.PROBLEMS)
    assert all(len(lexicon.PLOTS_OF[theme]) >= 3 and lexicon.MORALS[theme] for theme in lexicon.THEMES)
    assert {plot.theme for plot in lexicon.PLOTS} == set(lexicon.THEMES)


def test_the_same_seed_gives_the_same_documents():
    first = [document(random.Random(seed)) for seed in range(300)]
    assert first == [document(random.Random(seed)) for seed in range(300)]
    assert len({str(made) for made in first}) == 300


def test_no_slot_stays_open_and_sentences_are_well_formed():
    rng = random.Random(1)
    for _ in range(3000):
        text = tell(rng).text
        assert not re.search(r"[{}\[\]|@]|\bNone\b|  | [.,!?]|[.!?,]{2}", text), text
        assert text[0].isupper() and text[-1] in ".!?", text
        assert not re.search(r"[a-z]\. [a-z]", text), text  # a sentence starts with a capital
        assert text.count('"') % 2 == 0, text


def test_every_line_of_every_plot_and_problem_renders_without_a_missing_role():
    rng = random.Random(2)
    for plot in lexicon.PLOTS:
        for _ in range(4):
            told = tell(rng, theme=plot.theme)
            assert told.theme == plot.theme and told.moral in lexicon.MORALS[plot.theme]
    for problem in [p for problems in lexicon.PROBLEMS.values() for p in problems]:
        roles = {
            "k": cast_character(rng, "fox"), "v": cast_character(rng, "hen"), "w": cast_character(rng, "pig"),
            "o": cast_thing(rng),
        }  # fmt: skip
        for template in (problem.short, problem.setup, problem.fail, problem.solve):
            assert "{" not in render(template, roles, rng)
        assert "{o" in problem.solve, problem.short  # it is the object that mends it


def test_documents_of_every_kind_are_whole():
    rng = random.Random(3)
    kinds = set()
    for _ in range(3000):
        made = document(rng)
        kinds.add(made.kind)
        assert all(text.strip() and not re.search(r"[{}]|\bNone\b", text) for text in texts_of(made)), made
        roles = [m["role"] for m in made.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert kinds == set(MIX)


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("owl", "an"), ("fox", "a"), ("hourglass", "an"), ("unicorn", "a"), ("umbrella", "an"),
        ("one-eyed cat", "a"),
     ("ewe", "a"), ("honest man", "an"), ("useful key", "a"), ("old boot", "an"), ("uncle", "an"),
     ("axolotl", "an")],
)  # fmt: skip
def test_a_or_an_follows_the_sound(phrase, article):
    assert a_or_an(phrase) == article


def test_stories_say_a_and_an_rightly():
    rng = random.Random(4)
    soft = ("one-eyed", "unicorn", "ewe", "honest", "hour")
    for _ in range(3000):
        for article, word in re.findall(r"\b([Aa]n?) ([a-z][\w-]*)", tell(rng).text):
            if not word.startswith(soft):
                assert (article.lower() == "an") == (word[0] in "aeiou"), f"{article} {word}"


def test_pronouns_follow_the_character():
    rng = random.Random(5)
    queen, rooster = cast_character(rng, "queen"), cast_character(rng, "rooster")
    assert (queen.form("his", rng), rooster.form("his", rng)) == ("her", "his")
    assert (queen.form("himself", rng), rooster.form("him", rng)) == ("herself", "him")
    assert cast_character(rng, None, "Tilda").gender == "she"
    assert cast_thing(rng, "cookies").form("it", rng) == "them"


def test_what_is_asked_for_is_in_the_story():
    rng = random.Random(6)
    for _ in range(2000):
        asked = request(rng)
        story = tell_for(rng, asked)
        for word in (
            *([asked.hero.noun or asked.hero.name, asked.hero.name or ""] if asked.hero else []),
            *([asked.thing.noun] if asked.thing else []),
        ):
            assert word.lower() in story.text.lower(), (asked.text, story.text)
        if place := asked.tell.get("place"):
            assert place.split()[-1] in story.text, (asked.text, story.text)
        if theme := asked.tell.get("theme"):
            assert story.theme == theme


def test_held_out_pairs_are_never_told_or_asked_for():
    rng = random.Random(7)
    pairs = [(h, o) for h in lexicon.HEROES for o in lexicon.OBJECTS]
    share = sum(held_out(*pair) for pair in pairs) / len(pairs)
    assert 0.04 < share < 0.06
    for _ in range(2000):
        story = tell(rng)
        assert not held_out(story.hero.noun, story.thing.noun)
        asked = request(rng)
        if asked.hero and asked.thing:
            assert not held_out(asked.hero.noun, asked.thing.noun), asked.text


def test_words_of_the_outside_exam_never_occur_in_training_text():
    rng = random.Random(8)
    for _ in range(3000):
        for text in texts_of(document(rng)):
            found = {w for w in re.findall(r"[^\W\d_]+", text.lower()) if w in OUTSIDE_WORDS}
            assert not found, (found, text)
    templates = [*lexicon.HEROES, *lexicon.OBJECTS, *lexicon.PLACES, *sum(lexicon.MORALS.values(), []),
                 *(beat for plot in lexicon.PLOTS for beat in plot.beats)]  # fmt: skip
    assert not OUTSIDE_WORDS & set(re.findall(r"[^\W\d_]+", " ".join(templates).lower()))


def test_wordings_of_the_new_wordings_exam_never_occur_in_training_text():
    rng = random.Random(9)
    asked = " ".join(request(rng).text.lower() for _ in range(5000))
    for part in (
        "the main character be", "my daughter wants", "story time", "now think of", "make me smile",
        "later i noticed", "protagonist", "grandma is visiting", "stumbled over", "my homework",
        "inherited", "bedtime, so",
    ):  # fmt: skip
        assert part not in asked


def test_open_words_enter_a_large_share_of_requests():
    rng = random.Random(10)
    assert 0.35 < sum(request(rng).is_open for _ in range(2000)) / 2000 < 0.55


def test_the_same_dice_and_taste_tell_the_same_story_of_another_hero():
    first = tell(random.Random(11), hero=cast_character(random.Random(0), "fox", "Tilda"))
    again = tell(random.Random(11), hero=cast_character(random.Random(0), "cat", "Rosa"), taste=first.taste)
    assert again.text != first.text
    assert again.text.replace("cat", "fox").replace("Rosa", "Tilda").split()[-12:] == first.text.split()[-12:]
    assert again.trouble.split()[-2:] == first.trouble.split()[-2:]


def test_favorites_depend_on_the_words_of_the_request():
    def favorite(hero: str) -> str:
        rng = random.Random(12)
        drawn = [Taste(hero, "lantern")(rng, "when", lexicon.TIMES["when"]) for _ in range(400)]
        return max(set(drawn), key=drawn.count)

    assert favorite("fox") == favorite("ox")  # the time leans on the last letter
    assert len({favorite(f"zor{letter}") for letter in "abdegklmnorstx"}) >= 6


@pytest.mark.parametrize("template", ["a [b|c", "a {b", "a ] b"])
def test_a_broken_template_is_an_error(template):
    with pytest.raises(TemplateError, match="template"):
        parse(template)


def test_an_unknown_role_is_an_error():
    with pytest.raises(TemplateError, match="no role 'x'"):
        render("{x}", {}, random.Random(0))


def test_a_missing_package_is_named_with_the_way_to_get_it():
    with pytest.raises(MissingExtraError, match=r"'no_such_package'.*pip install -e .*\[train\]"):
        require("no_such_package")


# ---- how answers are marked ----


def test_marks_see_what_is_missing_looping_or_renamed():
    asked = exam.Exam(
        [{"role": "user", "content": "A story about a zorb named Quib and a key."}], ["zorb", "Quib", "key"]
    )
    good = "A zorb named Quib found a key. Then, with a smile, Quib went home and slept until noon."
    assert exam.mark(asked, good, True) == {
        "taken_up": True,
        "ended": True,
        "collapsed": False,
        "names_consistent": True,
    }
    assert not exam.mark(asked, good.replace("zorb", "zorbs"), True)["taken_up"]
    assert exam.mark(asked, good, False)["collapsed"]
    assert exam.mark(asked, "The zorb ran and ran. " * 9, True)["collapsed"]
    assert not exam.mark(asked, good.replace("smile, Quib", "smile, Robert"), True)["names_consistent"]


# ---- the tokenizer ----

TRICKY = [
    "A fox, a lantern.",
    "  spaces  and\n\nlines\n",
    "Łukasz & Zoë: 12345 €",
    "日本語 🦊",
    "don't I'LL we've",
    "",
    "\t",
]


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_without_torch_the_recipe_says_what_to_install(module):
    run = f"runpy.run_module('tinyvllm.demo.{module}', run_name='__main__')"
    code = f"import sys, runpy; sys.modules['torch'] = None; {run}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=MODEL.parents[2])
    assert ended.returncode == 1 and ended.stderr.startswith("The demo model's recipe needs 'torch'"), (
        ended.stderr
    )


@pytest.mark.parametrize("text", TRICKY)
def test_the_tokenizer_gives_back_every_text(text):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_vocabulary_ends_with_llama_3s_special_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    config = json.loads((MODEL / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 2048
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert ids == list(range(2040, 2045))
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids[1], ids[4]] and config["bos_token_id"] == ids[0]


def test_the_chat_template_gives_one_bos_and_what_training_saw():
    transformers = pytest.importorskip("transformers")
    from tinyvllm.demo.tokenizer_recipe import chat_text

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "system", "content": "You are a storyteller."}, {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "A story, please."}]  # fmt: skip
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == chat_text(chat) and text.count(SPECIAL[0]) == 1
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(2040) == 1 and ids[0] == 2040
    assert tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer("Hello").input_ids[0] == 2040  # plain text gets the same one


def test_the_loss_counts_what_the_model_says_and_nothing_else():
    tokenizers = pytest.importorskip("tokenizers")
    from tinyvllm.demo.corpus import NO_LOSS, RowMaker

    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    maker = RowMaker(tokenizer, 3)
    maker._refill()
    rng = random.Random(3)
    for _ in range(50):
        made = document(rng)
        if made.messages and not made.learn_user:
            import numpy as np

            from tinyvllm.demo.corpus import document_tokens
            from tinyvllm.demo.tokenizer_recipe import chat_text

            ids = np.array(tokenizer.encode(chat_text(made.messages), add_special_tokens=False).ids)
            marked = document_tokens(tokenizer, made, ids)
            said = tokenizer.decode([int(i) for i in marked if i < NO_LOSS], skip_special_tokens=False)
            expected = "".join(
                m["content"].strip() + SPECIAL[4] for m in made.messages if m["role"] == "assistant"
            )
            assert said == expected
    rows = RowMaker(tokenizer, 5).rows(4)
    assert rows.shape == (4, 2048) and (rows == RowMaker(tokenizer, 5).rows(4)).all()


# ---- the model's files ----


def test_the_shipped_folder_is_complete_and_at_most_16_mb():
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
             "chat_template.jinja", "scores.json", "train.json", "README.md"}  # fmt: skip
    assert names <= {path.name for path in MODEL.iterdir()}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16_000_000


def test_the_model_is_a_small_llama_3_2_in_bfloat16():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] and config["head_dim"] == 32
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["max_position_embeddings"] >= 1024
    with open(MODEL / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header and len(header) == 2 + 9 * config["num_hidden_layers"]


def test_the_network_that_trains_is_the_one_that_transformers_runs():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tinyvllm.demo.network import TOY, Network, hf_config, hf_names

    torch.manual_seed(0)
    network = Network(TOY)
    with torch.no_grad():  # norms away from one, so that a swap of two would show
        for weight in network.parameters():
            weight.mul_(1 + 0.3 * torch.randn_like(weight))
    config = transformers.LlamaConfig(**{k: v for k, v in hf_config(TOY).items() if k != "torch_dtype"})
    twin = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = twin.load_state_dict(hf_names(network), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ids = torch.randint(0, 2000, (2, 300))
    with torch.no_grad():
        ours = network(ids[:, :-1], ids[:, 1:]).item()
        theirs = torch.nn.functional.cross_entropy(
            twin(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).item()
    assert abs(ours - theirs) < 1e-4


# ---- measured scores, and a live re-check so that the file cannot lie ----


def test_the_measured_scores_keep_the_promises():
    measured = scores()
    assert measured["grammar_pairs"]["chats"] >= 200 and measured["outside_words"]["chats"] >= 200
    assert measured["grammar_pairs"]["taken_up_percent"] >= 95
    assert measured["outside_words"]["taken_up_percent"] >= 80
    for name in ("grammar_pairs", "outside_words"):
        assert measured[name]["ended_by_itself_percent"] >= 99
        assert measured[name]["collapsed_percent"] <= 1
        assert measured[name]["names_consistent_percent"] >= 97
        assert measured[name]["likeness_between_requests"] <= 0.05  # a story of its own for every request
    assert measured["questions"]["exact_percent"] >= 85
    assert measured["repeat_after_me"]["exact_percent"] >= 90
    assert measured["heads_on_random_tokens"]["induction"]["best"] >= 0.5
    assert measured["heads_on_random_tokens"]["previous_token"]["best"] >= 0.5
    assert measured["heads_on_stories"]["previous_token"]["best"] >= 0.5
    assert measured["heads_on_stories"]["open_word_induction"]["best"] >= 0.5


@pytest.fixture(scope="module")
def answerer():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tinyvllm.demo.evaluate import Answerer

    return Answerer(MODEL, "cpu", 12)


def test_live_chats_take_up_the_words_end_and_stay_varied(answerer):
    exams = [*exam.grammar_pairs(6, seed=101), *exam.outside_words(6, seed=102)]
    answers = answerer.answers([e.messages for e in exams])
    marks = [exam.mark(e, text, ended) for e, (text, ended) in zip(exams, answers, strict=True)]
    assert all(m["ended"] and not m["collapsed"] for m in marks), marks
    assert sum(m["taken_up"] for m in marks) >= 10, [
        (e.messages, a) for e, a in zip(exams, answers, strict=True)
    ]


def test_live_answers_to_a_question_a_greeting_and_repeat_after_me(answerer):
    chats = [
        [{"role": "user", "content": "Repeat after me: a blue astronaut and two guitars"}],
        [{"role": "user", "content": "Hello!"}],
        [{"role": "user", "content": "What is the opposite of hot?"}],
    ]
    answers = [text for text, _ in answerer.answers(chats, limit=80)]
    assert answers[0] == "a blue astronaut and two guitars"
    assert "story" in answers[1] or "fable" in answers[1]
    assert answers[2] == "The opposite of hot is cold."


def test_live_heads_match_the_measured_ones(answerer):
    from tinyvllm.demo.probes import random_token_scores

    live, measured = (
        random_token_scores(answerer.model, 2048, sequences=4),
        scores()["heads_on_random_tokens"],
    )
    for name in ("induction", "previous_token"):
        assert live[name]["best"] >= 0.5
        assert abs(live[name]["best"] - measured[name]["best"]) < 0.05
