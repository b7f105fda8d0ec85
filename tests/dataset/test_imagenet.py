import csv
import errno
import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataset.conftest import GROUND_TRUTH, Archives, val_name, write_devkit, write_tar
from tests.dataset.test_tars import as_nobody, refused, tree
from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.decoding import INPUT_PATHS, Preprocessing
from vitdemo.dataset.devkit import read_devkit
from vitdemo.dataset.extraction import _check_official, extract
from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.dataset.tars import ARCHIVE_MD5

CROP = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def extract_unverified(archives: Path, out: Path) -> ImageNetVal:
    return extract(archives, out, unverified=True, progress=False)


def build_tree(folder: Path, wnids: list[str]) -> Path:
    """A tree as torchvision or timm users have it: an image a class, and no classes.csv."""
    for i, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        (folder / wnid / val_name(i + 1)).write_bytes(b"jpeg %d" % i)
    return folder


# ---- the traps of ID, wnid and index, on the full number of classes and images


@pytest.fixture(scope="module")
def from_tar(thin_archives):
    return ImageNetVal(thin_archives.folder)


KILLED_EXTRACTION = """
import os, signal, sys, threading, time
from pathlib import Path
from vitdemo import extract

def kill_soon():
    while len(list((out / "val.part").glob("*/*.JPEG"))) < 100:
        if (out / "val").exists():
            return
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

archives, out = map(Path, sys.argv[1:])
threading.Thread(target=kill_soon, daemon=True).start()
extract(archives, out, unverified=True, progress=False)
"""


@pytest.fixture(scope="module")
def from_tree(thin_archives, tmp_path_factory):
    """All classes, extracted by a run that was killed and one that finished it."""
    out = tmp_path_factory.mktemp("tree") / "imagenet"
    child = subprocess.run([sys.executable, "-c", KILLED_EXTRACTION, thin_archives.folder, out])
    assert child.returncode == -signal.SIGKILL
    assert 100 <= len(list((out / "val.part").rglob("*.JPEG"))) < 10_000
    with refused(out, "unfinished", "extract again"):
        ImageNetVal(out)
    return extract_unverified(thin_archives.folder, out)


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
    assert (first.file, first.wnid, first.label) == ("ILSVRC2012_val_00000001.JPEG", "n01751748", 65)


def test_the_full_set_has_50000_images_50_a_class(full_archives):
    data = ImageNetVal(full_archives.tar)
    assert len(data) == 50_000 and len(data.classes) == 1000 and set(Counter(data.labels).values()) == {50}
    _check_official(data)


def test_torchvision_reads_the_same_labels_from_the_devkit_and_from_the_tree(thin_archives, from_tree, monkeypatch):
    from torchvision.datasets import ImageNet, imagenet

    md5 = md5_of(thin_archives.devkit)
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (thin_archives.devkit.name, md5))
    imagenet.parse_devkit_archive(thin_archives.folder)
    names, truth = imagenet.load_meta_file(thin_archives.folder)
    devkit = read_devkit(thin_archives.devkit)
    assert {synset.wnid: tuple(synset.words.split(", ")) for synset in devkit.synsets} == names
    assert [devkit.synsets[label].wnid for label in devkit.labels] == truth

    (thin_archives.folder / "val").symlink_to(from_tree.path)
    oracle = ImageNet(thin_archives.folder, split="val")
    (thin_archives.folder / "val").unlink()
    assert oracle.wnids == from_tree.classes == [synset.wnid for synset in devkit.synsets]
    ours = dict(zip(from_tree.files, from_tree.labels, strict=True))
    assert {Path(path).name: label for path, label in oracle.samples} == ours


def test_the_tar_and_what_was_extracted_from_it_are_one_data_set(from_tar, from_tree):
    assert from_tar.fingerprint == from_tree.fingerprint
    for what in ("files", "labels", "sizes", "classes", "class_names"):
        assert getattr(from_tar, what) == getattr(from_tree, what)
    assert all(from_tar[i] == from_tree[i] for i in range(0, 10_000, 97))
    assert (from_tar.source, from_tree.source) == ("tar", "folder")


