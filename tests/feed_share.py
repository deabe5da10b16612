"""What the live feed takes from the engine inside the one interpreter that both run in: no browser, no Jupyter.

    python -m tests.feed_share                              # the embedded model on the CPU, 8 requests
    python -m tests.feed_share --model llama-3.2-1b-shape --device cuda --requests 64

In turn, round by round: nobody listens; the feed reads the events; six panels' topics are computed and packed. The feed
is the real one, with its thread, its pace and its pauses; its messages go to a page that acknowledges what it is asked
to, and draws nothing. `tests.browser.feed_budget` measures the whole of it, page included.

A step lasts from the end of the one before it to its own: of an engine that runs ahead two are under way at a time, and
a look between two steps ends both.

tick_ms is the processor time of a tick; frames_per_s are those that left; age_p95_ms is how old their events were then.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.feed_stand_ins import Page
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.gpu_start import write_folder
from tinyvllm.engine.events import Event
from widgets.clock import SAMPLES
from widgets.feed import Feed
from widgets.frames import Packer

TOPICS = {"control": {}, "timeline": {}, "blocks": {}, "race": {"shown": 12}, "attention": {}, "step_anatomy": {}}
SHAPE = "llama-3.2-1b-shape"
MODEL_HELP = f"a folder, which may lack a tokenizer; {SHAPE} is one of random weights, made on first use (%(default)s)"
PHASES = ("nobody listens", "feed reads", "six topics")


class Acknowledging(Page):
    """A page that keeps nothing of a frame but its number."""

    asked: int | None = None  # the newest frame that asked to be acknowledged

    def send(self, content: dict, buffers: Any = None) -> None:
        if content.get("ack"):
            self.asked = content["n"]

    def acknowledge(self) -> None:
        number, self.asked = self.asked, None
        if number is not None:
            self.say({"op": "ack", "n": number, "drawn": time.time() * 1e3})


class MeasuredFeed(Feed):
    """A feed that begins with what comes now, and takes down what its ticks cost."""

    def __init__(self, live: LiveEngine):
        super().__init__(live, hub=Acknowledging(), start=False)
        self._reader._next_seq = live.events.next_seq
        self.forget_figures()
        self._pump_thread.start()

    def forget_figures(self) -> None:
        self.cpu_s, self.ticks, self.sent, self.ages_ms = 0.0, 0, 0, []

    def tick(self) -> None:
        before = time.thread_time()
        super().tick()
        self.cpu_s += time.thread_time() - before
        self.ticks += 1

    def _send_frame(self, topics: dict, live: dict, packer: Packer, events: list[Event]) -> None:
        super()._send_frame(topics, live, packer, events)
        now = time.perf_counter_ns()
        self.ages_ms += [(now - event.t_ns) / 1e6 for event in events[::max(1, len(events) // SAMPLES)]]
        self.sent += 1


def find_model(name: str) -> str:
    """The folder of SHAPE, which is written if it is not there; any other name as it is."""
    if name != SHAPE:
        return name
    folder = Path(tempfile.gettempdir()) / f"tinyvllm-{SHAPE}"
    if not (folder / "config.json").exists():  # it is written last
        write_folder(folder, LLAMA_3_2_1B)
    return str(folder)


class Bench:
    """A LiveEngine that is kept busy."""

    def __init__(self, model: str, device: str, requests: int, output_tokens: int):
        self.llm = LLM(find_model(model), device=device, max_num_seqs=requests, use_tqdm=False,
                       skip_tokenizer_init=model != "demo")
        self.live, self.ends = LiveEngine(self.llm), []
        self.numbers, self.draw, self.output_tokens = itertools.count(), random.Random(0), output_tokens
        inner = self.llm.engine.pipeline.take_in

        def take_in():
            inner()
            self.ends.append(time.perf_counter_ns())

        self.llm.engine.pipeline.take_in = take_in
        self.live.on_output(lambda output: self.add() if output.finished else None)
        for _ in range(requests):
            self.add()
        self.trouble: list[BaseException] = []

    def add(self) -> None:
        count = self.llm.model_config.vocab_size - 300
        self.live.add([self.draw.randrange(count) for _ in range(self.draw.randint(16, 64))],
                      SamplingParams(temperature=0, max_tokens=self.output_tokens, ignore_eos=True))

    def phase(self, name: str, seconds: float) -> dict[str, float]:
        self.live.between_steps(lambda llm: llm.engine.listen(None)).result()
        feed = None
        if name != "nobody listens":
            feed = MeasuredFeed(self.live)
            self.live.tell_again()
        if name == "six topics":
            for topic, params in TOPICS.items():
                feed.hub.ready(topic, view=topic, **params)
        wait(0.5, feed)
        self.ends.clear()
        if feed:
            feed.forget_figures()
        wait(seconds, feed)
        seen = list(self.ends)
        found = {"tick_ms": 0.0, "ticks_per_s": 0.0, "frames_per_s": 0.0, "age_p95_ms": 0.0}
        if feed:
            feed.close()
            self.trouble += [feed.error] if feed.error else []
            ages = sorted(feed.ages_ms)
            found = {"tick_ms": 1e3 * feed.cpu_s / max(1, feed.ticks), "ticks_per_s": feed.ticks / seconds,
                     "frames_per_s": feed.sent / seconds, "age_p95_ms": ages[int(0.95 * len(ages))] if ages else 0.0}
        steps = step_figures(seen)
        if not steps["steps"]:  # kernels were being compiled
            return self.phase(name, seconds)
        return {**steps, **found}


def step_figures(ends_ns: list[int]) -> dict[str, float]:
    """How long the steps took that ended at these times; all zeros if there were none."""
    steps = sorted((b - a) / 1e6 for a, b in zip(ends_ns, ends_ns[1:]))
    if not steps:
        return dict.fromkeys(("steps", "mean_ms", "median_ms", "p99_ms"), 0)
    return {"steps": len(steps), "mean_ms": statistics.fmean(steps), "median_ms": statistics.median(steps),
            "p99_ms": steps[int(0.99 * len(steps))]}


def wait(seconds: float, feed: Feed | None) -> None:
    """Let things run; the page draws a frame within 0.1 seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        if feed:
            feed.hub.acknowledge()


def main() -> None:
    parser = argparse.ArgumentParser(description="The feed's share of the interpreter.")
    parser.add_argument("--model", default="demo", help=MODEL_HELP)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each phase in each round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    bench = Bench(options.model, options.device, options.requests, options.output_tokens)
    time.sleep(2)
    for name in PHASES:
        bench.phase(name, 1.0)
    taken = {name: [] for name in PHASES}
    for i in range(options.rounds):
        for name in PHASES if i % 2 == 0 else PHASES[::-1]:
            taken[name].append(bench.phase(name, options.seconds))
    found = {}
    for name, rounds in taken.items():
        found[name] = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for key in ("mean_ms", "p99_ms"):
            found[name][key.replace("_ms", "_ratio")] = statistics.median(
                r[key] / base[key] for r, base in zip(rounds, taken["nobody listens"]))
        print(f"{name:16} " + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True)
    print("trouble:", bench.trouble or None, bench.live.error, f"{threading.active_count()} threads")
    if options.json:
        options.json.write_text(json.dumps({"environment": describe_environment("numba-cuda"), **vars(options),
                                            "json": None, "phases": found}, indent=1, default=str) + "\n")
    bench.live.stop()
    bench.live.close()


if __name__ == "__main__":
    main()
