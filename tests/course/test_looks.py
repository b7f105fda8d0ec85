"""What is said of one picture and of two engines, against torch's own arithmetic and planted differences."""

from dataclasses import replace

import pytest
import torch

from tests.course.hostile import HOSTILE, picture
from vitdemo import (
    VitdemoError,
    convert,
    fast_crop,
    load_model,
    match_classes,
    reference_crop,
)
from vitdemo.course import (
    answers_masked,
    answers_under,
    crop_picture,
    disagreements,
    look_at,
    names_of,
)
from vitdemo.course.looks import top5, with_preprocessing
from vitdemo.course.view import LEAST, MOST, WINDOW, patches_to_hide, second_look
from vitdemo.plots.dataset import thumbnail

SETTINGS = dict(patches=40, down=(25, 75), across=(0, 50))


@pytest.fixture(scope="module")
def bf16(vit_shapes20):
    return convert(vit_shapes20, "eager", "bf16")


@pytest.fixture(scope="module")
def pixels(shapes20, vit_shapes20):
    return reference_crop(shapes20[0].image, vit_shapes20.info.preprocessing)


def test_top5_is_torchs(eager, vit_shapes20, shapes20, pixels):
    names = names_of(vit_shapes20.info, shapes20)
    found = top5(eager, pixels, names)
    logits, classes = eager(pixels[None])[0].topk(5)
    assert found["class"].tolist() == classes.tolist()
    assert found["logit"].tolist() == logits.tolist()
    assert found["answer"].tolist() == [names[k] for k in classes]
    expected = eager(pixels[None])[0].double().softmax(dim=0)[classes]
    assert found["probability"].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert top5(eager, pixels)["answer"][0] == f"class {classes[0]}"


def test_names(vit_shapes20, shapes20):
    assert names_of(vit_shapes20.info, shapes20)[:2] == ["plain crescent", "striped ring"]
    assert names_of(vit_shapes20.info)[0] == "n90382915", "nobody but the data set knows these"
    nameless = replace(vit_shapes20.info, classes=None, class_names=None)
    assert names_of(nameless) is None and names_of(nameless, shapes20) is None
    assert names_of(nameless, match_classes(nameless, shapes20, "sorted"))[:2] == ["plain crescent", "striped ring"]
    imagenet = load_model("vit_tiny_patch16_224", weights="random").info
    assert names_of(replace(imagenet, classes=("n01440764",)), shapes20) == ["tench"]


def test_a_look_without_attention(shapes20):
    resnet = load_model("resnet18", weights="random")
    found = look_at(convert(resnet), resnet, torch.zeros(3, 224, 224, dtype=torch.uint8))
    assert found.maps is None and found.rollout is None and len(found.top5) == 5


def test_answers_under_a_preprocessing(eager, vit_shapes20, shapes20, pixels):
    own = vit_shapes20.info.preprocessing
    wrong = replace(own, mean=(0.0,) * 3, std=(1.0,) * 3)
    squashed = replace(own, crop_mode="squash", crop_pct=1.0)
    names = names_of(vit_shapes20.info, shapes20)
    inputs = {"own": own, "squashed": squashed, "wrong": wrong}
    found = answers_under(vit_shapes20, shapes20[0].image, inputs, names)
    first = top5(eager, pixels, names).iloc[0]
    assert found.loc["own", "answer"] == first["answer"]
    assert found.loc["own", "probability"] == found.loc["own", "first"] == pytest.approx(first["probability"])
    with torch.no_grad():
        by_hand = vit_shapes20.module(pixels[None] / 255).double().softmax(dim=1)[0]
    assert found.loc["wrong", "first"] == pytest.approx(by_hand[first["class"]].item(), abs=1e-6)
    crop = reference_crop(shapes20[0].image, squashed)
    assert found.loc["squashed", "probability"] == pytest.approx(top5(eager, crop)["probability"][0])


def test_answers_while_patches_are_hidden(eager, vit_shapes20, pixels):
    order = [(row, column) for row in range(14) for column in range(14)]
    found = answers_masked(eager, vit_shapes20, pixels, order, [0, 98, 196])
    first = top5(eager, pixels).iloc[0]
    assert found["hidden"].tolist() == [0, 98, 196]
    assert found["class"][0] == first["class"]
    assert found["first"][0] == pytest.approx(first["probability"], abs=1e-5)
    grey = eager(torch.full((1, 3, 224, 224), 128, dtype=torch.uint8)).softmax(dim=1)[0]
    assert found["class"][2] == grey.argmax()
    half = pixels.clone()
    half[:, :112] = 128
    assert found["first"][1] == pytest.approx(eager(half[None]).softmax(dim=1)[0, first["class"]].item(), abs=1e-5)