def test_an_official_archive_must_have_the_official_counts(archives, tmp_path, monkeypatch):
    folder = tmp_path / "official"
    folder.mkdir()
    for path, name in ((archives.tar, "ILSVRC2012_img_val.tar"), (archives.devkit, "ILSVRC2012_devkit_t12.tar.gz")):
        shutil.copy(path, folder / name)
        monkeypatch.setitem(ARCHIVE_MD5, name, md5_of(path))
    with refused("ILSVRC2012_img_val.tar", "12 images", "50000"):
        extract(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# ---- reading


@pytest.mark.parametrize("source", ["tar", "folder of archives", "extracted root", "val"])
def test_samples_come_in_ascending_file_name_from_every_source(archives, tmp_path, source):
    out = tmp_path / "out"
    extract_unverified(archives.folder, out)
    path = {"tar": archives.tar, "folder of archives": archives.folder, "extracted root": out, "val": out / "val"}
    data = ImageNetVal(path[source])
    assert data.classes == sorted(archives.ids)
    assert data.class_names[0] == "n90000001 word, n90000001 synonym"
    assert [(s.file, s.jpeg, s.label) for s in data] == [
        (file, jpeg, label) for (file, jpeg), label in zip(archives.images.items(), archives.labels, strict=True)
    ]
    assert all(sample.wnid == data.classes[sample.label] for sample in data)
    assert data[-1] == data[11] and len(data) == 12
    with pytest.raises(IndexError):
        data[12]


def test_a_tar_in_any_order_of_members_is_read_in_the_order_of_names(archives):
    write_tar(archives.tar, dict(reversed(archives.images.items())))
    data = ImageNetVal(archives.tar)
    assert data.files == sorted(archives.images) and data.labels == archives.labels
    assert data[0].jpeg == archives.images[val_name(1)]


def test_threads_and_other_processes_read_the_same(archives, tmp_path):
    for path in (archives.tar, extract_unverified(archives.folder, tmp_path / "out").path):
        data = ImageNetVal(path)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(data.__getitem__, list(range(12)) * 20)) == list(data) * 20
        assert list(pickle.loads(pickle.dumps(data))) == list(data)


def test_a_file_that_changes_under_the_reader_is_an_error(archives, tmp_path):
    data = extract_unverified(archives.folder, tmp_path / "out")
    (data.path / data.classes[data.labels[0]] / data.files[0]).write_bytes(b"short")
    with refused(data.files[0], "changed"):
        data[0]
    (data.path / data.classes[data.labels[1]] / data.files[1]).unlink()
    with refused(data.files[1], "no such file"):
        data[1]


@pytest.mark.parametrize("source", ["tar", "folder"])
@pytest.mark.parametrize("input_path", INPUT_PATHS)
def test_a_file_that_the_disk_does_not_give_is_a_row_with_its_error(
    archives, tmp_path, monkeypatch, source, input_path
):
    data = ImageNetVal(archives.tar) if source == "tar" else extract_unverified(archives.folder, tmp_path / "out")
    whole, broken = {"tar": os.pread, "folder": Path.read_bytes}[source], OSError(errno.EIO, "Input/output error")

    def failing(place, *rest):
        if data.offsets[3] in rest or data.files[3] in str(place):
            raise broken
        return whole(place, *rest)

    monkeypatch.setattr(*{"tar": (os, "pread"), "folder": (Path, "read_bytes")}[source], failing)
    (batch,) = prefetched_batches(data, range(12), CROP, 16, input_path=input_path)
    assert [index for index, error in enumerate(batch.errors) if error] == [3]
    assert "Input/output error" in batch.errors[3] and not batch.pixels[3].any()
    assert (batch.files, batch.labels) == (data.files, data.labels)
    assert batch.wnids == [data.classes[label] for label in data.labels]


def test_a_file_that_changes_under_an_evaluation_ends_it(archives, tmp_path):
    data = extract_unverified(archives.folder, tmp_path / "out")
    victim = data.path / data.classes[data.labels[3]] / data.files[3]
    victim.write_bytes(b"short")
    with refused(data.files[3], "changed"):
        list(prefetched_batches(data, range(12), CROP, 16))
    victim.unlink()
    with refused(data.files[3], "no such file"):
        list(prefetched_batches(data, range(12), CROP, 16))


