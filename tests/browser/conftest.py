"""A real browser, and JupyterLab on a copy of the notebooks. Without a browser these tests skip and say so."""

import shutil
from contextlib import suppress

import pytest
from playwright.sync_api import Error, expect, sync_playwright

from tests.browser.lab import Lab
from tests.browser.lesson import Lesson

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WINDOW = {"width": 1400, "height": 1000}

expect.set_options(timeout=120_000)  # what is broken is to fail, not what is slow on a machine that has much else to do


@pytest.fixture(scope="package")
def executable() -> str:
    """The machine's browser; the one that Playwright would download is not needed."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser on this machine; on Debian: apt install chromium")
    return found


@pytest.fixture(scope="module")  # no longer: while Playwright runs, asyncio.run fails in this process
def browser(executable):
    """Chromium, headless, with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*OPTIONS, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """A tab with storage of its own. A picture of it is kept in tmp_path when the test fails."""
    context = browser.new_context(viewport=WINDOW)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="package")
def lab(executable, cache, tmp_path_factory):
    """JupyterLab on a copy of the notebooks. At its end no process is left that it or a kernel of its started."""
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def open_lesson(lab, page):
    """``open_lesson("00_tour")`` opens that notebook as a learner does, with the values of the profile `smoke`."""
    yield lambda name, **values: Lesson(page, lab, lab.copy(name, **values))
    lab.end_kernels()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that fails says where the picture of its page is."""
    report = yield
    if report.when == "call" and report.failed and (page := item.funcargs.get("page")):
        picture = item.funcargs["tmp_path"] / "failed.png"
        with suppress(Error):  # the page crashed: the failure itself says so
            page.screenshot(path=picture)
        report.sections.append(("what the page showed", str(picture)))
    return report
