"""Every kind of damage planted in a tar and in a tree; libjpeg's own words on stderr, PIL and sha256sum as oracles."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from tests.course.hostile import png_header
from tests.dataset.conftest import (
    enormous_jpeg,
    largest_file,
    many_scans,
    mutated,
    refused,
    val_name,
    write_devkit,
    write_tar,
)
from vitdemo import ImageNetVal, Preprocessing, extract, reference_crop
from vitdemo.dataset import checking
from vitdemo.dataset.checking import COLUMNS, check_images, examine
from vitdemo.dataset.decoding import UnreadableImage, read_header

PREPROCESSING = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encoded(mode: str = "RGB", seed: int = 0, format: str = "JPEG", **options) -> bytes:
    """A picture of 200 x 152 px with detail everywhere."""
    pixels = np.random.default_rng(seed).integers(0, 256, (19, 25, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def with_exif(block: bytes) -> bytes:
    return encoded(exif=b"Exif\0\0" + block)


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(exif=exif)


def noisy(side: int) -> bytes:
    """A JPEG of about a byte a pixel."""
    file = io.BytesIO()
    Image.effect_noise((side, side), 90).save(file, "JPEG", quality=95)
    return file.getvalue()


GOOD = encoded()
MIDDLE = len(GOOD) // 2
PNG = encoded(format="PNG")

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
SOUND = {  # bytes, mode, EXIF state
    "plain": (GOOD, "RGB", ""),
    "grey": (encoded("L"), "L", ""),
    "CMYK": (encoded("CMYK", subsampling=0), "CMYK", ""),
    "CMYK, which TurboJPEG does not know": (encoded("CMYK", subsampling=2), "CMYK", ""),
    "progressive": (encoded(progressive=True), "RGB", ""),
    "4:2:2": (encoded(subsampling=1), "RGB", ""),
    "restart markers": (encoded(restart_marker_rows=2), "RGB", ""),
    "colour profile and comment": (encoded(icc_profile=bytes(70_000), comment=b"\xff\xda\xff\xe1"), "RGB", ""),
    "bytes after the end": (GOOD + bytes(100), "RGB", ""),
    "upright": (with_orientation(1), "RGB", "present"),
    "rotated": (with_orientation(6), "RGB", "rotated"),
    "rotated by XMP": (encoded(xmp=XMP), "RGB", "rotated"),
    "EXIF cut off": (with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01\x03"), "RGB", "broken"),
    "EXIF pointing outside": (
        with_exif(b"II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x40\0\0\0\xf0\xff\0\0\0\0\0\0"),
        "RGB",
        "broken",
    ),
    "EXIF of nonsense": (with_exif(b"nonsense, and no TIFF"), "RGB", "broken"),
}
UNREADABLE = {  # bytes, part of the error
    "truncated": (GOOD[:MIDDLE], "truncated"),
    "truncated in the header": (GOOD[:100], "Truncated"),
    "empty": (b"", "cannot identify"),
    "zeros": (bytes(5000), "cannot identify"),
    "HTML": (b"<html>404 not found</html>" * 20, "cannot identify"),
    "12 bits": (GOOD.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "cannot identify"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "16-bit PNG": (encoded("I;16", format="PNG"), "more than 8 bits"),
}
SUSPECT = {  # bytes, part of the warning: PIL decodes these without a word
    "hole": (GOOD[:MIDDLE] + GOOD[MIDDLE + 512 :], "Corrupt JPEG data"),
    "zeroed block": (GOOD[:MIDDLE] + bytes(512) + GOOD[MIDDLE + 512 :], "Corrupt JPEG data"),
    "data too much": (GOOD[:-2] + bytes(50) + GOOD[-2:], "extraneous bytes"),
    "end mark in the middle": (GOOD[:MIDDLE] + b"\xff\xd9" + GOOD[MIDDLE:], "premature end of data segment"),
    "PNG": (PNG, "PNG, not JPEG"),
    "GIF": (encoded("P", format="GIF"), "GIF, not JPEG"),
}
NOT_DECODED = {
    "enormous": enormous_jpeg(),
    "enormous PNG": png_header(20_000, 20_000),
    "scans without end": many_scans(4000),
}
PLANTED = {name: bytes for kind in (SOUND, UNREADABLE, SUSPECT) for name, (bytes, *_) in kind.items()} | NOT_DECODED


class Planted:
    """PLANTED as a val tar with its devkit, in two classes, and the tree that ``extract`` makes of it."""

    def __init__(self, folder: Path):
        archives = folder / "archives"
        archives.mkdir()
        self.files = {val_name(number): content for number, content in enumerate(PLANTED.values(), 1)}
        self.kinds = list(PLANTED)
        write_tar(archives / "mini_img_val.tar", self.files)
        truth = [1 + number % 2 for number in range(len(self.files))]
        write_devkit(archives / "mini_devkit.tar.gz", {"n90000001": 2, "n90000002": 1}, truth)
        self.tar = ImageNetVal(archives)
        self.tree = extract(archives, folder / "extracted", unverified=True, progress=False)
        self.root = folder / "extracted"


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def report(planted):
    return check_images(planted.tar, progress=False)


@pytest.fixture(scope="module")
def rows(planted, report) -> dict[str, dict]:
    """The report's row by what was planted."""
    return dict(zip(planted.kinds, report.rows.to_dict("records"), strict=True))


