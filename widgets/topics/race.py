"""Topic "race": the running outputs side by side, their new text and their latencies.

A few requests have a card each, in numbered slots that stay where they are: a new request takes a free slot, or that of
the card which finished longest ago. All others are counted. A delta carries a card's new text only, and only cards that
changed.

    TTFT   time to first token: from the request's arrival to its first token
    ITL    inter-token latency: from one token to the next; mean and last
    rate   of a card: its tokens over the time from its arrival to its newest token; of all: tokens of the last second
"""

from bisect import bisect_right
from collections.abc import Callable
from itertools import chain, takewhile
from typing import Any

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState
from widgets.frames import Payload
from widgets.topics.base import Topic, register

SHOWN = 12
KEPT_TEXT = 4000  # characters of a card; what came before is counted
WINDOW_NS = 1_000_000_000
HOLD_NS = 1_500_000_000  # a finished card is looked at for so long before another request takes its place
FINISHED = ("stop", "length", "abort")


class Card:
    """One slot's request, and how much of it the page has."""

    def __init__(self, request: RequestState):
        self.request = request
        self.sent_text: int | None = None  # characters; None: the page does not know this card
        self.sent_numbers: dict[str, Any] = {}


@register
class RaceTopic(Topic):
    """params: shown, how many cards (1 to 60)."""

    name = "race"
    scrubbable = True

    def __init__(self, feed: Any, shown: int = SHOWN):
        super().__init__(feed, shown=shown)
        self._cards: list[Card | None] = [None] * max(1, min(60, int(shown)))
        self._occupied = [False] * len(self._cards)  # as far as the page knows
        self._sent_totals: dict[str, Any] = {}

    def snapshot(self, state: EngineState) -> Payload:
        self._seat(state, _newest_ns(state), patience_ns=0)
        self._sent_totals = self._totals(state, _newest_ns(state))
        for card in filter(None, self._cards):
            card.sent_text = None
        return Payload({"slots": len(self._cards), "cards": self._changes(state, everything=True),
                        "totals": self._sent_totals})

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        now = self.feed.source.now_ns()
        self._seat(state, now, HOLD_NS)
        self.feed.breathe()
        cards = self._changes(state)
        self.feed.breathe()
        totals = self._totals(state, now)
        if not cards and totals == self._sent_totals:
            return None
        self._sent_totals = totals
        return Payload({"slots": len(self._cards), "cards": cards, "totals": totals})

    # ---- who has a card ----

    def _seat(self, state: EngineState, now_ns: int, patience_ns: int) -> None:
        """Give slots to requests: unfinished ones in the order of their arrival, the selected one in any case."""
        for i, card in enumerate(self._cards):
            # A reset, or a jump in a recorded run, makes other objects of the same ids.
            if card is not None and state.requests.get(card.request.request_id) is not card.request:
                again = state.requests.get(card.request.request_id)
                self._cards[i] = None if again is None else Card(again)
        seated = {card.request.request_id for card in self._cards if card is not None}
        selected = state.requests.get(self.feed.hub.selection["request"])
        if selected is not None and selected.request_id not in seated:
            slot = self._free_slot(now_ns, 0)
            self._cards[-1 if slot is None else slot] = Card(selected)
            seated = {card.request.request_id for card in self._cards if card is not None}
        for request in state.unfinished.values():
            if request.request_id not in seated:
                slot = self._free_slot(now_ns, patience_ns)
                if slot is None:
                    return
                self._cards[slot] = Card(request)
        # Then the newest finished ones, while there is room that nobody else wants.
        if None in self._cards and len(state.requests) > len(state.unfinished):
            for request in reversed(state.requests.values()):
                if request.finished_ns is not None and request.request_id not in seated:
                    self._cards[self._cards.index(None)] = Card(request)
                    if None not in self._cards:
                        return

    def _free_slot(self, now_ns: int, patience_ns: int) -> int | None:
        if None in self._cards:
            return self._cards.index(None)
        selected = self.feed.hub.selection["request"]
        done = [(card.request.finished_ns, i) for i, card in enumerate(self._cards)
                if card.request.status in FINISHED and card.request.request_id != selected
                and now_ns - card.request.finished_ns >= patience_ns]
        return min(done)[1] if done else None

    # ---- what is told ----

    def _changes(self, state: EngineState, everything: bool = False) -> list[dict[str, Any]]:
        changes = []
        for slot, card in enumerate(self._cards):
            if card is None:
                if self._occupied[slot]:
                    changes.append({"slot": slot, "id": None})
                continue
            if slot % 4 == 3:
                self.feed.breathe()
            numbers = self._numbers(card.request)
            if not everything and card.sent_text is not None and numbers == card.sent_numbers:
                continue
            change = {"slot": slot, "id": card.request.request_id, **numbers}
            text = self._text(card.request)
            if card.sent_text is None:
                change |= {"text": text[-KEPT_TEXT:], "cut": max(0, len(text) - KEPT_TEXT),
                           **self._origin(card.request, state)}
            else:
                change["new"] = text[card.sent_text:]
            card.sent_text, card.sent_numbers = len(text), numbers
            changes.append(change)
        self._occupied = [card is not None for card in self._cards]
        return changes

    def _numbers(self, request: RequestState) -> dict[str, Any]:
        times = request.token_ns
        count = len(times)
        status = request.status
        if status == "running":  # all but its newest token computed, or still on the way there
            is_decoding = count and request.num_computed_tokens >= request.num_tokens - 1
            status = "decode" if is_decoding else request.spans[-1].kind
        return {
            "status": status, "tokens": count, "computed": request.num_computed_tokens,
            "ttft": None if not count else (times[0] - request.added_ns) / 1e6,
            "itl": None if count < 2 else (times[-1] - times[0]) / (count - 1) / 1e6,
            "last": None if count < 2 else (times[-1] - times[-2]) / 1e6,
            "rate": count * 1e9 / (times[-1] - request.added_ns) if count and times[-1] > request.added_ns else None,
            "preemptions": request.num_preemptions}

    def _origin(self, request: RequestState, state: EngineState) -> dict[str, Any]:
        """What does not change: the prompt's length, the cached part of it, the request that it was forked from."""
        origin = {"prompt": request.num_prompt_tokens, "parent": None}
        parent = parent_of(request, state.requests)
        if parent is not None:
            forced = request.prompt_token_ids[-1]
            origin |= {"parent": parent, "forced": forced, "forced_text": self.feed.source.token_text(forced),
                       "position": request.num_prompt_tokens - 1}
        return origin

    def _text(self, request: RequestState) -> str:
        """The output's text; where there is no tokenizer, its ids."""
        if request.text or not request.token_ids or self.feed.source.token_text(request.token_ids[0]) is not None:
            return request.text
        return "".join(f"{token_id} " for token_id in request.token_ids)

    def _totals(self, state: EngineState, now_ns: int) -> dict[str, Any]:
        counts = state.counts
        return {"requests": len(state.requests), "running": counts["running"], "waiting": counts["waiting"],
                "preempted": counts["preempted"], "finished": len(state.requests) - len(state.unfinished),
                "rate": _recent_tokens(state, now_ns, self.feed.breathe) * 1e9 / WINDOW_NS}