def test_a_file_larger_than_any_image_is_refused_unread(archives, tmp_path):
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
        assert {sample.wnid: sample.label for sample in data} == {"n01751748": 65, "n02119789": 278, "n15075141": 999}


def test_a_subset_of_an_extraction_keeps_the_labels_of_its_classes_csv(archives, tmp_path):
    data = extract_unverified(archives.folder, tmp_path / "out")
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
    assert data.classes == ["n90000001", "n90000003"] and [s.wnid for s in data] == ["n90000003", "n90000001"]


def test_known_and_unknown_wnids_together_are_refused(tmp_path):
    with refused("n90000001", "not among ImageNet's"):
        ImageNetVal(build_tree(tmp_path / "val", ["n01440764", "n90000001"]))


@pytest.mark.parametrize("names", [["0", "1", "10", "100"], ["tench", "goldfish"]])
def test_folders_named_otherwise_are_no_data_set(tmp_path, names):
    with refused(tmp_path / "val", "no data set", "n01440764"):
        ImageNetVal(build_tree(tmp_path / "val", names))


def test_a_flat_val_folder_is_refused_with_the_cure(archives, tmp_path):
    flat = tmp_path / "val"
    flat.mkdir()
    for name, jpeg in archives.images.items():
        (flat / name).write_bytes(jpeg)
    for path in (flat, tmp_path / "copy"):
        if path != flat:
            shutil.copytree(flat, path / "val")
        with refused("flat", "one class", "vitdemo extract"):
            ImageNetVal(path)


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system takes UTF-8 names only")
@pytest.mark.parametrize("name", [b"caf\xe9.JPEG", b"two\nlines.JPEG"])
def test_a_file_name_that_no_table_can_hold_is_refused(tmp_path, name):
    folder = build_tree(tmp_path / "val", ["n01440764", "n01751748"])
    Path(os.fsdecode(os.fsencode(folder / "n01440764") + b"/" + name)).write_bytes(b"jpeg")
    with refused(folder, "cannot be written to a table"):
        ImageNetVal(folder)


def test_two_files_of_one_name_are_refused(tmp_path):
    folder = build_tree(tmp_path / "val", ["n01440764", "n01751748"])
    shutil.copy(folder / "n01440764" / val_name(1), folder / "n01751748" / val_name(1))
    with refused(val_name(1), "n01440764", "n01751748"):
        ImageNetVal(folder)


def test_what_is_no_data_set_is_refused(archives, tmp_path):
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "no data set", "_img_val.tar"):
        ImageNetVal(tmp_path / "empty")
    with refused(tmp_path / "absent", "no such file or folder"):
        ImageNetVal(tmp_path / "absent")
    with refused(archives.devkit, "no data set", "_img_val.tar"):
        ImageNetVal(archives.devkit)
    with as_nobody(), refused("no permission"):
        ImageNetVal(archives.folder)


@pytest.mark.parametrize(
    "content",
    [
        "label,wnid\n0,n90000001\n",
        "",
        "label,wnid,name\n1,n90000001,x\n0,n90000002,y\n",
        "label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n1",
        "label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n1,n90000002,2",
    ],
)
def test_a_bad_classes_csv_is_refused(tmp_path, content):
    build_tree(tmp_path / "val", ["n90000001"])
    (tmp_path / "classes.csv").write_text(content)
    with refused(tmp_path / "classes.csv", "columns"):
        ImageNetVal(tmp_path)


def test_a_class_that_classes_csv_lacks_is_refused(tmp_path):
    build_tree(tmp_path / "val", ["n90000001", "n90000002"])
    (tmp_path / "classes.csv").write_text("label,wnid,ilsvrc_id,name\n0,n90000001,1,x\n")
    with refused(tmp_path / "classes.csv", "n90000002"):
        ImageNetVal(tmp_path)


# ---- archives that do not fit


