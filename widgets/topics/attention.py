"""The topic behind AttentionScope: rows of attention of one request, as its tokens are computed.

The rows are pulled. A few times a second, and only if something has changed, `look_at_rows` runs between two steps of
the engine; what is left waits for the next time. An engine that goes as fast as it can gives half a percent of its
time; one that is held to a pace has time to spare, and one that is paused or has nothing to do has plenty. So a page
can fall behind the engine and catch up, but cannot hold it back.

    selection.request, else whoever comes ── follow ──> queries kept ── look ──> AttentionRecord ──> page
"""

import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState
from tinyvllm.errors import TinyVLLMError
from widgets.attention_record import SIDE, AttentionRecord, ranges
from widgets.frames import Payload
from widgets.topics.base import Topic, register

LOOKS_PER_SECOND = 8
SHARE = 0.005  # of the time of an engine that goes as fast as it can: few of its steps are late for it
LONGEST_REST_S = 1.0  # between two looks: one that compiled its kernel took seconds, and the next will not
BUDGET_S = 0.001  # of its time for one look: one step in some hundred is late by so much
SPARE_SHARE = 0.25  # of the pace of an engine that is held to one
IDLE_BUDGET_S = 0.03  # for one look while nobody waits for a token
KEPT_TOKENS = 1024  # positions of a request whose queries are kept
KEPT_RECORDS = 6  # requests whose maps are remembered
POOLED_WIDTH = 4 * SIDE  # columns that travel for all heads: four to a pixel of a thumbnail
LISTED_REQUESTS = 40
NO_ENGINE = "Attention was not recorded: a recording holds what the engine told, not what the model computed. " \
            "With a LiveEngine this panel fills by itself."

Key = tuple[str, int]  # a request's id and when it was added: ids can be used again

_records: WeakKeyDictionary = WeakKeyDictionary()  # engine -> its records: they outlive the page's views


@dataclass
class Wish:
    """What a look shall bring: rows of `request_id` (None: whoever is followed) that are not in has_row."""

    request_id: str | None
    known_id: str | None  # the request that has_row and has_full are about
    has_row: np.ndarray
    has_full: np.ndarray
    layer: int
    head: int
    budget_s: float = BUDGET_S


@dataclass
class Seen:
    """What a look brought."""

    request_id: str | None
    layer: int = 0
    head: int = 0
    context: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # positions [R], uint8 [L, H, R, W]
    full: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # positions [R], uint8 [R, context]
    more: bool = False  # the time was up
    took_s: float = 0.0
    trouble: str | None = None


def look_at_rows(llm: Any, wish: Wish) -> Seen:
    """Between two steps: see to it that the request is watched, and compute rows until the time is up."""
    from tinyvllm.probe.follow import follow  # here: a recorded run needs nothing that computes

    start = time.perf_counter()
    end = start + (wish.budget_s if llm.engine.has_unfinished_requests() else IDLE_BUDGET_S)
    request_id = follow(llm, wish.request_id, KEPT_TOKENS)
    probe, dims = llm.probe, llm.runner.dims
    seen = Seen(request_id, min(wish.layer, dims.num_layers - 1), min(wish.head, dims.num_heads - 1),
                probe.context if request_id else 0, dims.num_layers, dims.num_heads, dims.num_kv_heads)
    if not seen.context:
        return seen
    seen.kept = np.array(probe.kept, np.int64)
    same = request_id == wish.known_id
    try:
        new = _not_in(seen.kept, wish.has_row if same else None)
        # Rows of the head in focus first: they are few bytes, and the large picture is what one looks at.
        half = start + (end - start) / 2
        for positions in _portions(_not_in(seen.kept, wish.has_full if same else None), 16, half, seen):
            seen.full.append((positions, probe.attention_uint8(positions.tolist(), [seen.layer], [seen.head])[0, 0]))
        for positions in _portions(new, 4, end, seen):
            seen.rows.append((positions, probe.attention_uint8(positions.tolist(), width=POOLED_WIDTH)))
    except TinyVLLMError as error:  # its blocks have been given to another request
        seen.trouble, seen.more = str(error), False
    seen.took_s = time.perf_counter() - start
    return seen


