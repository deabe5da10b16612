"""From figures to tables and picture: medians and ratios within a process, roofs, and what the repository shows."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from tinyvllm.bench import (
    gpu_engine,
    gpu_kernels,
    gpu_peers,
    gpu_report,
    gpu_start,
    gpu_tables,
    plot,
    transformers_peer,
)
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.gpu_model import Served, Sizes
from tinyvllm.bench.gpu_parts import PARTS
from tinyvllm.bench.gpu_report import TARGETS, complete, read_results, summarise, verdict, with_ratios, write_results
from tinyvllm.bench.gpu_roofline import cost, multiply_ceiling, roofline
from tinyvllm.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig.from_dict(LLAMA_3_2_1B)


def invented(*batches):
    """Results of as many processes: one figure of each kind."""
    return {"environment": {"gpu": "NVIDIA H200", "date": "2030-01-01", "driver": "1.2", "numba": "0.68"},
            "config": "Llama 3.2 1B", "eager": False, "rounds": 3, "processes": [
                {"results": {"decode, batch 1 (tokens/s)": [900.0 + b, 1000.0 + b, 1300.0 + b],
                             "TTFT, 32 tokens (ms)": [2.0, 6.0, 7.0], "ceiling: read (TB/s)": [4.0],
                             "product: o, 64 rows (us)": [10.0], "cuBLAS: o, 64 rows (us)": [12.0 + b / 100],
                             "product: o, 2048 rows (us)": [40.0], "cuBLAS: o, 2048 rows (us)": [30.0],
                             "kernel: o, batch 64 (us)": [11.0]}, "errors": {}, "notes": {}, "seconds": {}}
                for b in batches]}


# ---- medians, ratios ----


def test_a_figure_is_the_median_of_rounds_and_then_of_processes():
    summary = summarise(invented(0, 200, 100)["processes"])
    assert summary["decode, batch 1 (tokens/s)"] == {"median": 1100, "lowest": 1000, "highest": 1200, "processes": 3}


def test_a_figure_that_one_process_lacks_is_that_of_the_others():
    processes = invented(0, 200)["processes"] + [{"results": {}, "errors": {"setup": "lost"}, "notes": {}}]
    assert summarise(processes)["decode, batch 1 (tokens/s)"]["processes"] == 2


def test_ratios_are_the_peers_time_over_ours_within_a_process():
    found = with_ratios({"product: o, 64 rows (us)": 10.0, "cuBLAS: o, 64 rows (us)": 12.0,
                         "product: qkv, 8 rows (us)": 10.0, "cuBLAS: qkv, 8 rows (us)": 11.0,
                         "kernel: qkv, batch 8 (us)": 22.0, "product: o, 128 rows (us)": 10.0,
                         "cuBLAS: o, 128 rows (us)": 8.0, "product: down, 512 rows (us)": 5.0,
                         "prefill attention, 16 x 1024 (us)": 100.0, "torch: prefill attention, 16 x 1024 (us)": 90.0})
    assert found["cuBLAS's time over ours, o, 64 rows (ratio)"] == 1.2
    assert found["cuBLAS's time over ours with its neighbours, qkv, 8 rows (ratio)"] == 0.5
    assert found["torch's time over ours, prefill attention, 16 x 1024 (ratio)"] == 0.9
    assert found[gpu_report.UP_TO] == 1.1 and found[gpu_report.BEYOND] == 0.8
    assert not any("down" in label and "ratio" in label for label in found), "no peer, no ratio"


@pytest.fixture
def measured_labels(monkeypatch):
    """Every label that the parts yield as they are called in a real run, and the ratios; nothing is measured."""
    served = Served(seconds=2.0, first_token_s=0.5, tokens=100, decode_rate=50.0)
    kv = SimpleNamespace(k=np.zeros((1, 20480, 1)), v=np.zeros((1, 20480, 1)))
    dims = SimpleNamespace(num_layers=1, block_size=16, num_kv_heads=8, head_dim=64)
    bench = MagicMock(config=CONFIG, serve=lambda *a, **k: served, sizes=Sizes())
    bench.runner.dims, bench.runner.kv_cache = dims, kv
    for module, name, value in (
            (gpu_engine, "graph_times", lambda *a: [1.0]), (gpu_kernels, "graph_milliseconds", lambda *a: [1.0]),
            (gpu_kernels, "roofs", MagicMock(UNROLL=1, THREADS=1)), (gpu_kernels, "put_numbers", MagicMock()),
            (gpu_peers, "_product_times", lambda *a: ([1.0], [1.0])),
            (gpu_peers, "_attention_times", lambda *a: ([1.0], [1.0])),
            (gpu_start.subprocess, "run", lambda *a, **k: SimpleNamespace(
                returncode=0, stdout=json.dumps({"weights": 1.0, "to the first token": 2.0}))),
            (gpu_start, "forget_file", lambda path: None),
            (transformers_peer, "TransformersPeer", MagicMock(return_value=MagicMock(
                eager_rate=lambda *a: 1.0, fixed_run=lambda *a: (None, 1.0))))):
        monkeypatch.setattr(module, name, value)
    found = {label: figures for part in PARTS.values() for label, figures in part(bench, 1, MagicMock, None)}
    found |= dict(gpu_start.starts(MagicMock(__truediv__=lambda *a: Path(__file__))))
    return set(with_ratios({label: figures[0] for label, figures in found.items()}))


def test_every_figure_that_is_shown_is_one_that_is_measured(measured_labels):
    """A label that nobody yields would say "not measured yet" for ever."""
    assert {target.label for target in TARGETS} | set(gpu_tables.ALSO) <= measured_labels
    kernels = [label for label in measured_labels if label.startswith(("kernel", "product", "cuBLAS:", "prefill att"))]
    assert len(kernels) > 100 and all(cost(label, CONFIG) for label in kernels if label.endswith("(us)"))


@pytest.mark.parametrize("value, stands", [(1600, "goal reached"), (1500, "goal reached"), (1100, "above the floor"),
                                           (1099, "below the floor")])
def test_where_a_figure_stands(value, stands):
    assert verdict(TARGETS[0], value) == stands
    inverse = TARGETS[0]._replace(floor=1 / 1100, goal=1 / 1500, less_is_better=True)
    assert verdict(inverse, 1 / value) == stands


# ---- roofs ----


@pytest.mark.parametrize("label, num_bytes, flops", [
    ("kernel: lm_head, batch 1 (us)", 2 * (128256 * 2048 + 2048 + 128256), 2 * 128256 * 2048),
    ("product: gate_up, 8 rows (us)", 2 * (16384 * 2048 + 8 * 2048 + 8 * 16384), 2 * 8 * 16384 * 2048),
    ("kernel: gate_up, batch 8 (us)", 2 * (16384 * 2048 + 8 * 2048 + 8 * 8192), 2 * 8 * 16384 * 2048),
    ("kernel: down, batch 2 (us)", 2 * (8192 * 2048 + 2 * 8192 + 2 * 2 * 2048), 2 * 2 * 8192 * 2048),
    ("cuBLAS: qkv, 4 rows (us)", 2 * (3072 * 2048 + 4 * 2048 + 4 * 3072), 2 * 4 * 3072 * 2048),
    ("kernel: argmax, batch 3 (us)", 2 * 3 * 128256, 0),
    ("kernel: decode attention, 64 x 4096 (us)", 64 * (2 * 2 * 4096 * 512 + 2 * 2 * 2048), 4 * 64 * 4096 * 2048),
    ("prefill attention, 16 x 1024 (us)", 16 * 1024 * 2 * (2 * 2048 + 2 * 512), 16 * 4 * 524800 * 2048)])
def test_what_a_kernel_moves_and_computes(label, num_bytes, flops):
    assert cost(label, CONFIG) == (num_bytes, flops)


def test_a_layers_weights_are_those_of_the_model():
    """2.47 GB a token, which is what bounds batch 1."""
    layer = sum(cost(f"product: {name}, 0 rows (us)", CONFIG).num_bytes for name in ("qkv", "o", "gate_up", "down"))
    assert 16 * layer + cost("product: lm_head, 0 rows (us)", CONFIG).num_bytes == pytest.approx(2.4715e9, rel=1e-4)


def test_the_nearer_roof_is_the_one_that_counts():
    figures = {"ceiling: read (TB/s)": 4.0, "cuBLAS: gate_up, 16384 rows (us)": 1500.0,
               "product: gate_up, 16384 rows (us)": 2000.0, "product: gate_up, 1 rows (us)": 20.0,
               "decode, batch 1 (tokens/s)": 1000.0}
    rate, label = multiply_ceiling(figures, CONFIG)
    assert label == "cuBLAS: gate_up, 16384 rows (us)" and rate == pytest.approx(2 * 16384 * 16384 * 2048 / 1500e6)
    points = {point.kernel: point for point in roofline(figures, CONFIG)}
    assert set(points) == {label.removesuffix(" (us)") for label in figures if "us" in label}
    large, small = points["product: gate_up, 16384 rows"], points["product: gate_up, 1 rows"]
    assert large.bound == "multiplying" and large.share == pytest.approx(0.75)
    assert small.bound == "reading" and small.share == pytest.approx(small.terabytes / 4.0)


def test_without_any_roof_there_are_rates_and_no_share():
    [point] = roofline({"product: o, 1 rows (us)": 5.0}, CONFIG)
    assert point.share is None and point.terabytes > 1


# ---- files ----


def test_results_come_back_as_they_were_written(tmp_path):
    results = complete(invented(0, 100, 200))
    write_results(tmp_path / "x.json", results)
    assert read_results(tmp_path / "x.json") == results
    assert '"decode, batch 1 (tokens/s)": [900.0, 1000.0, 1300.0]' in (tmp_path / "x.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_the_repository_shows_is_made_from_its_data():
    """README, picture and page; and the data's summary follows from its processes."""
    results = read_results()
    assert results == complete(results)
    assert gpu_report.RESULTS.with_suffix(".svg").read_text() == plot.svg(results)
    assert gpu_report.RESULTS.with_suffix(".md").read_text() == gpu_tables.page(results)
    readme = (ROOT / "README.md").read_text()
    assert plot.with_section(readme, gpu_tables.readme_section(results)) == readme
    for path in (gpu_tables.DATA, gpu_tables.PAGE, gpu_tables.PICTURE):
        assert (ROOT / path).exists() and path in readme


