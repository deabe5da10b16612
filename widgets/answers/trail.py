"""What TokenTrail asks: the tokens of a text, the merges of a piece of it, a token's row of the embedding."""

from concurrent.futures import Future
from typing import Any

from tinyvllm.errors import RequestError, TokenizerError
from widgets.answers.base import answers
from widgets.feed import Feed
from widgets.frames import Payload
from widgets.vocabulary import describe_tokens, spelt, tokenizer_of

LONGEST_TEXT = 20_000  # characters
MOST_TOKENS = 1000
LONGEST_PIECE = 300  # bytes whose merges are shown
EMBEDDING = "model.embed_tokens.weight"


@answers("trail.encode")
def encode(feed: Feed, text: str, chat: bool = False) -> dict[str, Any]:
    """The tokens of a text, as a prompt of its own or as a user's message in the chat template.

    tokens: [id, text, bytes in hexadecimal if they are no whole characters, is special, number of its piece or None]
    of the first 1,000; pieces: [spelling, is added] where the tokenizer is byte-level BPE, else `refusal` says why not.
    count: how many tokens in all; rendered: the text that was encoded.
    """
    tokenizer = _tokenizer(feed)
    if len(text) > LONGEST_TEXT:
        raise RequestError(f"the text has {len(text):,} characters; up to {LONGEST_TEXT:,} are shown here")
    rendered = tokenizer.render_chat([{"role": "user", "content": text}]) if chat else text
    if not rendered:
        return {"tokens": [], "pieces": [], "count": 0, "rendered": "", "refusal": None}
    ids = tokenizer.encode(rendered, add_special_tokens=False) if chat else tokenizer.encode_prompt(rendered)
    pieces, piece_of, refusal = [], [None] * len(ids), None
    try:
        pieces, piece_of = _pieces(tokenizer, rendered, ids)
    except TokenizerError as error:
        refusal = str(error)
    shown = ids[:MOST_TOKENS]
    tokens = [[token_id, *described, piece]
              for token_id, described, piece in zip(shown, describe_tokens(feed, shown), piece_of)]
    return {"tokens": tokens, "pieces": pieces, "count": len(ids), "rendered": rendered, "refusal": refusal}


@answers("trail.merges")
def merges(feed: Feed, spelling: str | None = None, token_id: int | None = None) -> dict[str, Any]:
    """How a piece (by its spelling), or a token by itself, is merged from bytes.

    symbols: those it starts with; merges: [position, left, right, rank], in order; ids: of the symbols that are left;
    spelt: {symbol: [text, bytes in hexadecimal]} of every symbol that comes up; num_merges: how many there are to rank.
    """
    tokenizer = _tokenizer(feed)
    steps = tokenizer.bpe_steps
    if spelling is None:
        spelling = tokenizer.id_to_token(token_id)
        if token_id in tokenizer.special_ids or spelling is None:
            return {"symbols": [], "merges": [], "ids": [], "spelt": {}, "num_merges": steps.num_merges, "whole": True}
    if len(spelling) > LONGEST_PIECE:
        raise RequestError(f"this piece has {len(spelling)} bytes; merges are shown for up to {LONGEST_PIECE}")
    done = steps.merges(spelling)
    left = steps.symbols(spelling)
    symbols = {*spelling, *left, *(merge.left + merge.right for merge in done)}
    return {"symbols": [spelling] if steps.is_taken_whole(spelling) else list(spelling),
            "merges": [[merge.position, merge.left, merge.right, merge.rank] for merge in done],
            "ids": [tokenizer.token_to_id(symbol) for symbol in left],
            "spelt": {symbol: spelt(steps.to_bytes(symbol)) for symbol in symbols}, "num_merges": steps.num_merges,
            "whole": steps.is_taken_whole(spelling)}


@answers("trail.row")
def embedding_row(feed: Feed, token_id: int, count: int = 8) -> Future:
    """bits uint16 [count]: the first values of a token's row of the embedding, as the engine has them now."""

    def look(llm: Any) -> Payload:
        rows, columns = llm.probe.weight_names()[EMBEDDING]
        bits = llm.probe.weight(EMBEDDING, rows=slice(token_id, token_id + 1), columns=slice(0, min(count, columns)))
        return Payload({"name": EMBEDDING, "row": token_id, "rows": rows, "columns": columns},
                       {"bits": bits.reshape(-1)})

    return feed.look(look)


def _tokenizer(feed: Feed) -> Any:
    tokenizer = tokenizer_of(feed)
    if tokenizer is None:
        raise TokenizerError("there is no tokenizer behind this panel, so text cannot be cut into tokens here; "
                             "the tokens of the selected request can be seen")
    return tokenizer


def _pieces(tokenizer: Any, text: str, ids: list[int]) -> tuple[list, list[int]]:
    """([spelling, is added] of each piece, the piece's number for each token). Raises TokenizerError."""
    for add_special_tokens in (False, True):
        pieces = tokenizer.bpe_steps.pieces(text, add_special_tokens)
        if [token_id for piece in pieces for token_id in piece.token_ids] == ids:
            break
    return ([[piece.spelling, piece.added] for piece in pieces],
            [number for number, piece in enumerate(pieces) for _ in piece.token_ids])