def parent_of(request: RequestState, requests: dict[str, RequestState]) -> str | None:
    """The id of the request that this one was forked from, or None.

    A fork of "3" is called "3.1", and it begins with all of its parent's prompt: both must be so.
    """
    parent_id, dot, number = request.request_id.rpartition(".")
    parent = requests.get(parent_id)
    if not dot or not number.isdigit() or parent is None or request.prompt_token_ids is None:
        return None
    known = parent.prompt_token_ids
    if known is None or len(request.prompt_token_ids) <= len(known) or request.prompt_token_ids[:len(known)] != known:
        return None
    return parent_id


def _newest_ns(state: EngineState) -> int:
    """The time up to which this state has come."""
    steps = (state.steps[-1].end_ns or state.steps[-1].begin_ns) if state.steps else 0
    tokens = (request.token_ns[-1] for request in state.requests.values() if request.token_ns)
    return max([steps, *tokens], default=0)


def _recent_tokens(state: EngineState, now_ns: int, breathe: Callable[[], None]) -> int:
    """How many tokens came in the last second before `now_ns`."""
    since, count = now_ns - WINDOW_NS, 0
    ended = takewhile(lambda request: request.finished_ns > since, state.finished_newest_first())
    for i, request in enumerate(chain(state.unfinished.values(), ended), 1):
        if i % 32 == 0:
            breathe()
        times = request.token_ns
        if times and times[-1] > since:
            count += len(times) - bisect_right(times, since)
    return count
