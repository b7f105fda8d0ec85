"""What is wrong with a page for the one who looks at it."""

from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

NARROW = {"width": 400, "height": 800}  # a phone
BROKEN_IMAGES = "images => images.filter(image => !image.alt || !image.naturalWidth).map(image => image.outerHTML)"
OVERHANG = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def hard_to_read(page: Page, where: str = "body", rules: tuple[str, ...] = ("color-contrast",)) -> list[str]:
    """The elements within ``where`` that break one of axe's ``rules``; contrast is asked for as in WCAG's AA."""
    found = Axe().run(page, where, {"runOnly": list(rules)}).response["violations"]
    return [f"{rule['id']}: {node['html'][:200]}: {node['failureSummary']}" for rule in found for node in rule["nodes"]]


def faults(page: Page, file: Path) -> list[str]:
    """What is wrong with the HTML ``file``, opened in ``page`` without a server, light and dark, wide and narrow."""
    faults = []
    page.on("request", lambda request: faults.append(f"loads {request.url}"))
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.goto(file.as_uri(), wait_until="networkidle")
    faults = [fault for fault in faults if not fault.startswith(("loads data:", f"loads {file.as_uri()}"))]
    faults += [f"image: {image[:200]}" for image in page.locator("img").evaluate_all(BROKEN_IMAGES)]
    window = page.viewport_size
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        faults += [f"{scheme} {fault}" for fault in hard_to_read(page)]
    page.set_viewport_size(NARROW)
    if overhang := page.evaluate(OVERHANG):
        faults.append(f"{overhang} px wider than a window of {NARROW['width']} px")
    page.set_viewport_size(window)
    return faults