def test_a_missing_devkit_or_val_tar_is_named(archives, tmp_path):
    archives.devkit.rename(tmp_path / "elsewhere")
    with refused("mini_devkit", "missing"):
        ImageNetVal(archives.tar)
    archives.tar.unlink()
    with refused(archives.folder, "_img_val.tar"):
        extract_unverified(archives.folder, tmp_path / "out")
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


def test_a_missing_image_in_the_middle_is_named(archives):
    files = dict(archives.images)
    files[val_name(13)] = files.pop(val_name(5))
    write_tar(archives.tar, files)
    with refused(archives.tar, "image number 5", val_name(6)):
        ImageNetVal(archives.tar)


def test_swapped_archives_are_refused(archives, tmp_path):
    val, devkit = archives.tar.read_bytes(), archives.devkit.read_bytes()
    archives.tar.write_bytes(devkit)
    with refused(archives.tar, "compressed"):
        ImageNetVal(archives.tar)
    archives.tar.write_bytes(val)
    archives.devkit.write_bytes(val)
    with refused(archives.devkit, "gzip", "devkit"):
        ImageNetVal(archives.tar)


@pytest.mark.parametrize("name", ["n01440764.tar", "ilsvrc2012_val_00000001.jpeg", "ILSVRC2012_val_1.JPEG"])
def test_members_of_other_names_are_refused(archives, name):
    write_tar(archives.tar, {**archives.images, name: b"x"})
    with refused(archives.tar, repr(name), "swapped"):
        ImageNetVal(archives.tar)


