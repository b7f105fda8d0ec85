"""The real photographs, packed as ILSVRC2012 packs them, come out with every label right by everyone's reading."""

from pathlib import Path

import pytest
from timm.data import ImageNetInfo
from timm.data.readers import create_reader
from torchvision.datasets import ImageFolder

from tests.dataset.conftest import extracted, torchvisions_imagenet, val_name, write_devkit, write_tar

WNIDS = ImageNetInfo("imagenet-1k").label_names()
IDS = {wnid: 1 + (7 * i + 3) % 1000 for i, wnid in enumerate(WNIDS)}  # IDs 1 to 1000; no label is ID - 1


def pack(folder: Path, wnids: list[str], photos: list[Path]) -> tuple[dict[str, str], Path]:
    """Photographs and their classes as val tar and devkit; returns the wnid of each file, and the devkit."""
    files = [val_name(number) for number in range(1, len(wnids) + 1)]
    folder.mkdir()
    devkit = write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", IDS, [IDS[wnid] for wnid in wnids])
    write_tar(folder / "ILSVRC2012_img_val.tar", {f: p.read_bytes() for f, p in zip(files, photos, strict=True)})
    return dict(zip(files, wnids, strict=True)), devkit


@pytest.fixture
def own_classes(photos) -> list[str]:
    """The class of each photograph: its name begins with the wnid."""
    return [photo.name.split("_")[0] for photo in photos]


def test_the_photographs_keep_their_classes(photos, own_classes, tmp_path, monkeypatch):
    truth, devkit = pack(tmp_path / "archives", own_classes, photos)
    data = extracted(tmp_path / "archives", tmp_path / "out")
    assert len(data) == len(photos) and data.classes == WNIDS
    assert {sample.file: sample.wnid for sample in data} == truth
    assert [sample.label for sample in data] == [WNIDS.index(wnid) for wnid in own_classes]
    assert [sample.jpeg for sample in data] == [photo.read_bytes() for photo in photos]

    # a tree with fewer than 1,000 folders is renumbered by torchvision; its wnids say which class is meant
    theirs = torchvisions_imagenet(tmp_path / "out", devkit, "val", monkeypatch)
    assert {Path(path).name: theirs.wnids[target] for path, target in theirs.samples} == truth

    (tmp_path / "map.txt").write_text("\n".join(data.classes))
    reader = create_reader("", root=str(tmp_path / "out"), split="val", class_map=str(tmp_path / "map.txt"))
    assert {reader.filename(i, basename=True): WNIDS[reader[i][1]] for i in range(len(reader))} == truth


def test_the_photographs_over_all_classes_have_the_same_indices_everywhere(photos, own_classes, tmp_path, monkeypatch):
    others = [
        wnid for wnid in WNIDS if wnid not in own_classes
    ]  # each photograph goes to its own class and to some more
    wnids = own_classes + others
    truth, devkit = pack(tmp_path / "archives", wnids, [photos[i % len(photos)] for i in range(len(wnids))])
    label = {file: WNIDS.index(wnid) for file, wnid in truth.items()}
    data = extracted(tmp_path / "archives", tmp_path / "out")
    assert dict(zip(data.files, data.labels, strict=True)) == label and len(set(data.labels)) == 1000

    for theirs in (ImageFolder(data.path), torchvisions_imagenet(tmp_path / "out", devkit, "val", monkeypatch)):
        assert {Path(path).name: target for path, target in theirs.samples} == label
    reader = create_reader("", root=str(tmp_path / "out"), split="val")
    assert {reader.filename(i, basename=True): reader[i][1] for i in range(len(reader))} == label
