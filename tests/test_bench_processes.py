"""Several processes of the GPU's benchmark: one part's failure, a crash or a hang costs that part alone.

The processes are real; what measures in them is this file run as a program (see the end), without a GPU.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.bench_stand_ins import TINY
from tinyvllm.bench import gpu, gpu_parts
from tinyvllm.bench.gpu_report import read_results

FIGURES = {"decode": "decode, batch 1 (tokens/s)", "ttft": "TTFT, 32 tokens (ms)",
           "served": "served, batch 8 (tokens/s)"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(how, *arguments): results of processes that do `how`, a dict part -> what happens there."""
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))

    def call(how, *arguments):
        out = tmp_path / "out.json"
        script = tmp_path / "how.json"
        script.write_text(json.dumps(how))
        arguments = ["--json", str(out), "--config", str(config), "--only", ",".join(FIGURES), *arguments]
        status = gpu.main(arguments, [sys.executable, "-m", "tests.test_bench_processes", str(script), *arguments])
        return status, read_results(out) if out.exists() else None, sorted(path.name for path in tmp_path.iterdir())

    return call


def test_each_process_keeps_its_figures_and_their_medians_are_summed_up(run, capsys):
    status, results, files = run({}, "--processes", "3")
    assert status == 0 and len(results["processes"]) == 3 and results["environment"]["gpu"] == "none"
    per_process = [process["results"]["decode, batch 1 (tokens/s)"] for process in results["processes"]]
    assert all(len(figures) == 5 for figures in per_process)
    medians = sorted(sorted(figures)[2] for figures in per_process)
    assert len(set(medians)) == 3, "fresh processes, not one repeated"
    entry = results["summary"]["decode, batch 1 (tokens/s)"]
    assert entry == {"median": medians[1], "lowest": medians[0], "highest": medians[2], "processes": 3}
    assert files == ["config.json", "how.json", "out.json"], "nothing partial is left behind"
    assert "decode, batch 1, 32 tokens in" in capsys.readouterr().out


@pytest.mark.parametrize("how, why", [
    ("raise", "RuntimeError: as asked"), ("lose", "RuntimeError: as asked"), ("exit", "its process ended with 7"),
    ("hang", "its process ended with 1"), ("sleep", "its process was ended after")])
def test_one_part_that_fails_costs_that_part_alone(run, how, why):
    limits = {"hang": ("--part-limit", "6"), "sleep": ("--process-limit", "25")}.get(how, ())
    status, results, _ = run({"ttft": how}, "--processes", "1", *limits)
    [process] = results["processes"]
    assert status == 0
    assert set(process["results"]) == {FIGURES["decode"], FIGURES["served"]}
    assert list(process["errors"]) == ["ttft"] and why in process["errors"]["ttft"]


def test_figures_before_a_part_ended_are_kept(run):
    _, results, _ = run({"served": "late"}, "--processes", "1")
    [process] = results["processes"]
    assert set(process["results"]) == set(FIGURES.values()) and list(process["errors"]) == ["served"]


def test_a_failure_before_anything_could_be_measured_overwrites_nothing(run, tmp_path, capsys):
    (tmp_path / "out.json").write_text('{"earlier": "figures"}')
    status, results, _ = run({"setup": "exit"}, "--processes", "2")
    assert status == 1 and results == {"earlier": "figures"}
    assert "no figures: setup: its process ended with 7" in capsys.readouterr().out


def test_no_process_is_begun_that_would_not_fit_into_the_time(run):
    _, results, _ = run({"decode": "second"}, "--processes", "25", "--total-limit", "20")
    assert 1 <= len(results["processes"]) < 25
    assert all(FIGURES["served"] in process["results"] for process in results["processes"])


def test_a_part_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "decode,decoed"])
    assert "not decoed" in capsys.readouterr().err


def test_peers_are_taken_where_they_are_asked_for_or_there(monkeypatch):
    notes, asked = {}, []

    class Peer:
        def __init__(self):
            asked.append(1)
            raise RuntimeError("torch finds no GPU")

    monkeypatch.setattr(gpu_parts.gpu_peers, "TorchPeer", Peer)
    assert gpu_parts.find_peer(None, notes.__setitem__) is None and "torch finds no GPU" in notes["peers"]
    assert gpu_parts.find_peer(False, notes.__setitem__) is None and len(asked) == 1
    with pytest.raises(RuntimeError):
        gpu_parts.find_peer(True, notes.__setitem__)


# ---- the process that measures ----


def part(name: str, how: str | None):
    """Stands for a part of the benchmark."""
    def measure(bench, rounds, peer, note):
        if how in ("raise", "lose"):
            gpu_parts.cuda_is_lost = how == "lose"
            raise RuntimeError("as asked")
        if how == "exit":
            sys.stdout.flush()
            __import__("os")._exit(7)
        if how in ("hang", "sleep"):
            time.sleep(60)
        if how == "second":
            time.sleep(1)
        base = time.time_ns() % 1000 + 1
        yield FIGURES[name], [float(base + i) for i in range(rounds)]
        if how == "late":
            raise RuntimeError("as asked, but late")

    return measure


def main() -> int:
    from tinyvllm.kernels import cuda_support

    with open(sys.argv[1]) as file:
        how = json.load(file)
    if how.get("setup") == "exit":
        return 7

    def synchronize():
        if getattr(gpu_parts, "cuda_is_lost", False):
            raise RuntimeError("the context is gone")

    cuda_support.cuda = SimpleNamespace(synchronize=synchronize)
    cuda_support.require_cuda = lambda: None
    gpu_parts.Bench = lambda raw_config, eager: None
    gpu_parts.gpu_environment = lambda: {"gpu": "none", "date": "today"}
    gpu_parts.PARTS.update({name: part(name, how.get(name)) for name in FIGURES})
    return gpu.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
