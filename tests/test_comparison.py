"""Comparing runs: figures counted by hand, in milliseconds and in steps."""

import pytest

from tests.toy import toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import Event, EventLog
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from widgets.comparison import as_text, compare, measure, sweep
from widgets.figures import percentile, spread
from widgets.scheduler_timeline import SchedulerComparison

CONFIG = {"num_blocks": 8, "block_size": 4, "max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 99,
          "scheduling_policy": "static", "enable_prefix_caching": True, "use_kv_cache": True}
STEP_MS = 10


class Script:
    """Writes a run by hand: every step takes 10 ms, and nothing takes time between two."""

    def __init__(self):
        self.ms, self.step, self.events, self.counts = 0, 0, [], {}
        self.emit("engine_config", None, CONFIG)

    def emit(self, kind, request_id=None, a=None, b=None):
        self.events.append(Event(len(self.events), int(self.ms * 1e6), kind, self.step, request_id, a, b))

    def add(self, *names):
        for name in names:
            self.emit("request_added", name, 4, 99)

    def run(self, *names, schedule=(), preempt=(), finish=()):
        """One step with these requests in it."""
        self.step += 1
        for name in preempt:
            self.emit("request_preempted", name, 4)
        for name in schedule:
            self.emit("request_scheduled", name, 0, int(name in preempt))
        batch = [[n, 0 if n in schedule else 3 + self.counts[n], 4 if n in schedule else 1, True] for n in names]
        self.emit("step_begun", None, sum(row[2] for row in batch), batch)
        self.ms += STEP_MS
        self.emit("step_ended", None, STEP_MS * 10**6)
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1
        self.emit("tokens", None, [[name, 7, ""] for name in names])
        for name in finish:
            self.emit("request_finished", name, "length", self.counts[name])

    def trace(self, **metadata):
        return Trace(self.events, metadata)


def static():
    """Two seats. `c` comes when `b` has left, and waits until `a` has left as well.

        a ####
        b ##..## c      . an empty seat while c waits
    """
    script = Script()
    script.add("a", "b")
    script.run("a", "b", schedule=("a", "b"))
    script.run("a", "b", finish=("b",))
    script.add("c")
    script.run("a")
    script.run("a", finish=("a",))
    script.run("c", schedule=("c",))
    script.run("c", finish=("c",))
    return script.trace(unit="steps")


def continuous():
    """The same arrivals; `c` takes the seat that `b` left."""
    script = Script()
    script.add("a", "b")
    script.run("a", "b", schedule=("a", "b"))
    script.run("a", "b", finish=("b",))
    script.add("c")
    script.run("a", "c", schedule=("c",))
    script.run("a", "c", finish=("a", "c"))
    return script.trace(unit="steps")


def test_a_static_batch_counted_by_hand():
    run = measure(static())
    assert (run["seats"], run["requests"], run["tokens"], run["num_steps"]) == (2, 3, 8, 6)
    steps, time = run["steps"], run["time"]
    assert (steps["begin"], steps["end"], steps["total"], steps["area"]) == (0, 6, 6, 12)
    assert (steps["idle"], steps["wasted"]) == (4, 2)  # 12 less 4 + 2 + 2; of these two while c waited
    assert (time["total"], time["area"], time["idle"], time["wasted"]) == (60, 120, 40, 20)
    assert steps["ttft"] == {"count": 3, "mean": 5 / 3, "p50": 1, "p95": 3, "max": 3}
    assert time["ttft"]["mean"] == pytest.approx(50 / 3) and time["ttft"]["p95"] == 30
    assert steps["itl"] == {"count": 5, "mean": 1, "p50": 1, "p95": 1, "max": 1}
    assert time["tokens_per_second"] == pytest.approx(8 / 0.06) and steps["tokens_per_unit"] == pytest.approx(8 / 6)
    assert steps["waiting"] == [[2, 1], [4, 0]] and time["waiting"] == [[20, 1], [40, 0]]
    assert [(bar["id"], bar["seat"], bar["steps"], bar["end"]) for bar in run["bars"]] == [
        ("a", 0, [0, 1, 4], "length"), ("b", 1, [0, 1, 2], "length"), ("c", 0, [4, 5, 6], "length")]
    assert [(a["id"], a["steps"], a["time"]) for a in run["arrivals"]] == [("a", 0, 0), ("b", 0, 0), ("c", 2, 20)]


def test_the_same_arrivals_in_a_continuous_batch():
    run = measure(continuous())
    assert (run["steps"]["total"], run["steps"]["area"], run["steps"]["idle"]) == (4, 8, 0)
    assert run["steps"]["ttft"]["max"] == 1 and run["time"]["tokens_per_second"] == pytest.approx(200)
    assert [(bar["id"], bar["seat"]) for bar in run["bars"]] == [("a", 0), ("b", 1), ("c", 1)]


