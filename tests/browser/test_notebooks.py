"""Every notebook in a real JupyterLab: Run All, and nothing fails, nothing goes outside, nothing complains."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted(path.name for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all(lab, name):
    page = lab.open(f"notebooks/{name}")
    try:
        page.run_all()
        assert page.errors == [] and page.outside == []
    finally:
        page.shutdown()
