"""What the block map asks: what lies in a block; and end this request."""

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tinyvllm.engine.state import EngineState
from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import answers

if TYPE_CHECKING:
    from widgets.feed import Feed

MOST_TOKENS = 512  # shown of one block


@answers("block")
def block(feed: "Feed", block_id: int) -> dict[str, Any] | Future:
    """{"block", "owners", "cached", "known", "start", "filled", "tokens": [[position, id, text or None], ...],
    "left_out", "last"}: `tokens` as far as keys were computed for them, `last` who had the block if nobody has it now.

    known: False if nobody can say what lies in it (a recording that kept only lengths, a block filled before).
    """
    with feed.lock:
        state = _shown_state(feed)
        num_blocks = state.config.get("num_blocks", 0)
        if isinstance(block_id, bool) or not isinstance(block_id, int) or not 0 <= block_id < num_blocks:
            raise TinyVLLMError(f"this pool has the blocks 0 to {num_blocks - 1}, got {block_id!r}"
                                if num_blocks else "there is no pool of blocks yet")
        told = _from_state(state, block_id)
    if told["tokens"] is not None or not told["cached"] or state is not feed.state:
        return _with_texts(feed, told)
    # Filled before anybody listened, and held by nobody: the pool itself knows its tokens.
    future: Future = Future()
    feed.look(_from_pool, block_id).add_done_callback(lambda done: future.set_result(
        _with_texts(feed, told if done.exception() else {**told, **done.result()})))
    return future


@answers("kill_request")
def kill_request(feed: "Feed", request_id: str) -> None:
    """End a request now, wherever it is; its blocks go back."""
    if feed.source is None:
        raise TinyVLLMError("there is no engine behind this panel")
    with feed.lock:
        request = feed.state.requests.get(request_id)
        if request is None or request.finished_ns is not None:
            raise TinyVLLMError(f"request {request_id} is not running or waiting: there is nothing to end")
    feed.source.abort(request_id)


def _shown_state(feed: "Feed") -> EngineState:
    """The state that the map shows: a past one while somebody looks at the past."""
    topic = feed.subscriptions.topic("blocks")
    return (topic.state if topic else None) or feed.state


def _from_state(state: EngineState, block_id: int) -> dict[str, Any]:
    size, owners = state.config["block_size"], list(state.block_owners.get(block_id, []))
    told = {"block": block_id, "owners": owners, "cached": block_id in state.cached_blocks, "tokens": None,
            "start": None, "filled": 0, "size": size, "last": None}
    place = state.block_places.get(block_id)
    request = state.requests.get(place[0]) if place else None
    if request is None:
        return told
    start = place[1] * size
    told["start"] = start
    if not owners:
        told["last"] = request.request_id
        if not told["cached"]:  # its keys may be anybody's by now: nothing of value
            told["tokens"] = []
            return told
    most = size if not owners else max(state.requests[name].num_computed_tokens for name in owners) - start
    told["filled"] = min(size, max(0, most))
    if request.prompt_token_ids is not None:
        ids = [*request.prompt_token_ids, *request.token_ids][start:start + told["filled"]]
        told["tokens"] = list(enumerate(ids, start))
    return told


def _from_pool(llm: Any, block_id: int) -> dict[str, Any]:
    pool = llm.engine.kv_cache_manager.pool
    found = pool.blocks[block_id]
    if found.block_hash is None:
        return {}
    parents, parent = 0, found.parent_hash
    while parent in pool.cached_blocks:
        parents, parent = parents + 1, pool.cached_blocks[parent].parent_hash
    start = parents * pool.block_size if parent == b"" else None  # None: a parent was evicted, its place is not known
    return {"start": start, "filled": len(found.token_ids),
            "tokens": [(None if start is None else start + i, token) for i, token in enumerate(found.token_ids)]}


def _with_texts(feed: "Feed", told: dict[str, Any]) -> dict[str, Any]:
    tokens = told["tokens"]
    shown = (tokens or [])[:MOST_TOKENS]
    return {**told, "known": tokens is not None, "left_out": len(tokens or []) - len(shown),
            "tokens": [[position, token, feed.source.token_text(token)] for position, token in shown]}
