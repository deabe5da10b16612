"""What the live panels cost the engine, measured where it counts: a real JupyterLab in a real Chromium.

    python -m tests.browser.feed_budget                 # about four minutes; writes tinyvllm/bench/results/feed.json

In turn, round by round: nobody listens; the feed listens and every panel is hidden; six panels are visible. The engine
is kept busy with `--requests` requests of the embedded model: its steps are the shortest there are, so the feed's share
is at its largest. A step's time is from its beginning to the next one's beginning.

Twice: once the kernel, engine and feed in it, has a processor core for itself, so that what is seen is the feed's cost
and not that of a browser which draws without a GPU; once everything shares the processor, as on a small laptop.

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

import nbformat

from tests.browser.chromium import shared_browser
from tests.browser.lab import Lab
from tinyvllm.bench.environment import describe_environment

RESULTS = Path(__file__).parents[2] / "tinyvllm/bench/results/feed.json"
PANELS = ("ControlBar", "SchedulerTimeline", "KVBlockMap", "TokenRace", "AttentionScope", "StepAnatomy")
BUDGET = {"mean": 1.03, "p99": 1.10, "messages_per_s": 150, "latency_p95_ms": 100}

SETUP = """
import itertools, json, os, time
if {core} is not None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {{{core}}})
from IPython.display import display
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.live import LiveEngine
from widgets import Dashboard

llm = LLM("demo", device="{device}", max_num_seqs={requests}, use_tqdm=False)
live = LiveEngine(llm)
numbers = itertools.count()

def one_more():
    i = next(numbers)
    live.chat([{{"role": "user", "content": f"Tell me story {{i}} about a fox."}}],
              SamplingParams(seed=i, max_tokens=400, ignore_eos=True))

live.on_output(lambda output: one_more() if output.finished else None)
begins, inner = [], llm.engine.step

def step(**options):
    begins.append(time.perf_counter_ns())
    return inner(**options)

llm.engine.step = step
for _ in range({requests}):
    one_more()
"""
SHOW = "dashboard = Dashboard(live, panels={panels!r}); feed = dashboard.feed; display(dashboard)"

PHASES = {
    "nobody listens": "live.between_steps(lambda llm: llm.engine.listen(None)).result()",
    "feed listens, panels hidden": "live.tell_again()",
    "six panels visible": "live.tell_again()",
}


def measure(page, phase: str, seconds: float) -> dict:
    """One phase: the engine's step times, the feed's messages and latency, over some seconds."""
    shown = "block" if phase == "six panels visible" else "none"
    page.python(PHASES[phase])
    page.page.evaluate("(d) => document.querySelectorAll('.tv-panel').forEach((p) => { p.style.display = d; })", shown)
    page.page.wait_for_timeout(700)
    page.python("begins.clear(); feed.stats.latency_ms.clear(); first = (feed.stats.frames, feed.stats.messages_in, "
                "feed.stats.pump_s, feed.stats.bytes)")
    page.page.wait_for_timeout(seconds * 1e3)
    return json.loads(page.python("""
seen, last = list(begins), (feed.stats.frames, feed.stats.messages_in, feed.stats.pump_s, feed.stats.bytes)
steps = sorted((b - a) / 1e6 for a, b in zip(seen, seen[1:]))
print(json.dumps({"steps": len(steps), "mean_ms": sum(steps) / len(steps), "median_ms": steps[len(steps) // 2],
    "p99_ms": steps[int(0.99 * len(steps))], "frames": last[0] - first[0], "messages_in": last[1] - first[1],
    "pump_s": last[2] - first[2], "bytes": last[3] - first[3], "latency_ms": sorted(feed.stats.latency_ms),
    "trouble": repr(feed.error) if feed.error else None}))"""))


def run(device: str, requests: int, seconds: float, rounds: int, own_core: bool) -> dict:
    """Measure all phases in a new JupyterLab. own_core: the kernel gets one core, and all the rest the others."""
    cores = os.sched_getaffinity(0) if own_core else set()
    core = min(cores, default=None)
    if own_core:
        os.sched_setaffinity(0, cores - {core})  # this process, and the server and the browser that it starts
    try:
        return _run(device, requests, seconds, rounds, core)
    finally:
        shared_browser.close()
        if own_core:
            os.sched_setaffinity(0, cores)


def _run(device: str, requests: int, seconds: float, rounds: int, core: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder)) as lab:
        notebook = nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_code_cell(SETUP.format(device=device, requests=requests, core=core)),
            nbformat.v4.new_code_cell(SHOW.format(panels=PANELS))])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, Path(folder) / "budget.ipynb")
        page = lab.open("budget.ipynb", height=2600)
        page.run_all()
        page.page.wait_for_selector(".tv-panel", timeout=30_000)
        while int(page.python("assert live.error is None, live.error\nprint(len(begins))")) < 500:  # kernels may have to
            page.page.wait_for_timeout(500)  # be compiled
        measure(page, "six panels visible", 3)  # once for everybody to warm up
        taken = {phase: [] for phase in PHASES}
        for i in range(rounds):
            for phase in list(PHASES) if i % 2 == 0 else list(PHASES)[::-1]:
                taken[phase].append(measure(page, phase, seconds))
                last = taken[phase][-1]
                print(f"round {i + 1}, {phase}: {last['mean_ms']:.3f} ms mean, {last['p99_ms']:.3f} p99, "
                      f"{last['frames']} frames, {last['trouble'] or 'no trouble'}", flush=True)
        assert page.errors == [] and page.outside == [], (page.errors, page.outside)
        page.shutdown()
    return summarise(taken, seconds)


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
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", help="one of the two ways, by a word of its name: itself, shares")
    parser.add_argument("--no-store", action="store_true", help="do not write the results file")
    options = parser.parse_args()
    ways = ["everything shares the processor"]
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        ways.insert(0, "the kernel has a core for itself")
    if options.only:
        ways = [way for way in ways if options.only in way]
    found = {}
    for way in ways:
        print(f"---- {way}", flush=True)
        found[way] = run(options.device, options.requests, options.seconds, options.rounds, "itself" in way)
        shown = found[way]["phases"]["six panels visible"]
        print(f"mean x{shown['mean_ratio']:.3f} (budget {BUDGET['mean']}), "
              f"p99 x{shown['p99_ratio']:.3f} ({BUDGET['p99']}), {found[way]['messages_per_s']:.0f} messages/s "
              f"({BUDGET['messages_per_s']}), latency {found[way]['latency_ms']}", flush=True)
    if not options.no_store:
        record = {"command": f"python -m tests.browser.feed_budget --device {options.device} --requests "
                             f"{options.requests}", "date": time.strftime("%Y-%m-%d"), "rounds": options.rounds,
                  "seconds": options.seconds, "panels": PANELS, "budget": BUDGET,
                  "environment": describe_environment(), **found}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
