"""Text out of tokens, as they come: what can be said now, and what must wait.

Two things must wait. Bytes that do not yet make a character: an emoji is four bytes, and often two or three
tokens. And characters that may be the beginning of a stop string, for whoever reads the stream must not see
the first half of something that is then taken back:

    stop = ["###"]     tokens   "Yes."   " #"    "##"   "!"
                       push ->  "Yes."   " "     ""               complete: nothing after it counts
                       held     ""       "#"     (stopped)

Everything that is emitted is final: the concatenation of all pushes and `finish` is `text`.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tinyvllm.errors import RequestError

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one request, pushed token by token. Cost is linear in the text, whatever the pushes.

    stop: strings that end the text. The one that is complete first counts, the longest of those that end at
    the same character; the result does not depend on how the text is cut into tokens.
    include_stop_str_in_output: keep the stop string at the end of the text.
    skip_special_tokens: special tokens add nothing to the text.
    prompt_token_ids: give them if the text continues a prompt: a SentencePiece tokenizer then keeps the space
    before the first word. (Byte-level tokenizers keep it anyway.)
    Bytes that are no UTF-8 become U+FFFD, as everywhere.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ):
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in self._stop):
            raise RequestError(f"stop must be a non-empty string or a list of them, got {stop!r}")
        self._include_stop = include_stop_str_in_output
        self._bytes_of = tokenizer.token_bytes
        self._skipped = self._bytes_of.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = len(prompt_token_ids) == 0
        self._held = ""  # text that may be the beginning of a stop string
        self._emitted: list[str] = []
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; returns the new text that is safe to show. "" once a stop string was found."""
        if self.stop_reason is not None:
            return ""
        return self._advance("".join(self._decode(token_id) for token_id in token_ids))

    def finish(self) -> str:
        """No more tokens: returns what was held back (an incomplete character becomes U+FFFD)."""
        if self.stop_reason is not None:
            return ""
        new_text = self._advance(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        self._emitted.append(rest)
        return new_text + rest

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._bytes_of(token_id, first=self._at_start)
        self._at_start = self._at_start and not self._bytes_of(token_id)
        return self._utf8.decode(data)

    def _advance(self, new_text: str) -> str:
        text = self._held + new_text
        end = self._find_stop(text)
        if end is None:
            end = len(text) - self._possible_stop(text)
            self._held = text[end:]
        else:
            self._held = ""
        self._emitted.append(text[:end])
        return text[:end]

    def _find_stop(self, text: str) -> int | None:
        """Where the output ends if `text` has a stop string; sets stop_reason."""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not found:
            return None
        end, start, self.stop_reason = min(found)
        return end if self._include_stop else start

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
