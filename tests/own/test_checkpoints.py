"""The checkpoints that people have, as they have them: a test for each row. transformers and timm are the oracles."""

import argparse
import io
import json
import shutil
import subprocess
import sys
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, resolve_data_config

from vitdemo import (
    Preprocessing,
    VitdemoError,
    answers,
    convert,
    evaluate,
    fast_crop,
    load_model,
    open_data,
    open_images,
    reference_crop,
    verify,
)
from vitdemo.cli import main
from vitdemo.models import loading, processors
from vitdemo.models.model import shapes_of
from vitdemo.paths import REPOSITORY

pytestmark = pytest.mark.own

WNIDS, NAMES = (tuple(of()) for of in (ImageNetInfo().label_names, ImageNetInfo().label_descriptions))
WORDS = ("cat", "dog", "axolotl", "gnu", "newt")
TINY = "vit_tiny_patch16_224"
SMALL = {"num_labels": 5, "id2label": dict(enumerate(WORDS)), "hidden_dropout_prob": 0.0}
DEEP = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WINDOWS = SMALL | {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
STAGES = SMALL | {"hidden_sizes": [16, 32], "depths": [1, 1]}
SIDE = {"height": 64, "width": 64}
SHORTER = {"size": {"shortest_edge": 72}, "crop_size": SIDE}

# model -> the class of its processor, what that says, and the configuration cut down
ARCHITECTURES = {
    "vit": ("DeiT", {"size": {"height": 72, "width": 72}, "crop_size": SIDE}, DEEP | {"image_size": 64}),
    "deit": (
        "DeiT",
        {"size": {"height": 72, "width": 72}, "crop_size": SIDE},
        DEEP | {"image_size": 64, "architectures": ["DeiTForImageClassification"]},
    ),
    "swin": ("ViT", {"size": SIDE, "resample": 3}, WINDOWS),
    "swinv2": ("ViT", {"size": SIDE, "resample": 3}, WINDOWS),
    "beit": ("Beit", {"size": SIDE, "do_center_crop": False}, DEEP | {"image_size": 64}),
    "convnext": ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}, STAGES | {"num_stages": 2}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}}, DEEP | {"image_size": 518}),
    "siglip": ("Siglip", {"size": SIDE}, SMALL | {"vision_config": DEEP | {"image_size": 64, "patch_size": 16}}),
    "mobilevit": (
        "MobileViT",
        SHORTER,
        SMALL | {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 24, 32, 40]},
    ),
    "resnet": ("ConvNext", {"size": {"shortest_edge": 64}}, STAGES | {"embedding_size": 16, "layer_type": "basic"}),
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A function that gives transformers' model of a type and a folder of it, which is not to be changed."""

    @cache
    def make(model_type: str):
        processor, entries, config = ARCHITECTURES[model_type]
        torch.manual_seed(0)
        settings = transformers.AutoConfig.for_model(model_type, **config)
        model = transformers.AutoModelForImageClassification.from_config(settings).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        folder = tmp_path_factory.mktemp("huggingface") / model_type
        model.save_pretrained(folder)
        getattr(transformers, f"{processor}ImageProcessorPil")(**entries).save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def folder(architecture, tmp_path):
    """A copy of a Swin's folder, to be changed."""
    return shutil.copytree(architecture("swin")[1], tmp_path / "swin")


