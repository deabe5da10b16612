"""Tokenizer and chat template: one beginning of sequence, the model's own format, errors in the user's "
"words."""

import json
import re
from datetime import datetime

import pytest

from tests.model_files import CHAT_TEMPLATE, special_token_ids, tiny_tokenizer, write_tiny_tokenizer
from tests.text_tokenizers import TOKENIZERS
from tinyvllm.errors import ModelNotFoundError, RequestError, TokenizerError
from tinyvllm.text.chat_template import ChatTemplate
from tinyvllm.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello, fox!"}]
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Who lives here?"},
    {"role": "assistant", "content": "An owl."},
    {"role": "user", "content": "😀 & <b>"},
]
IDS = special_token_ids()
BOS = IDS["<|begin_of_text|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


def settings_of(folder, **changes):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))
    return folder


# ---- text and ids ----


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode("The fox found a lantern. 😀")
    assert ids[0] == BOS == tokenizer.bos_token_id and ids.count(BOS) == 1
    assert tokenizer.encode("The fox found a lantern. 😀", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "The fox found a lantern. 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<|begin_of_text|>The")
    assert tokenizer.decode([]) == "" and tokenizer.decode([10**6]) == ""


def test_ids_tokens_and_bytes(tokenizer):
    i = tokenizer.token_to_id("\u0120fox")
    assert (tokenizer.id_to_token(i), tokenizer.id_to_bytes(i)) == ("\u0120fox", b" fox")
    assert tokenizer.id_to_token(10**6) is None and tokenizer.token_to_id("no such token") is None
    assert tokenizer.vocab_size == 384 and tokenizer.special_ids == set(IDS.values())
    assert tokenizer.eos_token_id == IDS["<|eot_id|>"]


def test_special_tokens_may_be_written_as_objects_or_be_absent(tmp_path):
    folder = settings_of(
        write_tiny_tokenizer(tmp_path), bos_token={"content": "<|begin_of_text|>"}, eos_token=None
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == BOS and tokenizer.eos_token_id is None


def test_settings_of_a_training_run_do_not_cut_or_pad(tmp_path):
    library = tiny_tokenizer()
    library.enable_truncation(4)
    library.enable_padding(length=50)
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("abcdefgh")
    assert tokenizer.decode(ids) == "abcdefgh" and 4 < len(ids) <= 9


def test_a_prompt_gets_exactly_one_beginning_of_sequence(tokenizer):
    for text in ("Hello", "", "<|begin_of_text|>Hello", "<|begin_of_text|>", tokenizer.render_chat(HELLO)):
        ids = tokenizer.encode_prompt(text)
        assert ids[0] == BOS and ids.count(BOS) == 1


def test_one_beginning_of_sequence_also_when_only_tokenizer_json_knows_it(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_token_id is None and tokenizer.chat_template is None
    assert tokenizer.encode_prompt("<|begin_of_text|>Hello") == tokenizer.encode_prompt("Hello")


def test_a_sentencepiece_prompt_gets_one_too():
    tokenizer = Tokenizer(TOKENIZERS["sentencepiece"]())
    for text in ("the fox", "<s>the fox"):
        assert tokenizer.encode_prompt(text)[0] == 1 and tokenizer.encode_prompt(text).count(1) == 1


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(RequestError, match="not valid Unicode: it has a lone surrogate at character 2"):
        tokenizer.encode_prompt("ab\ud800c")


def test_a_tokenizer_of_another_model_is_noticed(tokenizer):
    tokenizer.check_fits(384)
    with pytest.raises(
        TokenizerError, match="makes token ids up to 383, but the model has only 383 embeddings"
    ):
        tokenizer.check_fits(383)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer\.json: text cannot be encoded"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.model, which is there, is another format"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_must_exist(tmp_path):
    write_tiny_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"says that bos_token is '<s>', which .* does not have"):
        Tokenizer.from_folder(settings_of(tmp_path, bos_token="<s>"))
    with pytest.raises(TokenizerError, match="bos_token must be text, got 3"):
        Tokenizer.from_folder(settings_of(tmp_path, bos_token=3))


# ---- chat ----


def test_a_conversation_in_the_models_format(tokenizer):
    text = tokenizer.render_chat(CHAT, date_string="1 Jan 2026")
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 1 Jan 2026\n\nBe "
        "brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho lives "
        "here?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAn "
        "owl.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n😀 & "
        "<b><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.render_chat(CHAT, add_generation_prompt=False, date_string="x").endswith("<b><|eot_id|>")


def test_a_chat_has_exactly_one_beginning_of_sequence(tokenizer):
    ids = tokenizer.apply_chat_template(HELLO, date_string="1 Jan 2026")
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert ids == tokenizer.encode_prompt(tokenizer.render_chat(HELLO, date_string="1 Jan 2026"))
    assert ids.count(IDS["<|eot_id|>"]) == 2 and ids.count(IDS["<|end_header_id|>"]) == 3


def test_the_date_is_todays_or_the_given_one(tokenizer):
    assert datetime.now().strftime("%Y") in tokenizer.render_chat(HELLO)
    template = ChatTemplate(CHAT_TEMPLATE, {"bos_token": ""}, now=lambda: datetime(2024, 7, 26))
    assert "Today: 26 Jul 2024\n" in template.render(HELLO)
    assert "Today: Monday\n" in template.render(HELLO, date_string="Monday")


def test_the_template_file_wins_over_the_settings(tmp_path):
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}from the file é", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).render_chat(HELLO) == "<|begin_of_text|>from the file é"


