"""The feed: events -> pump thread -> topics -> one message a frame -> every panel in the page.

    engine thread ── events ──> EventLog <── read ── pump thread ── EngineState ── topics ──> Hub ──> page
                                                          ^                                            │
                                                          └───── ready, visible, ack, ask, command ────┘

Only topics that somebody can see are computed, as often as pace.py says. A page that cannot draw as fast is not sent
more (clock.py). A reader that fell behind sees the gap in the sequence numbers and asks the engine to tell its state
again. The pump never touches the engine: it reads the log, and asks by `between_steps`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from tinyvllm.engine.events import Event
from tinyvllm.engine.state import EngineState
from tinyvllm.errors import TinyVLLMError
from widgets.answers.inspect import check_address
from widgets.clock import FeedStats, Flow, LatencyClock
from widgets.frames import Packer, Payload
from widgets.hub import Hub, checked_selection
from widgets.pace import FRAMES_PER_SECOND
from widgets.pump import Pump
from widgets.reader import Reader
from widgets.register import load_all
from widgets.replies import reply
from widgets.subscriptions import Subscription, Subscriptions

MOST_WAITING = 20_000  # events that wait for a frame: beyond that a snapshot is cheaper


class Feed:
    """Feeds the panels of one engine, live or recorded.

    source: a LiveEngine, a ReplayEngine, or None for panels that need no engine. frames_per_second: the most that is
    sent. hub: where messages go (tests put their own there). start: whether the pump's thread begins at once.
    """

    def __init__(self, source: Any = None, *, frames_per_second: float = FRAMES_PER_SECOND, hub: Any = None,
                 start: bool = True):
        self._pump_thread = Pump(self, frames_per_second)
        load_all()
        self._reader = Reader(source)
        self.hub = Hub() if hub is None else hub
        self.lock = threading.RLock()  # around state and subscriptions: the pump writes, answers read
        self.stats = FeedStats()
        self.error: BaseException | None = None  # the last mistake in a topic; the feed goes on without it
        self.subscriptions = Subscriptions(self)
        self._frame = 0
        self.flow = Flow()
        self._clock = LatencyClock()
        self._told: dict[str, Any] | None = None
        self._recording: list[Event] | None = None
        self._backlog: list[Event] = []  # events that no frame has carried yet
        self.on_close: list[Callable[[], Any]] = []  # called by close(): to end threads that serve this feed
        self._put_aside: dict[int, Reader] = {}  # of sources that switch_to may come back to
        self._cursor: float | None = None  # of the last frame
        self._closed = threading.Event()
        self._is_still = False  # the engine is closed: no pump, and frames on demand
        self.hub.listen(self._on_message)
        if source is not None and start:
            self._pump_thread.start()

    @classmethod
    def of(cls, source: Any) -> "Feed":
        """The feed of an engine: made on first use, then the same for every panel of it. A Feed is its own."""
        if isinstance(source, Feed):
            return source
        if source is None:
            return cls(None)
        if not hasattr(source, "events"):
            raise TypeError(f"a panel needs a LiveEngine, a ReplayEngine or a Feed, got {type(source).__name__}; "
                            "for an LLM write LiveEngine(llm)")
        feed = getattr(source, "_feed", None)
        if feed is None or feed.closed:
            feed = source._feed = cls(source)
        return feed

    # ---- for notebooks ----

    @property
    def source(self) -> Any:
        """The engine that is shown: a LiveEngine, a ReplayEngine, or None."""
        return self._reader.source

    @property
    def state(self) -> EngineState:
        """The engine's state as its events tell it, now."""
        return self._reader.state

    @property
    def selection(self) -> dict[str, Any]:
        """What is selected in every panel: request, token, layer, head, block, step."""
        return dict(self.hub.selection)

    def select(self, **what: Any) -> None:
        """Select something in every panel: feed.select(request="0", layer=3)."""
        self.hub.selection = {**self.hub.selection, **checked_selection(what)}

    def inspect(self, kind: str, **address: Any) -> None:
        """Open every BitLens of this feed on one value: feed.inspect("weight", name="model.norm.weight", row=3).

        The kinds and what says where they are: see answers/inspect.py. Raises TinyVLLMError.
        """
        address = {"column": None, **address} if kind == "weight" else address
        check_address({"kind": kind, **address})
        self.hub.inspected = {"kind": kind, **address, "n": time.time_ns() // 1_000_000}

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """End the pump. The engine goes on."""
        self._closed.set()
        self._is_still = False
        for end in self.on_close:
            end()
        self._pump_thread.join()

    def __repr__(self) -> str:
        return f"Feed({self.source!r}, {len(self.subscriptions)} topics, {self.stats.frames} frames)"

    def ms(self, t_ns: int) -> float:
        """A time of an event in the page's unit: milliseconds since the feed's origin."""
        return self._reader.ms(t_ns)

    def all_ms(self, times_ns: Sequence[int | None]) -> np.ndarray:
        """The same of many times: float64, NaN for None."""
        return self._reader.all_ms(times_ns)

    def record(self) -> None:
        """Begin to keep every event, starting with the state as it is; `stop_recording` gives them."""
        if self.source is None:
            raise TinyVLLMError("there is no engine here to record")
        with self.lock:
            if self.is_recording:
                raise TinyVLLMError("a recording is going on: stop it first")
            self._recording = []
        self.source.tell_again()

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def stop_recording(self) -> list[Event]:
        """The events since `record`, beginning with the engine's configuration."""
        with self.lock:
            if self._recording is None:
                raise TinyVLLMError("nothing is being recorded: call record() first")
            self._pump()
            events, self._recording = self._recording, None
        first = next((i for i, event in enumerate(events) if event.kind == "engine_config"), len(events))
        return events[first:]

    def switch_to(self, source: Any) -> None:
        """Show another engine in the same panels: a recorded run in the place of the live one, and back again."""
        if not hasattr(source, "events") or self.source is None:
            raise TypeError("switch_to puts one engine in the place of another, a LiveEngine or a ReplayEngine, "
                            f"got {type(source).__name__} for {type(self.source).__name__}")
        with self.lock:
            if self.is_recording:
                raise TinyVLLMError("a recording is going on: stop it first")
            self._put_aside[id(self.source)] = self._reader
            self._reader = self._put_aside.pop(id(source), None) or Reader(source)
            self._backlog, self._told, self.error = [], None, None
            self.hub.cursor = None
            self.subscriptions.need_snapshots()

    def forget(self, source: Any) -> None:
        """switch_to will not come back to this source."""
        self._put_aside.pop(id(source), None)

    def look(self, function: Any, *arguments: Any) -> Future:
        """Call function(llm, *arguments) between two steps of the engine; a recorded run's Future holds the refusal."""
        if self.source is None:
            future: Future = Future()
            future.set_exception(TinyVLLMError("there is no engine behind this panel"))
            return future
        return self.source.between_steps(function, *arguments)

    # ---- the pump ----

    def breathe(self) -> None:
        """For topics with much to do: let an engine at full speed in. Call it every 0.1 ms or so of work."""
        self._pump_thread.breathe()

    def later(self, job: Callable, *arguments: Any) -> None:
        """Call job(*arguments) in the pump's thread, soon; here and now if that does not run."""
        self._pump_thread.later(job, *arguments)

    def end(self) -> None:
        """The engine is closed, so the pump's thread ends. Frames come now only when the page asks for them."""
        self._closed.set()
        self._is_still = True
        self.hub.observe(lambda _: self._tick_still(), ["selection", "cursor"])

    def _tick_still(self) -> None:
        """A frame of a run that is over: a page that was reloaded, a panel that was made late, a look back."""
        with self.lock:
            if self._is_still:
                try:
                    self.tick()
                except Exception as error:
                    self.error = error

    def tick(self) -> None:
        """One frame: take in what happened, and send what changed to whoever can see it."""
        events = self._pump()
        visible = self.subscriptions.visible_ones()
        if not visible or self.flow.is_congested() and not self._is_still:
            self._missed(events)
            return
        events = self._with_missed(events)
        past = self._look_back()
        packer, topics = Packer(), {}
        for key, sub in visible:
            payload = self._payload(sub, events, past)
            if payload is not None:
                topics[key] = {"mode": "snapshot" if sub.needs_snapshot else "delta", **packer.add(payload)}
                sub.needs_snapshot = False
                self.breathe()
        self.subscriptions.need_snapshots(lambda sub: not sub.visible)
        live = self.live()
        if topics or live != self._told:
            self._told = live
            self._send_frame(topics, live, packer, events)

    def live(self) -> dict[str, Any]:
        """What every panel may want to know of the run, in a few numbers."""
        state, source = self.state, self.source
        steps = state.steps[-1].step if state.steps else state.first_step
        return {"kind": source.kind, "state": source.state, "error": str(source.error) if source.error else None,
                "step": steps, "used_blocks": state.num_used_blocks, "gaps": state.gaps, "config": state.config,
                "feed_error": f"{type(self.error).__name__}: {self.error}" if self.error else None}

    def _pump(self) -> list[Event]:
        """Events since the last time, applied to the state."""
        gaps, started = self._reader.num_gaps, time.thread_time()
        told, events, anew = self._reader.read(self.breathe)
        self.stats.gaps += self._reader.num_gaps - gaps
        if anew:
            self.subscriptions.need_snapshots()
        if self._recording is not None:
            self._recording += told
        self.stats.events += len(events)
        self.stats.read_s += time.thread_time() - started
        return events

    def _look_back(self) -> EngineState | None:
        """The state at the cursor, if it is set and some topic has to be drawn anew for it; None otherwise."""
        if self.hub.cursor != self._cursor:
            self._cursor = self.hub.cursor
            self.subscriptions.need_snapshots(lambda sub: sub.topic.scrubbable)
        wanted = any(sub.topic.scrubbable and sub.needs_snapshot for _, sub in self.subscriptions.visible_ones())
        return self._reader.state_at(self._cursor) if wanted and self._cursor is not None else None

    def _payload(self, sub: Subscription, events: list[Event], past: EngineState | None) -> Payload | None:
        try:
            if sub.topic.scrubbable and self._cursor is not None:
                return sub.topic.snapshot(past) if sub.needs_snapshot else None
            if sub.needs_snapshot:
                return sub.topic.snapshot(self.state)
            return sub.topic.delta(self.state, events)
        except Exception as error:
            self.error, sub.needs_snapshot = error, True
            return None

    def _missed(self, events: list[Event]) -> None:
        """Keep events for the next frame; if they become too many, a snapshot is cheaper."""
        self._backlog += events
        if len(self._backlog) > MOST_WAITING or not self.subscriptions.visible_ones():
            self._backlog = []
            self.subscriptions.need_snapshots()

    def _with_missed(self, events: list[Event]) -> list[Event]:
        backlog, self._backlog = self._backlog, []
        return backlog + events

    def _send_frame(self, topics: dict, live: dict, packer: Packer, events: list[Event]) -> None:
        self._frame += 1
        asks = self.flow.sent(self._frame)
        if asks:
            self._clock.sent(self._frame, events)
        buffers = packer.buffers()
        try:
            with self._pump_thread.sending():
                self.hub.send({"type": "frame", "n": self._frame, "now": self.ms(self.source.now_ns()), "live": live,
                               "topics": topics, "ack": asks}, buffers)
        except Exception:
            self.subscriptions.need_snapshots()  # the page does not have what this frame said
            raise
        self.stats.frames += 1
        self.stats.bytes += sum(map(len, buffers))

    # ---- what the page says (called in the kernel's main thread) ----

    def _on_message(self, message: dict[str, Any]) -> None:
        self.stats.messages_in += 1
        try:
            self._hear(message)
        except Exception as error:  # of whatever page this came: the feed goes on for the others
            self.error = error

    def _hear(self, message: dict[str, Any]) -> None:
        said = message.get("op")
        if said == "ack":
            self._ack(message)
        elif said == "ask":
            reply(self, message)
        elif said in ("ready", "visible", "gone"):
            with self.lock:
                getattr(self.subscriptions, said)(message)
            self._tick_still()

    def _ack(self, message: dict) -> None:
        self.flow.acknowledged(message["n"])
        self._clock.drawn(message["n"], message["drawn"], self.stats)
