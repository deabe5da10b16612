"""Topic "trail": the tokens of the selected request, how far they are computed, and where their keys and values lie.

A delta carries new tokens only, and the block list only when it changed. Another selection begins anew.
"""

from typing import Any

import numpy as np

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState, RequestState
from widgets.frames import Payload
from widgets.topics.base import Topic, register
from widgets.vocabulary import describe_tokens


@register
class TrailTopic(Topic):
    """No params. Arrays: ids int32, the new tokens; blocks int32, all block ids of the request, in its order."""

    name = "trail"
    scrubbable = True

    def __init__(self, feed: Any):
        super().__init__(feed)
        self._request: RequestState | None = None
        self._sent: tuple = ()
        self._num_sent = 0
        self._sent_blocks: list[int] | None = None

    def snapshot(self, state: EngineState) -> Payload:
        self._request = state.requests.get(self.feed.hub.selection["request"])
        self._num_sent, self._sent_blocks = 0, None
        return self._tell(state, begins=True)

    def delta(self, state: EngineState, events: list[Event]) -> Payload | None:
        if state.requests.get(self.feed.hub.selection["request"]) is not self._request:
            return self.snapshot(state)
        if self._request is None or self._numbers(self._request) == self._sent:
            return None
        return self._tell(state, begins=False)

    def _tell(self, state: EngineState, begins: bool) -> Payload:
        data: dict[str, Any] = {"begins": begins, "block_size": state.config.get("block_size"), "request": None}
        arrays = {"ids": np.zeros(0, np.int32)}
        request = self._request
        if request is not None:
            self._sent = self._numbers(request)
            is_recorded = request.prompt_token_ids is not None
            tokens = (request.prompt_token_ids or []) + request.token_ids
            new = tokens[self._num_sent:]
            data |= {"request": request.request_id, "status": request.status, "prompt": request.num_prompt_tokens,
                     "is_prompt_recorded": is_recorded, "computed": request.num_computed_tokens,
                     "cached": request.num_cached_tokens, "tokens": describe_tokens(self.feed, new)}
            arrays["ids"] = np.array(new, np.int32)
            self._num_sent = len(tokens)
            if request.block_ids != self._sent_blocks:
                self._sent_blocks = list(request.block_ids)
                arrays["blocks"] = np.array(self._sent_blocks, np.int32)
        return Payload(data, arrays)

    @staticmethod
    def _numbers(request: RequestState) -> tuple:
        blocks = request.block_ids
        return (request.status, request.num_computed_tokens, len(request.token_ids), len(blocks),
                blocks[-1] if blocks else None, blocks[0] if blocks else None)
