"""Byte-level BPE one merge at a time: how a piece of text becomes tokens.

The library cuts a text at its added tokens (<|eot_id|> and the like), and the rest into *pieces* with the pre-tokenizer
of tokenizer.json, a regular expression: words with the space before them, up to three digits, runs of punctuation.
No token crosses the border between two pieces. Within a piece:

    symbols   start as the piece's bytes, each spelt as one stand-in character ("Ġ" is the space)
    repeat    of all neighbouring pairs, take the one that stands first in the list of merges (the lowest *rank*: it was
              the most frequent pair when the tokenizer was trained), the leftmost if it occurs twice; join the two
    until     no neighbouring pair is in the list; each symbol is now a token

        Ġ f o x     Ġ f + o x (rank 35)     Ġf o x     o + x (rank 402)     Ġf ox     ...     Ġfox

A tokenizer with `ignore_merges` (Llama 3's) takes a piece that is a token as a whole at once, without merging.

Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016); Radford et
al., GPT-2 (2019), for the bytes.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from tinyvllm.errors import TokenizerError
from tinyvllm.text.token_bytes import _ALPHABET


@dataclass(frozen=True)
class Piece:
    """A part of a text that is tokenised by itself.

    spelling: in stand-in characters; of an added token, its own text. token_ids: the library's. added: it is an added
    token, which is found as a whole, with no merges.
    """

    spelling: str
    token_ids: tuple[int, ...]
    added: bool = False


@dataclass(frozen=True)
class Merge:
    """One merge: the symbols number `position` and `position + 1` become one. rank: the pair's place in the list."""

    position: int
    left: str
    right: str
    rank: int


class BpeSteps:
    """The merges of one tokenizer. Raises TokenizerError for a tokenizer that is not byte-level BPE.

    tokenizer: of the `tokenizers` library. origin: the file that it comes from, for messages.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "tokenizer.json"):
        description = json.loads(tokenizer.to_str())
        _check_kind(description, origin)
        model = description["model"]
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = model["vocab"]
        self._ignore_merges = bool(model.get("ignore_merges"))
        self._added_ids = frozenset(token["id"] for token in description["added_tokens"])
        # A merge is written ["Ġ", "t"], or "Ġ t" in older files.
        pairs = (tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}

    @property
    def num_merges(self) -> int:
        """How many merges the tokenizer has learnt."""
        return len(self._ranks)

    def pieces(self, text: str, add_special_tokens: bool = False) -> list[Piece]:
        """The pieces of a text, as the library cuts it, each with the library's token ids."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        tokens = zip(encoding.ids, encoding.word_ids, range(len(encoding.ids)))
        # Tokens of one piece carry its number; those that were put around the text carry none.
        groups = itertools.groupby(tokens, lambda token: -1 - token[2] if token[1] is None else token[1])
        return [self._piece([token_id for token_id, _, _ in group]) for _, group in groups]

    def merges(self, spelling: str) -> list[Merge]:
        """The merges that make tokens of a piece, in order; none for a piece that is taken as a whole."""
        if self.is_taken_whole(spelling):
            return []
        symbols, done = list(spelling), []
        while True:
            ranked = [(self._ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols))
                      if pair in self._ranks]
            if not ranked:
                return done
            rank, i = min(ranked)
            done.append(Merge(i, symbols[i], symbols[i + 1], rank))
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]

    def symbols(self, spelling: str, count: int | None = None) -> list[str]:
        """The symbols of a piece after its first `count` merges (None: after all)."""
        if self.is_taken_whole(spelling):
            return [spelling]
        symbols = list(spelling)
        for merge in self.merges(spelling)[:count]:
            symbols[merge.position:merge.position + 2] = [merge.left + merge.right]
        return symbols

    def is_taken_whole(self, spelling: str) -> bool:
        """Whether a piece is a token without any merge, because the tokenizer ignores merges for such pieces."""
        return self._ignore_merges and spelling in self._vocabulary

    def token_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text by these merges alone: what the library must say too."""
        found: list[int] = []
        for piece in self.pieces(text, add_special_tokens):
            found += piece.token_ids if piece.added else map(self._vocabulary.__getitem__, self.symbols(piece.spelling))
        return found

    @staticmethod
    def to_bytes(symbol: str) -> bytes:
        """The bytes that a symbol in stand-in characters spells."""
        return bytes(map(_ALPHABET.__getitem__, symbol))

    def _piece(self, token_ids: list[int]) -> Piece:
        # Byte-level BPE loses nothing: the tokens of a piece, joined, are the piece.
        spelling = "".join(map(self._tokenizer.id_to_token, token_ids))
        return Piece(spelling, tuple(token_ids), added=len(token_ids) == 1 and token_ids[0] in self._added_ids)


def _check_kind(description: dict[str, Any], origin: str) -> None:
    """Raise TokenizerError, saying why, unless this is byte-level BPE that merges in the plain way."""
    model, before = description["model"], description["pre_tokenizer"]
    kinds = [] if before is None else [step["type"] for step in before.get("pretokenizers", [before])]
    trouble = None
    if model["type"] != "BPE":
        trouble = f"its model is {model['type']}"
    elif "ByteLevel" not in kinds:
        trouble = f"its pre-tokenizer is {' + '.join(kinds) or 'none'}, with no ByteLevel"
    elif model.get("dropout"):
        trouble = f"it leaves merges out at random (dropout {model['dropout']})"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        trouble = "it marks the insides or the ends of words"
    elif missing := [character for character in _ALPHABET if character not in model["vocab"]]:
        trouble = f"its vocabulary has no token for {len(missing)} of the 256 bytes"
    if trouble:
        raise TokenizerError(f"the merges of {origin} cannot be shown step by step: {trouble}; this works for "
                             "byte-level BPE, the kind that GPT-2 and Llama 3 have")
