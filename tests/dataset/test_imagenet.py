"""Both splits from tars and trees: the traps of ID, wnid and index; what does not fit; torchvision's reading."""

import csv
import errno
import gzip
import os
import pickle
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataset.conftest import (
    GROUND_TRUTH,
    Archives,
    as_nobody,
    extracted,
    refused,
    torchvisions_imagenet,
    val_name,
    watched_writes,
    write_devkit,
    write_tar,
)
from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.dataset import ImageNetVal
from vitdemo.dataset.decoding import INPUT_PATHS, Preprocessing
from vitdemo.dataset.devkit import read_devkit
from vitdemo.dataset.tars import ARCHIVE_MD5

CROP = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build_tree(folder: Path, wnids: list[str]) -> Path:
    """A tree as torchvision or timm users have it: one image per class, and no classes.csv."""
    for i, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        (folder / wnid / val_name(i + 1)).write_bytes(b"jpeg %d" % i)
    return folder


# ---- the traps of ID, wnid and index, on the full number of classes and images


@pytest.fixture(scope="module")
def from_tar(thin_archives):
    return ImageNetVal(thin_archives.folder)


@pytest.fixture(scope="module")
def from_tree(thin_archives, tmp_path_factory):
    return extracted(thin_archives.folder, tmp_path_factory.mktemp("tree") / "imagenet")


def test_ids_are_not_indices(thin_archives, from_tar):
    devkit = read_devkit(thin_archives.devkit)
    wnids = [synset.wnid for synset in devkit.synsets]
    assert (wnids[0], wnids[999], len(wnids)) == ("n01440764", "n15075141", 1000)
    wnid = {synset.id: synset.wnid for synset in devkit.synsets}
    assert wnid[1] == "n02119789" and wnids.index("n02119789") == 278
    assert wnid[490] == "n01751748" and wnids.index("n01751748") == 65
    assert devkit.ground_truth[:10] == [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
    assert devkit.labels[0] == 65
    first = from_tar[0]
    assert (first.file, first.class_id, first.label) == ("ILSVRC2012_val_00000001.JPEG", "n01751748", 65)


def test_the_full_set_has_50000_images_50_a_class(full_archives):
    data = ImageNetVal(full_archives.tar)
    assert len(data) == 50_000 and len(data.classes) == 1000 and set(Counter(data.labels).values()) == {50}


def test_torchvision_reads_the_same_labels_from_the_devkit_and_from_the_tree(thin_archives, from_tree, monkeypatch):
    from torchvision.datasets import imagenet

    root = from_tree.path.parent
    oracle = torchvisions_imagenet(root, thin_archives.devkit, "val", monkeypatch)
    names, truth = imagenet.load_meta_file(root)
    devkit = read_devkit(thin_archives.devkit)
    assert {synset.wnid: tuple(synset.words.split(", ")) for synset in devkit.synsets} == names
    assert [devkit.synsets[label].wnid for label in devkit.labels] == truth
    assert oracle.wnids == from_tree.classes == [synset.wnid for synset in devkit.synsets]
    ours = dict(zip(from_tree.files, from_tree.labels, strict=True))
    assert {Path(path).name: label for path, label in oracle.samples} == ours


def test_the_tar_and_what_was_extracted_from_it_are_one_data_set(from_tar, from_tree):
    assert from_tar.fingerprint == from_tree.fingerprint
    for what in ("files", "labels", "sizes", "classes", "class_names"):
        assert getattr(from_tar, what) == getattr(from_tree, what)
    assert all(from_tar[i] == from_tree[i] for i in range(0, 10_000, 97))
    assert (from_tar.source, from_tree.source) == ("tar", "folder")


# ---- reading


@pytest.mark.parametrize("source", ["tar", "folder of archives", "extracted root", "split"])
def test_samples_come_in_ascending_file_name_from_every_source(either, tmp_path, source):
    out = tmp_path / "out"
    extracted(either.folder, out, either.split)
    path = {"tar": either.tar, "folder of archives": either.folder, "extracted root": out, "split": out / either.split}
    data = either.read(path[source])
    assert data.classes == sorted(Archives.ids)  # a class without images keeps its place
    assert data.class_names[0] == "n90000001 word, n90000001 synonym"
    assert [(s.file, s.image, s.label) for s in data] == either.samples
    assert all(sample.class_id == data.classes[sample.label] for sample in data)
    assert data[-1] == data[len(data) - 1] and data.fingerprint == either.read(either.tar).fingerprint
    with pytest.raises(IndexError):
        data[len(data)]


def test_nothing_is_written_when_an_archive_is_read_in_place(either):
    with watched_writes() as written:
        assert len(list(either.read(either.folder))) == len(either.samples)
    assert not written


def test_a_tar_in_any_order_of_members_is_read_in_the_order_of_names(archives):
    write_tar(archives.tar, dict(reversed(archives.images.items())))
    assert [(s.file, s.image, s.label) for s in ImageNetVal(archives.tar)] == archives.samples


def test_threads_and_other_processes_read_the_same(either, tmp_path):
    for path in (either.tar, extracted(either.folder, tmp_path / "out", either.split).path):
        data = either.read(path)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(data.__getitem__, list(range(len(data))) * 20)) == list(data) * 20
        assert list(pickle.loads(pickle.dumps(data))) == list(data)


