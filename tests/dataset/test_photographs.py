"""The real photographs, packed as ILSVRC2012 packs them, come out with every label right by everyone's reading."""

from itertools import cycle
from pathlib import Path

from timm.data import ImageNetInfo
from timm.data.readers import create_reader
from torchvision.datasets import ImageFolder

from tests.dataset.conftest import extracted, torchvisions_imagenet, val_name, write_devkit, write_tar

WNIDS = ImageNetInfo("imagenet-1k").label_names()
IDS = {wnid: 1 + (7 * i + 3) % 1000 for i, wnid in enumerate(WNIDS)}  # IDs 1 to 1000; no label is ID - 1


def test_the_photographs_have_the_same_indices_everywhere(photos, tmp_path, monkeypatch):
    """Each of them in its own class, with which its name begins, and in some more, so that each class has one."""
    own, folder = [photo.name.split("_")[0] for photo in photos], tmp_path / "archives"
    folder.mkdir()
    wnids = [*own, *(wnid for wnid in WNIDS if wnid not in own)]
    jpegs = {val_name(k): photo.read_bytes() for k, photo in zip(range(1, len(wnids) + 1), cycle(photos), strict=False)}
    write_tar(folder / "ILSVRC2012_img_val.tar", jpegs)
    devkit = write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", IDS, [IDS[wnid] for wnid in wnids])
    data, label = extracted(folder, tmp_path / "out"), dict(zip(jpegs, map(WNIDS.index, wnids), strict=True))
    assert dict(zip(data.files, data.labels, strict=True)) == label and len(set(data.labels)) == 1000
    assert {sample.file: sample.image for sample in data} == jpegs

    for theirs in (ImageFolder(data.path), torchvisions_imagenet(tmp_path / "out", devkit, "val", monkeypatch)):
        assert {Path(path).name: target for path, target in theirs.samples} == label
    reader = create_reader("", root=str(tmp_path / "out"), split="val")
    assert {reader.filename(i, basename=True): reader[i][1] for i in range(len(reader))} == label
