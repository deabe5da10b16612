"""The on-disk cache of CPU kernels: a second process compiles nothing, and an edit is never served stale."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyvllm
from tinyvllm.kernels import jit

PACKAGE = Path(tinyvllm.__file__).parent

# Runs two kernels, and prints what they gave and how often the cache had them.
KERNELS = """
import json
import numpy as np
from tinyvllm.kernels.residual_add import residual_add_cpu
from tinyvllm.kernels.gemm.packing import _pack_rows
residual, x = np.full((1, 4), 0x3F80, np.uint16), np.full((1, 4), 0x4000, np.uint16)   # 1 + 2
residual_add_cpu(residual, x)
packed = np.zeros((1, 2, 32), np.uint16)
_pack_rows(packed, 0, x)                                                               # a parallel kernel
print(json.dumps({"value": int(residual[0, 0]), "packed": int(packed.max()),
                  "hits": [sum(k.stats.cache_hits.values()) for k in (residual_add_cpu, _pack_rows)]}))
"""


def run(code, cache, package_parent=PACKAGE.parent, **environment):
    """Run Python code in a process of its own, with this cache directory; returns its last line as JSON."""
    environment = {**os.environ, "TINYVLLM_CACHE_DIR": str(cache), "PYTHONPATH": str(package_parent),
                   **environment}
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], env=environment, cwd=package_parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def copy_package(destination):
    shutil.copytree(PACKAGE, destination / "tinyvllm", ignore=shutil.ignore_patterns("__pycache__", "demo"))


def entries(cache):
    return sorted(path for path in Path(cache).rglob("*") if path.is_file())


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    first, second = run(KERNELS, tmp_path), run(KERNELS, tmp_path)
    assert first["hits"] == [0, 0] and second["hits"] == [1, 1]
    assert first["value"] == second["value"] == 0x4040 and first["packed"] == second["packed"] == 0x4000
    assert [path.name.split("-")[0] for path in entries(tmp_path)] == ["_pack_rows", "residual_add_cpu"]


def test_an_edited_helper_is_not_served_stale(tmp_path):
    copy_package(tmp_path)
    cache = tmp_path / "cache"
    assert run(KERNELS, cache, tmp_path)["value"] == 0x4040  # 3
    helpers = tmp_path / "tinyvllm" / "kernels" / "bf16.py"
    text = helpers.read_text()
    widened = "return bits_to_float(np.uint32(np.uint32(bits) << np.uint32(16)))"
    assert text.count(widened) == 1, "the helper has changed: this test has to edit it"
    helpers.write_text(text.replace(widened, widened + " * 2"))
    edited = run(KERNELS, cache, tmp_path)
    assert edited["hits"] == [0, 0] and edited["value"] == 0x40C0  # 2 * 1 + 2 * 2 = 6
    helpers.write_text(text)
    restored = run(KERNELS, cache, tmp_path)
    assert restored["hits"] == [1, 1] and restored["value"] == 0x4040


# `forward` bound to operations that do nothing, so that it compiles in a moment, but for one that writes
# WANTED.
FORWARD = """
import json
import numpy as np
from tinyvllm.kernels.jit import cpu_helper, cpu_jit
from tinyvllm.model import llama

counts = dict(embedding=3, rms_norm=4, add_rms_norm=5, linear=4, rope=6, write_kv=8, attention=13, silu_mul=2,
              keep_rows=4)
ops = {name: cpu_helper(eval("lambda " + ", ".join("abcdefghijklm"[:count]) + ": None"))
       for name, count in counts.items()}

def fill(out, x, indices):
    for i in range(out.shape[0]):
        out[i, 0] = WANTED

