"""The images that int8 engines are calibrated on."""

import hashlib

import pytest
import torch

from vitdemo import ImageNetVal, VitdemoError, calibration_for, data_path, load_model, reference_crop
from vitdemo.conversion.calibration import IMAGES
from vitdemo.dataset.archives import index_tar

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
    digests = [hashlib.sha256(shapes20[i * len(shapes20) // IMAGES].jpeg).hexdigest() for i in (0, 100, 255)]
    assert [by_path.files[k][1] for k in (0, 100, 255)] == digests
    assert calibration_for(vit_shapes20, ImageNetVal(data_path("shapes20"))).fingerprint == by_path.fingerprint


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
    with pytest.raises(VitdemoError, match="int8 needs images for its calibration; give --calibration PATH"):
        calibration_for(model)
    with pytest.raises(VitdemoError, match="nowhere"):
        calibration_for(vit_shapes20, tmp_path / "nowhere")
