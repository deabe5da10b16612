"""One browser and one JupyterLab for all tests here."""

from pathlib import Path

import pytest

from tests.browser.chromium import shared_browser
from tests.browser.lab import Lab


@pytest.fixture(scope="package", autouse=True)
def browser_ends_with_these_tests():
    """Playwright keeps an event loop on this thread while a browser is open; other tests want one of their own."""
    yield
    shared_browser.close()


@pytest.fixture(scope="package")
def lab():
    """A JupyterLab server over the repository."""
    with Lab(Path(__file__).parents[2]) as server:
        yield server
