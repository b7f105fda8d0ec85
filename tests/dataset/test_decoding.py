"""The reference path against timm's transform and transformers' processor; batches decoded ahead."""

import io
import random
import threading
from dataclasses import asdict, replace
from time import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from transformers import ViTImageProcessorPil

from tests.dataset.conftest import many_scans, mutated
from vitdemo import Preprocessing, VitdemoError, reference_crop
from vitdemo.dataset.batches import prefetched_batches
from vitdemo.dataset.decoding import INPUT_PATHS, UnreadableImage, fast_crop, refusal
from vitdemo.dataset.samples import Sample
from vitdemo.imagenet import image_facts
from vitdemo.machine import now

CENTER = Preprocessing((3, 224, 224), 0.9, "center", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SQUASH = Preprocessing((3, 224, 224), 1.0, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def jpeg_of(array: np.ndarray, mode: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, "JPEG", **options)
    return file.getvalue()


GOOD = jpeg_of(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["shapes20", "photographs"])
def jpegs(request) -> list[bytes]:
    """Every odd file of the bundled set, and some ordinary ones; photographs."""
    if request.param == "photographs":
        return [path.read_bytes() for path in request.getfixturevalue("photos")[::8]]
    data = request.getfixturevalue("shapes20")
    facts = image_facts(data)
    odd = facts.index[(facts["mode"] != "RGB") | (facts["exif"] != "") | ~facts["width"].between(100, 1000)]
    return [data[i].image for i in [*odd, *range(0, len(data), 50)]]


def timm_reference(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """timm's evaluation transform to its end, normalised float32, as timm.data.ImageDataset applies it."""
    transform = create_transform(**asdict(preprocessing), is_training=False)
    return transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@pytest.mark.parametrize("crop_mode, crop_pct", [("center", 0.9), ("center", 0.875), ("squash", 1.0), ("squash", 0.9)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_timms(jpegs, crop_mode, crop_pct, interpolation):
    preprocessing = replace(CENTER, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation)
    for jpeg in jpegs:
        crop = reference_crop(jpeg, preprocessing)
        assert crop.dtype == torch.uint8 and crop.shape == (3, 224, 224)
        torch.testing.assert_close((crop / 255 - 0.5) / 0.5, timm_reference(jpeg, preprocessing), atol=1e-6, rtol=0)


def test_squash_is_hugging_faces(jpegs):
    processor = ViTImageProcessorPil()  # the defaults of google/vit-*-patch16-224
    for jpeg in jpegs:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close((reference_crop(jpeg, SQUASH) / 255 - 0.5) / 0.5, theirs, atol=1e-5, rtol=0)


FAST = [
    (CENTER, "center"),
    (replace(CENTER, crop_pct=0.875, interpolation="bilinear"), "center, bilinear"),
    (SQUASH, "squash"),
    (replace(SQUASH, crop_pct=0.9, interpolation="bicubic"), "squash, bicubic"),
    (replace(SQUASH, input_size=(3, 128, 256)), "squash, not square"),
]


@pytest.mark.parametrize("preprocessing", [p for p, _ in FAST], ids=[name for _, name in FAST])
def test_fast_crop_is_the_reference_to_a_twentieth_of_a_level(preprocessing, jpegs):
    pairs = [(fast_crop(jpeg, preprocessing), reference_crop(jpeg, preprocessing)) for jpeg in jpegs]
    pairs = [(fast, reference) for fast, reference in pairs if fast is not None]
    assert len(pairs) >= 0.95 * len(jpegs)
    differences = [(fast.float() - reference.float()).abs() for fast, reference in pairs]
    assert all(fast.dtype == torch.uint8 and fast.shape == reference.shape for fast, reference in pairs)
    assert torch.stack(differences).mean() <= 0.05
    assert max(difference.mean() for difference in differences) < 0.5


def test_decoded_pixels_are_pils(jpegs):
    """At full size there is nothing to resize: what is left is the decoder."""
    sizes = 0
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            whole = Preprocessing((3, image.height, image.width), 1.0, "squash", "bilinear", (0, 0, 0), (1, 1, 1))
        if (fast := fast_crop(jpeg, whole)) is not None:
            assert torch.equal(fast, reference_crop(jpeg, whole))
            sizes += 1
    assert sizes > 20


@pytest.mark.parametrize("kind", ["CMYK", "PNG"])
def test_what_is_no_jpeg_in_colour_is_left_to_the_reference(kind):
    file = io.BytesIO()
    Image.new("CMYK" if kind == "CMYK" else "RGB", (90, 60)).save(file, "PNG" if kind == "PNG" else "JPEG")
    assert fast_crop(file.getvalue(), CENTER) is None


def test_a_crop_that_is_not_square_is_left_to_the_reference_and_bytes_after_the_end_are_not():
    assert fast_crop(GOOD, replace(CENTER, input_size=(3, 128, 256))) is None
    assert torch.equal(fast_crop(GOOD + bytes(7), CENTER), fast_crop(GOOD, CENTER))


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.soak)])
def test_mutated_files_are_read_or_refused_as_by_the_reference(count):
    rng, taken = random.Random(count), 0
    for _ in range(count):
        content = mutated(GOOD, rng)
        if (fast := fast_crop(content, CENTER)) is not None:
            taken += 1
            assert (fast.float() - reference_crop(content, CENTER).float()).abs().mean() < 1
    assert 0 < taken < count


@pytest.mark.parametrize(
    "jpeg, preprocessing, reason",
    [
        (jpeg_of(np.zeros((1, 65_500), np.uint8)), CENTER, "resized it would have 4,0"),
        (jpeg_of(np.zeros((65_500, 1), np.uint8)), replace(CENTER, input_size=(3, 128, 256)), "resized it would have"),
        (many_scans(4000), SQUASH, "1000 x 1000 pixels would take gigabytes or minutes"),
    ],
    ids=["a line", "a line, not square", "scans without end"],
)
def test_what_would_take_gigabytes_or_minutes_is_refused(jpeg, preprocessing, reason):
    start = now()
    assert fast_crop(jpeg, preprocessing) is None
    with pytest.raises(UnreadableImage, match=f"^not decoded: .*{reason}"):
        reference_crop(jpeg, preprocessing)
    assert now() - start < 5


def test_a_line_that_is_not_kept_in_its_ratio_is_taken():
    line = jpeg_of(np.zeros((1, 65_500), np.uint8))
    assert torch.equal(fast_crop(line, SQUASH), reference_crop(line, SQUASH))


def test_scans_are_counted_in_a_jpeg_only():
    assert refusal(1000, 1000, b"\xff\xd8" + b"\xff\xda" * 50_000)
    assert not refusal(1000, 1000, b"\x89PNG" + b"\xff\xda" * 50_000)


def test_exif_rotation_is_ignored():
    array = np.zeros((40, 80, 3), np.uint8)
    array[:, :40] = 255  # white left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain, rotated = jpeg_of(array), jpeg_of(array, exif=exif)
    assert torch.equal(reference_crop(plain, SQUASH), reference_crop(rotated, SQUASH))
    assert image_facts([Sample("a", rotated, "n90000001", 0)])["exif"][0] == "rotated"


@pytest.mark.parametrize(
    "field, value", [("crop_mode", "border"), ("interpolation", "cubic"), ("input_size", (1, 224, 224))]
)
def test_preprocessing_that_is_not_supported_is_refused(field, value):
    with pytest.raises(VitdemoError, match=field):
        replace(CENTER, **{field: value})


def samples(count: int, bad: tuple[int, ...] = ()) -> list[Sample]:
    def jpeg(i):
        return b"broken" if i in bad else jpeg_of(np.full((30, 30, 3), i * 3, np.uint8))

    return [Sample(f"{i:03}.JPEG", jpeg(i), "n90000001", i) for i in range(count)]


@pytest.mark.parametrize("input_path", INPUT_PATHS)
@pytest.mark.parametrize("count, batch", [(1, 8), (8, 8), (9, 8), (23, 7), (20, 1), (5, 100)])
def test_batches_hold_every_image_once_in_order(count, batch, input_path):
    batches = list(prefetched_batches(samples(count), range(count), CENTER, batch, input_path=input_path))
    assert [len(b.files) for b in batches] == [min(batch, count - s) for s in range(0, count, batch)]
    assert [label for b in batches for label in b.labels] == list(range(count))
    levels = torch.cat([b.pixels for b in batches]).float().mean((1, 2, 3))
    assert (levels - torch.arange(count) * 3).abs().max() <= 2  # each row's pixels are its own image's


def test_fallbacks_and_seconds_are_counted():
    data = samples(6, bad=(1,))
    data[3] = data[3]._replace(image=jpeg_of(np.full((30, 30, 3), 9, np.uint8), "CMYK"))
    start = time()
    (fast,) = prefetched_batches(data, range(6), CENTER, 8, input_path="fast")
    (reference,) = prefetched_batches(data, range(6), CENTER, 8)
    assert (fast.fallbacks, reference.fallbacks) == (2, 0)
    assert fast.errors == reference.errors and torch.equal(fast.pixels, reference.pixels)
    assert [bool(error) for error in fast.errors] == [False, True] + [False] * 4 and not fast.pixels[1].any()
    assert start < fast.began < fast.ended <= reference.began < reference.ended < time()
    assert 0 < fast.decode_cpu_s < time() - start


def test_batches_are_decoded_only_a_little_ahead():
    class Counting(list):
        read = 0

        def __getitem__(self, i):
            Counting.read += 1
            return super().__getitem__(i)

    data = Counting(samples(40))
    batches = prefetched_batches(data, range(40), CENTER, 2, ahead=2)
    next(batches)
    assert Counting.read <= 6
    batches.close()


def test_there_is_a_thread_for_every_core_and_closing_early_stops_them(monkeypatch):
    monkeypatch.setattr("vitdemo.dataset.batches.cores", lambda: 5)
    batches = prefetched_batches(samples(40), range(40), CENTER, 8)
    next(batches)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("decode")]) == 5
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_facts_of_an_unreadable_file():
    facts = image_facts([Sample("a", b"no image", "n90000001", 0)])
    assert facts["mode"].tolist() == ["unreadable"] and facts["width"].tolist() == [0]
