"""Topic "blocks": the pool of KV-cache blocks, who holds what, how full it is, what is shared, what is wasted.

Of blocks, arrays with an entry for each; a delta has entries for the changed ones only, whose numbers are in `ids`:

    ref      <u2   how many requests hold it
    filled   <i4   how many of its slots hold keys of tokens
    cached   |u1   1: the prefix cache can find it, held or not
    owners   <i4   the keys of its owners, block after block, `ref` of each

Of requests (those that have not ended), rows [key, request id, status, tokens computed, tokens, most tokens, tokens
from the prefix cache], and the block tables of those whose table changed: `tables` <i4 with `table_sizes` <i4, in the
order of `table_keys`. Keys are small numbers for request ids; `gone` lists those that ended.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from tinyvllm.engine.copy_on_write import PAGE
from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState
from widgets.frames import Payload
from widgets.topics.base import Topic, register

PIECE = 64  # blocks that are looked at in one go
_OTHER_KINDS = frozenset(("step_begun", "step_ended", "tokens"))  # most of all events
_TABLE_KINDS = frozenset(("blocks_allocated", "blocks_shared", "blocks_freed"))


@register
class BlocksTopic(Topic):
    """The block map's data; see the top of this file."""

    name = "blocks"
    scrubbable = True

    def __init__(self, feed: Any, **params: Any):
        super().__init__(feed, **params)
        self._keys: dict[str, int] = {}
        self._next_key = 0
        self._requests: dict[str, RequestState] | None = None  # the run's: a reset makes another
        self.state: EngineState | None = None  # what the page sees: the answers speak of the same

    def snapshot(self, state: EngineState) -> Payload:
        self.state, self._requests = state, state.requests
        num_blocks = state.config.get("num_blocks", 0)
        self._keys = {}
        self._ref, self._filled = np.zeros(num_blocks, np.int32), np.zeros(num_blocks, np.int32)  # as the page has them
        self._num_held = self._num_filled = self._num_saved = 0
        self._told = {name: (r.num_computed_tokens, len(r.token_ids)) for name, r in state.unfinished.items()}
        blocks = self._all_blocks(state, num_blocks)
        alive = list(state.unfinished.values())
        rows = [self._row(request) for request in alive]
        return Payload({"num_blocks": num_blocks, "block_size": state.config.get("block_size", 1),
                        "max_model_len": state.config.get("max_model_len", 0),
                        "caching": state.config.get("enable_prefix_caching", True), "rows": rows,
                        **self._tables(alive, blocks), "totals": self._totals(state)}, blocks)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        if self.state is not state or self._requests is not state.requests:
            return Payload({**(whole := self.snapshot(state)).data, "whole": True}, whole.arrays)
        changed, touched, retabled, gone = self._changes(state, events)
        if not (changed or touched or gone):
            return None
        self.feed.breathe()
        ids = sorted(changed)
        blocks = self._blocks(state, ids)
        self.feed.breathe()
        blocks["ids"] = np.array(ids, np.int32)
        alive = [state.requests[name] for name in touched if is_alive(state, name)]
        gone = [name for name in gone if not is_alive(state, name)]  # an id may be used again
        rows = [self._row(request) for request in alive]
        return Payload({"rows": rows, "gone": [self._keys.pop(name) for name in gone if name in self._keys],
                        **self._tables([r for r in alive if r.request_id in retabled], blocks),
                        "totals": self._totals(state)}, blocks)

    # ---- details ----

    def _key(self, request_id: str) -> int:
        key = self._keys.get(request_id)
        if key is None:
            key = self._keys[request_id] = self._next_key
            self._next_key += 1
        return key

    def _row(self, request: RequestState) -> list:
        return [self._key(request.request_id), request.request_id, request.status, request.num_computed_tokens,
                request.num_tokens, request.max_len, request.num_cached_tokens]

    def _tables(self, requests: list[RequestState], arrays: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """Put the requests' block tables into `arrays`; whose they are, in order."""
        arrays["tables"] = np.array([*chain.from_iterable(request.block_ids for request in requests)], np.int32)
        arrays["table_sizes"] = np.array([len(request.block_ids) for request in requests], np.int32)
        return {"table_keys": [self._key(request.request_id) for request in requests]}

    def _all_blocks(self, state: EngineState, num_blocks: int) -> dict[str, np.ndarray]:
        """The same as `_blocks` of all of them. Most of a large pool nobody holds: these are not looked at one by one.
        """
        cached, held = np.fromiter(state.cached_blocks, np.int64), sorted(state.block_owners)
        told = self._blocks(state, held)
        blocks = {name: np.zeros(num_blocks, told[name].dtype) for name in ("ref", "filled", "cached")}
        blocks["filled"][cached] = state.config.get("block_size", 1)
        blocks["cached"][cached] = 1
        blocks["ref"][held], blocks["filled"][held] = told["ref"], told["filled"]
        return {**blocks, "owners": told["owners"]}

    def _blocks(self, state: EngineState, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """What there is to tell of these blocks, in ascending order; the totals are kept up to date by the difference.
        """
        owners: list[int] = []
        refs, filled, cached = [], [], []
        size, requests, page_number = state.config.get("block_size", 1), state.requests, -1
        for i, block_id in enumerate(ids, 1):
            if i % PIECE == 0:
                self.feed.breathe()
            if block_id // PAGE != page_number:
                page_number = block_id // PAGE
                holders, places = state.block_owners.page(page_number), state.block_places.page(page_number)
                findable = state.cached_blocks.page(page_number)
            held_by, is_cached = holders.get(block_id), block_id in findable
            if not held_by:
                ref, full = 0, size if is_cached else 0
            elif len(held_by) == 1:  # slots_filled, for nearly all of them
                name, ref = held_by[0], 1
                full = requests[name].num_computed_tokens - places[block_id][1] * size if name in requests else 0
                full = size if full > size else max(full, 0)
                owners.append(self._keys.get(name) or self._key(name))
            else:
                ref, full = len(held_by), slots_filled(state, block_id)
                owners += map(self._key, held_by)
            refs.append(ref)
            filled.append(full)
            cached.append(is_cached)
        told = {"ref": np.array(refs, np.uint16), "filled": np.array(filled, np.int32),
                "cached": np.array(cached, np.uint8), "owners": np.array(owners, np.int32)}
        self._count(np.array(ids, np.int64), told["ref"], told["filled"])
        return told

    def _count(self, ids: np.ndarray, ref: np.ndarray, filled: np.ndarray) -> None:
        """Of blocks that somebody holds: how many, how many slots filled, how many saved by sharing."""
        for sign, refs, slots in ((-1, self._ref[ids], self._filled[ids]), (1, ref, filled)):
            held = refs > 0
            self._num_held += sign * int(held.sum())
            self._num_filled += sign * int(slots[held].sum())
            self._num_saved += sign * int(refs[held].sum(dtype=np.int64) - held.sum())
        self._ref[ids], self._filled[ids] = ref, filled

    def _changes(self, state: EngineState, events: list[Event]) -> tuple[set[int], dict[str, None], set[str], set[str]]:
        """(blocks that changed, requests whose row changed, those whose table changed, those that ended)."""
        blocks: set[int] = set()
        touched: dict[str, None] = {}
        retabled: set[str] = set()
        gone: set[str] = set()
        for i, (_, _, kind, _, name, a, _) in enumerate(events, 1):
            if i % PIECE == 0:
                self.feed.breathe()
            if kind in _OTHER_KINDS:
                continue
            if kind in _TABLE_KINDS:
                blocks.update(a)
                retabled.add(name)
                touched[name] = None
            elif kind == "block_cached" and isinstance(a, int):
                blocks.add(a)
            elif kind in ("block_cached", "blocks_evicted"):
                blocks.update(a)
            elif kind == "request_finished":
                gone.add(name)
            elif kind.startswith("request_"):
                touched[name] = None
        # However many steps there were: the blocks between what was computed a frame ago and what is now.
        size, keeps = state.config.get("block_size", 1), state.config.get("use_kv_cache", True)
        told = self._told
        for i, (name, request) in enumerate(state.unfinished.items()):
            if i % 16 == 0:
                self.feed.breathe()
            now, before = (request.num_computed_tokens, len(request.token_ids)), told.get(name, (0, 0))
            if before != now:
                told[name], touched[name] = now, None
                first, last = (before[0], now[0]) if before[0] < now[0] else (now[0], before[0])
                blocks.update(request.block_ids[first // size:-(-last // size)] if keeps else request.block_ids)
        for name in gone:
            self._told.pop(name, None)
        return blocks, touched, retabled, gone

    def _totals(self, state: EngineState) -> dict[str, int]:
        """In slots, a shared block counted once: held, filled; saved by sharing; what the prefix cache found so far."""
        size = state.config.get("block_size", 1)
        return {"slots": self._num_held * size, "filled": self._num_filled, "saved": self._num_saved * size,
                "found": state.num_cached_tokens}


def is_alive(state: EngineState, request_id: str) -> bool:
    """Whether a request is known and has not ended."""
    request = state.requests.get(request_id)
    return request is not None and request.finished_ns is None


def slots_filled(state: EngineState, block_id: int) -> int:
    """How many slots of a block hold keys. One that is only cached is full: nothing else is published."""
    size = state.config.get("block_size", 1)
    owners = state.block_owners.get(block_id)
    if not owners:
        return size if block_id in state.cached_blocks else 0
    index = state.block_places[block_id][1]  # the same for all owners: a prefix has its place
    computed = max((state.requests[name].num_computed_tokens for name in owners if name in state.requests), default=0)
    return min(size, max(0, computed - index * size))