def test_the_readme_says_of_every_aim_where_it_stands_and_of_vllm_that_it_was_elsewhere():
    section = gpu_tables.readme_section(read_results())
    assert "vLLM 0.26, measured earlier on another H200" in section
    for target in TARGETS:
        [line] = [line for line in section.splitlines() if line.startswith(f"| {target.work} |")]
        assert re.search("goal reached|above the floor|below the floor|not measured yet", line)


def test_a_figure_below_its_floor_is_told_in_bold_and_in_another_colour():
    results = complete(invented(0, 0, 0))
    section, picture = gpu_tables.readme_section(results), plot.svg(results)
    assert "| 1,000 tokens/s (1,000 to 1,000) | 1,100 | 1,500 | **below the floor** |" in section
    assert "| 6.00 ms (6.00 to 6.00) | 5 | 2 | **below the floor** |" in section
    assert picture.count(f'fill="{plot.BELOW}"') == 1 + 3, "legend, batch 1, first token, products of many rows"
    assert "in each of 3 processes" in section and "**one process**" not in section
    assert "**one process**" in gpu_tables.readme_section(complete(invented(0)))


def test_bars_are_as_long_as_their_figures():
    """Ours over the floor, on the scale of the line that says "floor"."""
    results = complete(invented(0))
    ElementTree.fromstring(plot.svg(results))  # well-formed
    lines = plot.svg(results).splitlines()
    floor = next(float(re.search(r'x1="([0-9.]+)"', line)[1]) for line in lines if "dasharray" in line) - plot.LABEL
    bars = [float(re.search(r'width="([\d.]+)"', line)[1]) for line in lines if 'height="12"' in line]
    assert bars[0] / floor == pytest.approx(1000 / 1100, rel=0.01)
    assert bars[1] / floor == pytest.approx(5 / 6, rel=0.01), "less is better: the inverse"
    assert len(bars) == sum(target.label in results["summary"] for target in TARGETS)


def test_a_readme_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no place for the GPU's figures"):
        plot.with_section("# README\n", "figures")


def test_other_results_become_those_of_the_repository(tmp_path, monkeypatch):
    write_results(tmp_path / "new.json", invented(0, 100, 200))
    (tmp_path / "README.md").write_text(f"above\n{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\nbelow\n")
    monkeypatch.setattr(plot, "README", tmp_path / "README.md")
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "gpu_llama_1b.json")
    plot.main([str(tmp_path / "new.json")])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("above\n") and readme.endswith("\nbelow\n") and "1,100 tokens/s" in readme
    assert read_results(tmp_path / "gpu_llama_1b.json")["summary"] and (tmp_path / "gpu_llama_1b.svg").exists()