def _portions(positions: np.ndarray, size: int, end: float, seen: Seen):
    """Pieces of `positions`, larger as long as there is time; at least one, and `more` says that some are left."""
    at = 0
    while at < len(positions):
        started = time.perf_counter()
        yield positions[at:at + size]
        at += size
        now = time.perf_counter()
        if now >= end:
            break
        size = max(4, min(4 * size, int(size * 0.5 * (end - now) / max(now - started, 1e-6))))
    seen.more |= at < len(positions)


def _not_in(positions: np.ndarray, has: np.ndarray | None) -> np.ndarray:
    if has is None:
        return positions
    known = positions[positions < len(has)]
    return np.concatenate([known[~has[known]], positions[positions >= len(has)]])


@register
class AttentionTopic(Topic):
    """name "attention"; no params. The head in focus is selection.layer and selection.head."""

    name = "attention"

    def __init__(self, feed, **params: Any):
        super().__init__(feed, **params)
        self._told: tuple | None = None  # what the page has: (key, focus, extent)
        self._told_tokens = 0
        self._bind()
        if feed.source is not None and feed.source.kind != "replay":
            import tinyvllm.probe.follow  # noqa: F401  (now: the first look would pay for it in the engine's thread)

    def _bind(self) -> None:
        """Begin with the engine that the feed shows now."""
        self._source = self.feed.source
        self._records: OrderedDict[Key, AttentionRecord] = _records.setdefault(self._source, OrderedDict())
        self._results: deque[Future] = deque()  # filled by the engine's thread
        self._look: Future | None = None
        self._next_look = 0.0
        self._stale = True  # something has happened since the last look
        self._asked: tuple | None = None  # what the last look was about
        self._seen = Seen(None)
        self._dirty: set[int] = set()  # rows of the thumbnails that the page does not have
        self._new_full: set[int] = set()
        self._note = ""
        self._changed = False

    # ---- what the feed calls ----

    def snapshot(self, state: EngineState) -> Payload:
        if self.feed.source is not self._source:
            self._bind()
        _cancel_unwatch(self._source)
        self._stale = True
        self._advance(state)
        return self._whole(state)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        kinds = {event[2] for event in events}
        self._changed |= not kinds.isdisjoint(("request_added", "request_finished"))
        self._stale |= not kinds.isdisjoint(("step_ended", "request_added", "request_finished", "engine_config"))
        self._advance(state)
        key, record = self._current(state)
        if self._told != (key, self._focus(record), record.extent if record else 0):
            return self._whole(state)
        if not (self._dirty or self._new_full or self._changed):
            return None
        return self._part(state, key, record)

    def hidden(self) -> None:
        """Nobody can see it any more: after a while, keep nothing."""
        _unwatch_later(self._source)

    def close(self) -> None:
        _unwatch(self._source)

    # ---- looking ----

    def _advance(self, state: EngineState) -> None:
        """Take in what has been brought, and send for more."""
        while self._results:
            self._take(self._results.popleft(), state)
        now = time.monotonic()
        selection = self.feed.selection
        about = (selection["request"], selection["layer"], selection["head"])
        self._stale |= about != self._asked
        if self._look is not None or not self._stale or now < self._next_look:
            return
        self._next_look, self._stale, self._asked = now + 1 / LOOKS_PER_SECOND, False, about
        self._wished = self._wish(state)
        self._look = self.feed.look(look_at_rows, self._wished)
        self._look.add_done_callback(self._results.append)

    def _wish(self, state: EngineState) -> Wish:
        request = state.requests.get(self.feed.selection["request"])
        wanted = request.request_id if request is not None and request.finished_ns is None else None
        if request is not None and request.finished_ns is not None and self._seen.request_id == request.request_id:
            wanted = request.request_id  # it has ended, and is still what is kept
        known = wanted or self._seen.request_id
        record = self._record_of(state, known)
        focus = self._focus(record)
        has_row, has_full = np.zeros(0, bool), np.zeros(0, bool)
        if record is not None:
            has_row, has_full = record.has_row.copy(), np.zeros(len(record.has_row), bool)
            has_full[list(record.full(*focus))] = True
        return Wish(wanted, known, has_row, has_full, *focus, self._budget_s())

    def _budget_s(self) -> float:
        """Of the engine's time, for the next look."""
        source = self.feed.source
        if source.state != "running":
            return IDLE_BUDGET_S
        pace = getattr(source, "steps_per_second", None)
        return BUDGET_S if pace is None else max(BUDGET_S, min(IDLE_BUDGET_S, SPARE_SHARE / pace))

    def _take(self, look: Future, state: EngineState) -> None:
        self._look = None
        if look.exception() is not None:
            note = NO_ENGINE if self.feed.source.kind == "replay" else str(look.exception())
            self._changed |= note != self._note
            self._note = note
            return
        seen: Seen = look.result()
        if self.feed.source.state == "running" and getattr(self.feed.source, "steps_per_second", None) is None:
            rest_s = min(seen.took_s / SHARE, LONGEST_REST_S)
            self._next_look = max(self._next_look, time.monotonic() + rest_s)
        self._changed |= seen.request_id != self._seen.request_id or (seen.trouble or "") != self._note
        self._seen, self._note = seen, seen.trouble or ""
        self._stale |= seen.more
        if self._wished.request_id is None and seen.request_id == self.feed.selection["request"]:
            self._stale |= seen.request_id is not None  # it was followed and is selected: from now on hold on to it
        request = state.requests.get(seen.request_id)
        if request is None or not seen.num_layers:
            return
        key = (request.request_id, request.added_ns)
        record = self._records.get(key)
        if record is None:
            if not seen.context:
                return
            record = self._records[key] = AttentionRecord(seen.num_layers, seen.num_heads,
                                                              seen.num_kv_heads)
            while len(self._records) > KEPT_RECORDS:
                self._records.popitem(last=False)
        is_shown = self._current(state)[0] == key
        for positions, pooled in seen.rows:
            changed = record.add(positions, pooled, seen.context)
            self._dirty |= changed if is_shown else set()
        for positions, rows in seen.full:
            record.add_full(seen.layer, seen.head, positions, rows)
            if is_shown and (seen.layer, seen.head) == self._focus(record):
                self._new_full.update(positions.tolist())

    # ---- what is shown ----

    def _focus(self, record: AttentionRecord | None) -> tuple[int, int]:
        selection = self.feed.selection
        layer, head = max(0, int(selection["layer"] or 0)), max(0, int(selection["head"] or 0))
        return (layer, head) if record is None else (min(layer, record.num_layers - 1), min(head, record.num_heads - 1))

    def _record_of(self, state: EngineState, request_id: str | None) -> AttentionRecord | None:
        request = state.requests.get(request_id)
        return None if request is None else self._records.get((request.request_id, request.added_ns))

    def _current(self, state: EngineState) -> tuple[Key | None, AttentionRecord | None]:
        """The request to show: the selected one, else the one that is followed; and what there is of it."""
        selected = state.requests.get(self.feed.selection["request"])
        request = selected or state.requests.get(self._seen.request_id)
        if request is None:  # before the first look: what was shown last
            request = next((state.requests[i] for i, added in reversed(self._records)
                            if i in state.requests and state.requests[i].added_ns == added), None)
        if request is None:
            return None, None
        key = (request.request_id, request.added_ns)
        return key, self._records.get(key)

    def _whole(self, state: EngineState) -> Payload:
        """Everything about the request to show."""
        key, record = self._current(state)
        self._told = (key, self._focus(record), record.extent if record else 0)
        self._told_tokens = 0
        self._dirty, self._new_full = set(), set()
        data, arrays = self._common(state, key, record), {}
        data["whole"] = True
        if record is not None:
            arrays = {"thumbnails": record.thumbnails.copy(), **_packed(record, self._focus(record))}
        return Payload(data, arrays)

    def _part(self, state: EngineState, key: Key | None, record: AttentionRecord | None) -> Payload:
        """What has come since."""
        data, arrays = self._common(state, key, record), {}
        data["whole"] = False
        if record is not None:
            bins = sorted(self._dirty)
            arrays = {"bins": np.array(bins, np.int32), "thumbnails": record.thumbnails[:, bins],
                      **_packed(record, self._focus(record), self._new_full)}
        self._dirty, self._new_full = set(), set()
        return Payload(data, arrays)

    def _common(self, state: EngineState, key: Key | None, record: AttentionRecord | None) -> dict[str, Any]:
        self._changed = False
        data: dict[str, Any] = {"request": None, "note": self._note, "requests": self._listed(state),
                                "selected": self.feed.selection["request"], "tokens": [], "tokens_from": 0}
        if key is None:
            return data
        request = state.requests[key[0]]
        data |= {"request": key[0], "status": request.status, "num_prompt": request.num_prompt_tokens,
                 "num_cached": request.num_cached_tokens, "tokens_from": self._told_tokens,
                 "tokens": self._texts(request), "kept_tokens": KEPT_TOKENS}
        self._told_tokens += len(data["tokens"])
        if record is not None:
            layer, head = self._focus(record)
            data |= {"layers": record.num_layers, "heads": record.num_heads, "layer": layer, "head": head,
                     "kv_heads": record.num_kv_heads, "extent": record.extent, "side": SIDE,
                     "rows": ranges(np.flatnonzero(record.has_row))}
        return data

    def _texts(self, request: RequestState) -> list[str]:
        """Texts of the tokens that the page does not have yet; "" where a recording kept only how many there were."""
        text = self.feed.source.token_text
        told, num_prompt = self._told_tokens, request.num_prompt_tokens
        ids = request.token_ids[max(0, told - num_prompt):]
        if told < num_prompt:
            prompt = request.prompt_token_ids
            ids = [*([None] * num_prompt if prompt is None else prompt)[told:], *ids]
        return ["" if i is None else text(i) or f"#{i}" for i in ids]

    def _listed(self, state: EngineState) -> list[list[str]]:
        """[[request id, status], ...]: those that can be shown or watched, the newest first."""
        usable = {r.request_id: r for r in islice(reversed(state.unfinished.values()), LISTED_REQUESTS)}
        usable |= {i: state.requests[i] for i, _ in self._records if i in state.requests}
        newest_first = sorted(usable.values(), key=lambda request: -request.added_ns)
        return [[request.request_id, request.status] for request in newest_first[:LISTED_REQUESTS]]


