"""Speed of the CUDA backend at the Llama-3.2-1B shape, random weights, beside what the same GPU could do at most.

Where torch is there, cuBLAS and cuDNN run the same work in the same process, and transformers the decoding.

    python -m tinyvllm.bench.gpu --processes 3 --json out.json     everything, in three processes one after the other
    python -m tinyvllm.bench.gpu --only decode,ttft                some of it (see PARTS and "start")

Each process is a fresh one. Its parts stand alone: what fails in one is noted, and the next begins; if the GPU or the
process is lost with it, the parts that are left run in another process. A part that hangs is ended at its limit.
Figures are written as they come, to out.json.*partial, and become out.json at the end. About 20 GB of GPU memory.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tinyvllm.bench import gpu_start
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.gpu_model import BLOCK_SIZE, MAX_MODEL_LEN, Bench
from tinyvllm.bench.gpu_parts import PARTS, measure, short
from tinyvllm.bench.gpu_report import complete, rounded, write_results
from tinyvllm.bench.gpu_tables import report

__all__ = ["Bench", "BLOCK_SIZE", "MAX_MODEL_LEN", "PARTS", "main"]

START = "start"  # a part that is measured from outside: gpu_start.py
LEAST_S = 5  # with less left nothing is begun


def run_process(parts: list[str], options, base: str, command: list[str], time_left: Callable[[], float]) -> dict:
    """One process's worth of parts; more processes than one if some of them end early. base: of their files' names."""
    merged = {"environment": {}, "notes": {}, "results": {}, "errors": {}, "seconds": {}}
    left = [name for name in parts if name != START]
    while left:
        path = Path(f"{base}.{len(left)}.partial")
        path.unlink(missing_ok=True)  # of a run that was broken off
        limit = min(options.process_limit, time_left())
        if limit < LEAST_S:
            merged["errors"].update((name, "not begun: the time was up") for name in left)
            break
        try:
            arguments = ["--measure", str(path), "--only", ",".join(left)]
            status = subprocess.run([*command, *arguments], timeout=limit).returncode
            how = f"its process ended with {status}"
        except subprocess.TimeoutExpired:
            status, how = None, f"its process was ended after {limit:.0f} s"
        found = json.loads(path.read_text()) if path.exists() else {"running": "setup"}
        path.unlink(missing_ok=True)
        for what in merged:
            merged[what].update(found.get(what, {}))
        running = found["running"]
        if running == "setup" or status == 0 and running is None:
            if running:
                merged["errors"].setdefault("setup", how)
            break
        if running:
            merged["errors"][running] = f"did not end: {how}"
        left = [name for name in left if name not in found["seconds"] and name != running]
    return merged


def run_start(process: dict, folder: Path, raw_config: dict) -> None:
    """The part "start" into a process's figures."""
    begin = time.perf_counter()
    try:
        if not (folder / "config.json").exists():
            gpu_start.write_folder(folder, raw_config)
        for label, figures in gpu_start.starts(folder):
            if isinstance(figures, Exception):
                process["errors"][label] = short(figures)
            else:
                process["results"][label] = [rounded(figure) for figure in figures]
                print(f"{label:56} {figures[0]:12,.4g}", flush=True)
    except Exception as error:
        process["errors"][START] = short(error)
    process["seconds"][START] = round(time.perf_counter() - begin, 2)


def run_processes(parts: list[str], options, command: list[str]) -> dict:
    """All processes, one after the other. command: what measures in a fresh process (see `main`)."""
    begin = time.monotonic()
    results = {"environment": {}, "config": read_config(options) if options.config else "Llama 3.2 1B",
               "eager": options.eager, "rounds": options.rounds, "processes": []}
    partial = Path(options.json + ".partial") if options.json else None
    folder = Path(tempfile.mkdtemp(prefix="tinyvllm_bench_"))

    def time_left() -> float:
        return (options.total_limit or float("inf")) - (time.monotonic() - begin)

    try:
        took = 0.0
        for number in range(options.processes):
            if number and time_left() < max(took, LEAST_S):
                print(f"process {number + 1} is not begun: {time_left():.0f} s are left, and the last took {took:.0f}")
                break
            print(f"--- process {number + 1} of {options.processes} ---", flush=True)
            start = time.monotonic()
            base = f"{options.json or folder / 'figures'}.{number + 1}"
            process = run_process(parts, options, base, command, time_left)
            if START in parts and "setup" not in process["errors"] and time_left() > 30:
                run_start(process, folder / "model", read_config(options))
            took = time.monotonic() - start
            results["environment"] = results["environment"] or process["environment"]
            del process["environment"]
            results["processes"].append(process)
            if partial:
                write_results(partial, complete(results))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return complete(results)


def read_config(options) -> dict:
    if not options.config:
        return LLAMA_3_2_1B
    with open(options.config) as file:
        return json.load(file)


def parse(argv: list[str] | None):
    names = [*PARTS, START]
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="fresh processes, one after the other (default: 1)")
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--config", help="a config.json; without it, the shape of Llama 3.2 1B")
    parser.add_argument("--eager", action="store_true", help="operations one by one, as enforce_eager=True")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction,
                        help="cuBLAS, cuDNN, transformers (default: if torch with CUDA is there)")
    parser.add_argument("--part-limit", type=float, default=240, help="seconds after which a part is given up")
    parser.add_argument("--process-limit", type=float, default=420, help="seconds after which a process is ended")
    parser.add_argument("--total-limit", type=float, help="seconds for everything: what would not fit is not begun")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one process's parts, into this file
    options = parser.parse_args(argv)
    parts = options.only.split(",") if options.only else names
    unknown = set(parts) - set(names)
    if unknown:
        parser.error(f"--only takes {', '.join(names)}, not {', '.join(sorted(unknown))}")
    if options.processes < 1 or options.rounds < 1:
        parser.error("--processes and --rounds take a whole number of 1 or more")
    return options, parts


def main(argv: list[str] | None = None, command: list[str] | None = None) -> int:
    """command: what measures in a fresh process, given --measure and --only (default: this module with argv)."""
    options, parts = parse(argv)
    if options.measure:
        return measure([name for name in parts if name != START], read_config(options), options, Path(options.measure))
    arguments = list(sys.argv[1:] if argv is None else argv)
    results = run_processes(parts, options, command or [sys.executable, "-m", "tinyvllm.bench.gpu", *arguments])
    if not results["summary"]:
        print("no figures: " + "; ".join(f"{what}: {why}" for process in results["processes"]
                                         for what, why in process["errors"].items()))
        return 1
    print(report(results))
    if options.json:
        write_results(Path(options.json), results)
        Path(options.json + ".partial").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
