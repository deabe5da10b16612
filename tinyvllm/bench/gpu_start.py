"""From starting Python to the first token, with a model folder on the disk and the kernels compiled before.

    python -m tinyvllm.bench.gpu_start FOLDER     once, in this process; prints its figures as JSON

`starts` does so in fresh processes, as a user meets it: imports, loading by the real loader, cache, first step. The
folder has random weights and no tokenizer. Kernels that were never compiled on this machine would be compiled here, so
a first start, after which they are all there, comes before the one that counts; it has the file not in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors

from tinyvllm.bench.gpu_model import ONE, random_bits
from tinyvllm.model.config import ModelConfig
from tinyvllm.model.registry import ARCHITECTURES

LIMIT_S = 120  # of one start; compiling everything anew fits in
PROMPT = 32  # tokens


def write_folder(folder: Path, raw_config: dict) -> int:
    """A model folder with random weights; returns the bytes of its tensors. Needs room for one copy of the largest."""
    config = ModelConfig.from_dict(raw_config)
    pieces = ARCHITECTURES[config.architecture].pieces(config)
    largest = max(int(np.prod(piece.shape)) for piece in pieces)
    bits, ones = np.resize(random_bits(1 << 22), largest), np.full(largest, ONE, np.uint16)
    tensors, total = {}, 0
    for piece in pieces:  # all lie at the same place in this process's memory, each at its own in the file
        size = 2 * int(np.prod(piece.shape))
        memory = ones if len(piece.shape) == 1 else bits
        tensors[piece.name] = safetensors.TensorSpec(dtype="bfloat16", shape=piece.shape, data_ptr=memory.ctypes.data,
                                                     data_len=size)
        total += size
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.serialize_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw_config))
    return total


def forget_file(path: Path) -> None:
    """Let the system's memory of a file go, where it can be asked to."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def starts(folder: Path, device: str = "cuda") -> Iterator[tuple[str, list[float] | Exception]]:
    """(label, figures) of a start that reads the disk, and of a warm one. No other program should hold the GPU."""
    num_bytes = (folder / "model.safetensors").stat().st_size
    for way in ("file not in memory", "warm"):
        if way != "warm":
            forget_file(folder / "model.safetensors")
        began = time.time()
        try:
            found = subprocess.run([sys.executable, "-m", "tinyvllm.bench.gpu_start", str(folder), "--began",
                                    repr(began), "--device", device], capture_output=True, text=True, timeout=LIMIT_S)
            if found.returncode:
                raise RuntimeError(f"ended with {found.returncode}: {(found.stderr.strip() or '-').splitlines()[-1]}")
            seconds = json.loads(found.stdout.splitlines()[-1])
        except Exception as error:
            yield f"start, {way}: to the first token (s)", error
            continue
        for what, taken in seconds.items():
            yield f"start, {way}: {what} (s)", [taken]
        yield f"start, {way}: weights (GB/s)", [num_bytes / seconds["weights"] / 1e9]


def start(folder: str, began: float, device: str) -> dict[str, float]:
    """Seconds of each stage of a start that began at time.time() == began."""
    from tinyvllm import LLM, SamplingParams, llm

    imported, weights = time.time(), 0.0
    load = llm.load_weights

    def timed_load(*arguments, **options):
        nonlocal weights
        begin = time.perf_counter()
        load(*arguments, **options)
        weights = time.perf_counter() - begin  # a copy to the GPU has left the file when it returns

    llm.load_weights = timed_load
    model = LLM(folder, device=device, skip_tokenizer_init=True, use_tqdm=False)
    ready = time.time()
    tokens = model.generate([list(range(3, 3 + PROMPT))], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    end = time.time()
    assert len(tokens[0].outputs[0].token_ids) == 1
    return {"imports": imported - began, "weights": weights, "engine": ready - imported - weights,
            "first step": end - ready, "to the first token": end - began}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.gpu_start", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--began", type=float, help="time.time() when this program was started (default: now)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    print(json.dumps(start(options.folder, options.began or time.time(), options.device)))


if __name__ == "__main__":
    main()
