"""Text to token ids and back, and conversations to prompts: tokenizer.json with the model's chat template."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tinyvllm.errors import ModelNotFoundError, RequestError, TokenizerError
from tinyvllm.loader.json_file import read_json_object, refuse_dangling_link
from tinyvllm.text.bpe_steps import BpeSteps
from tinyvllm.text.chat_template import ChatTemplate, read_chat_template
from tinyvllm.text.detokenizer import IncrementalDetokenizer
from tinyvllm.text.token_bytes import TokenBytes

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer and chat template.

    tokenizer: of the `tokenizers` library, which does the work. special_tokens: {"bos_token":
    "<|begin_of_text|>", ...}, as tokenizer_config.json names them. chat_template: None if the model has none.
    origin: the file that it comes from, for messages. token_bytes: token id -> bytes. Raises TokenizerError.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        origin: str = TOKENIZER_FILE,
    ):
        tokenizer.no_padding()  # tokenizer.json may carry the settings of a training run
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.origin = origin
        self.token_bytes = TokenBytes(tokenizer, origin)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        # What tokenizer.json puts before every text: the BOS, for a model that has one.
        before = tokenizer.encode("", add_special_tokens=True).ids
        self._first_token = tokenizer.id_to_token(before[0]) if before else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json (if there) and the chat template of a model folder.

        Raises ModelNotFoundError without a tokenizer.json, TokenizerError if something in them is broken.
        """
        folder = Path(folder)
        for name in (TOKENIZER_FILE, SETTINGS_FILE):
            refuse_dangling_link(folder / name)
        tokenizer = _read_tokenizer(folder / TOKENIZER_FILE)
        settings_path = folder / SETTINGS_FILE
        settings = read_json_object(settings_path, TokenizerError) if settings_path.is_file() else {}
        special_tokens = _special_tokens(settings_path, settings)
        chat_template = None
        if (template := read_chat_template(folder, settings)) is not None:
            source, origin = template
            chat_template = ChatTemplate(source, special_tokens, origin)
        return cls(tokenizer, special_tokens, chat_template, origin=str(folder / TOKENIZER_FILE))

    # ---- text and ids ----

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens marked special, such as <|eot_id|>: they are not text."""
        return self.token_bytes.special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. add_special_tokens: with those that tokenizer.json puts around it, the BOS.

        Raises RequestError if the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as problem:  # half of a surrogate pair: a str may have it, UTF-8 may not
            raise RequestError(
                f"the text is not valid Unicode: it has a lone surrogate at character {problem.start}"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with exactly one BOS if the model has one.

        A text that already begins with the BOS token, as a rendered chat template does, gets no second one.
        """
        begun = self._first_token is not None and text.startswith(self._first_token)
        return self.encode(text, add_special_tokens=not begun)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the tokenizer does not have add nothing."""
        return self._tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token ("Ġfox"), or None if there is no such id."""
        return self._tokenizer.id_to_token(int(token_id))

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (b" fox"); they need not be whole characters."""
        return self.token_bytes(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, or None."""
        return self._tokenizer.token_to_id(token)

    def incremental_detokenizer(
        self, stop: str | Sequence[str] = (), **options: Any
    ) -> IncrementalDetokenizer:
        """A detokenizer for one request; options as in IncrementalDetokenizer."""
        return IncrementalDetokenizer(self, stop, **options)

    @cached_property
    def bpe_steps(self) -> BpeSteps:
        """How it merges bytes into tokens, step by step. Raises TokenizerError if it is not byte-level BPE."""
        return BpeSteps(self._tokenizer, self.origin)

    def check_fits(self, vocab_size: int) -> None:
        """Raise TokenizerError if this tokenizer makes ids that a model of `vocab_size` embeddings lacks."""
        base = self._tokenizer.get_vocab_size(with_added_tokens=False)
        largest = max(base - 1, *self._tokenizer.get_added_tokens_decoder(), -1)
        if largest >= vocab_size:
            raise TokenizerError(
                f"{self.origin} makes token ids up to {largest}, but the model has only {vocab_size} "
                "embeddings: the tokenizer belongs to another model"
            )

    # ---- chat ----

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation; options as in ChatTemplate.render. BOS included."""
        if self.chat_template is None:
            raise TokenizerError(
                "this model has no chat template (neither chat_template.jinja nor a chat_template in "
                f"{SETTINGS_FILE} in {Path(self.origin).parent}): it cannot chat; give a plain prompt to "
                "generate() instead"
            )
        return self.chat_template.render(messages, **options)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt's token ids of a conversation. The template writes the BOS, so encoding adds none."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    # ---- details ----

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{SETTINGS_FILE} says that {name} is {token!r}, which {self.origin} does not have"
            )
        return token_id


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        hint = ""
        if (path.parent / "tokenizer.model").is_file():
            hint = (
                ". (tokenizer.model, which is there, is another format: transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) converts it)"
            )
        raise ModelNotFoundError(
            f"{path.parent} has no {TOKENIZER_FILE}: text cannot be encoded without it. Download it with the "
            f"model{hint}"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises plain Exception
        raise TokenizerError(f"{path} is not a valid tokenizer: {problem}") from None


def _special_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": text, ...}: each is written as a text or as {"content": text, ...}."""
    found = {}
    for name in _NAMED_TOKENS:
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise TokenizerError(f"{path}: {name} must be text, got {value!r}")
        found[name] = value
    return found
