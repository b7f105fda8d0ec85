"""The train archive, a tar of tars: read in place and extracted; torchvision and timm read the same from the tree."""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from tests.dataset.conftest import extracted, refused, tar_bytes, tiny_jpeg, torchvisions_imagenet, write_tar
from vitdemo import extract
from vitdemo.dataset.dataset import open_data
from vitdemo.dataset.devkit import devkit_of


def test_without_a_devkit_imagenets_wnids_keep_their_indices(train_archives):
    train_archives.devkit.unlink()
    assert open_data(train_archives.tar, split="train").classes == sorted(train_archives.images)
    wnids = ["n02119789", "n01751748"]
    train_archives.write({wnid: tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in wnids})
    data = open_data(train_archives.tar, split="train")
    assert len(data.classes) == 1000 and [(s.class_id, s.label) for s in data] == [
        ("n01751748", 65),
        ("n02119789", 278),
    ]
    train_archives.write({wnid: tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in [*wnids, "n90000001"]})
    data = open_data(train_archives.tar, split="train")
    assert data.classes == sorted([*wnids, "n90000001"])  # a model's outputs are found by the wnids


# ---- archives that do not fit


@pytest.mark.parametrize(
    "tars, line",
    [
        ({}, "holds no files"),
        ({"n90000001": b""}, "'n90000001.tar': holds no files"),
        ({"n90000001": bytes(1024)}, "'n90000001.tar': holds no files"),
        ({"n90000001": tar_bytes({"n90000002_1.JPEG": b"x"})}, "named 'n90000002_1.JPEG', not like n90000001_1234"),
        ({"n90000001": tar_bytes({"n90000001_1.jpeg": b"x"})}, "named 'n90000001_1.jpeg', not like"),
        ({"n90000001": gzip.compress(tar_bytes({"n90000001_1.JPEG": b"x"}))}, "'n90000001.tar': compressed (gzip)"),
        ({"n90000009": tar_bytes({"n90000009_1.JPEG": b"x"})}, "n90000009.tar, a class that mini_devkit_t12"),
        ({"n1": tar_bytes({"n1_1.JPEG": b"x"})}, "named 'n1.tar', not like n01440764.tar"),
    ],
)
def test_tars_that_do_not_fit_are_refused(train_archives, tmp_path, tars, line):
    train_archives.write(tars)
    with refused(train_archives.tar, line):
        extracted(train_archives.folder, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_the_other_split_is_no_train_set(archives, train_archives, tmp_path):
    archives.tar.rename(archives.folder / "mini_img_train.tar")
    with refused("ILSVRC2012_val_00000001.JPEG", "is this the train tar"):
        open_data(archives.folder, split="train")
    with refused(tmp_path, "no data set", "_img_train.tar"):
        open_data(tmp_path, split="train")
    with refused("split", "'test'"):
        extract(archives.folder, tmp_path / "out", split="test")


# ---- someone else's reading, with all classes


@pytest.fixture(scope="module")
def full_train(thin_archives, tmp_path_factory) -> Path:
    """A train tar of ImageNet's 1,000 classes with three images each, in a folder with the devkit."""
    folder = tmp_path_factory.mktemp("full_train")
    shutil.copy(thin_archives.devkit, folder)
    images = [tiny_jpeg(i) for i in range(7)]
    tars = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{k}.JPEG": images[(i + k) % 7] for k in (3, 20, 100)})
        for i, wnid in enumerate(reversed(thin_archives.wnids))
    }
    return write_tar(folder / "ILSVRC2012_img_train.tar", tars)


def test_torchvision_and_timm_read_the_same_from_the_extracted_tree(full_train, tmp_path, monkeypatch):
    from timm.data.readers import create_reader
    from torchvision.datasets import ImageFolder

    ours = extracted(full_train, tmp_path / "out", "train")
    expected = [(str(ours.path / s.class_id / s.file), s.label) for s in ours]
    assert len(expected) == 3000 and set(Counter(ours.labels).values()) == {3}
    assert ImageFolder(ours.path).samples == expected

    oracle = torchvisions_imagenet(tmp_path / "out", devkit_of(full_train), "train", monkeypatch)
    assert oracle.samples == expected and oracle.wnids == ours.classes

    reader = create_reader("", root=str(tmp_path / "out"), split="train")
    read = {reader.filename(i, basename=True): reader[i][1] for i in range(len(reader))}
    assert read == dict(zip(ours.files, ours.labels, strict=True))


# ---- size


INDEXING = """
import json, sys, psutil, timm.data
from vitdemo.dataset.dataset import open_data
from vitdemo.machine import now
before, start = psutil.Process().memory_info().rss, now()
data = open_data(sys.argv[1], split="train")
taken = now() - start
print(json.dumps([len(data), taken, psutil.Process().memory_info().rss - before]))
"""


@pytest.mark.soak
def test_an_index_of_100000_members_needs_little_time_and_memory(thin_archives, tmp_path):
    jpeg = tiny_jpeg(0)
    with tarfile.open(tmp_path / "big_img_train.tar", "w") as outer:
        for wnid in thin_archives.wnids:
            inner = tmp_path / f"{wnid}.tar"
            write_tar(inner, {f"{wnid}_{k}.JPEG": jpeg for k in range(100)})
            outer.add(inner, inner.name)
            inner.unlink()
    run = subprocess.run([sys.executable, "-c", INDEXING, tmp_path], capture_output=True, check=True)
    images, taken_s, grown_bytes = json.loads(run.stdout)
    real = 1_281_167 / images
    print(
        f"\nindex of {images:,} images in 1,000 tars, tar in memory: {taken_s:.1f} s, {grown_bytes / 2**20:.0f} MiB; "
        f"the real archive at the same rates: {taken_s * real:.0f} s plus a disk read each, "
        f"{grown_bytes * real / 2**20:.0f} MiB"
    )
    assert images == 100_000 and taken_s < 20 and grown_bytes < 60 << 20