@pytest.mark.parametrize("read", [list, lambda data: list(prefetched_batches(data, range(12), CROP, 16))])
def test_a_file_that_changes_under_the_reader_ends_an_evaluation(archives, tmp_path, read):
    data = extracted(archives.folder, tmp_path / "out")
    victim = data.path / data.classes[data.labels[3]] / data.files[3]
    victim.write_bytes(b"short")
    with refused(data.files[3], "changed"):
        read(data)
    victim.unlink()
    with refused(data.files[3], "no such file"):
        read(data)


@pytest.mark.parametrize("source", ["tar", "folder"])
@pytest.mark.parametrize("input_path", INPUT_PATHS)
def test_a_file_that_the_disk_does_not_give_is_a_row_with_its_error(
    archives, tmp_path, monkeypatch, source, input_path
):
    data = ImageNetVal(archives.tar) if source == "tar" else extracted(archives.folder, tmp_path / "out")
    whole, broken = {"tar": os.pread, "folder": Path.read_bytes}[source], OSError(errno.EIO, "Input/output error")

    def failing(place, *rest):
        if data.offsets[3] in rest or data.files[3] in str(place):
            raise broken
        return whole(place, *rest)

    monkeypatch.setattr(*{"tar": (os, "pread"), "folder": (Path, "read_bytes")}[source], failing)
    (batch,) = prefetched_batches(data, range(12), CROP, 16, input_path=input_path)
    assert [index for index, error in enumerate(batch.errors) if error] == [3]
    assert "Input/output error" in batch.errors[3] and not batch.pixels[3].any() and batch.fallbacks == 0
    assert (batch.files, batch.labels) == (data.files, data.labels)
    assert batch.class_ids == [data.classes[label] for label in data.labels]


def test_a_tar_that_is_closed_to_another_process_is_no_row(archives):
    data = pickle.dumps(ImageNetVal(archives.tar))
    archives.tar.chmod(0)
    with as_nobody(), refused(archives.tar, "no permission"):
        list(prefetched_batches(pickle.loads(data), range(12), CROP, 16))


def test_a_file_larger_than_any_image_is_refused_unread(tmp_path):
    folder = build_tree(tmp_path / "val", ["n90000001"])
    large = next(folder.rglob("*.JPEG"))
    os.truncate(large, (1 << 28) + 1)  # a file of holes
    with refused(large.name, "larger than 256 MiB"):
        ImageNetVal(tmp_path)


@pytest.mark.parametrize("split", ["val", "validation"])
def test_a_subset_of_imagenets_classes_is_not_renumbered(tmp_path, split):
    from torchvision.datasets import ImageFolder

    build_tree(tmp_path / split, ["n02119789", "n01751748", "n15075141"])
    assert ImageFolder(tmp_path / split, allow_empty=True).class_to_idx["n15075141"] == 2  # the trap
    for path in (tmp_path, tmp_path / split):
        data = ImageNetVal(path)
        assert len(data.classes) == 1000 and data.class_names[278] == "kit fox, Vulpes macrotis"
        assert {sample.class_id: sample.label for sample in data} == {
            "n01751748": 65,
            "n02119789": 278,
            "n15075141": 999,
        }


