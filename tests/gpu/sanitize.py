"""The kernels under NVIDIA's compute-sanitizer: reads and writes outside of memory, and races in shared memory.

    python -m tests.gpu.sanitize                    # both tools; on a machine with 16 cores some minutes
    python -m tests.gpu.sanitize --only racecheck --json out.json

The GPU tests run in shards, each in a process of its own under the tool, as many at a time as there are cores. A tool
makes every memory access slower, racecheck the most: it gets the tests of few and small launches. A shard that the
limit cuts off is told, and counts as a failure. Run `make gpu-test` before: then the kernels are compiled.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tinyvllm.bench.environment import describe_environment

FOLDER = Path(__file__).parent
SHARD = "TINYVLLM_TEST_SHARD"  # "3/8": for this module as a plugin of pytest
# tool -> {test file: (which of its tests, shards)}
TESTS = {
    "memcheck": {"kernels": ("not next_process and not cublas", 2), "fused": ("", 8), "prefill_wgmma": ("", 4),
                 "decode": ("", 2), "draw": ("not probabilities", 3)},
    "racecheck": {"kernels": ("rms_norm or softmax or argmax or tensor_core or simple_kernels", 3),
                  "fused": ("linear_add or gate_up or rope_write or shared or in_parts or split_contexts", 16),
                  "prefill_wgmma": ("one_tile or spare", 4), "decode": ("every_end or left_alone", 4),
                  "draw": ("hard_in_one", 4)},
}


def pytest_collection_modifyitems(config, items):
    """Every n-th of the tests."""
    number, _, count = os.environ.get(SHARD, "1/1").partition("/")
    kept = items[int(number) - 1::int(count)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def run_shard(tool: str, file: str, which: str, number: int, count: int, until: float) -> dict:
    """One shard: {"shard", "errors", "passed", "seconds", "trouble": None or what went wrong}."""
    begin = time.perf_counter()
    found = {"shard": f"{tool} {file} {number}/{count}", "errors": None, "passed": 0, "trouble": None}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
               "-p", "no:cacheprovider", "-p", "tests.gpu.sanitize", "-m", "gpu", FOLDER / f"test_gpu_{file}.py"]
    run = subprocess.Popen([*map(str, command), *(["-k", which] if which else [])], text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, SHARD: f"{number}/{count}"})
    try:
        output, _ = run.communicate(timeout=max(0.1, until - begin))
        found["errors"] = sum(map(int, re.findall(r"ERROR SUMMARY: (\d+) error", output)))
        found["errors"] += sum(map(int, re.findall(r"RACECHECK SUMMARY: (\d+) hazard", output)))
        found["passed"] = sum(map(int, re.findall(r"(\d+) passed", output)))
        if run.returncode:
            found["trouble"] = f"ended with {run.returncode}: {output[-1500:]}"
        elif not found["passed"]:
            found["trouble"] = "no test ran"
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the tool and the tests under it, which would go on without it
        output, _ = run.communicate()
        found["trouble"] = f"not done after {until - begin:.0f} s, about {output.count('.')} tests in"
    found["seconds"] = round(time.perf_counter() - begin, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The GPU tests under compute-sanitizer.")
    parser.add_argument("--only", choices=tuple(TESTS), help="one of the tools")
    parser.add_argument("--limit", type=float, default=1200, metavar="S", help="for all of it (%(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="shards at a time")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit")
    until = time.perf_counter() + options.limit
    shards = [(tool, file, which, number, count, until) for tool, files in TESTS.items()
              if options.only in (None, tool) for file, (which, count) in files.items()
              for number in range(1, count + 1)]
    findings = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(run_shard, *shard) for shard in shards]):
            findings.append(found := done.result())
            print(f"{found['shard']:28} {found['errors']} errors, {found['passed']:4} tests, {found['seconds']:6} s"
                  + (f"  TROUBLE: {found['trouble']}" if found["trouble"] else ""), flush=True)
    findings.sort(key=lambda found: found["shard"])
    tests, errors = Counter(), Counter()
    for found in findings:
        tool = found["shard"].split()[0]
        tests[tool] += found["passed"]
        errors[tool] += found["errors"] or 0
    troubles = [found["shard"] for found in findings if found["trouble"]]
    print({tool: f"{errors[tool]} errors in {tests[tool]} tests" for tool in tests}, "trouble:", troubles or "none")
    if options.json:
        options.json.write_text(json.dumps({"environment": describe_environment("numba-cuda"), "tests": tests,
                                            "errors": errors, "shards": findings}, indent=1) + "\n")
    sys.exit(bool(troubles or sum(errors.values())))


if __name__ == "__main__":
    main()
