"""A start from the disk to the first token, in fresh processes; here on the CPU."""

import numpy as np

from tests.bench_stand_ins import TINY
from tinyvllm.bench import gpu_start
from tinyvllm.loader.weights import numpy_weights
from tinyvllm.model.config import ModelConfig


def test_the_folder_is_a_model_of_random_weights_that_the_loader_takes(tmp_path):
    num_bytes = gpu_start.write_folder(tmp_path / "model", TINY)
    weights = numpy_weights(tmp_path / "model", ModelConfig.from_folder(tmp_path / "model"))
    assert num_bytes == sum(array.nbytes for array in weights.values())
    assert (weights["final_norm"] == 0x3F80).all() and len(np.unique(weights["down"])) > 1000


def test_a_cold_and_a_warm_start_are_timed_stage_by_stage(tmp_path):
    gpu_start.write_folder(tmp_path / "model", TINY)
    found = dict(gpu_start.starts(tmp_path / "model", device="cpu"))
    for way in ("file not in memory", "warm"):
        seconds = {what: found[f"start, {way}: {what} (s)"][0]
                   for what in ("imports", "weights", "engine", "first step", "to the first token")}
        assert all(taken > 0 for taken in seconds.values())
        whole = seconds.pop("to the first token")
        assert abs(sum(seconds.values()) - whole) < 0.01 * whole + 0.001
        assert found[f"start, {way}: weights (GB/s)"][0] > 0


def test_a_start_that_fails_says_why_and_the_other_is_tried(tmp_path):
    gpu_start.write_folder(tmp_path / "model", TINY)
    (tmp_path / "model" / "config.json").write_text("{")
    found = dict(gpu_start.starts(tmp_path / "model", device="cpu"))
    assert len(found) == 2 and all("config.json" in str(error) for error in found.values())