def test_the_default_of_named_templates_counts(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_tiny_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer.from_folder(folder).render_chat(HELLO) == "plain"
    with pytest.raises(TokenizerError, match=r"of the chat templates \(tool_use\), none is 'default'"):
        Tokenizer.from_folder(settings_of(folder, chat_template=named[:1]))
    with pytest.raises(TokenizerError, match="chat_template must be text, got int"):
        Tokenizer.from_folder(settings_of(folder, chat_template=3))


def test_what_templates_expect_of_their_surroundings():
    def render(source, **variables):
        return ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO, **variables)

    assert render("{{ bos_token }}{{ messages[0]['content'] }}") == "<s>Hello, fox!"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"  # trim_blocks, lstrip_blocks
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'  # no HTML escapes
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ messages | length }}{% endgeneration %}c") == "ab1c"
    assert render("{{ tools is none and documents is none }}") == "True"
    assert render("{% if add_generation_prompt %}go{% endif %}", add_generation_prompt=False) == ""
    assert render("{{ strftime_now('%d') }}") == datetime.now().strftime("%d")
    assert render("{{ style }}", style="loud") == "loud"


def test_a_template_with_a_syntax_error_is_refused_with_its_line(tmp_path):
    folder = write_tiny_tokenizer(
        tmp_path, chat_template="{{ bos_token }}\n{% for m in messages %}\n{{ m.role }\n{% endfor %}"
    )
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_folder(folder)
    assert "tokenizer_config.json: the template has a syntax error in line 3:" in str(error.value)
    assert str(error.value).endswith("{{ m.role }")
    (tmp_path / "chat_template.jinja").write_text("{% endfor %}")
    with pytest.raises(
        TokenizerError, match=r"chat_template\.jinja: the template has a syntax error in line 1: .*endfor"
    ):
        Tokenizer.from_folder(folder)


FAILING = {
    "an attribute that is not there": ("\n{{ messages[0].who.name }}", "failed in line 2: UndefinedError"),
    "a write": ("{% set _ = messages.append(1) %}", "failed in line 1: SecurityError"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "a type error": ("{{ 1 + 'a' }}", "failed in line 1: TypeError"),
    "an endless range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_a_tokenizer_error(name):
    source, message = FAILING[name]
    template = ChatTemplate(source, origin="x.jinja")
    with pytest.raises(TokenizerError, match=f"^x.jinja.*{message}"):
        template.render(HELLO)


def test_a_template_that_refuses_the_messages_is_a_request_error(tokenizer):
    with pytest.raises(
        RequestError, match="refuses these messages: Only user and assistant turns may follow"
    ):
        tokenizer.render_chat([*HELLO, {"role": "system", "content": "late"}])


def test_a_variable_that_the_template_ignores_is_refused(tokenizer):
    with pytest.raises(RequestError, match="does not use 'mood', so it would have no effect"):
        tokenizer.render_chat(HELLO, mood="good")
    with pytest.raises(RequestError, match="does not use 'date_string'"):
        ChatTemplate("{{ messages }}").render(HELLO, date_string="today")


def test_a_model_without_a_template_cannot_chat(tmp_path):
    tokenizer = Tokenizer.from_folder(write_tiny_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(
        TokenizerError, match=r"has no chat template .*: it cannot chat; give a plain prompt to generate"
    ):
        tokenizer.apply_chat_template(HELLO)


BAD_MESSAGES = [
    ("Hello", "messages must be a list such as [{"),
    ({"role": "user", "content": "x"}, "messages must be a list"),
    (None, "got NoneType None"),
    ([], "messages is empty"),
    (["Hello"], "message 0 must be a dictionary with 'role' and 'content', got str 'Hello'"),
    ([{"content": "x"}], "message 0 has no 'role': it is one of 'system'"),
    ([*HELLO, {"role": "usr", "content": "x"}], "message 1 has the role 'usr': it must be one of 'system', "),
    ([{"role": ["user"], "content": "x"}], "message 0 has the role ['user']"),
    ([{"role": "user"}], "message 0 (user) has no 'content': give its text"),
    ([{"role": "user", "content": None}], "(user) must have text as its content, got NoneType None"),
    ([{"role": "user", "content": 3}], "must have text as its content, got int 3"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "a content part that is not text"),
    ([{"role": "user", "content": [{"type": "text"}]}], "a content part that is not text"),
]  # fmt: skip


@pytest.mark.parametrize("messages, message", BAD_MESSAGES, ids=[message[:40] for _, message in BAD_MESSAGES])
def test_wrong_messages_are_refused_in_the_users_words(tokenizer, messages, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        tokenizer.render_chat(messages)


def test_text_parts_are_joined_and_the_callers_messages_left_alone(tokenizer):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "fox!"}]}
    ]
    assert tokenizer.render_chat(parts, date_string="x") == tokenizer.render_chat(HELLO, date_string="x")
    assert isinstance(parts[0]["content"], list)


def test_other_keys_reach_the_template():
    template = ChatTemplate(
        "{{ messages[0].name }}{{ messages[1].tool_calls[0].f }}{{ messages[1].content is none }}"
    )
    calls = {"role": "assistant", "tool_calls": [{"f": "g"}]}
    assert template.render([{**HELLO[0], "name": "Ann"}, calls]) == "AnngTrue"


# ---- parity ----


def test_transformers_agrees_on_ids_text_and_chat(tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    write_tiny_tokenizer(tmp_path)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The quick otter, it's 12345!\n\n  x", "😀é\u0301 <|eot_id|> end", "", " "):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for messages in (HELLO, CHAT):
        for add in (True, False):
            options = {"add_generation_prompt": add, "date_string": "1 Jan 2026"}
            assert ours.render_chat(messages, **options) == theirs.apply_chat_template(
                messages, tokenize=False, **options
            )
            assert ours.apply_chat_template(messages, **options) == list(
                theirs.apply_chat_template(messages, return_dict=False, **options)
            )
