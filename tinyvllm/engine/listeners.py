"""Who is told what comes of requests, and which ids are taken: the two books that a LiveEngine keeps for its users.

Both are used from any thread: a notebook's cells, callbacks in the engine's thread, arrivals.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

from tinyvllm.engine.request import Request
from tinyvllm.errors import TinyVLLMError
from tinyvllm.outputs import RequestOutput

if TYPE_CHECKING:
    from tinyvllm.engine.live import LiveEngine
    from tinyvllm.sampling_params import SamplingParams

OutputCallback = Callable[[RequestOutput], None]
ErrorCallback = Callable[[BaseException, str | None], None]


class Listeners:
    """Callbacks for outputs, and for errors that keep outputs from coming."""

    def __init__(self):
        self.error: BaseException | None = None  # the newest mistake of a callback: it is not the engine's
        self._lock = threading.Lock()
        self._all: list[tuple[OutputCallback, ErrorCallback | None]] = []

    def add(self, on_output: OutputCallback, on_error: ErrorCallback | None) -> Callable[[], None]:
        """Returns a function that takes it out again."""
        entry = (on_output, on_error)
        with self._lock:
            self._all = [*self._all, entry]  # replaced, not changed: the engine may be walking over it

        def remove() -> None:
            with self._lock:
                self._all = [other for other in self._all if other is not entry]

        return remove

    def tell(self, output: RequestOutput) -> None:
        for on_output, _ in self._all:
            self._call(on_output, output)

    def tell_error(self, error: BaseException, request_id: str | None = None) -> None:
        """request_id: the only one that it is about; None: all of them."""
        for _, on_error in self._all:
            if on_error is not None:
                self._call(on_error, error, request_id)

    def _call(self, callback: Callable, *arguments) -> None:
        try:
            callback(*arguments)
        except BaseException as error:  # an exit() too: of the engine's thread there is only one
            self.error = error


class TakenIds:
    """Ids of requests as their users see it: taken from `take` on, though the engine hears of it later; free again once
    the request has ended or somebody has asked for its end."""

    def __init__(self):
        self._lock = threading.Lock()
        self._taken: dict[str, Request] = {}
        self._submitted: dict[str, Request] = {}  # those that the engine has; its thread alone uses this

    def take(self, request: Request) -> bool:
        """Whether the request's id was free; now it is taken."""
        with self._lock:
            return self._taken.setdefault(request.request_id, request) is request

    def free(self, request_ids: Iterable[str] | None = None) -> None:
        """Their end was asked for: what is added from now on comes after it. None: of all."""
        with self._lock:
            for request_id in list(self._taken) if request_ids is None else request_ids:
                self._taken.pop(request_id, None)

    def submitted(self, request: Request) -> None:
        self._submitted[request.request_id] = request

    def ended(self, request: Request | str) -> None:
        """A request has ended (by its id), or the engine did not take it."""
        if isinstance(request, str):
            request = self._submitted.pop(request, None)
        with self._lock:
            if request is not None and self._taken.get(request.request_id) is request:  # not another one of that id
                del self._taken[request.request_id]


async def outputs_of(live: "LiveEngine", prompt: Any, params: "SamplingParams | None") -> AsyncIterator[RequestOutput]:
    """LiveEngine.stream: from callbacks in the engine's thread to a loop in another."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()
    request_id = None

    def take(output: RequestOutput) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (output.request_id, output))

    def fail(error: BaseException, of: str | None) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (of, error))

    remove, finished = live.on_output(take, fail), False
    try:
        request_id = live.add(prompt, params)
        while not finished:
            of, output = await queue.get()
            if of not in (None, request_id):
                continue
            if isinstance(output, BaseException):
                raise TinyVLLMError(f"request {request_id} got no further: {output}") from output
            finished = output.finished
            yield output
    finally:
        remove()
        if request_id is not None and not finished:
            live.abort(request_id)
