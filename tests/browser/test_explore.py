"""06_explore in JupyterLab: its widget looked at, moved, moved fast, and fed with what is no picture."""

import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect

IMAGES = "image_explorer(images"
SMALL = {"width": 1366, "height": 768}  # a laptop
DRAWN = re.compile(r"^done in \d+ ms$")


def says(lesson, source: str, text: str | re.Pattern):
    """Wait until the widget of the cell that holds ``source`` says ``text``."""
    expect(lesson.cell(source).locator(".jp-OutputArea").get_by_text(text)).to_be_visible()


def upload(lesson, path: Path) -> None:
    """Choose ``path`` by the button of the image explorer."""
    with lesson.page.expect_file_chooser() as chooser:
        lesson.cell(IMAGES).get_by_role("button", name=re.compile("Upload, up to 10 MB")).click()
    chooser.value.set_files(path)


def in_sight(lesson, pictures) -> None:
    """On a small screen the controls stand left of the picture, and the changed one right of it, without scrolling."""
    window = lesson.page.viewport_size
    lesson.page.set_viewport_size(SMALL)
    lesson.cell(IMAGES).evaluate("cell => cell.scrollIntoView()")
    controls = [lesson.widget(IMAGES, name).bounding_box() for name in ("data set", "hide")]
    before, after = (pictures.nth(k).bounding_box() for k in (0, 1))
    assert max(box["x"] + box["width"] for box in controls) <= before["x"] < before["x"] + before["width"] <= after["x"]
    assert before["y"] == after["y"] and after["x"] + after["width"] <= SMALL["width"]
    assert max(box["y"] + box["height"] for box in (*controls, before, after)) <= SMALL["height"]
    lesson.page.set_viewport_size(window)


def test_the_explorer_is_walked_and_moved(open_lesson, tmp_path):
    # What needs no building; and without the bug hunt, which has no widget.
    lesson = open_lesson("06_explore", before="## 5. The bug hunt", engine="eager", precision="bf16")
    lesson.run_all()
    lesson.wait_until_done()
    assert lesson.errors() == []
    says(lesson, IMAGES, DRAWN)

    pictures = lesson.cell(IMAGES).locator(".jp-OutputArea img")
    expect(pictures).to_have_count(1)
    lesson.choose(lesson.widget(IMAGES, "mean and std"), "none (0 and 1)")
    expect(pictures).to_have_count(2)  # the model's own preprocessing, and the changed one
    says(lesson, IMAGES, DRAWN)
    in_sight(lesson, pictures)

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
    expect(lesson.cell(IMAGES).get_by_text("crop_pct", exact=True).last).to_be_visible()  # it is shown where it counts
    lesson.widget(IMAGES, "crop").focus()
    lesson.page.keyboard.press("Tab")
    lesson.page.keyboard.press("ArrowLeft")
    says(lesson, IMAGES, DRAWN)
    expect(pictures.nth(1)).to_have_attribute("alt", re.compile("center crop 0.85"))
    lesson.choose(lesson.widget(IMAGES, "show"), "block by block")
    expect(pictures).to_have_count(1)
    says(lesson, IMAGES, re.compile("^changed: center crop 0.85"))

    assert lesson.errors() == []

    # An upload that the server drops costs nothing but itself; a restarted kernel, only what it held.
    # The server drops the connection with it. JupyterLab opens another, and loses what is sent in between.
    (tmp_path / "huge.png").write_bytes(bytes(11 << 20))
    with lesson.page.expect_websocket(lambda socket: "/channels" in socket.url):
        upload(lesson, tmp_path / "huge.png")
    lesson.choose(lesson.widget(IMAGES, "show"), "answer")
    lesson.widget(IMAGES, "image").press("ArrowUp")
    says(lesson, IMAGES, "ILSVRC2012_val_00000021.JPEG")
    lesson.restart_and_run_all()
    lesson.wait_until_done()
    assert lesson.errors() == []
    says(lesson, IMAGES, "ILSVRC2012_val_00000001.JPEG")
    lesson.widget(IMAGES, "image").press("ArrowUp")
    says(lesson, IMAGES, "ILSVRC2012_val_00000002.JPEG")
