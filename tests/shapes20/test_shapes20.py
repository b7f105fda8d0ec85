"""The bundled data set and model: right format, right sizes, separate streams, and the accuracy that is recorded."""

import hashlib
import io
import re
import tarfile
import warnings
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from torchvision.datasets import imagenet

from data.shapes20.make.classes import ANCESTORS, CLASSES
from data.shapes20.make.draw import SPECIAL_FILES, VERY_LARGE, VERY_SMALL, bundled_jpeg, bundled_name, calibration_jpeg
from data.shapes20.make.scenes import bundled_labels, picture
from data.shapes20.make.train import count_correct
from vitdemo.paths import data_path

# One bundled file carries a broken EXIF block on purpose, and Pillow says so whenever it is opened.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")
ARCHIVES = ["shapes20_img_val.tar", "shapes20_devkit.tar.gz", "shapes20_calib.tar"]


@pytest.fixture(scope="module")
def folder():
    return data_path("shapes20")


def read_tar(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


@pytest.fixture(scope="module")
def bundled(folder):
    return read_tar(folder / "shapes20_img_val.tar")


@pytest.fixture(scope="module")
def calibration(folder):
    return read_tar(folder / "shapes20_calib.tar")


@pytest.fixture(scope="module")
def parsed(folder, tmp_path_factory):
    """torchvision's reading of our devkit: wnid -> words, and the wnid of every file."""
    root = tmp_path_factory.mktemp("devkit")
    name = "shapes20_devkit.tar.gz"
    (root / name).write_bytes((folder / name).read_bytes())
    md5 = hashlib.md5((root / name).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(imagenet.ARCHIVE_META, "devkit", (name, md5))
        imagenet.parse_devkit_archive(root)
    return imagenet.load_meta_file(root)


def pixel_hash(image: Image.Image) -> str:
    image = image.convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def test_torchvision_reads_the_devkit(parsed):
    words, wnids = parsed
    assert words == {leaf.wnid: tuple(leaf.words.split(", ")) for leaf in CLASSES}
    assert not {node.wnid for node in ANCESTORS} & set(words)
    assert wnids == [CLASSES[label].wnid for label in bundled_labels()]


def test_ids_are_not_class_indices():
    ids = [leaf.ilsvrc_id for leaf in CLASSES]
    assert sorted(ids) == list(range(1, 21))
    assert ids != sorted(ids)
    assert [leaf.wnid for leaf in CLASSES] == sorted(leaf.wnid for leaf in CLASSES)
    assert all(node.ilsvrc_id > 20 and node.children for node in ANCESTORS)


def test_ground_truth_is_one_id_a_line(folder):
    files = read_tar(folder / "shapes20_devkit.tar.gz")
    text = files["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"]
    assert [int(line) for line in text.decode().splitlines()] == [CLASSES[i].ilsvrc_id for i in bundled_labels()]


def test_archives_are_flat_and_complete(bundled, calibration, parsed):
    assert list(bundled) == [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 1001)]
    assert list(calibration) == [f"shapes20_calib_{number:08d}.JPEG" for number in range(1, 257)]
    assert set(Counter(parsed[1]).values()) == {50}
    assert parsed[1] != sorted(parsed[1])


def test_special_files_are_what_they_claim(bundled):
    images = {name: opened(jpeg) for name, jpeg in bundled.items()}
    assert {name for name, image in images.items() if image.mode == "L"} == _named("greyscale")
    assert {name for name, image in images.items() if image.mode == "CMYK"} == _named("CMYK")
    assert {name for name, image in images.items() if image.size == VERY_SMALL} == _named("very small")
    assert {name for name, image in images.items() if image.size == VERY_LARGE} == _named("very large")
    with_exif = {name for name, image in images.items() if "exif" in image.info}
    assert with_exif == _named("broken EXIF") | _named("EXIF rotation")


def _named(kind: str) -> set[str]:
    return {name for name, what in SPECIAL_FILES.items() if what == kind}


def test_broken_exif_warns_and_still_decodes(bundled):
    (name,) = _named("broken EXIF")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = opened(bundled[name])
        image.getexif()
        image.load()
    assert any("EXIF" in str(warning.message) for warning in caught)


def test_exif_rotation_turns_the_picture_upright(bundled):
    (name,) = _named("EXIF rotation")
    stored = opened(bundled[name])
    upright = picture("bundled", list(bundled).index(name))
    assert stored.getexif()[0x0112] == 6
    assert mean_difference(ImageOps.exif_transpose(stored), upright) < 8
    assert stored.size == upright.size[::-1]


def test_cmyk_converts_to_sensible_colours(bundled):
    (name,) = _named("CMYK")
    assert mean_difference(opened(bundled[name]), picture("bundled", list(bundled).index(name))) < 8


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in levels of 0..255."""
    one, other = (np.asarray(image.convert("RGB"), np.int16) for image in (one, other))
    return float(np.abs(one - other).mean())


@pytest.mark.parametrize("index", [0, 1, 376, 612, 998, 999])
def test_drawing_again_gives_the_bundled_picture(bundled, index):
    assert mean_difference(opened(bundled_jpeg(index)), opened(bundled[bundled_name(index)])) < 0.5


def test_no_picture_is_shared_between_streams(bundled, calibration):
    assert mean_difference(opened(calibration_jpeg(3)), opened(calibration["shapes20_calib_00000004.JPEG"])) < 0.5
    # The training pictures are drawn at one size; at that size the other streams' must differ from them too.
    side = (64, 64)
    drawn = [picture(stream, index, side) for stream in ("train", "calibration", "bundled") for index in range(100)]
    files = [opened(jpeg) for jpeg in [*bundled.values(), *calibration.values()]]
    assert len({hashlib.sha256(jpeg).digest() for jpeg in [*bundled.values(), *calibration.values()]}) == 1256
    hashes = [pixel_hash(image) for image in [*drawn, *files]]
    assert len(set(hashes)) == len(hashes)


def test_sizes(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 14_000_000
    assert (folder / "vit_shapes20" / "model.safetensors").stat().st_size <= 3_000_000


def test_readme_records_the_files(folder):
    text = data_path("README.md").read_text()
    for name in [*ARCHIVES, "vit_shapes20/config.json", "vit_shapes20/model.safetensors"]:
        content = (folder / name).read_bytes()
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip(" `") for cell in row.strip("|").split("|")]
        expected = f"{len(content):,}", hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
        assert tuple(cells[1:4]) == expected, name
    assert all(name in text for name in SPECIAL_FILES)


def test_timm_loads_the_model_and_it_knows_the_classes(folder, bundled):
    model = timm.create_model(f"local-dir:{folder / 'vit_shapes20'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == [leaf.wnid for leaf in CLASSES]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    recorded = int(re.search(r"(\d+)/1000", data_path("README.md").read_text())[1])
    assert 850 <= recorded <= 970
    images = [opened(jpeg) for jpeg in list(bundled.values())[:100]]
    assert count_correct(model, images, bundled_labels()[:100]) >= 75
