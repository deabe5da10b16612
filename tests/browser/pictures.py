"""The pictures that a reader sees without running anything: posters in the notebooks, and the README's.

    python -m tests.browser.pictures                    # all of them, a few minutes
    python -m tests.browser.pictures 02_bfloat16        # the posters of one notebook
    python -m tests.browser.pictures dashboard          # the README's animation

Each notebook is run in a real JupyterLab. What its cells printed stays as their output; in the place of each widget,
whose state would be megabytes and which GitHub cannot show, stands a picture of it as it was at the end of the run.
"""

import base64
import io
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image
from tqdm.auto import tqdm

from tests.browser.chromium import shared_browser
from tests.browser.lab import REPOSITORY, Lab, LabPage, write_notebook

NOTEBOOKS = REPOSITORY / "notebooks"
PICTURES = NOTEBOOKS / "pictures"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
SETTLE_MS = 1500  # for the last frames to be drawn
CAPTURE = {"frames": 40, "every_ms": 180, "width": 860, "height": 1000}


def small_png(shot: bytes, colours: int = 128) -> bytes:
    """A screenshot with a palette: a quarter of the bytes, and nobody sees it."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def add_posters(page: LabPage, path: Path) -> None:
    """Run the notebook at `path`, which `page` shows, and write it back with outputs and posters."""
    page.run_all(timeout=180)
    page.page.wait_for_timeout(SETTLE_MS)
    cells = page.page.locator(".jp-Notebook .jp-Cell")
    notebook = nbformat.read(path, 4)
    page.command("docmanager:save")
    page.page.wait_for_timeout(1500)
    told, number_run = nbformat.read(path, 4), 0
    for index, (cell, ran) in enumerate(zip(notebook.cells, told.cells)):
        if cell.cell_type != "code":
            continue
        number_run += 1  # from 1 on, whoever ran what before: nbval wants a number where there are outputs
        cell.execution_count, cell.metadata = number_run, {}
        seen = [static(output, cells.nth(index), number) for number, output in enumerate(ran.get("outputs", []))]
        cell.outputs = [output for output in seen if output is not None]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def static(output, cell, number: int):
    """An output as a reader sees it without a kernel; None for what is nothing then, such as a progress bar."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if WIDGET_VIEW not in data:
        output.pop("execution_count", None)
        if output.output_type == "execute_result":
            output.execution_count = None
        return output
    shown = cell.locator(".jp-OutputArea-child").nth(number).locator(".jp-OutputArea-output")
    if shown.locator(".tv-panel").count() == 0:
        return None
    shown.scroll_into_view_if_needed()
    shown.page.wait_for_timeout(700)  # what is out of sight is not drawn
    png = small_png(shown.screenshot())
    words = data.get("text/plain", "").replace(f"{REPOSITORY}/", "")  # where it was run is nobody's business
    return nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(png).decode(), "text/plain": words})


def capture(page: LabPage, path: Path) -> None:
    """An animation of the dashboard's first panels while it generates."""
    area = page.page.locator(".tv-panel").first.locator("xpath=ancestor::div[contains(@class,'jp-OutputArea-output')]")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": min(box["height"], CAPTURE["height"])}
    size = CAPTURE["width"], round(clip["height"] * CAPTURE["width"] / clip["width"])
    frames = []
    for _ in tqdm(range(CAPTURE["frames"]), desc="capture"):
        shot = Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")
        frames.append(shot.resize(size, Image.Resampling.LANCZOS))
        page.page.wait_for_timeout(CAPTURE["every_ms"])
    several = frames[::5]  # no single one has all colours
    together = Image.new("RGB", (size[0], size[1] * len(several)))
    for i, frame in enumerate(several):
        together.paste(frame, (0, i * size[1]))
    palette = together.quantize(160, Image.Quantize.MAXCOVERAGE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(path, save_all=True, append_images=small[1:], duration=200, loop=0, optimize=True)


DASHBOARD = """
from IPython.display import display
from tinyvllm import LLM, LiveEngine, SamplingParams
from widgets import Dashboard
live = LiveEngine(LLM("demo", block_size=8, num_blocks=128, max_num_seqs=4, max_num_batched_tokens=32, use_tqdm=False),
                  steps_per_second=10)
for seed, hero in enumerate(("a fox and a lantern", "an owl and a key", "a mouse and a rope", "a crow and a bell",
                             "a bear and a drum", "a hare and a kite")):
    live.chat([{"role": "user", "content": f"Tell me a story about {hero}."}],
              SamplingParams(seed=seed, max_tokens=45 + 20 * seed))
display(Dashboard(live, panels=["ControlBar", "SchedulerTimeline", "KVBlockMap", "TokenRace"]))
"""


def main(names: list[str]) -> None:
    chosen = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not names or path.stem in names]
    if not chosen and "dashboard" not in names:
        raise SystemExit(f"no notebook is called {', '.join(names)}")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(NOTEBOOKS, Path(folder) / "notebooks")
        with Lab(Path(folder)) as lab:
            for path in tqdm(chosen, desc="notebooks"):
                copy = Path(folder) / "notebooks" / path.name
                page = lab.open(f"notebooks/{path.name}", height=5400)  # all of the dashboard
                add_posters(page, copy)
                assert page.errors == [] and page.outside == [], (page.errors, page.outside)
                shutil.copy(copy, path)
                page.shutdown()
            if not names or "dashboard" in names:
                write_notebook(Path(folder) / "dashboard.ipynb", DASHBOARD)
                page = lab.open("dashboard.ipynb", height=2000)
                page.run_all()
                while int(page.python("print(live.stats.num_steps)")) < 5:  # kernels are being compiled
                    page.page.wait_for_timeout(200)
                capture(page, PICTURES / "dashboard.gif")
                page.shutdown()
    shared_browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
