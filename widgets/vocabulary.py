"""Tokens as panels show them: text, bytes, and whether they are special."""

import re
from collections.abc import Iterable
from typing import Any

SPECIAL = re.compile(r"<\|[^|]*\|>|</?s>|<unk>|<pad>")


def tokenizer_of(feed: Any) -> Any | None:
    """The tokenizer of the engine behind a feed; None for a recorded run, and for an engine that has none."""
    return getattr(getattr(feed.source, "llm", None), "tokenizer", None)


def describe_tokens(feed: Any, token_ids: Iterable[int]) -> list[list]:
    """[text, bytes in hexadecimal, is special] of each token.

    The text is None for what nobody knows. Bytes are given only where they are no whole characters ("c3"): then the
    text has U+FFFD in it, and the neighbours hold the rest.
    """
    tokenizer, known = tokenizer_of(feed), {}
    for token_id in token_ids:
        if token_id not in known:
            known[token_id] = _describe(feed, tokenizer, token_id)
    return [known[token_id] for token_id in token_ids]


def spelt(data: bytes) -> list[str]:
    """[text, bytes in hexadecimal] of any bytes; the text has U+FFFD where they are no UTF-8."""
    return [data.decode("utf-8", "replace"), data.hex(" ")]


def _describe(feed: Any, tokenizer: Any | None, token_id: int) -> list:
    if tokenizer is None:
        text = None if feed.source is None else feed.source.token_text(token_id)
        return [text, "", bool(text and SPECIAL.fullmatch(text))]
    if tokenizer.id_to_token(token_id) is None:
        return [None, "", False]
    data = tokenizer.id_to_bytes(token_id)
    text = data.decode("utf-8", "replace")
    is_whole = text.encode() == data
    return [text, "" if is_whole else data.hex(" "), token_id in tokenizer.special_ids]