def test_a_subset_of_an_extraction_keeps_the_labels_of_its_classes_csv(archives, tmp_path):
    data = extracted(archives.folder, tmp_path / "out")
    with open(tmp_path / "out/classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["0", "1", "2", "3"] and [row["wnid"] for row in rows] == data.classes
    assert {row["wnid"]: int(row["ilsvrc_id"]) for row in rows} == archives.ids
    assert [row["name"] for row in rows] == data.class_names
    shutil.rmtree(tmp_path / "out/val/n90000001")
    (tmp_path / "out/extraction.json").unlink()
    subset = ImageNetVal(tmp_path / "out")
    assert subset.classes == data.classes and set(subset.labels) == {1, 2, 3}


def test_invented_wnids_without_classes_csv_are_numbered_in_their_order(tmp_path):
    data = ImageNetVal(build_tree(tmp_path / "val", ["n90000003", "n90000001"]))
    assert data.classes == ["n90000001", "n90000003"] and [s.class_id for s in data] == ["n90000003", "n90000001"]


@pytest.mark.parametrize(
    "names", [["n01440764", "n90000001"], ["0", "1", "10", "100"], ["tench", "goldfish"], ["Great White", "n01440764"]]
)
def test_folders_of_any_names_are_classes_by_themselves(tmp_path, names):
    data = ImageNetVal(build_tree(tmp_path / "val", names))
    assert data.classes == sorted(names) and [s.class_id for s in sorted(data, key=lambda s: s.image)] == names


def test_a_flat_val_folder_is_refused_with_the_cure(archives, tmp_path):
    (tmp_path / "val").mkdir()
    for name, jpeg in archives.images.items():
        (tmp_path / "val" / name).write_bytes(jpeg)
    for path in (tmp_path, tmp_path / "val"):
        with refused("lie flat", "--labels", "devkit"):
            ImageNetVal(path)


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes UTF-8 names only")
@pytest.mark.parametrize("name", [b"caf\xe9.JPEG", b"two\nlines.JPEG"])
def test_a_file_name_that_no_table_can_hold_is_refused(tmp_path, name):
    folder = build_tree(tmp_path / "val", ["n01440764", "n01751748"])
    Path(os.fsdecode(os.fsencode(folder / "n01440764") + b"/" + name)).write_bytes(b"jpeg")
    with refused(folder, "cannot be written to a table"):
        ImageNetVal(folder)


def test_files_that_results_could_not_tell_apart_are_refused(tmp_path):
    folder = build_tree(tmp_path / "val", ["n01440764", "n01751748"])
    (folder / "n01751748" / val_name(1)).write_bytes(b"another file")
    with refused(folder, val_name(1), "n01751748"):
        ImageNetVal(folder)


def test_what_is_no_data_set_is_refused(archives, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", archives.devkit):
        with refused(path, "no data set", "_img_val.tar"):
            ImageNetVal(path)
    with refused(tmp_path / "absent", "no such file or folder"):
        ImageNetVal(tmp_path / "absent")
    with as_nobody(), refused("no permission"):
        ImageNetVal(archives.folder)


@pytest.mark.parametrize(
    "content, line",
    [
        ("", "columns"),
        ("label,wnid\n0,n90000001\n", "columns"),
        ("label,wnid,name\n1,n90000001,x\n0,n90000002,y\n", "columns"),
        ("label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n1", "columns"),
        ("label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n1,n90000002,2", "columns"),
        ("label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n", "lacks n90000002"),
    ],
)
def test_a_bad_classes_csv_is_refused(tmp_path, content, line):
    build_tree(tmp_path / "val", ["n90000001", "n90000002"])
    (tmp_path / "classes.csv").write_text(content)
    with refused(tmp_path / "classes.csv", line):
        ImageNetVal(tmp_path)


# ---- archives that do not fit


def test_a_missing_devkit_or_val_tar_is_named(archives, tmp_path):
    archives.devkit.rename(tmp_path / "elsewhere")
    with refused("mini_devkit", "missing"):
        ImageNetVal(archives.tar)
    archives.tar.unlink()
    with refused(archives.folder, "_img_val.tar"):
        extracted(archives.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_several_devkits_the_known_one_is_taken(archives, monkeypatch):
    other = shutil.copy(archives.devkit, archives.folder / "mini_devkit_t3.tar.gz")
    with refused("which devkit", "mini_devkit_t12.tar.gz", "mini_devkit_t3.tar.gz"):
        ImageNetVal(archives.tar)
    monkeypatch.setitem(ARCHIVE_MD5, Path(other).name, "0")
    assert ImageNetVal(archives.tar).labels == archives.labels


def test_several_val_tars_are_not_guessed_among(archives):
    shutil.copy(archives.tar, archives.folder / "other_img_val.tar")
    with refused("mini_img_val.tar", "other_img_val.tar"):
        ImageNetVal(archives.folder)
    assert len(ImageNetVal(archives.tar)) == 12


@pytest.mark.parametrize("truth", [Archives.truth[:-1], Archives.truth + [1]])
def test_a_ground_truth_of_another_length_is_refused(archives, truth):
    write_devkit(archives.devkit, archives.ids, truth)
    with refused(archives.tar, "12 images", f"{len(truth)} lines"):
        ImageNetVal(archives.tar)


@pytest.mark.parametrize(
    "change, number, name",
    [
        (lambda files: files.pop(val_name(5)), 5, val_name(6)),
        (lambda files: files.update({"n01440764.tar": b"x"}), 13, "n01440764.tar"),
        (lambda files: files.update({"ILSVRC2012_val_1.JPEG": b"x"}), 13, "ILSVRC2012_val_1.JPEG"),
    ],
)
def test_images_of_other_numbers_or_names_are_refused(archives, change, number, name):
    files = dict(archives.images)
    change(files)
    write_tar(archives.tar, files)
    with refused(archives.tar, f"image number {number} is named {name!r}", "swapped"):
        ImageNetVal(archives.tar)


def test_swapped_archives_are_refused(archives):
    val, devkit = archives.tar.read_bytes(), archives.devkit.read_bytes()
    archives.tar.write_bytes(devkit)
    with refused(archives.tar, "compressed"):
        ImageNetVal(archives.tar)
    archives.tar.write_bytes(val)
    archives.devkit.write_bytes(val)
    with refused(archives.devkit, "gzip", "devkit"):
        ImageNetVal(archives.tar)


@pytest.mark.parametrize(
    "ids, replaced, line",
    [
        (Archives.ids, {"meta_mat": None}, "meta.mat"),
        (Archives.ids, {"ground_truth": None}, GROUND_TRUTH),
        (Archives.ids, {"meta_mat": b"no MAT file"}, "meta.mat cannot be read"),
        (Archives.ids, {"ground_truth": b"3\n1\nfour\n"}, "ground_truth.txt cannot be read"),
        (Archives.ids, {"ground_truth": b"3\n1\n99\n"}, "ID 99"),
        ({"../../etc/x": 1}, {}, "meta.mat cannot be read (the wnid '../../etc/x'"),
        ({"n90000001": 1, "n90000002": 1}, {}, "the same ID"),
        ({}, {}, "no leaves"),
    ],
)
def test_a_damaged_or_hostile_devkit_is_refused(archives, ids, replaced, line):
    write_devkit(archives.devkit, ids, [1], **replaced)
    with refused(archives.devkit, line):
        read_devkit(archives.devkit)


def test_a_truncated_devkit_and_a_gzip_bomb_are_refused(archives):
    content = archives.devkit.read_bytes()
    archives.devkit.write_bytes(content[: len(content) // 2])
    with refused(archives.devkit, "no whole gzip file"):
        read_devkit(archives.devkit)
    archives.devkit.write_bytes(gzip.compress(bytes(80 << 20), 1))
    with refused(archives.devkit, "MiB"):
        read_devkit(archives.devkit)
