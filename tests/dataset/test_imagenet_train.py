"""The train archive, a tar of tars: read in place and extracted; torchvision and timm read the same from the tree."""

import gzip
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataset.conftest import (
    TrainArchives,
    tar_bytes,
    tiny_jpeg,
    watched_writes,
    write_devkit,
    write_tar,
)
from tests.dataset.test_imagenet import md5_of
from tests.dataset.test_tars import refused, tree
from vitdemo.dataset.devkit import devkit_of
from vitdemo.dataset.extraction import extract
from vitdemo.dataset.imagenet import ImageNetTrain, ImageNetVal
from vitdemo.dataset.tars import ARCHIVE_MD5


def extract_train(archives: Path, out: Path) -> ImageNetTrain:
    return extract(archives, out, split="train", unverified=True, progress=False)


# ---- reading


@pytest.mark.parametrize("source", ["tar", "folder of archives", "extracted root", "train"])
def test_samples_come_in_ascending_file_name_from_every_source(train_archives, tmp_path, source):
    out = tmp_path / "out"
    extract_train(train_archives.folder, out)
    path = {"tar": train_archives.tar, "folder of archives": train_archives.folder}
    path |= {"extracted root": out, "train": out / "train"}
    data = ImageNetTrain(path[source])
    assert data.classes == ["n90000001", "n90000002", "n90000003", "n90000004"]
    assert data.class_names[0] == "n90000001 word, n90000001 synonym"
    expected = sorted((file, jpeg) for images in train_archives.images.values() for file, jpeg in images.items())
    assert [(sample.file, sample.jpeg) for sample in data] == expected
    assert data.labels == [0, 0, 0, 2, 2, 2, 3, 3, 3]  # a class without images keeps its place
    assert all(sample.file.startswith(sample.wnid) and data.classes[sample.label] == sample.wnid for sample in data)
    assert data.fingerprint == ImageNetTrain(train_archives.tar).fingerprint
    assert data.source == ("tar" if "tar" in source or "archives" in source else "folder")


def test_nothing_is_written_when_the_archive_is_read_in_place(train_archives):
    with watched_writes() as written:
        assert len(list(ImageNetTrain(train_archives.folder))) == 9
    assert not written


def test_threads_and_other_processes_read_the_same(train_archives):
    data = ImageNetTrain(train_archives.tar)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(data.__getitem__, list(range(9)) * 20)) == list(data) * 20
    assert list(pickle.loads(pickle.dumps(data))) == list(data)


def test_without_a_devkit_imagenets_wnids_keep_their_indices(train_archives):
    train_archives.devkit.unlink()
    assert ImageNetTrain(train_archives.tar).classes == sorted(train_archives.images)
    wnids = ["n02119789", "n01751748"]
    train_archives.write({wnid: tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in wnids})
    data = ImageNetTrain(train_archives.tar)
    assert len(data.classes) == 1000 and [(s.wnid, s.label) for s in data] == [("n01751748", 65), ("n02119789", 278)]
    train_archives.write({wnid: tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in [*wnids, "n90000001"]})
    with refused(train_archives.tar, "n90000001", "put the devkit beside"):
        ImageNetTrain(train_archives.tar)


# ---- archives that do not fit


@pytest.mark.parametrize(
    "tars, line",
    [
        ({}, "holds no classes"),
        ({"n90000001": b""}, "truncated after nothing"),
        ({"n90000001": bytes(1024)}, "n90000001.tar holds no images"),
        ({"n90000001": tar_bytes({"n90000002_1.JPEG": b"x"})}, "'n90000002_1.JPEG' is not named like n90000001_1234"),
        ({"n90000001": tar_bytes({"n90000001_1.jpeg": b"x"})}, "'n90000001_1.jpeg' is not named like"),
        ({"n90000001": gzip.compress(tar_bytes({"n90000001_1.JPEG": b"x"}))}, "'n90000001.tar': compressed (gzip)"),
        ({"n90000009": tar_bytes({"n90000009_1.JPEG": b"x"})}, "n90000009.tar, a class that mini_devkit_t12"),
        ({"n1": tar_bytes({"n1_1.JPEG": b"x"})}, "'n1.tar' is not named like n01440764.tar"),
    ],
)
def test_tars_that_do_not_fit_are_refused(train_archives, tmp_path, tars, line):
    train_archives.write(tars)
    with refused(train_archives.tar, line):
        extract_train(train_archives.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_devkit_of_other_classes_is_refused(train_archives):
    write_devkit(train_archives.devkit, {"n90000001": 1}, [1])
    with refused(train_archives.tar, "n90000003.tar", "do not belong together"):
        ImageNetTrain(train_archives.tar)


def test_the_other_split_is_no_train_set(archives, train_archives, tmp_path):
    archives.tar.rename(archives.folder / "mini_img_train.tar")
    with refused("ILSVRC2012_val_00000001.JPEG", "is this the train tar"):
        ImageNetTrain(archives.folder)
    with refused(tmp_path, "no data set", "_img_train.tar"):
        ImageNetTrain(tmp_path)
    with refused("split", "'test'"):
        extract(archives.folder, tmp_path / "out", split="test")


# ---- extraction


def test_extraction_writes_a_tree_a_class_list_and_a_record_and_leaves_the_archives(train_archives, tmp_path, capsys):
    before = tree(train_archives.folder)
    data = extract(train_archives.folder, tmp_path / "out", split="train", unverified=True)
    assert "complete: 9 images of 4 classes, 9 written now" in capsys.readouterr().out
    assert tree(train_archives.folder) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "classes.csv", "extraction_train.json"}
    assert tree(tmp_path / "out/train") == {
        f"{wnid}/{file}": jpeg for wnid, images in train_archives.images.items() for file, jpeg in images.items()
    }
    assert json.loads((tmp_path / "out/extraction_train.json").read_text()) == {
        "images": 9,
        "classes": 4,
        "archive": "mini_img_train.tar",
        "md5": md5_of(train_archives.tar),
        "fingerprint": data.fingerprint,
    }


