"""Prompts and ids as users give them, checked, and turned into token ids; every refusal is in the user's words."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyvllm.errors import RequestError


def encode_prompt(prompt: Any, tokenizer: Any | None) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of a prompt: text, token ids, {"prompt_token_ids": [...]} or {"prompt": text}.

    Raises RequestError for anything else.
    """
    text = None
    if isinstance(prompt, Mapping):
        if not prompt or set(prompt) - {"prompt_token_ids", "prompt"}:
            raise RequestError(f"a prompt dictionary has the key 'prompt_token_ids' or 'prompt', "
                               f"got {', '.join(map(repr, sorted(prompt, key=str))) or 'none'}")
        text = prompt.get("prompt")
        prompt = text if prompt.get("prompt_token_ids") is None else prompt["prompt_token_ids"]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("this engine has no tokenizer: give the prompt as token ids")
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character or token id")
        return prompt, tokenizer.encode_prompt(prompt)
    if hasattr(prompt, "tolist"):  # a NumPy array; a batch of one, as tokenizers return it, is one prompt
        prompt = prompt.tolist()
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
        raise _not_a_prompt(prompt)
    token_ids = list(prompt)
    if set(map(type, token_ids)) == {int}:
        return text, token_ids
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in token_ids):
        raise _not_a_prompt(prompt if isinstance(prompt, Sequence) else token_ids)
    return text, [int(i) for i in token_ids]


def check_vocabulary(what: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError if an id is none of the model's. what: what the ids are, for the message."""
    bad = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise RequestError(f"{what} {bad} is out of range: this model's vocabulary has the ids 0 to {vocab_size - 1}")


def check_prompt(token_ids: Sequence[int], *, vocab_size: int, max_model_len: int, num_blocks: int,
                 block_size: int) -> None:
    """Raise RequestError for a prompt that is empty, not in the vocabulary, or too long ever to be served."""
    if not token_ids:
        raise RequestError("the prompt is empty: give at least one character or token id")
    check_vocabulary("token id", token_ids, vocab_size)
    if len(token_ids) >= max_model_len:
        raise RequestError(f"the prompt has {len(token_ids)} tokens, and max_model_len={max_model_len} must "
                           "hold the prompt and at least one new token: shorten it or raise max_model_len")
    capacity = num_blocks * block_size
    if len(token_ids) >= capacity:
        raise RequestError(f"the prompt has {len(token_ids)} tokens and the whole KV cache holds {capacity} "
                           f"({num_blocks} blocks of {block_size}), prompt and at least one new token together: "
                           "shorten it or raise num_blocks")


def check_id(request_id: Any, allowed: tuple = (None,)) -> None:
    """Raise RequestError unless it is text that can be sent to a page and written into a file."""
    if request_id in allowed:
        return
    if not isinstance(request_id, str):
        raise RequestError(f"a request id is text, got {type(request_id).__name__}: {str(request_id)[:60]}")
    try:
        request_id.encode()
    except UnicodeEncodeError:
        raise RequestError(f"a request id is valid Unicode, got half of a surrogate pair in {request_id!r}") from None


def _not_a_prompt(prompt: Any) -> RequestError:
    return RequestError(f"a prompt is text, a list of token ids, or {{'prompt_token_ids': [...]}}, "
                        f"got {type(prompt).__name__}: {str(prompt)[:60]}")
