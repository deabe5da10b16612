"""What the live feed takes from the engine inside the one interpreter that both run in: no browser, no Jupyter.

    python -m tests.feed_share                              # the embedded model on the CPU, 8 requests
    python -m tests.feed_share --model FOLDER --device cuda --requests 64

In turn, round by round: nobody listens; the feed reads the events; six panels' topics are computed and packed, at the
rate at which a page would be sent them. `tests.browser.feed_budget` measures the whole of it, page included.
"""

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from pathlib import Path

from tests.feed_stand_ins import Page
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.bench.environment import describe_environment
from widgets.feed import FRAMES_PER_SECOND, Feed
from widgets.pace import Pace

TOPICS = {"control": {}, "timeline": {}, "blocks": {}, "race": {"shown": 12}, "attention": {}, "step_anatomy": {}}
PHASES = ("nobody listens", "feed reads", "six topics")


class Bench:
    """A LiveEngine that is kept busy, and a feed whose frames go nowhere."""

    def __init__(self, model: str, device: str, requests: int, output_tokens: int):
        self.llm = LLM(model, device=device, max_num_seqs=requests, use_tqdm=False, skip_tokenizer_init=model != "demo")
        self.live, self.begins = LiveEngine(self.llm), []
        self.numbers, self.draw, self.output_tokens = itertools.count(), random.Random(0), output_tokens
        inner = self.llm.engine.step

        def step(**options):
            self.begins.append(time.perf_counter_ns())
            return inner(**options)

        self.llm.engine.step = step
        self.live.on_output(lambda output: self.add() if output.finished else None)
        for _ in range(requests):
            self.add()
        self.feed = Feed(self.live, hub=Page(), start=False)
        self.page = self.feed.hub

    def add(self) -> None:
        count = self.llm.model_config.vocab_size - 300
        self.live.add([self.draw.randrange(count) for _ in range(self.draw.randint(16, 64))],
                      SamplingParams(temperature=0, max_tokens=self.output_tokens, ignore_eos=True))

    def phase(self, name: str, seconds: float) -> dict[str, float]:
        if name == "nobody listens":
            self.live.between_steps(lambda llm: llm.engine.listen(None)).result()
        else:
            self.live.tell_again()
        if name == "six topics":
            for topic, params in TOPICS.items():
                self.page.ready(topic, view=topic, **params)
            self.feed.tick()
        time.sleep(0.2)
        self.begins.clear()
        cpu = ticks = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(Pace(FRAMES_PER_SECOND).interval_s(len(TOPICS) if name == "six topics" else 0))
            if name != "nobody listens":
                before = time.thread_time()
                self.feed.tick()
                cpu += time.thread_time() - before
                ticks += 1
                if self.page.frames:
                    self.page.say({"op": "ack", "n": self.page.frames[-1]["n"], "drawn": time.time() * 1e3})
                    self.page.frames.clear()
        seen = list(self.begins)
        for topic in TOPICS:
            self.page.say({"op": "gone", "view": topic})
        steps = sorted((b - a) / 1e6 for a, b in zip(seen, seen[1:]))
        if not steps:  # kernels were being compiled
            return self.phase(name, seconds)
        return {"steps": len(steps), "mean_ms": statistics.fmean(steps), "median_ms": statistics.median(steps),
                "p99_ms": steps[int(0.99 * len(steps))], "tick_ms": 1e3 * cpu / ticks if ticks else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description="The feed's share of the interpreter.")
    parser.add_argument("--model", default="demo")
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
    print("trouble:", bench.feed.error, bench.live.error, f"{threading.active_count()} threads")
    if options.json:
        options.json.write_text(json.dumps({"environment": describe_environment("numba-cuda"), **vars(options),
                                            "json": None, "phases": found}, indent=1, default=str) + "\n")
    bench.live.stop()
    bench.live.close()


if __name__ == "__main__":
    main()