def edited(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(message: str, *arguments, **options) -> None:
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(*map(str, arguments), **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def jpeg_of(height: int, width: int) -> bytes:
    """Smooth noise, on which a shift by a pixel shows."""
    file, noise = io.BytesIO(), np.random.default_rng(height).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module", params=["drawn", "photographs"])
def jpegs(request) -> list[bytes]:
    """Of odd sizes and even ones, wide and high."""
    if request.param == "photographs":
        return [path.read_bytes() for path in request.getfixturevalue("photos")[::20]]
    return [jpeg_of(*sides) for sides in [(331, 257), (375, 500), (500, 333), (301, 302), (90, 401), (40, 61)]]


def normalised(jpeg: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (reference_crop(jpeg, preprocessing) / 255 - mean) / std


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_huggingface_architecture(architecture, model_type, capfd):
    oracle, folder = architecture(model_type)
    capfd.readouterr()
    model, jpeg = load_model(folder), jpeg_of(375, 500)
    assert model.info.classes == model.info.class_names == WORDS and model.info.tag == model_type
    theirs = getattr(transformers, f"{ARCHITECTURES[model_type][0]}ImageProcessorPil").from_pretrained(folder)
    pixels = theirs(Image.open(io.BytesIO(jpeg)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits, expected = model.module(normalised(jpeg, model.info.preprocessing)[None]), oracle(pixels).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    random = torch.randn(2, *model.info.preprocessing.input_size)
    with torch.no_grad():
        flipped = random.flip(1) if model_type == "mobilevit" else random
        torch.testing.assert_close(model.module(random), oracle(flipped).logits, rtol=0, atol=1e-5)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("model_type", ["vit", "convnext", "siglip", "mobilevit"])
def test_answers_are_those_of_transformers_pipeline(architecture, model_type, tmp_path):
    """On the reference path to 1e-4, on the fast path the same class."""
    oracle, folder = architecture(model_type)
    kind = getattr(transformers, f"{ARCHITECTURES[model_type][0]}ImageProcessorPil")
    pipeline = transformers.pipeline("image-classification", oracle, image_processor=kind.from_pretrained(folder))
    for k, sides in enumerate([(331, 257), (375, 500), (500, 333), (301, 302), (90, 401), (240, 240)]):
        (tmp_path / WORDS[k % 5]).mkdir(exist_ok=True)
        (tmp_path / WORDS[k % 5] / f"{k}.jpg").write_bytes(jpeg_of(*sides))
    engine, data = convert(load_model(folder), "eager", "fp32"), open_data(tmp_path)
    theirs = [pipeline(str(tmp_path / file), top_k=5) for file in data.files]
    first = [answer[0]["label"] for answer in theirs]
    rows = evaluate(engine, data, input_path="reference", progress=False).rows
    for row, answer in zip(rows.to_dict("records"), theirs, strict=True):
        scores = {WORDS[row[f"predicted_{k}"]]: row[f"probability_{k}"] for k in range(1, 6)}
        assert scores == pytest.approx({each["label"]: each["score"] for each in answer}, abs=1e-4)
    assert [WORDS[k] for k in rows["predicted_1"]] == first
    assert [WORDS[k] for k in evaluate(engine, data, progress=False).rows["predicted_1"]] == first
    assert answers(engine, open_images([tmp_path]), progress=False)["class_1"].tolist() == first


WITHOUT_EXTRAS = """
import sys
sys.modules["transformers"] = sys.modules["pyarrow"] = None
import torch
from vitdemo import VitdemoError, load_model, open_data

vit, parquet, data, *others = sys.argv[1:]
torch.save(load_model(vit).module(torch.load(f"{data}/x.pt")), f"{data}/logits.pt")
print(len(open_data(data)))
for name, way in ((others[0], load_model), (parquet, open_data)):
    try:
        way(name)
    except VitdemoError as error:
        print(error)
"""


def test_vit_and_folders_without_the_extra_packages(architecture, tmp_path):
    """What needs them says so. DeiT of the hub's facebook/deit-* is transformers' ViT with DeiT's processor."""
    x, (oracle, folder) = torch.randn(1, 3, 64, 64), architecture("vit")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "0.jpg").write_bytes(jpeg_of(40, 40))
    torch.save(x, tmp_path / "set" / "x.pt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    given = [folder, tmp_path / "a.parquet", tmp_path / "set", architecture("swin")[1]]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, given)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, model, data = done.stdout.splitlines()
    assert count == "1" and model.endswith('needs transformers; run `pip install "vitdemo[hf]"`')
    assert data == 'parquet files need pyarrow: pip install "vitdemo[hf]"'
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "set/logits.pt"), oracle(x).logits, rtol=0, atol=1e-5)


PROCESSORS = {
    "DeiT": {},
    "ViT": {"resample": 0, "do_rescale": False},
    "Beit": {"size": {"height": 256, "width": 256}, "do_center_crop": True, "resample": 1},
    "Bit": {"size": {"shortest_edge": 255}},
    "CLIP": {"crop_size": {"height": 217, "width": 217}, "resample": 4},
    "Siglip": {"resample": 5, "rescale_factor": 1 / 127.5},
    "ConvNext": {"size": {"shortest_edge": 224}, "crop_pct": 0.9},
    "MobileViT": {"size": {"shortest_edge": 288}},
    "EfficientNet": {"size": {"height": 64, "width": 64}, "rescale_offset": True, "rescale_factor": 1 / 127.5},
    "MobileNetV2": {"do_normalize": False},
    "Levit": {"size": {"shortest_edge": 250}},
    "PoolFormer": {},
    "Pvt": {"image_std": [0.5, 0.25, 0.125]},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_processor(kind, jpegs):
    oracle = getattr(transformers, f"{kind}ImageProcessorPil")(**PROCESSORS[kind])
    preprocessing, flips = processors.preprocessing_of(json.loads(oracle.to_json_string()), kind)
    for jpeg in jpegs:
        theirs = oracle(Image.open(io.BytesIO(jpeg)).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        theirs = theirs.float().flip(0) if flips else theirs.float()
        scale = float(theirs.abs().max())
        torch.testing.assert_close(normalised(jpeg, preprocessing), theirs, rtol=0, atol=1e-6 * scale)
        if (fast := fast_crop(jpeg, preprocessing)) is not None:
            assert (fast.float() - reference_crop(jpeg, preprocessing).float()).abs().mean() < 0.5


@pytest.mark.parametrize("kind", processors.DEFAULTS)
def test_processor_whose_file_leaves_out_everything(kind):
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")
    given, changes = {"image_processor_type": f"{kind}FeatureExtractor"}, {}
    if kind == "MobileViT":  # whose defaults would enlarge by a border
        changes = {"size": {"shortest_edge": 288}}
    said = json.loads(theirs(**changes).to_json_string())
    assert processors.preprocessing_of(given | changes, "it") == processors.preprocessing_of(said, "it")


def test_words_as_labels(folder):
    assert load_model(folder).info.classes == WORDS
    edited(folder / "config.json", id2label={str(k): f"LABEL_{k}" for k in range(5)})
    assert (load_model(folder).info.classes, load_model(folder).info.class_names) == (None, None)
    edited(folder / "config.json", id2label={str(k): "cat" for k in range(5)})
    assert (load_model(folder).info.classes, load_model(folder).info.class_names) == (None, ("cat",) * 5)


def test_trainer_folder_without_preprocessor(folder):
    (folder / "preprocessor_config.json").unlink()
    refused(r"preprocessor_config.json: not there; .*from_pretrained\(BASE\).save_.*, where BASE is", folder)
    edited(folder / "config.json", _name_or_path="microsoft/swin-tiny")
    refused(r"from_pretrained\('microsoft/swin-tiny'\).save_pretrained\('.*swin'\)", folder)


def test_lora_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "google/vit-base-patch16-224"}')
    refused("a LoRA adapter without its base 'google/vit-base-patch16-224'; .*merge_and_unload", tmp_path)


def test_empty_folder_and_folder_of_weights_alone(tmp_path):
    refused("the folder is empty", tmp_path)
    (tmp_path / "last.ckpt").touch()
    refused("give the architecture as the model and .*last.ckpt with --weights", tmp_path)
    (tmp_path / "run/checkpoint-500").mkdir(parents=True)
    (tmp_path / "run/checkpoint-500/config.json").touch()
    refused("give the folder .*/run/checkpoint-500, which holds one", tmp_path / "run")
    refused("no such folder", f"local-dir:{tmp_path}/nowhere")


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_transformers_module(folder, fault, capfd):
    weights = load_file(folder / "model.safetensors")
    if fault == "missing":
        del weights["classifier.weight"]
    else:
        weights["classifier.more" if fault == "extra" else "classifier.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    words = {"missing": "missing keys .*classifier.weight", "extra": "unexpected keys .*classifier.more"}
    refused(f"model.safetensors: .*{words.get(fault, 'mismatched keys .*classifier.weight')}", folder)
    assert capfd.readouterr().err == ""


def test_half_precision_and_prefix_of_a_wrapper_in_transformers_module(architecture, folder, tmp_path):
    oracle, state = architecture("swin")[0], load_file(folder / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in state.items()}, folder / "model.safetensors")
    edited(folder / "config.json", dtype="float16")
    torch.save({"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}}, tmp_path / "last.ckpt")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(x).logits
    torch.testing.assert_close(load_model(folder).module(x), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(load_model(folder, tmp_path / "last.ckpt").module(x), expected, rtol=0, atol=1e-5)
    random = [load_model(folder, "random").info.weights_sha256 for _ in range(2)]
    assert random[0] == random[1]


def test_folder_that_is_no_classifier_or_needs_more(folder, monkeypatch):
    edited(folder / "config.json", architectures=["SwinModel"])
    refused(r"config.json: architectures \['SwinModel'\] cannot be expressed", folder)
    edited(folder / "config.json", architectures=["MyForImageClassification"], auto_map={"AutoConfig": "my.Config"})
    refused("transformers .* has no MyForImageClassification", folder)
    edited(folder / "config.json", architectures=["SwinForImageClassification"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r'needs transformers; run `pip install "vitdemo\[hf\]"`', folder)


def module_of(name: str = TINY, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(name, **options).eval().requires_grad_(False)


def assert_same(model, oracle: torch.nn.Module) -> None:
    x = torch.randn(1, *model.info.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.module(x), oracle(x), rtol=0, atol=1e-5)


@pytest.fixture
def model_best(tmp_path):
    """What timm's training script leaves after it has learnt seven classes at 96 pixels."""
    own, average = module_of(num_classes=7, img_size=96), module_of(num_classes=7, img_size=96)
    average.head.weight.neg_()
    args = argparse.Namespace(model=TINY, num_classes=7, img_size=96, input_size=None, mean=[0.4, 0.5, 0.6])
    args = argparse.Namespace(**vars(args), std=None, crop_pct=0.8, interpolation="bilinear", model_kwargs={}, gp=None)
    state = {f"module.{key}": tensor for key, tensor in own.state_dict().items()}
    content = {"arch": TINY, "args": args, "state_dict": state, "state_dict_ema": average.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "model_best.pth.tar")
    return tmp_path / "model_best.pth.tar", own, average


@pytest.mark.parametrize("way", ["the file is the model", "the file is the weights"])
def test_checkpoint_of_timms_training_script(model_best, way, capsys):
    file, own, average = model_best
    given = (file,) if way == "the file is the model" else (TINY, file)
    model = load_model(*given)
    assert_same(model, own)
    assert (model.info.tag, model.info.weights) == (TINY, "model_best.pth.tar")
    assert model.info.classes is model.info.class_names is None
    expected = {"input_size": (3, 96, 96), "crop_pct": 0.8, "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6)}
    assert model.info.preprocessing == Preprocessing(**resolve_data_config(expected, own.pretrained_cfg))
    assert "took the weights, as ema was not asked for" in capsys.readouterr().err
    assert_same(load_model(*given, ema=True), average)
    assert "took the average" in capsys.readouterr().err


def test_the_average_scored_from_a_shell_with_outputs_in_the_order_of_train(model_best, tmp_path, capsys):
    """--ema, --split and --class-map, and run.json, which says how classes were decided."""
    file, own, average = model_best
    for k in range(14):  # 10 before 9 as text
        (folder := tmp_path / "set" / ("train" if k % 2 else "val") / f"kind {k // 2 + 7}").mkdir(parents=True)
        (folder / f"{k}.jpg").write_bytes(jpeg_of(100 + 10 * k, 150))
    command = ["evaluate", str(file), "--data", str(tmp_path / "set"), "--split", "train", "--ema"]
    assert main([*command, "--class-map", "sorted", "--out", str(tmp_path / "out")]) == 0
    rows, info = pd.read_csv(tmp_path / "out/predictions.csv"), load_model(file).info
    images = [(tmp_path / "set/train" / name).read_bytes() for name in rows["file"]]
    x = torch.stack([normalised(image, info.preprocessing) for image in images])
    assert rows["predicted_1"].tolist() == average(x).argmax(1).tolist() != own(x).argmax(1).tolist()
    folders = sorted(f"kind {k}" for k in range(7, 14))
    assert rows["label"].tolist() == [folders.index(name.split("/")[0]) for name in rows["file"]] == [*range(7)]
    decided = json.loads((tmp_path / "out/run.json").read_text())["settings"]["classes_decided"]
    assert decided == "by order, the folders as text"
    assert f"outputs and classes: matched {decided}" in capsys.readouterr().out


def test_a_file_as_the_model_takes_no_other_weights(model_best):
    refused("model_best.pth.tar: is a file of weights; leave --weights out", model_best[0], "random")
    assert shapes_of(str(model_best[0])) is None  # which is to be read first


def test_moving_average_that_is_not_there(tmp_path):
    torch.save(module_of().state_dict(), tmp_path / "plain.pth")
    refused("plain.pth: holds no state_dict_ema or model_ema; leave", TINY, tmp_path / "plain.pth", ema=True)
    refused("plain.pth: does not say its architecture; give that as the model", tmp_path / "plain.pth")
    refused("random weights have no moving average", TINY, "random", ema=True)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    "content, why",
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n",
            "stands for a large file of Git; run `git",
        ),
        ("<!doctype html><title>404</title>", "is a web page, and not the weights; download"),
        ("", "is empty, and not the weights; download"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    refused(f"{name}: {why}", TINY, tmp_path / name)


@pytest.mark.parametrize("inside", ["model_state_dict", "net", "model_ema"])
def test_names_of_the_weights_in_a_training_loops_file(tmp_path, capsys, inside):
    oracle = module_of(num_classes=5)
    torch.save({"epoch": 3, inside: oracle.state_dict() | {"n_averaged": torch.tensor(7)}}, tmp_path / "a.pth")
    assert_same(load_model(TINY, tmp_path / "a.pth", ema=inside == "model_ema"), oracle)
    assert "a.pth: images are prepared as for vit_tiny_patch16_224: 224 px, crop 0.9" in capsys.readouterr().err


def test_weights_in_several_files(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused("its weights are split into several files; save the model again with max_shard_size", folder)


@pytest.mark.parametrize("model_type", ["vit", "swin"])
def test_several_classes_of_one_image(architecture, model_type, tmp_path):
    shutil.copytree(architecture(model_type)[1], tmp_path / "model")
    edited(tmp_path / "model/config.json", problem_type="multi_label_classification")
    refused("problem_type 'multi_label_classification' .*one class per image", tmp_path / "model")


def test_one_output(tmp_path):
    torch.save(module_of("resnet18", num_classes=1).state_dict(), tmp_path / "one.pth")
    refused("resnet18: has one output, and a softmax of one is always 1", "resnet18", tmp_path / "one.pth")


def test_seven_outputs_are_not_imagenets(tmp_path):
    oracle = module_of("resnet18", num_classes=7)
    torch.save(oracle.state_dict(), tmp_path / "seven.pth")
    model = load_model("resnet18", tmp_path / "seven.pth")
    assert_same(model, oracle)
    assert model.info.classes is None and load_model("resnet18", "random").info.classes == WNIDS


@pytest.mark.parametrize("prefix", ["model.", "module.", "net.backbone."])
def test_prefix_of_a_wrapper(tmp_path, capsys, prefix):
    oracle = module_of(num_classes=5)
    state = {f"{prefix}{key}": tensor for key, tensor in oracle.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 1}, tmp_path / "last.ckpt")
    assert_same(load_model(TINY, tmp_path / "last.ckpt"), oracle)
    if prefix == "module.":  # DDP's, which timm removes
        return
    torch.save({"state_dict": {"criterion.weight": torch.ones(5)} | state}, tmp_path / "loss.ckpt")
    assert_same(load_model(TINY, tmp_path / "loss.ckpt"), oracle)
    assert f"loss.ckpt: left out what is not below '{prefix}': criterion.weight" in capsys.readouterr().err
    torch.save(state | {f"teacher.{key}": tensor for key, tensor in oracle.state_dict().items()}, tmp_path / "two.ckpt")
    refused("two.ckpt: weights of another architecture", TINY, tmp_path / "two.ckpt")


def test_swins_own_file(tmp_path):
    """Its masks and indices are in the file, it merges patches at the end of a stage, and its head has another name."""
    name = "swin_tiny_patch4_window7_224"
    oracle, state = module_of(name, num_classes=3), {}
    for key, tensor in oracle.state_dict().items():
        stage = key.split(".")[1]
        key = key.replace(f"layers.{stage}.downsample", f"layers.{int(stage) - 1}.downsample") if "down" in key else key
        state[key.replace("head.fc.", "head.")] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": state}, tmp_path / "swin.pth")
    assert_same(load_model(name, tmp_path / "swin.pth"), oracle)


def to_npz(module: torch.nn.Module, path) -> None:
    """As Google's Flax writes a ViT."""
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    heads, width = module.blocks[0].attn.num_heads, module.embed_dim
    arrays = {"cls": state["cls_token"], "Transformer/posembed_input/pos_embedding": state["pos_embed"]}
    arrays |= {"embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)}
    arrays |= {"embedding/bias": state["patch_embed.proj.bias"]}
    arrays |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}

    def norm(ours: str, theirs: str):
        return {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}

    arrays |= norm("norm", "Transformer/encoder_norm")
    for k in range(len(module.blocks)):
        ours, theirs = f"blocks.{k}", f"Transformer/encoderblock_{k}"
        arrays |= norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        parts = zip(*(np.split(state[f"{ours}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias")), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for i in range(2):
            arrays[f"{theirs}/MlpBlock_3/Dense_{i}/kernel"] = state[f"{ours}.mlp.fc{i + 1}.weight"].T
            arrays[f"{theirs}/MlpBlock_3/Dense_{i}/bias"] = state[f"{ours}.mlp.fc{i + 1}.bias"]
    np.savez(path, **arrays)


def test_googles_npz(tmp_path):
    oracle = module_of(num_classes=5)
    to_npz(oracle, tmp_path / "Ti_16.npz")
    assert_same(load_model(TINY, tmp_path / "Ti_16.npz"), oracle)
    refused("Ti_16.npz: does not say its architecture; give that", tmp_path / "Ti_16.npz")
    refused("Ti_16.npz: weights of another architecture", "vit_small_patch16_224", tmp_path / "Ti_16.npz")
    refused("Ti_16.npz: weights of another architecture", "resnet18", tmp_path / "Ti_16.npz")


def test_torchvisions_vit(tmp_path):
    """timm knows no translation of it."""
    state = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16).state_dict()
    torch.save(state, tmp_path / "vit_b_16.pth")
    refused("vit_b_16.pth: weights of another architecture", "vit_base_patch16_224", tmp_path / "vit_b_16.pth")


def saved(folder, **changes):
    """A small model as timm saves it for the hub."""
    module = module_of(num_classes=4, embed_dim=32, depth=1, num_heads=2)
    options = {"num_classes": 4, "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    timm.models.save_for_hf(module, folder, model_config=options | changes, safe_serialization=True)
    return folder, module


@pytest.mark.parametrize("spelling", ["local-dir:{}", "{}"])
def test_timms_folder(tmp_path, spelling):
    folder, oracle = saved(tmp_path, label_names=["a", "b", "c", "d"], label_descriptions={"a": "the letter a"})
    model = load_model(spelling.format(folder))
    assert_same(model, oracle)
    assert model.info.classes == ("a", "b", "c", "d") and model.info.class_names == ("the letter a", "b", "c", "d")


def test_weights_of_another_image_size(tmp_path):
    oracle = module_of(img_size=96, num_classes=7)
    torch.save(oracle.state_dict(), tmp_path / "mine.pth")
    refused("mine.pth: .* or trained at another image size; .*docs/your_own.md", TINY, tmp_path / "mine.pth")


@pytest.mark.parametrize("name, options", [(TINY, {"img_size": 96}), ("convnext_atto", {}), ("resnet50d", {})])
def test_a_folder_that_timm_writes_as_the_documentation_says(tmp_path, name, options):
    oracle, size = module_of(name, num_classes=2, **options), (3, 96, 96)
    data = dict(input_size=size, crop_pct=0.8, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    names = dict(label_names=["cat", "dog"])
    timm.models.save_for_hf(oracle, tmp_path, safe_serialization=True, model_config=names, data_config=data)
    model = load_model(tmp_path)
    assert_same(model, oracle)
    assert model.info.classes == ("cat", "dog") and model.info.preprocessing.input_size == size
    assert {name: getattr(model.info.preprocessing, name) for name in data} == data


def test_timms_flat_folder_of_2021(tmp_path):
    oracle = module_of("resnet18")
    config = {key: value for key, value in oracle.pretrained_cfg.items() if key not in ("hf_hub_id", "tag")}
    config |= {"architecture": "resnet18", "labels": list(NAMES), "num_features": 512, "hf_hub": "owner/model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path)
    assert_same(model, oracle)
    assert model.info.classes == WNIDS and model.info.class_names == NAMES


def test_folder_whose_weights_have_other_outputs(tmp_path):
    folder, _ = saved(tmp_path / "a", label_names=["a", "b", "c", "d"])
    other = module_of(num_classes=6, embed_dim=32, depth=1, num_heads=2)
    save_file(other.state_dict(), tmp_path / "six.safetensors")
    model = load_model(folder, tmp_path / "six.safetensors")
    assert_same(model, other)
    assert model.info.classes is None
    shutil.copy(tmp_path / "six.safetensors", folder / "model.safetensors")
    refused("config.json: says 4 classes, and the weights next to it have 6 outputs", folder)


def test_timms_classifier_in_transformers_wrapping(tmp_path):
    """TimmWrapperForImageClassification's folder holds timm's configuration, and timm's keys behind a prefix."""
    folder, oracle = saved(tmp_path)
    edited(folder / "config.json", architectures=["TimmWrapperForImageClassification"], model_type="timm_wrapper")
    save_file({f"timm_model.{k}": t for k, t in oracle.state_dict().items()}, folder / "model.safetensors")
    assert_same(load_model(folder), oracle)


@pytest.mark.parametrize("prefix", ["timm/", "hf-hub:timm/", "hf:timm/"])
def test_names_of_timms_on_the_hub(prefix):
    assert load_model(f"{prefix}resnet18.tv_in1k", "random").info == load_model("resnet18.tv_in1k", "random").info


def test_other_repositories_of_the_hub(monkeypatch):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    refused("owner/vit: config.json is not in the Hugging Face cache .*hf download owner/vit", "hf-hub:owner/vit")


def test_older_names_of_timms():
    assert load_model("vit_base_patch16_224_in21k", "random").info.tag == "vit_base_patch16_224.augreg_in21k"


def test_paths_that_begin_like_timms_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, oracle = saved(tmp_path / f"{TINY}.mine")
    assert_same(load_model(folder.name), oracle)
    torch.save({"arch": TINY, "state_dict": module_of(num_classes=7).state_dict()}, f"{TINY}.pth")
    assert load_model(f"{TINY}.pth").info.outputs == 7
    refused(f"{TINY}.other: has no such weights tag", f"{TINY}.other")


@pytest.mark.parametrize("name", ["resnet50d", "resnet50d.ra2_in1k"])
def test_a_checkpoint_of_timms_script_has_its_trainings_size(tmp_path, name):
    """The test size of a tag is the one at which its own weights are better: here 288 px, the training's is 224."""
    state = module_of("resnet50d", num_classes=5).state_dict()
    args = argparse.Namespace(model=name, num_classes=5, img_size=None, input_size=None)
    torch.save({"arch": "resnet50d", "state_dict": state, "args": args}, tmp_path / "model_best.pth.tar")
    preprocessing = load_model(tmp_path / "model_best.pth.tar").info.preprocessing
    assert (preprocessing.input_size, preprocessing.crop_pct) == ((3, 224, 224), 0.875)
    torch.save(module_of("resnet50d").state_dict(), tmp_path / "timms_own.bin")
    assert load_model("resnet50d.ra2_in1k", tmp_path / "timms_own.bin").info.preprocessing.input_size == (3, 288, 288)


@pytest.mark.parametrize(
    "tag, side, crop_pct", [("resnet50d.ra2_in1k", 288, 0.95), ("resnet18.tv_in1k", 224, 0.875), (TINY, 224, 0.9)]
)
def test_size_for_tests(tag, side, crop_pct):
    preprocessing = load_model(tag, "random").info.preprocessing
    assert (preprocessing.input_size, preprocessing.crop_pct) == ((3, side, side), crop_pct)


def test_file_with_code_is_not_run(tmp_path):
    torch.save({"arch": TINY, "state_dict": {}, "args": partial(print, "run")}, tmp_path / "odd.pth")
    refused("odd.pth: cannot be read as weights .*it holds more than tensors", tmp_path / "odd.pth")


def test_a_wrapped_module_is_verified_layer_by_layer(tmp_path):
    """transformers' modules have one child, whose parts are the layers; a batch of 1 keeps its dimension."""
    from transformers import BeitConfig, BeitForImageClassification, ViTImageProcessor

    config = BeitConfig(image_size=32, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    BeitForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    for images in (1, 3):
        report = verify(convert(model, "onnx", "fp32"), model, images=images, progress=False)
        assert report.ok and report.layers["layer"].tolist() == ["classifier.beit", "logits"], report
