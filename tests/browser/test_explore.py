"""06_explore in JupyterLab: its widgets moved, moved fast, and fed with what is no picture."""

import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect

IMAGES, SPEEDS, BROWSER = "image_explorer(", "benchmark_explorer(", "dataset_browser("
DRAWN = re.compile(r"^done in \d+ ms$")


def says(lesson, source: str, text: str | re.Pattern):
    """Wait until the widget of the cell that holds ``source`` says ``text``."""
    expect(lesson.cell(source).locator(".jp-OutputArea").get_by_text(text)).to_be_visible()


def upload(lesson, path: Path) -> None:
    """Choose ``path`` by the button of the image explorer."""
    with lesson.page.expect_file_chooser() as chooser:
        lesson.cell(IMAGES).get_by_role("button", name=re.compile("Upload, up to 10 MB")).click()
    chooser.value.set_files(path)


def test_the_explorer_is_walked_and_moved(open_lesson, tmp_path):
    # What needs no building; and without the bug hunt, which has no widget.
    lesson = open_lesson("06_explore", before="## 7. The bug hunt", engine="eager", precision="bf16")
    lesson.run_all()
    lesson.wait_until_done()
    assert lesson.errors() == []
    for source in (IMAGES, SPEEDS, BROWSER):
        says(lesson, source, DRAWN)

    pictures = lesson.cell(IMAGES).locator(".jp-OutputArea img")
    expect(pictures).to_have_count(1)
    lesson.choose(lesson.widget(IMAGES, "mean and std"), "none (0 and 1)")
    expect(pictures).to_have_count(2)  # as the weights want it, and changed
    says(lesson, IMAGES, DRAWN)

    number = lesson.widget(IMAGES, "image")
    number.focus()
    for _ in range(20):  # faster than a picture is drawn
        lesson.page.keyboard.press("ArrowUp")
    says(lesson, IMAGES, "ILSVRC2012_val_00000021.JPEG")
    says(lesson, IMAGES, DRAWN)

    (tmp_path / "notes.png").write_text("no picture")
    upload(lesson, tmp_path / "notes.png")
    says(lesson, IMAGES, re.compile("^✗ .*notes.png"))
    number.press("ArrowDown")  # and it goes on
    says(lesson, IMAGES, "ILSVRC2012_val_00000020.JPEG")
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "mine.png")
    upload(lesson, tmp_path / "mine.png")
    says(lesson, IMAGES, re.compile("^mine.png. Answered by"))

    # By the keyboard alone: from one control to the next, a slider, a button, a number.
    lesson.choose(lesson.widget(IMAGES, "crop"), "center")
    lesson.page.keyboard.press("Tab")
    lesson.page.keyboard.press("ArrowLeft")
    says(lesson, IMAGES, DRAWN)
    expect(pictures.nth(1)).to_have_attribute("alt", re.compile("center crop 0.85"))
    lesson.cell(IMAGES).get_by_role("button", name="block by block").press("Space")
    expect(pictures).to_have_count(1)
    says(lesson, IMAGES, re.compile("^changed: center crop 0.85"))

    lesson.choose(lesson.widget(SPEEDS, "model"), "vit_shapes20")
    lesson.widget(SPEEDS, "at most, ms").fill("20")
    lesson.page.keyboard.press("Enter")
    says(lesson, SPEEDS, re.compile("within 20 ms .*: (eager|inductor|onnx|openvino) .* top-1"))
    lesson.cell(SPEEDS).get_by_role("button", name="latency and throughput").press("Space")
    expect(lesson.cell(SPEEDS).locator(".jp-OutputArea img")).to_have_count(1)

    lesson.choose(lesson.widget(BROWSER, "class"), "striped ring")
    says(lesson, BROWSER, "page 1 of 5")
    assert lesson.errors() == []

    # An upload that the server drops costs nothing but itself; a restarted kernel, only what it held.
    # The server drops the connection with it. JupyterLab opens another, and loses what is sent in between.
    (tmp_path / "huge.png").write_bytes(bytes(11 << 20))
    with lesson.page.expect_websocket(lambda socket: "/channels" in socket.url):
        upload(lesson, tmp_path / "huge.png")
    lesson.cell(IMAGES).get_by_role("button", name="answer", exact=True).press("Space")
    lesson.widget(IMAGES, "image").press("ArrowUp")
    says(lesson, IMAGES, "ILSVRC2012_val_00000021.JPEG")
    lesson.restart_and_run_all()
    lesson.wait_until_done()
    assert lesson.errors() == []
    says(lesson, IMAGES, "ILSVRC2012_val_00000001.JPEG")
    lesson.widget(IMAGES, "image").press("ArrowUp")
    says(lesson, IMAGES, "ILSVRC2012_val_00000002.JPEG")
