"""The verb ``extract`` for both splits: verified, written, recorded, confirmed, repaired, and what it leaves alone."""

import json
import shutil

import pytest
from torchvision.datasets.imagenet import ARCHIVE_META

from tests.dataset.conftest import Archives, TrainArchives, extracted, md5_of, refused, tar_bytes, tree, write_tar
from vitdemo import ImageNetVal, extract
from vitdemo.dataset.dataset import open_data
from vitdemo.dataset.tars import ARCHIVE_MD5


def test_extraction_writes_a_tree_a_class_list_and_a_record_and_leaves_the_archives(either, tmp_path, capsys):
    before, out, images = tree(either.folder), tmp_path / "out", len(either.samples)
    data = extract(either.folder, out, split=either.split, unverified=True)
    counts = f"complete: {images} images of 4 classes, {images} written now"
    assert f"{counts}, archives not verified by MD5, files by size" in capsys.readouterr().out
    assert tree(either.folder) == before
    assert {path.name for path in out.iterdir()} == {either.split, "classes.csv", either.record}
    assert tree(data.path) == {f"{data.classes[label]}/{file}": jpeg for file, jpeg, label in either.samples}
    record = {"images": images, "classes": 4, "archive": either.tar.name, "md5": md5_of(either.tar)}
    assert json.loads((out / either.record).read_text()) == record | {"fingerprint": data.fingerprint}


