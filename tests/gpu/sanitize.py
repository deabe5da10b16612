"""The kernels under NVIDIA's compute-sanitizer: reads and writes outside of memory, and races in shared memory.

    python -m tests.gpu.sanitize                    # both tools; on a machine with 16 cores some minutes
    python -m tests.gpu.sanitize --only racecheck --json out.json

The GPU tests run in shards, each in a process of its own under the tool, as many at a time as there are cores. A tool
makes every memory access slower, racecheck the most: it gets the tests of few and small launches. A shard that the
limit cuts off is told, and counts as a failure. First each tool has to find the fault in a kernel that has one. Run
`make gpu-test` before: then the kernels are compiled.
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
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.gpu.sanitize", "-m", "gpu",
               FOLDER / f"test_gpu_{file}.py", *(["-k", which] if which else [])]
    found = run_tool(tool, command, until, {SHARD: f"{number}/{count}"})
    output, code = found.pop("output"), found.pop("code")
    if code is None:
        found["trouble"] = f"not done after {found['seconds']} s, about {output.count('.')} tests in"
    elif code:
        found["trouble"] = f"ended with {code}: {output[-1500:]}"
    elif not found["passed"]:
        found["trouble"] = "no test ran"
    return {"shard": f"{tool} {file} {number}/{count}", **found}


def run_control(tool: str, until: float) -> dict:
    """The kernel that is wrong on purpose: a shard whose trouble is that nothing was found."""
    found = run_tool(tool, ["tests.gpu.faulty", tool], until)
    output, _ = found.pop("output"), found.pop("code")
    seen = found.pop("errors")
    if not seen:
        found["trouble"] = f"it does not see the fault of a faulty kernel: {output[-1500:]}"
    return {"shard": f"{tool} faulty kernel, seen {seen} times", "errors": 0, **found}


def run_tool(tool: str, module: list, until: float, environment: dict[str, str] | None = None) -> dict:
    """python -m `module` under a tool: {"errors", "passed", "seconds", "trouble": None, "output", "code"}; code is None
    if the time was up."""
    begin = time.perf_counter()
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", *module]
    run = subprocess.Popen([*map(str, command)], text=True, start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})})
    try:
        output, _ = run.communicate(timeout=max(0.1, until - begin))
        code = run.returncode
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the tool and the tests under it, which would go on without it
        output, code = run.communicate()[0], None
    found = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)", output)
    return {"errors": sum(map(int, found)) if code is not None else None, "trouble": None, "output": output,
            "passed": sum(map(int, re.findall(r"(\d+) passed", output))), "code": code,
            "seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The GPU tests under compute-sanitizer.")
    parser.add_argument("--only", choices=tuple(TESTS), help="one of the tools")
    parser.add_argument("--files", default=",".join(sorted({file for files in TESTS.values() for file in files})),
                        help="some of %(default)s")
    parser.add_argument("--limit", type=float, default=1200, metavar="S", help="for all of it (%(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="shards at a time")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit")
    if unknown := set(options.files.split(",")) - {file for files in TESTS.values() for file in files}:
        parser.error(f"--files: there are no tests of {', '.join(sorted(unknown))}")
    until = time.perf_counter() + options.limit
    tools = [tool for tool in TESTS if options.only in (None, tool)]
    work = [(run_control, tool, until) for tool in tools]
    work += [(run_shard, tool, file, which, number, count, until) for tool in tools
             for file, (which, count) in TESTS[tool].items() if file in options.files.split(",")
             for number in range(1, count + 1)]
    findings = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(*piece) for piece in work]):
            findings.append(found := done.result())
            print(f"{found['shard']:38} {found['errors']} errors, {found['passed']:4} tests, {found['seconds']:6} s"
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
