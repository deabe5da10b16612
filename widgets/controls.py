"""What a control bar can do to an engine, in one place: commands, arrivals, recording, and replay in its stead.

One Controls for each feed, so that two bars of one engine show the same. It is called from the kernel's main thread
(what a page asks) and from the arrivals' thread; everything returns at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.engine.recording import describe_run
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from tinyvllm.sampling_params import SamplingParams
from widgets.arrivals import MOST_WAITING, LiveArrivals

if TYPE_CHECKING:
    from widgets.feed import Feed

MOST_AT_ONCE = 1000  # requests of one burst
DEFAULT_PARAMS = SamplingParams(temperature=0.8, max_tokens=200)


class ControlError(TinyVLLMError, ValueError):
    """A control was used in a way that cannot be."""


class Controls:
    """The engine of a feed under control. prompts: what arrivals ask for, one after the other and round again: texts
    (each a user's message where the model chats), conversations, or lists of token ids. params: how they are answered.
    """

    def __init__(self, feed: "Feed"):
        self.feed = feed
        self.prompts: Sequence[Any] = default_prompts()
        self.params = DEFAULT_PARAMS
        self.set_aside: Any = None  # the live engine, while a recorded run is shown in its place
        self.recorded: dict[str, Any] = {}  # of the newest trace file: path, events, steps
        self._unsaved: list | None = None
        self.arrivals = LiveArrivals(self._bring, is_over=self._is_over, may_come=self._may_come)

    @classmethod
    def of(cls, feed: "Feed") -> "Controls":
        """The controls of a feed, made on first use."""
        if getattr(feed, "_controls", None) is None:
            feed._controls = cls(feed)
            feed.on_close.append(feed._controls.close)
        return feed._controls

    @property
    def engine(self) -> Any:
        """What is under control now. Raises ControlError if there is nothing."""
        if self.feed.source is None:
            raise ControlError("there is no engine behind this bar: make it with ControlBar(LiveEngine(llm))")
        return self.feed.source

    def cannot(self) -> dict[str, str]:
        """What the engine at hand cannot do -> why."""
        if self.engine.kind != "replay":
            return {}
        whys = {"policy": "it was scheduled as it was scheduled", "options": "its cache is as it was recorded",
                "arrivals": "nobody new can arrive in it", "record": "it is a recording already"}
        return {what: f"This is a recorded run: {why}." for what, why in whys.items()}

    # ---- arrivals ----

    def use(self, prompts: Iterable[Any] | None, params: SamplingParams | None) -> None:
        """What arrivals ask for from now on. Raises ControlError."""
        if prompts is not None:
            if not isinstance(prompts, Iterable):
                raise ControlError(f"prompts are texts, conversations or lists of token ids, "
                                   f"got {type(prompts).__name__}")
            prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
            if not prompts:
                raise ControlError("prompts is empty: give at least one, or leave it out for the default ones")
            self.prompts = prompts
        if params is not None:
            if not isinstance(params, SamplingParams):
                raise ControlError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
            self.params = params

    def burst(self, count: int) -> None:
        """So many arrivals at once."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_AT_ONCE:
            raise ControlError(f"a burst can be 1 to {MOST_AT_ONCE} requests, got {count!r}")
        first, self.arrivals.sent = self.arrivals.sent, self.arrivals.sent + count
        for number in range(first, first + count):
            self._bring(number)

    def _bring(self, number: int) -> None:
        engine, prompt = self._live(), self.prompts[number % len(self.prompts)]
        params = self.params
        if params.temperature > 0 and params.seed is None:  # the same traffic again gives the same texts
            params = SamplingParams(**{name: getattr(params, name) for name in params.__dataclass_fields__
                                       if name != "seed"}, seed=number)
        is_text = isinstance(prompt, str)
        if is_text and engine.llm.tokenizer is not None and engine.llm.tokenizer.chat_template:
            prompt, is_text = [{"role": "user", "content": prompt}], False
        is_chat = not is_text and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)
        (engine.chat if is_chat else engine.add)(prompt, params)

    def _live(self) -> Any:
        if self.engine.kind == "replay":
            raise ControlError(self.cannot()["arrivals"])
        return self.engine

    def _is_over(self) -> bool:
        return self.feed.closed or self.engine.state == "closed" or self.engine.kind == "replay"

    def _may_come(self) -> bool:
        return self.engine.state not in ("paused", "failed") and self.engine.stats.num_waiting < MOST_WAITING

    # ---- commands that are more than the engine's own ----

    def stop(self) -> None:
        """End every request, and the arrivals."""
        self.engine.stop()
        self.arrivals.set_rate(0)

    def reset(self, **changes: Any) -> None:
        """Begin anew; the policy and the limits that were set stay, and arrivals begin from their first."""
        engine = self.engine
        if engine.kind == "replay":
            engine.reset(**changes)
            return
        config = self.feed.state.config
        kept = {name: config[name] for name in ("scheduling_policy", "max_num_seqs", "max_num_batched_tokens")
                if name in config and name not in changes}
        engine.reset(**changes)
        plan = engine.llm.memory_plan
        engine.set_policy(**{name: value if isinstance(value, str) else min(value, getattr(plan, name))
                             for name, value in kept.items()})
        self.arrivals.begin_again()

    # ---- recording ----

    def record(self) -> None:
        """Begin to record."""
        if "record" in self.cannot():
            raise ControlError(self.cannot()["record"])
        if self.feed.is_recording:
            raise ControlError("a recording is going on: stop it first")
        self.feed.record()

    def stop_recording(self, name: str = "") -> None:
        """Write what was recorded to a file; if it cannot be written, nothing is lost: try another name."""
        path = trace_path(name)
        if self._unsaved is None:
            self._unsaved = self.feed.stop_recording() or None
            if self._unsaved is None:
                raise ControlError("the engine has said nothing since the recording began: there is nothing to save")
        try:
            Trace(self._unsaved, describe_run(self._live().llm, self._unsaved)).save(path)
        except OSError as error:
            raise ControlError(f"the recording could not be written to {path} ({error.strerror or error}); it is kept: "
                               "give another name and save again") from None
        self.recorded = {"path": str(path), "events": len(self._unsaved),
                         "steps": sum(event.kind == "step_begun" for event in self._unsaved)}
        self._unsaved = None

    @property
    def has_unsaved(self) -> bool:
        """Whether a recording waits for a name under which it can be saved."""
        return self._unsaved is not None

    # ---- a recorded run in the place of the live one ----

    def replay(self, name: str = "") -> None:
        """Show a trace file in every panel of this feed; the live engine waits, paused. Without a name: the newest."""
        if not isinstance(name, str):
            raise ControlError(f"the name of a trace file is text, got {type(name).__name__}")
        path = name.strip() or self.recorded.get("path")
        if not path:
            raise ControlError("nothing was recorded yet: record a run first, or give the name of a trace file")
        try:
            engine = ReplayEngine(_existing(path), paused=True)
        except OSError as error:
            raise ControlError(f"there is no trace file {path} that can be read ({error.strerror or error})") from None
        try:
            self.arrivals.close()
            was = self.engine
            self.feed.switch_to(engine)
        except Exception:
            engine.close()
            raise
        if was.kind == "replay":
            self._close(was)
        else:
            was.pause()
            self.set_aside = was
        engine.resume()

    def back_to_live(self) -> None:
        """The live engine again, paused as it was left."""
        if self.set_aside is None:
            raise ControlError("there is no live engine to go back to")
        recorded, live, self.set_aside = self.engine, self.set_aside, None
        self.feed.switch_to(live)
        self._close(recorded)

    def _close(self, replay: ReplayEngine) -> None:
        self.feed.forget(replay)
        replay.close()

    def close(self) -> None:
        """End the threads that were started here. The engine goes on."""
        self.arrivals.close()
        if self.set_aside is not None:
            self.back_to_live()


def default_prompts() -> list[str]:
    """Requests for fables, as the embedded model likes them."""
    from tinyvllm.demo.show import PROMPTS

    return list(PROMPTS)


def trace_path(name: str) -> Path:
    """Where a recording of this name goes: never over another file. Without a name: run-1.jsonl, run-2.jsonl, ..."""
    if not isinstance(name, str):
        raise ControlError(f"the name of a recording is text, got {type(name).__name__}")
    path = Path(name.strip() or "run")
    if "\0" in name or path.name in ("", ".."):
        raise ControlError(f"{name!r} cannot be the name of a file")
    stem = path.name.removesuffix(".jsonl")
    parent = path.expanduser().parent
    candidates = [parent / f"{stem}.jsonl"] if name.strip() else []
    number = 2 if candidates else 1
    while not candidates or candidates[-1].exists():
        candidates.append(parent / f"{stem}-{number}.jsonl")
        number += 1
    return candidates[-1]


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.exists() or path.suffix == ".jsonl" else path.with_name(path.name + ".jsonl")