def test_unknown_names_need_unverified_and_known_ones_their_md5(archives, tmp_path, monkeypatch):
    with refused(archives.devkit, "no MD5 is known", "--unverified"):
        extract(archives.folder, tmp_path / "out", progress=False)
    monkeypatch.setitem(ARCHIVE_MD5, archives.devkit.name, md5_of(archives.devkit))
    monkeypatch.setitem(ARCHIVE_MD5, archives.tar.name, "0" * 32)
    with refused(archives.tar, md5_of(archives.tar), "0" * 32, "--unverified"):
        extract(archives.folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(ARCHIVE_MD5, archives.tar.name, md5_of(archives.tar))
    assert len(extract(archives.folder, tmp_path / "out", progress=False)) == 12


@pytest.mark.parametrize("victim", ["tar", "devkit"])
def test_an_archive_is_verified_before_anything_in_it_is_read(archives, tmp_path, monkeypatch, victim):
    for path in (archives.tar, archives.devkit):
        monkeypatch.setitem(ARCHIVE_MD5, path.name, md5_of(path))
    getattr(archives, victim).write_bytes(b"neither a tar nor a gzip file")
    with refused(getattr(archives, victim), "is not the published"):
        extract(archives.folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_official_archives_are_known_by_the_md5_that_torchvision_has():
    assert set(ARCHIVE_META.values()) <= set(ARCHIVE_MD5.items())


def test_a_finished_extraction_is_confirmed_and_a_damaged_one_repaired(either, tmp_path, capsys):
    out, images = tmp_path / "out", len(either.samples)
    extracted(either.folder, out, either.split)
    whole = tree(out)
    extract(either.folder, out, split=either.split, unverified=True)
    assert f"complete: {images} images of 4 classes, 0 written" in capsys.readouterr().out
    victim = next((out / either.split).rglob("*.JPEG"))
    victim.unlink()
    with refused(out / either.split, f"{images - 1} images", f"the {images} that", "extract again"):
        either.read(out)
    victim.write_bytes(b"damaged")
    with refused(out / either.split, "differ", "extract again"):
        either.read(out)
    extracted(either.folder, out, either.split)
    assert tree(out) == whole


@pytest.mark.parametrize("interruption", ["before the split", "in the split", "in a record"])
def test_an_interrupted_extraction_is_refused_until_it_is_finished(either, tmp_path, interruption):
    out = tmp_path / "out"
    extracted(either.folder, out, either.split)
    whole, partial = tree(out), out / f"{either.split}.part"
    (out / either.split).rename(partial)
    next(partial.rglob("*.JPEG")).unlink()
    if interruption != "in the split":
        shutil.rmtree(partial)
    if interruption == "in a record":
        (out / "classes.csv").unlink()
        (out / ".classes.csv.4711.part").write_text("label,wn")
    with refused(out, "unfinished", "extract again"):
        either.read(out)
    extracted(either.folder, out, either.split)
    assert tree(out) == whole


@pytest.mark.parametrize("name", ["notes.txt", "val/n01440764/a.JPEG", "train/a.JPEG", "extraction.json"])
def test_a_folder_with_foreign_content_is_refused_and_left_as_it_is(archives, tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with refused(tmp_path / "out"):
        extracted(archives.folder, tmp_path / "out")
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_what_finder_leaves_and_a_devkit_beside_val_are_no_foreign_content(archives, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(archives.devkit, out)
    extracted(archives.folder, out)
    for folder in (out, out / "val", next((out / "val").iterdir())):
        (folder / ".DS_Store").write_bytes(b"Finder's")
    assert len(extracted(archives.folder, out)) == len(archives.images)


def test_an_extraction_of_other_archives_is_refused_and_left_as_it_is(archives, tmp_path):
    other = Archives(tmp_path / "other")
    write_tar(other.tar, {name: jpeg + b" " for name, jpeg in other.images.items()})
    extracted(other.folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    with refused(tmp_path / "out", "other than an extraction of these"):
        extracted(archives.folder, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_extracting_over_the_archives_is_refused(archives):
    before = tree(archives.folder)
    with refused(archives.folder, "new folder"):
        extracted(archives.folder, archives.folder)
    assert tree(archives.folder) == before


# ---- both splits in one folder


def test_val_and_train_live_in_one_folder(archives, tmp_path):
    train_archives, out = TrainArchives(archives.folder), tmp_path / "out"
    extracted(archives.folder, out, "train")
    val, train = extracted(archives.folder, out), extracted(archives.folder, out, "train")
    both = {"val", "train", "classes.csv", "extraction.json", "extraction_train.json"}
    assert {path.name for path in out.iterdir()} == both
    assert len(ImageNetVal(out)) == len(val) == 12 and len(open_data(out, split="train")) == len(train) == 9
    assert val.classes == train.classes
    before = tree(out)
    train_archives.write({"n90000001": tar_bytes({"n90000001_1.JPEG": b"other"})})
    with refused(out, "other than an extraction of these"):
        extracted(archives.folder, out, "train")
    shutil.rmtree(out / "train")
    (out / "extraction_train.json").unlink()
    archives.devkit.unlink()
    with refused(out / "classes.csv", "val/ has other classes", "same devkit"):
        extracted(archives.folder, out, "train")
    assert tree(out) == {name: content for name, content in before.items() if "train" not in name}


@pytest.mark.parametrize("name", ["train/n90000001/mine.JPEG", "train.part/n90000001/mine.JPEG"])
def test_a_split_of_somebody_elses_beside_an_extraction_is_left_as_it_is(archives, tmp_path, name):
    TrainArchives(archives.folder)
    out = tmp_path / "out"
    extracted(archives.folder, out)
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    before = tree(out)
    for split in ("train", "val"):
        with refused(out, "other than an extraction of these"):
            extracted(archives.folder, out, split)
    assert tree(out) == before


def test_a_train_set_without_devkit_keeps_the_class_list_of_the_val_set(archives, tmp_path):
    extracted(archives.folder, tmp_path / "out")
    classes = (tmp_path / "out/classes.csv").read_bytes()
    wnids = sorted(archives.ids)
    write_tar(tmp_path / "x_img_train.tar", {f"{wnid}.tar": tar_bytes({f"{wnid}_1.JPEG": b"jpeg"}) for wnid in wnids})
    data = extracted(tmp_path / "x_img_train.tar", tmp_path / "out", "train")
    assert data.labels == [0, 1, 2, 3] and (tmp_path / "out/classes.csv").read_bytes() == classes