ops["gather_rows"] = cpu_helper(fill)
forward = cpu_jit(llama.bind(ops))
two, three = np.zeros((2, 4), np.uint16), np.zeros((2, 4, 4), np.uint16)
w = llama.Weights(three, three, two, three, two, three, two, two, three, two, three, two, two[0], two[0], two)
five = np.zeros((2, 4, 1, 4, 4), np.uint16)
i = np.zeros(1, np.int32)
batch = llama.Batch(i, i, i, i[:, None], i, i, i, 1)
buffers = llama.Buffers(*[two] * 8)
forward(w, llama.KVCache(five, five), batch, buffers, llama.Dims(2, 1, 1, 4, 4, 0.5, 1e-5))
print(json.dumps({"value": int(buffers.last[0, 0]), "hits": sum(forward.stats.cache_hits.values())}))
"""


def test_a_bound_forward_is_cached_and_told_from_one_with_other_operations(tmp_path):
    results = [run(f"WANTED = {value}\n{FORWARD}", tmp_path) for value in (5, 5, 6, 6, 5)]
    assert [result["value"] for result in results] == [5, 5, 6, 6, 5]
    assert [result["hits"] for result in results] == [0, 1, 0, 1, 1]


def test_a_damaged_entry_is_compiled_again(tmp_path):
    run(KERNELS, tmp_path)
    cut, foreign = entries(tmp_path)
    cut.write_bytes(cut.read_bytes()[:1000])
    foreign.write_bytes(pickle.dumps(("another key", b"")))
    again = run(KERNELS, tmp_path)
    assert again["hits"] == [0, 0] and again["value"] == 0x4040 and again["packed"] == 0x4000
    assert f"compiled kernel {cut.name} cannot be loaded" in again["stderr"]
    assert run(KERNELS, tmp_path)["hits"] == [1, 1]


def test_processes_that_compile_at_the_same_time_leave_whole_entries(tmp_path):
    environment = {**os.environ, "TINYVLLM_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", KERNELS], env=environment, stdout=subprocess.PIPE,
                                  text=True) for _ in range(2)]
    for process in processes:
        assert json.loads(process.communicate()[0])["value"] == 0x4040 and process.returncode == 0
    assert len(entries(tmp_path)) == 2, "a temporary file was left behind"
    assert run(KERNELS, tmp_path)["hits"] == [1, 1]


def test_the_directory_is_the_first_that_can_be_written_to(tmp_path):
    code = "import json; from tinyvllm.kernels import jit; print(json.dumps({'dir': str(jit.cache_dir())}))"
    file = tmp_path / "a file"
    file.write_text("")
    for name in ("one", "two", "home", "temporary"):
        (tmp_path / name).mkdir()
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "two"), "XDG_CACHE_HOME": str(tmp_path / "home"),
                "TMPDIR": str(tmp_path / "temporary")}
    assert run(code, tmp_path / "one", **settings)["dir"] == str(tmp_path / "one" / "cpu-kernels")
    assert run(code, file, **settings)["dir"] == str(tmp_path / "two" / "cpu-kernels")
    settings["NUMBA_CACHE_DIR"] = ""
    assert run(code, file, **settings)["dir"] == str(tmp_path / "home" / "tinyvllm" / "cpu-kernels")
    settings["XDG_CACHE_HOME"] = str(file)
    fallback = Path(run(code, file, **settings)["dir"])
    assert fallback.is_relative_to(tmp_path / "temporary") and fallback.stat().st_mode & 0o077 == 0


def test_old_versions_are_forgotten(tmp_path):
    for i in range(20):
        directory = tmp_path / "cpu-kernels" / f"old{i:02}"
        directory.mkdir(parents=True)
        os.utime(directory, (1e9 + i, 1e9 + i))
    run(KERNELS, tmp_path)
    kept = sorted(directory.name for directory in (tmp_path / "cpu-kernels").iterdir())
    assert len(kept) == jit.KEPT_STAMPS and jit.source_stamp() in kept
    assert "old19" in kept and "old00" not in kept


def test_the_stamp_covers_every_kernel_source_and_the_forward_pass(tmp_path):
    copy_package(tmp_path)
    package = tmp_path / "tinyvllm"
    stamp = jit.source_stamp(package)
    assert stamp == jit.source_stamp()
    for name in ("kernels/bf16.py", "kernels/gemm/tile.py", "kernels/attention/cpu.py", "model/llama.py"):
        text = (package / name).read_text()
        (package / name).write_text(text + "# edited\n")
        assert jit.source_stamp(package) != stamp, name
        (package / name).write_text(text)
    (package / "kernels" / "new.py").write_text("")
    assert jit.source_stamp(package) != stamp
    (package / "kernels" / "new.py").unlink()
    (package / "cli.py").write_text("")
    assert jit.source_stamp(package) == stamp


class _Emitter:
    def __init__(self, shift):
        self.shift = shift


class _OtherEmitter(_Emitter):
    pass


def _make(value):
    helper = jit.cpu_helper(lambda x: x + value)

    def kernel(x):
        return helper(x)

    return kernel


@pytest.mark.parametrize("one, other", [
    (1, 2), (1, 1.0), ("a", "b"), (np.arange(3), np.arange(3) * 2), ((1, 2), (1, 3)), ({"a": 1}, {"a": 2}),
    (frozenset("ab"), frozenset("ac")), (_Emitter(1), _Emitter(2)), (_Emitter(1), _OtherEmitter(1)),
    (len, max), (_make(1), _make(2))])
def test_the_fingerprint_sees_what_a_helper_of_a_helper_closes_over(one, other):
    assert jit.fingerprint(_make(one)) != jit.fingerprint(_make(other))
    assert jit.fingerprint(_make(one)) == jit.fingerprint(_make(one))