def test_disagreements_of_two_engines(eager, bf16, shapes20):
    found = disagreements(bf16, eager, shapes20, limit=21, progress=False)
    assert sorted(found["index"]) == list(range(21)), "every image once, the last batch included"
    assert (found["distance"].diff().dropna() <= 0).all()
    worst = found.iloc[0]
    sample = shapes20[int(worst["index"])]
    assert (worst["file"], worst["label"]) == (sample.file, sample.label)
    crop = fast_crop(sample.image, eager.info.preprocessing)[None]
    p, q = (engine(crop)[0].double().softmax(dim=0) for engine in (bf16, eager))
    assert worst["distance"] == pytest.approx(0.5 * (p - q).abs().sum().item(), abs=2e-2)
    assert worst["reference"] == q.argmax()
    assert worst["reference_probability"] == pytest.approx(q.max().item(), abs=1e-4)
    assert found["distance"].max() > 0


def test_an_engine_does_not_disagree_with_itself(eager, shapes20):
    found = disagreements(eager, eager, shapes20, limit=9, progress=False)
    assert (found["distance"] == 0).all() and (found["candidate"] == found["reference"]).all()


def test_a_planted_difference_comes_first(eager, vit_shapes20, shapes20):
    """One class's logit is raised where the model is sure of it."""
    spoilt = convert(with_preprocessing(vit_shapes20, vit_shapes20.info.preprocessing))
    target = shapes20[5].label
    plain = spoilt._infer
    spoilt._infer = lambda x: plain(x) - 30 * torch.nn.functional.one_hot(torch.tensor(target), 20)
    found = disagreements(spoilt, eager, shapes20, limit=12, progress=False)
    assert found["label"][0] == target and found["distance"][0] > 3 * found["distance"][found["label"] != target].max()
    assert (found["logits_apart"] - 30).abs().max() < 1e-3


def test_an_unreadable_image_is_left_out(eager, bf16, shapes20):
    samples = [shapes20[k] for k in range(4)]
    samples[2] = samples[2]._replace(image=b"no picture")
    assert sorted(disagreements(bf16, eager, samples, progress=False)["index"]) == [0, 1, 3]
    with pytest.raises(VitdemoError, match="not one image could be read"):
        disagreements(bf16, eager, samples[2:3], progress=False)


def test_engines_of_other_models_are_not_compared(eager, vit_shapes20, shapes20):
    other = convert(with_preprocessing(vit_shapes20, replace(vit_shapes20.info.preprocessing, mean=(0.4,) * 3)))
    with pytest.raises(VitdemoError, match="other classes or preprocessing"):
        disagreements(other, eager, shapes20, limit=4)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_a_grey_thumbnail(name):
    assert thumbnail(HOSTILE[name][0]).getcolors() == [(240 * 240, (211, 211, 211))]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "JPEG"])
def test_sound_pictures_of_any_kind(vit_shapes20, kind):
    crop = crop_picture(kind, picture(kind), vit_shapes20.info.preprocessing)
    assert crop.shape == (3, 224, 224)
    assert crop[1, 20, 112] > 100 > crop[1, 200, 112] and crop[2, 200, 112] > 200


def test_a_second_look(eager, vit_shapes20, shapes20, pixels):
    first, jpeg = look_at(eager, vit_shapes20, pixels), shapes20[0].image
    own, shown = vit_shapes20.info.preprocessing, (eager, vit_shapes20, shapes20, shapes20.files[0], jpeg)
    assert second_look(first, shown, own) == {}
    ((name, hidden),) = second_look(first, shown, own, WINDOW, **SETTINGS).items()
    assert name == "changed: 56 patches hidden"
    grey = (hidden.pixels == 128).all(dim=0)
    assert grey[48:176, 0:112].all() and not grey[:40].all()
    wrong = replace(own, mean=(0.0,) * 3, std=(1.0,) * 3)
    ((name, scaled),) = second_look(first, shown, wrong).items()
    under = answers_under(vit_shapes20, jpeg, {"wrong": wrong})
    assert name == "changed: mean 0 std 1, answered by eager:fp32"
    assert scaled.top5["probability"][0] == pytest.approx(under["probability"].iloc[0])
    squash = replace(own, crop_mode="squash", crop_pct=1.0)
    ((name, cropped),) = second_look(first, shown, squash, MOST, **SETTINGS).items()
    assert name == "changed: squash crop 1, 40 patches hidden"
    assert (cropped.pixels == 128).all(dim=0).sum() >= 40 * 16 * 16


def test_what_is_looked_at_most_and_least(eager, vit_shapes20, pixels):
    seen = look_at(eager, vit_shapes20, pixels).rollout
    most, least = (patches_to_hide(vit_shapes20, seen, hide, 98, (0, 0), (0, 0)) for hide in (MOST, LEAST))
    assert len(most) == len(least) == 98 and not set(most) & set(least)
    assert seen[most[0]] == seen.max() and seen[least[0]] == seen.min()
