"""The GPU's figures as Markdown: the README's table, and every figure for who wants to know (results/gpu_llama_1b.md).

Nothing is written by hand here: tests hold README, picture and tables to the JSON that they come from.
"""

from tinyvllm.bench.gpu_report import TARGETS, Target, product_ratios, verdict

VLLM = "vLLM 0.26, measured earlier on another H200"
DATA, PAGE, PICTURE = (f"tinyvllm/bench/results/gpu_llama_1b.{kind}" for kind in ("json", "md", "svg"))
BEGIN, END = "<!-- begin: made by python -m tinyvllm.bench.plot -->", "<!-- end -->"
# Also in the README, where measured: label -> what it is called there, unit
ALSO = {
    **{f"decode, batch {n} (tokens/s)": (f"decode, batch {n}, 32 in, 128 out", "tokens/s") for n in (8, 32, 128, 256)},
    "TTFT, 512 tokens (ms)": ("first token of a prompt of 512", "ms"),
    **{f"GPU busy, batch {n} (%)": (f"GPU at work in a decode step, batch {n}", "%") for n in (8, 32, 128)},
    "a step ahead on: decode, batch 256 (tokens/s)": ("decode, batch 256, each step begun ahead", "tokens/s"),
    "a step ahead off: decode, batch 256 (tokens/s)": ("the same in turn with it, not ahead", "tokens/s"),
    **{f"transformers, {way}: decode, batch {n} (tokens/s)": (f"transformers, {way}: decode, batch {n}", "tokens/s")
       for way, n in (("eager", 1), ("compiled", 1), ("eager", 32), ("eager", 256))},
    "ceiling: read (TB/s)": ("mere reading, the roof of all of these", "TB/s"),
    **{f"sampling over greedy, batch {n} (us a step)":
       (f"a step at batch {n} with temperature 0.8, top-k 50, top-p 0.95 over greedy", "us") for n in (1, 32, 256)},
    "start, warm: to the first token (s)": ("from starting Python to the first token, kernels compiled before", "s"),
    "start, warm: weights (GB/s)": ("loading the weights, file in memory", "GB/s"),
    "start, file not in memory: weights (GB/s)": ("loading the weights from the disk", "GB/s"),
}


def number(value: float, unit: str = "") -> str:
    """Three or four digits, in English."""
    if unit == "%":
        return f"{value:.0f}"
    if unit == "x":
        return f"{value:.2f}"
    if abs(value) >= 100:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:#.3g}".rstrip(".")


def with_unit(value: float, unit: str) -> str:
    return number(value, unit) + {"x": "", "%": "%"}.get(unit, f" {unit}")


def figure(entry: dict, unit: str) -> str:
    """A median, and its range where there is one."""
    text = with_unit(entry["median"], unit)
    if entry["processes"] > 1:
        text += f" ({number(entry['lowest'], unit)} to {number(entry['highest'], unit)})"
    return text


def peer_text(target: Target) -> str:
    """vLLM's figure; "-" where there is none."""
    if not target.vllm:
        return "-"
    ends = dict.fromkeys((target.vllm[0], target.vllm[-1]))
    middle = f", median {target.vllm[1]:,}" if len(target.vllm) == 3 else ""
    return " to ".join(f"{value:,}" for value in ends) + middle + ("%" if target.unit == "%" else "")