# ---- what is damage


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_passed_with_their_facts(rows, name):
    _, mode, exif = SOUND[name]
    row = rows[name]
    assert (row["error"], row["warning"]) == ("", "")
    assert (row["width"], row["height"], row["mode"], row["exif"]) == (200, 152, mode, exif)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_have_the_error_that_an_evaluation_would_have(rows, name):
    content, part = UNREADABLE[name]
    with pytest.raises(UnreadableImage) as caught:
        reference_crop(content, PREPROCESSING)
    assert rows[name]["error"] == str(caught.value) and part in rows[name]["error"]
    assert rows[name]["warning"] == ""


@pytest.mark.parametrize("name", SUSPECT)
def test_damage_that_an_evaluation_would_not_see_has_a_warning(rows, name):
    content, part = SUSPECT[name]
    reference_crop(content, PREPROCESSING)  # raises nothing
    assert rows[name]["error"] == "" and part in rows[name]["warning"]


def test_another_format_is_no_damage_where_the_name_says_it():
    assert examine(PNG, "a.png")[4:] == ("", "") == examine(PNG, "a")[4:]


@pytest.mark.parametrize("name", NOT_DECODED)
def test_what_would_take_gigabytes_or_minutes_is_not_decoded(name):
    start = time.perf_counter()
    error = examine(PLANTED[name], "a.jpg")[4]
    assert "not decoded" in error or "DecompressionBomb" in error
    assert time.perf_counter() - start < 5


def libjpegs_words(jpeg: bytes, capfd) -> str:
    """What torchvision raises, or libjpeg in it prints."""
    capfd.readouterr()
    try:
        decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:The image decoding")  # torchvision's, which announces another package
@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.soak)])
def test_mutated_files_are_damaged_exactly_where_libjpeg_says_so(count, capfd):
    sources = [GOOD, encoded("L", 1), encoded(seed=2, progressive=True), encoded(seed=3, restart_marker_rows=1)]
    rng, found = random.Random(count), 0
    for number in range(count):
        jpeg = mutated(sources[number % len(sources)], rng)
        _, _, _, _, error, warning = examine(jpeg, "a.jpg")
        assert bool(error or warning) == bool(libjpegs_words(jpeg, capfd)), f"mutation {number}: {error or warning}"
        assert "\n" not in error + warning
        found += bool(error or warning)
    assert count / 4 < found < count  # both sides of the oracle were asked


def test_photographs_have_no_damage(photos):
    for photo in photos:
        assert examine(photo.read_bytes(), photo.name)[4:] == ("", "")