def test_an_interrupted_or_damaged_extraction_is_refused_until_it_is_finished(train_archives, tmp_path):
    out = tmp_path / "out"
    extract_train(train_archives.folder, out)
    whole = tree(out)
    victim = next((out / "train").rglob("*.JPEG"))
    victim.write_bytes(b"damaged")
    with refused(out / "train", "differ", "extract again"):
        ImageNetTrain(out)
    (out / "train").rename(out / "train.part")
    with refused(out, "unfinished", "extract again"):
        ImageNetTrain(out)
    extract_train(train_archives.folder, out)
    assert tree(out) == whole


def test_val_and_train_live_in_one_folder(archives, tmp_path):
    train_archives = TrainArchives(archives.folder)
    out = tmp_path / "out"
    extract_train(archives.folder, out)
    val = extract(archives.folder, out, unverified=True, progress=False)
    train = extract_train(archives.folder, out)
    both = {"val", "train", "classes.csv", "extraction.json", "extraction_train.json"}
    assert {path.name for path in out.iterdir()} == both
    assert len(ImageNetVal(out)) == len(val) == 12 and len(ImageNetTrain(out)) == len(train) == 9
    assert val.classes == train.classes
    before = tree(out)
    train_archives.write({"n90000001": tar_bytes({"n90000001_1.JPEG": b"other"})})
    with refused(out, "other than an extraction of these"):
        extract_train(archives.folder, out)
    shutil.rmtree(out / "train")
    (out / "extraction_train.json").unlink()
    archives.devkit.unlink()
    with refused(out / "classes.csv", "val/ has other classes", "same devkit"):
        extract_train(archives.folder, out)
    assert tree(out) == {name: content for name, content in before.items() if "train" not in name}


@pytest.mark.parametrize("name", ["train/n90000001/mine.JPEG", "train.part/n90000001/mine.JPEG"])
def test_a_split_of_somebody_elses_beside_an_extraction_is_left_as_it_is(archives, tmp_path, name):
    TrainArchives(archives.folder)
    out = tmp_path / "out"
    extract(archives.folder, out, unverified=True, progress=False)
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    before = tree(out)
    for split in ("train", "val"):
        with refused(out, "other than an extraction of these"):
            extract(archives.folder, out, split=split, unverified=True, progress=False)
    assert tree(out) == before


def test_a_train_set_without_devkit_keeps_the_class_list_of_the_val_set(archives, tmp_path):
    extract(archives.folder, tmp_path / "out", unverified=True, progress=False)
    classes = (tmp_path / "out/classes.csv").read_bytes()
    wnids = sorted(archives.ids)
    write_tar(tmp_path / "x_img_train.tar", {f"{wnid}.tar": tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in wnids})
    data = extract_train(tmp_path / "x_img_train.tar", tmp_path / "out")
    assert data.labels == [0, 1, 2, 3] and (tmp_path / "out/classes.csv").read_bytes() == classes


def test_an_official_archive_must_have_the_official_counts(train_archives, tmp_path, monkeypatch):
    tar = train_archives.tar.rename(train_archives.folder / "ILSVRC2012_img_train.tar")
    train_archives.devkit.unlink()
    monkeypatch.setitem(ARCHIVE_MD5, tar.name, md5_of(tar))
    with refused(tar, "9 images, 3 to 3 a class", "1281167", "732 to 1300"):
        extract(train_archives.folder, tmp_path / "out", split="train", progress=False)
    assert not (tmp_path / "out").exists()


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
    from torchvision.datasets import ImageFolder, ImageNet, imagenet

    ours = extract_train(full_train, tmp_path / "out")
    expected = [(str(ours.path / s.wnid / s.file), s.label) for s in ours]
    assert len(expected) == 3000 and set(Counter(ours.labels).values()) == {3}
    assert ImageFolder(ours.path).samples == expected

    devkit = devkit_of(full_train)
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (devkit.name, md5_of(devkit)))
    shutil.copy(devkit, tmp_path / "out")
    imagenet.parse_devkit_archive(tmp_path / "out")
    oracle = ImageNet(tmp_path / "out", split="train")
    assert oracle.samples == expected and oracle.wnids == ours.classes

    reader = create_reader("", root=str(tmp_path / "out"), split="train")
    read = {reader.filename(i, basename=True): reader[i][1] for i in range(len(reader))}
    assert read == dict(zip(ours.files, ours.labels, strict=True))


def test_tarfile_finds_the_same_bytes_in_the_nested_tars(full_train):
    data = ImageNetTrain(full_train)
    ours = {sample.file: sample.jpeg for sample in data}
    with tarfile.open(full_train) as outer:
        for member in outer.getmembers()[::97]:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                assert all(ours[name] == inner.extractfile(name).read() for name in inner.getnames())


# ---- size


INDEXING = """
import json, sys, psutil, timm.data
from vitdemo.dataset.imagenet import ImageNetTrain
from vitdemo.machine import now
before, start = psutil.Process().memory_info().rss, now()
data = ImageNetTrain(sys.argv[1])
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
