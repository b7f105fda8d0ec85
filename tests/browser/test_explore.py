"""06_explore in JupyterLab: its widgets moved, moved fast, and fed with what is no picture."""

import re

from playwright.sync_api import expect

IMAGES, SPEEDS, BROWSER = "image_explorer(", "benchmark_explorer(", "dataset_browser("
DRAWN = re.compile(r"^done in \d+ ms$")


def says(lesson, source: str, text: str | re.Pattern):
    """Wait until the widget of the cell that holds ``source`` says ``text``."""
    expect(lesson.cell(source).locator(".jp-OutputArea").get_by_text(text)).to_be_visible()


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
    with lesson.page.expect_file_chooser() as chooser:
        lesson.cell(IMAGES).get_by_role("button", name=re.compile(r"Upload \(")).click()
    chooser.value.set_files(tmp_path / "notes.png")
    says(lesson, IMAGES, re.compile("^✗ .*notes.png"))
    number.press("ArrowDown")  # and it goes on
    says(lesson, IMAGES, "ILSVRC2012_val_00000020.JPEG")

    lesson.choose(lesson.widget(BROWSER, "class"), "striped ring")
    says(lesson, BROWSER, "page 1 of 5")
    assert lesson.errors() == []
