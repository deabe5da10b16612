"""Threads of the CPU kernels: how many, and how they wait for each other."""

import json
import os
import subprocess
import sys

import pytest

from tinyvllm.kernels import threads

REPORT = """
import json, os, threading
import numba
from tinyvllm.kernels import threads
from tinyvllm.kernels.threads import available_cores, configure_threads
cores = available_cores()
if "PRETEND" in os.environ:
    threads.available_cores = lambda: int(os.environ["PRETEND"])
counts = []
def work():
    configure_threads()
    counts.append(numba.get_num_threads())
work()
thread = threading.Thread(target=work); thread.start(); thread.join()
print(json.dumps({"counts": counts, "cores": cores, "spin": os.environ.get("GOMP_SPINCOUNT")}))
"""


def report(**environment):
    settings = ("NUMBA_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    environment = {**kept, **environment}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_python_thread_gets_one_thread_a_core_and_short_spinning():
    result = report()
    assert 1 <= result["cores"] <= os.cpu_count()
    assert result["counts"] == [result["cores"]] * 2 and result["spin"] == threads.SPIN_COUNT


def test_a_quota_or_hardware_threads_leave_less_than_numba_would_take():
    assert report(PRETEND="1")["counts"] == [1, 1]


def test_the_users_own_settings_are_kept():
    assert report(NUMBA_NUM_THREADS="1", PRETEND="2")["counts"] == [1, 1]
    assert report(NUMBA_NUM_THREADS="3", PRETEND="2")["counts"] == [3, 3]
    assert report(GOMP_SPINCOUNT="7")["spin"] == "7"
    assert report(OMP_WAIT_POLICY="active")["spin"] is None


@pytest.mark.parametrize("files, cores", [
    ({"cpu0": "0,4", "cpu1": "1,5", "cpu4": "0,4", "cpu5": "1,5"}, 2),  # two hardware threads a core
    ({}, 4),  # a system that does not tell
    ({"quota": "150000 100000"}, 2), ({"quota": "max 100000"}, 4), ({"quota": "1000 100000"}, 1)])
def test_hardware_threads_and_quotas_are_counted(monkeypatch, files, cores):
    def read(path, default):
        return files.get("quota" if path.endswith("cpu.max") else path.split("/")[5], default)

    monkeypatch.setattr(threads, "_read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    assert threads.available_cores() == cores


TWO_USERS = """
import threading
import numpy as np
from tinyvllm.kernels.gemm.packing import pack_linear, pack_rows
from tinyvllm.kernels.gemm.cpu import linear_cpu
from tinyvllm.kernels.cpu_backend import _guarded
weight = np.full((2048, 512), 0x3F80, np.uint16)
packed, none = pack_linear(weight), np.zeros(0, np.uint16)
forward = _guarded(lambda out, x, packed, bias, dims: linear_cpu(out, x, packed, bias))
results = []
def work():
    out, x = np.zeros((64, 2048), np.uint16), np.full((64, 512), 0x3F80, np.uint16)
    for _ in range(50):
        forward(out, x, packed, none, None)
        pack_rows(packed, 0, weight)
    results.append(bool((out == 0x4400).all()))
workers = [threading.Thread(target=work) for _ in range(3)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
import numba
print(numba.threading_layer(), results)
"""


def test_numbas_fallback_pool_survives_python_threads_that_compute_at_once():
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", TWO_USERS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "workqueue [True, True, True]"
