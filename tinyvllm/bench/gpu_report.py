"""From the figures of several processes to one: medians with their range, ratios, and what was aimed at.

A figure of a process is the median of its rounds; a figure of the report is the median over processes, and its range is
the lowest and highest of them. Ratios are taken within a process: what two processes measured is not divided.
"""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.gpu_roofline import roofline
from tinyvllm.model.config import ModelConfig

RESULTS = Path(__file__).parent / "results" / "gpu_llama_1b.json"
MIXED = 64  # rows up to which a product has one aim, and beyond which another
UP_TO = f"cuBLAS's time over ours, 1 to {MIXED} rows, lowest (ratio)"
BEYOND = f"cuBLAS's time over ours, more than {MIXED} rows, lowest (ratio)"


class Target(NamedTuple):
    """A figure with an aim. vllm: what vLLM 0.26 was measured at, earlier and on another H200; floor: what it takes."""

    label: str
    work: str
    unit: str
    vllm: tuple[float, ...]  # one figure, or lowest (, median) and highest, () for none
    floor: float
    goal: float
    less_is_better: bool = False


TARGETS = (
    Target("decode, batch 1 (tokens/s)", "decode, batch 1, 32 tokens in, 128 out", "tokens/s", (531, 668), 1100, 1500),
    Target("decode, batch 1, 512 out (tokens/s)", "the same, 512 out", "tokens/s", (531, 668), 1100, 1500),
    Target("TTFT, 32 tokens (ms)", "first token of a prompt of 32", "ms", (5.3, 7.4), 5, 2, True),
    *(Target(f"served, batch {batch} (tokens/s)", f"{batch} requests at once, 128 in, 128 out", "tokens/s", (vllm,),
             floor, goal) for batch, vllm, floor, goal in (
        (8, 4510, 6500, 9500), (32, 15441, 20000, 30000), (128, 35197, 48000, 80000), (256, 48146, 65000, 110000))),
    Target("workload, 256 requests (tokens/s)", "256 requests, 100 to 1,024 in and out", "tokens/s",
           (28222, 32197, 34969), 40000, 58000),
    Target("prefill, 16 x 1024 (TFLOP/s)", "prefill, 16 prompts of 1,024", "TFLOP/s", (), 450, 650),
    *(Target(f"torch's time over ours, prefill attention, {shape} (ratio)",
             f"prefill attention, {shape.replace('x 1024', 'x 1,024').replace('x 4096', 'x 4,096')}, against cuDNN",
             "x", (), 0.95, 1.05) for shape in ("16 x 1024", "4 x 4096")),
    Target(UP_TO, f"products up to {MIXED} rows against cuBLAS, the lowest", "x", (), 1.0, 1.1),
    Target(BEYOND, "products of more rows, to 16,384, the lowest", "x", (), 0.9, 1.0),
    Target("kernel: decode attention, 64 x 4096 (TB/s)", "decode attention, 64 x 4,096 tokens", "TB/s", (), 3.8, 4.3),
    Target("GPU busy, batch 1 (%)", "GPU at work in a decode step, batch 1", "%", (74,), 90, 97),
    Target("GPU busy, batch 256 (%)", "the same, batch 256", "%", (48,), 90, 97),
)
OURS = re.compile(r"(product|kernel): (\w+), (?:batch )?(\d+)(?: rows)? \(us\)")


def with_ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """One process's figures (label -> median), and their ratios to the peers' in the same process."""
    found = dict(figures)
    for label, ours in figures.items():
        if match := OURS.fullmatch(label):
            kind, name, rows = match.groups()
            theirs = figures.get(f"cuBLAS: {name}, {rows} rows (us)")
            if theirs:
                way = "ours" if kind == "product" else "ours with its neighbours"
                found[f"cuBLAS's time over {way}, {name}, {rows} rows (ratio)"] = theirs / ours
        elif label.startswith("prefill attention") and f"torch: {label}" in figures:
            found[f"torch's time over ours, {label.replace('(us)', '(ratio)')}"] = figures[f"torch: {label}"] / ours
    for label, wanted in ((UP_TO, lambda rows: rows <= MIXED), (BEYOND, lambda rows: rows > MIXED)):
        ratios = [value for name, rows, value in product_ratios(found, "ours") if wanted(rows)]
        if ratios:
            found[label] = min(ratios)
    return found


def product_ratios(figures: Mapping[str, float], way: str) -> list[tuple[str, int, float]]:
    """(product, rows, ratio) of the ratios to cuBLAS. way: "ours" or "ours with its neighbours"."""
    pattern = re.compile(rf"cuBLAS's time over {way}, (\w+), (\d+) rows \(ratio\)")
    return [(match[1], int(match[2]), value) for label, value in figures.items() if (match := pattern.fullmatch(label))]


def process_figures(process: Mapping) -> dict[str, float]:
    """label -> median over the rounds of one process, ratios included."""
    return with_ratios({label: statistics.median(figures) for label, figures in process["results"].items()})


def summarise(processes: list[Mapping]) -> dict[str, dict]:
    """label -> {"median", "lowest", "highest", "processes"} over the processes that have this figure."""
    figures = [process_figures(process) for process in processes]
    summary = {}
    for label in dict.fromkeys(label for one in figures for label in one):
        values = [one[label] for one in figures if label in one]
        summary[label] = {"median": rounded(statistics.median(values)), "lowest": rounded(min(values)),
                          "highest": rounded(max(values)), "processes": len(values)}
    return summary


def median_roofline(processes: list[Mapping], config) -> list[dict]:
    """The Points of gpu_roofline.py, each number the median over processes (a share is of that process's own roofs)."""
    found: dict[str, list] = {}
    for process in processes:
        for point in roofline(process_figures(process), config):
            found.setdefault(point.kernel, []).append(point)
    rows = []
    for kernel, points in found.items():
        row = {"kernel": kernel, "bound": points[0].bound}
        for name in ("microseconds", "terabytes", "teraflops", "share"):
            values = [getattr(point, name) for point in points if getattr(point, name) is not None]
            row[name] = rounded(statistics.median(values)) if values else None
        rows.append(row)
    return rows


def complete(results: dict) -> dict:
    """Results with what follows from the figures of their processes: "summary" and "roofline"."""
    config = ModelConfig.from_dict(LLAMA_3_2_1B if isinstance(results["config"], str) else results["config"])
    return {**results, "summary": summarise(results["processes"]),
            "roofline": median_roofline(results["processes"], config)}


def verdict(target: Target, value: float) -> str:
    """Where a figure stands."""
    sign = -1 if target.less_is_better else 1
    if sign * value >= sign * target.goal:
        return "goal reached"
    return "above the floor" if sign * value >= sign * target.floor else "below the floor"


def rounded(value: float, digits: int = 6) -> float:
    """To significant digits: what lies beyond is noise."""
    return float(f"{value:.{digits}g}")


def write_results(path: Path, results: dict) -> None:
    """As JSON, a list of numbers on one line; the file is there as a whole or as it was."""
    text = re.sub(r"\[\s+(-?[\d.][^\[\]{}\"]*?)\s+\]", lambda numbers: "[" + " ".join(numbers[1].split()) + "]",
                  json.dumps(results, indent=1))
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def read_results(path: Path = RESULTS) -> dict:
    """What write_results wrote."""
    return json.loads(path.read_text())
