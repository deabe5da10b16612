"""The bytes that each token stands for: what makes decoding a stream simple.

A token is a piece of a byte string and need not end between two characters, so text can only be made by
joining bytes first and reading UTF-8 then. Vocabularies spell those bytes in one of two ways:

    byte-level BPE (GPT-2, Llama 3)     every byte has a printable stand-in character: "Ġfox" is b" fox"
    SentencePiece style (Llama 2)       plain text with "▁" for a space, and "<0xE2>" for a single byte

A SentencePiece vocabulary also has its own idea of the first token of a text: it loses its leading space,
which encoding had put there.
"""

import json
import re
from typing import Any

import tokenizers

from tinyvllm.errors import TokenizerError

_SPACE = "\u2581"  # "▁", SentencePiece's space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """{stand-in character: byte} of byte-level BPE (Radford et al., GPT-2, 2019).

    Bytes that print as one visible Latin-1 character stand for themselves; the others, in order, are the code
    points from 256 on. So the space, byte 32, is "Ġ".
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """Token id -> bytes, for one tokenizer. Raises TokenizerError if its decoder is of another kind.

    special_ids: ids of the tokens that are marked special (<|eot_id|> and the like).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "tokenizer.json"):
        self._tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        self.special_ids = frozenset(
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._read_decoder(
            json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None, origin
        )

    def __call__(self, token_id: int, first: bool = False) -> bytes:
        """The bytes of a token; b"" for an id that the tokenizer does not have.

        first: it begins a text, where SentencePiece drops one leading space.
        """
        token_id = int(token_id)
        data = self._cache.get(token_id)
        if data is None:
            token = self._tokenizer.id_to_token(token_id)
            data = self._cache[token_id] = b"" if token is None else self._encode(token)
        if not first or self._lstrip is None:
            return data
        if self._lstrip == "one space":
            return data.removeprefix(b" ")
        token = self._tokenizer.id_to_token(token_id) or ""
        return token.replace(_SPACE, "").encode() if _SPACE in token else data

    def _encode(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(_ALPHABET[character] for character in token)
            except KeyError:  # a token that was added as plain text: "<a b>" has no stand-in for its space
                return token.encode()
        if self._byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(_SPACE, " ").encode()

    def _read_decoder(self, decoder: dict[str, Any] | None, origin: str) -> None:
        """Recognise the decoder section of tokenizer.json; sets _byte_level, _byte_fallback and _lstrip."""
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        self._byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self._lstrip: str | None = None
        if self._byte_level:
            return
        if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]) and steps[-1]["replacement"] == _SPACE:
            # This decoder drops every leading "▁" of the first token, and not just one.
            self._lstrip = None if steps[-1].get("prepend_scheme") == "never" else "all of the token"
            return
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _replaces_space(steps[0]):
            if kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (
                " ",
                1,
                0,
            ):
                self._lstrip = "one space"
                return
            if not kinds[3:]:
                return
        raise TokenizerError(
            f"{origin} has the decoder {' + '.join(kinds) or 'none'}, which is not supported "
            "(supported: ByteLevel, Metaspace, Replace + ByteFallback + Fuse [+ Strip])"
        )


def _replaces_space(step: dict[str, Any]) -> bool:
    return step["pattern"] == {"String": _SPACE} and step["content"] == " "