def test_a_truncated_tar_is_refused(archives, tmp_path):
    os.truncate(archives.tar, archives.tar.stat().st_size // 2)
    with refused(archives.tar, "truncated"):
        extract_unverified(archives.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "replaced, line",
    [
        ({"meta_mat": None}, "meta.mat"),
        ({"ground_truth": None}, GROUND_TRUTH),
        ({"meta_mat": b"no MAT file"}, "meta.mat cannot be read"),
        ({"ground_truth": b"3\n1\nfour\n"}, "one number per line"),
        ({"ground_truth": b"3\n1\n99\n"}, "ID 99"),
    ],
)
def test_a_damaged_devkit_is_refused(archives, replaced, line):
    write_devkit(archives.devkit, archives.ids, archives.truth, **replaced)
    with refused(archives.devkit, line):
        read_devkit(archives.devkit)


def test_an_archive_is_verified_before_anything_in_it_is_read(archives, tmp_path):
    archives.devkit.write_bytes(b"no gzip file at all")
    with refused(archives.devkit, "no MD5 is known for this name"):
        extract(archives.folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ids", [{"../../etc/x": 1}, {"n90000001": 1, "n90000002": 1}, {}])
def test_hostile_classes_are_refused(archives, ids):
    write_devkit(archives.devkit, ids, [1])
    with refused(archives.devkit, "meta.mat"):
        read_devkit(archives.devkit)


def test_a_truncated_devkit_and_a_gzip_bomb_are_refused(archives):
    content = archives.devkit.read_bytes()
    archives.devkit.write_bytes(content[: len(content) // 2])
    with refused(archives.devkit, "no whole gzip file"):
        read_devkit(archives.devkit)
    archives.devkit.write_bytes(gzip.compress(bytes(80 << 20), 1))
    with refused(archives.devkit, "MiB"):
        read_devkit(archives.devkit)


# ---- extraction


def test_extraction_writes_a_tree_a_class_list_and_a_record_and_leaves_the_archives(archives, tmp_path, capsys):
    before = tree(archives.folder)
    data = extract(archives.folder, tmp_path / "out", unverified=True)
    assert (
        "complete: 12 images of 4 classes, 12 written now, archives not verified by MD5, files by size"
        in capsys.readouterr().out
    )
    assert tree(archives.folder) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"val", "classes.csv", "extraction.json"}
    expected = {
        f"{sorted(archives.ids)[label]}/{file}": jpeg
        for (file, jpeg), label in zip(archives.images.items(), archives.labels, strict=True)
    }
    assert tree(tmp_path / "out/val") == expected
    assert json.loads((tmp_path / "out/extraction.json").read_text()) == {
        "images": 12,
        "classes": 4,
        "archive": "mini_img_val.tar",
        "md5": md5_of(archives.tar),
        "fingerprint": data.fingerprint,
    }


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


def test_the_official_archives_are_known_by_their_md5():
    assert ARCHIVE_MD5["ILSVRC2012_img_val.tar"] == "29b22e2961454d5413ddabcf34fc5622"
    assert ARCHIVE_MD5["ILSVRC2012_devkit_t12.tar.gz"] == "fa75699e90414af021442c21a62c3abf"
    assert ARCHIVE_MD5["ILSVRC2012_img_train.tar"] == "1d675b47d978889d74fa0da5fadfb00e"


def test_a_finished_extraction_is_confirmed_and_a_damaged_one_repaired(archives, tmp_path, capsys):
    out = tmp_path / "out"
    extract_unverified(archives.folder, out)
    whole = tree(out)
    extract(archives.folder, out, unverified=True)
    assert "complete: 12 images of 4 classes, 0 written" in capsys.readouterr().out
    victim = next((out / "val").rglob("*.JPEG"))
    victim.unlink()
    with refused(out / "val", "11 images", "12", "extract again"):
        ImageNetVal(out)
    victim.write_bytes(b"damaged")
    with refused(out / "val", "differ", "extract again"):
        ImageNetVal(out)
    extract_unverified(archives.folder, out)
    assert tree(out) == whole


@pytest.mark.parametrize("interruption", ["before val", "in val", "in a record"])
def test_an_interrupted_extraction_is_refused_until_it_is_finished(archives, tmp_path, interruption):
    out = tmp_path / "out"
    extract_unverified(archives.folder, out)
    whole = tree(out)
    (out / "val").rename(out / "val.part")
    next((out / "val.part").rglob("*.JPEG")).unlink()
    if interruption != "in val":
        shutil.rmtree(out / "val.part")
    if interruption == "in a record":
        (out / "classes.csv").unlink()
        (out / ".classes.csv.4711.part").write_text("label,wn")
    with refused(out, "unfinished", "extract again"):
        ImageNetVal(out)
    extract_unverified(archives.folder, out)
    assert tree(out) == whole


@pytest.mark.parametrize("name", ["notes.txt", "val/n01440764/a.JPEG", "train/a.JPEG", "extraction.json"])
def test_a_folder_with_foreign_content_is_refused_and_left_as_it_is(archives, tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with refused(tmp_path / "out"):
        extract_unverified(archives.folder, tmp_path / "out")
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_what_finder_leaves_in_every_folder_is_no_foreign_content(archives, tmp_path):
    extract_unverified(archives.folder, tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / "val", next((tmp_path / "out" / "val").iterdir())):
        (folder / ".DS_Store").write_bytes(b"Finder's")
    assert len(extract_unverified(archives.folder, tmp_path / "out")) == len(archives.images)


def test_a_devkit_may_lie_beside_val(archives, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(archives.devkit, out)
    extract_unverified(archives.folder, out)
    shutil.copy(archives.devkit, out / "ILSVRC2012_devkit_t12.tar.gz")
    (out / "meta.bin").write_bytes(b"torchvision's")
    assert len(extract_unverified(archives.folder, out)) == len(archives.images)


def test_an_extraction_of_other_archives_is_refused_and_left_as_it_is(archives, tmp_path):
    other = Archives(tmp_path / "other")
    write_tar(other.tar, {name: jpeg + b" " for name, jpeg in other.images.items()})
    extract_unverified(other.folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    with refused(tmp_path / "out", "other than an extraction of these"):
        extract_unverified(archives.folder, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_extracting_over_the_archives_is_refused(archives):
    before = tree(archives.folder)
    with refused(archives.folder, "new folder"):
        extract_unverified(archives.folder, archives.folder)
    assert tree(archives.folder) == before


def test_what_tarfile_writes_by_default_from_a_folder_is_extracted_too(archives, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, jpeg in archives.images.items():
        (folder / name).write_bytes(jpeg)
    with tarfile.open(archives.tar, "w") as tar:
        tar.add(folder, arcname="val")
    assert [s.jpeg for s in extract_unverified(archives.folder, tmp_path / "out")] == list(archives.images.values())
