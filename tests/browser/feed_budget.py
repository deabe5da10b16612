"""What the live panels cost the engine, measured where it counts: a real JupyterLab in a real Chromium.

    python -m tests.browser.feed_budget                 # about four minutes; writes tinyvllm/bench/results/feed.json
    python -m tests.browser.feed_budget --no-browser --device cuda --model llama-3.2-1b-shape --json out.json

In turn, round by round: nobody listens; the feed listens and every panel is hidden; six panels are visible. The engine
is kept busy with `--requests` requests, of the embedded model if nothing else is said: its steps are the shortest there
are, so the feed's share is at its largest. A step's time is from the end of the one before it to its own.

Twice: once the kernel, engine and feed in it, has a processor core for itself, so that what is seen is the feed's cost
and not that of a browser which draws without a GPU; once everything shares the processor, as on a small laptop.
With --no-browser the kernel is a real one and has all cores, and a client acknowledges what a page would draw: the cost
on a machine whose kernel need not share a core, or that has no browser.

Budget: mean step +3%, 99th percentile +10%, at most 150 messages a second both ways, 100 ms at the 95th percentile
from an event to its pixels.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from tests.feed_share import MODEL_HELP, TOPICS
from tests.kernel_page import KernelPage
from tinyvllm.bench.environment import describe_environment

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "tinyvllm/bench/results/feed.json"
PANELS = ("ControlBar", "SchedulerTimeline", "KVBlockMap", "TokenRace", "AttentionScope", "StepAnatomy")
BUDGET = {"mean": 1.03, "p99": 1.10, "messages_per_s": 150, "latency_p95_ms": 100}
NO_BROWSER = "a kernel with all cores, no browser"

SETUP = """
import json, os, sys
if {core} is not None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {{{core}}})
sys.path.insert(0, {repository!r})
from IPython.display import display
from tests.feed_share import Bench, step_figures
from widgets import Dashboard

bench = Bench({model!r}, {device!r}, {requests}, 400)
live, ends = bench.live, bench.ends
"""
SHOW = "dashboard = Dashboard(live, panels={panels!r}); feed = dashboard.feed; display(dashboard)"

PHASES = {
    "nobody listens": "live.between_steps(lambda llm: llm.engine.listen(None)).result()",
    "feed listens, panels hidden": "live.tell_again()",
    "six panels visible": "live.tell_again()",
}


class BrowserPage:
    """The notebook in JupyterLab, with the methods of a KernelPage."""

    def __init__(self, page):
        self._page, self.python = page, page.python

    def show(self, visible: bool) -> None:
        self._page.page.evaluate(
            "(shown) => document.querySelectorAll('.tv-panel').forEach((panel) => { panel.style.display = shown; })",
            "block" if visible else "none")

    def wait(self, seconds: float) -> None:
        self._page.page.wait_for_timeout(seconds * 1e3)


def measure(page, phase: str, seconds: float) -> dict:
    """One phase: the engine's step times, the feed's messages and latency, over some seconds."""
    page.python(PHASES[phase])
    page.show(phase == "six panels visible")
    page.wait(0.7)
    page.python("ends.clear(); feed.stats.latency_ms.clear(); first = (feed.stats.frames, feed.stats.messages_in, "
                "feed.stats.pump_s, feed.stats.bytes)")
    page.wait(seconds)
    return json.loads(page.python("""
seen, last = list(ends), (feed.stats.frames, feed.stats.messages_in, feed.stats.pump_s, feed.stats.bytes)
print(json.dumps({**step_figures(seen), "frames": last[0] - first[0], "messages_in": last[1] - first[1],
    "pump_s": last[2] - first[2], "bytes": last[3] - first[3], "latency_ms": sorted(feed.stats.latency_ms),
    "trouble": repr(feed.error) if feed.error else None}))"""))


def run(options: argparse.Namespace, own_core: bool) -> dict:
    """Measure all phases in a new JupyterLab. own_core: the kernel gets one core, and all the rest the others."""
    from tests.browser.chromium import shared_browser  # here: without a browser nothing of it need be there

    cores = os.sched_getaffinity(0) if own_core else set()
    core = min(cores, default=None)
    if own_core:
        os.sched_setaffinity(0, cores - {core})  # this process, and the server and the browser that it starts
    try:
        return _run(options, core)
    finally:
        shared_browser.close()
        if own_core:
            os.sched_setaffinity(0, cores)


def _run(options: argparse.Namespace, core: int | None) -> dict:
    from tests.browser.lab import Lab, write_notebook

    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        write_notebook(Path(folder) / "budget.ipynb", _setup(options, core), SHOW.format(panels=PANELS))
        page = lab.open("budget.ipynb", height=2600)
        page.run_all()
        page.page.wait_for_selector(".tv-panel", timeout=30_000)
        found = take_rounds(BrowserPage(page), options)
        assert page.errors == [] and page.outside == [], (page.errors, page.outside)
        page.shutdown()
    return found


def run_without_browser(options: argparse.Namespace) -> dict:
    """The same, with a client that acknowledges in the place of JupyterLab's page."""
    with KernelPage() as page:
        page.python(_setup(options, None))
        page.python(SHOW.format(panels=PANELS))
        page.listen(page.python("print(feed.hub.model_id)").strip(), TOPICS)
        found = take_rounds(page, options)
        assert page.errors == [], page.errors
    return found


