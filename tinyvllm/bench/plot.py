"""The picture and the tables of the GPU's figures in the repository, made from the JSON.

    python -m tinyvllm.bench.plot               writes results/gpu_llama_1b.svg and .md, and the README's section
    python -m tinyvllm.bench.plot out.json      from other results, which become those of the repository

The SVG is text in mid-tones on no background, so that it can be read on a light page and on a dark one. Every row has a
scale of its own: 1 is the floor. Where less is better, bars show the inverse, so that longer is better everywhere.
"""

import argparse
from html import escape
from pathlib import Path
from statistics import median

from tinyvllm.bench.gpu_report import RESULTS, TARGETS, Target, complete, read_results, write_results
from tinyvllm.bench.gpu_tables import BEGIN, END, page, peer_text, readme_section, with_unit

README = Path(__file__).parents[2] / "README.md"
TEXT, OURS, BELOW, PEER = "#7d8590", "#2f81f7", "#d29922", "#8b949e"
LABEL, CHART, RIGHT, ROW, TOP = 312, 330, 330, 34, 58  # pixels
FONT = "font-family=\"-apple-system,'Segoe UI',Helvetica,Arial,sans-serif\""


def times_floor(target: Target, value: float) -> float:
    """How many times as good as the floor."""
    return target.floor / value if target.less_is_better else value / target.floor


def text(x: float, y: float, content: str, anchor: str = "start", size: int = 12, colour: str = TEXT) -> str:
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">'
            f"{escape(content)}</text>")


def bar(y: float, height: float, length: float, colour: str) -> str:
    return f'<rect x="{LABEL}" y="{y:g}" width="{length:.1f}" height="{height:g}" rx="2" fill="{colour}"/>'


def svg(results: dict) -> str:
    """The picture."""
    summary = results["summary"]
    reached = [times_floor(t, summary[t.label]["median"]) for t in TARGETS if t.label in summary]
    reached += [times_floor(t, end) for t in TARGETS for end in (t.goal, *t.vllm)]
    scale = CHART / max(reached)
    width, height = LABEL + CHART + RIGHT, TOP + ROW * len(TARGETS) + 8
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" {FONT} role="img">',
             f"<title>tinyvllm on one {escape(results['environment']['gpu'])}, Llama-3.2-1B shape: "
             "each figure beside its floor and vLLM's</title>"]
    floor = LABEL + scale
    lines += [legend(),
              text(floor, TOP - 8, "floor", "middle", 11),
              f'<line x1="{floor:.1f}" y1="{TOP - 4}" x2="{floor:.1f}" y2="{height - 6}" stroke="{TEXT}" '
              'stroke-dasharray="3 3"/>']
    for i, target in enumerate(TARGETS):
        lines += row(target, summary.get(target.label), TOP + ROW * i, scale)
    return "\n".join([*lines, "</svg>"]) + "\n"


def legend() -> str:
    parts, x = [], LABEL
    for colour, words, step in ((OURS, "tinyvllm", 82), (BELOW, "tinyvllm, below the floor", 172),
                                (PEER, "vLLM 0.26, measured earlier on another H200", 282)):
        parts.append(f'<rect x="{x}" y="12" width="10" height="10" rx="2" fill="{colour}"/>' + text(x + 15, 21, words))
        x += step
    parts.append(text(x, 21, "| goal"))
    return "\n".join(parts)


def row(target: Target, entry: dict | None, y: float, scale: float) -> list[str]:
    """A figure: ours above, vLLM's below with its range, a mark at the goal."""
    middle, right = y + ROW / 2, LABEL + CHART + 12
    lines = [f'<line x1="{LABEL}" y1="{y + ROW - 1}" x2="{LABEL + CHART}" y2="{y + ROW - 1}" stroke="{TEXT}" '
             'stroke-opacity="0.4"/>',
             text(LABEL - 10, middle + 4, target.work, "end")]
    if entry is None:
        lines.append(text(right, middle + 4, "not measured yet"))
    else:
        ratio = times_floor(target, entry["median"])
        lines.append(bar(y + 5, 12, ratio * scale, OURS if ratio >= 1 else BELOW))
        words = with_unit(entry["median"], target.unit)
        lines.append(text(right, middle + 4, words + (f"  (vLLM {peer_text(target)})" if target.vllm else "")))
    if target.vllm:
        ends = sorted(times_floor(target, value) * scale for value in (target.vllm[0], target.vllm[-1]))
        lines.append(bar(y + 20, 7, times_floor(target, median(target.vllm)) * scale, PEER))
        if ends[0] < ends[1]:
            lines.append(f'<line x1="{LABEL + ends[0]:.1f}" y1="{y + 23.5}" x2="{LABEL + ends[1]:.1f}" y2="{y + 23.5}" '
                         f'stroke="{TEXT}" stroke-width="2"/>')
    goal = LABEL + times_floor(target, target.goal) * scale
    lines.append(f'<line x1="{goal:.1f}" y1="{y + 3}" x2="{goal:.1f}" y2="{y + ROW - 4}" stroke="{TEXT}" '
                 'stroke-width="2"/>')
    return lines


def with_section(readme: str, section: str) -> str:
    """The README with the section in its place. Raises ValueError where there is no place for it."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the GPU's figures: it needs a line {BEGIN!r} and a line {END!r}")
    return before + section + after


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="default: those of the repository")
    options = parser.parse_args(argv)
    results = complete(read_results(options.results))
    readme = with_section(README.read_text(), readme_section(results))
    write_results(RESULTS, results)
    RESULTS.with_suffix(".svg").write_text(svg(results))
    RESULTS.with_suffix(".md").write_text(page(results))
    README.write_text(readme)
    print(f"{RESULTS.with_suffix('.svg')}, {RESULTS.with_suffix('.md')} and {README} are those of {options.results}")


if __name__ == "__main__":
    main()