def test_a_preempted_request_leaves_its_seat_and_its_tokens_come_late():
    script = Script()
    script.add("a", "b")
    script.run("a", "b", schedule=("a", "b"))
    script.run("a", preempt=("b",))
    script.run("a", finish=("a",))
    script.run("b", schedule=("b",), finish=("b",))
    run = measure(script.trace())
    assert [(bar["id"], bar["seat"], bar["steps"], bar["end"]) for bar in run["bars"]] == [
        ("a", 0, [0, 1, 3], "length"), ("b", 1, [0, 1, 1], "preempted"), ("b", 0, [3, 4, 4], "length")]
    assert run["steps"]["idle"] == 8 - 3 - 1 - 1 and run["steps"]["wasted"] == 2
    assert run["steps"]["itl"]["max"] == 3  # b: a token out of step 1, the next out of step 4


def test_time_without_steps_counts_where_the_trace_tells_of_it():
    script = Script()
    script.add("a")
    script.run("a", schedule=("a",), finish=("a",))
    script.ms += 70
    script.add("b")
    script.run("b", schedule=("b",), finish=("b",))
    run = measure(script.trace(idle_steps=[[2, 7]]))
    assert run["steps"]["total"] == 9 and run["steps"]["idle"] == 16 and run["steps"]["wasted"] == 0
    assert run["steps"]["ttft"]["max"] == 1 and run["arrivals"][1]["steps"] == 8
    assert run["time"]["total"] == 90 and run["time"]["idle"] == 160


def test_a_run_that_is_not_over_is_measured_up_to_its_last_event():
    script = Script()
    script.add("a")
    script.run("a", schedule=("a",))
    script.run("a")
    script.add("late")
    run = measure(script.trace())
    assert run["steps"]["total"] == 2 and run["steps"]["idle"] == 2 and run["bars"][0]["end"] == "running"
    assert run["steps"]["ttft"]["count"] == 1


def test_sweep_counts_empty_seats():
    assert sweep([], [], 3, 0, 10) == {"area": 30, "idle": 30, "wasted": 0}
    assert sweep([(0, 10), (5, 10)], [(2, 4), (3, 7)], 2, 0, 10) == {"area": 20, "idle": 5, "wasted": 3}
    assert sweep([(0, 10)], [(8, 20)], 1, 0, 10)["wasted"] == 0


def test_the_measured_idle_area_is_what_an_engine_left_unused():
    engine, log = toy_engine(num_blocks=64, scheduling_policy="static", max_num_batched_tokens=64), EventLog()
    engine.listen(log)
    for i in range(9):
        engine.add_request([i] * 3, SamplingParams(temperature=0, max_tokens=2 + 5 * (i % 3)), str(i))
    used = 0
    while engine.has_unfinished_requests():
        engine.step()
        used += len(engine.runner.batches[-1])
    run = measure(Trace(log.read()[0]))
    assert run["steps"]["total"] == engine.num_steps
    assert run["steps"]["idle"] == 4 * engine.num_steps - used > 0


def test_percentiles_are_values_that_occurred():
    assert [percentile([4, 1, 3, 2], p) for p in (1, 25, 26, 50, 95, 100)] == [1, 1, 2, 2, 4, 4]
    assert percentile(range(1, 101), 95) == 95 and percentile([], 50) is None
    assert spread([]) == {"count": 0, "mean": None, "p50": None, "p95": None, "max": None}
    with pytest.raises(ValueError, match="above 0"):
        percentile([1], 0)


def test_runs_are_compared_by_name_and_doubtful_comparisons_say_so(tmp_path):
    saved = continuous().save(tmp_path / "run.jsonl")
    compared = compare({"static": static(), "continuous": saved})
    assert [run["name"] for run in compared["runs"]] == ["static", "continuous"] and compared["unit"] == "steps"
    assert compared["warning"] is None
    assert [line.split()[:3] for line in as_text(compared).splitlines()[1:]] == [
        ["static", "6", "33%"], ["continuous", "4", "0%"]]
    other = Script()
    other.add("z")
    other.run("z", schedule=("z",))
    compared = compare({"a": static(), "b": other.trace()})
    assert "not serve the same requests" in compared["warning"] and compared["unit"] == "time"
    for nothing in ({}, [static()], None):
        with pytest.raises(TinyVLLMError, match="by name"):
            compare(nothing)
    with pytest.raises(TinyVLLMError, match="nothing to compare"):
        compare({"empty": Script().trace()})


def test_the_panel_is_made_of_the_same_figures():
    panel = SchedulerComparison({"static": static(), "continuous": continuous()})
    assert panel.axis == "steps" and panel.figures["runs"][0]["steps"]["idle"] == 4
    assert "33%" in repr(panel)
    assert SchedulerComparison({"one": static()}, axis="time").axis == "time"
    with pytest.raises(TypeError, match="no option 'colour'"):
        SchedulerComparison({"one": static()}, colour="red")
