"""Loading models by name, folder and file; what cannot be loaded says so in one line."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitdemo import Model, Preprocessing, VitdemoError, data_path, load_model
from vitdemo.conversion import weights as weights_module
from vitdemo.conversion.weights import WEIGHTS_FILE, weights_sha256

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A weights file that fits vit_tiny_patch16_224, random but not those of seed 0."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, on a machine that looks offline."""
    monkeypatch.setattr(weights_module.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights_module.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights_module.constants, "HUGGINGFACE_HUB_CACHE", str(tmp_path), raising=False)
    return tmp_path


def test_bundled_model_is_what_timm_loads_from_the_folder(vit_shapes20):
    theirs = timm.create_model(f"local-dir:{data_path('shapes20/vit_shapes20')}", pretrained=True).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vit_shapes20.module(x), theirs(x))
    config = timm.data.resolve_model_data_config(theirs)
    assert vit_shapes20.info.preprocessing == Preprocessing(**config)


def test_bundled_model_info(vit_shapes20, shapes20):
    info = vit_shapes20.info
    assert (info.tag, info.weights) == ("vit_shapes20", "pretrained")
    assert list(info.classes) == shapes20.classes
    json.dumps(info.to_dict())
    assert not vit_shapes20.module.training
    assert not any(p.requires_grad for p in vit_shapes20.module.parameters())


def test_folder_by_path_is_the_same_model(vit_shapes20):
    model = load_model(str(data_path("shapes20/vit_shapes20")))
    assert model.info.weights_sha256 == vit_shapes20.info.weights_sha256


@pytest.mark.parametrize(
    "name, gmacs", [("vit_tiny_patch16_224", 1.26), ("vit_base_patch16_224", 17.58), ("resnet18", 1.82)]
)
def test_flops_are_twice_the_published_macs(name, gmacs):
    model = load_model(name, "random")
    assert model.info.flops_per_image / 2e9 == pytest.approx(gmacs, rel=0.01)
    assert len(model.info.classes) == 1000 and model.info.classes[65] == "n01751748"


def test_preprocessing_comes_from_the_tag():
    tv = load_model("resnet18.tv_in1k", "random").info.preprocessing
    assert (tv.crop_pct, tv.interpolation, tv.mean) == (0.875, "bilinear", (0.485, 0.456, 0.406))
    a1 = load_model("resnet18.a1_in1k", "random").info.preprocessing
    assert (a1.crop_pct, a1.interpolation) == (0.95, "bicubic")


def test_random_weights_are_the_same_every_time_and_leave_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_model("vit_tiny_patch16_224", "random")
    assert torch.equal(torch.rand(1), expected)
    assert first.info.weights_sha256 == load_model("vit_tiny_patch16_224", "random").info.weights_sha256


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tiny_file, tmp_path, suffix):
    state = load_file(tiny_file)
    path = tiny_file if suffix == ".safetensors" else tmp_path / "tiny.pth"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    model = load_model(TINY, str(path))
    assert all(torch.equal(model.module.state_dict()[key], tensor) for key, tensor in state.items())
    assert model.info.weights == path.name


def test_pretrained_tag_comes_from_the_hub_cache_when_offline(hub_cache, tiny_file):
    repo = hub_cache / f"models--timm--{TINY}"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    shutil.copy(tiny_file, snapshot / WEIGHTS_FILE)
    assert load_model(TINY).info.weights_sha256 == load_model(TINY, str(tiny_file)).info.weights_sha256


def test_pretrained_tag_without_network_says_how_to_bring_the_file(hub_cache):
    with pytest.raises(VitdemoError, match=f"hf download timm/{TINY} model.safetensors"):
        load_model(TINY)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_base_patch16_224", "full tag: .*vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("vit_base_patch16_224.nonsense", "has no such weights tag"),
        ("vit_shapes_20", "no such model; did you mean vit_shapes20"),
        ("", "no such model"),
        ("/nowhere/at/all", "no such model"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def corrupted_folder(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(data_path("shapes20/vit_shapes20"), folder)
    for name, content in changes.items():
        (folder / {"config": "config.json", "weights": WEIGHTS_FILE}[name]).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": b"{"}, "config.json: is not JSON with"),
        ({"config": b"[]"}, "config.json: is not JSON with"),
        ({"config": b"\xff\xfe"}, "config.json: is not JSON with"),
        ({"config": b'{"architecture": "resnet18"}'}, "config.json: is not JSON with"),
        ({"config": b'{"architecture": "resnet18", "pretrained_cfg": null}'}, "config.json: is not JSON with"),
        ({"config": b'{"architecture": "vit_unheard_of", "pretrained_cfg": {}}'}, "not known to timm"),
        (
            {"config": b'{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"depth": -3}}'},
            "timm cannot build this model",
        ),
        ({"weights": b"\x00" * 100}, "cannot be read as weights"),
        ({"weights": b""}, "cannot be read as weights"),
    ],
)
def test_damaged_folder(tmp_path, changes, message):
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(str(corrupted_folder(tmp_path, **changes)))
    assert "\n" not in str(error.value)


def test_folder_without_config_or_weights(tmp_path):
    with pytest.raises(VitdemoError, match="config.json: not there"):
        load_model(str(tmp_path))
    folder = corrupted_folder(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(VitdemoError, match="no such weights file"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.weight"), "key norm.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "key extra is not in this architecture"),
        (lambda s: s.update({"head.bias": torch.zeros(7)}), r"key head.bias has shape \(7,\) where \(1000,\)"),
    ],
)
def test_weights_of_another_architecture_name_the_key(tiny_file, tmp_path, change, message):
    state = load_file(tiny_file)
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(VitdemoError, match=message):
        load_model(TINY, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(2), {1: torch.zeros(1)}, {"state_dict": None}, {"a": 1}]
)
def test_files_that_hold_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(VitdemoError, match="odd.pth: ") as error:
        load_model(TINY, str(tmp_path / "odd.pth"))
    assert "\n" not in str(error.value)


def test_folder_as_timm_saves_it_for_the_hub(tmp_path, vit_shapes20):
    """timm writes the classes' names beside pretrained_cfg, not into it."""
    names = [f"n9{k:07}" for k in range(4)]
    module = timm.create_model("vit_tiny_patch16_224", num_classes=4, embed_dim=32, depth=1, num_heads=2)
    config = {"label_names": names, "num_classes": 4, "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    timm.models.save_for_hf(module, tmp_path, model_config=config, safe_serialization=True)
    model = load_model(str(tmp_path))
    assert list(model.info.classes) == names
    assert model.info.preprocessing == Preprocessing(**timm.data.resolve_model_data_config(module))
    assert model.info.weights_sha256 == weights_sha256(module)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle was run')",))


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "trap.pth"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(VitdemoError, match="perhaps code, and is not opened"):
        load_model(TINY, str(path))
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VitdemoError, match="perhaps code, and is not opened"):
        load_model(TINY, str(path))


def test_from_module_takes_any_classifier():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    preprocessing = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0, 0, 0), (1, 1, 1))
    model = Model.from_module(module, preprocessing, name="mean_color", classes=("a", "b", "c", "d"))
    assert model.info.flops_per_image == 2 * 3 * 4
    assert model.info.weights_sha256 == weights_sha256(module)
    with pytest.raises(VitdemoError, match="4 outputs but 2 classes"):
        Model.from_module(module, preprocessing, name="mean_color", classes=("a", "b"))
    with pytest.raises(VitdemoError, match="does not give logits"):
        Model.from_module(torch.nn.Linear(5, 2), replace(preprocessing, input_size=(3, 8, 8)), name="wrong")
