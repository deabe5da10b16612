"""Every notebook in a real JupyterLab: Run All, and nothing fails, nothing goes outside, nothing complains."""

import time
from pathlib import Path

import pytest

from tests.browser.lab import Lab, write_notebook

NOTEBOOKS = sorted(path.name for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all(lab, name):
    page = lab.open(f"notebooks/{name}")
    try:
        page.run_all()
        assert page.errors == [] and page.outside == []
    finally:
        page.shutdown()


def test_a_newcomer_sees_a_moving_timeline_after_two_clicks(lab):
    """What `make lab` opens: one click on "Restart the kernel and run all cells", one to confirm."""
    page = lab.open("notebooks/00_start_here.ipynb")
    timeline = '.tv-panel[aria-label="Scheduler timeline"] canvas'
    try:
        page.page.click("[data-command='notebook:restart-run-all']")
        page.page.click(".jp-Dialog button.jp-mod-accept")
        page.page.wait_for_selector(timeline)
        box = page.page.locator(timeline).first.bounding_box()
        assert box["y"] + 100 < page.page.viewport_size["height"]  # in sight, without scrolling
        picture = f"() => document.querySelector({timeline!r}).toDataURL()"
        page.page.wait_for_timeout(1000)
        first, deadline = page.page.evaluate(picture), time.monotonic() + 60
        while page.page.evaluate(picture) == first:
            assert time.monotonic() < deadline, "the timeline stands still"
            page.page.wait_for_timeout(100)
        page.wait_idle()
        page.check_cells()
    finally:
        page.shutdown()


def test_a_cell_that_fails_is_seen(tmp_path):
    """By what every test here calls: or it could not fail."""
    write_notebook(tmp_path / "fails.ipynb", "import sys; print('only a warning', file=sys.stderr)", "1 / 0")
    with Lab(tmp_path) as lab:
        page = lab.open("fails.ipynb")
        with pytest.raises(AssertionError, match="ZeroDivisionError: division by zero"):
            page.run_all()
        page.shutdown()