def _packed(record: AttentionRecord, focus: tuple[int, int], only: set[int] | None = None) -> dict[str, np.ndarray]:
    """Full rows of a head, one after the other: row p has p + 1 bytes."""
    rows = record.full(*focus)
    positions = sorted(rows if only is None else only & rows.keys())
    return {"positions": np.array(positions, np.int32),
            "full": np.concatenate([rows[p] for p in positions]) if positions else np.zeros(0, np.uint8)}


# ---- beginning, and letting go ----

UNWATCH_AFTER_S = 20.0  # out of sight: one scrolls down to a cell and up again
_timers: WeakKeyDictionary = WeakKeyDictionary()


def watch_ahead(source: Any) -> None:
    """Keep queries from now on, before a page shows anything: the next cell may well add a request already.

    If nobody looks for a while, it ends by itself.
    """
    source.between_steps(_follow)  # a recorded run refuses, and that is no news here
    _unwatch_later(source)


def _follow(llm: Any) -> None:
    from tinyvllm.probe.follow import follow

    follow(llm, None, KEPT_TOKENS)


def _unwatch(source: Any) -> None:
    _cancel_unwatch(source)
    source.between_steps(_unfollow)


def _unfollow(llm: Any) -> None:
    from tinyvllm.probe.follow import unfollow

    unfollow(llm)


def _unwatch_later(source: Any) -> None:
    _cancel_unwatch(source)
    timer = _timers[source] = threading.Timer(UNWATCH_AFTER_S, _unwatch, [source])
    timer.daemon = True
    timer.start()


def _cancel_unwatch(source: Any) -> None:
    timer = _timers.pop(source, None)
    if timer is not None:
        timer.cancel()