def _setup(options: argparse.Namespace, core: int | None) -> str:
    return SETUP.format(model=options.model, device=options.device, requests=options.requests, core=core,
                        repository=str(REPOSITORY))


def measure_at_work(page, phase: str, seconds: float, least_steps: int = 1) -> dict:
    """The same, again and again until so many steps were seen: kernels may have to be compiled."""
    while (found := measure(page, phase, seconds))["steps"] < least_steps:
        page.python("assert live.error is None, live.error")
    return found


def take_rounds(page, options: argparse.Namespace) -> dict:
    """Every phase in every round, after all have warmed up."""
    measure_at_work(page, "six panels visible", 3, least_steps=300)
    taken = {phase: [] for phase in PHASES}
    for i in range(options.rounds):
        for phase in list(PHASES) if i % 2 == 0 else list(PHASES)[::-1]:
            taken[phase].append(last := measure_at_work(page, phase, options.seconds))
            print(f"round {i + 1}, {phase}: {last['mean_ms']:.3f} ms mean, {last['p99_ms']:.3f} p99, "
                  f"{last['frames']} frames, {last['trouble'] or 'no trouble'}", flush=True)
    return summarise(taken, options.seconds)


def summarise(taken: dict[str, list[dict]], seconds: float) -> dict:
    """Medians over the rounds of what was measured, and of the ratios within each round."""
    phases = {}
    for phase, found in taken.items():
        phases[phase] = {name: statistics.median(r[name] for r in found) for name in ("mean_ms", "median_ms", "p99_ms")}
        for name in ("mean_ms", "p99_ms"):
            ratios = [r[name] / base[name] for r, base in zip(found, taken["nobody listens"])]
            phases[phase][name.replace("_ms", "_ratio")] = statistics.median(ratios)
            phases[phase][name.replace("_ms", "_ratio_range")] = [min(ratios), max(ratios)]
    shown = taken["six panels visible"]
    latency = sorted(value for r in shown for value in r["latency_ms"])
    return {
        "phases": phases,
        "messages_per_s": statistics.median((r["frames"] + r["messages_in"]) / seconds for r in shown),
        "kilobytes_per_s": statistics.median(r["bytes"] / 1e3 / seconds for r in shown),
        "pump_share": statistics.median(r["pump_s"] / seconds for r in shown),
        "latency_ms": {f"p{int(q * 100)}": latency[int(q * len(latency))] for q in (0.5, 0.95)} if latency else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What six live panels cost the engine.")
    parser.add_argument("--model", default="demo", help=MODEL_HELP)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", help="one of the two ways, by a word of its name: itself, shares")
    parser.add_argument("--no-browser", action="store_true", help="a kernel alone, and a client that draws nothing")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--no-store", action="store_true", help="do not write the results file")
    options = parser.parse_args()
    ways = [NO_BROWSER] if options.no_browser else ["everything shares the processor"]
    if not options.no_browser and hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        ways.insert(0, "the kernel has a core for itself")
    if options.only:
        ways = [way for way in ways if options.only in way]
    found = {}
    for way in ways:
        print(f"---- {way}", flush=True)
        found[way] = run_without_browser(options) if options.no_browser else run(options, "itself" in way)
        shown = found[way]["phases"]["six panels visible"]
        print(f"mean x{shown['mean_ratio']:.3f} (budget {BUDGET['mean']}), "
              f"p99 x{shown['p99_ratio']:.3f} ({BUDGET['p99']}), {found[way]['messages_per_s']:.0f} messages/s "
              f"({BUDGET['messages_per_s']}), latency {found[way]['latency_ms']}", flush=True)
    if not options.no_store:
        command = (f"python -m tests.browser.feed_budget{' --no-browser' * options.no_browser} --model {options.model} "
                   f"--device {options.device} --requests {options.requests}")
        if "NUMBA_NUM_THREADS" in os.environ:
            command = f"NUMBA_NUM_THREADS={os.environ['NUMBA_NUM_THREADS']} {command}"
        record = {"command": command, "date": time.strftime("%Y-%m-%d"),
                  "rounds": options.rounds, "seconds": options.seconds, "panels": PANELS, "budget": BUDGET,
                  "environment": describe_environment("numba-cuda"), **found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
