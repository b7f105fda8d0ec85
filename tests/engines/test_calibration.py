"""The images that int8 engines are calibrated on."""

import hashlib
import os

import pytest
import torch

from tests.dataset.conftest import Archives, TrainArchives, tar_member
from tests.own.test_images import parquet, write
from vitdemo import ImageNetVal, VitdemoError, data_path, extract, load_model, reference_crop
from vitdemo.dataset.tars import index_tar
from vitdemo.engines.calibration import IMAGES, calibration_for

CALIB = "shapes20/shapes20_calib.tar"


def test_bundled_model_has_the_bundled_images(vit_shapes20):
    calibration = calibration_for(vit_shapes20)
    members = sorted(index_tar(data_path(CALIB)))
    content = data_path(CALIB).read_bytes()
    jpegs = [content[member.offset : member.offset + member.size] for member in members]
    assert calibration.files == tuple((len(jpeg), hashlib.sha256(jpeg).hexdigest()) for jpeg in jpegs)
    assert calibration.pixels.shape == (256, 3, 224, 224) and calibration.pixels.dtype == torch.uint8
    assert torch.equal(calibration.pixels[7], reference_crop(jpegs[7], vit_shapes20.info.preprocessing))


def test_a_larger_set_is_thinned_evenly(vit_shapes20, shapes20):
    by_path = calibration_for(vit_shapes20, data_path("shapes20"))
    assert len(by_path.pixels) == IMAGES < len(shapes20)
    digests = [hashlib.sha256(shapes20[i * len(shapes20) // IMAGES].image).hexdigest() for i in (0, 100, 255)]
    assert [by_path.files[k][1] for k in (0, 100, 255)] == digests
    assert calibration_for(vit_shapes20, ImageNetVal(data_path("shapes20"))).fingerprint == by_path.fingerprint


@pytest.mark.parametrize("source", ["tar", "folder with the tar", "extracted", "both extracted"])
def test_a_train_set_is_taken_where_there_is_no_val_set(vit_shapes20, tmp_path, monkeypatch, source):
    monkeypatch.setattr("vitdemo.engines.calibration.IMAGES", 4)
    train = TrainArchives(tmp_path / "train_archives")
    extracted = tmp_path / "extracted"
    path = {"tar": train.tar, "folder with the tar": train.folder}.get(source, extracted)
    images = {name: jpeg for of_class in train.images.values() for name, jpeg in of_class.items()}
    if "extracted" in source:
        extract(train.folder, extracted, split="train", unverified=True, progress=False)
    if source == "both extracted":
        val = Archives(tmp_path / "val_archives")
        extract(val.folder, extracted, unverified=True, progress=False)
        images = val.images
    jpegs = [images[name] for name in sorted(images)]
    found = calibration_for(vit_shapes20, path).files
    assert found == tuple(
        (len(j), hashlib.sha256(j).hexdigest()) for j in (jpegs[i * len(jpegs) // 4] for i in range(4))
    )


@pytest.mark.parametrize("source", ["words", "table", "parquet", "flat"])
def test_any_source_of_images_is_taken(vit_shapes20, shapes20, tmp_path, source):
    jpegs = [shapes20[i].image for i in range(3)]
    names = [f"{'ab'[i % 2]}/{i}.jpg" if source == "words" else f"{i}.jpg" for i in range(3)]
    table = "file_name,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(3))
    if source == "parquet":
        rows = [{"image": {"bytes": jpegs[i], "path": names[i]}, "label": i % 2} for i in range(3)]
        parquet(tmp_path / "data/train-00000-of-00001.parquet", rows, ["a", "b"])
    else:
        files = dict(zip(names, jpegs, strict=True)) | ({"metadata.csv": table} if source == "table" else {})
        write(tmp_path, files)
    calibration = calibration_for(vit_shapes20, tmp_path)
    expected = jpegs if source != "words" else [jpegs[0], jpegs[2], jpegs[1]]  # by their paths
    assert calibration.files == tuple((len(jpeg), hashlib.sha256(jpeg).hexdigest()) for jpeg in expected)
    assert torch.equal(calibration.pixels[1], reference_crop(expected[1], vit_shapes20.info.preprocessing))


def test_a_member_larger_than_any_image_is_refused_unread(vit_shapes20, tmp_path):
    tar = tmp_path / "some.tar"
    tar.write_bytes(tar_member("large.jpg", size=1 << 29))
    os.truncate(tar, 512 + (1 << 29) + 1024)  # a file of holes
    with pytest.raises(VitdemoError, match="'large.jpg' is larger than 256 MiB"):
        calibration_for(vit_shapes20, tar)


def test_random_weights_take_random_pixels_the_same_each_time():
    model = load_model("vit_shapes20", "random")
    first, second = calibration_for(model), calibration_for(model)
    assert first.source == "random pixels" and first.files == () and first.fingerprint == second.fingerprint
    assert first.pixels.float().std() == pytest.approx(73.9, abs=0.5)  # of the uniform distribution over 0 to 255


def test_pixels_are_taken_as_they_are(vit_shapes20):
    pixels = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)
    calibration = calibration_for(vit_shapes20, pixels)
    assert torch.equal(calibration.pixels, pixels) and calibration.files == ()


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(0, 3, 224, 224, dtype=torch.uint8), torch.zeros(1, 3, 224, 224), torch.zeros(3, 8, 8).byte()],
    ids=["empty", "float", "small"],
)
def test_wrong_pixels_are_refused(vit_shapes20, pixels):
    with pytest.raises(VitdemoError, match=r"calibration: pixels are uint8\[N >= 1, 3, 224, 224\], not"):
        calibration_for(vit_shapes20, pixels)


def test_other_weights_need_images_of_their_own(vit_shapes20, tmp_path):
    file = data_path("shapes20/vit_shapes20/model.safetensors")
    model = load_model("vit_shapes20", str(file))
    with pytest.raises(VitdemoError, match="int8 needs images for its calibration; give calibration"):
        calibration_for(model)
    with pytest.raises(VitdemoError, match="nowhere"):
        calibration_for(vit_shapes20, tmp_path / "nowhere")
