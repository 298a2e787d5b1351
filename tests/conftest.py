"""What several files of tests share."""

import resource
import shutil
from contextlib import contextmanager

import pytest


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, gone with its file: while it is there, no other loop can run."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium: apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond a number of bytes, as on a disk that is full."""

    @contextmanager
    def full(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full
