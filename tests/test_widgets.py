"""The panel in a real JupyterLab and as an app of Voila, with a browser's hands."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[site]'")

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300_000  # milliseconds: the machine may be busy
pytestmark = pytest.mark.slow


@contextmanager
def _serving(home: Path, module: str, *options: str) -> Iterator[str]:
    """The address of a Jupyter server in a home of its own, the installed packages its only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "PYTHONPATH": str(ROOT),
        "DIFFOC_FIGURES": str(home / "figures"),
    }
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", module, f"--port={port}", "--no-browser", *options],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address).close()
            return
        except urllib.error.HTTPError:
            return  # it answers: Voila has no such page
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    pytest.fail(f"no answer from {address}")


def _tab(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return page


@contextmanager
def _in_jupyterlab(browser: Browser, notebook: str, home: Path) -> Iterator[Page]:
    """A copy of a notebook, run from top to bottom in JupyterLab."""
    shutil.copy(ROOT / "notebooks" / notebook, home)
    # All cells in the page, not only those in view, or a traceback could hide below.
    choices = (
        home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    )
    choices.parent.mkdir(parents=True)
    choices.write_text('{"windowingMode": "none"}')
    options = ["--IdentityProvider.token=token", "--allow-root", f"--ServerApp.root_dir={home}"]
    with _serving(home, "jupyterlab", *options) as address:
        page = _tab(browser, f"{address}/lab/tree/{notebook}?token=token&reset")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        # The committed outputs have no widget: this one is alive.
        page.locator(".jupyter-widgets").first.wait_for()
        # Its messages are heard when the cells below it are done.
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        yield page
        page.close()


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The quickstart, its panel in view."""
    home = tmp_path_factory.mktemp("home")
    with _in_jupyterlab(browser, "00_quickstart.ipynb", home) as page:
        page.get_by_role("button", name="Reconstruct").wait_for()
        yield page


def _status(page: Page, pattern: str) -> str:
    label = page.locator(".widget-label", has_text=re.compile(pattern)).first
    label.wait_for()
    return label.inner_text()


def _choose(page: Page, name: str, option: str) -> None:
    page.locator(".widget-dropdown", has_text=name).locator("select").select_option(option)


def _set(page: Page, name: str, value: str) -> None:
    readout = page.locator(".widget-slider", has_text=name).locator(".widget-readout")
    readout.fill(value)
    readout.press("Enter")


def _picture(page: Page) -> str:
    return page.locator("img.widget-image").get_attribute("src")


def test_choices_are_obeyed_and_the_picture_changes(page: Page) -> None:
    _choose(page, "image", "digit 3")
    _choose(page, "task", "gaussian blur")
    _set(page, "evaluations", "60")
    before = _picture(page)
    page.get_by_role("button", name="Reconstruct").click()
    _status(page, r"iteration \d+: cost .* dB, done")
    assert _picture(page) != before


def test_a_long_reconstruction_can_be_cancelled_and_the_kernel_lives(page: Page) -> None:
    _choose(page, "image", "astronaut")
    _choose(page, "task", "random inpainting")  # where ours makes a plan
    _set(page, "evaluations", "1000")
    _set(page, "noise", "0.01")
    page.get_by_role("button", name="Reconstruct").click()
    _status(page, r"iteration [1-9]\d*: cost .* dB$")
    page.get_by_role("button", name="Cancel").click()
    status = _status(page, "cancelled$")
    assert int(re.search(r"iteration (\d+)", status)[1]) < 200

    _choose(page, "image", "digit 3")
    _set(page, "evaluations", "60")
    page.get_by_role("button", name="Reconstruct").click()
    _status(page, r"iteration \d+: .* done$")


def _no_cell_failed(page: Page) -> None:
    # Between two cells the kernel is idle as well: the last one may still be running.
    page.locator(".jp-OutputArea-output", has_text="Established: ").first.wait_for()
    outputs = page.locator(".jp-OutputArea-output").all_text_contents()
    assert any(text.startswith("Established: ") for text in outputs)
    assert not [text for text in outputs if "Traceback" in text]


def test_no_cell_of_the_quickstart_failed(page: Page) -> None:
    _no_cell_failed(page)


# The notebooks with widgets of their own: where the picture is, and who moves it.
SLIDERS = {
    "02_reverse_diffusion_as_control.ipynb": (".widget-output img", ["weight r", "steps"]),
    "11_mnist_class_guidance.ipynb": ("img.widget-image", ["w"]),
}


def test_every_notebook_with_widgets_is_tried_here() -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")}
    alive = {
        name
        for name, text in sources.items()
        if re.search("ipywidgets|diffoc.commands.panel", text)
    }
    assert alive == {"00_quickstart.ipynb", *SLIDERS}


@pytest.mark.parametrize("notebook", SLIDERS)
def test_sliders_of_a_tutorial_change_its_picture(
    browser: Browser, notebook: str, tmp_path: Path
) -> None:
    place, names = SLIDERS[notebook]
    with _in_jupyterlab(browser, notebook, tmp_path) as page:
        for name in names:
            slider = page.locator(".widget-slider", has=page.get_by_text(name, exact=True))
            before = _source(page, place)
            slider.locator(".noUi-handle").press("ArrowRight")
            picture = api.expect(page.locator(place).first)
            picture.not_to_have_attribute("src", before or "", timeout=PATIENCE)
        _no_cell_failed(page)


def _source(page: Page, place: str) -> str | None:
    """What a picture shows, or None where there is none before a slider is moved."""
    picture = page.locator(place).first
    return picture.get_attribute("src") if picture.count() else None


def test_the_app_comes_up_and_reconstructs(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("voila", reason="pip install -e '.[app]'")
    home = tmp_path_factory.mktemp("home")
    with _serving(home, "voila", str(ROOT / "docs/app.ipynb")) as address:
        page = _tab(browser, address)  # the first start reads all packages from the disk
        page.get_by_role("button", name="Reconstruct").wait_for()
        began = time.monotonic()
        page.goto(address)
        page.get_by_role("button", name="Reconstruct").wait_for()
        assert time.monotonic() - began < 10
        _choose(page, "image", "digit 3")
        _set(page, "evaluations", "60")
        page.get_by_role("button", name="Reconstruct").click()
        _status(page, r"iteration \d+: cost .* dB, done")
        assert page.locator("img.widget-image").evaluate("image => image.naturalWidth") > 600
        with page.expect_download() as download:
            page.get_by_text("Download the reconstruction").click()
        assert download.value.suggested_filename == "reconstruction.png"
        assert not re.search("Traceback|error", page.locator("body").inner_text())
        assert "Traceback" not in (home / "log").read_text()
        page.close()
