"""A real JupyterLab in a real Chromium: what a person does with a notebook, done by a test.

    with Lab(root) as lab:
        page = lab.open("notebooks/01_live_engine.ipynb")
        page.run_all()

The server has a port and a configuration directory of its own. Every request that would leave this machine is stopped
and remembered in `page.outside`; what the console says of errors, in `page.errors`.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from playwright.sync_api import Page

from tests.browser.chromium import PATIENCE_S, shared_browser

IDLE = """() => {
  const panel = window.jupyterapp?.shell?.currentWidget;
  return panel?.sessionContext?.session?.kernel?.status === 'idle'
      && ![...panel.node.querySelectorAll('.jp-InputPrompt')].some((e) => e.textContent.includes('*'));
}"""
# On the page a traceback is marked like anything else on stderr; the notebook's own model knows.
FAILURES = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap((cell) =>
    (cell.toJSON().outputs ?? []).filter((output) => output.output_type === 'error')
        .map((output) => output.traceback.join('\\n')))"""
REPOSITORY = Path(__file__).parents[2]
THEMES = ("JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast")
QUIET = ("Failed to load resource: the server responded with a status of 404",)  # Lab asks for files that may be absent


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of these cells of code."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


class Lab:
    """A JupyterLab server. root: the folder that it shows."""

    def __init__(self, root: Path):
        self.root = root
        self._scratch = tempfile.TemporaryDirectory()

    def __enter__(self) -> "Lab":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        scratch = Path(self._scratch.name)
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(scratch / "config"),
                       "JUPYTER_DATA_DIR": str(scratch / "data"), "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
                       "IPYTHONDIR": str(scratch / "ipython"),
                       "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))}
        # Lab would ask, in a box over the page, whether it may fetch news.
        settings = scratch / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
        environment["JUPYTERLAB_SETTINGS_DIR"] = str(scratch / "settings")
        self.log = (scratch / "lab.log").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={self.port}",
             "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={self.root}",
             "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0"],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    raise RuntimeError(f"JupyterLab did not start:\n{self.log.read()}") from None
                time.sleep(0.2)

    def __exit__(self, *_) -> None:
        self._server.terminate()
        try:
            self._server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self.log.close()
        self._scratch.cleanup()

    def open(self, notebook: str, *, width: int = 1280, height: int = 900) -> "LabPage":
        """Open a notebook in a workspace of its own and wait for its kernel."""
        return LabPage(self, shared_browser.get().new_page(viewport={"width": width, "height": height}), notebook)


class LabPage:
    """One notebook, open in one tab."""

    def __init__(self, lab: Lab, page: Page, notebook: str):
        self.lab, self.page, self.notebook = lab, page, notebook
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))
        page.route("**/*", self._route)
        page.goto(f"http://127.0.0.1:{lab.port}/lab/workspaces/w{time.time_ns()}/tree/{notebook}?reset")
        self.wait_idle()

    def _console(self, message) -> None:
        if message.type == "error" and not message.text.startswith(QUIET):
            self.errors.append(message.text)

    def _route(self, route) -> None:
        url = route.request.url
        if url.startswith((f"http://127.0.0.1:{self.lab.port}/", "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(url)
            route.abort()

    def wait_idle(self, timeout: float = 120) -> None:
        """Wait until every cell has run and the kernel rests."""
        self.page.wait_for_function(IDLE, timeout=timeout * 1e3)

    def command(self, name: str, **arguments) -> None:
        """Execute one of JupyterLab's own commands."""
        self.page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args)", [name, arguments])

    def run_all(self, timeout: float = 120) -> None:
        """Run every cell from the top. Raises AssertionError with the traceback if one failed."""
        self.command("notebook:run-all-cells")
        self.page.wait_for_timeout(300)
        self.wait_idle(timeout)
        self.check_cells()

    def check_cells(self) -> None:
        """Raises AssertionError with the traceback if a cell failed."""
        failures = self.page.evaluate(FAILURES)
        assert not failures, re.sub(r"\x1b\[[\d;]*m", "", failures[0])  # without the terminal's colours

    def python(self, code: str, timeout: float = PATIENCE_S) -> str:
        """Run code in the notebook's kernel, as a person at its console would; returns what it printed."""
        return self.page.evaluate("""([code, timeout]) => new Promise((resolve, reject) => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const future = kernel.requestExecute({ code, store_history: false });
            let text = '';
            future.onIOPub = (m) => {
              if (m.header.msg_type === 'stream') text += m.content.text;
              if (m.header.msg_type === 'error') reject(new Error(m.content.traceback.join('\\n')));
            };
            future.done.then(() => resolve(text));
            setTimeout(() => reject(new Error('no answer from the kernel')), timeout * 1000);
        })""", [code, timeout]).strip()

    def set_theme(self, name: str) -> None:
        """One of THEMES."""
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_function("(name) => document.body.dataset.jpThemeName === name", arg=name)

    def reload(self) -> None:
        """Reload the page, as a person would press F5; the kernel goes on."""
        self.command("docmanager:save")
        self.page.reload()
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel",
                                    timeout=1000 * PATIENCE_S)

    def shutdown(self) -> None:
        """End the kernel and close the tab."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")
        self.page.close()