def test_the_bundled_set_has_no_damage(shapes20):
    report = check_images(shapes20, progress=False)
    assert report.damaged.empty and len(report.rows) == len(shapes20)
    assert report.summary["modes"]["CMYK"] == 1 and report.summary["exif"]["broken"] == 1


def test_threads_do_not_mix_up_exif_states():
    jpegs = [SOUND[name][0] for name in ("EXIF cut off", "upright", "rotated")] * 100
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            states = [header.exif for header in pool.map(read_header, jpegs)]
    finally:
        sys.setswitchinterval(interval)
    assert states == ["broken", "present", "rotated"] * 100


# ---- the report


def test_one_row_per_image_in_the_order_of_the_set(planted, report):
    assert list(report.rows.columns) == COLUMNS
    data, rows = planted.tar, report.rows
    assert rows["file"].tolist() == data.files and rows["label"].tolist() == data.labels
    assert rows["class_id"].tolist() == [data.classes[label] for label in data.labels]
    assert rows["bytes"].tolist() == data.sizes
    assert rows["sha256"].tolist() == [hashlib.sha256(content).hexdigest() for content in planted.files.values()]


def test_tar_and_tree_and_one_thread_have_the_same_report(planted, report, monkeypatch):
    monkeypatch.setattr(checking, "cores", lambda: 1)
    other = check_images(planted.tree, progress=False)
    pd.testing.assert_frame_equal(other.rows, report.rows)
    assert other.summary["sha256"] == report.summary["sha256"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs GNU's sha256sum")
def test_the_sets_sha256_is_what_the_documented_line_computes(planted, report):
    line = next(line for line in check_images.__doc__.splitlines() if "| sha256sum" in line)
    shell = subprocess.run(line, shell=True, cwd=planted.root, capture_output=True, text=True, check=True)
    assert shell.stdout.split()[0] == report.summary["sha256"]


def test_one_flipped_bit_changes_the_sets_sha256_and_its_files_only(planted, report, tmp_path):
    shutil.copytree(planted.root / "val", tmp_path / "val")
    shutil.copy(planted.root / "classes.csv", tmp_path)
    (victim,) = tmp_path.glob(f"val/*/{val_name(1)}")
    content = bytearray(victim.read_bytes())
    content[MIDDLE] ^= 1
    victim.write_bytes(content)
    other = check_images(ImageNetVal(tmp_path), progress=False)
    assert other.summary["sha256"] != report.summary["sha256"]
    assert other.rows.index[other.rows["sha256"] != report.rows["sha256"]].tolist() == [0]


def test_damage_is_listed_with_its_class(planted, report):
    damaged = {**UNREADABLE, **SUSPECT, **NOT_DECODED}
    expected = [file for file, kind in zip(planted.files, planted.kinds, strict=True) if kind in damaged]
    assert report.damaged["file"].tolist() == expected
    assert set(report.damaged["class"]) == {"n90000001 word", "n90000002 word"}
    assert report.summary["errors"] == len(UNREADABLE) + len(NOT_DECODED)
    assert report.summary["warnings"] == len(SUSPECT)
    assert sum(report.summary["damaged_by_class"].values()) == len(damaged)
    first = report.damaged.iloc[0]
    text = str(report)
    assert f"{first['file']}  {first['class_id']} {first['class']}: {first['error']}" in text
    assert f"{len(damaged) - 10} more" in text and report.summary["sha256"] in text


def test_the_summary_counts_the_rows(report):
    seen = report.rows[report.rows["mode"] != "unreadable"]
    assert report.summary["modes"] == report.rows["mode"].value_counts().to_dict()
    assert report.summary["exif"] == {"broken": 4, "rotated": 2, "present": 1}  # broken: the cut PNG's too
    assert report.summary["width"] == {"min": 200, "median": 200.0, "max": seen["width"].max()}
    assert report.summary["bytes"]["total"] == report.rows["bytes"].sum()


def test_the_report_is_written_and_an_earlier_one_replaced(planted, tmp_path):
    out = tmp_path / "new" / "out"
    check_images(planted.tar, out, limit=3, progress=False)
    report = check_images(planted.tar, out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["images.csv", "images.json"]
    read = pd.read_csv(out / "images.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(read, report.rows)
    assert json.loads((out / "images.json").read_text()) == report.summary


def test_limit_checks_the_first_images_and_progress_is_shown_or_not(planted, report, capsys):
    pd.testing.assert_frame_equal(check_images(planted.tar, limit=3).rows, report.rows[:3])
    assert "3/3" in capsys.readouterr().err
    check_images(planted.tar, limit=3, progress=False)
    assert capsys.readouterr().err == ""


# ---- what can go wrong


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_number_that_makes_no_sense_is_refused(planted, value):
    with refused(f"limit {value}", "at least 1"):
        check_images(planted.tar, limit=value)


def test_a_folder_that_cannot_be_is_refused_before_the_work(planted, tmp_path, monkeypatch):
    monkeypatch.setattr("vitdemo.dataset.checking.examine", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("mine")
    with refused("file: "):
        check_images(planted.tar, tmp_path / "file", progress=False)


def test_a_disk_too_full_for_the_report_leaves_the_earlier_one(planted, tmp_path):
    check_images(planted.tar, tmp_path, limit=3, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with largest_file(2000), refused("run again"):
        check_images(planted.tar, tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_cannot_be_read_is_a_row_and_leaves_the_set_without_sha256(planted, tmp_path):
    shutil.copytree(planted.root / "val", tmp_path / "val")
    shutil.copy(planted.root / "classes.csv", tmp_path)
    data = ImageNetVal(tmp_path)
    (victim,) = tmp_path.glob(f"val/*/{val_name(2)}")
    victim.unlink()
    report = check_images(data, progress=False)
    row = report.rows.iloc[1]
    assert val_name(2) in row["error"] and (row["mode"], row["sha256"]) == ("unreadable", "")
    assert report.summary["sha256"] is None and "sha256 over the set: none" in str(report)


def link_tree(root: Path, jpeg: bytes, count: int, wnid: str = "n90000001") -> Path:
    """A tree of ``count`` images that takes the room of one."""
    (root / "classes.csv").write_text("label,wnid,name\n0,n90000001,one\n1,n90000002,two\n")
    folder = root / "val" / wnid
    folder.mkdir(parents=True)
    names = [folder / f"{wnid}_{number}.JPEG" for number in range(count)]
    names[0].write_bytes(jpeg)
    for name in names[1:]:
        os.link(names[0], name)
    return root


PEAK_IN_A_CHILD = """
import sys
from vitdemo import ImageNetVal
from vitdemo.dataset.checking import check_images
from vitdemo.machine import machine_record, peak_memory_bytes
machine_record()  # imports torch
data = ImageNetVal(sys.argv[1])
check_images(data, limit=2, progress=False)
before = peak_memory_bytes()
print(len(check_images(data, progress=False).rows), peak_memory_bytes() - before)
"""


def test_memory_is_bounded(tmp_path):
    """20 images of 400 million pixels each, then 120 files of more than 1 MB each."""
    link_tree(tmp_path, enormous_jpeg(), 20)
    link_tree(tmp_path, noisy(1200), 120, "n90000002")
    command = [sys.executable, "-c", PEAK_IN_A_CHILD, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    checked, growth = map(int, child.stdout.split())
    assert checked == 140 and growth < 64 << 20


def test_ctrl_c_stops_at_once_and_writes_nothing(tmp_path):
    data = ImageNetVal(link_tree(tmp_path, noisy(1000), 2000))

    def press_ctrl_c():
        while not any(thread.name.startswith("check") for thread in threading.enumerate()):
            time.sleep(0.002)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        check_images(data, tmp_path / "out", progress=False)
    assert time.perf_counter() - start < 5  # all of it takes a minute
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("check")]
    assert not list((tmp_path / "out").iterdir())
