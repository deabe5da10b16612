"""Where the browser is, how it is started (alone, offline, quiet), and how it comes onto a machine that has none.

    python -m tests.browser.chromium     # find one, or install one; prints its path
"""

import atexit
import os
import shutil
import subprocess
import sys

PATIENCE_S = 180.0  # before a test gives up on what should come at once: a busy machine is not a mistake
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The path of a Chromium: TINYVLLM_CHROMIUM, else one on the PATH, else Playwright's own, else None."""
    named = os.environ.get("TINYVLLM_CHROMIUM")
    if named:
        return named
    return next((path for path in map(shutil.which, NAMES) if path), None) or _playwrights_own()


def _playwrights_own() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if os.path.exists(path) else None


def launch_options() -> dict:
    """For playwright.chromium.launch. Raises RuntimeError, with what to do, if there is no browser."""
    path = find_chromium()
    if path is None:
        raise RuntimeError("the browser tests need Chromium or Chrome: install one (apt install chromium, or "
                           "`python -m playwright install chromium`), or set TINYVLLM_CHROMIUM to its path")
    # Without a sandbox, because as root and in containers there is none to be had; no page from outside is loaded.
    return {"executable_path": path,
            "args": ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
                     "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage"]}


class SharedBrowser:
    """One Chromium for all tests of a process: Playwright's synchronous interface allows no second beside it."""

    def __init__(self):
        self._playwright = self._browser = None

    def get(self):
        """The browser, started on first use."""
        if self._browser is None:
            from playwright.sync_api import sync_playwright

            self._playwright = sync_playwright().start()
            self._browser = self._playwright.chromium.launch(**launch_options())
        return self._browser

    def close(self) -> None:
        """End it; the next `get` starts another."""
        if self._browser is not None:
            self._browser.close()
            self._playwright.stop()
        self._playwright = self._browser = None


shared_browser = SharedBrowser()
atexit.register(shared_browser.close)


def install() -> str:
    """Make sure that there is a browser; returns its path. Tries the system's packages, then Playwright's download."""
    attempts = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        attempts[:0] = [["apt-get", "-q", "update"], ["apt-get", "-q", "install", "-y", "--no-install-recommends",
                                                      "chromium"]]
    for command in attempts:
        if find_chromium():
            break
        print("no Chromium here:", " ".join(command), file=sys.stderr, flush=True)
        subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdout=sys.stderr, check=False)
    return launch_options()["executable_path"]


if __name__ == "__main__":
    print(install())
