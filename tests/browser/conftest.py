"""JupyterLab on loopback and a real browser. Without chromium or playwright the tests here are skipped and say so.

Screenshots are kept in .pytest_cache/d/browser, to be looked at.
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage".split()
PATIENCE = 90_000  # milliseconds; a loaded machine of two cores takes ten seconds to open a notebook


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def chromium():
    "The browser, or a skipped test"
    if not CHROMIUM: pytest.skip("no chromium on this machine: apt-get install chromium")
    return CHROMIUM


@pytest.fixture(scope="session")
def playwright(chromium):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright (it drives Debian's chromium; its own browsers are not needed)")
    with api.sync_playwright() as p: yield p


@pytest.fixture(scope="session")
def lab(tmp_path_factory, chromium):
    "(address, token, folder) of a JupyterLab with settings of its own, so that nobody's are touched"
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install jupyterlab")
    own, root, port, token = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks"), free_port(), secrets.token_hex(16)
    env = os.environ | {f"JUPYTER_{n}_DIR": str(own / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")} | dict(JUPYTERLAB_SETTINGS_DIR=str(own / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(own / "workspaces"), IPYTHONDIR=str(own / "ipython"), OMP_NUM_THREADS="1")
    settings = own / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(dict(fetchNews="false", checkForUpdates=False)))  # nothing pops up
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
               "--expose-app-in-browser", *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with open(own / "log", "w") as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try: urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2)
        except OSError: time.sleep(0.25)
        else: break
        if server.poll() is not None: pytest.fail((own / "log").read_text()[-3000:])
    else: pytest.fail("JupyterLab did not start within a minute")
    yield address, token, root
    server.terminate()
    try: server.wait(15)
    except subprocess.TimeoutExpired: server.kill(), server.wait()


@pytest.fixture(scope="session")
def browser(playwright, chromium, tmp_path_factory):
    context = playwright.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=chromium, headless=True, args=FLAGS, viewport=dict(width=1000, height=1000))
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture(scope="session")
def shot(pytestconfig):
    "Keeps a picture of a page under a name"
    folder = Path(pytestconfig.cache.mkdir("browser"))
    return lambda page, name: page.screenshot(path=str(folder / f"{name}.png"))


class Notebook:
    "A notebook in JupyterLab, as a person has it in a tab"
    def __init__(self, browser, lab, path):
        address, token, _ = lab
        self.page, self.asked = browser.new_page(), []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(f"{address}/doc/tree/{path}?token={token}&reset")
        self.page.wait_for_function("() => window.jupyterapp")
        self.page.evaluate("() => jupyterapp.restored.then(() => true)")
        self.ready()

    def ready(self):
        "Wait until its kernel is idle"
        self.page.wait_for_function("() => { const w = jupyterapp.shell.currentWidget, s = w && w.sessionContext && w.sessionContext.session; return s && s.kernel && s.kernel.status === 'idle' }")

    def command(self, name, **arguments): return self.page.evaluate("([n, a]) => jupyterapp.commands.execute(n, a).then(() => true)", [name, arguments])

    def run(self, *cells):
        "Run cells by their number, one after the other, or all"
        if not cells: self.command("notebook:run-all-cells")
        for n in cells:
            self.page.evaluate("n => { jupyterapp.shell.currentWidget.content.activeCellIndex = n }", n)
            self.command("notebook:run-cell")

    def output(self, n): return self.page.locator(".jp-Notebook .jp-Cell").nth(n).locator(".jp-Cell-outputArea")

    def restart(self):
        "A new kernel for the same notebook"
        self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart().then(() => true)")
        self.ready()

    def close(self): self.page.close()


def written(path, *cells):
    "A new notebook file of these code cells"
    book = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")),
                cells=[dict(cell_type="code", id=f"cell-{i}", metadata={}, source=source, outputs=[], execution_count=None) for i, source in enumerate(cells)])
    path.write_text(json.dumps(book))
    return path


@pytest.fixture
def notebook(browser, lab):
    "Opens a new notebook of some cells in a tab, or one that is there; at the end everything is shut down"
    opened = []
    def open_notebook(name, *cells):
        if cells: written(lab[2] / name, *cells)
        opened.append(Notebook(browser, lab, name))
        return opened[-1]
    yield open_notebook
    for book in opened:
        if not book.page.is_closed():
            book.page.evaluate("() => jupyterapp.serviceManager.sessions.shutdownAll()")
            book.close()