def target_rows(summary: dict) -> list[str]:
    """The table of what was aimed at."""
    rows = [f"| | {VLLM} | tinyvllm | floor | goal | |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        entry = summary.get(target.label)
        value, stands = ("-", "not measured yet") if entry is None else (
            figure(entry, target.unit), verdict(target, entry["median"]))
        if stands == "below the floor":
            stands = f"**{stands}**"
        rows.append(f"| {target.work} | {peer_text(target)} | {value} | {target.floor:,} | {target.goal:,} "
                    f"| {stands} |")
    return rows


def about(results: dict) -> str:
    """Hardware, versions and how often: a sentence."""
    found, count = results["environment"], sum(bool(process["results"]) for process in results["processes"])
    versions = [f"driver {found['driver']}"] if "driver" in found else []
    versions += [f"{name} {found[name]}" for name in ("numba", "numba-cuda") if name in found]
    times = ("in **one process** (the next may differ by 10 to 20%: three are wanted, and were not run yet)"
             if count == 1 else f"in each of {count} processes, median and range over processes")
    return (f"On one {found['gpu']} ({', '.join(versions)}; {found['date']}), Llama-3.2-1B shape, random weights, "
            f"greedy, without text; medians of {results['rounds']} rounds (of the workload "
            f"{max(1, results['rounds'] - 2)}) {times}.")


def readme_section(results: dict) -> str:
    """What stands between BEGIN and END in the README."""
    summary = results["summary"]
    also = [f"| {text} | {figure(summary[label], unit)} |" for label, (text, unit) in ALSO.items() if label in summary]
    return "\n".join([
        BEGIN, about(results), f"`make gpu-bench`; data in [gpu_llama_1b.json]({DATA}), kernel by kernel in "
        f"[gpu_llama_1b.md]({PAGE}).", "", f"![Each figure beside its floor and vLLM's]({PICTURE})", "",
        *target_rows(summary), "", "| also | tinyvllm |", "|---|---|", *also, END])


def roofline_rows(results: dict) -> list[str]:
    """Every kernel: time, rates, and its share of the nearer roof."""
    rows = ["| kernel | us | TB/s | TFLOP/s | bound by | share of that roof |", "|---|---|---|---|---|---|"]
    for point in results["roofline"]:
        share = "-" if point["share"] is None else f"{100 * point['share']:.0f}%"
        rows.append(f"| {point['kernel']} | {number(point['microseconds'])} | {point['terabytes']:.2f} | "
                    f"{point['teraflops']:.1f} | {point['bound'] or '-'} | {share} |")
    return rows


def ratio_rows(summary: dict) -> list[str]:
    """cuBLAS's time over ours, a product a line and rows across; [] without a peer."""
    medians = {label: entry["median"] for label, entry in summary.items()}
    tables = []
    for way, text in (("ours", "The product alone"),
                      ("ours with its neighbours", "Ours with norm, rotary embedding, cache write, gate or residual, "
                                                   "against the bare product of cuBLAS")):
        ratios = {(name, rows): value for name, rows, value in product_ratios(medians, way)}
        if not ratios:
            continue
        rows = sorted({rows for _, rows in ratios})
        tables += [f"{text}:", "", "| rows | " + " | ".join(f"{n:,}" for n in rows) + " |",
                   "|---" * (len(rows) + 1) + "|"]
        for name in dict.fromkeys(name for name, _ in ratios):
            values = (ratios.get((name, n)) for n in rows)
            tables.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:.2f}" for v in values) + " |")
        tables.append("")
    return tables


def page(results: dict) -> str:
    """results/gpu_llama_1b.md."""
    summary, notes = results["summary"], {}
    for process in results["processes"]:
        notes.update(process.get("notes", {}))
    lines = ["# Llama-3.2-1B shape on a GPU, figure by figure", "", about(results), "Made by "
             "`python -m tinyvllm.bench.plot` from gpu_llama_1b.json.", ""]
    lines += [f"- {what}: {value}" for what, value in notes.items()] + [""] * bool(notes)
    lines += ["## Aims", "", *target_rows(summary), "", "## Roofline", "",
              "Least bytes and operations over time, against the rate of mere reading and, where it was measured, of "
              "the fastest large product in the same process.", "",
              *roofline_rows(results), ""]
    ratios = ratio_rows(summary)
    if ratios:
        lines += ["## Products against cuBLAS: its time over ours", "", *ratios]
    lines += ["## All figures", "", "| | median | lowest process | highest process |", "|---|---|---|---|"]
    for label, entry in summary.items():
        lines.append(f"| {label} | " + " | ".join(number(entry[k]) for k in ("median", "lowest", "highest")) + " |")
    errors = [f"- process {i}: {what}: {why}" for i, process in enumerate(results["processes"], 1)
              for what, why in process["errors"].items()]
    if errors:
        lines += ["", "## What failed", "", *errors]
    return "\n".join(lines) + "\n"


def report(results: dict) -> str:
    """For the terminal: the page without the list of all figures, which were printed as they came."""
    text = page(results)
    start, end = text.index("## All figures"), text.find("## What failed")
    return text[:start] + (text[end:] if end >= 0 else "")
