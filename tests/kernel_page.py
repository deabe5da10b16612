"""A real Jupyter kernel without a browser: a client that says what a page of panels would say, and draws nothing.

    with KernelPage() as page:
        page.python("...; display(dashboard)")
        page.listen(hub_id, {"timeline": {}, "blocks": {}})  # as many views, all of them visible
        page.wait(1.0)
        print(page.python("print(feed.stats.frames)"))

What a kernel pays for its panels it pays here too: computing, packing, sending, hearing what comes back. So it measures
them on a machine that has no browser, or where one would take the processor from the kernel.
"""

import queue
import time
from typing import Any, Self

from jupyter_client.manager import KernelManager

from tests.feed_stand_ins import ready_message

PATIENCE_S = 120.0


class KernelPage:
    """One kernel, one client, one thread: messages are heard while `python` or `wait` is running."""

    def __init__(self):
        self._manager = KernelManager(kernel_name="python3")
        self._hub: str | None = None
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._manager.start_kernel()
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE_S)
        return self

    def __exit__(self, *_) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def python(self, code: str) -> str:
        """Run code in the kernel; what it prints. Raises RuntimeError with its traceback."""
        asked = self._client.execute(code, stop_on_error=False)  # else what comes next would be dropped unheard
        printed, deadline = [], time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = self._hear(0.1)
            if message is None or message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream" and content["name"] == "stdout":
                printed.append(content["text"])
            elif kind == "error":
                raise RuntimeError("\n".join(content["traceback"]))
            elif kind == "status" and content["execution_state"] == "idle":
                return "".join(printed)
        raise TimeoutError(f"the kernel was not done after {PATIENCE_S:.0f} s with: {code}")

    def wait(self, seconds: float) -> None:
        """Let things run; frames are acknowledged as soon as they come."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._hear(left)

    def listen(self, hub_id: str, topics: dict[str, dict]) -> None:
        """Be a page in which these topics ({name: parameters}) have a visible view each."""
        self._hub, self._topics = hub_id, topics
        for topic, params in topics.items():
            self._say(ready_message(topic, view=topic, visible=True, params=params))

    def show(self, visible: bool) -> None:
        """The views come into sight, or go out of it."""
        for topic in self._topics:
            self._say({"op": "visible", "view": topic, "visible": visible})

    def _say(self, content: dict[str, Any]) -> None:
        self._client.shell_channel.send(self._client.session.msg("comm_msg", {
            "comm_id": self._hub, "data": {"method": "custom", "content": content}}))

    def _hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None."""
        try:
            message = self._client.get_iopub_msg(timeout=seconds)
        except queue.Empty:
            return None
        content = message["content"]
        if message["msg_type"] == "comm_msg" and content["comm_id"] == self._hub:
            frame = content["data"].get("content", {})
            if frame.get("type") == "frame" and frame.get("ack"):
                self._say({"op": "ack", "n": frame["n"], "drawn": time.time() * 1e3})
        elif message["msg_type"] == "error":
            self.errors.append(content["evalue"])
        while self._client.shell_channel.msg_ready():  # replies that nobody waits for
            self._client.get_shell_msg(timeout=0)
        return message
