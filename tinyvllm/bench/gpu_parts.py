"""What one process of the GPU's measurements does: its parts, one after the other, each for itself.

    python -m tinyvllm.bench.gpu starts such processes and puts their figures together.
"""

import faulthandler
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tinyvllm.bench import gpu_engine, gpu_kernels, gpu_peers, transformers_peer
from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.gpu_model import Bench
from tinyvllm.bench.gpu_report import rounded, write_results

# name -> measure(bench, rounds, peer, note): (label, figures) one after the other. In this order: what is needed most
# comes first, and torch is not imported before it is needed.
PARTS: dict[str, Callable] = {
    "decode": lambda bench, rounds, *_: gpu_engine.decode(bench, rounds),
    "long_decode": lambda bench, rounds, *_: gpu_engine.long_decode(bench, rounds),
    "ttft": lambda bench, rounds, *_: gpu_engine.ttft(bench, rounds),
    "served": lambda bench, rounds, *_: gpu_engine.served(bench, rounds),
    "workload": lambda bench, rounds, *_: gpu_engine.workload(bench, rounds),
    "prefill": lambda bench, rounds, *_: gpu_engine.prefill(bench, rounds),
    "sampling": lambda bench, rounds, *_: gpu_engine.sampling(bench, rounds),
    "ceiling": lambda bench, rounds, *_: gpu_kernels.ceiling(bench, rounds),
    "kernels": lambda bench, rounds, *_: gpu_kernels.kernels(bench, rounds),
    "decode_attention": lambda bench, rounds, *_: gpu_kernels.decode_attention(bench, rounds),
    "products": lambda bench, rounds, peer, _: gpu_peers.products(bench, rounds, peer()),
    "prefill_attention": lambda bench, rounds, peer, note: gpu_peers.prefill_attention(bench, rounds, peer(), note),
    "ahead": lambda bench, rounds, *_: gpu_engine.ahead(bench, rounds),
    "invariant": lambda bench, rounds, *_: gpu_engine.invariant(bench, rounds),
    "transformers": lambda bench, rounds, peer, note: (
        transformers_peer.decode(bench.raw_config, rounds, peer().device, note) if peer() else ()),
}
LOST = 3  # exit status of a process whose GPU no longer answers


class Record:
    """What one process has found so far, in a file that is whole after every figure."""

    def __init__(self, path: Path):
        self.path = path
        self.found = {"running": "setup", "environment": {}, "notes": {}, "results": {}, "errors": {}, "seconds": {}}

    def write(self) -> None:
        write_results(self.path, self.found)

    def note(self, what: str, value) -> None:
        self.found["notes"][what] = value

    def add(self, label: str, figures: list[float] | Exception) -> None:
        if isinstance(figures, Exception):
            self.found["errors"][label] = short(figures)
            print(f"{label:56} failed: {short(figures)}", flush=True)
        else:
            self.found["results"][label] = [rounded(figure) for figure in figures]
            middle = sorted(figures)[len(figures) // 2]
            print(f"{label:56} {middle:12,.4g}   ({min(figures):,.4g} to {max(figures):,.4g})", flush=True)
        self.write()


def short(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_part(record: Record, name: str, figures: Callable[[], Iterable], limit_s: float) -> None:
    """All figures of one part into the record; an error ends the part. Past its limit the process ends."""
    record.found["running"] = name
    record.write()
    faulthandler.dump_traceback_later(limit_s, exit=True)
    begin = time.perf_counter()
    try:
        for label, values in figures():
            record.add(label, values)
    except Exception as error:
        record.add(name, error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    record.found["seconds"][name] = round(time.perf_counter() - begin, 2)
    record.found["running"] = None
    record.write()


def measure(parts: list[str], raw_config: dict, options, path: Path) -> int:
    """Run parts in this process, figures into path; returns its exit status. options: of gpu.parse."""
    from tinyvllm.kernels.cuda_support import cuda, require_cuda

    record = Record(path)
    record.write()
    begin = time.perf_counter()
    try:
        require_cuda()
        record.found["environment"] = gpu_environment()
        bench = Bench(raw_config, options.eager)
    except Exception as error:
        record.add("setup", error)
        return 1
    record.found["seconds"]["setup"] = round(time.perf_counter() - begin, 2)
    peers = []

    def peer():
        if not peers:
            peers.append(find_peer(options.peers, record.note))
        return peers[0]

    for name in parts:
        begin_errors = len(record.found["errors"])
        run_part(record, name, lambda name=name: PARTS[name](bench, options.rounds, peer, record.note),
                 options.part_limit)
        if len(record.found["errors"]) > begin_errors:
            try:
                cuda.synchronize()
            except Exception as error:
                print(f"the GPU no longer answers after {name}: {short(error)}", flush=True)
                return LOST
    return 0


def find_peer(wanted: bool | None, note: Callable):
    """torch, or None; wanted: False to leave it out, True to fail without it."""
    if wanted is False:
        return None
    try:
        found = gpu_peers.TorchPeer()
    except Exception as error:
        if wanted:
            raise
        note("peers", f"none: {short(error)}")
        return None
    note("peers", found.versions())
    return found


def gpu_environment() -> dict:
    """Hardware and versions."""
    from tinyvllm.kernels.cuda_support import device_name

    found = {**describe_environment("numba-cuda", "cuda-bindings", "torch"), "gpu": device_name()}
    try:
        found["driver"] = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                         capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        pass
    return found
